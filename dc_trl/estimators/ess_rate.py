# SPDX-License-Identifier: Apache-2.0
"""ESS-scaled learning rate: smaller steps where few samples carry the batch; VCPO (arXiv 2602.17616)."""

import math
from typing import Any


def ess_rate_scale(ess: float, reference: float = 1.0, min_scale: float = 0.1) -> float:
    """Factor on the learning rate of one update: max(√min(1, ess / reference), min_scale).

    VCPO: η_eff ∝ √(ESS/B), ESS = (Σ w)² / Σ w² over the batch's importance weights w = π/μ, since the noise of a mean
    over B weighted samples is that of ESS equal ones, and the square root is how Adam's rate goes with the batch size.
    The cap at 1 and the reference are the authors' code's (mit-han-lab/vcpo, `base_ess_ratio`).

    Args:
        ess: ESS/B of the batch of this update, in (0, 1]. The paper's weights are products over sequences; `dc/ess`
            is over tokens, which is closer to 1.
        reference: ESS/B at which the rate is whole; the authors' 1.
        min_scale: floor, so that no batch stops training. Our value; the paper has none.

    Raises:
        ValueError: if `ess` is negative or not finite, or `reference` or `min_scale` is outside (0, 1].
    """
    if not (math.isfinite(ess) and ess >= 0):
        raise ValueError(f"`ess` is {ess}: it is a fraction of the batch. Pass a number from 0 to 1.")
    check_fraction(reference, "reference")
    check_fraction(min_scale, "min_scale")
    return max(math.sqrt(min(1.0, ess / reference)), min_scale)


def check_fraction(value: float, name: str) -> None:
    """Raises ValueError unless 0 < `value` ≤ 1."""
    if not 0 < value <= 1:
        raise ValueError(f"`{name}` is {value}: it is a fraction in (0, 1]. Pass e.g. 1 for the whole.")


class EssRate:
    """The scale that the next update uses, from the effective sample sizes observed.

    Args:
        reference: ESS/B at which the rate is whole.
        min_scale: floor of the scale.

    Attributes:
        scale: factor on the learning rate; 1 until an ESS is observed.
        ess: the latest ESS/B, or None.
        last_step: the newest step observed, or None.

    Raises:
        ValueError: if an argument is outside (0, 1].
    """

    def __init__(self, reference: float = 1.0, min_scale: float = 0.1) -> None:
        check_fraction(reference, "reference")
        check_fraction(min_scale, "min_scale")
        self.reference, self.min_scale = reference, min_scale
        self.scale = 1.0
        self.ess: float | None = None
        self.last_step: int | None = None

    def update(self, step: int, ess: float) -> float:
        """Takes the ESS/B of the batch of one step; returns the scale.

        An ESS that is not finite or negative is ignored (no token was measured), and so is a step that is not newer
        than the last one (the batch was counted).
        """
        is_newer = self.last_step is None or step > self.last_step
        if is_newer and math.isfinite(ess) and ess >= 0:
            self.scale = ess_rate_scale(ess, self.reference, self.min_scale)
            self.ess, self.last_step = float(ess), int(step)
        return self.scale

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs, as JSON-ready values; the settings come from the constructor."""
        return {"scale": self.scale, "ess": self.ess, "last_step": self.last_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`."""
        self.scale, self.ess, self.last_step = state["scale"], state["ess"], state["last_step"]
