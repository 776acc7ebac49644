# SPDX-License-Identifier: Apache-2.0
"""A policy whose weights go to a vLLM server over disk, and how far the two are apart."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tiny import tiny_tokenizer
from torch import nn
from vllm_process import VLLMServer

# Longer than two blocks of the prefix cache.
PROMPT = tiny_tokenizer()("the quick brown fox jumps over the lazy dog, 12 + 34 = 46. And then? ").input_ids
FLOAT32 = 2e-3
"""Bound on the gap of log-probs between two float32 implementations of the tiny model."""
BFLOAT16 = 0.5
"""The same between float32 and bfloat16; the tiny model's logits reach 20, where bfloat16's steps are 0.06 to 0.13."""


def engine(server: VLLMServer, model: nn.Module, sync_dir: Path, timeout: float = 5.0, **options: Any) -> Any:
    from dc_trl.rollouts.vllm_disk import VLLMDiskGeneration

    return VLLMDiskGeneration(
        model,
        Accelerator(cpu=True),
        tiny_tokenizer(),
        mode="server",
        server_base_url=server.url,
        server_timeout=timeout,
        max_completion_length=16,
        sync_dir=sync_dir,
        **options,
    )


def scored(rollouts: Any) -> list[tuple[list[int], torch.Tensor]]:
    """8 sampled completions and the server's log-probs of their tokens."""
    _, completions, logprobs, _ = rollouts.generate([PROMPT] * 8, None, num_generations=8)
    assert len(completions) == 8
    return [(ids, torch.tensor(served).squeeze(1)) for ids, served in zip(completions, logprobs, strict=True)]


@torch.no_grad()
def differences(completions: list[tuple[list[int], torch.Tensor]], model: nn.Module) -> torch.Tensor:
    """Of all tokens, the difference between the server's log-prob and the model's."""
    found = []
    for completion, served in completions:
        logits = model(torch.tensor([PROMPT + completion])).logits[0, len(PROMPT) - 1 : -1]
        ours = logits.log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
        found.append((ours - served).abs())
    return torch.cat(found)


def gap(rollouts: Any, model: nn.Module) -> float:
    """Largest difference between the server's log-probs of 8 sampled completions and the model's of these tokens."""
    return float(differences(scored(rollouts), model).max())
