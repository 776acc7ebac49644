# SPDX-License-Identifier: Apache-2.0
"""Advantages of other estimators, and groups without signal, on TRL's GRPO trainer."""

from typing import Any

import torch
from torch import Tensor, nn

from dc_trl.config import DCGRPOConfig
from dc_trl.estimators.advantage import rloo_advantages, zero_variance_groups
from dc_trl.estimators.rejection.normaliser import SEQUENCE_MEAN_LOSSES
from dc_trl.training.attributes import temporary_attributes
from dc_trl.training.checked_rewards import check_size, checked
from dc_trl.training.pushing_trainer import PushingTrainer

# Advantages of `multi_objective_aggregation="normalize_then_sum"` have a standard deviation of 1 over the batch. Where
# the normalised rewards of a group cancel, as a reward and its opposite do, rounding leaves 1e-7 or so. Our value.
CANCELLED_ADVANTAGE = 1e-5


class GroupEstimatorsTrainer(PushingTrainer):
    """GRPO with `advantage_estimator` and `zero_variance_groups` of [`DCGRPOConfig`].

    Rewards that cannot be trained on end the run, by the name of their function. Both options act on the scored
    generation batch, so they need no part of the loss:

    - `rloo` replaces `advantages` by leave-one-out ones.
    - `drop` sets the `tool_mask` of groups without signal to 0 (rewards that are all equal or, where TRL
      normalises each reward function before it sums, advantages that are), which takes them out of gradient and
      penalty, and takes them out of the loss's normaliser: `num_items_in_batch` for losses that divide by tokens, and
      for those that divide by sequences or micro-batches the advantages are scaled, in which these losses are linear.

    Batch keys that it adds: `measured_mask` (B, T), the mask before groups were dropped, and `loss_weight`, the scale.
    """

    args: DCGRPOConfig
    model: nn.Module
    num_generations: int
    num_generations_eval: int
    _buffered_inputs: Any
    _logs: dict[str, Any]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if self.args.advantage_estimator == "rloo":
            self._set_rloo_advantages(batch)
        if self.args.zero_variance_groups == "drop":
            self._drop_zero_variance_groups(batch)
        return batch

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        names = self.reward_func_names
        functions = [checked(*pair) for pair in zip(self.reward_funcs, names, strict=True)]
        with temporary_attributes(self, reward_funcs=functions):
            rewards_per_func = super()._calculate_rewards(*args, **kwargs)  # (N, F), of all processes
        check_size(rewards_per_func, names)
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(1)
        self._rewards = torch.where(rewards_per_func.isnan().all(1), torch.nan, rewards)
        return rewards_per_func

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    @property
    def _steps_per_rollout(self) -> int:
        """Micro-batches that one generation batch serves, all updates on it included."""
        return (self.args.steps_per_generation or 1) * self.num_iterations

    @property
    def _first_use(self) -> bool:
        """Whether the micro-batch at hand has not been trained on yet."""
        return self._step % self._steps_per_rollout < (self.args.steps_per_generation or 1)

    def _local(self, values: Tensor, batch: dict[str, Any]) -> Tensor:
        """This process's rows, (B,), of values over all processes, (N,)."""
        size = batch["advantages"].size(0)
        return values[self.accelerator.process_index * size :][:size]

    def _set_rloo_advantages(self, batch: dict[str, Any]) -> None:
        advantages = rloo_advantages(self._rewards, self._group_size)
        logged = self._logs["advantages"]  # TRL's own estimate of these completions is at its end
        for i, value in enumerate(reversed(advantages.tolist()[-len(logged) :]), start=1):
            logged[-i] = value
        batch["advantages"] = self._local(advantages, batch)

    def _without_signal(self, batch: dict[str, Any]) -> Tensor:
        """Completions of groups whose advantages say nothing, (N,) bool, over all processes."""
        if self.multi_objective_aggregation == "sum_then_normalize":
            return zero_variance_groups(self._rewards, self._group_size)
        # Each function's rewards were normalised by themselves: with an equal sum they can differ, and so can A.
        advantages = self.accelerator.gather(batch["advantages"])
        advantages = torch.where(self._rewards.isnan(), torch.nan, advantages)  # TRL's 0 for "no reward"
        return zero_variance_groups(advantages, self._group_size, tolerance=CANCELLED_ADVANTAGE)

    def _drop_zero_variance_groups(self, batch: dict[str, Any]) -> None:
        keep = ~self._without_signal(batch)
        completion_mask = batch["completion_mask"]
        tool_mask = batch.get("tool_mask", torch.ones_like(completion_mask))
        batch["measured_mask"] = completion_mask * tool_mask
        batch["tool_mask"] = tool_mask * self._local(keep, batch).unsqueeze(1)
        tokens = (completion_mask * batch["tool_mask"]).sum()
        batch["num_items_in_batch"] = self.accelerator.gather(tokens).sum()
        if self.loss_type in SEQUENCE_MEAN_LOSSES:
            _weigh(batch, keep.numel() / max(int(keep.sum()), 1))

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        buffered = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        fresh = self._buffered_inputs is not buffered
        if fresh and self.args.zero_variance_groups == "drop" and self.loss_type == "bnpo":
            # BNPO divides by each micro-batch's own tokens: one that lost them all must not count as a micro-batch.
            micro_batches = self._buffered_inputs or []
            alive = [(b["completion_mask"] * b["tool_mask"]).any().float() for b in micro_batches]
            share = self.accelerator.gather(torch.stack(alive)).mean().item()
            for batch in micro_batches:
                _weigh(batch, 1.0 / share if share else 1.0)
        return inputs


def _weigh(batch: dict[str, Any], weight: float) -> None:
    batch["advantages"] = batch["advantages"] * weight
    batch["loss_weight"] = torch.tensor(weight, device=batch["advantages"].device)
