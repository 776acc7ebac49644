# SPDX-License-Identifier: Apache-2.0
"""What holds of the maths whatever the numbers are: bounds, symmetry, monotonicity, and what must not matter.

On generated batches, the same ones in every run. `test_rejection.py` has those of the rejection rules.
"""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dc_trl.constraint import discrepancy_penalty
from dc_trl.discrepancy import (
    DISCREPANCY_METRICS,
    LOG_RATIO_BOUND,
    LOWEST_SAMPLING_LOGP,
    combine,
    metrics,
    summarise,
    token_discrepancy,
    trajectory_mean,
    valid_tokens,
)
from dc_trl.dual import DualVariable
from dc_trl.estimators.advantage import rloo_advantages, zero_variance_groups
from dc_trl.estimators.drpo import drpo_weight
from dc_trl.estimators.ess_rate import ess_rate_scale
from dc_trl.estimators.importance import IMPORTANCE_SAMPLING_MODES, importance_sampling_ratio
from dc_trl.length_decay import length_decay_scale

GENERATE = settings(max_examples=60, deadline=None, derandomize=True, database=None)
UNSCORED = (math.nan, math.inf, -math.inf, -9999.0, 0.5)
MOST = {
    "prob_diff": 1.0,
    "prob_ratio": math.expm1(LOG_RATIO_BOUND),
    "logprob_diff": LOG_RATIO_BOUND,
}

# On a grid of powers of two, as float32 holds it, so that a comparison is not one of roundings.
LOGPS = st.integers(-30 * 64, 0).map(lambda n: n / 64)
CLOSE = st.integers(-32, 32).map(lambda n: n / 64)


class Batch(NamedTuple):
    """Log-probs of both engines, (B, T), what counts of them, (B, T) bool, and advantages, (B,)."""

    train: Tensor
    sampling: Tensor
    mask: Tensor
    advantages: Tensor


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    size, length = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    count = size * length
    train = torch.tensor(draw(st.lists(LOGPS, min_size=count, max_size=count))).view(size, length)
    shift = torch.tensor(draw(st.lists(CLOSE, min_size=count, max_size=count))).view(size, length)
    sampling = (train + shift).clamp(max=0.0)
    lost = draw(st.lists(st.tuples(st.integers(0, count - 1), st.sampled_from(UNSCORED)), max_size=3))
    for place, value in lost:
        sampling.view(-1)[place] = value
    lengths = torch.tensor(draw(st.lists(st.integers(0, length), min_size=size, max_size=size)))
    advantages = torch.tensor(draw(st.lists(st.integers(-8, 8), min_size=size, max_size=size))) / 4
    return Batch(train, sampling, torch.arange(length) < lengths.unsqueeze(1), advantages)


def summary_of(batch: Batch, metric: str = "prob_diff") -> Tensor:
    valid = valid_tokens(batch.sampling, batch.mask, batch.train)
    discrepancy = token_discrepancy(batch.train, batch.sampling, metric)
    ratio, kept = importance_sampling_ratio(
        batch.train, batch.sampling, valid, mode="token_mask", clip_min=None, clip_max=1.25
    )
    penalty = discrepancy_penalty(discrepancy, valid, constraint="fixed", multiplier=0.5, tolerance=None)
    return summarise(
        batch.train, batch.sampling, batch.mask, discrepancy=discrepancy, correction=ratio, kept=kept, penalty=penalty,
        advantages=batch.advantages.unsqueeze(1),
    )  # fmt: skip


def logged(summary: Tensor) -> Tensor:
    return torch.stack([*metrics(summary).values(), *metrics(summary, "token").values()])


def rows(batch: Batch, places: list[int]) -> Batch:
    return Batch(*(tensor[places] for tensor in batch))


def padded(batch: Batch, width: int, value: float) -> Batch:
    def wider(tensor: Tensor, fill: float) -> Tensor:
        return torch.cat([tensor, torch.full((len(tensor), width), fill, dtype=tensor.dtype)], 1)

    return Batch(wider(batch.train, value), wider(batch.sampling, -value), wider(batch.mask, False), batch.advantages)


def poisoned(batch: Batch, value: float) -> Batch:
    return batch._replace(
        train=batch.train.masked_fill(~batch.mask, value), sampling=batch.sampling.masked_fill(~batch.mask, -value)
    )


def assert_same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6, equal_nan=True)


# The discrepancy of a token


