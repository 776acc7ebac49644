# SPDX-License-Identifier: Apache-2.0
"""What the server of `forked` loads for processes that need vLLM, which takes 20 seconds of a core.

On a CPU vLLM starts its engine and its worker as fresh Python processes, which load everything again. Here they are
forks too, as vLLM's `VLLM_WORKER_MULTIPROC_METHOD` has it by default for an `LLM` on a GPU.
"""

import gc
import multiprocessing
from multiprocessing.context import BaseContext

import preloaded  # noqa: F401
import vllm.entrypoints.openai.api_server  # noqa: F401
import vllm.model_executor.models.qwen3  # noqa: F401
import vllm.v1.engine.core  # noqa: F401
import vllm.v1.executor.multiproc_executor  # noqa: F401
import vllm.v1.worker.cpu_worker  # noqa: F401

_get_context = multiprocessing.get_context


def get_context(method: str | None = None) -> BaseContext:
    """multiprocessing's, which forks where it would start a fresh process."""
    return _get_context("fork" if method == "spawn" else method)


multiprocessing.get_context = get_context  # type: ignore[assignment]

gc.freeze()
