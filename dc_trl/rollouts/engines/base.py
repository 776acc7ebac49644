# SPDX-License-Identifier: Apache-2.0
"""What an engine declares of itself. A file of this folder declares one, and is found by being there."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Engine(ABC):
    """A way to sample completions: which settings choose it, what it is called, how it is built, what it gives.

    `settings` are fields of a `DCGRPOConfig` by name, or those of another trainer's configuration that are known;
    `args` is a `DCGRPOConfig`. Declaring an engine imports nothing heavy: `build` does.

    Attributes:
        backend: the value of `rollout_backend` under which it is chosen.
        is_ours: whether this package builds it; otherwise `GRPOTrainer` does.
        gives_log_probs: whether it returns the log-probs of the sampled tokens, which a constraint needs.
        copies_policy: whether it holds a copy of the policy in the training process.
        sends_weights: whether each weight sync hands the whole policy to vLLM.
    """

    backend: str
    is_ours = False
    gives_log_probs = True
    copies_policy = False
    sends_weights = True

    @abstractmethod
    def serves(self, settings: Mapping[str, Any]) -> bool:
        """Whether these settings choose this engine. Exactly one engine must say so."""

    @abstractmethod
    def name(self, settings: Mapping[str, Any], server: str = "") -> str:
        """What reports and model cards call it, with its precision or options.

        Args:
            settings: see the class.
            server: address of the vLLM server, where it is to be named. A model card is no place for it.
        """

    def check_config(self, args: Any) -> None:
        """Refuses fields that this engine cannot follow.

        Raises:
            ValueError: names field, value, reason and remedy.
        """
        return None

    def check_log_probs(self, args: Any, defaulted: bool = False) -> None:
        """Refuses log-probs that are not those of the sampling distribution, before any model loads.

        Args:
            args: the configuration.
            defaulted: whether the user gave none, so that `args` holds the defaults.

        Raises:
            ValueError: they are others, or there are none.
            ConnectionError: the server to ask does not answer in time.
        """
        return None

    def construction(self, args: Any) -> AbstractContextManager[None]:
        """The context in which `GRPOTrainer` is constructed."""
        return nullcontext()

    @abstractmethod
    def build(self, trainer: Any, args: Any) -> Any:
        """What goes into `trainer.vllm_generation`: `sync_weights()` and `generate()`; TRL's own, or ours."""
