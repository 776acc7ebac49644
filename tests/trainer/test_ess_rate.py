# SPDX-License-Identifier: Apache-2.0
"""The ESS-scaled learning rate by hand, and its state."""

import json
import math

import pytest

from dc_trl.estimators.ess_rate import EssRate, ess_rate_scale


@pytest.mark.parametrize(
    ("ess", "reference", "min_scale", "expected"),
    [
        (1.0, 1.0, 0.1, 1.0),
        (0.25, 1.0, 0.1, 0.5),  # √0.25
        (0.5, 1.0, 0.1, math.sqrt(0.5)),
        (0.2, 0.8, 0.1, 0.5),  # √(0.2/0.8)
        (0.9, 0.8, 0.1, 1.0),  # above the reference the rate is whole
        (1.0 + 1e-6, 1.0, 0.1, 1.0),  # a sum's rounding
        (0.0025, 1.0, 0.1, 0.1),  # √0.0025 = 0.05, below the floor
        (0.0025, 1.0, 0.01, 0.05),
        (0.0, 1.0, 0.1, 0.1),
    ],
)
def test_the_scale_by_hand(ess: float, reference: float, min_scale: float, expected: float) -> None:
    assert ess_rate_scale(ess, reference, min_scale) == pytest.approx(expected)


def test_weights_that_carry_a_quarter_of_the_batch_halve_the_rate() -> None:
    # Four samples, one of which has all the weight: (Σ w)² / Σ w² = 1 of 4.
    weights = [1.0, 0.0, 0.0, 0.0]
    ess = sum(weights) ** 2 / sum(w * w for w in weights) / len(weights)
    assert ess_rate_scale(ess) == 0.5


def test_the_newest_batch_counts_once_and_a_batch_without_one_not_at_all() -> None:
    rate = EssRate()
    assert rate.scale == 1.0 and rate.ess is None
    assert rate.update(1, 0.25) == 0.5
    assert rate.update(1, 1.0) == 0.5  # counted
    assert rate.update(2, math.nan) == 0.5  # nothing was measured
    assert rate.update(2, math.inf) == rate.update(2, -0.5) == 0.5
    assert rate.update(2, 0.81) == pytest.approx(0.9)
    assert (rate.ess, rate.last_step) == (0.81, 2)


def test_the_state_travels_as_json() -> None:
    rate, resumed = EssRate(0.9, 0.2), EssRate(0.9, 0.2)
    rate.update(7, 0.3)
    resumed.load_state_dict(json.loads(json.dumps(rate.state_dict())))
    assert vars(resumed) == vars(rate)
    assert resumed.update(7, 0.9) == rate.scale
    assert resumed.update(8, 0.4) == rate.update(8, 0.4)


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, math.nan])
@pytest.mark.parametrize("name", ["reference", "min_scale"])
def test_bad_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is {value}.*Pass"):
        EssRate(**{name: value})
    with pytest.raises(ValueError, match=f"`{name}` is {value}.*Pass"):
        ess_rate_scale(0.5, **{name: value})


@pytest.mark.parametrize("ess", [-0.1, math.nan, math.inf])
def test_an_ess_that_is_none_is_named(ess: float) -> None:
    with pytest.raises(ValueError, match=f"`ess` is {ess}.*Pass"):
        ess_rate_scale(ess)
