# SPDX-License-Identifier: Apache-2.0
"""Truncated and masked importance sampling between the two engines, as TRL defines its modes.

Shapes: B sequences, T completion tokens.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dc_trl.discrepancy import LOG_RATIO_BOUND

IMPORTANCE_SAMPLING_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def importance_sampling_ratio(
    train_logps: Tensor,
    sampling_logps: Tensor,
    valid: Tensor,
    *,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> tuple[Tensor, Tensor]:
    """The weight ρ = π/μ that corrects for sampling with μ; length-decay paper (arXiv 2602.01826) eq. 4–6.

    `*_truncate` clamps ρ to [clip_min, clip_max] (eq. 5, TIS); `*_mask` sets it to 0 outside (eq. 6, MIS).
    `token_*` takes one ρ per token, `sequence_*` the product over the sequence. Without an upper bound ρ is at most
    exp(`LOG_RATIO_BOUND`): an infinite weight times an advantage of 0 would be NaN.

    Args:
        train_logps, sampling_logps: log π and log μ, (B, T).
        valid: (B, T) bool, of `valid_tokens`; the others contribute a ratio of 1.
        mode: one of `IMPORTANCE_SAMPLING_MODES`.
        clip_min, clip_max: bounds; None for none.

    Returns:
        The ratio, (B, T) for token modes and (B, 1) for sequence modes, and the tokens it keeps, bool, same shape.

    Raises:
        ValueError: for an unknown mode.
    """
    if mode not in IMPORTANCE_SAMPLING_MODES:
        raise ValueError(
            f"`vllm_importance_sampling_mode` is {mode!r}, which is unknown: use one of {IMPORTANCE_SAMPLING_MODES}."
        )
    log_ratio = torch.where(valid, train_logps - sampling_logps, torch.zeros_like(train_logps))
    if mode.startswith("sequence"):
        log_ratio = log_ratio.sum(-1, keepdim=True)
    ratio = log_ratio.clamp(max=LOG_RATIO_BOUND).exp()
    low = -math.inf if clip_min is None else clip_min
    high = math.inf if clip_max is None else clip_max
    if mode.endswith("truncate"):
        return ratio.clamp(min=low, max=high), torch.ones_like(ratio, dtype=torch.bool)
    kept = (ratio >= low) & (ratio <= high)
    return torch.where(kept, ratio, torch.zeros_like(ratio)), kept


class ImportanceSampling(NamedTuple):
    """The correction of a run: the mode and the bounds that `importance_sampling_ratio` takes."""

    mode: str
    clip_min: float | None
    clip_max: float | None

    def ratio(self, train_logps: Tensor, sampling_logps: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and the tokens it keeps; see `importance_sampling_ratio`."""
        return importance_sampling_ratio(
            train_logps, sampling_logps, valid, mode=self.mode, clip_min=self.clip_min, clip_max=self.clip_max
        )
