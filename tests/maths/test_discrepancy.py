# SPDX-License-Identifier: Apache-2.0
"""The discrepancy of tokens and of batches, against numbers worked by hand."""

import math

import pytest
import torch

from dc_trl.discrepancy import (
    DISCREPANCY_METRICS,
    LOG_RATIO_BOUND,
    combine,
    correction_metrics,
    discrepancy_metrics,
    is_scored,
    mean_discrepancy,
    metrics,
    summarise,
    summary,
    token_discrepancy,
    valid_tokens,
)

LOG = torch.tensor([[0.5, 0.2], [0.4, 0.1]]).log()
MU = torch.tensor([[0.4, 0.25], [0.4, 0.2]]).log()
ONES = torch.ones(2, 2)
# No drawn token has such a log-prob; −9999 is what vLLM's server writes for −inf.
UNSCORED = [torch.nan, torch.inf, -torch.inf, 0.5, 10_000.0, -9999.0, -1e30]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("prob_diff", [[0.1, 0.05], [0.0, 0.1]]),
        ("prob_ratio", [[0.25, 0.2], [0.0, 0.5]]),  # 0.5/0.4 - 1, 1 - 0.2/0.25, 0, 1 - 0.1/0.2
        ("logprob_diff", [[math.log(1.25), math.log(1.25)], [0.0, math.log(2)]]),
    ],
)
def test_token_discrepancy_by_hand(metric: str, expected: list[list[float]]) -> None:
    torch.testing.assert_close(token_discrepancy(LOG, MU, metric), torch.tensor(expected))


@pytest.mark.parametrize("metric", ["prob_diff", "prob_ratio", "logprob_diff"])
def test_token_discrepancy_is_symmetric_at_zero_and_float32(metric: str) -> None:
    half = LOG.to(torch.bfloat16)
    result = token_discrepancy(half, half, metric)
    assert result.dtype == torch.float32 and result.shape == LOG.shape
    assert (result == 0).all()


@pytest.mark.parametrize("metric", ["prob_diff", "prob_ratio", "logprob_diff"])
def test_nan_sampling_gives_zero(metric: str) -> None:
    sampling = MU.clone()
    sampling[0, 1] = torch.nan
    result = token_discrepancy(LOG, sampling, metric)
    assert result[0, 1] == 0 and result.isfinite().all() and result[0, 0] > 0


@pytest.mark.parametrize("metric", DISCREPANCY_METRICS)
@pytest.mark.parametrize("value", UNSCORED)
def test_what_is_no_log_prob_is_not_scored(metric: str, value: float) -> None:
    sampling = MU.clone()
    sampling[0, 1] = value
    expected = token_discrepancy(LOG, MU, metric)
    expected[0, 1] = 0
    assert torch.equal(token_discrepancy(LOG, sampling, metric), expected)
    assert torch.equal(valid_tokens(sampling, ONES), torch.tensor([[True, False], [True, True]]))
    left_out = summarise(LOG, MU, torch.tensor([[1, 0], [1, 1]]), metric=metric)
    summary = summarise(LOG, sampling, ONES, metric=metric)
    for read in (metrics, correction_metrics):
        for key, value in read(left_out).items():
            if key != "nan_fraction":
                torch.testing.assert_close(read(summary)[key], value, rtol=0, atol=0, equal_nan=True, msg=key)
    assert metrics(summary)["nan_fraction"] == 0.25


def test_rounding_above_zero_and_improbable_tokens_are_scored() -> None:
    assert is_scored(torch.tensor([0.0, 1e-7, 1e-5, -1e-9, -20.0, -100.0])).all()
    assert token_discrepancy(torch.zeros(1), torch.full((1,), 1e-6)).item() == pytest.approx(1e-6, rel=0.1)


