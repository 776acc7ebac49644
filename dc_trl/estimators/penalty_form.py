# SPDX-License-Identifier: Apache-2.0
"""What a token is charged for its discrepancy: forms of DC-GRPO's penalty (arXiv 2606.08779, eq. 8–10) that are ours.

With its defaults a form changes nothing: the cost of a token is its discrepancy, as in the paper.

Shapes: B sequences, T completion tokens.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

PENALTY_HORIZONS = ("token", "to_go")
CONSTRAINT_SCALES = ("absolute", "relative")


class PenaltyForm(NamedTuple):
    """The form of a penalty.

    Attributes:
        scale: `"absolute"`, the cost is d; or `"relative"`, d/ε, so that λ means the same for every metric and stack.
        horizon: `"token"`, a token pays for itself; or `"to_go"`, for what it leads to: (1/T_i) Σ_{s ≥ t} c_s, the
            signal of the policy gradient of a constrained decision process whose cost is the trajectory's mean.
        share_cap: most that the penalty may be of the advantage, in means over a micro-batch; None for no bound.
    """

    scale: str = "absolute"
    horizon: str = "token"
    share_cap: float | None = None

    @property
    def is_relative(self) -> bool:
        """Whether costs are multiples of the tolerance."""
        return self.scale == "relative"

    def cost(self, discrepancy: Tensor, valid: Tensor, tolerance: float | None) -> Tensor:
        """What each token is charged, (B, T), before it is multiplied by λ.

        Args:
            discrepancy: d, (B, T).
            valid: (B, T) bool; the others cost nothing.
            tolerance: ε > 0; read where the scale is relative.
        """
        if self.is_relative and tolerance is not None:
            discrepancy = discrepancy / tolerance
        return to_go(discrepancy, valid) if self.horizon == "to_go" else discrepancy

    def tolerance(self, tolerance: float | None) -> float | None:
        """The tolerance in the units of the cost: 1 where the scale is relative."""
        return 1.0 if self.is_relative and tolerance is not None else tolerance

    def violation(self, mean_discrepancy: float, tolerance: float | None) -> float:
        """d̄ − ε, of a relative scale over ε; NaN while the tolerance is unknown."""
        if tolerance is None or (self.is_relative and tolerance == 0):
            return math.nan
        violation = mean_discrepancy - tolerance
        return violation / tolerance if self.is_relative else violation

    def check_calibrated(self, tolerance: float) -> None:
        """Refuses a tolerance that nothing can be relative to.

        Raises:
            ValueError: the scale is relative, and the calibration found 0.
        """
        if self.is_relative and tolerance <= 0:
            raise ValueError(
                "`constraint_scale` is 'relative' and the calibrated tolerance is 0: the engines agree exactly, so "
                "there is nothing to be relative to. Use `constraint='none'`, or set `discrepancy_tolerance`."
            )

    def capped(self, penalty: Tensor, advantages: Tensor, valid: Tensor) -> Tensor:
        """The penalty (B, T), all of it made smaller by one factor where its mean exceeds the cap's share of mean |A|.

        Where every advantage is 0, so is the penalty.

        Args:
            penalty: (B, T).
            advantages: A, (B, 1) or (B, T).
            valid: (B, T) bool, the tokens that both means are over.
        """
        if self.share_cap is None:
            return penalty
        size = torch.where(valid, penalty.abs(), 0.0).sum()
        most = self.share_cap * torch.where(valid, advantages.abs().expand_as(penalty), 0.0).sum()
        return penalty * torch.where(size > most, most / size.clamp(min=torch.finfo(size.dtype).tiny), 1.0)


def check_penalty_form(config: Any) -> None:
    """Refuses what a form cannot be with.

    Raises:
        ValueError: naming field, value, reason and remedy.
    """
    cap = config.penalty_share_cap
    if cap is not None and not (math.isfinite(cap) and cap > 0):
        raise ValueError(
            f"`penalty_share_cap` is {cap}: it bounds the penalty as a share of the advantage. Use a number above 0 "
            "such as 0.05, None for no bound, or `constraint='none'` for no penalty."
        )
    if config.constraint_scale == "relative" and config.discrepancy_tolerance == 0:
        raise ValueError(
            "`discrepancy_tolerance` is 0 with `constraint_scale='relative'`, which divides by it. Use a number above "
            "0, None to calibrate it, or `constraint_scale='absolute'`."
        )
    if config.penalty_horizon == "to_go" and config.discrepancy_level == "sequence":
        raise ValueError(
            "`discrepancy_level` is 'sequence' with `penalty_horizon='to_go'`: a trajectory's mean is the same for "
            "all of its tokens, whatever follows them. Use `discrepancy_level='token'`, or `penalty_horizon='token'`."
        )


def to_go(cost: Tensor, valid: Tensor) -> Tensor:
    """(1/T_i) Σ_{s ≥ t} c_s over a sequence's `valid` tokens, (B, T), of costs (B, T)."""
    counted = torch.where(valid, cost, torch.zeros_like(cost))
    return counted.flip(-1).cumsum(-1).flip(-1) / valid.sum(-1, keepdim=True).clamp(min=1)
