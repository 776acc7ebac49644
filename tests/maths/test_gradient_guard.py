# SPDX-License-Identifier: Apache-2.0
"""Which steps the gradient guard leaves out, by hand and on generated norms."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dc_trl.estimators.gradient_guard import LEAST, WINDOW, GradientGuard

GENERATE = settings(max_examples=100, deadline=None, derandomize=True, database=None)
NORMS = st.lists(st.one_of(st.floats(1e-6, 1e6), st.sampled_from([math.nan, math.inf, 0.0])), max_size=80)


def guard_after(norms: list[float], factor: float = 3.0, patience: int = 5) -> GradientGuard:
    guard = GradientGuard(factor, patience)
    for norm in norms:
        guard.judge(norm)
    return guard


def test_a_spike_is_left_out_and_does_not_move_the_median() -> None:
    guard = guard_after([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert guard.median == 4.5  # between 4 and 5
    skipped = guard.judge(13.6)  # 3 × 4.5 = 13.5
    assert skipped is not None and (skipped.norm, skipped.median, skipped.in_a_row) == (13.6, 4.5, 1)
    assert "13.6, 3.022 times the median of 4.5" in skipped.reason
    assert guard.median == 4.5
    assert guard.judge(13.5) is None
    assert guard.median == 5.0  # 1 2 3 4 [5] 6 7 8 13.5


def test_nothing_is_a_spike_before_there_is_a_median() -> None:
    guard = GradientGuard(3.0)
    for norm in [1.0] * (LEAST - 2) + [1000.0]:
        assert guard.judge(norm) is None
    assert guard.median is None
    assert guard.judge(1.0) is None and guard.median == 1.0
    assert guard.judge(1000.0) is not None


@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize("before", [0, 20])
@pytest.mark.parametrize("factor", [3.0, math.inf])
def test_what_is_not_finite_is_always_left_out(norm: float, before: int, factor: float) -> None:
    skipped = guard_after([1.0] * before, factor).judge(norm)
    assert skipped is not None and skipped.reason == f"the gradient norm is {norm}"


def test_an_infinite_factor_lets_every_finite_norm_pass() -> None:
    assert guard_after([1.0] * 20, math.inf).judge(1e300) is None


def test_a_median_of_zero_judges_nothing() -> None:
    assert guard_after([0.0] * 20).judge(1.0) is None


def test_the_median_follows_the_last_steps() -> None:
    guard = guard_after([1.0] * 50 + [2.0] * WINDOW)
    assert guard.median == 2.0


def test_patience_counts_steps_in_a_row() -> None:
    guard = guard_after([1.0] * 8, patience=2)
    guard.judge(math.nan)
    assert not guard.is_exhausted
    guard.judge(1.0)
    guard.judge(9.0)
    assert (guard.in_a_row, guard.skipped, guard.is_exhausted) == (1, 2, False)
    guard.judge(math.inf)
    assert (guard.in_a_row, guard.skipped, guard.is_exhausted) == (2, 3, True)


@GENERATE
@given(NORMS, st.floats(0.1, 10))
def test_the_unit_of_the_gradient_does_not_matter(norms: list[float], unit: float) -> None:
    first, second = GradientGuard(3.017), GradientGuard(3.017)
    scale = 2.0 ** round(math.log2(unit))  # exact
    assert [first.judge(n) is None for n in norms] == [second.judge(n * scale) is None for n in norms]


@GENERATE
@given(NORMS, st.floats(1.01, 100))
def test_what_passes_is_finite_and_within_the_factor(norms: list[float], factor: float) -> None:
    guard = GradientGuard(factor)
    for norm in norms:
        usual = guard.median
        passes = guard.judge(norm) is None
        assert passes == (math.isfinite(norm) and (not usual or norm <= factor * usual))


@GENERATE
@given(NORMS, NORMS)
def test_a_resumed_guard_judges_as_the_uninterrupted_one(before: list[float], after: list[float]) -> None:
    guard = guard_after(before)
    resumed = GradientGuard(3.0)
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert [str(guard.judge(norm)) for norm in after] == [str(resumed.judge(norm)) for norm in after]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"factor": 1.0}, "`factor` is 1.0.*exceeds 1.*Use"),
        ({"factor": math.nan}, "`factor` is nan"),
        ({"factor": True}, "`factor` is True"),
        ({"factor": 3.0, "patience": 0}, "`patience` is 0.*1 or more"),
        ({"factor": 3.0, "patience": 1.5}, "`patience` is 1.5"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        GradientGuard(**arguments)


@pytest.mark.parametrize(
    "change", [{"norms": [-1.0]}, {"norms": [math.inf]}, {"skipped": -1}, {"in_a_row": -2}], ids=str
)
def test_a_damaged_state_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="checkpoint is damaged"):
        GradientGuard(3.0).load_state_dict({"norms": [], "skipped": 0, "in_a_row": 0} | change)
