# SPDX-License-Identifier: Apache-2.0
"""Runs whose rejected tokens are known: one generation batch of four micro-batches, under plain SGD."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer
from datasets import Dataset
from runs import dc_trainer, replayed_rollouts, weights
from tiny import tiny_model

from dc_trl import DCGRPOTrainer

# (gradient_accumulation_steps, steps_per_generation, num_iterations)
ALIGNED, REUSED, SPLIT = (4, 4, 1), (4, 4, 2), (2, 4, 1)

FAR = -30.0  # a log μ whose ρ is above 1e6; the others of a replayed rollout have a ρ below 10
BOUNDS = {"icepop": {"low": 0.0, "high": 1e4}}

Marks = Callable[[int, int], list[int]]


def some(row: int, length: int) -> list[int]:
    """The second token of every other sequence, and of sequence 5 all but the last."""
    return list(range(length - 1)) if row == 5 else [1] if row % 2 else []


def whole(row: int, length: int) -> list[int]:
    """`some`, and all of sequence 2 and of the second micro-batch."""
    return list(range(length)) if row in (2, 4, 5, 6, 7) else some(row, length)


def everything(row: int, length: int) -> list[int]:
    return list(range(length))


def marked(marks: Marks, masked: bool = False) -> Callable[..., dict[str, Any]]:
    """Replayed rollouts whose marked tokens are far off, or the environment's; `marks` of row and length."""
    base = replayed_rollouts()

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        output = base(prompts, trainer)
        output["env_mask"] = [[1] * len(ids) for ids in output["completion_ids"]]
        for row, logprobs in enumerate(output["logprobs"]):
            for token in marks(row, len(logprobs)):
                logprobs[token] = FAR
                output["env_mask"][row][token] = int(not masked)
        return output

    return rollout


def length_reward(completions: list[str], **_: Any) -> list[float]:
    """Different within each group."""
    return [float(len(text)) for text in completions]


def run(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch, rollouts: Any, layout: tuple[int, int, int] = ALIGNED,
    train: bool = True, **options: Any,
) -> tuple[torch.Tensor, DCGRPOTrainer]:  # fmt: skip
    """The change of the weights by plain SGD on a generation batch of four micro-batches, a group each; trainer."""
    monkeypatch.setattr(trl.trainer.grpo_trainer, "shuffle_sequence_dict", lambda batch: batch)
    accumulation, per_rollout, iterations = layout
    options = {
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "learning_rate": 1.0,
        "max_steps": per_rollout * iterations // accumulation,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": per_rollout,
        "num_iterations": iterations,
        "constraint": "fixed",
        "multiplier_init": 0.3,
        "epsilon_high": 5.0,
    } | options
    data = Dataset.from_dict({"prompt": [f"{first}+1=" for first in "2345"]})
    if "reward_funcs" not in options:
        options["reward_funcs"] = length_reward
    trainer = dc_trainer(
        output_dir, rollout_func=rollouts, train_dataset=data, shuffle_dataset=False, model=tiny_model(), **options
    )
    before = weights(trainer)
    if train:
        trainer.train()
    return weights(trainer) - before, trainer


def assert_close(change: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.norm() > 0.01
    assert (change - expected).norm() < 1e-5 * expected.norm()
