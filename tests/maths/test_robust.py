# SPDX-License-Identifier: Apache-2.0
"""Quantiles, tokens that differ at all, sequences with a penalty alone: against exact and worked numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dc_trl.discrepancy import combine, discrepancy_metrics, metrics, summarise, token_discrepancy
from dc_trl.discrepancy.metrics import PERCENTS, quantile
from dc_trl.discrepancy.summary import HISTOGRAM_BINS, _histogram

ROBUST = [f"{name}/p{percent}" for name in ("discrepancy", "abs_log_ratio") for percent in PERCENTS] + ["differs"]
BIN = 10 ** (12 / 4096)
EXAMPLES = settings(max_examples=150, deadline=None)


def exact_quantile(values: list[float], percent: int) -> float:
    """The smallest of the values that `percent` % of them do not exceed."""
    rank = -(-percent * len(values) // 100)
    return sorted(values)[rank - 1]


def histogram(values: list[float]) -> Tensor:
    x = torch.tensor(values, dtype=torch.float64)
    return _histogram(x, torch.ones_like(x, dtype=torch.bool))


def batch(seed: int, sequences: int = 6, length: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of both sides, (B, T), a third of which are equal, and a ragged mask that leaves out some rows."""
    generator = torch.Generator().manual_seed(seed)
    train = -4 * torch.rand(sequences, length, generator=generator)
    noise = 10 ** (-6 * torch.rand(sequences, length, generator=generator))
    sampling = torch.where(torch.rand(sequences, length, generator=generator) < 1 / 3, train, train - noise)
    lengths = torch.randint(0, length + 1, (sequences, 1), generator=generator)
    return train, sampling, torch.arange(length) < lengths


def robust(summary: Tensor) -> Tensor:
    values = metrics(summary)
    return torch.stack([values[key] for key in ROBUST])


# Sizes from below the first edge to above the last, and an exact 0.
@EXAMPLES
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(-12, 5).map(lambda x: 10**x)), min_size=1, max_size=300),
    st.sampled_from(PERCENTS),
)
def test_a_quantile_is_within_half_a_bin_of_the_exact_one(values: list[float], percent: int) -> None:
    found, exact = quantile(histogram(values), percent).item(), exact_quantile(values, percent)
    if exact < 1e-9:
        assert found == 0
    elif exact < 1e-9 * BIN:  # the first bin, which has what is below it too
        assert found == 0 or found == pytest.approx(exact, rel=BIN**0.5 - 1)
    elif exact >= 1e3:
        assert found == pytest.approx(996.6, rel=1e-4)
    else:
        assert abs(math.log(found / exact)) <= math.log(BIN) / 2 * (1 + 1e-9)


def test_a_bin_is_as_wide_as_the_documentation_says() -> None:
    assert pytest.approx(1.0068, abs=5e-5) == BIN and HISTOGRAM_BINS == 4096
    assert BIN**0.5 - 1 < 0.0034


@pytest.mark.parametrize("percent", PERCENTS)
@pytest.mark.parametrize("count", [1, 2, 99, 100, 101, 300, 700])
def test_the_rank_of_a_quantile_is_exact(percent: int, count: int) -> None:
    # Values two bins apart, so that a rank that is off by one is off by more than half a bin.
    values = [1e-4 * BIN ** (2 * i) for i in range(count)]
    assert quantile(histogram(values), percent).item() == pytest.approx(exact_quantile(values, percent), rel=0.0034)


@EXAMPLES
@given(st.integers(0, 10_000), st.sampled_from(["prob_diff", "prob_ratio", "logprob_diff"]))
def test_every_robust_metric_is_that_of_the_tokens_themselves(seed: int, metric: str) -> None:
    train, sampling, mask = batch(seed)
    values = metrics(summarise(train, sampling, mask, metric=metric))
    if not mask.any():
        assert all(values[key].isnan() for key in ROBUST)
        return
    tokens = {
        "discrepancy": token_discrepancy(train, sampling, metric)[mask].tolist(),
        "abs_log_ratio": (train - sampling).abs()[mask].tolist(),
    }
    for name, of_tokens in tokens.items():
        for percent in PERCENTS:
            exact = exact_quantile(of_tokens, percent)
            # Below the first edge a quantile is 0.
            assert values[f"{name}/p{percent}"].item() == pytest.approx(exact, rel=0.0034, abs=1.01e-9)
            assert values[f"{name}/p{percent}"].item() <= max(of_tokens)
    differing = sum(x != 0 for x in tokens["abs_log_ratio"])
    assert values["differs"].item() == pytest.approx(differing / len(tokens["abs_log_ratio"]))


