# SPDX-License-Identifier: Apache-2.0
"""A vLLM server that gets its weights over a shared disk: `vllm_mode="server", weight_sync="disk"`."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from dc_trl.rollouts.engines.vllm_server_nccl import VLLMServer


class VLLMServerOverDisk(VLLMServer):
    """`dc_trl.rollouts.vllm_disk.VLLMDiskGeneration`."""

    is_ours = True
    weight_sync = "disk"

    def build(self, trainer: Any, args: Any) -> Any:
        """A client of the server, with checkpoints in the output directory."""
        from dc_trl.rollouts.sync_rounding import choose_dither
        from dc_trl.rollouts.vllm_disk import VLLMDiskGeneration

        return VLLMDiskGeneration.from_trainer(trainer, choose_dither(args, trainer.accelerator))

    def in_use(self, trainer: Any) -> AbstractContextManager[None]:
        """Holds the folder of the synced weights, and clears it at the end."""
        # A user may have put another engine into the slot.
        in_use: AbstractContextManager[None] = getattr(trainer.vllm_generation, "directory_in_use", nullcontext)()
        return in_use


ENGINE = VLLMServerOverDisk()
