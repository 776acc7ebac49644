# SPDX-License-Identifier: Apache-2.0
"""The record of a step: what the two engines said of one micro-batch, and what the constraint made of it.

Shapes: B sequences, T completion tokens.
"""

from typing import NamedTuple

from torch import Tensor

from dc_trl.constraint import DiscrepancyConstraint, penalised_advantages
from dc_trl.discrepancy import summarise, token_discrepancy, valid_tokens
from dc_trl.estimators.importance import ImportanceSampling


class Masks(NamedTuple):
    """Which completion tokens count for what, (B, T) bool each.

    Attributes:
        measured: neither padding nor a tool's; groups that were dropped from the loss are in it.
        scored: measured, and with a log-prob of both engines; see `dc_trl.discrepancy.is_scored`.
        valid: in the loss, and with a log-prob of both engines: these get a penalty.
    """

    measured: Tensor
    scored: Tensor
    valid: Tensor


class Step(NamedTuple):
    """One micro-batch under the constraint.

    Attributes:
        train_logps, sampling_logps: log π and log μ, (B, T), in nats.
        masks: which tokens count.
        discrepancy: d by the run's metric, (B, T) float32, ≥ 0; 0 where the sampling engine gave no log-prob.
        penalty: what each token's advantage lost, (B, T); 0 with `constraint="none"`.
        advantages: before the penalty, (B, 1) or (B, T).
        penalised_advantages: after it, (B, T).
        importance_ratio: the weight as applied, (B, T) or (B, 1); None where there is no correction.
        kept: tokens or sequences that the weight keeps, bool, same shape; None where there is no correction.
    """

    train_logps: Tensor
    sampling_logps: Tensor
    masks: Masks
    discrepancy: Tensor
    penalty: Tensor
    advantages: Tensor
    penalised_advantages: Tensor
    importance_ratio: Tensor | None
    kept: Tensor | None

    def summary(self) -> Tensor:
        """Its part of the batch metrics, (K,); see `dc_trl.discrepancy.summarise`."""
        return summarise(
            self.train_logps,
            self.sampling_logps,
            self.masks.measured,
            discrepancy=self.discrepancy,
            correction=self.importance_ratio,
            kept=self.kept,
            penalty=self.penalty,
            advantages=self.advantages,
        )


def constrain(
    train_logps: Tensor,
    sampling_logps: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor,
    measured_mask: Tensor,
    metric: str,
    constraint: DiscrepancyConstraint,
    correction: ImportanceSampling | None = None,
    loss_weight: Tensor | float = 1.0,
) -> Step:
    """Measures a micro-batch, and takes the penalty off its advantages: DC-GRPO (arXiv 2606.08779), eq. 2 and 8–10.

    Args:
        train_logps, sampling_logps: log π and log μ, (B, T), in nats; detached.
        advantages: A, (B,) per sequence or (B, T).
        mask: (B, T); the tokens of the loss.
        measured_mask: (B, T); those that are measured: of `mask`, and of groups that were dropped.
        metric: the discrepancy metric.
        constraint: kind, λ and tolerance of this iteration.
        correction: the importance-sampling weight; None for none.
        loss_weight: what `advantages` were scaled by, for the penalty to be on their scale.
    """
    masks = Masks(
        measured=measured_mask.bool(),
        scored=valid_tokens(sampling_logps, measured_mask, train_logps),
        valid=valid_tokens(sampling_logps, mask, train_logps),
    )
    ratio, kept = (None, None) if correction is None else correction.ratio(train_logps, sampling_logps, masks.scored)
    discrepancy = token_discrepancy(train_logps, sampling_logps, metric)
    penalty = loss_weight * constraint.penalty(discrepancy, masks.valid)
    before = advantages.reshape(len(mask), -1)
    return Step(
        train_logps=train_logps,
        sampling_logps=sampling_logps,
        masks=masks,
        discrepancy=discrepancy,
        penalty=penalty,
        advantages=before,
        penalised_advantages=penalised_advantages(before, penalty),
        importance_ratio=ratio,
        kept=kept,
    )