@EXAMPLES
@given(st.integers(0, 10_000), st.integers(1, 7), st.permutations(range(6)))
def test_padding_order_and_split_change_no_robust_metric(seed: int, wider: int, order: list[int]) -> None:
    train, sampling, mask = batch(seed)
    whole = robust(summarise(train, sampling, mask))

    def equal(summary: Tensor) -> bool:
        return torch.equal(robust(summary).nan_to_num(-1), whole.nan_to_num(-1))

    padded = [torch.nn.functional.pad(x, (0, wider), value=value) for x, value in ((train, -1e4), (sampling, 1e4))]
    assert equal(summarise(*padded, torch.nn.functional.pad(mask, (0, wider))))
    assert equal(summarise(train[order], sampling[order], mask[order]))
    micro = [summarise(train[i : i + 1], sampling[i : i + 1], mask[i : i + 1]) for i in order]
    ranks = torch.stack([combine(torch.stack(micro[:2])), combine(torch.stack(micro[2:]))])
    assert equal(combine(ranks))


def test_one_spike_moves_the_mean_and_not_the_median() -> None:
    train, sampling = torch.full((1, 1000), 0.5).log(), torch.full((1, 1000), 0.501).log()
    calm = discrepancy_metrics(train, sampling, torch.ones(1, 1000))
    train[0, 0], sampling[0, 0] = -20.0, -0.001  # |π − μ| 1, |log ρ| 20, once
    spiked = discrepancy_metrics(train, sampling, torch.ones(1, 1000))
    assert spiked["discrepancy/mean"] == pytest.approx(2 * calm["discrepancy/mean"].item(), rel=0.01)
    for key in ROBUST:
        assert spiked[key] == calm[key], key


def test_equal_sides_show_as_zero() -> None:
    train = -torch.rand(3, 5)
    values = discrepancy_metrics(train, train, torch.ones(3, 5))
    assert all(values[key] == 0 for key in ROBUST)


def test_the_least_difference_of_a_log_prob_counts_as_one() -> None:
    train = torch.full((1, 4), -1.0)
    sampling = train.clone()
    sampling[0, 0] = torch.nextafter(train[0, 0], torch.tensor(0.0))
    sampling[0, 1] = torch.nan  # not scored: neither side of the fraction
    assert discrepancy_metrics(train, sampling, torch.ones(1, 4))["differs"].item() == pytest.approx(1 / 3)


# The penalty alone


def penalty_only(advantages: list[float], penalty: list[list[float]], mask: list[list[int]] | None = None) -> float:
    sizes = torch.tensor(penalty)
    counted = torch.ones_like(sizes) if mask is None else torch.tensor(mask)
    logps = torch.full_like(sizes, -1.0)
    of_sequences = torch.tensor(advantages).unsqueeze(1)
    return metrics(summarise(logps, logps - 0.1, counted, penalty=sizes, advantages=of_sequences))[
        "penalty_only"
    ].item()


def test_sequences_with_a_penalty_alone_by_hand() -> None:
    # No advantage: the first, the second (which has no penalty) and the last. The others have one, of either sign.
    penalty = [[0.1, 0.0], [0.0, 0.0], [0.1, 0.1], [0.1, 0.1], [0.0, 1e-9]]
    assert penalty_only([0.0, 0.0, 0.5, -0.5, 0.0], penalty) == pytest.approx(2 / 5)


def test_only_tokens_and_sequences_that_count_have_a_penalty() -> None:
    penalty = [[0.0, 9.0], [0.1, 0.1], [0.1, 0.0]]
    # Of the first, the punished token is masked; the second has no token, so two sequences are left.
    assert penalty_only([0.0, 0.0, 0.0], penalty, [[1, 0], [0, 0], [1, 1]]) == pytest.approx(1 / 2)


@pytest.mark.parametrize("group", [3, 7, 8, 16, 64])
def test_what_rounding_leaves_of_equal_rewards_is_no_advantage(group: int) -> None:
    rewards = torch.rand(500, 1, generator=torch.Generator().manual_seed(0)).repeat(1, group)
    left = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)  # as TRL does
    assert left.any()
    assert penalty_only(left.flatten().tolist(), [[0.1]] * left.numel()) == 1.0


def test_micro_batches_combine_to_the_fraction_of_the_whole() -> None:
    logps, penalty = torch.full((4, 3), -1.0), torch.full((4, 3), 0.1)
    advantages = torch.tensor([[0.0], [1.0], [0.0], [0.0]])
    parts = [
        summarise(logps[i:j], logps[i:j], torch.ones(j - i, 3), penalty=penalty[i:j], advantages=advantages[i:j])
        for i, j in ((0, 1), (1, 4))
    ]
    assert metrics(combine(torch.stack(parts)))["penalty_only"].item() == pytest.approx(3 / 4)
