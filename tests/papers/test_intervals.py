# SPDX-License-Identifier: Apache-2.0
"""Paired differences, their intervals and the protocol's verdicts, on numbers that can be worked by hand."""

import math
from typing import Any

import pytest

SEEDS = tuple(range(8))


def line(arm: str, seed: int, accuracy: float | None) -> dict[str, Any]:
    return {"regime": "r", "arm": arm, "seed": seed, "outcomes": {"accuracy": accuracy}}


def test_differences_are_paired_by_seed() -> None:
    from papers.intervals import Comparison, Side, compare

    lines = [line("a", 1, 0.9), line("a", 2, 0.7), line("a", 3, 0.1), line("b", 1, 0.8), line("b", 2, 0.5)]
    lines += [line("b", 4, 0.0), line("a", 5, None), line("b", 5, 0.2)]
    found = compare(lines, Comparison(Side("r", "a"), Side("r", "b"), "accuracy"))
    assert found.seeds == (1, 2)
    assert found.mean == pytest.approx((0.1 + 0.2) / 2)
    logs = compare(lines, Comparison(Side("r", "a"), Side("r", "b"), "accuracy", log=True))
    assert logs.mean == pytest.approx((math.log(0.9 / 0.8) + math.log(0.7 / 0.5)) / 2)


def test_the_p_of_five_equal_signs_is_one_in_sixteen() -> None:
    from papers.intervals import sign_flip_p

    assert sign_flip_p([0.1, 0.2, 0.3, 0.4, 0.5]) == 2 / 32
    assert sign_flip_p([1.0, -1.0]) == 1.0


def test_an_interval_covers_its_mean_and_repeats() -> None:
    from papers.intervals import estimate

    found = estimate([0.1, 0.2, 0.4, 0.0, 0.3], tuple(range(5)))
    assert found == estimate([0.1, 0.2, 0.4, 0.0, 0.3], tuple(range(5)))
    assert 0.0 < found.low < found.mean == pytest.approx(0.2)
    assert found.mean < found.high < 0.4


@pytest.mark.parametrize(
    ("low", "high", "options", "word"),
    [
        (0.01, 0.2, {}, "holds"),
        (-0.2, -0.01, {}, "does not hold"),
        (-0.2, 0.2, {}, "cannot be told"),
        (-0.02, 0.03, {"margin": 0.05}, "does not hold"),
        (0.01, 0.03, {"margin": 0.05}, "holds"),
        (-0.02, 0.03, {"margin": 0.05, "equal": True}, "holds"),
        (-0.02, 0.08, {"margin": 0.05, "equal": True}, "cannot be told"),
        (0.02, 0.08, {"margin": 0.05, "equal": True}, "does not hold"),
    ],
)
def test_verdicts(low: float, high: float, options: dict[str, Any], word: str) -> None:
    from papers.intervals import Estimate, verdict

    def at(n: int) -> str:
        return verdict(Estimate(SEEDS[:n], (low + high) / 2, low, high, 0.1), **options)

    assert at(8) == word
    assert at(7) == at(5) == f"points to “{word}”"
    assert at(4) == at(0) == "not yet run"
