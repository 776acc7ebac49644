# SPDX-License-Identifier: Apache-2.0
"""A vLLM server that gets its weights over NCCL: `use_vllm=True, vllm_mode="server"`."""

from collections.abc import Mapping
from typing import Any

from dc_trl.rollouts.engines.base import Engine


class VLLMServer(Engine):
    """TRL's engine, with weights that are rounded as `sync_rounding` says."""

    backend = "vllm"
    weight_sync: str | None = "nccl"

    def serves(self, settings: Mapping[str, Any]) -> bool:
        """Whether a vLLM server is used, with this weight sync; TRL's own settings name none."""
        on = settings.get("rollout_backend", self.backend) == self.backend and settings.get("use_vllm")
        sync = settings.get("weight_sync", VLLMServer.weight_sync)
        return bool(on) and settings.get("vllm_mode") == "server" and sync == self.weight_sync

    def name(self, settings: Mapping[str, Any], server: str = "") -> str:
        """With its address, where that is given, and its weight sync, where the settings name one."""
        sync = settings.get("weight_sync")
        return " ".join(filter(None, ("vLLM server", server))) + (f", weights over {sync}" if sync else "")

    def check_log_probs(self, args: Any, defaulted: bool = False) -> None:
        """Asks the server whether it was started with processed log-probs."""
        if args.process_index != 0:
            return
        from dc_trl.rollouts.vllm_server import check_logprobs_mode

        url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        check_logprobs_mode(url, args.vllm_server_timeout)

    def build(self, trainer: Any, args: Any) -> Any:
        """The one that `GRPOTrainer` built, whose weights are rounded and measured on their way."""
        from dc_trl.rollouts.handover import hand_over, handover_for
        from dc_trl.rollouts.server_answers import refuse_redirects
        from dc_trl.rollouts.sync_rounding import choose_dither

        engine = trainer.vllm_generation
        if trainer.accelerator.is_main_process:  # the only one that talks to the server
            refuse_redirects(engine.vllm_client.session)
        hand_over(engine, handover_for(engine, choose_dither(args, trainer.accelerator)))
        return engine


ENGINE = VLLMServer()