@pytest.mark.parametrize(("metric", "most"), [("logprob_diff", 20.0), ("prob_ratio", math.expm1(20.0))])
def test_a_log_ratio_is_bounded(metric: str, most: float) -> None:
    improbable = torch.tensor([-0.1, -60.0]), torch.tensor([-60.0, -0.1])
    bounds = [most, 20.0 if metric == "logprob_diff" else 1.0]  # 1 − exp(−20)
    assert token_discrepancy(*improbable, metric).tolist() == pytest.approx(bounds) and LOG_RATIO_BOUND == 20


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_log_prob_of_the_trainer_that_is_not_finite_is_counted_and_left_out(value: float) -> None:
    train = LOG.clone()
    train[0, 1] = value
    assert torch.equal(valid_tokens(MU, ONES, train), torch.tensor([[True, False], [True, True]]))
    assert all(token_discrepancy(train, MU, metric)[0, 1] == 0 for metric in DISCREPANCY_METRICS)
    masked, values = discrepancy_metrics(LOG, MU, torch.tensor([[1, 0], [1, 1]])), discrepancy_metrics(train, MU, ONES)
    assert values.pop("nan_fraction") == 0.25
    for key, x in values.items():
        torch.testing.assert_close(x, masked[key], equal_nan=True, msg=key)


def test_unknown_metric_is_named() -> None:
    with pytest.raises(ValueError, match="'tv'.*prob_diff"):
        token_discrepancy(LOG, MU, "tv")


def test_batch_metrics_by_hand() -> None:
    # d = .1, .05 | 0, .1: trajectory means .075 and .05. log-ratios: l, -l | 0, -log 2 with l = log 1.25.
    l25, l2 = math.log(1.25), math.log(2)
    values = {k: v.item() for k, v in discrepancy_metrics(LOG, MU, ONES).items()}
    assert values["discrepancy/mean"] == pytest.approx(0.0625)
    assert values["discrepancy/max"] == pytest.approx(0.1)
    assert values["discrepancy/p99"] == pytest.approx(0.1, rel=0.007)
    assert values["kl"] == pytest.approx(l2 / 4)
    ratios = [1.25, 0.8, 1.0, 0.5]
    assert values["k3_kl"] == pytest.approx((sum(ratios) - (0 - l2)) / 4 - 1)
    squares = sum(r * r for r in ratios)
    assert values["chi2_token"] == pytest.approx(squares / 4 - 1)
    assert values["chi2_seq"] == pytest.approx((1.0 + 0.25) / 2 - 1)  # sequence ratios 1.25 · .8 = 1 and .5
    assert values["ess"] == pytest.approx(sum(ratios) ** 2 / (4 * squares))
    assert values["ppl_ratio"] == pytest.approx((1 + math.exp(l2 / 2)) / 2)
    assert values["log_ppl_abs_diff"] == pytest.approx(l2 / 2)  # eq. 7-8: |0| and |-log 2|, a sum over tokens
    assert values["log_ppl_abs_diff_per_token"] == pytest.approx(l2 / 4)
    assert values["importance_ratio/min"] == pytest.approx(0.5)
    assert values["importance_ratio/max"] == pytest.approx(1.25)
    assert values["nan_fraction"] == 0 and values["masked_fraction"] == 0
    pearson = torch.corrcoef(torch.stack([LOG.exp().flatten(), MU.exp().flatten()]))[0, 1].item()
    assert values["pearson"] == pytest.approx(pearson, rel=1e-5)
    assert l25 > 0


def test_trajectory_and_token_average_differ_on_ragged_lengths() -> None:
    mask = torch.tensor([[1, 0], [1, 1]])
    summary = summarise(LOG, MU, mask)
    assert mean_discrepancy(summary, "trajectory").item() == pytest.approx((0.1 + 0.05) / 2)
    assert mean_discrepancy(summary, "token").item() == pytest.approx((0.1 + 0.0 + 0.1) / 3)


@pytest.mark.parametrize("poison", [10_000.0, -10_000.0, torch.nan, torch.inf, -torch.inf])
def test_masked_positions_change_nothing(poison: float) -> None:
    mask = torch.tensor([[1, 0], [1, 1]])
    train, sampling = LOG.clone(), MU.clone()
    train[0, 1] = poison
    sampling[0, 1] = -poison
    for key, value in discrepancy_metrics(LOG, MU, mask).items():
        torch.testing.assert_close(discrepancy_metrics(train, sampling, mask)[key], value, equal_nan=True, msg=key)