@pytest.mark.parametrize("metric", DISCREPANCY_METRICS)
@GENERATE
@given(st.lists(st.tuples(LOGPS, st.one_of(LOGPS, st.sampled_from(UNSCORED))), min_size=1))
def test_a_discrepancy_is_bounded(metric: str, pairs: list[tuple[float, float]]) -> None:
    train, sampling = torch.tensor(pairs).T
    d = token_discrepancy(train, sampling, metric)
    assert d.dtype == torch.float32 and d.isfinite().all()
    assert (d >= 0).all() and (d <= MOST[metric] * (1 + 1e-6)).all()
    assert (d[train == sampling] == 0).all()


@pytest.mark.parametrize("metric", ["prob_diff", "logprob_diff"])
@GENERATE
@given(LOGPS, LOGPS)
def test_a_difference_is_symmetric(metric: str, first: float, second: float) -> None:
    one, other = torch.tensor([first]), torch.tensor([second])
    assert torch.equal(token_discrepancy(one, other, metric), token_discrepancy(other, one, metric))


@pytest.mark.parametrize("metric", DISCREPANCY_METRICS)
@pytest.mark.parametrize("side", [-1, 1])
@GENERATE
@given(LOGPS, st.integers(0, 640), st.integers(0, 640))
def test_a_discrepancy_grows_with_the_distance(metric: str, side: int, start: float, near: int, more: int) -> None:
    train = torch.tensor([start + side * near / 64, start + side * (near + more) / 64])
    d = token_discrepancy(train, torch.full((2,), start), metric)
    assert d[0] <= d[1]


@GENERATE
@given(batches())
def test_what_is_scored_is_in_range(batch: Batch) -> None:
    valid = valid_tokens(batch.sampling, batch.mask, batch.train)
    assert not (valid & ~batch.mask).any()
    assert (batch.sampling[valid] >= LOWEST_SAMPLING_LOGP).all() and (batch.sampling[valid] <= 1e-3).all()


# Batch metrics


@GENERATE
@given(batches())
def test_metrics_are_bounded(batch: Batch) -> None:
    m = {name: value.item() for name, value in metrics(summary_of(batch)).items()}
    if not valid_tokens(batch.sampling, batch.mask, batch.train).any():
        assert math.isnan(m["discrepancy/mean"]) and math.isnan(m["ess"])
        return
    slack = 1e-5
    assert 0 <= m["discrepancy/mean"] <= m["discrepancy/max"] + slack <= 1 + 2 * slack
    assert m["discrepancy/p50"] <= m["discrepancy/p90"] <= m["discrepancy/p99"] <= m["discrepancy/max"] + slack
    assert 0 < m["ess"] <= 1 + slack
    for name in ("differs", "nan_fraction", "masked_fraction", "penalty_only"):
        assert -slack <= m[name] <= 1 + slack
    assert m["k3_kl"] >= -slack and m["chi2_token"] >= m["importance_ratio/mean"] ** 2 - 1 - slack
    assert m["importance_ratio/min"] <= m["importance_ratio/mean"] + slack <= m["importance_ratio/max"] + 2 * slack
    assert math.isnan(m["pearson"]) or -1 <= m["pearson"] <= 1


@GENERATE
@given(batches(), st.integers(1, 4), st.sampled_from([1e4, -1e4, math.nan, math.inf]))
def test_padding_changes_no_metric(batch: Batch, width: int, value: float) -> None:
    whole = logged(summary_of(batch))
    assert_same(logged(summary_of(padded(batch, width, value))), whole)
    assert_same(logged(summary_of(poisoned(batch, value))), whole)


