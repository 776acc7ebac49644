# SPDX-License-Identifier: Apache-2.0
"""The dual variable of the discrepancy constraint."""

import math


class DualVariable:
    """Lagrange multiplier of an inequality constraint, moved by projected dual ascent.

    DC-GRPO (arXiv 2606.08779), eq. 11:

        λ_{k+1} = clip(λ_k + lr · violation_k, 0, maximum),    violation = mean discrepancy − tolerance

    The step is plain gradient ascent: the violation is the exact gradient of the Lagrangian in λ, so an adaptive
    optimizer would only rescale the constraint.

    Args:
        init: λ_0, in [0, maximum].
        lr: dual learning rate, in units of λ per unit of violation; ≥ 0 (0 keeps λ fixed).
        maximum: upper end of the projection; ≥ 0.

    Raises:
        ValueError: if an argument is negative or not finite, or `init` exceeds `maximum`.
    """

    def __init__(self, init: float, lr: float, maximum: float) -> None:
        for name, value in (("init", init), ("lr", lr), ("maximum", maximum)):
            if not math.isfinite(value) or value < 0:
                raise ValueError(
                    f"`{name}` is {value}: it must be finite and not negative. Pass a value of 0 or more."
                )
        if init > maximum:
            raise ValueError(f"`init` ({init}) exceeds `maximum` ({maximum}): lower `init` or raise `maximum`.")
        self.init = float(init)
        self.value = self.init
        self.lr = float(lr)
        self.maximum = float(maximum)

    @property
    def saturated(self) -> bool:
        """Whether λ sits at its maximum, so that a further violation no longer raises the penalty."""
        return self.value >= self.maximum

    def step(self, violation: float) -> float:
        """Moves λ by one projected ascent step and returns it.

        Args:
            violation: signed; positive where the constraint is violated. NaN and infinities leave λ unchanged, since
                one unscorable batch must not destroy the state.
        """
        if math.isfinite(violation):
            self.value = min(max(self.value + self.lr * violation, 0.0), self.maximum)
        return self.value

    def restart(self) -> None:
        """Sets λ back to λ_0."""
        self.value = self.init

    def state_dict(self) -> dict[str, float]:
        """The state that a resumed run needs: λ alone. `lr` and `maximum` come from the config of the run."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores `state_dict()`; a λ above the current `maximum` is projected onto it.

        Raises:
            ValueError: if the stored value is negative or not finite.
        """
        value = float(state["value"])
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"Stored multiplier is {value}: the checkpoint is damaged. Resume from an earlier one.")
        self.value = min(value, self.maximum)
