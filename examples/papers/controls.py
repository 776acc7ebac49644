# SPDX-License-Identifier: Apache-2.0
"""Controls that are no options of the library."""

from typing import Any

import torch
from torch import Tensor

from papers.penalty_forms import FormTrainer, PenaltyForm


class ShuffledPenaltyTrainer(FormTrainer):
    """The placebo: each micro-batch's penalties, of the same sizes, dealt out at random over its tokens."""

    def __init__(self, *args: Any, form: PenaltyForm | None = None, **kwargs: Any) -> None:
        super().__init__(*args, form=form or PenaltyForm(), **kwargs)
        self._deal = torch.Generator().manual_seed(self.args.seed)
        self._own_penalty = self._constraint.penalty
        self._constraint.penalty = self._shuffled  # type: ignore[method-assign]

    def _shuffled(self, discrepancy: Tensor, valid: Tensor, advantages: Tensor | None = None) -> Tensor:
        return shuffle(self._own_penalty(discrepancy, valid, advantages), valid, self._deal)


def shuffle(penalty: Tensor, valid: Tensor, generator: torch.Generator) -> Tensor:
    """The penalties of the valid tokens in another order, (B, T); the others keep theirs."""
    values = penalty[valid]
    dealt = penalty.clone()
    dealt[valid] = values[torch.randperm(len(values), generator=generator)]
    return dealt
