# SPDX-License-Identifier: Apache-2.0
"""The record of a step: what the two engines said of one micro-batch, and what the constraint made of it.

Shapes: B sequences, T completion tokens.
"""

from typing import NamedTuple

from torch import Tensor

from dc_trl.constraint import DiscrepancyConstraint, penalised_advantages
from dc_trl.discrepancy import summarise, token_discrepancy, valid_tokens
from dc_trl.estimators.importance import ImportanceSampling
from dc_trl.estimators.rejection import RejectionInputs
from dc_trl.estimators.rejection.measure import ANY, rejection_counts
from dc_trl.estimators.rejection.verdict import Early, Rejection, Verdict


class Masks(NamedTuple):
    """Which completion tokens count for what, (B, T) bool each.

    Attributes:
        measured: neither padding nor a tool's; groups that were dropped from the loss are in it.
        scored: measured, and with a log-prob of both engines; see `dc_trl.discrepancy.is_scored`.
        valid: in the loss, and with a log-prob of both engines: these are judged, and get a penalty if they are kept.
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
        penalised_advantages: after it, (B, T), and after rejection: what the loss is to multiply.
        importance_ratio: the weight as applied, (B, T) or (B, 1); None where there is no correction.
        kept: tokens or sequences that the weight keeps, bool, same shape; None where there is no correction.
        verdict: what the rejection rules say; None where there are none.
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
    verdict: Verdict | None = None

    @property
    def rejected_advantages(self) -> Tensor:
        """Before the penalty and after rejection, (B, 1) or (B, T): the loss's without a constraint."""
        return self.advantages if self.verdict is None else self.advantages * self.verdict.weights

    @property
    def rejected_tokens(self) -> Tensor | None:
        """Which valid tokens the rules left out of the loss, (B, T) bool; None without rules."""
        return None if self.verdict is None else self.masks.valid & ~self.verdict.kept

    def rejected(self) -> Tensor | None:
        """Its part of what is logged of rejection, counts that add up, by each rule and by all; None without rules."""
        if self.verdict is None:
            return None
        return rejection_counts({**self.verdict.by_rule, ANY: self.verdict.kept}, self.masks.valid)

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
    rejection: Rejection | None = None,
    early: Early | None = None,
    current_logps: Tensor | None = None,
) -> Step:
    """Measures a micro-batch, and takes the penalty off its advantages: DC-GRPO (arXiv 2606.08779), eq. 2 and 8–10.

    What a rule rejects is measured as everything else, and has no penalty and an advantage of 0.

    Args:
        train_logps, sampling_logps: log π and log μ, (B, T), in nats; detached.
        advantages: A, (B,) per sequence or (B, T).
        mask: (B, T); the tokens of the loss.
        measured_mask: (B, T); those that are measured: of `mask`, and of groups that were dropped.
        metric: the discrepancy metric.
        constraint: kind, λ and tolerance of this iteration.
        correction: the importance-sampling weight; None for none.
        loss_weight: what `advantages` were scaled by, for the penalty to be on their scale.
        rejection: the rules; None for none.
        early: what they said before the first update on these rollouts; None for nothing.
        current_logps: log π of the policy in this update, (B, T), for what reads it; None: `train_logps`.
    """
    masks = Masks(
        measured=measured_mask.bool(),
        scored=valid_tokens(sampling_logps, measured_mask, train_logps),
        valid=valid_tokens(sampling_logps, mask, train_logps),
    )
    current = train_logps if current_logps is None else current_logps
    verdict = None
    if rejection is not None:
        judged = RejectionInputs(current, train_logps, sampling_logps, masks.valid, advantages)
        verdict = rejection.judge(judged, mask, measured_mask, early)
    discrepancy = token_discrepancy(train_logps, sampling_logps, metric)
    before = advantages.reshape(len(mask), -1)
    penalised = masks.valid if verdict is None else masks.valid & verdict.kept
    penalty = loss_weight * constraint.penalty(discrepancy, penalised, before / loss_weight)
    after = penalised_advantages(before, penalty)
    if verdict is not None:
        after = after * verdict.weights
    ratio, kept = None, None
    if correction is not None:
        ratio, kept = correction.ratio(train_logps, sampling_logps, masks.scored, current, after)
    return Step(
        train_logps=train_logps,
        sampling_logps=sampling_logps,
        masks=masks,
        discrepancy=discrepancy,
        penalty=penalty,
        advantages=before,
        penalised_advantages=after,
        importance_ratio=ratio,
        kept=kept,
        verdict=verdict,
    )
