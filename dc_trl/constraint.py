# SPDX-License-Identifier: Apache-2.0
"""The discrepancy constraint of a run: its kinds of penalty, its multiplier, its tolerance, and how they move.

Shapes: B sequences, T completion tokens.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dc_trl.discrepancy import trajectory_mean
from dc_trl.dual import DualVariable

DISCREPANCY_LEVELS = ("token", "sequence")

# Above this share of the advantage, the penalty is part of what the policy learns, not a nudge. Our value.
NOTABLE_PENALTY_SHARE = 0.1


class ConstraintKind(NamedTuple):
    """One way to constrain the discrepancy.

    Attributes:
        penalty: what a token loses, (B, T) ≥ 0, of discrepancy d (B, T), multiplier λ and tolerance ε; ε is NaN while
            it is unknown, and the kind does not need it.
        needs_tolerance: whether it waits, with a multiplier of 0, while the tolerance is being calibrated.
        adapts: whether dual ascent moves λ.
    """

    penalty: Callable[[Tensor, float, float], Tensor]
    needs_tolerance: bool
    adapts: bool


def _no_penalty(discrepancy: Tensor, multiplier: float, tolerance: float) -> Tensor:
    return torch.zeros_like(discrepancy)


def _proportional(discrepancy: Tensor, multiplier: float, tolerance: float) -> Tensor:
    return multiplier * discrepancy


def _above_tolerance(discrepancy: Tensor, multiplier: float, tolerance: float) -> Tensor:
    return torch.where(discrepancy > tolerance, multiplier * discrepancy, 0.0)


KINDS = {
    "none": ConstraintKind(_no_penalty, needs_tolerance=False, adapts=False),
    "fixed": ConstraintKind(_proportional, needs_tolerance=False, adapts=False),
    "threshold": ConstraintKind(_above_tolerance, needs_tolerance=True, adapts=False),
    "lagrangian": ConstraintKind(_proportional, needs_tolerance=True, adapts=True),
}
"""Every constraint by name: Dual-GRPO (DC-GRPO paper, arXiv 2606.08779, eq. 3–4), its figure 3, DC-GRPO (eq. 8–11). A
new one is an entry here."""

CONSTRAINTS = tuple(KINDS)


def discrepancy_penalty(
    discrepancy: Tensor,
    valid: Tensor,
    *,
    constraint: str,
    multiplier: float,
    tolerance: float | None,
    level: str = "token",
) -> Tensor:
    """The penalty that DC-GRPO (arXiv 2606.08779) takes off every token's advantage; never negative, detached.

    - `none`: 0
    - `fixed`: λ·d (eq. 3, Dual-GRPO)
    - `threshold`: λ·d where d > tolerance, else 0 (figure 3)
    - `lagrangian`: λ_k·d (eq. 8–10)

    Args:
        discrepancy: d, (B, T), of `token_discrepancy`.
        valid: (B, T) bool, of `valid_tokens`; the others get no penalty.
        constraint: one of the four.
        multiplier: λ of this iteration.
        tolerance: the tolerance in use; None while it is being calibrated, when only `fixed` applies a penalty.
        level: `"token"`, or `"sequence"` to use each trajectory's mean d for all of its tokens (the ablation).

    Returns:
        (B, T) float32.

    Raises:
        ValueError: for an unknown constraint or level.
    """
    if constraint not in KINDS:
        raise ValueError(f"`constraint` is {constraint!r}, which is unknown: use one of {CONSTRAINTS}.")
    if level not in DISCREPANCY_LEVELS:
        raise ValueError(f"`level` is {level!r}, which is unknown: use one of {DISCREPANCY_LEVELS}.")
    kind = KINDS[constraint]
    d = discrepancy.detach()
    if tolerance is None and kind.needs_tolerance:
        return torch.zeros_like(d)
    if level == "sequence":
        d = trajectory_mean(d, valid).expand_as(d)
    known = math.nan if tolerance is None else tolerance
    return torch.where(valid, kind.penalty(d, multiplier, known), torch.zeros_like(d))


def penalised_advantages(advantages: Tensor, penalty: Tensor) -> Tensor:
    """Ã_{i,t} = A_i − penalty_{i,t}, eq. 8.

    Args:
        advantages: A, (B,) per sequence or (B, T).
        penalty: (B, T), of `discrepancy_penalty`.

    Returns:
        (B, T).
    """
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    return advantages - penalty


class DiscrepancyTolerance:
    """Tolerance ε of the constraint mean discrepancy ≤ ε (DC-GRPO, arXiv 2606.08779, eq. 6).

    The discrepancy of two engines that hold the same weights, the floor, depends on model, precision and kernels, so a
    number is right only for the stack on which it was measured. Without one, the floor is the mean over the first
    batches of a run, and the tolerance `floor · slack`. The procedure is ours; the paper gives numbers only. The floor
    is measured beside a given tolerance too, to tell one that cannot be met.

    Args:
        value: the tolerance, in units of the discrepancy metric; None calibrates it.
        slack: tolerance as a multiple of the calibrated floor.
        batches: number of generation batches that calibrate.
    """

    def __init__(self, value: float | None, slack: float = 1.25, batches: int = 8) -> None:
        self.given = value
        self.slack = slack
        self.batches = batches
        self._total = 0.0
        self._count = 0

    @property
    def value(self) -> float | None:
        """The tolerance in use; None while calibrating."""
        if self.given is not None:
            return self.given
        return None if self.floor is None else self.slack * self.floor

    @property
    def floor(self) -> float | None:
        """Mean over the first batches, in units of the discrepancy metric; None until there are enough of them."""
        return self._total / self._count if self._count >= self.batches else None

    def update(self, mean_discrepancy: float) -> bool:
        """Takes in one batch's mean; without effect once the floor is known, or if the mean is not finite.

        Returns:
            Whether this batch was the last that the floor waited for.
        """
        if self.floor is not None or not math.isfinite(mean_discrepancy):
            return False
        self._total += mean_discrepancy
        self._count += 1
        return self.floor is not None

    def state_dict(self) -> dict[str, float | int]:
        """The floor so far. A given tolerance is config, not state."""
        return {"total": self._total, "count": self._count}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Restores `state_dict()`.

        Raises:
            ValueError: if a stored number is negative or not finite.
        """
        total, count = float(state["total"]), int(state["count"])
        if not math.isfinite(total) or total < 0 or count < 0:
            raise ValueError(
                f"Stored calibration is {total} over {count} batches: the checkpoint is damaged. Resume from an "
                "earlier one."
            )
        self._total, self._count = total, count

    def restart(self) -> None:
        """Forgets the calibration so far."""
        self._total, self._count = 0.0, 0


