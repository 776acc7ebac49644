# SPDX-License-Identifier: Apache-2.0
"""Truncated and masked importance sampling between the two engines, as TRL defines its modes, and DRPO's weight.

Shapes: B sequences, T completion tokens.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dc_trl.discrepancy import LOG_RATIO_BOUND
from dc_trl.estimators.drpo import DRPO_LIMIT, drpo_weight

IMPORTANCE_SAMPLING_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
DRPO = "drpo"
# Every value of `vllm_importance_sampling_mode`; TRL itself knows the first four.
CORRECTIONS = (*IMPORTANCE_SAMPLING_MODES, DRPO)


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
    """The correction of a run.

    Attributes:
        mode: one of `CORRECTIONS`.
        clip_min, clip_max: bounds, as `importance_sampling_ratio` takes them; `drpo` has none.
        limit: δ of `drpo`.
    """

    mode: str
    clip_min: float | None
    clip_max: float | None
    limit: float = DRPO_LIMIT

    def ratio(
        self,
        train_logps: Tensor,
        sampling_logps: Tensor,
        valid: Tensor,
        current_logps: Tensor | None = None,
        advantages: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The weight, and the tokens that it keeps.

        Args:
            train_logps, sampling_logps, valid: as for `importance_sampling_ratio`.
            current_logps: log π of the policy in this update, (B, T); `drpo` takes it for π. None: `train_logps`.
            advantages: (B,), (B, 1) or (B, T), after a penalty; for `drpo` alone.

        Returns:
            As `importance_sampling_ratio`; `drpo` gives ρ w, not truncated, and keeps everything.

        Raises:
            ValueError: for an unknown mode, or for `drpo` without advantages.
        """
        if self.mode != DRPO:
            return importance_sampling_ratio(
                train_logps, sampling_logps, valid, mode=self.mode, clip_min=self.clip_min, clip_max=self.clip_max
            )
        if advantages is None:
            raise ValueError("`advantages` is None with 'drpo', whose weight depends on their sign. Pass them.")
        current = train_logps if current_logps is None else current_logps
        log_ratio = torch.where(valid, current - sampling_logps, torch.zeros_like(current))
        ratio = log_ratio.clamp(max=LOG_RATIO_BOUND).exp()
        weight = drpo_weight(current, sampling_logps, valid, advantages, self.limit)
        return ratio * weight, torch.ones_like(valid)
