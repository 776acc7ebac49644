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


def check_log_prob_source(
    args: DCGRPOConfig, rollout_func: Callable[..., Any] | None, defaulted: bool = False
) -> None:
    """Refuses a constraint that nothing can drive, before any model loads.

    Args:
        args: the configuration.
        rollout_func: the user's, or None.
        defaulted: whether no configuration was given, so that `args` holds the defaults.

    Raises:
        ValueError: if no engine gives sampling log-probs, or a vLLM server gives unprocessed ones.
        ConnectionError: if the vLLM server does not answer within `vllm_server_timeout` seconds.
    """
    if args.constraint == "none" or rollout_func is not None or args.rollout_backend == "transformers":
        return
    if not args.use_vllm:
        none_gives = (
            "nothing gives the log-probs of the sampled tokens: TRL's `transformers.generate` (`use_vllm=False`) "
            "returns none."
        )
        if defaulted:
            raise ValueError(
                f"No `args` were given, so `constraint` is {args.constraint!r}, its default, but {none_gives} Pass "
                "`args=DCGRPOConfig(rollout_backend='transformers')` to sample with a copy of the policy in this "
                "process, or `args=DCGRPOConfig(use_vllm=True)`, or a `rollout_func` that returns `logprobs`, or "
                "`args=DCGRPOConfig(constraint='none')`."
            )
        raise ValueError(
            f"`constraint` is {args.constraint!r}, but {none_gives} Set `rollout_backend='transformers'` to sample "
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
            max_completion_length=args.completion_limit,
            eos_token_ids=trainer.eos_token_ids,
            generation_kwargs={
                **{name: getattr(args, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")},
                **args.extra_sampling_parameters,
            },
        )
    from dc_trl.rollouts.vllm_disk import VLLMDiskGeneration

    return VLLMDiskGeneration.from_trainer(trainer)
