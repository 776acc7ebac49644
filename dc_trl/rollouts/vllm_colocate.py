# SPDX-License-Identifier: Apache-2.0
"""TRL's colocated vLLM engine: with more arguments than TRL gives it, and made to take new weights where it cannot.

On CPUs with AVX-512, vLLM packs each linear layer's weight for the processor when it starts and drops the original.
TRL's weight sync loads into the original and fails (`'Parameter' object has no attribute 'weight_loader'`). vLLM's own
reload brings the originals back for the load and packs again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from dc_trl.rollouts.handover import Handover
from dc_trl.rollouts.vllm_server import check_reloadable
from dc_trl.rollouts.weights import iter_policy_weights, plain_model


@contextmanager
def engine_arguments(arguments: dict[str, Any] | None) -> Iterator[None]:
    """While this is open, a colocated engine that TRL builds gets these arguments of `vllm.LLM` on top of TRL's.

    Seam of TRL: the name `LLM` in `trl.generation.vllm_generation`, which has no other way to pass them.
    """
    if not arguments:
        yield
        return
    build = vllm_generation.LLM
    vllm_generation.LLM = lambda **given: build(**(given | arguments))  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        vllm_generation.LLM = build  # type: ignore[misc]


def prepare_colocated_engine(engine: VLLMGeneration, handover: Handover, quantized: bool = False) -> None:
    """Give a colocated engine on CPUs, or a quantised one, a `sync_weights` that works; leave any other as it is.

    The weights pass through no file and no other process: they are read in this one, one module at a time.

    Args:
        engine: built by TRL with `mode="colocate"`. Seams used: `llm`, `model`, `accelerator`, and the instance
            attribute `sync_weights`, which is set.
        handover: what rounds and measures the weights on their way.
        quantized: whether vLLM quantises the weights as it loads them, so that they cannot be overwritten in place.

    Raises:
        NotImplementedError: for a mixture of experts on CPUs, which vLLM reloads wrongly.
    """
    if engine.mode != "colocate":
        return
    from vllm.platforms import current_platform

    if not (quantized or current_platform.is_cpu()):
        return
    device = {"device_type": current_platform.device_type}
    check_reloadable({"device_config": device}, plain_model(engine.model, engine.accelerator))
    engine.sync_weights = partial(_reload, engine, handover)  # type: ignore[method-assign]


def _reload(engine: VLLMGeneration, handover: Handover) -> None:
    """Load the policy's weights into the engine, and empty its prefix cache."""
    weights = handover.round(iter_policy_weights(engine.model, engine.accelerator))
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    if not engine.llm.reset_prefix_cache():
        raise RuntimeError(
            "vLLM did not reset its prefix cache after a weight sync, so completions would mix two policies: some "
            "request is still running. Let it finish before the next sync."
        )
