# SPDX-License-Identifier: Apache-2.0
"""Faults that look like discrepancy, put into a trainer's in-process engine."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dc_trl import DCGRPOTrainer
from dc_trl.rollouts.decoding import cache_name

Fault = Callable[[DCGRPOTrainer], None]


def stale_sync(trainer: DCGRPOTrainer) -> None:
    """The engine keeps the weights of the first sync."""
    engine, calls = trainer.vllm_generation, []
    sync = engine.sync_weights
    engine.sync_weights = lambda: calls.append(1) or (sync() if len(calls) == 1 else None)


def stale_tensors(part: str) -> Fault:
    """The engine keeps the first values of the tensors whose name contains `part`."""

    def fault(trainer: DCGRPOTrainer) -> None:
        engine, first = trainer.vllm_generation, {}
        sync = engine.sync_weights

        @torch.no_grad()
        def partial_sync() -> None:
            sync()
            for name, parameter in engine.policy.named_parameters():
                if part in name:
                    parameter.copy_(first.setdefault(name, parameter.clone()))

        engine.sync_weights = partial_sync

    return fault


def stale_prefix_cache(trainer: DCGRPOTrainer) -> None:
    """All but a prompt's last token is read from a cache that the first weights filled, as vLLM's would be."""
    engine, first = trainer.vllm_generation, []
    prefill = engine._prefill

    @torch.inference_mode()
    def stale_prefill(prompts: list[list[int]]) -> Any:
        current = engine.policy
        first.append(copy.deepcopy(current)) if not first else None
        engine.policy = first[0]
        batch = prefill(prompts)
        engine.policy = current
        batch.cache.crop(-1)
        batch.logits = current(
            input_ids=torch.tensor([[prompt[-1]] for prompt in prompts]),
            attention_mask=batch.mask[:, : batch.width],
            position_ids=batch.lengths[:, None] - 1,
            use_cache=True,
            **{cache_name(current): batch.cache},
        ).logits[:, -1]
        return batch

    engine._prefill = stale_prefill


def engine_temperature(value: float) -> Fault:
    """The engine samples at another temperature than the trainer scores at."""
    return lambda trainer: setattr(trainer.vllm_generation, "temperature", value)


def reported(sampled: Callable[[Tensor], Tensor], report: Callable[[Tensor, Tensor], Tensor]) -> Fault:
    """Draws from `sampled(logits)` and reports `report(logits, sampled logps)`; (n, V) each."""

    def fault(trainer: DCGRPOTrainer) -> None:
        engine = trainer.vllm_generation

        def draw(logits: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
            logps = sampled(logits.float() / engine.temperature)
            tokens = torch.multinomial(logps.exp(), 1)
            return tokens.squeeze(1), report(logits.float(), logps).gather(1, tokens).squeeze(1)

        engine._draw = draw

    return fault


def nucleus(top_p: float) -> Callable[[Tensor], Tensor]:
    """Log-probs (n, V) of the smallest set of tokens that holds `top_p`, renormalised."""

    def truncate(logits: Tensor) -> Tensor:
        logps, order = logits.log_softmax(-1).sort(-1, descending=True)
        outside = logps.exp().cumsum(-1) - logps.exp() >= top_p
        kept = logps.masked_fill(outside, -torch.inf).log_softmax(-1)
        return torch.empty_like(kept).scatter_(-1, order, kept)

    return truncate


def best(k: int) -> Callable[[Tensor], Tensor]:
    """Log-probs (n, V) of the `k` likeliest tokens, renormalised."""
    return lambda logits: logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf).log_softmax(-1)


def top_p(value: float) -> Fault:
    """Truncated sampling, reported as sampled: vLLM's processed log-probs."""
    return reported(nucleus(value), lambda logits, logps: logps)


def top_k(value: int) -> Fault:
    """As `top_p`."""
    return reported(best(value), lambda logits, logps: logps)


raw_logprobs = reported(lambda logits: logits.log_softmax(-1), lambda logits, logps: logits.log_softmax(-1))


def merge_in_place(trainer: DCGRPOTrainer) -> None:
    """Adapters are merged into the live base weights for each sync and taken out again, as TRL does for vLLM."""
    engine = trainer.vllm_generation

    def sync() -> None:
        trainer.model.merge_adapter()
        base = trainer.model.get_base_model().named_parameters()
        engine._copy.load((n.replace(".base_layer", ""), p.detach()) for n, p in base if "lora_" not in n)
        engine._synced = True
        trainer.model.unmerge_adapter()

    engine.sync_weights = sync


def trainers_own_log_probs(trainer: DCGRPOTrainer) -> None:
    """What is handed over as the sampler's log-probs was scored by the trainer."""
    score = trainer._generate_and_score_completions

    @torch.no_grad()
    def scored_by_the_trainer(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = score(inputs)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        width = batch["completion_ids"].size(1)
        logps, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)
        return batch | {"sampling_per_token_logps": logps}

    trainer._generate_and_score_completions = scored_by_the_trainer  # type: ignore[method-assign]
