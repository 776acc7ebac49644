# SPDX-License-Identifier: Apache-2.0
"""What the trainer measures between two log entries, collected until it is reduced over micro-batches and ranks."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dc_trl.discrepancy import combine
from dc_trl.step import Step

# Weight of the past in the smoothed gradient norm: a memory of some ten log entries. Our value.
GRAD_NORM_SMOOTHING = 0.9


class Instruments:
    """The summaries of the micro-batches of an iteration, what was rejected, and the smoothed gradient norm."""

    def __init__(self) -> None:
        self._summaries: dict[str, list[Tensor]] = {"train": [], "eval": []}
        self._grad_norm: float | None = None

    def add(self, mode: str, step: Step) -> None:
        """Takes in the record of one micro-batch; `mode` is train or eval."""
        summary, rejected = step.summary(), step.rejected()
        self._size = len(summary)
        # Sums, as most of a summary; behind its maxima, so that one reduction serves both.
        self._summaries[mode].append(summary if rejected is None else torch.cat([summary, rejected.to(summary.dtype)]))

    def reduce(self, mode: str, gather: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor] | None:
        """Empties the collection into one summary over micro-batches and ranks, (K,), on the CPU.

        Args:
            mode: train or eval.
            gather: concatenates (1, K) of every rank to (ranks, K); called once, and on every rank or on none.

        Returns:
            The summary, and the counts of what was rejected of each rank, of `Step.rejected`: (ranks, R), or
            (ranks, 0) without rules. None if there was nothing to measure.
        """
        summaries, self._summaries[mode] = self._summaries[mode], []
        if not summaries:
            return None
        ranks = gather(combine(torch.stack(summaries)).unsqueeze(0))
        return combine(ranks)[: self._size].cpu(), ranks[:, self._size :].cpu()

    def smooth_grad_norm(self, norm: float) -> float | None:
        """Exponential mean of the gradient norm (arXiv 2602.01826, figure 3); skips a norm that is not finite."""
        if math.isfinite(norm):
            past = norm if self._grad_norm is None else self._grad_norm
            self._grad_norm = GRAD_NORM_SMOOTHING * past + (1 - GRAD_NORM_SMOOTHING) * norm
        return self._grad_norm

    def state_dict(self) -> dict[str, float | None]:
        """The smoothed norm. An iteration cut off by a checkpoint is sampled anew, so its summaries are dropped."""
        return {"grad_norm": self._grad_norm}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restores `state_dict()`."""
        norm = state["grad_norm"]
        self._grad_norm = None if norm is None else float(norm)

    def discard(self) -> None:
        """Forgets the iterations that have not ended, of a training or evaluation that was cut off."""
        self._summaries = {"train": [], "eval": []}
