# SPDX-License-Identifier: Apache-2.0
"""Length-decay: the learning-rate scale of Algorithm 1 by hand, and the surge detector on generated curves."""

import json
import math
import random
from collections.abc import Callable

import pytest

from dc_trl.length_decay import LengthSurgeDetector, decay_period, length_decay_scale

SEEDS = range(12)
Curve = Callable[[int], float]


def noisy(curve: Curve, steps: int, noise: float, seed: int) -> list[float]:
    """Lengths of steps 1 to `steps`; multiplicative Gaussian noise."""
    rng = random.Random(f"{seed} {noise}")
    return [curve(step) * max(0.05, 1 + rng.gauss(0, noise)) for step in range(1, steps + 1)]


def surge(centre: float, width: float, sharpness: float, high: float = 3500) -> Curve:
    """Logistic rise from 1,000. `sharpness` 4.39: `width` spans 10–90 % of the rise; 9.19: 1–99 %."""
    return lambda step: 1000 + (high - 1000) / (1 + math.exp(-sharpness / width * (step - centre)))


def fires_at(lengths: list[float], every: int = 1) -> list[int]:
    """The steps at which a default detector fires; with `every`, it sees means over that many steps."""
    detector = LengthSurgeDetector()
    fired = []
    for end in range(every, len(lengths) + 1, every):
        if detector.update(end, sum(lengths[end - every : end]) / every):
            fired.append(end)
    assert detector.surge_step == (fired[0] if fired else None)
    return fired


@pytest.mark.parametrize("sharpness", [4.39, 9.19])
@pytest.mark.parametrize("noise", [0.03, 0.08, 0.15])
@pytest.mark.parametrize("width", [4, 8, 12, 20])
@pytest.mark.parametrize("centre", [45, 60, 110, 300])
def test_a_surge_fires_once_and_in_time(centre: int, width: int, noise: float, sharpness: float) -> None:
    for seed in SEEDS:
        fired = fires_at(noisy(surge(centre, width, sharpness), centre + width + 80, noise, seed))
        assert len(fired) == 1, (seed, fired)
        assert centre - width <= fired[0] <= centre + width + 12, (seed, fired)


@pytest.mark.parametrize(("centre", "last"), [(90, 107), (110, 127)])  # the paper's 8B and 4B models
def test_the_papers_surges_give_periods_near_the_papers(centre: int, last: int) -> None:
    for seed in SEEDS:
        (fired,) = fires_at(noisy(surge(centre, 8, 9.19), 250, 0.08, seed))
        assert centre < fired <= last
        assert decay_period(fired) < 250  # the period that failed on the 4B model


@pytest.mark.parametrize(
    ("curve", "noise"),
    [
        pytest.param(lambda step: 1000, 0.2, id="flat"),
        pytest.param(lambda step: 1000 + 2000 * step / 600, 0.15, id="slow linear growth"),
        pytest.param(lambda step: 1000 * 3 ** (step / 600), 0.15, id="slow exponential growth"),
        pytest.param(lambda step: 300 + 2700 * math.exp(-step / 150), 0.15, id="shrinking"),
        pytest.param(lambda step: 3000 if step < 100 else 800, 0.15, id="shrinking at once"),
        pytest.param(lambda step: 500 if 150 <= step < 160 else 1000, 0.15, id="short dip"),
        pytest.param(lambda step: 500 if 150 <= step < 190 else 1000, 0.15, id="dip of the baseline's length"),
        pytest.param(lambda step: 500 if 150 <= step < 300 else 1000, 0.15, id="long dip"),
        pytest.param(lambda step: 750 + 250 * math.cos(2 * math.pi * step / 120), 0.1, id="waves down to half"),
    ],
)
def test_what_is_no_surge_stays_silent(curve: Curve, noise: float) -> None:
    for seed in SEEDS:
        assert fires_at(noisy(curve, 600, noise, seed)) == [], seed


@pytest.mark.parametrize("gaps", [(600, 600), (7, 7), (7, 15), (10, 15)], ids=str)
@pytest.mark.parametrize("noise", [0.03, 0.15])
def test_outliers_of_one_step_stay_silent(gaps: tuple[int, int], noise: float) -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        lengths = noisy(lambda step: 1000, 600, noise, seed)
        step = rng.randint(40, 300) if gaps[0] == 600 else rng.randint(0, 10)
        while step < 600:
            lengths[step] *= 5
            step += rng.randint(*gaps)
        assert fires_at(lengths) == [], seed


@pytest.mark.parametrize("every", [2, 5, 10])
def test_sparse_logs_find_the_surge_later_and_no_slow_growth(every: int) -> None:
    for seed in SEEDS:
        (fired,) = fires_at(noisy(surge(110, 8, 9.19), 300, 0.1, seed), every)
        assert 110 < fired <= 118 + 12 + 3 * every
        assert fires_at(noisy(lambda step: 1000 + 2000 * step / 600, 600, 0.15, seed), every) == []