@GENERATE
@given(batches(), st.randoms(use_true_random=False))
def test_order_changes_no_metric(batch: Batch, random: object) -> None:
    order = list(range(len(batch.train)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert_same(logged(summary_of(rows(batch, order))), logged(summary_of(batch)))


@GENERATE
@given(batches(), st.data())
def test_micro_batches_and_ranks_change_no_metric(batch: Batch, data: st.DataObject) -> None:
    """Each row goes to a micro-batch of a rank; as the trainer does, these merge within the rank and then across."""
    places = data.draw(st.lists(st.integers(0, 3), min_size=len(batch.train), max_size=len(batch.train)))
    ranks = []
    for rank in (0, 1):
        parts = [[row for row, place in enumerate(places) if place == 2 * rank + micro] for micro in (0, 1)]
        ranks.append(combine(torch.stack([summary_of(rows(batch, part)) for part in parts])))
    assert_same(logged(combine(torch.stack(ranks))), logged(summary_of(batch)))


# The penalty


def penalty_of(batch: Batch, constraint: str, multiplier: float, level: str = "token") -> Tensor:
    valid = valid_tokens(batch.sampling, batch.mask, batch.train)
    d = token_discrepancy(batch.train, batch.sampling)
    options = {"constraint": constraint, "multiplier": multiplier, "tolerance": 0.0625, "level": level}
    return discrepancy_penalty(d, valid, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("level", ["token", "sequence"])
@GENERATE
@given(batches(), st.floats(0, 1), st.floats(0, 1))
def test_a_penalty_is_bounded_and_grows_with_the_multiplier(
    level: str, batch: Batch, one: float, other: float
) -> None:
    low, high = sorted((one, other))
    valid = valid_tokens(batch.sampling, batch.mask, batch.train)
    for constraint in ("fixed", "threshold", "lagrangian"):
        less, more = (penalty_of(batch, constraint, multiplier, level) for multiplier in (low, high))
        assert (0 <= less).all() and (less <= more).all() and (more <= high * (1 + 1e-6)).all()
        assert (more[~valid] == 0).all()
    assert (penalty_of(batch, "threshold", high, level) <= penalty_of(batch, "fixed", high, level)).all()
    assert (penalty_of(batch, "none", high, level) == 0).all()


@GENERATE
@given(batches(), st.floats(0, 1))
def test_the_level_moves_a_penalty_within_its_sequence(batch: Batch, multiplier: float) -> None:
    valid = valid_tokens(batch.sampling, batch.mask, batch.train)
    of_token, of_sequence = (penalty_of(batch, "fixed", multiplier, level) for level in ("token", "sequence"))
    assert_same(trajectory_mean(of_token, valid), trajectory_mean(of_sequence, valid))


@pytest.mark.parametrize("level", ["token", "sequence"])
@GENERATE
@given(batches(), st.sampled_from([1e4, math.nan, math.inf]))
def test_a_row_is_penalised_by_itself(level: str, batch: Batch, value: float) -> None:
    whole = penalty_of(batch, "fixed", 0.5, level)
    assert_same(penalty_of(padded(batch, 2, value), "fixed", 0.5, level)[:, :-2], whole)
    for row in range(len(whole)):
        assert_same(penalty_of(rows(batch, [row]), "fixed", 0.5, level), whole[row : row + 1])


# The dual variable

VIOLATIONS = st.lists(st.one_of(st.floats(-2, 2), st.sampled_from([math.nan, math.inf, -math.inf])), max_size=20)


def ascend(init: float, lr: float, violations: list[float]) -> DualVariable:
    dual = DualVariable(init, lr, 1.0)
    for violation in violations:
        dual.step(violation)
        assert 0 <= dual.value <= dual.maximum
    return dual


@GENERATE
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 3), VIOLATIONS)
def test_two_multipliers_keep_their_order_and_come_no_further_apart(
    one: float, other: float, lr: float, violations: list[float]
) -> None:
    low, high = sorted((one, other))
    lower, higher = ascend(low, lr, violations).value, ascend(high, lr, violations).value
    assert lower <= higher and higher - lower <= high - low + 1e-12


@GENERATE
@given(st.floats(0, 1), st.floats(0, 3), VIOLATIONS, st.floats(0, 1))
def test_a_larger_violation_gives_no_smaller_multiplier(
    init: float, lr: float, violations: list[float], more: float
) -> None:
    assert ascend(init, lr, violations).value <= ascend(init, lr, [v + more for v in violations]).value


@GENERATE
@given(st.floats(0, 1), VIOLATIONS)
def test_a_rate_of_zero_and_what_is_not_finite_move_nothing(init: float, violations: list[float]) -> None:
    assert ascend(init, 0.0, violations).value == init
    assert ascend(init, 1.0, [v for v in violations if not math.isfinite(v)]).value == init


# Learning rates


@GENERATE
@given(st.integers(0, 10**6), st.integers(1, 10**4), st.floats(1e-3, 1.0), st.integers(0, 10**4))
def test_length_decay_falls_by_halves_to_its_floor(step: int, period: int, floor: float, more: int) -> None:
    scale = length_decay_scale(step, period, floor)
    assert floor <= scale <= 1.0
    assert scale == floor or math.log2(scale) == -(step // period)
    assert length_decay_scale(step + more, period, floor) <= scale
    assert length_decay_scale(step, period + more, floor) >= scale
    assert length_decay_scale(step + period, period, floor) == max(scale / 2, floor)


@GENERATE
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 1), st.floats(0.01, 1))
def test_the_scale_by_the_effective_sample_size_rises_with_it(
    one: float, other: float, reference: float, floor: float
) -> None:
    low, high = (ess_rate_scale(ess, reference, floor) for ess in sorted((one, other)))
    assert floor <= low <= high <= 1.0
    assert ess_rate_scale(reference, reference, floor) == 1.0


# Estimators

