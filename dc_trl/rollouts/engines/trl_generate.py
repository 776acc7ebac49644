# SPDX-License-Identifier: Apache-2.0
"""TRL's own `transformers.generate`, which gives no log-probs; a `rollout_func` takes its place, and may give them."""

from collections.abc import Mapping
from typing import Any

from dc_trl.rollouts.engines.base import Engine


class TRLGenerate(Engine):
    """No engine of `trainer.vllm_generation`."""

    backend = "vllm"
    gives_log_probs = False
    sends_weights = False

    def serves(self, settings: Mapping[str, Any]) -> bool:
        """Whether neither vLLM nor the in-process engine is chosen."""
        return settings.get("rollout_backend", self.backend) == self.backend and not settings.get("use_vllm")

    def name(self, settings: Mapping[str, Any], server: str = "") -> str:
        """Both, since a configuration does not say which."""
        return "TRL's generation or a rollout_func"

    def check_config(self, args: Any) -> None:
        """Refuses a dither: the weights that sample are those in training."""
        if args.sync_rounding == "dither":
            raise ValueError(
                "`sync_rounding` is 'dither', but `transformers.generate` samples from the weights in training: no "
                "sync rounds them. Set `use_vllm=True` or `rollout_backend='transformers'`, or leave it unset."
            )

    def check_log_probs(self, args: Any, defaulted: bool = False) -> None:
        """There are none."""
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
            f"{args.needs_log_probs} compares the engines, but {none_gives} Set `rollout_backend='transformers'` to "
            "sample with a copy of the policy in this process, or `use_vllm=True`, or pass a `rollout_func` that "
            "returns `logprobs`, or leave it out (`constraint='none'`)."
        )

    def build(self, trainer: Any, args: Any) -> Any:
        """Nothing: `GRPOTrainer` generates by itself."""
        return None


ENGINE = TRLGenerate()
