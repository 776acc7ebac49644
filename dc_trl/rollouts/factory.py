# SPDX-License-Identifier: Apache-2.0
"""Which engine samples, whether it gives log-probs, and the engines that TRL does not build itself."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from trl import GRPOTrainer

from dc_trl.config import DCGRPOConfig
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


def check_route_source(args: DCGRPOConfig, **given: Any) -> None:
    """Refuses router replay that nothing can record for, before any model loads.

    Args:
        args: the configuration.
        **given: the trainer's arguments `rollout_func`, `tools` and `environment_factory`.

    Raises:
        ValueError: if rollouts do not come in one turn from an engine that records its choice of experts.
    """
    if not args.router_replay:
        return
    for name, value in given.items():
        if value:
            raise ValueError(
                f"`router_replay` is True with `{name}`, whose tokens do not all come from one call of the engine "
                f"that records its experts. Leave `{name}` out, or set `router_replay=False`."
            )
    if args.rollout_backend == "vllm":
        from dc_trl.rollouts.vllm_routes import check_engine_offers_routes

        check_engine_offers_routes()


def colocated_engine_arguments(args: DCGRPOConfig) -> AbstractContextManager[None]:
    """The context in which `GRPOTrainer` must build its engine, so that it gets arguments that TRL does not pass."""
    arguments: dict[str, Any] = dict(args.vllm_engine_kwargs or {})  # type: ignore[arg-type]
    if args.router_replay and args.use_vllm:
        from dc_trl.rollouts.vllm_routes import ENGINE_OPTION

        arguments[ENGINE_OPTION] = True
    if not arguments:
        return nullcontext()
    from dc_trl.rollouts.vllm_colocate import engine_arguments

    return engine_arguments(arguments)


def build_engine(trainer: GRPOTrainer, args: DCGRPOConfig) -> Any:
    """The engine for `trainer.vllm_generation`: one of this package's, or TRL's, adapted where it needs to be."""
    policy: Any = trainer.model
    if not needs_own_engine(args):
        from dc_trl.rollouts.vllm_colocate import prepare_colocated_engine

        prepare_colocated_engine(trainer.vllm_generation, "quantization" in (args.vllm_engine_kwargs or {}))
        if args.router_replay:
            from dc_trl.rollouts.vllm_routes import keep_routes

            keep_routes(trainer.vllm_generation, plain_model(policy, trainer.accelerator))
        return trainer.vllm_generation
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
            record_routes=args.router_replay,
        )
    from dc_trl.rollouts.vllm_disk import VLLMDiskGeneration

    return VLLMDiskGeneration.from_trainer(trainer)
