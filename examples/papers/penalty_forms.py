# SPDX-License-Identifier: Apache-2.0
"""Other forms of DC-GRPO's penalty (arXiv 2606.08779, eq. 8–10), which are tested here and are in no package.

With its defaults a form changes nothing: the cost of a token is its discrepancy, as in the paper.

Shapes: B sequences, T completion tokens.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dc_trl import DCGRPOTrainer
from dc_trl.constraint import DiscrepancyConstraint, discrepancy_penalty
from dc_trl.discrepancy import LOG_RATIO_BOUND, METRICS, DiscrepancyMetric, token_discrepancy, valid_tokens


class PenaltyForm(NamedTuple):
    """The form of a penalty.

    Attributes:
        relative: whether costs are d/ε and the violation is d̄/ε − 1, so that λ means the same for every metric and
            stack.
        to_go: whether a token pays for what it leads to, (1/T_i) Σ_{s ≥ t} c_s, the signal of the policy gradient of a
            constrained decision process whose cost is the trajectory's mean; else for itself.
        group: whether a token pays what it costs above what its group's do, as GRPO's rewards count: at its position,
            in the mean over all completions of the problem.
        share_cap: most that the penalty may be of the advantage, in means over a micro-batch; None for no bound.
    """

    relative: bool = False
    to_go: bool = False
    group: bool = False
    share_cap: float | None = None


class FormConstraint(DiscrepancyConstraint):
    """A constraint whose penalty has another form.

    Args:
        own: the constraint whose kind, multiplier, tolerance and level it takes over.
        form: of its penalty.

    Attributes:
        baseline: of the micro-batch at hand, what its tokens' costs are above, (B, T), in units of the metric.
    """

    baseline: Tensor | None = None

    def __init__(self, own: DiscrepancyConstraint, form: PenaltyForm) -> None:
        super().__init__(own.kind, own.dual, own.tolerance, own.level)
        self.form = form

    def cost(self, discrepancy: Tensor, valid: Tensor) -> Tensor:
        """What each token costs, (B, T), in units of the metric: its discrepancy, or what is to go from it."""
        cost = discrepancy.detach()
        return to_go(cost, valid) if self.form.to_go else cost

    def penalty(self, discrepancy: Tensor, valid: Tensor, advantages: Tensor | None = None) -> Tensor:
        """What each token's advantage loses, (B, T); see the parent."""
        tolerance, cost = self.tolerance.value, self.cost(discrepancy, valid)
        if self.baseline is not None:
            cost = cost - self.baseline
        if self.form.relative and tolerance is not None:
            cost, tolerance = cost / tolerance, 1.0
        penalty = discrepancy_penalty(
            cost,
            valid,
            constraint=self.kind,
            multiplier=self.multiplier,
            tolerance=tolerance,
            level=self.level,
        )
        if self.form.share_cap is None or advantages is None:
            return penalty
        return capped(penalty, advantages, valid, self.form.share_cap)

    def violation(self, mean_discrepancy: float) -> float:
        """Mean discrepancy − tolerance, of a relative form over the tolerance."""
        violation = super().violation(mean_discrepancy)
        if not self.form.relative or math.isnan(violation):
            return violation
        return violation / self.tolerance.value if self.tolerance.value else math.nan


def to_go(cost: Tensor, valid: Tensor) -> Tensor:
    """(1/T_i) Σ_{s ≥ t} c_s over a sequence's `valid` tokens, (B, T), of costs (B, T)."""
    counted = torch.where(valid, cost, torch.zeros_like(cost))
    return counted.flip(-1).cumsum(-1).flip(-1) / valid.sum(-1, keepdim=True).clamp(min=1)


def group_mean(cost: Tensor, valid: Tensor, group: int) -> Tensor:
    """For each token the mean cost at its position over its group, (B, T).

    Args:
        cost: (B, T), completions of a problem one after the other.
        valid: (B, T) bool; what is not valid costs nothing, and counts.
        group: completions of a problem, of which B is a multiple.
    """
    counted = torch.where(valid, cost, torch.zeros_like(cost))
    return counted.unflatten(0, (-1, group)).mean(1).repeat_interleave(group, 0)


def capped(penalty: Tensor, advantages: Tensor, valid: Tensor, share: float) -> Tensor:
    """The penalty (B, T), all of it made smaller by one factor where its mean exceeds the share of mean |A|.

    Where every advantage is 0, so is the penalty.

    Args:
        penalty: (B, T).
        advantages: A, (B, 1) or (B, T).
        valid: (B, T) bool, the tokens that both means are over.
        share: above 0.
    """
    size = torch.where(valid, penalty.abs(), 0.0).sum()
    most = share * torch.where(valid, advantages.abs().expand_as(penalty), 0.0).sum()
    return penalty * torch.where(size > most, most / size.clamp(min=torch.finfo(size.dtype).tiny), 1.0)


class FormTrainer(DCGRPOTrainer):
    """The library's trainer with another form of its penalty.

    TRL deals the completions of a group out over the updates on a rollout, so that their mean cost is taken before,
    while they are together. With one update a rollout there are no log-probs to take it from, which is an error.
    """

    _constraint: FormConstraint

    def __init__(self, *args: Any, form: PenaltyForm, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._constraint = FormConstraint(self._constraint, form)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if self._constraint.form.group and self.model.training:
            if "old_per_token_logps" not in batch:
                raise ValueError(
                    "what a group costs is taken from the log-probs before the first of several updates, and TRL "
                    "keeps none for a single one: raise `steps_per_generation`."
                )
            pi, mu = batch["old_per_token_logps"], batch["sampling_per_token_logps"]
            valid = valid_tokens(mu, batch["completion_mask"], pi)
            cost = self._constraint.cost(token_discrepancy(pi, mu, self.args.discrepancy_metric), valid)
            batch["cost_baseline"] = group_mean(cost, valid, self.num_generations)
        return batch

    def _constrain(self, inputs: dict[str, Any], logps: Tensor) -> None:
        self._constraint.baseline = inputs.get("cost_baseline")
        super()._constrain(inputs, logps)


def logit_diff(train_logps: Tensor, sampling_logps: Tensor) -> Tensor:
    """|logit π − logit μ| with logit p = log p − log(1 − p), of log-probs of the same shape; at most 20.

    A step against |π − μ| raises the entropy of nearly every policy, and one against the ratio or the log-probs lowers
    it; one against this does little to it.
    """
    difference = _logit(train_logps) - _logit(sampling_logps)
    return difference.abs().clamp(max=LOG_RATIO_BOUND)


def _logit(logps: Tensor) -> Tensor:
    # log p − log(1 − p). At p = 1 the second is −inf, so p stays a float32's half step below 1.
    below_one = logps.clamp(max=-(2.0**-25))
    return below_one - torch.log(-torch.expm1(below_one))


def add_logit_diff() -> None:
    """Makes `discrepancy_metric="logit_diff"` known, for configurations that are made from here on."""
    METRICS["logit_diff"] = DiscrepancyMetric(logit_diff, "|logit π − logit μ|", 1e-4)
