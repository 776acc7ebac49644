# SPDX-License-Identifier: Apache-2.0
"""Discrepancy between two engines that score the same tokens: the token metrics and every batch metric.

Shapes: B sequences, T completion tokens. π (`train_logps`) is the training engine's probability of a token, μ
(`sampling_logps`) the sampling engine's; both arrive as natural logarithms, and `log_ratio = log π − log μ`.

Batch metrics are functions of a `summary`, one flat vector of sums, maxima and a histogram. Summaries of micro-batches
and of ranks are merged by `combine`, so that a global metric is never a mean of means.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# exp(20) = 4.9e8: far beyond any ratio that carries information, and its square still fits a float32.
LOG_RATIO_BOUND = 20.0


class DiscrepancyMetric(NamedTuple):
    """A way to measure by how much two engines differ about a token.

    Attributes:
        of: discrepancy ≥ 0 of log π and log μ, float32, any shape.
        symbol: in formulas, reports and pictures.
        agreeing: mean below which the engines agree as float32 with float32 does: a hundredth of the smallest
            tolerance that was published, or what corresponds to it. Our values.
    """

    of: Callable[[Tensor, Tensor], Tensor]
    symbol: str
    agreeing: float


def _prob_diff(train_logps: Tensor, sampling_logps: Tensor) -> Tensor:
    return (train_logps.exp() - sampling_logps.exp()).abs()


def _prob_ratio(train_logps: Tensor, sampling_logps: Tensor) -> Tensor:
    return (train_logps - sampling_logps).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).expm1().abs()


def _logprob_diff(train_logps: Tensor, sampling_logps: Tensor) -> Tensor:
    return (train_logps - sampling_logps).abs()


METRICS = {
    "prob_diff": DiscrepancyMetric(_prob_diff, "|π − μ|", 1e-5),
    "prob_ratio": DiscrepancyMetric(_prob_ratio, "|π/μ − 1|", 1e-4),
    "logprob_diff": DiscrepancyMetric(_logprob_diff, "|log π − log μ|", 1e-4),
}
"""Every discrepancy metric by name; DC-GRPO (arXiv 2606.08779), eq. 2. A new one is an entry here."""

DISCREPANCY_METRICS = tuple(METRICS)

# The histogram of token discrepancies: logarithmic bins from 1e-9 to 1e3. A bin is 0.68 % wide, which bounds the
# relative error of the percentile; anything below the first edge (an exact 0, mostly) falls into bin 0.
HISTOGRAM_BINS = 4096
HISTOGRAM_LOW, HISTOGRAM_DECADES = -9.0, 12.0

_TOKEN_SUMS = "valid discrepancy kept discrepancy_kept penalty advantage".split()
_TOKEN_SUMS += "pi mu pi_sq mu_sq pi_mu log_ratio abs_log_ratio ratio ratio_sq correction".split()
_SEQUENCE_SUMS = (
    "trajectories trajectory_discrepancy seq_ratio_sq ppl_ratio abs_seq_log_ratio abs_mean_log_ratio".split()
)
_COUNTS = ["tokens", "nan_tokens"]
_MAXIMA = "discrepancy_max abs_log_ratio_max ratio_max neg_ratio_min correction_max neg_correction_min".split()
_SUMS = [*_TOKEN_SUMS, *_SEQUENCE_SUMS, *_COUNTS]
_MAXIMA_AT = len(_SUMS)
_HISTOGRAM_AT = _MAXIMA_AT + len(_MAXIMA)


def token_discrepancy(train_logps: Tensor, sampling_logps: Tensor, metric: str = "prob_diff") -> Tensor:
    """Discrepancy of every token, DC-GRPO (arXiv 2606.08779) eq. 2.

    - `prob_diff`: |π − μ|, the paper's choice
    - `prob_ratio`: |π/μ − 1|
    - `logprob_diff`: |log π − log μ|

    Args:
        train_logps: log π, any shape, in nats.
        sampling_logps: log μ, same shape; NaN where the engine could not score the token.
        metric: one of the three above.

    Returns:
        Same shape, float32, ≥ 0; 0 where `sampling_logps` is NaN.

    Raises:
        ValueError: for an unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(
            f"`metric` is {metric!r}, which is not a discrepancy metric: use one of {DISCREPANCY_METRICS}."
        )
    discrepancy = METRICS[metric].of(train_logps.float(), sampling_logps.float())
    return torch.where(sampling_logps.isnan(), torch.zeros_like(discrepancy), discrepancy)


def valid_tokens(sampling_logps: Tensor, mask: Tensor) -> Tensor:
    """Tokens that count, (B, T) bool: unmasked, and scored by the sampling engine (not NaN)."""
    return mask.bool() & ~sampling_logps.isnan()


def trajectory_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of `values` (B, T) over each sequence's `valid` tokens, (B, 1); 0 for a sequence that has none."""
    total = torch.where(valid, values, torch.zeros_like(values)).sum(-1, keepdim=True)
    return total / valid.sum(-1, keepdim=True).clamp(min=1)


