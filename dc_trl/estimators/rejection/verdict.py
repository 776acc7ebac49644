# SPDX-License-Identifier: Apache-2.0
"""The rejection of a run: its rules with their bounds, and what they say of a micro-batch.

Shapes: B sequences, T completion tokens.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dc_trl.estimators.rejection import RULES, RejectionInputs, reject
from dc_trl.estimators.rejection.normaliser import divisor_counts, kept_weights


class Early(NamedTuple):
    """What was settled of a micro-batch before the first update on its rollouts.

    Attributes:
        by_rule: what each rule keeps of it, (B, T) bool.
        factor: the divisor of all micro-batches of the rollouts over what is left of it.
    """

    by_rule: Mapping[str, Tensor]
    factor: float


class Verdict(NamedTuple):
    """What the rules say of one micro-batch.

    Attributes:
        by_rule: what each rule keeps, (B, T) bool, in the order of `rejection`.
        kept: what all of them keep, (B, T) bool.
        weights: what multiplies the advantages, (B, T), or (B, 1) where a sequence has one ratio.
        divisor: (2,) int64: this micro-batch's part of the divisor that spans several, as settled early, and as it is
            left; None where all of it was settled early.
    """

    by_rule: dict[str, Tensor]
    kept: Tensor
    weights: Tensor
    divisor: Tensor | None


class Rejection(NamedTuple):
    """The rejection of a run.

    Attributes:
        bounds: by rule, of `resolve_bounds`.
        loss_type: TRL's.
        one_ratio: whether the objective has one ratio for a sequence: weights are then (B, 1).
        drops_groups: whether groups without signal are out of the divisor already.
    """

    bounds: Mapping[str, Mapping[str, float]]
    loss_type: str
    one_ratio: bool = False
    drops_groups: bool = False

    @property
    def early_rules(self) -> tuple[str, ...]:
        """Rules that do not read the policy of the update at hand, so that they can judge before the first one."""
        return tuple(name for name in self.bounds if "current_logps" not in RULES[name].needs)

    def judge(self, inputs: RejectionInputs, mask: Tensor, measured: Tensor, early: Early | None = None) -> Verdict:
        """Judges a micro-batch.

        Args:
            inputs: the micro-batch.
            mask: (B, T), the tokens of the loss.
            measured: (B, T), that mask before groups were dropped.
            early: what was settled before; None for nothing.
        """
        before = {} if early is None else dict(early.by_rule)
        pending = [name for name in self.bounds if name not in before]
        fresh = before | reject(pending, self.bounds, inputs)[1]
        by_rule = {name: fresh[name] for name in self.bounds}
        kept = _kept_by_all(by_rule, inputs.valid)
        weights = kept_weights(kept, mask, self.loss_type)
        if early is not None:
            weights = weights * early.factor
        divisor = None
        if pending:
            counts = [
                self._divisor_counts(verdict, mask, measured) for verdict in (_kept_by_all(before, inputs.valid), kept)
            ]
            divisor = torch.stack([left for _, left in counts])
        return Verdict(by_rule, kept, _of_sequences(weights, mask) if self.one_ratio else weights, divisor)

    def judge_early(self, inputs: RejectionInputs, mask: Tensor, measured: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """What each early rule keeps of a micro-batch, and its part of the divisor by them alone, (2,)."""
        kept, by_rule = reject(self.early_rules, self.bounds, inputs)
        return by_rule, self._divisor_counts(kept, mask, measured)

    def _divisor_counts(self, kept: Tensor, mask: Tensor, measured: Tensor) -> Tensor:
        return divisor_counts(kept, mask, self.loss_type, measured if self.drops_groups else None)


def _kept_by_all(verdicts: Mapping[str, Tensor], valid: Tensor) -> Tensor:
    kept = torch.ones_like(valid)
    for verdict in verdicts.values():
        kept = kept & verdict
    return kept


def _of_sequences(weights: Tensor, mask: Tensor) -> Tensor:
    """The weight that a sequence's tokens share, (B, 1); 1 for a sequence without tokens, as for none rejected."""
    counted = mask.bool()
    shared = torch.where(counted, weights, 0.0).amax(-1, keepdim=True)
    return torch.where(counted.any(-1, keepdim=True), shared, 1.0)
