# SPDX-License-Identifier: Apache-2.0
"""vLLM in the training process: `use_vllm=True, vllm_mode="colocate"`."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from dc_trl.rollouts.engines.base import Engine


class VLLMColocated(Engine):
    """TRL's engine, with `vllm_engine_kwargs`, and a weight sync that works on CPUs and with quantised weights."""

    backend = "vllm"

    def serves(self, settings: Mapping[str, Any]) -> bool:
        """Whether vLLM is used, and no server."""
        on = settings.get("rollout_backend", self.backend) == self.backend and settings.get("use_vllm")
        return bool(on) and settings.get("vllm_mode") != "server"

    def name(self, settings: Mapping[str, Any], server: str = "") -> str:
        """With what its engine was given, as far as it may be shown."""
        from dc_trl.rollouts.shown import shown

        arguments = shown("vllm_engine_kwargs", settings.get("vllm_engine_kwargs") or {})
        options = ", ".join(f"{key}={value}" for key, value in arguments.items())
        return f"vLLM colocated ({options})" if options else "vLLM colocated"

    def check_config(self, args: Any) -> None:
        """Refuses quantised weights that sleep."""
        if "quantization" in (args.vllm_engine_kwargs or {}) and args.vllm_enable_sleep_mode:
            raise ValueError(
                "`vllm_enable_sleep_mode` is True with a quantised engine, whose weights TRL cannot restore after a "
                "sleep. Set `vllm_enable_sleep_mode=False`, or leave `quantization` out of `vllm_engine_kwargs`."
            )

    def check_routes(self, args: Any) -> None:
        """Asks the installed vLLM."""
        from dc_trl.rollouts.vllm_routes import check_engine_offers_routes

        check_engine_offers_routes()

    def construction(self, args: Any) -> AbstractContextManager[None]:
        """TRL builds the engine while it is constructed, so its arguments must reach it there."""
        arguments = dict(args.vllm_engine_kwargs or {})
        if args.router_replay:
            from dc_trl.rollouts.vllm_routes import ENGINE_OPTION

            arguments[ENGINE_OPTION] = True
        if not arguments:
            return nullcontext()
        from dc_trl.rollouts.vllm_colocate import engine_arguments

        return engine_arguments(arguments)

    def build(self, trainer: Any, args: Any) -> Any:
        """TRL's, adapted where it needs to be."""
        from dc_trl.rollouts.handover import hand_over, handover_for
        from dc_trl.rollouts.sync_rounding import choose_dither
        from dc_trl.rollouts.vllm_colocate import prepare_colocated_engine

        engine = trainer.vllm_generation
        handover = handover_for(engine, choose_dither(args, trainer.accelerator))
        prepare_colocated_engine(engine, handover, "quantization" in (args.vllm_engine_kwargs or {}))
        hand_over(engine, handover)
        if args.router_replay:
            from dc_trl.rollouts.vllm_routes import keep_routes
            from dc_trl.rollouts.weights import plain_model

            keep_routes(engine, plain_model(trainer.model, trainer.accelerator))
        return engine


ENGINE = VLLMColocated()
