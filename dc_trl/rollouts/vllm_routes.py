# SPDX-License-Identifier: Apache-2.0
"""The experts that a colocated vLLM engine chose, for router replay.

vLLM returns them with each completion where it was started with `enable_return_routed_experts`; TRL drops them on the
way, so they are kept here as they pass. They come as (prompt and completion without its last token, decoder layers,
experts a token), with rows for dense layers too.
"""

import dataclasses
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dc_trl.rollouts.router_replay import UNKNOWN, route_dtype
from dc_trl.rollouts.routers import expert_counts, find_routers

ENGINE_OPTION = "enable_return_routed_experts"


def check_engine_offers_routes() -> None:
    """Refuse router replay, before any engine starts, where the installed vLLM cannot return routed experts.

    Raises:
        ValueError: vLLM runs on a CPU, or is older than the option.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    remedy = "Use `rollout_backend='transformers'`, which records them anywhere, or `router_replay=False`."
    if ENGINE_OPTION not in {field.name for field in dataclasses.fields(EngineArgs)}:
        raise ValueError(
            "`router_replay` is True, but the installed vLLM has no option to return the experts that it chose "
            f"(`{ENGINE_OPTION}`). Install vLLM 0.31. {remedy}"
        )
    if current_platform.is_cpu():
        raise ValueError(
            "`router_replay` is True with vLLM on a CPU, which cannot return the experts that it chose: that needs "
            f"vLLM's second model runner, which runs on GPUs only. {remedy}"
        )


def keep_routes(engine: Any, model: nn.Module) -> None:
    """Make a colocated engine keep the experts of its last `generate` as `engine.last_routes`, one tensor a sequence.

    Args:
        engine: TRL's `VLLMGeneration`. Seam used: `llm.generate`, whose outputs are read as they pass.
        model: the plain training model, for its routers' layers.

    Raises:
        ValueError: the model is dense, its routers are not known, or they are in no numbered layers.
    """
    routers = find_routers(model)
    layers = [layer_number(name) for name in routers]
    dtype = route_dtype(expert_counts(routers)[0])
    generate = engine.llm.generate

    def keeping(*args: Any, **kwargs: Any) -> Any:
        outputs = generate(*args, **kwargs)
        completions = [completion for output in outputs for completion in output.outputs]
        engine.last_routes = [routes_of(completion.routed_experts, layers, dtype) for completion in completions]
        return outputs

    engine.last_routes = []
    engine.llm.generate = keeping


def layer_number(router_name: str) -> int:
    """The decoder layer of a router, from its name in the model."""
    found = re.search(r"\blayers\.(\d+)\.", router_name)
    if found is None:
        raise ValueError(
            f"the router {router_name} is in no numbered layer, so vLLM's choices cannot be matched to it. Set "
            "`router_replay=False`, or use `rollout_backend='transformers'`."
        )
    return int(found[1])


def routes_of(routed_experts: np.ndarray | None, layers: list[int], dtype: torch.dtype) -> Tensor:
    """A sequence's choices (tokens, L, k) in the order of the routers; the last token's is unknown.

    Args:
        routed_experts: vLLM's (tokens - 1, decoder layers, k), unsigned.
        layers: the decoder layer of each router, L of them.
        dtype: signed, wide enough for the experts' numbers.

    Raises:
        RuntimeError: vLLM returned none.
    """
    if routed_experts is None:
        raise RuntimeError(
            f"vLLM returned no routed experts, although `{ENGINE_OPTION}` was set. Set `router_replay=False`, or use "
            "`rollout_backend='transformers'`."
        )
    # Through int32: torch has no arithmetic for vLLM's uint16.
    known = torch.from_numpy(routed_experts[:, layers].astype(np.int32)).to(dtype)
    return torch.cat([known, torch.full_like(known[:1], UNKNOWN)])
