# SPDX-License-Identifier: Apache-2.0
"""Which engine samples, whether it gives log-probs, and the engines that TRL does not build itself."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from trl import GRPOTrainer

from dc_trl.config import DCGRPOConfig


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
    if not needs_own_engine(args):
        from dc_trl.rollouts.vllm_colocate import prepare_colocated_engine

        prepare_colocated_engine(trainer.vllm_generation, "quantization" in (args.vllm_engine_kwargs or {}))
        return trainer.vllm_generation
    if args.rollout_backend == "transformers":
        from dc_trl.rollouts.transformers import TransformersGeneration

        policy: Any = trainer.model
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
        )
    from dc_trl.rollouts.vllm_disk import VLLMDiskGeneration

    return VLLMDiskGeneration.from_trainer(trainer)


def engine_in_use(trainer: GRPOTrainer) -> AbstractContextManager[None]:
    """The context of a training or evaluation, after which the engine holds nothing outside this process any more.

    Raises:
        RuntimeError: on entering, if another trainer's engine holds the same.
    """
    engine: Any = getattr(trainer, "vllm_generation", None)
    in_use: AbstractContextManager[None] = getattr(engine, "directory_in_use", nullcontext)()
    return in_use