GROUP = 4
REWARDS = st.lists(st.one_of(st.integers(-32, 32).map(lambda n: n / 8), st.just(math.nan)), min_size=8, max_size=8)


@GENERATE
@given(REWARDS, st.integers(-16, 16), st.permutations(range(GROUP)))
def test_leave_one_out_advantages(rewards: list[float], shift: int, order: list[int]) -> None:
    r = torch.tensor(rewards)
    a = rloo_advantages(r, GROUP)
    assert a.isfinite().all() and (a[r.isnan()] == 0).all()
    for group in range(2):
        part = slice(group * GROUP, (group + 1) * GROUP)
        assert torch.equal(rloo_advantages(r[part], GROUP), a[part])  # of its group alone
        scored = ~r[part].isnan()
        if scored.sum() > 1:
            n = int(scored.sum())
            assert_same(a[part][scored], n / (n - 1) * (r[part][scored] - r[part][scored].mean()))
    assert_same(rloo_advantages(r + shift, GROUP), a)
    assert_same(rloo_advantages(-2 * r, GROUP), -2 * a)
    places = torch.tensor([*order, *(GROUP + place for place in order)])
    assert_same(rloo_advantages(r[places], GROUP), a[places])


@GENERATE
@given(REWARDS, st.integers(-16, 16), st.permutations(range(GROUP)))
def test_groups_without_signal_are_those_of_which_no_advantage_is_left(
    rewards: list[float], shift: int, order: list[int]
) -> None:
    r = torch.tensor(rewards)
    dropped = zero_variance_groups(r, GROUP)
    no_advantage = (rloo_advantages(r, GROUP).view(-1, GROUP).abs() <= 1e-6).all(1)
    assert torch.equal(dropped.view(-1, GROUP).all(1), no_advantage)
    assert torch.equal(dropped.view(-1, GROUP).any(1), no_advantage)
    places = torch.tensor([*order, *(GROUP + place for place in order)])
    assert torch.equal(zero_variance_groups(r[places] + shift, GROUP), dropped)


@GENERATE
@given(batches(), st.floats(0.5, 20), st.sampled_from([1e4, math.nan]))
def test_drpo_weighs_within_its_limit_and_both_signs_mirror(batch: Batch, limit: float, value: float) -> None:
    valid = valid_tokens(batch.sampling, batch.mask, batch.train)

    def weight(batch: Batch, valid: Tensor, sign: int = 1) -> Tensor:
        return drpo_weight(batch.train, batch.sampling, valid, sign * batch.advantages, limit)

    up, down = weight(batch, valid), weight(batch, valid, -1)
    assert ((up - 1).abs() <= 1 / limit + 1e-6).all()
    assert_same(up + down, torch.full_like(up, 2.0))
    assert (up[~valid] == 1).all() and (up[batch.advantages == 0] == 1).all()
    wider = padded(batch, 2, value)
    assert_same(weight(wider, valid_tokens(wider.sampling, wider.mask, wider.train))[:, :-2], up)
    # Held back where the update moves π away from μ, and driven on where it moves π back.
    gap, sign = batch.train.exp() - batch.sampling.exp(), batch.advantages.sign().unsqueeze(1)
    assert (up[valid & (gap * sign > 0)] <= 1).all() and (up[valid & (gap * sign < 0)] >= 1).all()


@pytest.mark.parametrize("mode", IMPORTANCE_SAMPLING_MODES)
@GENERATE
@given(batches(), st.floats(0.1, 0.9), st.floats(1.1, 4.0), st.sampled_from([1e4, math.nan]))
def test_an_importance_ratio_is_within_its_bounds(
    mode: str, batch: Batch, low: float, high: float, value: float
) -> None:
    def of(batch: Batch) -> tuple[Tensor, Tensor]:
        valid = valid_tokens(batch.sampling, batch.mask, batch.train)
        options = {"mode": mode, "clip_min": low, "clip_max": high}
        return importance_sampling_ratio(batch.train, batch.sampling, valid, **options)  # type: ignore[arg-type]

    ratio, kept = of(batch)
    inside = (ratio >= low - 1e-6) & (ratio <= high + 1e-6)
    assert (inside | (~kept & (ratio == 0))).all()
    assert mode.endswith("mask") or kept.all()
    if mode.startswith("token"):
        valid = valid_tokens(batch.sampling, batch.mask, batch.train)
        assert (ratio[~valid] == 1).all()
        wider, _ = of(padded(batch, 2, value))
        assert_same(wider[:, :-2], ratio)
    else:
        assert_same(of(padded(batch, 2, value))[0], ratio)
    for row in range(len(ratio)):
        assert_same(of(rows(batch, [row]))[0], ratio[row : row + 1])
