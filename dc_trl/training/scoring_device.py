# SPDX-License-Identifier: Apache-2.0
"""Whether the installed TRL can compute log-probs on a device."""

import os
from importlib.metadata import version

import torch

# TRL 1.15 has its fused head as a Triton kernel alone; from 1.16 on it has it in torch, too.
TORCH_HEAD = (1, 16)


def check_scoring_device(device: torch.device) -> None:
    """Refuses a device on which TRL's log-probs would fail deep inside Triton, with "0 active drivers".

    Raises:
        RuntimeError: TRL 1.15 on a device that is no GPU; Triton's interpreter (`TRITON_INTERPRET=1`) is let through.
    """
    installed = version("trl")
    major, minor = installed.split(".")[:2]
    has_torch_head = (int(major), int(minor)) >= TORCH_HEAD
    if has_torch_head or device.type in ("cuda", "xpu") or os.environ.get("TRITON_INTERPRET") == "1":
        return
    raise RuntimeError(
        f"TRL {installed} computes log-probs with a Triton kernel alone, which does not run on {device.type!r}. "
        "Install TRL 1.16 or newer, or train on a GPU."
    )
