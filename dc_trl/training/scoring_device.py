# SPDX-License-Identifier: Apache-2.0
"""Whether the installed TRL can compute log-probs on a device."""

import os

import torch

from dc_trl.rollouts.versions import TORCH_HEAD, trl_is, trl_version


def check_scoring_device(device: torch.device) -> None:
    """Refuses a device on which TRL's log-probs would fail deep inside Triton, with "0 active drivers".

    Raises:
        RuntimeError: TRL 1.15 on a device that is no GPU; Triton's interpreter (`TRITON_INTERPRET=1`) is let through.
    """
    if trl_is(TORCH_HEAD) or device.type in ("cuda", "xpu") or os.environ.get("TRITON_INTERPRET") == "1":
        return
    raise RuntimeError(
        f"TRL {trl_version()} computes log-probs with a Triton kernel alone, which does not run on {device.type!r}. "
        "Install TRL 1.16 or newer, or train on a GPU."
    )