class DiscrepancyConstraint:
    """One of the four constraints, with its dual variable and its tolerance.

    Args:
        kind: `none`, `fixed`, `threshold` or `lagrangian`; see `discrepancy_penalty`.
        dual: the multiplier; only `lagrangian` moves it.
        tolerance: the tolerance; every kind calibrates it, so that the violation is logged.
        level: `"token"` or `"sequence"`; see `discrepancy_penalty`.
    """

    def __init__(
        self,
        kind: str,
        dual: DualVariable,
        tolerance: DiscrepancyTolerance,
        level: str = "token",
    ) -> None:
        self.kind = kind
        self.dual = dual
        self.tolerance = tolerance
        self.level = level

    @property
    def _adapts(self) -> bool:
        return KINDS[self.kind].adapts

    @property
    def _needs_tolerance(self) -> bool:
        return KINDS[self.kind].needs_tolerance

    @property
    def multiplier(self) -> float:
        """λ_k as it acts on this iteration: 0 with `none`, and while the tolerance that the kind needs is unknown."""
        waits = self.tolerance.value is None and self._needs_tolerance
        return 0.0 if waits or self.kind == "none" else self.dual.value

    def penalty(self, discrepancy: Tensor, valid: Tensor, advantages: Tensor | None = None) -> Tensor:
        """What each token's advantage loses in this iteration, (B, T).

        Args:
            discrepancy, valid: as for `discrepancy_penalty`.
            advantages: A, (B, 1) or (B, T), for a constraint of one's own; no kind's penalty depends on them.
        """
        return discrepancy_penalty(
            discrepancy.detach(),
            valid,
            constraint=self.kind,
            multiplier=self.multiplier,
            tolerance=self.tolerance.value,
            level=self.level,
        )

    def violation(self, mean_discrepancy: float) -> float:
        """Mean discrepancy − tolerance, positive where the constraint is violated; NaN while calibrating."""
        return math.nan if self.tolerance.value is None else mean_discrepancy - self.tolerance.value

    def metrics(self, mean_discrepancy: float) -> dict[str, float]:
        """What is logged of an iteration: `multiplier`, and `tolerance` and `violation` once they are known."""
        known = {"multiplier": self.multiplier}
        if self.tolerance.value is not None:
            known |= {"tolerance": self.tolerance.value, "violation": self.violation(mean_discrepancy)}
        return known

    def update(self, mean_discrepancy: float) -> list[tuple[str, str]]:
        """Ends an iteration, eq. 11: measures the floor, calibrates while the tolerance is unknown, then moves λ.

        A kind that does not need the tolerance calibrates it too, to log the violation, and does not wait for it.

        Args:
            mean_discrepancy: d̄_k over all ranks and micro-batches.

        Returns:
            What a person should be told once, as (topic, message).
        """
        calibrates = self.tolerance.value is None
        complete = self.tolerance.update(mean_discrepancy)
        if calibrates:
            return self._of_calibration()
        if not self._adapts:
            return []
        self.dual.step(self.violation(mean_discrepancy))
        notices = [("saturated", self._saturation())] if self.dual.saturated else []
        if complete and self._infeasible():
            notices.append(("infeasible", f"{self._below_the_floor()} The multiplier rises for as long as it is."))
        return notices

    def _of_calibration(self) -> list[tuple[str, str]]:
        waiting = f"no penalty yet: calibrating the tolerance on {self.tolerance.batches} generation batches."
        notices = [("calibrating", waiting)] if self._needs_tolerance else []
        if self.tolerance.value is not None:
            notices.append(("calibrated", self._calibrated(self.tolerance.value)))
        return notices

    def _calibrated(self, tolerance: float) -> str:
        if self._needs_tolerance:
            return f"discrepancy tolerance calibrated to {tolerance:.3g}."
        return (
            f"the discrepancy's floor gives a tolerance of {tolerance:.3g}, which `constraint={self.kind!r}` does not "
            "use: it is logged, and what exceeds it as `dc/violation`."
        )

    def _infeasible(self) -> bool:
        """Whether the tolerance is below what the engines differed by when the run began."""
        value, floor = self.tolerance.value, self.tolerance.floor
        return value is not None and floor is not None and value < floor

    def _below_the_floor(self) -> str:
        floor, batches = self.tolerance.floor or math.nan, self.tolerance.batches
        return (
            f"`discrepancy_tolerance` is {self.tolerance.value:.3g}, below the floor: the engines differed by "
            f"{floor:.3g} over the first {batches} generation batches, which a penalty need not lower. Set it to "
            f"{self.tolerance.slack * floor:.3g} (the floor times `tolerance_slack`), leave it unset to calibrate it, "
            "or look for what makes the floor with `dc-trl calibrate`."
        )

    def _saturation(self) -> str:
        reached = f"the multiplier reached `multiplier_max` = {self.dual.maximum}: "
        if self._infeasible():
            return reached + self._below_the_floor()
        measured = "" if self.tolerance.floor is None else f", and the floor was {self.tolerance.floor:.3g}"
        return (
            f"{reached}the discrepancy stays above the tolerance of {self.tolerance.value:.3g}{measured}. It has "
            "grown since: look for a broken weight sync first, at `dc/sync/update_seen` then, and raise "
            "`discrepancy_tolerance` only where neither is the cause. Raise `multiplier_max` only where "
            "`dc/penalty_share` is small."
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What the configuration sets, under the names of its options."""
        return {
            "constraint": self.kind,
            "discrepancy_tolerance": self.tolerance.given,
            "tolerance_slack": self.tolerance.slack,
            "tolerance_calibration_batches": self.tolerance.batches,
            "multiplier_init": self.dual.init,
            "multiplier_max": self.dual.maximum,
            "dual_lr": self.dual.lr,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: λ and the calibration, and the settings under which they came about."""
        return {"dual": self.dual.state_dict(), "tolerance": self.tolerance.state_dict(), "settings": self.settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores λ and the calibration of `state_dict()`, whatever its settings were.

        Raises:
            ValueError: if a stored number is out of its range.
        """
        self.dual.load_state_dict(state["dual"])
        self.tolerance.load_state_dict(state["tolerance"])


def penalty_notices(share: float, alone: float) -> list[tuple[str, str]]:
    """What a person should be told once of an iteration's penalty, as (topic, message).

    Args:
        share: mean |penalty| over mean |A|, `dc/penalty_share`; NaN where there is no advantage.
        alone: fraction of the sequences that have a penalty and no advantage, `dc/penalty_only`; NaN where no token
            counts.
    """
    notices = []
    if share > NOTABLE_PENALTY_SHARE:
        notices.append(("penalty", f"the penalty is {share:.0%} of the advantage (`dc/penalty_share`)."))
    if alone > 0.5:
        message = (
            f"{alone:.0%} of a batch's sequences have a penalty and no advantage (`dc/penalty_only`): mostly because "
            "all rewards of their group are equal. The penalty alone moves the policy there, and pushes down whatever "
            "was sampled. Choose problems or a reward on which a group's completions differ, or leave such groups out "
            "with `zero_variance_groups='drop'`."
        )
        notices.append(("penalty_only", message))
    return notices
