# SPDX-License-Identifier: Apache-2.0
"""The blocks of the study, their runs, and the order in which they are done."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from papers import arms, results_file
from papers.setups import Arm, Regime

SEEDS = tuple(range(1000, 1012))
"""Fixed before any run. Those of the pilots, 900 and on, are none of them."""

Pair = tuple[Regime, Arm]


@dataclass(frozen=True)
class Block:
    """A question: its runs share a file of results.

    Attributes:
        name: of the file.
        runs: regime and arm of each.
    """

    name: str
    runs: tuple[Pair, ...]


def _in(regime: Regime, *given: Arm) -> tuple[Pair, ...]:
    return tuple((regime, arm) for arm in given)


BLOCKS = {
    block.name: block
    for block in (
        Block(
            "sync",
            _in(arms.UNSEEN_FP8, *arms.SYNC_FP8_CORE) + _in(arms.UNSEEN_BF16, *arms.SYNC_BF16_CORE),
        ),
        Block("cause", _in(arms.STRESSED, *arms.CAUSE_ARMS)),
        Block("stability", _in(arms.STRESSED, *arms.STABILITY_ARMS)),
        Block("claims", _in(arms.STRESSED, *arms.CLAIM_ARMS) + _in(arms.CALM, *arms.CALM_ARMS)),
        Block(
            "sync-more",
            _in(arms.OFF_GRID_FP8, *arms.BOTH_PLAIN)
            + _in(arms.UNSEEN_BF16, *arms.SYNC_BF16_MORE)
            + _in(arms.UNSEEN_FP8, *arms.SYNC_FP8_MORE),
        ),
    )
}

STAGES = (
    ("sync", 0, 5),
    ("cause", 0, 5),
    ("sync", 5, 8),
    ("cause", 5, 8),
    ("sync-more", 0, 5),
    ("stability", 0, 5),
    ("claims", 0, 3),
    ("sync", 8, 12),
    ("cause", 8, 12),
    ("stability", 5, 12),
    ("claims", 3, 6),
    ("sync-more", 5, 12),
)
"""In order: block, and the seeds from which up to which one of `SEEDS` it is done."""


def planned(only: Sequence[str] = (), seeds: Sequence[int] = SEEDS) -> Iterator[tuple[Block, Regime, Arm, int]]:
    """Every run in its order, seed by seed within a stage, so that arms are paired whenever the study stops."""
    for name, first, last in STAGES:
        if only and name not in only:
            continue
        for seed in seeds[first:last]:
            for regime, arm in BLOCKS[name].runs:
                yield BLOCKS[name], regime, arm, seed


def count(results: Path) -> str:
    """How many runs of each block have a line, as text."""
    words = []
    for name in BLOCKS:
        runs = {(regime.name, arm.name, seed) for _, regime, arm, seed in planned([name])}
        done = runs & {results_file.run_of(line) for line in results_file.read(results / f"{name}.jsonl")}
        words.append(f"{name}: {len(done)} of {len(runs)}")
    return "\n".join(words)
