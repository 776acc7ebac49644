# SPDX-License-Identifier: Apache-2.0
"""The batch metrics of a summary; docs/metrics.md gives formula, unit, healthy range and remedy of each."""

import torch
from torch import Tensor

from dc_trl.discrepancy.summary import (
    HISTOGRAM_BINS,
    HISTOGRAM_DECADES,
    HISTOGRAM_LOW,
    named,
    summarise,
)

# The quantiles that are logged of a histogram, in percent.
PERCENTS = (50, 90, 99)


def mean_discrepancy(summary: Tensor, average: str = "trajectory") -> Tensor:
    """The constrained mean d̄ (eq. 11): over trajectories of their token means, or over all tokens (`"token"`).

    Args:
        summary: (K,), of `summarise` or `combine`.
        average: `"trajectory"` or `"token"`.

    Returns:
        Scalar; NaN if no token counts.
    """
    parts = named(summary)
    if average == "trajectory":
        return parts["trajectory_discrepancy"] / parts["trajectories"]
    return parts["discrepancy"] / parts["valid"]


def metrics(summary: Tensor, average: str = "trajectory") -> dict[str, Tensor]:
    """Every batch metric of a summary, as scalars.

    Quantiles are read from histograms; `quantile` says how exact they are.

    Args:
        summary: (K,), of `summarise` or `combine`.
        average: `"trajectory"` or `"token"`, for `discrepancy/mean`.

    Returns:
        Scalars under the keys of docs/metrics.md without `dc/`; NaN where no token counts.
    """
    s = named(summary)
    n, sequences = s["valid"], s["trajectories"]
    covariance = s["pi_mu"] / n - s["pi"] / n * s["mu"] / n
    variances = (s["pi_sq"] / n - (s["pi"] / n) ** 2) * (s["mu_sq"] / n - (s["mu"] / n) ** 2)
    maximum = torch.where(n > 0, s["discrepancy_max"], torch.nan)
    return {
        "discrepancy/mean": mean_discrepancy(summary, average),
        "discrepancy/max": maximum,
        **_quantiles("discrepancy", s["discrepancy_histogram"], maximum),
        **_quantiles("abs_log_ratio", s["abs_log_ratio_histogram"], s["abs_log_ratio_max"]),
        "differs": s["differing"] / n,
        "discrepancy_kept/mean": s["discrepancy_kept"] / s["kept"],
        # Below a mean |A| of a millionth no sequence has a reward of its own, and a share would say nothing.
        "penalty_share": torch.where(s["advantage"] > 1e-6 * n, s["penalty"] / s["advantage"], torch.nan),
        "penalty_only": s["penalty_only"] / sequences,
        "pearson": (covariance / variances.clamp(min=0).sqrt()).clamp(-1.0, 1.0),
        "kl": -s["log_ratio"] / n,
        "k3_kl": (s["ratio"] - s["log_ratio"]) / n - 1.0,
        "chi2_token": s["ratio_sq"] / n - 1.0,
        "chi2_seq": s["seq_ratio_sq"] / sequences - 1.0,
        "ess": s["ratio"] ** 2 / (n * s["ratio_sq"]),
        "ppl_ratio": s["ppl_ratio"] / sequences,
        "log_ppl_abs_diff": s["abs_seq_log_ratio"] / sequences,
        "log_ppl_abs_diff_per_token": s["abs_mean_log_ratio"] / sequences,
        "nan_fraction": s["unscored_tokens"] / s["tokens"],
        "importance_ratio/min": torch.where(n > 0, -s["neg_ratio_min"], torch.nan),
        "importance_ratio/mean": s["ratio"] / n,
        "importance_ratio/max": torch.where(n > 0, s["ratio_max"], torch.nan),
        "masked_fraction": 1.0 - s["kept"] / n,
    }


def correction_metrics(summary: Tensor) -> dict[str, Tensor]:
    """What TRL logs under `sampling/` for its own correction, from the same summary.

    Args:
        summary: (K,), of `summarise` or `combine`.

    Returns:
        Scalars under TRL's keys without `sampling/`; NaN where no token counts, which TRL's log makes null.
    """
    s = named(summary)
    n = s["valid"]
    return {
        "sampling_logp_difference/mean": s["abs_log_ratio"] / n,
        "sampling_logp_difference/max": torch.where(n > 0, s["abs_log_ratio_max"], torch.nan),
        "importance_sampling_ratio/min": torch.where(n > 0, -s["neg_correction_min"], torch.nan),
        "importance_sampling_ratio/mean": s["correction"] / n,
        "importance_sampling_ratio/max": torch.where(n > 0, s["correction_max"], torch.nan),
    }


def _quantiles(name: str, histogram: Tensor, maximum: Tensor) -> dict[str, Tensor]:
    """Each of `PERCENTS` under its key; a bin's middle can lie above the largest value, and is cut to that."""
    return {f"{name}/p{percent}": torch.minimum(quantile(histogram, percent), maximum) for percent in PERCENTS}


def quantile(histogram: Tensor, percent: int) -> Tensor:
    """The smallest value that `percent` % of the tokens do not exceed, read from a logarithmic histogram.

    It is the geometric middle of its bin. A bin is 12 decades / 4096 = 0.68 % wide, so the quantile is within 0.34 %
    of the exact one, from 1e-9 to 1e3. Below that (bin 0) it is 0; above it is the last bin's middle, 997.

    Args:
        histogram: token counts, (HISTOGRAM_BINS,).
        percent: 1 to 100.

    Returns:
        Scalar; NaN if the histogram is empty.
    """
    cumulative = histogram.cumsum(0)
    # In whole numbers: 0.99 · n would be off by a token where its rounding goes the wrong way.
    index = (100 * cumulative < percent * cumulative[-1]).sum()
    middle = 10.0 ** (HISTOGRAM_LOW + (index.to(histogram.dtype) + 0.5) * (HISTOGRAM_DECADES / HISTOGRAM_BINS))
    value = torch.where(index == 0, torch.zeros_like(middle), middle)
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
    return {key: value.float() for key, value in values.items() if not key.startswith("penalty_")}
