# SPDX-License-Identifier: Apache-2.0
"""Discrepancy of single tokens: the metrics, in one table, and which tokens count.

Shapes: B sequences, T completion tokens. π (`train_logps`) is the training engine's probability of a token, μ
(`sampling_logps`) the sampling engine's; both arrive as natural logarithms, and `log_ratio = log π − log μ`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# exp(20) = 4.9e8: far beyond any ratio that carries information, and its square still fits a float32.
LOG_RATIO_BOUND = 20.0


def bounded(log_ratio: Tensor) -> Tensor:
    """Log-ratios, any shape, within ±`LOG_RATIO_BOUND`."""
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


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
    return bounded(train_logps - sampling_logps).expm1().abs()


def _logprob_diff(train_logps: Tensor, sampling_logps: Tensor) -> Tensor:
    return bounded(train_logps - sampling_logps).abs()


METRICS = {
    "prob_diff": DiscrepancyMetric(_prob_diff, "|π − μ|", 1e-5),
    "prob_ratio": DiscrepancyMetric(_prob_ratio, "|π/μ − 1|", 1e-4),
    "logprob_diff": DiscrepancyMetric(_logprob_diff, "|log π − log μ|", 1e-4),
}
"""Every discrepancy metric by name; DC-GRPO (arXiv 2606.08779), eq. 2. A new one is an entry here."""

DISCREPANCY_METRICS = tuple(METRICS)


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
