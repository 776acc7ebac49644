# SPDX-License-Identifier: Apache-2.0
"""Where every arm of a seed starts: the demo's policy, warmed up once a seed and kept, and its problems."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from demo_task import build_policy, build_tokenizer, make_problems, round_to_grid, warm_up
from transformers import AutoModelForCausalLM, set_seed

from papers.setups import HELD_OUT

WARMUP_STEPS = 400


def held_out_problems(seed: int) -> list[dict[str, str]]:
    """Problems that no arm of a seed trains on."""
    return make_problems("held-out", HELD_OUT, seed)


def training_problems(seed: int, count: int) -> list[dict[str, str]]:
    """As many problems as a run samples from, each used once; no prompt of them is held out."""
    return make_problems("training", count, seed, {problem["prompt"] for problem in held_out_problems(seed)})


def warm_start(seed: int, folder: Path, steps: int = WARMUP_STEPS) -> Path:
    """The folder with the warmed-up policy of a seed in float32; made on the first call.

    Args:
        seed: of weights, problems and styles.
        folder: where the policies of all seeds are kept.
        steps: of the warm-up.
    """

    def make(making: Path) -> None:
        set_seed(seed)
        tokenizer = build_tokenizer()
        policy = build_policy(tokenizer)
        warm_up(policy, tokenizer, steps, seed, {problem["prompt"] for problem in held_out_problems(seed)})
        policy.save_pretrained(making)
        tokenizer.save_pretrained(making)

    return made_once(folder / f"seed-{seed}-{steps}", make)


def made_once(kept: Path, make: Callable[[Path], None]) -> Path:
    """A folder, made on the first call: under another name at first, so that one that is there is whole.

    Args:
        kept: the folder.
        make: writes into the folder that it is given.
    """
    if not kept.exists():
        making = kept.with_suffix(".making")
        shutil.rmtree(making, ignore_errors=True)
        make(making)
        making.rename(kept)
    return kept


def load_policy(folder: Path | str, grid: str | None) -> Any:
    """The policy of a folder in float32, its weights rounded to a grid, as a published checkpoint's are.

    Args:
        folder: of `warm_start`, or any causal model's.
        grid: `"bf16"`, `"fp8"` (the weights inside the blocks, one scale per output channel), or None.
    """
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if grid is not None:
        round_to_grid(policy, grid)
    return policy