def test_nan_tokens_are_counted_but_not_averaged() -> None:
    sampling = MU.clone()
    sampling[0, 1] = torch.nan
    masked = discrepancy_metrics(LOG, MU, torch.tensor([[1, 0], [1, 1]]))
    values = discrepancy_metrics(LOG, sampling, ONES)
    assert values["nan_fraction"] == 0.25
    assert values["discrepancy/mean"] == masked["discrepancy/mean"]


def test_empty_mask_is_nan_and_disappears_when_combined() -> None:
    empty = summarise(LOG, MU, torch.zeros(2, 2))
    for key, value in (metrics(empty) | correction_metrics(empty)).items():
        assert value.isnan(), key
    full = summarise(LOG, MU, ONES)
    both = combine(torch.stack([empty, full]))
    for key, value in metrics(full).items():
        torch.testing.assert_close(metrics(both)[key], value, equal_nan=True, msg=key)


def test_micro_batches_combine_to_the_whole() -> None:
    torch.manual_seed(0)
    train, sampling = -torch.rand(6, 9) * 3, -torch.rand(6, 9) * 3
    mask = torch.arange(9) < torch.tensor([9, 1, 4, 0, 7, 3]).unsqueeze(1)
    whole = summarise(train, sampling, mask)
    parts = combine(
        torch.stack([summarise(train[i : i + 2], sampling[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)])
    )
    for key, value in (metrics(whole) | correction_metrics(whole)).items():
        torch.testing.assert_close((metrics(parts) | correction_metrics(parts))[key], value, equal_nan=True, msg=key)


def test_percentile_is_within_a_bin_of_the_exact_one() -> None:
    torch.manual_seed(1)
    train, sampling = -torch.rand(64, 100) * 4, -torch.rand(64, 100) * 4
    exact = torch.quantile(token_discrepancy(train, sampling).flatten(), 0.99).item()
    assert discrepancy_metrics(train, sampling, torch.ones(64, 100))["discrepancy/p99"].item() == pytest.approx(
        exact, rel=0.01
    )


def test_kept_mean_and_penalty_share() -> None:
    kept = torch.tensor([[True, False], [True, True]])
    penalty, advantages = torch.full((2, 2), 0.05), torch.tensor([[1.0], [-0.5]])
    values = metrics(summarise(LOG, MU, ONES, kept=kept, penalty=penalty, advantages=advantages))
    assert values["discrepancy_kept/mean"].item() == pytest.approx((0.1 + 0.0 + 0.1) / 3)
    assert values["masked_fraction"].item() == pytest.approx(0.25)
    assert values["penalty_share"].item() == pytest.approx(0.2 / 3.0)  # 4 · 0.05 over 2 · 1 + 2 · 0.5


@pytest.mark.parametrize("names", ["SUMS", "MAXIMA"])
def test_a_name_without_its_value_is_an_error(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, names, (*getattr(summary, names), "forgotten"))
    with pytest.raises(KeyError, match="lacks .'forgotten'."):
        summary.summarise(LOG, MU, ONES)


def test_a_value_without_a_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "SUMS", tuple(name for name in summary.SUMS if name != "pi_mu"))
    with pytest.raises(KeyError, match="has .'pi_mu'., which no reduction"):
        summary.summarise(LOG, MU, ONES)


def test_every_part_comes_back_under_its_name() -> None:
    parts = summary.named(summary.summarise(LOG, MU, ONES))
    assert set(parts) == {*summary.SUMS, *summary.MAXIMA, *summary.HISTOGRAMS}
    assert parts["valid"] == 4 and parts["trajectories"] == 2 and parts["tokens"] == 4
    assert parts["discrepancy"].item() == pytest.approx(0.1 + 0.05 + 0.0 + 0.1)
    assert parts["discrepancy_max"].item() == pytest.approx(0.1)
    assert all(parts[name].sum() == 4 for name in summary.HISTOGRAMS)
