# SPDX-License-Identifier: Apache-2.0
"""Paired differences of arms over seeds: their mean, a bootstrap interval, a p, and the protocol's verdict."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SAMPLES = 10_000
BOOTSTRAP_SEED = 0
FEWEST, ENOUGH = 5, 8  # seeds for a verdict that points, and for one that holds
MARGIN = 0.05  # of accuracy

HOLDS, DOES_NOT_HOLD, CANNOT_BE_TOLD, NOT_YET_RUN = "holds", "does not hold", "cannot be told", "not yet run"


@dataclass(frozen=True)
class Side:
    """One side of a comparison: an arm in a regime."""

    regime: str
    arm: str


@dataclass(frozen=True)
class Comparison:
    """An outcome of `left` less that of `right`, seed by seed; the claim is that it is above 0.

    Attributes:
        left, right: the arms.
        outcome: of the lines.
        log: whether the logarithms are compared.
        margin: an interval within ± this shows that there is nothing worth mentioning; None where that is not asked.
    """

    left: Side
    right: Side
    outcome: str
    log: bool = False
    margin: float | None = None


@dataclass(frozen=True)
class Estimate:
    """What a comparison comes to.

    Attributes:
        seeds: that both arms have.
        mean: of the differences; NaN without a seed.
        low, high: 95 % interval.
        p: of the exact two-sided test that flips signs.
    """

    seeds: tuple[int, ...]
    mean: float
    low: float
    high: float
    p: float

    @property
    def n(self) -> int:
        """The number of seeds."""
        return len(self.seeds)


def values(lines: Sequence[Mapping[str, Any]], side: Side, outcome: str) -> dict[int, float]:
    """An outcome of an arm by seed, where it is known."""
    chosen = (line for line in lines if line["regime"] == side.regime and line["arm"] == side.arm)
    found = {line["seed"]: line["outcomes"].get(outcome) for line in chosen}
    return {seed: value for seed, value in found.items() if value is not None}


def compare(lines: Sequence[Mapping[str, Any]], comparison: Comparison) -> Estimate:
    """The estimate of a comparison from the lines of the study."""
    scale: Callable[[float], float] = math.log if comparison.log else float
    left, right = (values(lines, side, comparison.outcome) for side in (comparison.left, comparison.right))
    seeds = tuple(sorted(left.keys() & right.keys()))
    return estimate([scale(left[seed]) - scale(right[seed]) for seed in seeds], seeds)


def estimate(differences: Sequence[float], seeds: tuple[int, ...]) -> Estimate:
    """Mean, percentile bootstrap interval and sign-flip p of paired differences."""
    if not differences:
        return Estimate(seeds, math.nan, math.nan, math.nan, math.nan)
    sample = np.asarray(differences)
    draws = np.random.default_rng(BOOTSTRAP_SEED).integers(0, len(sample), (SAMPLES, len(sample)))
    low, high = np.percentile(sample[draws].mean(1), [2.5, 97.5])
    return Estimate(seeds, float(sample.mean()), float(low), float(high), sign_flip_p(differences))


def sign_flip_p(differences: Sequence[float]) -> float:
    """The share of all choices of signs whose mean is as far from 0 as the one that was seen."""
    sample = np.asarray(differences)
    signs = np.asarray(list(itertools.product((1.0, -1.0), repeat=len(sample))))
    means = np.abs((signs * sample).mean(1))
    return float((means >= abs(sample.mean()) - 1e-12).mean())


def verdict(found: Estimate, margin: float | None = None, equal: bool = False) -> str:
    """The protocol's word for an estimate; with 5 to 7 seeds it only points to it.

    Args:
        found: the estimate.
        margin: an interval within ± this shows that there is no difference worth mentioning.
        equal: whether no difference is what is claimed; by default it is a mean above 0.
    """
    if found.n < FEWEST:
        return NOT_YET_RUN
    within = margin is not None and -margin < found.low and found.high < margin
    apart = found.low > 0 or found.high < 0
    if within:
        word = HOLDS if equal or found.low > 0 else DOES_NOT_HOLD
    elif equal:
        word = DOES_NOT_HOLD if apart else CANNOT_BE_TOLD
    elif apart:
        word = HOLDS if found.low > 0 else DOES_NOT_HOLD
    else:
        word = CANNOT_BE_TOLD
    return word if found.n >= ENOUGH else f"points to “{word}”"
