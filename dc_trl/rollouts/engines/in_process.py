# SPDX-License-Identifier: Apache-2.0
"""A copy of the policy in the training process, in a precision of its own: `rollout_backend="transformers"`."""

from collections.abc import Mapping
from typing import Any

from dc_trl.rollouts.engines.base import Engine


class InProcess(Engine):
    """`dc_trl.rollouts.transformers.TransformersGeneration`."""

    backend = "transformers"
    is_ours = True
    copies_policy = True
    sends_weights = False

    def serves(self, settings: Mapping[str, Any]) -> bool:
        """Whether the backend is chosen."""
        return settings.get("rollout_backend") == self.backend

    def name(self, settings: Mapping[str, Any], server: str = "") -> str:
        """With its precision."""
        return f"in-process transformers, {settings.get('rollout_precision') or 'as trained'}"

    def check_config(self, args: Any) -> None:
        """Refuses a second engine."""
        for name in ("use_vllm", "use_transformers_continuous_batching"):
            if getattr(args, name):
                raise ValueError(
                    f"`rollout_backend` is 'transformers' and `{name}` is True: two engines would sample. Set "
                    f"`{name}=False`, or leave `rollout_backend` unset."
                )

    def build(self, trainer: Any, args: Any) -> Any:
        """A new copy of the trainer's policy.

        Raises:
            ValueError: for a dither with nothing to round: the copy holds float32 weights as they are trained.
        """
        from dc_trl.rollouts.sync_rounding import choose_dither
        from dc_trl.rollouts.transformers import TransformersGeneration

        options = {name: getattr(args, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
        engine = TransformersGeneration(
            trainer.model,
            trainer.accelerator,
            trainer.processing_class,
            precision=args.rollout_precision,
            temperature=args.temperature,
            max_completion_length=args.completion_limit,
            eos_token_ids=trainer.eos_token_ids,
            generation_kwargs=options | args.extra_sampling_parameters,
            record_routes=args.router_replay,
            dither=choose_dither(args, trainer.accelerator),
        )
        # Where the trainer computes in bf16, its masters are rounded, and the copy holds what it multiplies with.
        if args.sync_rounding == "dither" and args.rollout_precision is None and engine.deployed_dtype.itemsize > 2:
            raise ValueError(
                "`sync_rounding` is 'dither' with `rollout_precision=None`, which samples the weights as trained, and "
                "these are in float32: nothing is rounded. Set `rollout_precision`, for example to 'bf16', or train "
                "all weights in bf16 (`bf16=True`), or leave `sync_rounding` unset."
            )
        return engine


ENGINE = InProcess()
