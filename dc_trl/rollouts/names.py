# SPDX-License-Identifier: Apache-2.0
"""What an engine is called, in reports and model cards."""

from collections.abc import Mapping
from typing import Any


def engine_name(settings: Mapping[str, Any], server: str = "") -> str:
    """The engine that samples, and its precision or options, in words.

    Args:
        settings: fields of a `DCGRPOConfig` by name, or those of another trainer's configuration that are known.
        server: address of the vLLM server, where it is to be named. A model card is no place for it.
    """
    if settings.get("rollout_backend") == "transformers":
        return f"in-process transformers, {settings.get('rollout_precision') or 'as trained'}"
    if not settings.get("use_vllm"):
        return "TRL's generation or a rollout_func"
    if settings.get("vllm_mode") == "server":
        sync = settings.get("weight_sync")
        return " ".join(filter(None, ("vLLM server", server))) + (f", weights over {sync}" if sync else "")
    options = ", ".join(f"{key}={value}" for key, value in (settings.get("vllm_engine_kwargs") or {}).items())
    return f"vLLM colocated ({options})" if options else "vLLM colocated"
