# SPDX-License-Identifier: Apache-2.0
"""A smoke of the study: every arm for a few updates. Its numbers mean nothing and are not kept."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from papers.blocks import BLOCKS, Block
from papers.stack import Stack

SEED = 0
WARMUP_STEPS = 20
ROLLOUTS = 2
BATCH = 16
HELD_OUT = 16


def shortened(block: Block) -> Block:
    """A block whose runs are as short as they can be."""
    short = {"rollouts": ROLLOUTS, "held_out": HELD_OUT}
    runs = ((replace(regime, batch=_batch(regime.updates), **short), arm) for regime, arm in block.runs)
    return Block(block.name, tuple(runs))


def _batch(updates: int) -> int:
    """Completions of a rollout: each of its mini-batches holds a whole group."""
    return max(BATCH, 8 * updates)


def smoke(folder: Path, only: Sequence[str] = (), jobs: int = 1, stack: Stack | None = None) -> None:
    """Runs every arm of the blocks once.

    Raises:
        RuntimeError: if a run failed or left no line.
    """
    from papers import published, training  # noqa: F401 (loaded once, before the forks)
    from papers.runner import Todo, do
    from papers.start import warm_start

    started, starts = time.time(), folder / "starts"
    todo = [
        Todo(block, regime, arm, SEED)
        for block in map(shortened, BLOCKS.values())
        if not only or block.name in only
        for regime, arm in block.runs
    ]
    stack = stack or Stack()
    if stack.model is None:  # what runs start from, by one process, before several read it
        warm_start(SEED, starts, WARMUP_STEPS)
    if published.is_there() and any(stack.takes_published(run.regime) for run in todo):
        published.start(starts)
    do(todo, folder / "results", starts, jobs, warmup_steps=WARMUP_STEPS, stack=stack)
    print(f"{len(todo)} runs in {(time.time() - started) / 60:.1f} minutes; nothing is kept")
