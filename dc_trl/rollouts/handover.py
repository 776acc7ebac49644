# SPDX-License-Identifier: Apache-2.0
"""What a vLLM engine is handed at a weight sync: rounded to the dtype that it serves, and measured.

vLLM casts whatever it gets to its own dtype, to the nearest number. Weights that arrive dithered, on the grid of that
dtype, pass through unchanged, and need half the bytes on the way.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dc_trl.rollouts.rounding import Dither, is_coarser
from dc_trl.rollouts.update_seen import UpdateSeen
from dc_trl.rollouts.vllm_server import server_configuration
from dc_trl.rollouts.weights import iter_policy_weights, parameter_sizes, plain_model


class Handover:
    """Rounds the policy's weights on their way to an engine, and measures how much of the training arrives.

    Args:
        model: the plain policy, for the sizes of its tensors and for those that stay in float32.
        dtype: what the engine serves in.
        dither: None hands the weights over as they are, for the engine to round to nearest.

    A deployment that quantises further, such as fp8, is measured up to the dtype that it computes in.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, dither: Dither | None) -> None:
        self.dtype = dtype
        self.dither = dither
        self.meter = UpdateSeen(parameter_sizes(model))
        self._kept = kept_in_float32(model)

    def round(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights as they are handed over, under their names, one at a time.

        Args:
            weights: by the plain model's names, as `iter_policy_weights` and TRL give them; only read.
        """
        for name, trained in weights:
            handed = trained
            if self.dither is not None and is_coarser(self.dtype, trained.dtype) and not self._kept(name):
                handed = self.dither.cast(trained, self.dtype, name)
            if self.meter.wants(name):
                self.meter.observe(name, trained, handed if self._kept(name) else handed.to(self.dtype))
            yield name, handed

    def deployed(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights as the engine makes them of what it is handed."""
        for name, tensor in self.round(weights):
            rounds = tensor.is_floating_point() and not self._kept(name)
            yield name, tensor.to(self.dtype) if rounds else tensor

    def finish(self) -> dict[str, float]:
        """The figures of a sync that is over, see `UpdateSeen.finish`."""
        return self.meter.finish()


def handover_for(engine: Any, dither: Dither | None) -> Handover:
    """The handover to an engine that TRL built, in the dtype that vLLM reports."""
    if engine.mode == "colocate":
        dtype = served_dtype(engine.llm.llm_engine.model_config)
    elif engine.accelerator.is_main_process:
        client = engine.vllm_client
        dtype = served_dtype(server_configuration(client.session, client.base_url)["model_config"])
    else:
        dtype = torch.float32  # the other processes only take part in gathering the weights
    return Handover(plain_model(engine.model, engine.accelerator), dtype, dither)


def hand_over(engine: Any, handover: Handover) -> None:
    """Have an engine of TRL's send what `handover` makes of the weights, over NCCL or in place.

    Seams of TRL: `_iter_named_params()` yields every tensor under the plain model's name, twice at the first sync
    with a server, for the dtypes and for the tensors; `sync_weights()` walks it. Both become attributes of the
    instance, which also gets `sync_metrics` at each sync, `update_seen`, `deployed_weights` and `deployed_dtype`.

    Args:
        engine: a `VLLMGeneration` in any mode. Where another `sync_weights` was set, that is the one which is wrapped.
    """
    iterate, synchronise = engine._iter_named_params, engine.sync_weights

    def synchronise_and_measure() -> None:
        synchronise()
        engine.sync_metrics = handover.finish()

    engine._iter_named_params = lambda: handover.round(iterate())
    engine.sync_weights = synchronise_and_measure
    engine.update_seen, engine.deployed_dtype = handover.meter, handover.dtype
    engine.deployed_weights = lambda: handover.deployed(iter_policy_weights(engine.model, engine.accelerator))


def kept_in_float32(model: PreTrainedModel) -> Callable[[str], bool]:
    """Tells the names of tensors that the model's class keeps in float32 in any dtype, as engines do too."""
    patterns: list[str] = []
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        patterns += getattr(model, attribute, None) or []
    if not patterns:
        return lambda name: False
    # As transformers matches them: a module's name, or the last part of it.
    compiled = re.compile("|".join(rf"(?:^|\.){pattern}(?:\.|$)" for pattern in patterns))
    return lambda name: compiled.search(name) is not None


def served_dtype(config: Any) -> torch.dtype:
    """The dtype in a vLLM model config: a `torch.dtype` in process, `"torch.bfloat16"` from a server."""
    dtype = config["dtype"] if isinstance(config, dict) else config.dtype
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype).removeprefix("torch."))
