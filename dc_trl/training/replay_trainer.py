# SPDX-License-Identifier: Apache-2.0
"""Router replay (R3, arXiv 2510.11370) on TRL's GRPO trainer: training goes through the experts that sampled.

Shapes: B sequences, P prompt tokens, T completion tokens, L layers with experts, k experts a token.
"""

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor

from dc_trl.rollouts.router_replay import RouterReplay, pad_routes
from dc_trl.rollouts.weights import plain_model
from dc_trl.training.group_trainer import GroupEstimatorsTrainer


class RouterReplayTrainer(GroupEstimatorsTrainer):
    """GRPO with `router_replay` of [`DCGRPOConfig`].

    The engine keeps the experts that it chose for each token; they travel with their sequence as `routed_experts`,
    (B, P + T, L, k), and stand in for the routers' own choice in every forward that scores these tokens, up to the end
    of its backward.
    """

    _loss_routes: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._replays = ExitStack()  # open from a forward with gradients to the end of its backward
        super().__init__(*args, **kwargs)
        if self.args.router_replay and self.args.beta != 0 and is_peft_model(self.model):
            raise ValueError(
                f"`beta` is {self.args.beta} with `router_replay=True` and an adapter: the reference is then the same "
                "model without its adapter, and would be given the sampler's experts. Use `beta=0`, or no adapter."
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if self.args.router_replay:
            batch["routed_experts"] = self._routes(batch["prompt_mask"], batch["completion_ids"].shape[1])
        return batch

    def _routes(self, prompt_mask: Tensor, completion_width: int) -> Tensor:
        """The experts (B, P + T, L, k) that the engine chose for the batch it has sampled last, on the CPU."""
        engine: Any = self.vllm_generation
        width = prompt_mask.shape[1]
        return pad_routes(engine.last_routes, prompt_mask.sum(1).tolist(), width, width + completion_width)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._loss_routes = inputs.get("routed_experts")
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._loss_routes = None

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        with self._replay(model, attention_mask, logits_to_keep):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )

    def _replay(self, model: Any, attention_mask: Tensor, completion_width: int) -> AbstractContextManager[Any]:
        """The context in which `model` takes the sampler's experts; a reference model takes its own."""
        if not self.args.router_replay or model is self.ref_model:
            return nullcontext()
        routes = self._loss_routes
        if routes is None:  # while the batch is being scored
            routes = self._routes(attention_mask[:, :-completion_width], completion_width)
        replay = RouterReplay(plain_model(model, self.accelerator), routes)
        if torch.is_grad_enabled():
            self._replays.enter_context(replay)
            return nullcontext()
        return replay

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trains on one micro-batch as TRL does; a replay ends with its backward."""
        with self._replays:
            return super().training_step(*args, **kwargs)