def summarise(
    train_logps: Tensor,
    sampling_logps: Tensor,
    mask: Tensor,
    *,
    metric: str = "prob_diff",
    correction: Tensor | None = None,
    kept: Tensor | None = None,
    penalty: Tensor | None = None,
    advantages: Tensor | None = None,
) -> Tensor:
    """Condenses one micro-batch into the flat vector that `combine` merges and `metrics` reads.

    Args:
        train_logps, sampling_logps: log π and log μ, (B, T).
        mask: (B, T); 0 for padding, tool tokens and masked completions.
        metric: the discrepancy metric.
        correction: importance-sampling ratio as applied, (B, T) or (B, 1); π/μ where omitted.
        kept: (B, T) bool, tokens that the importance-sampling mask keeps; all where omitted.
        penalty, advantages: (B, T) or (B, 1), as applied; 0 where omitted.

    Returns:
        (K,) float64 (float32 on devices without it). Masked positions contribute nothing, whatever they hold.
    """
    valid = valid_tokens(sampling_logps, mask)
    dtype = torch.float32 if train_logps.device.type == "mps" else torch.float64
    # Selected before any exp: a masked inf times 0 would be NaN.
    log_pi, log_mu = (torch.where(valid, x.float(), 0.0) for x in (train_logps, sampling_logps))
    discrepancy = token_discrepancy(log_pi, log_mu, metric)
    log_ratio = (log_pi - log_mu).to(dtype)
    ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    pi, mu = log_pi.to(dtype).exp(), log_mu.to(dtype).exp()
    kept = valid if kept is None else valid & kept
    correction = ratio if correction is None else correction.to(dtype).expand_as(ratio)
    zeros = torch.zeros_like(ratio)
    penalty, advantages = (zeros if x is None else x.to(dtype).abs().expand_as(ratio) for x in (penalty, advantages))
    d = discrepancy.to(dtype)
    # In the order of _TOKEN_SUMS.
    per_token = [valid, d, kept, d * kept, penalty, advantages]
    per_token += [pi, mu, pi * pi, mu * mu, pi * mu, log_ratio, log_ratio.abs(), ratio, ratio * ratio, correction]
    token_sums = torch.stack([torch.where(valid, x.to(dtype), zeros).sum() for x in per_token])
    counts = torch.stack([mask.bool().sum(), (mask.bool() & sampling_logps.isnan()).sum()]).to(dtype)
    maxima = _maxima(valid, (d, log_ratio.abs(), ratio, -ratio, correction, -correction))
    sequence_sums = _sequence_sums(d, log_ratio, valid)
    return torch.cat([token_sums, sequence_sums, counts, maxima, _histogram(d, valid)])


def _sequence_sums(discrepancy: Tensor, log_ratio: Tensor, valid: Tensor) -> Tensor:
    """Sums over the sequences that have a valid token, in the order of _SEQUENCE_SUMS."""
    real = valid.any(-1, keepdim=True)
    total = torch.where(valid, log_ratio, 0.0).sum(-1, keepdim=True)
    mean = trajectory_mean(log_ratio, valid)
    bounded_total, bounded_mean = (x.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND) for x in (total, mean))
    per_sequence = [torch.ones_like(total), trajectory_mean(discrepancy, valid), (2 * bounded_total).exp()]
    per_sequence += [(-bounded_mean).exp(), total.abs(), mean.abs()]
    return torch.stack([torch.where(real, x, torch.zeros_like(x)).sum() for x in per_sequence])


def _maxima(valid: Tensor, values: tuple[Tensor, ...]) -> Tensor:
    # -inf is the identity of max, so an all-masked micro-batch or rank does not shift the result.
    lowest = torch.full((1,), -torch.inf, dtype=values[0].dtype, device=valid.device)
    return torch.stack([torch.cat([torch.where(valid, x, lowest).flatten(), lowest]).max() for x in values])


def _histogram(discrepancy: Tensor, valid: Tensor) -> Tensor:
    position = (discrepancy.clamp(min=1e-30).log10() - HISTOGRAM_LOW) * (HISTOGRAM_BINS / HISTOGRAM_DECADES)
    index = position.nan_to_num(nan=0.0).clamp(0, HISTOGRAM_BINS - 1).long().flatten()
    histogram = torch.zeros(HISTOGRAM_BINS, dtype=discrepancy.dtype, device=discrepancy.device)
    return histogram.scatter_add_(0, index, valid.flatten().to(discrepancy.dtype))


def combine(summaries: Tensor) -> Tensor:
    """Merges summaries (N, K), of micro-batches or of ranks, into one (K,): sums add, maxima are maximised."""
    summary = summaries.sum(0)
    summary[_MAXIMA_AT:_HISTOGRAM_AT] = summaries[:, _MAXIMA_AT:_HISTOGRAM_AT].amax(0)
    return summary


