# SPDX-License-Identifier: Apache-2.0
"""What libraries ask again in every step, or do for devices that are not there: a quarter of a short training."""

import sys
from functools import cache
from typing import Any


def ask_once() -> None:
    """Has those that are loaded ask once, in this process and in forks of it.

    Accelerate parses a package's metadata to know whether it is installed, and torch writes down the stack at each
    seed for a GPU that may come.
    """
    if "accelerate" in sys.modules:
        from accelerate.utils import imports

        imports._is_package_available = cache(imports._is_package_available)  # type: ignore[assignment]
    if "torch" in sys.modules:
        import torch

        for device in (torch.cuda, torch.xpu, torch.mtia):
            if not device.is_available():
                device.manual_seed_all = _seed_nothing  # type: ignore[attr-defined]


def _seed_nothing(seed: Any) -> None:
    pass
