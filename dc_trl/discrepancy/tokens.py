# SPDX-License-Identifier: Apache-2.0
"""Discrepancy of single tokens: the metrics, in one table, and which tokens count.

Shapes: B sequences, T completion tokens. π (`train_logps`) is the training engine's probability of a token, μ
(`sampling_logps`) the sampling engine's; both arrive as natural logarithms, and `log_ratio = log π − log μ`.

What an engine reports may be no log-prob at all: NaN, an infinity, a placeholder. `is_scored` is the rule for that.
What it leaves out is not valid anywhere, and is selected away before anything is exponentiated.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# exp(20) = 4.9e8: far beyond any ratio that carries information, and its square still fits a float32.
LOG_RATIO_BOUND = 20.0

# What a sampling engine can mean by the log-prob of a token that it drew. Above 0 lies a logit minus a logsumexp whose
# rounding errors differ: some 1e-6 in float32 at usual logits, 1e-4 at logits of a thousand. Below −103 even float32's
# subnormals have no number for μ, and a token with μ = 0 is never drawn: it is a placeholder, such as the −9999 that
# vLLM writes for −inf.
HIGHEST_SAMPLING_LOGP = 1e-3
LOWEST_SAMPLING_LOGP = -103.0


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
"""Every discrepancy metric by name: those of DC-GRPO (arXiv 2606.08779), eq. 2. A new one is an entry here, made
before a configuration names it."""

DISCREPANCY_METRICS = tuple(METRICS)


def token_discrepancy(train_logps: Tensor, sampling_logps: Tensor, metric: str = "prob_diff") -> Tensor:
    """Discrepancy of every token, DC-GRPO (arXiv 2606.08779) eq. 2.

    - `prob_diff`: |π − μ|, the paper's choice
    - `prob_ratio`: |π/μ − 1|
    - `logprob_diff`: |log π − log μ|

    Args:
        train_logps: log π, any shape, in nats.
        sampling_logps: log μ, same shape; NaN where the engine could not score the token.
        metric: one of the three above, or any entry of `METRICS`. In the second and the third the difference of
            logarithms is clamped to ±`LOG_RATIO_BOUND`.

    Returns:
        Same shape, float32, ≥ 0; 0 where log μ is not scored, as `is_scored` says, or log π is not finite.

    Raises:
        ValueError: for an unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(
            f"`metric` is {metric!r}, which is not a discrepancy metric: use one of {DISCREPANCY_METRICS}."
        )
    scored = is_scored(sampling_logps) & train_logps.isfinite()
    # Selected before any exp: what is not scored becomes 0 on both sides, whose discrepancy is 0 by every metric.
    log_pi = torch.where(scored, train_logps.float(), 0.0)
    log_mu = torch.where(scored, sampling_logps.float(), 0.0)
    return METRICS[metric].of(log_pi, log_mu)


def is_scored(sampling_logps: Tensor) -> Tensor:
    """Where the sampling engine gave a log-prob that a drawn token can have, same shape, bool.

    That is a finite number between `LOWEST_SAMPLING_LOGP` (below it μ is 0) and `HIGHEST_SAMPLING_LOGP` (0, and what
    rounding adds). NaN, ±inf, a probability above 1 and placeholders such as vLLM's −9999 are not scored. Such a token
    has no discrepancy, no penalty and an importance ratio of 1, and counts in no mean. The rule is ours.

    Args:
        sampling_logps: log μ, any shape, in nats.
    """
    return (sampling_logps >= LOWEST_SAMPLING_LOGP) & (sampling_logps <= HIGHEST_SAMPLING_LOGP)  # False for NaN


def valid_tokens(sampling_logps: Tensor, mask: Tensor, train_logps: Tensor | None = None) -> Tensor:
    """Tokens that count, bool: unmasked, and scored by the sampling engine, as `is_scored` says.

    Args:
        sampling_logps: log μ, (B, T), in nats.
        mask: (B, T); 0 for tokens that do not count.
        train_logps: log π, (B, T); where given, a token whose log π is not finite does not count either.

    Returns:
        (B, T).
    """
    valid = mask.bool() & is_scored(sampling_logps)
    return valid if train_logps is None else valid & train_logps.isfinite()


def trajectory_mean(values: Tensor, valid: Tensor) -> Tensor:
    """The mean over each sequence's valid tokens.

    Args:
        values: (B, T).
        valid: (B, T) bool.

    Returns:
        (B, 1); 0 for a sequence without a valid token.
    """
    total = torch.where(valid, values, torch.zeros_like(values)).sum(-1, keepdim=True)
    return total / valid.sum(-1, keepdim=True).clamp(min=1)
