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
        Block("rounding", _in(arms.UNSEEN_FP8, *arms.BOTH_PLAIN, arms.NEAREST_TWICE)),
        Block("cause", _in(arms.STRESSED, *arms.CAUSE_ARMS)),
        Block("one-rounding", _in(arms.UNSEEN_BF16, *arms.BOTH_PLAIN, *arms.ONE_ROUNDING, arms.NEAREST_HALF_MORE)),
        Block("remedies", _in(arms.UNSEEN_FP8, *arms.NEAREST_REMEDIES)),
        Block("published", _in(arms.PUBLISHED_BF16, *arms.PUBLISHED_ARMS)),
        Block("stability", _in(arms.STRESSED, *arms.STABILITY_ARMS)),
        Block("mild", _in(arms.MILD, *arms.MILD_ARMS)),
        Block("forms", _in(arms.MILD, *arms.FORM_ARMS)),
        Block("claims", _in(arms.STRESSED, *arms.CLAIM_ARMS) + _in(arms.CALM, *arms.CALM_ARMS)),
        Block(
            "rounding-more",
            _in(arms.OFF_GRID_FP8, *arms.BOTH_PLAIN)
            + _in(arms.UNSEEN_FP8, *arms.DITHER_REMEDIES)
            + _in(arms.UNSEEN_BF16, *arms.NEAREST_REMEDIES, *arms.DITHER_REMEDIES),
        ),
    )
}

STAGES = (
    ("rounding", 0, 5),
    ("cause", 0, 5),
    ("one-rounding", 0, 5),
    ("rounding", 5, 8),
    ("cause", 5, 8),
    ("remedies", 0, 5),
    ("mild", 0, 5),
    ("one-rounding", 5, 8),
    ("forms", 0, 5),
    ("mild", 5, 8),
    ("remedies", 5, 8),
    ("published", 0, 8),
    ("stability", 0, 5),
    ("claims", 0, 5),
    ("rounding-more", 0, 5),
    ("forms", 5, 8),
    ("claims", 5, 6),
    ("stability", 5, 12),
    ("rounding-more", 5, 12),
    ("rounding", 8, 12),
    ("cause", 8, 12),
    ("mild", 8, 12),
    ("forms", 8, 12),
    ("one-rounding", 8, 12),
    ("remedies", 8, 12),
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
