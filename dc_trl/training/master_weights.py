# SPDX-License-Identifier: Apache-2.0
"""An optimizer for 16-bit weights: it steps float32 masters, and rounds them into the weights with a fixed dither.

An update of 1e-6 is far smaller than the step of bf16, so an optimizer that adds it to a bf16 weight loses it. Here
the masters take it, and the weights follow in expectation; see `dc_trl.rollouts.rounding`. As that cast is the one of
the weight sync, a sampler in the same dtype gets an exact copy.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dc_trl.rollouts.rounding import Dither

MASTER = "master"
"""The key of a weight's master in the optimizer's state."""

ROUNDED = (torch.bfloat16, torch.float16)
"""The dtypes of weights that get a master. Others, such as adapters in float32, are stepped as they are."""


class MasterWeights(torch.optim.Optimizer):
    """Steps float32 masters of 16-bit weights with any torch optimizer.

    Groups and state are the wrapped optimizer's own, and hold the weights: gradients are clipped, rates scheduled and
    shards swapped in as without masters. A weight's master is an entry of its state beside the moments, which are in
    float32 too, so `state_dict` has all that a resumed run needs to go on to the bit.

    A master begins as the value in `masters`, or else as the weight. Where a weight was changed since the last step by
    another hand (the best checkpoint was loaded), its master begins again from there.

    Args:
        optimizer: of torch, over weights of the model. While it steps, the masters stand in the place of the weights,
            with gradients in float32.
        weights: `(name, weight)` of every weight that the optimizer has, by the names that the weight sync uses.
        dither: the one of the weight sync.
        masters: float32 values, by name, that the weights were rounded from; consumed.

    Raises:
        ValueError: for an optimizer that moves weights outside of its step, or has others than the model's.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weights: Iterable[tuple[str, Tensor]],
        dither: Dither,
        masters: dict[str, Tensor] | None = None,
    ) -> None:
        # Not the parent's: it would make groups and state of its own.
        if hasattr(optimizer, "train"):
            raise ValueError(
                f"{type(optimizer).__name__} moves weights between its steps, in its `train()` and `eval()`, where "
                "masters cannot follow. Use another optimizer, such as `optim='adamw_torch_fused'`, or "
                "`sync_rounding='nearest'`."
            )
        self.optimizer = optimizer
        self.dither = dither
        self._names = _group_names(optimizer, {id(weight): name for name, weight in weights})
        self._given = {} if masters is None else masters
        self._settled: dict[str, tuple[int, int]] = {}

    # Groups, state and defaults, which loading replaces, are read from the wrapped optimizer each time.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's groups, which hold the weights."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state, by weight, with the master of each that has one."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        # What torch's own methods keep on the instance, such as hooks. Not dunder names, which `copy` and `pickle` ask
        # for before there is an optimizer.
        if name.startswith("__") or name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not supported: the names of its weights are not known."""
        raise NotImplementedError("MasterWeights takes no more weights: give all of them to the optimizer it wraps.")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of the weights."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Steps the masters by the weights' gradients, and rounds them into the weights.

        Raises:
            ValueError: a closure is given: it would compute with weights that do not follow the masters.
        """
        if closure is not None:
            raise ValueError("MasterWeights takes no closure. Use an optimizer that needs none, such as AdamW.")
        # One without a gradient is left out, as by the optimizer, which would take a master alone for moments.
        moving = [(name, weight) for name, weight in self._weights() if weight.grad is not None]
        masters = {weight: self._master(name, weight) for name, weight in moving}
        with self._in_place_of_weights(masters):
            self.optimizer.step()
        for name, weight in moving:
            self._settle(name, weight)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, masters included."""
        return self.optimizer.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a state; moments and masters in float32, where torch would cast them to the dtype of the weight.

        The state of an optimizer without masters is taken too: they begin as the weights are at the next step.
        """
        self.optimizer.load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for number, weight in zip(saved, weights, strict=True):
            # Not for one without a state, which looking it up would make.
            if weight.dtype in ROUNDED and number in state_dict["state"]:
                self.state[weight].update(_in_float32(state_dict["state"][number], weight.device))
        self._settled.clear()

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that have masters. By place, since FSDP2 puts shards into the groups."""
        for group, names in zip(self.param_groups, self._names, strict=True):
            for weight, name in zip(group["params"], names, strict=True):
                if weight.dtype in ROUNDED:
                    yield name, weight

    def _master(self, name: str, weight: Tensor) -> Tensor:
        given = self._given.pop(name, None)
        master = self.state[weight].get(MASTER) if weight in self.state else None
        if master is None and given is not None:
            master = given.to(weight.device)
        if master is None or not self._stands_for(master, name, weight):
            return weight.detach().float()
        return master

    def _stands_for(self, master: Tensor, name: str, weight: Tensor) -> bool:
        """Whether the weight is the rounded master. Compared only if it may have been written to since it was."""
        if self._settled.get(name) == _written(weight):
            return True
        rounded = self.dither.cast(_local(master), weight.dtype, name, _start(weight))
        return torch.equal(rounded, _local(weight))

    @contextmanager
    def _in_place_of_weights(self, masters: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """Has the wrapped optimizer see masters, with their gradients, where it has weights."""
        state, weights = self.state, [group["params"] for group in self.param_groups]
        for weight, master in masters.items():
            state[master] = {key: value for key, value in state.pop(weight, {}).items() if key != MASTER}
            master.grad = None if weight.grad is None else weight.grad.float()
        for group, params in zip(self.param_groups, weights, strict=True):
            group["params"] = [masters.get(weight, weight) for weight in params]
        try:
            yield
        finally:
            for group, params in zip(self.param_groups, weights, strict=True):
                group["params"] = params
            for weight, master in masters.items():
                state[weight] = {**state.pop(master, {}), MASTER: master}
                master.grad = None

    def _settle(self, name: str, weight: Tensor) -> None:
        self.dither.cast_into(_local(weight), _local(self.state[weight][MASTER]), name, _start(weight))
        self._settled[name] = _written(weight)


def _group_names(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> list[list[str]]:
    """The names of the weights of each group."""
    groups = [group["params"] for group in optimizer.param_groups]
    if strange := sum(id(weight) not in names for group in groups for weight in group):
        raise ValueError(
            f"{strange} of the tensors of {type(optimizer).__name__} are no parameters of the model, so it steps "
            "layer by layer, or is another model's, and its masters have no names. Use another optimizer, such as "
            "`optim='adamw_torch_fused'`, or `sync_rounding='nearest'`."
        )
    return [[names[id(weight)] for weight in group] for group in groups]


def _in_float32(state: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Of a weight's saved state, what torch casts to the dtype of the weight, which is all but the count of steps."""
    floats = {key: value for key, value in state.items() if torch.is_tensor(value) and value.is_floating_point()}
    return {key: value.to(device, torch.float32) for key, value in floats.items() if key != "step"}


def _local(tensor: Tensor) -> Tensor:
    """The elements of a tensor that are on this process, as memory that can be written to."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _written(weight: Tensor) -> tuple[int, int]:
    """Changes whenever a weight is written to, or put elsewhere."""
    local = _local(weight)
    return local.data_ptr(), local._version


def _start(weight: Tensor) -> int:
    """The place of this process's first element in the whole tensor, flattened.

    Raises:
        NotImplementedError: for shards that are not consecutive.
    """
    if not isinstance(weight, DTensor):
        return 0
    axes = [axis for axis, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if not axes:
        return 0
    if len(axes) > 1 or not weight.placements[axes[0]].is_shard(0):
        raise NotImplementedError(
            f"A weight is placed as {weight.placements}: masters of shards are rounded only where these are along the "
            "first dimension of the tensor, as FSDP2 makes them, and along no other. Train without tensor "
            "parallelism, or with `sync_rounding='nearest'`."
        )
    # As torch splits: equal numbers of rows, rounded up, and what is left for the last.
    rows = -(-weight.shape[0] // weight.device_mesh.size(axes[0]))
    first = min(weight.device_mesh.get_local_rank(axes[0]) * rows, weight.shape[0])
    return first * weight.shape[1:].numel()