def test_ratio_sets_the_growth_that_fires() -> None:
    lengths = noisy(surge(80, 8, 9.19, high=2000), 200, 0.05, 0)
    strict, lenient = LengthSurgeDetector(), LengthSurgeDetector(ratio=1.8)
    assert not any([strict.update(step, length) for step, length in enumerate(lengths, 1)])
    assert any([lenient.update(step, length) for step, length in enumerate(lengths, 1)])


def test_surge_ratio_by_hand() -> None:
    # window 3, lag 3, baseline 5: at step 8 the medians are those of steps 6-8 and of steps 1-5.
    detector = LengthSurgeDetector(window=3, lag=3, baseline=5, patience=2)
    for step, length in enumerate([100, 900, 110, 90, 100, 300, 310], 1):
        assert not detector.update(step, length)
    assert detector.surge_ratio is None  # 4 observations older than the lag: one too few
    assert not detector.update(8, 320)
    assert detector.surge_ratio == pytest.approx(310 / 100)
    assert detector.recent_length == 310
    # Step 9: median(310, 320, 330) over median(900, 110, 90, 100, 300), which is 110.
    assert detector.update(9, 330)
    assert detector.surge_ratio == pytest.approx(320 / 110)
    assert detector.surge_step == 9
    assert not detector.update(10, 330)


@pytest.mark.parametrize("length", [math.nan, math.inf, 0.0, -5.0])
def test_unusable_lengths_and_old_steps_change_nothing(length: float) -> None:
    detector = LengthSurgeDetector()
    for step in range(1, 50):
        detector.update(step, 100.0)
    before = detector.state_dict()
    assert not detector.update(50, length)
    assert not detector.update(49, 1000.0)
    assert not detector.update(7, 1000.0)
    assert detector.state_dict() == before


@pytest.mark.parametrize("split", [3, 60, 108, 115, 119, 140])
def test_a_resumed_detector_equals_the_uninterrupted_one(split: int) -> None:
    lengths = list(enumerate(noisy(surge(110, 8, 9.19), 200, 0.1, 1), 1))
    whole, first, second = LengthSurgeDetector(), LengthSurgeDetector(), LengthSurgeDetector()
    expected = [whole.update(*point) for point in lengths]
    actual = [first.update(*point) for point in lengths[:split]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    actual += [second.update(*point) for point in lengths[split:]]
    assert actual == expected
    assert second.state_dict() == whole.state_dict()


def test_history_is_bounded() -> None:
    detector = LengthSurgeDetector()
    for step in range(1, 2001):
        detector.update(step, 100.0)
    assert len(detector.state_dict()["steps"]) == 30 + 40  # lag and baseline


def test_damaged_detector_state_is_refused() -> None:
    state = LengthSurgeDetector().state_dict() | {"steps": [1, 2], "lengths": [5.0]}
    with pytest.raises(ValueError, match="2 steps and 1 lengths.*damaged"):
        LengthSurgeDetector().load_state_dict(state)


@pytest.mark.parametrize(
    "arguments", [{"ratio": 1.0}, {"ratio": math.nan}, {"window": 0}, {"patience": 0}, {"lag": 5}, {"margin": 1.0}]
)
def test_bad_detector_arguments_are_named(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`.*"):
        LengthSurgeDetector(**arguments)  # type: ignore[arg-type]


def test_scale_replays_algorithm_1() -> None:
    """The paper's loop, literally, for 20 updates and T_decay = 3."""
    rate, expected = 1.0, []
    for update in range(1, 21):
        if update % 3 == 0:
            rate = max(rate / 2, 0.1)
        expected.append(rate)
    assert [length_decay_scale(update, 3) for update in range(1, 21)] == expected
    # The first two updates are whole, the third is the first with half the rate, the floor comes with the twelfth.
    assert expected[:3] == [1.0, 1.0, 0.5] and expected[10:12] == [0.125, 0.1]


def test_the_papers_periods() -> None:
    assert decay_period(110) == 198  # 1.8 · 110; the paper used 204, the epoch
    assert decay_period(90) == 162  # 1.8 · 90; the paper used 160
    assert decay_period(1, factor=0.1) == 1
    assert all(decay_period(step) > step for step in range(1, 400))  # no halving is already due


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: length_decay_scale(-1, 3), "`step` is -1"),
        (lambda: length_decay_scale(1, 0), "`period` is 0.*Pass"),
        (lambda: length_decay_scale(1, True), "`period` is True"),
        (lambda: length_decay_scale(1, 2.5), "`period` is 2.5"),  # type: ignore[arg-type]
        (lambda: length_decay_scale(1, 3, 0.0), "`min_ratio` is 0.0"),
        (lambda: length_decay_scale(1, 3, 1.5), "`min_ratio` is 1.5"),
        (lambda: decay_period(0), "`surge_step` is 0"),
        (lambda: decay_period(10, 0.0), "`factor` is 0.0"),
        (lambda: decay_period(10, math.inf), "`factor` is inf"),
    ],
)
def test_bad_arguments_name_the_value_and_the_way_out(call: Callable[[], float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
