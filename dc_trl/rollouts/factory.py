# SPDX-License-Identifier: Apache-2.0
"""Which engine samples, whether it gives log-probs, and the engines that TRL does not build itself."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import nn
from trl import GRPOTrainer

from dc_trl.config import DCGRPOConfig
from dc_trl.rollouts.quantization import INTEGER_BITS
from dc_trl.rollouts.rounding import Dither
from dc_trl.rollouts.weights import plain_model


def needs_own_engine(args: DCGRPOConfig) -> bool:
    """Whether the trainer's engine is one of this package, not one that `GRPOTrainer` builds."""
    return args.rollout_backend == "transformers" or args.weight_sync == "disk"


def check_log_prob_source(args: DCGRPOConfig, rollout_func: Callable[..., Any] | None) -> None:
    """Refuses a constraint that nothing can drive, before any model loads.

    Raises:
        ValueError: if no engine gives sampling log-probs, or a vLLM server gives unprocessed ones.
        ConnectionError: if the vLLM server does not answer within `vllm_server_timeout` seconds.
    """
    if args.constraint == "none" or rollout_func is not None or args.rollout_backend == "transformers":
        return
    if not args.use_vllm:
        raise ValueError(
            f"`constraint` is {args.constraint!r}, but nothing gives the log-probs of the sampled tokens: TRL's "
            "`transformers.generate` (`use_vllm=False`) returns none. Set `rollout_backend='transformers'` to sample "
            "with a copy of the policy in this process, or `use_vllm=True`, or pass a `rollout_func` that returns "
            "`logprobs`, or set `constraint='none'`."
        )
    if args.vllm_mode == "server" and args.process_index == 0:
        from dc_trl.rollouts.vllm_disk import check_logprobs_mode

        url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        check_logprobs_mode(url, args.vllm_server_timeout)


def colocated_engine_arguments(args: DCGRPOConfig) -> AbstractContextManager[None]:
    """The context in which `GRPOTrainer` must build its engine, so that `vllm_engine_kwargs` reach it."""
    if not args.vllm_engine_kwargs:
        return nullcontext()
    from dc_trl.rollouts.vllm_colocate import engine_arguments

    return engine_arguments(dict(args.vllm_engine_kwargs))  # type: ignore[arg-type]


def build_engine(trainer: GRPOTrainer, args: DCGRPOConfig) -> Any:
    """The engine for `trainer.vllm_generation`: one of this package's, or TRL's, adapted where it needs to be."""
    policy: Any = trainer.model
    dither = choose_dither(args, trainer.accelerator, policy)
    if not needs_own_engine(args):
        return _adapt(trainer.vllm_generation, args, dither)
    if args.rollout_backend == "transformers":
        from dc_trl.rollouts.transformers import TransformersGeneration

        return TransformersGeneration(
            policy,
            trainer.accelerator,
            trainer.processing_class,
            precision=args.rollout_precision,
            temperature=args.temperature,
            max_completion_length=int(args.max_completion_length or 256),
            eos_token_ids=trainer.eos_token_ids,
            generation_kwargs={
                **{name: getattr(args, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")},
                **args.extra_sampling_parameters,
            },
            dither=dither,
        )
    from dc_trl.rollouts.vllm_disk import VLLMDiskGeneration

    return VLLMDiskGeneration.from_trainer(trainer, dither)


def _adapt(engine: Any, args: DCGRPOConfig, dither: Dither | None) -> Any:
    """TRL's vLLM engine with weights that are rounded and measured on their way to it."""
    from dc_trl.rollouts.handover import Handover, hand_over, served_dtype
    from dc_trl.rollouts.vllm_colocate import prepare_colocated_engine

    if engine.mode == "colocate":
        dtype = served_dtype(engine.llm.llm_engine.model_config)
    elif engine.accelerator.is_main_process:
        dtype = served_dtype(engine.vllm_client.get_server_info()["model_config"])
    else:
        dtype = torch.float32  # of the other processes, which only take part in gathering the weights
    handover = Handover(plain_model(engine.model, engine.accelerator), dtype, dither)
    prepare_colocated_engine(engine, handover, "quantization" in (args.vllm_engine_kwargs or {}))
    hand_over(engine, handover)
    return engine


def choose_dither(args: DCGRPOConfig, accelerator: Accelerator, model: nn.Module) -> Dither | None:
    """The dither that `args.sync_rounding` asks for, None for rounding to nearest.

    `auto` dithers where the training forward multiplies with finer weights than the sampler's, so that what it has
    learnt would be lost in the rounding: float32 and TF32; and adapters, which a sampler gets merged and rounded while
    the trainer adds their product to that of the base layer. Under autocast, or FSDP2's mixed precision, the forward
    rounds the weights to nearest as well: the two sides lag alike, and a dithered sampler would move away. `auto` does
    not dither integers: it takes away the bias there, but the discrepancy is no smaller (see docs/engines.md).
    """
    if args.sync_rounding == "nearest":
        return None
    if args.sync_rounding == "auto":
        rounds_alike = forward_rounds_weights(accelerator) and not is_peft_model(model)
        if rounds_alike or args.rollout_precision in INTEGER_BITS:
            return None
    return Dither(args.seed)


def forward_rounds_weights(accelerator: Accelerator) -> bool:
    """Whether the training forward multiplies with 16-bit roundings of finer weights."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    return accelerator.mixed_precision != "no" or getattr(policy, "param_dtype", None) in (
        torch.bfloat16,
        torch.float16,
    )
