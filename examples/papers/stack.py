# SPDX-License-Identifier: Apache-2.0
"""What the study runs on: the demo's policy on one CPU thread, or any causal model, on whatever there is."""

from dataclasses import dataclass
from typing import Any

import torch

from papers.setups import Regime

ENGINES = ("in-process", "vllm")


@dataclass(frozen=True)
class Stack:
    """A model, the engine that samples from it, and what changes with the model.

    Attributes:
        model: a causal language model, by name or folder; None for the demo's policy.
        engine: `"in-process"`, or `"vllm"`, colocated. vLLM has the precision that it was given, not the regime's.
        learning_rate: of regimes whose rate is the demo's; arms keep their factor on it.
        max_completion_length: most tokens of a completion.
    """

    model: str | None = None
    engine: str = "in-process"
    learning_rate: float = 1e-6
    max_completion_length: int = 512

    def takes_published(self, regime: Regime) -> bool:
        """Whether a regime's policy is its published model: a model of one's own takes its place."""
        return regime.published and self.model is None

    def options(self, options: dict[str, Any], regime_rate: float) -> dict[str, Any]:
        """The options of a run on this stack.

        Args:
            options: of regime and arm, for the demo's policy.
            regime_rate: the regime's learning rate, of which the arm's is a multiple.
        """
        options = dict(options)
        if self.model is not None:
            options |= {
                "learning_rate": options["learning_rate"] / regime_rate * self.learning_rate,
                "max_completion_length": self.max_completion_length,
                "use_cpu": not torch.cuda.is_available(),
                "gradient_checkpointing": torch.cuda.is_available(),
            }
        if self.engine == "vllm":
            dropped = ("rollout_backend", "rollout_precision", "use_cpu")
            options = {name: value for name, value in options.items() if name not in dropped}
            options |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}
        return options
