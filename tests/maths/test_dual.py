# SPDX-License-Identifier: Apache-2.0
"""Dual ascent and the tolerance, against steps replayed by hand and a problem whose λ* is known."""

import math

import pytest

from dc_trl.constraint import DiscrepancyConstraint, DiscrepancyTolerance, penalty_notices
from dc_trl.dual import DualVariable


def test_two_steps_by_hand() -> None:
    dual = DualVariable(init=0.1, lr=2.0, maximum=1.0)
    assert dual.step(0.05) == pytest.approx(0.2)  # 0.1 + 2 · 0.05
    assert dual.step(-0.03) == pytest.approx(0.14)


def test_projection_on_both_ends() -> None:
    dual = DualVariable(init=0.1, lr=1.0, maximum=0.5)
    assert dual.step(-3.0) == 0.0
    assert not dual.saturated
    assert dual.step(7.0) == 0.5
    assert dual.saturated


@pytest.mark.parametrize("violation", [math.nan, math.inf, -math.inf])
def test_non_finite_violation_changes_nothing(violation: float) -> None:
    dual = DualVariable(init=0.1, lr=1.0, maximum=1.0)
    assert dual.step(violation) == 0.1


def test_state_round_trip_and_a_lower_maximum() -> None:
    dual = DualVariable(init=0.7, lr=1.0, maximum=1.0)
    other = DualVariable(init=0.0, lr=1.0, maximum=0.5)
    other.load_state_dict(dual.state_dict())
    assert other.value == 0.5
    with pytest.raises(ValueError, match="damaged"):
        other.load_state_dict({"value": math.nan})


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((-0.1, 1, 1), "init"), ((0, math.nan, 1), "lr"), ((0, 1, math.inf), "maximum"), ((0.6, 1, 0.5), "init")],
)
def test_bad_arguments_are_named(arguments: tuple[float, float, float], name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        DualVariable(*arguments)


def test_dual_ascent_reaches_the_known_multiplier() -> None:
    # max_x −(x − 3)² subject to x ≤ 1: the Lagrangian's x(λ) = 3 − λ/2, so x = 1 at λ* = 4.
    dual = DualVariable(init=0.0, lr=0.5, maximum=10.0)
    for _ in range(200):
        x = 3 - dual.value / 2
        dual.step(x - 1)
    assert dual.value == pytest.approx(4.0) and x == pytest.approx(1.0)


def test_an_inactive_constraint_drives_the_multiplier_to_zero() -> None:
    dual = DualVariable(init=0.5, lr=0.5, maximum=10.0)
    for _ in range(50):
        dual.step(-0.1)
    assert dual.value == 0.0


def test_calibration_takes_the_mean_of_the_first_batches() -> None:
    tolerance = DiscrepancyTolerance(None, slack=1.25, batches=2)
    for mean in (0.004, math.nan, 0.006, 0.5):  # NaN does not count, and the last comes after the end
        tolerance.update(mean)
    assert tolerance.value == pytest.approx(0.00625)


def test_a_given_tolerance_overrides_calibration_and_state() -> None:
    tolerance = DiscrepancyTolerance(0.01, slack=1.25, batches=1)
    tolerance.load_state_dict({"total": 1.0, "count": 1})
    assert tolerance.value == 0.01


def build(kind: str, value: float | None = None) -> DiscrepancyConstraint:
    return DiscrepancyConstraint(kind, DualVariable(0.1, 1.0, 1.0), DiscrepancyTolerance(value, 1.25, 2))


def test_no_penalty_and_no_step_while_calibrating() -> None:
    constraint = build("lagrangian")
    assert constraint.multiplier == 0.0 and math.isnan(constraint.violation(0.5))
    topics = [topic for mean in (0.02, 0.02) for topic, _ in constraint.update(mean)]
    assert topics == ["calibrating", "calibrating", "calibrated"]
    assert constraint.multiplier == 0.1  # untouched by calibration
    constraint.update(0.035)
    assert constraint.multiplier == pytest.approx(0.11)  # 0.1 + (0.035 − 0.025)


@pytest.mark.parametrize("kind", ["none", "fixed"])
def test_a_kind_that_does_not_need_the_tolerance_does_not_say_that_it_waits_for_it(kind: str) -> None:
    constraint = build(kind)
    assert constraint.update(0.02) == []
    ((topic, message),) = constraint.update(0.02)
    assert topic == "calibrated" and f"0.025, which `constraint='{kind}'` does not use" in message
    assert constraint.update(0.02) == []
    assert constraint.metrics(0.03)["violation"] == pytest.approx(0.005)  # what it is measured for


@pytest.mark.parametrize("kind", ["lagrangian", "threshold"])
def test_a_kind_that_waits_for_the_tolerance_says_so(kind: str) -> None:
    constraint = build(kind)
    waiting = ("calibrating", "no penalty yet: calibrating the tolerance on 2 generation batches.")
    assert constraint.update(0.02) == [waiting]
    assert constraint.update(0.02) == [waiting, ("calibrated", "discrepancy tolerance calibrated to 0.025.")]


@pytest.mark.parametrize(
    ("share", "alone", "topics"),
    [
        (0.1, 0.5, []),
        (math.nan, math.nan, []),
        (0.11, 0.0, ["penalty"]),
        (math.nan, 1.0, ["penalty_only"]),
        (0.2, 0.51, ["penalty", "penalty_only"]),
    ],
)
def test_what_is_said_of_a_penalty(share: float, alone: float, topics: list[str]) -> None:
    assert [topic for topic, _ in penalty_notices(share, alone)] == topics


def test_a_penalty_alone_is_explained_with_the_way_out() -> None:
    ((_, message),) = penalty_notices(math.nan, 0.75)
    assert "75% of a batch's sequences" in message and "zero_variance_groups='drop'" in message


@pytest.mark.parametrize(("kind", "applied"), [("none", 0.0), ("fixed", 0.1), ("threshold", 0.0)])
def test_other_kinds_never_move_the_multiplier(kind: str, applied: float) -> None:
    constraint = build(kind)
    assert constraint.multiplier == applied
    for _ in range(5):
        constraint.update(0.5)
    assert constraint.dual.value == 0.1


def test_saturation_is_said_with_the_floor() -> None:
    constraint = build("lagrangian", 0.01)
    assert constraint.update(0.004) == [] and constraint.update(0.008) == []
    ((topic, message),) = constraint.update(5.0)
    assert topic == "saturated" and "the floor was 0.006" in message and "weight sync" in message


def test_a_tolerance_below_the_floor_is_said_once_the_floor_is_known() -> None:
    constraint = build("lagrangian", 0.01)
    assert constraint.update(0.02) == [] and constraint.tolerance.floor is None
    ((topic, message),) = constraint.update(0.04)
    assert topic == "infeasible" and constraint.tolerance.value == 0.01
    assert "below the floor" in message and "0.03" in message and "0.0375" in message  # 0.03, and times 1.25
    assert constraint.update(0.04) == []
    ((topic, message),) = constraint.update(5.0)
    assert topic == "saturated" and "below the floor" in message


@pytest.mark.parametrize("kind", ["none", "fixed", "threshold"])
def test_a_kind_that_moves_no_multiplier_does_not_ask_for_a_tolerance_that_can_be_met(kind: str) -> None:
    constraint = build(kind, 0.01)
    assert [constraint.update(0.04) for _ in range(3)] == [[], [], []]


def test_the_floor_goes_on_in_a_resumed_run() -> None:
    constraint, other = build("lagrangian", 0.01), build("lagrangian", 0.01)
    constraint.update(0.02)
    other.load_state_dict(constraint.state_dict())
    assert [topic for topic, _ in other.update(0.04)] == ["infeasible"]
    assert other.tolerance.floor == pytest.approx(0.03)


def test_constraint_state_round_trip() -> None:
    constraint, other = build("lagrangian"), build("lagrangian")
    for mean in (0.02, 0.03, 0.9):
        constraint.update(mean)
    other.load_state_dict(constraint.state_dict())
    assert other.multiplier == constraint.multiplier and other.tolerance.value == constraint.tolerance.value
