# SPDX-License-Identifier: Apache-2.0
"""Moving the weights in training and putting them back exactly: what weights that stand still do not show.

With equal weights on both sides a sync that does nothing looks healthy. After a nudge it does not. And weights on the
sampler's grid, as a published checkpoint's are, arrive without rounding. After the first updates they do not.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

# Relative size of the first nudge; each further one doubles it.
FIRST_SIZE = 0.01
# Beyond this a model is noise, and more noise shows no more.
LAST_SIZE = 0.64
# A dead sync must stand out this far above the floor, and this far in nats, to be told from it.
CONTRAST = 10.0
MINIMUM = 0.02


# Weights that are looked at for the grid, spread over the model.
GRID_SAMPLE = 1_000_000
# Bits of the mantissa that are stored.
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10}


class MovedWeights:
    """Weights that can be put back to the bit, after whatever was done to them.

    Sharded weights (FSDP2, ZeRO-3) are moved shard by shard. Replicas get the same noise.

    Args:
        model: the live model, prepared by Accelerate.
        parameters: those that will be moved.
        seed: of the noise.
    """

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter], seed: int) -> None:
        self._model = model
        reshard(model)
        self._parameters = parameters
        self._before = [_local(p).detach().to("cpu", copy=True) for p in parameters]
        self.seed = seed

    def _generator(self, index: int, device: torch.device) -> torch.Generator:
        number = hash((self.seed, index, *_shard(self._parameters[index]))) % 2**63
        return torch.Generator(device).manual_seed(number)

    @torch.no_grad()
    def undo(self) -> None:
        """Puts the weights back, to the bit."""
        reshard(self._model)
        for parameter, before in zip(self._parameters, self._before, strict=True):
            _local(parameter).copy_(before)


def trained_finer(model: nn.Module) -> list[nn.Parameter]:
    """The weights that are stored in more than 16 bits, frozen ones included."""
    return [p for p in model.parameters() if p.dtype in (torch.float32, torch.float64)]


class OffGrid(MovedWeights):
    """Moves every weight by up to half a step of the sampler's grid, up or down: to where training leads.

    Frozen weights too, as adapters that are merged into them leave the grid as well. Weights that are stored in 16
    bits stay on their grid in training, and stay where they are here.

    Args:
        model: the live model, prepared by Accelerate.
        seed: of the noise.
        dtype: the grid's, torch.bfloat16 or torch.float16.
    """

    def __init__(self, model: nn.Module, seed: int, dtype: torch.dtype) -> None:
        super().__init__(model, trained_finer(model), seed)
        self.dtype = dtype

    @torch.no_grad()
    def apply(self) -> None:
        """Sets the weights to what they were plus the noise."""
        reshard(self._model)
        for index, parameter in enumerate(self._parameters):
            local = _local(parameter)
            uniform = torch.rand(local.shape, generator=self._generator(index, local.device), device=local.device)
            local.add_((uniform - 0.5) * _steps(local, self.dtype))


def _steps(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbours in the grid of `dtype` at each value; 0 at 0, which stays what it is."""
    exponent = torch.frexp(values.float()).exponent - 1 - _MANTISSA[dtype]
    return torch.where(values == 0, 0.0, torch.ldexp(torch.ones_like(values, dtype=torch.float32), exponent))


def count_on_grid(model: nn.Module, dtype: torch.dtype) -> tuple[int, int]:
    """How many of a sample of this process's weights a cast to `dtype` leaves unchanged, and how large it is."""
    reshard(model)
    locals_ = [_local(parameter).detach().flatten() for parameter in model.parameters()]
    every = max(sum(x.numel() for x in locals_) // GRID_SAMPLE, 1)
    samples = [x[::every].float() for x in locals_ if x.is_floating_point()]
    return sum(int((x == x.to(dtype)).sum()) for x in samples), sum(x.numel() for x in samples)


class Nudge(MovedWeights):
    """Noise on every trainable weight, relative to its tensor's spread, that grows until it would be noticed.

    Args:
        model: the live model, prepared by Accelerate.
        seed: of the noise.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        super().__init__(model, [p for p in model.parameters() if p.requires_grad], seed)
        spreads = [_spread(x) for x in self._before]
        known = [x for x in spreads if x > 0]
        # Tensors without spread, such as norms of ones and LoRA's zeros, get that of the others.
        typical = sum(known) / len(known) if known else 1.0
        self._spreads = [x or typical for x in spreads]
        self.size = 0.0

    @torch.no_grad()
    def grow(self) -> None:
        """Sets the weights to what they were plus noise of twice the size, or the first one."""
        reshard(self._model)
        self.size = 2 * self.size or FIRST_SIZE
        for index, (parameter, before) in enumerate(zip(self._parameters, self._before, strict=True)):
            local = _local(parameter)
            noise = torch.randn(local.shape, generator=self._generator(index, local.device), device=local.device)
            local.copy_(before.to(local.device).float() + self.size * self._spreads[index] * noise)

    def is_enough(self, stale: float, floor: float) -> bool:
        """Whether a dead sync would show, `stale` and `floor` in nats, or the nudge cannot grow further."""
        return stale > max(CONTRAST * floor, MINIMUM) or 2 * self.size > LAST_SIZE or not math.isfinite(stale)


def reshard(model: nn.Module) -> None:
    """FSDP2 leaves the root's weights whole after a forward, and its next forward would not see that a shard moved."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _local(parameter: Any) -> Tensor:
    """The part of a parameter that this process holds."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)


def _shard(parameter: Any) -> tuple[int, ...]:
    """Which shard of a parameter this process holds: equal on replicas, different on shards."""
    if isinstance(parameter, DTensor):
        coordinate: Any = parameter.device_mesh.get_coordinate() or []
        return tuple(c for c, p in zip(coordinate, parameter.placements, strict=True) if p.is_shard())
    if hasattr(parameter, "ds_tensor"):
        return (torch.distributed.get_rank(),)
    return ()


def _spread(values: Tensor) -> float:
    return values.float().std().item() if values.numel() > 1 else 0.0


def fingerprint(model: nn.Module) -> list[tuple[float, float]]:
    """Sum and squared norm of every weight, trained or frozen: enough to see that some of them moved."""
    reshard(model)
    locals_ = [_local(parameter).detach() for parameter in model.parameters()]
    return [(x.sum(dtype=torch.float64).item(), x.float().norm().item() ** 2) for x in locals_]


def moved(before: list[tuple[float, float]], after: list[tuple[float, float]]) -> float:
    """About how far weights moved, relative to their norm; exactly 0 if nothing changed.

    Rounding errors of random sign and relative size e change a tensor's sum by about e times its norm.
    """
    change = sum((new[0] - old[0]) ** 2 for old, new in zip(before, after, strict=True))
    size = sum(norm for _, norm in before)
    return math.sqrt(change / size) if size else 0.0
