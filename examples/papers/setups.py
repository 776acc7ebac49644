# SPDX-License-Identifier: Apache-2.0
"""Regimes and arms of the study, as tables of the library's public options."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

GROUP = 8  # completions per problem
HELD_OUT = 256

COMMON: dict[str, Any] = {
    "num_generations": GROUP,
    "max_completion_length": 16,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "rollout_backend": "transformers",
}


@dataclass(frozen=True)
class Regime:
    """Where arms are compared.

    Attributes:
        name: of the lines in the results.
        precision: of the sampler.
        learning_rate: Adam's, constant.
        rollouts: generation batches of a run.
        updates: optimizer steps on each, over disjoint mini-batches.
        batch: completions of a rollout.
        grid: what the start is rounded to, None for float32.
        held_out: problems on which the policy is evaluated before and after.
        published: whether the policy is a published model, of `published.py`, and not the demo's.
        extra: other options.
    """

    name: str
    precision: str
    learning_rate: float
    rollouts: int
    updates: int = 1
    batch: int = 64
    grid: str | None = None
    held_out: int = HELD_OUT
    published: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """Of `DCGRPOConfig`."""
        return COMMON | {
            "rollout_precision": self.precision,
            "learning_rate": self.learning_rate,
            "per_device_train_batch_size": self.batch // self.updates,
            "steps_per_generation": self.updates,
            "max_steps": self.rollouts * self.updates,
            **self.extra,
        }


@dataclass(frozen=True)
class Arm:
    """What is compared.

    Attributes:
        name: of the lines in the results.
        options: of `DCGRPOConfig`, on top of the regime's.
        rate: factor on the regime's learning rate.
        data: share of the regime's problems that there are; they are repeated.
        trainer: a control that is no option of the library; None for its trainer.
    """

    name: str
    options: dict[str, Any]
    rate: float = 1.0
    data: float = 1.0
    trainer: Callable[..., Any] | None = None

    def problems_in(self, regime: Regime) -> int:
        """How many problems a run in a regime has: its share, and no fewer than one rollout needs."""
        return max(regime.batch // GROUP, round(self.data * regime.rollouts * regime.batch / GROUP))

    def options_in(self, regime: Regime) -> dict[str, Any]:
        """The options of a run in a regime."""
        scaled = {} if self.rate == 1.0 else {"learning_rate": regime.learning_rate * self.rate}
        return scaled | self.options
