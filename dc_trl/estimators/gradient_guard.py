# SPDX-License-Identifier: Apache-2.0
"""Which optimizer steps a guard leaves out: gradients that are not finite, and spikes. Rule and values are ours."""

import math
from collections import deque
from statistics import median
from typing import Any, NamedTuple

# The gradient norms that tell what is usual, and as few as tell it. Our values.
WINDOW, LEAST = 32, 8


class SkippedStep(NamedTuple):
    """Why a step is left out.

    Attributes:
        norm: of its gradient, before it is clipped.
        median: of the norms before it; None where too few are known.
        in_a_row: steps left out one after another, this one included.
    """

    norm: float
    median: float | None
    in_a_row: int

    @property
    def reason(self) -> str:
        """The norm, and what is wrong with it."""
        if not math.isfinite(self.norm):
            return f"the gradient norm is {self.norm}"
        usual = math.nan if self.median is None else self.median
        return f"the gradient norm is {self.norm:.4g}, {self.norm / usual:.4g} times the median of {usual:.4g}"


class GradientGuard:
    """Judges the gradient norm of each optimizer step: left out if not finite, or above `factor` times the median.

    The median is over the last 32 steps that were not left out, and there is none before the eighth. What is left out
    does not enter it, so that spikes in a row do not become the rule. A median of 0 judges nothing: most groups then
    had no advantage, and any gradient is infinitely larger.

    Args:
        factor: multiple of the median, above 1; infinity for gradients that are not finite alone.
        patience: so many steps in a row that are left out are not a spike but a state.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(self, factor: float, patience: int = 5) -> None:
        check_guard(factor, "factor")
        check_patience(patience, "patience")
        self.factor, self.patience = float(factor), patience
        self.skipped = 0
        self.in_a_row = 0
        self._norms: deque[float] = deque(maxlen=WINDOW)

    @property
    def median(self) -> float | None:
        """The usual gradient norm; None before enough are known."""
        return median(self._norms) if len(self._norms) >= LEAST else None

    @property
    def is_exhausted(self) -> bool:
        """Whether as many steps in a row were left out as there is patience for."""
        return self.in_a_row >= self.patience

    def judge(self, norm: float) -> SkippedStep | None:
        """Takes in the gradient norm, before clipping, of a step; returns why it is to be left out, or None."""
        usual = self.median
        is_spike = bool(usual) and norm > self.factor * (usual or 0.0)
        if math.isfinite(norm) and not is_spike:
            self.in_a_row = 0
            self._norms.append(norm)
            return None
        self.in_a_row += 1
        self.skipped += 1
        return SkippedStep(norm, usual, self.in_a_row)

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs, as JSON-ready values; the settings come from the constructor."""
        return {"norms": list(self._norms), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`.

        Raises:
            ValueError: if a stored number is negative or not finite.
        """
        norms = [float(norm) for norm in state["norms"]]
        skipped, in_a_row = int(state["skipped"]), int(state["in_a_row"])
        if not all(math.isfinite(number) and number >= 0 for number in (*norms, skipped, in_a_row)):
            raise ValueError(f"Stored guard is {state}: the checkpoint is damaged. Resume from an earlier one.")
        self._norms = deque(norms, maxlen=WINDOW)
        self.skipped, self.in_a_row = skipped, in_a_row


def check_guard(factor: float, name: str) -> None:
    """Raises ValueError unless `factor` exceeds 1."""
    if isinstance(factor, bool) or not factor > 1:
        raise ValueError(
            f"`{name}` is {factor!r}: it is a multiple of the usual gradient norm beyond which a step is left out, so "
            "it exceeds 1. Use e.g. 10, or infinity for gradients that are not finite alone."
        )


def check_patience(patience: int, name: str) -> None:
    """Raises ValueError unless `patience` is an integer of 1 or more."""
    if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
        raise ValueError(f"`{name}` is {patience!r}: it counts steps in a row. Use an integer of 1 or more.")
