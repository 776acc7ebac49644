# SPDX-License-Identifier: Apache-2.0
r"""A vLLM server that gets its weights through a shared file system, for servers that NCCL cannot reach.

TRL sends weights to a server over NCCL, from CUDA devices only. A disk reaches servers on CPUs, on other vendors'
devices and on other machines. Start the server with

    VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL --host 127.0.0.1 \
        --logprobs-mode processed_logprobs

and let it read the trainer's output directory under the same absolute path. Security: the endpoints that this opens
have no authentication (see `dc_trl.rollouts.vllm_server`), so keep the port on loopback or on a private network.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl.generation.vllm_generation import VLLMGeneration

from dc_trl.rollouts.checkpoint import (
    SYNC_FOLDER,
    holding,
    lock_beside,
    next_checkpoint,
    remove_checkpoints,
    remove_old_checkpoints,
    write_checkpoint,
)
from dc_trl.rollouts.handover import Handover, served_dtype
from dc_trl.rollouts.rounding import Dither
from dc_trl.rollouts.update_seen import UpdateSeen
from dc_trl.rollouts.vllm_client import CheckedClient
from dc_trl.rollouts.vllm_server import (
    check_logprobs_mode,
    check_reloadable,
    explain_failure,
    reload_weights,
    server_configuration,
)
from dc_trl.rollouts.weights import iter_policy_weights, plain_model

__all__ = ["VLLMDiskGeneration", "check_logprobs_mode"]

_SAMPLING = ("repetition_penalty", "temperature", "top_p", "top_k", "min_p", "max_completion_length")


class VLLMDiskGeneration(VLLMGeneration):
    """TRL's vLLM server engine with the weights sent over disk instead of NCCL.

    One trainer at a time may use `sync_dir`, held by a lock of the operating system's: while it trains or evaluates
    (`directory_in_use`), and for the length of any other sync.

    The main process talks to the server and the others wait for it; under FSDP2 and ZeRO-3 all of them gather, one
    module at a time. A server that dies raises `ConnectionError` after at most about `server_timeout` seconds. A
    server started again is brought up to date by the first `sync_weights` of the resumed run.

    Seams of TRL used: `_init_vllm` (replaced: no communicator), `sync_weights` (replaced), `generate` (wrapped),
    and the attributes `mode`, `model`, `accelerator`, `server_*`, `group_port`, `vllm_client`.

    Args:
        *args: as for `VLLMGeneration`.
        sync_dir: directory for the policy's checkpoints, which the server must find under the same absolute path.
            The last two are kept, until the end of `directory_in_use`.
        dither: rounds the weights to the dtype that the server reports; None has the server round to nearest.
        readers: who may read the checkpoints, one of `dc_trl.rollouts.checkpoint.READERS`.
        **kwargs: as for `VLLMGeneration`; `mode` must be `"server"`.

    Raises:
        RuntimeError: another trainer uses `sync_dir`.
    """

    def __init__(
        self,
        *args: Any,
        sync_dir: str | os.PathLike[str],
        dither: Dither | None = None,
        readers: str = "owner",
        **kwargs: Any,
    ) -> None:
        self.sync_dir = Path(sync_dir).absolute()
        self._lock = lock_beside(self.sync_dir)
        self.dither = dither
        self.readers = readers
        self.sync_metrics: dict[str, float] = {}
        super().__init__(*args, **kwargs)

    @classmethod
    def from_trainer(cls, trainer: Any, dither: Dither | None = None) -> "VLLMDiskGeneration":
        """The engine that a GRPO trainer's arguments describe, with checkpoints in `output_dir/_weight_sync`."""
        args = trainer.args
        return cls(
            trainer.model,
            trainer.accelerator,
            trainer.processing_class,
            mode=args.vllm_mode,
            structured_outputs_regex=args.vllm_structured_outputs_regex,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            server_timeout=args.vllm_server_timeout,
            generation_kwargs=args.generation_kwargs,
            sync_dir=Path(args.output_dir) / SYNC_FOLDER,
            dither=dither,
            readers=args.weight_sync_readers,
            **{name: getattr(trainer, name) for name in _SAMPLING},
        )

    def _init_vllm(self) -> None:
        if self.mode != "server":
            raise ValueError(
                f"weight_sync='disk' is for vLLM servers, got vllm_mode={self.mode!r}: a colocated engine shares the "
                "trainer's memory. Set vllm_mode='server', or weight_sync='nccl'."
            )
        self.base_url = (self.server_base_url or f"http://{self.server_host}:{self.server_port}").rstrip("/")
        policy = plain_model(self.model, self.accelerator)
        dtype = torch.float32  # of the other processes, which only take part in gathering the weights
        if self.accelerator.is_main_process:
            with holding(self._lock, self.sync_dir):  # is refused now, rather than after the data has loaded
                pass
            with explain_failure(self.base_url, "saying what it serves"):
                self.vllm_client = CheckedClient(self.base_url, self.group_port, self.server_timeout)
                # Raises where the development endpoints are off.
                server = server_configuration(self.vllm_client.session, self.base_url)
            check_reloadable(server, policy)
            dtype = served_dtype(server["model_config"])
        self.handover = Handover(policy, dtype, self.dither)
        self.accelerator.wait_for_everyone()

    def sync_weights(self) -> None:
        """Write the policy to disk and have the server load it. A collective: every process must call it.

        Raises:
            ConnectionError: the server is gone, or failed to load the weights.
            RuntimeError: the server refused to load them, or to reset its prefix cache; or another trainer uses
                `sync_dir`.
            OSError: `sync_dir` cannot be written.
        """
        if self.accelerator.is_main_process:
            with holding(self._lock, self.sync_dir):
                self._send(iter_policy_weights(self.model, self.accelerator))
        else:
            for _ in iter_policy_weights(self.model, self.accelerator):  # takes part in gathering the shards
                pass
        self.accelerator.wait_for_everyone()

    def _send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        directory = next_checkpoint(self.sync_dir)
        policy = plain_model(self.model, self.accelerator)
        write_checkpoint(directory, policy, self.handover.round(weights), readers=self.readers)
        with explain_failure(self.base_url, f"loading the weights in {directory}, which it must be able to read"):
            reload_weights(self.vllm_client.session, self.base_url, directory)
        remove_old_checkpoints(self.sync_dir)
        self.sync_metrics = self.handover.finish()

    @contextmanager
    def directory_in_use(self) -> Iterator[None]:
        """The context of a training or evaluation: keeps other trainers off `sync_dir`, and at its end clears it.

        Within another such context it does nothing, and so on processes other than the main one.

        Raises:
            RuntimeError: on entering, if another trainer uses `sync_dir`.
        """
        if self._lock.is_locked or not self.accelerator.is_main_process:
            yield
            return
        with holding(self._lock, self.sync_dir):
            try:
                yield
            finally:
                remove_checkpoints(self.sync_dir)

    @property
    def update_seen(self) -> UpdateSeen:
        """What measures how much of the training the syncs bring."""
        return self.handover.meter

    @property
    def deployed_dtype(self) -> torch.dtype:
        """The dtype in which the server serves."""
        return self.handover.dtype

    def deployed_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor as the server makes it of what it loads; collective as `sync_weights` is."""
        return self.handover.deployed(iter_policy_weights(self.model, self.accelerator))

    def generate(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """As `VLLMGeneration.generate`; a server that is gone raises `ConnectionError` with the way out."""
        with explain_failure(self.base_url, "generating completions"):
            return super().generate(*args, **kwargs)
