# SPDX-License-Identifier: Apache-2.0
"""Stable LLM reinforcement learning when the sampling engine and the training engine disagree."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dc_trl.config import DCGRPOConfig as DCGRPOConfig
    from dc_trl.trainer import DCGRPOTrainer as DCGRPOTrainer
    from dc_trl.training.length_decay_callback import LengthDecayCallback as LengthDecayCallback

__version__ = "0.2.0"

_EXPORTS = {
    "DCGRPOConfig": "dc_trl.config",
    "DCGRPOTrainer": "dc_trl.trainer",
    "LengthDecayCallback": "dc_trl.training.length_decay_callback",
}

__all__ = ["DCGRPOConfig", "DCGRPOTrainer", "LengthDecayCallback"]


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that the maths modules stay importable without loading TRL.
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_EXPORTS]
