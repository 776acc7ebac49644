# SPDX-License-Identifier: Apache-2.0
"""Rejection on TRL's GRPO trainer: what is left of the loss's divisor, over micro-batches and ranks.

Shapes: B sequences, T completion tokens.
"""

from typing import Any, cast

import torch
from accelerate import DistributedType
from torch import Tensor, nn

from dc_trl.discrepancy import valid_tokens
from dc_trl.estimators.rejection import RejectionInputs, resolve_bounds
from dc_trl.estimators.rejection.combinations import is_settled_late
from dc_trl.estimators.rejection.measure import ANY, emptied_notices, rejection_metrics
from dc_trl.estimators.rejection.normaliser import shared_factor
from dc_trl.estimators.rejection.verdict import Early, Rejection, Verdict
from dc_trl.training.rollouts_trainer import RolloutsTrainer


class RejectionTrainer(RolloutsTrainer):
    """GRPO with `rejection` of [`DCGRPOConfig`].

    A verdict takes what it rejects out of the advantages, and its weights put right what a micro-batch divides by by
    itself (`dc_trl.step.constrain`). Here the divisor of all micro-batches and ranks is put right:

    - early, where TRL scores rollouts before the first update on them, by the rules that do not read the policy of the
      update at hand: over the generation batch, on the advantages. Batch key: `rejected_early`.
    - late, everything else: over the optimizer step, on the sum of the gradients, after its last backward.
    - in evaluation, over each batch, on its loss.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._rejection: Rejection | None = None
        self._forget_verdicts()
        super().__init__(*args, **kwargs)
        if not self.args.rejection:
            return
        self._rejection = Rejection(
            bounds=resolve_bounds(self.args.rejection, cast(dict[str, Any], self.args.rejection_bounds or {})),
            loss_type=self.loss_type,
            one_ratio=self.args.importance_sampling_level == "sequence",
            drops_groups=self.args.zero_variance_groups == "drop",
        )
        if is_settled_late(self.args):
            self._refuse_what_cannot_be_settled_late()

    def _refuse_what_cannot_be_settled_late(self) -> None:
        chosen = f"`rejection` is {self.args.rejection}"
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                f"{chosen} with DeepSpeed, which steps within the backward, before it is known how much of the batch "
                "is left to divide by. Use FSDP2, or `steps_per_generation` above `gradient_accumulation_steps` "
                "without `dppo_tv` and `dppo_kl`, or no `rejection`."
            )
        if self.aux_loss_enabled:
            raise ValueError(
                f"{chosen} and `router_aux_loss_coef`, the model's or yours, is {self.router_aux_loss_coef}: the loss "
                "of the router is no mean over what is kept, and would be scaled as one. Use "
                "`router_aux_loss_coef=0.0`, or no `rejection`."
            )

    def _forget_rollouts(self) -> None:
        super()._forget_rollouts()
        self._forget_verdicts()

    def _forget_verdicts(self) -> None:
        """Drops what an optimizer step has gathered so far: parts of the divisor, and losses."""
        self._divisors: list[Tensor] = []
        self._losses: list[Tensor] = []

    # Early

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        buffered = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._rejection is not None and self._buffered_inputs is not buffered:
            self._settle_early(self._rejection, self._buffered_inputs)
        return inputs

    @torch.no_grad()
    def _settle_early(self, rejection: Rejection, micro_batches: list[dict[str, Any]]) -> None:
        if "old_per_token_logps" not in micro_batches[0] or not rejection.early_rules:
            return
        verdicts = [rejection.judge_early(*_as_scored(batch)) for batch in micro_batches]
        counts = torch.stack([counts for _, counts in verdicts]).sum(0)
        factor = self._shared_factor(counts)
        for batch, (by_rule, _) in zip(micro_batches, verdicts, strict=True):
            batch["rejected_early"] = Early(by_rule, factor)

    # Late

    def _take_verdict(self, verdict: Verdict | None) -> None:
        """Notes what a micro-batch leaves of the divisor that is settled when all of them were judged."""
        if verdict is not None and verdict.divisor is not None:
            self._divisors.append(verdict.divisor)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.model.training:
            return super()._compute_loss(model, inputs)
        self._forget_verdicts()
        loss = super()._compute_loss(model, inputs)
        divisors, self._divisors = self._divisors, []
        return loss * self._shared_factor(torch.stack(divisors).sum(0)) if divisors else loss

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Trains on one micro-batch as TRL does; the last one of an optimizer step settles the divisor of all."""
        loss = super().training_step(model, *args, **kwargs)
        if not self._divisors:
            return loss
        self._losses.append(loss)
        return self._settle_late(model, loss) if self.accelerator.sync_gradients else loss

    @torch.no_grad()
    def _settle_late(self, model: nn.Module, loss: Tensor) -> Tensor:
        """Scales the gradients of the step, before they are clipped, and its loss, whose parts are logged as a sum."""
        factor = self._shared_factor(torch.stack(self._divisors).sum(0))
        losses = torch.stack(self._losses).sum()
        self._forget_verdicts()
        if factor == 1.0:
            return loss
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        return loss + (factor - 1.0) * losses

    # What is logged

    def _rejection_metrics(self, counts: Tensor) -> dict[str, Tensor]:
        """`rejection/*` of the counts of an iteration."""
        return {} if self._rejection is None else rejection_metrics(counts, (*self._rejection.bounds, ANY))

    def _of_rejection(self, counts: Tensor) -> list[tuple[str, str]]:
        """What a person should be told of an iteration, as (topic, message). `counts`: of each rank."""
        return [] if self._rejection is None else emptied_notices(counts, tuple(self._rejection.bounds))

    def _shared_factor(self, divisor: Tensor) -> float:
        """The divisor over what is left of it, of all ranks together; a collective."""
        return shared_factor(self.accelerator.gather(divisor.unsqueeze(0)).sum(0))


def _as_scored(batch: dict[str, Any]) -> tuple[RejectionInputs, Tensor, Tensor]:
    """A micro-batch before its first update as the rules see it, and the masks of its loss and of what is measured."""
    mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    train_logps = batch["old_per_token_logps"]
    sampling_logps = batch.get("measured_logps", batch["sampling_per_token_logps"])
    valid = valid_tokens(sampling_logps, mask, train_logps)
    inputs = RejectionInputs(train_logps, train_logps, sampling_logps, valid, batch["advantages"])
    return inputs, mask, batch.get("measured_mask", mask)
