# SPDX-License-Identifier: Apache-2.0
"""Discrepancy between two engines that score the same tokens: of tokens, of batches, and what is logged of it."""

from dc_trl.discrepancy.metrics import correction_metrics, discrepancy_metrics, mean_discrepancy, metrics
from dc_trl.discrepancy.summary import combine, summarise
from dc_trl.discrepancy.tokens import (
    DISCREPANCY_METRICS,
    HIGHEST_SAMPLING_LOGP,
    LOG_RATIO_BOUND,
    LOWEST_SAMPLING_LOGP,
    METRICS,
    DiscrepancyMetric,
    is_scored,
    token_discrepancy,
    trajectory_mean,
    valid_tokens,
)

__all__ = [
    "DISCREPANCY_METRICS",
    "HIGHEST_SAMPLING_LOGP",
    "LOG_RATIO_BOUND",
    "LOWEST_SAMPLING_LOGP",
    "METRICS",
    "DiscrepancyMetric",
    "combine",
    "correction_metrics",
    "discrepancy_metrics",
    "is_scored",
    "mean_discrepancy",
    "metrics",
    "summarise",
    "token_discrepancy",
    "trajectory_mean",
    "valid_tokens",
]