def mean_discrepancy(summary: Tensor, average: str = "trajectory") -> Tensor:
    """The constrained mean d̄ (eq. 11): over trajectories of their token means, or over all tokens (`"token"`).

    Returns:
        Scalar; NaN if no token counts.
    """
    keys = ("trajectory_discrepancy", "trajectories") if average == "trajectory" else ("discrepancy", "valid")
    total, count = (summary[_SUMS.index(key)] for key in keys)
    return total / count


def metrics(summary: Tensor, average: str = "trajectory") -> dict[str, Tensor]:
    """Every batch metric of a summary, as scalars; docs/metrics.md gives formula, unit, healthy range and remedy.

    Args:
        summary: (K,), of `summarise` or `combine`.
        average: `"trajectory"` or `"token"`, for `discrepancy/mean`.
    """
    s = dict(zip((*_SUMS, *_MAXIMA), summary[:_HISTOGRAM_AT], strict=True))
    n, sequences = s["valid"], s["trajectories"]
    covariance = s["pi_mu"] / n - s["pi"] / n * s["mu"] / n
    variances = (s["pi_sq"] / n - (s["pi"] / n) ** 2) * (s["mu_sq"] / n - (s["mu"] / n) ** 2)
    maximum = torch.where(n > 0, s["discrepancy_max"], torch.nan)
    return {
        "discrepancy/mean": mean_discrepancy(summary, average),
        "discrepancy/max": maximum,
        "discrepancy/p99": torch.minimum(_percentile(summary[_HISTOGRAM_AT:], 0.99), maximum),
        "discrepancy_kept/mean": s["discrepancy_kept"] / s["kept"],
        # Below a mean |A| of a millionth no sequence has a reward of its own, and a share would say nothing.
        "penalty_share": torch.where(s["advantage"] > 1e-6 * n, s["penalty"] / s["advantage"], torch.nan),
        "pearson": (covariance / variances.clamp(min=0).sqrt()).clamp(-1.0, 1.0),
        "kl": -s["log_ratio"] / n,
        "k3_kl": (s["ratio"] - s["log_ratio"]) / n - 1.0,
        "chi2_token": s["ratio_sq"] / n - 1.0,
        "chi2_seq": s["seq_ratio_sq"] / sequences - 1.0,
        "ess": s["ratio"] ** 2 / (n * s["ratio_sq"]),
        "ppl_ratio": s["ppl_ratio"] / sequences,
        "log_ppl_abs_diff": s["abs_seq_log_ratio"] / sequences,
        "log_ppl_abs_diff_per_token": s["abs_mean_log_ratio"] / sequences,
        "nan_fraction": s["nan_tokens"] / s["tokens"],
        "importance_ratio/min": torch.where(n > 0, -s["neg_ratio_min"], torch.nan),
        "importance_ratio/mean": s["ratio"] / n,
        "importance_ratio/max": torch.where(n > 0, s["ratio_max"], torch.nan),
        "masked_fraction": 1.0 - s["kept"] / n,
    }


def correction_metrics(summary: Tensor) -> dict[str, Tensor]:
    """What TRL logs under `sampling/` for its own correction, from the same summary: scalars under TRL's key names."""
    s = dict(zip((*_SUMS, *_MAXIMA), summary[:_HISTOGRAM_AT], strict=True))
    return {
        "sampling_logp_difference/mean": s["abs_log_ratio"] / s["valid"],
        "sampling_logp_difference/max": s["abs_log_ratio_max"],
        "importance_sampling_ratio/min": -s["neg_correction_min"],
        "importance_sampling_ratio/mean": s["correction"] / s["valid"],
        "importance_sampling_ratio/max": s["correction_max"],
    }


def _percentile(histogram: Tensor, q: float) -> Tensor:
    """The q-quantile of the logarithmic histogram: its bin's geometric centre; 0 for bin 0, NaN if it is empty."""
    cumulative = histogram.cumsum(0)
    index = (cumulative < q * cumulative[-1]).sum()
    centre = 10.0 ** (HISTOGRAM_LOW + (index.to(histogram.dtype) + 0.5) * (HISTOGRAM_DECADES / HISTOGRAM_BINS))
    value = torch.where(index == 0, torch.zeros_like(centre), centre)
    return torch.where(cumulative[-1] > 0, value, torch.nan)


def discrepancy_metrics(train_logps: Tensor, sampling_logps: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Every metric of one batch that needs nothing but the two sides' log-probs.

    Args:
        train_logps, sampling_logps: log π and log μ, (B, T), in nats.
        mask: (B, T); 0 for tokens that do not count.

    Returns:
        Float32 scalars; the keys are those that the trainer logs, without their `dc/` prefix.
    """
    values = metrics(summarise(train_logps, sampling_logps, mask))
    return {key: value.float() for key, value in values.items() if key != "penalty_share"}
