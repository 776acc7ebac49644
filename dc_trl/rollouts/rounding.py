# SPDX-License-Identifier: Apache-2.0
"""Rounding that loses nothing on average: a cast with a fixed dither, q(w) = ulp(w) · round(w / ulp(w) + u).

A published checkpoint lies on the bf16 grid. Training moves its weights by far less than the grid's step, so rounding
to the nearest number puts most of them back where they were, and the sampler does not learn what the trainer has
learnt. With u uniform in (−½, ½), drawn once per weight and kept, a weight on the grid stays where it is, a move of δ
flips the weight with probability |δ| / ulp, so the rounded weights follow in expectation from the first update; and
as u is kept, nothing moves from one cast to the next unless the weight did.

u is not stored. It is a function of the seed, the tensor's name and the element's index in the whole tensor, and so
the same on every rank, after a resume, on any device and for any shard. One table of numbers in random order, fixed
for good, serves all tensors; a hash of seed, name and block of the index says where in it a block of a tensor begins
to read. So noise costs no arithmetic, where a hash that mixes bits takes eight operations an element. The price: two
blocks may read stretches that overlap, and then an element of the one has its u in common with one of the other, at a
distance. Within a block, which holds neighbouring rows of a matrix, no number is read twice.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import torch
from torch import Tensor

BLOCK = 1 << 18
"""Elements of a tensor that read one stretch of the table."""

PLACES = 1 << 20
"""Where in the table a stretch may begin."""

NOISE_STEPS = 1 << 16
"""u + ½ is an odd multiple of 1 / NOISE_STEPS, so |u| < ½ strictly and its mean is 0."""

# Elements rounded at once: large enough to hide what calling an operation costs, small enough that the temporary
# numbers stay in a core's cache.
_PIECE_PER_THREAD = 1 << 16

# Bits of the mantissa that are stored, and exponent of the smallest normal number.
_FORMATS = {torch.float8_e4m3fn: (3, -6)}
_FLOAT32_EXPONENT = 0x7F800000
# The smallest normal number of float32 over that of float16.
_TO_SUBNORMAL = 2.0 ** (-126 + 14)


@dataclass(frozen=True)
class Dither:
    """Rounds weights with a dither that is a function of `seed`, the tensor's name and the element's index alone.

    Where only a shard of a tensor is at hand, `start` says where its elements stand in the whole tensor, flattened:
    the index of the first one if they are consecutive (a shard along the first dimension), or an int64 tensor of the
    shard's shape with the index of each.

    Attributes:
        seed: any integer; the same for all ranks and for the whole of a run.
    """

    seed: int = 0

    def cast(self, weight: Tensor, dtype: torch.dtype, name: str, start: int | Tensor = 0) -> Tensor:
        """A new tensor of `dtype` with the shape of `weight`; see `cast_into`."""
        return self.cast_into(torch.empty_like(weight, dtype=dtype), weight, name, start)

    @torch.no_grad()
    def cast_into(self, out: Tensor, weight: Tensor, name: str, start: int | Tensor = 0) -> Tensor:
        """Round `weight` into `out`, and return `out`.

        Weights that `out` can hold exactly are copied: always where its dtype is as fine as the weight's, or where it
        is not floating. Infinities and NaN stay what they are, and a finite weight becomes infinite only where
        rounding to nearest makes it so (or, in bfloat16, above 3.38e38).

        Args:
            out: bfloat16 or float16, or a dtype as fine as the weight's; its shape is the weight's.
            weight: any floating dtype, on any device; only read.
            name: of the whole tensor, in the plain model.
            start: where the elements stand in the whole tensor.

        Raises:
            ValueError: for a coarser dtype that this cast does not know, or for shapes that differ.
        """
        if out.shape != weight.shape:
            raise ValueError(
                f"{name!r} has the shape {tuple(weight.shape)} and cannot be cast into {tuple(out.shape)}."
            )
        if not is_coarser(out.dtype, weight.dtype):
            return out.copy_(weight)
        if out.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"{name!r} cannot be dithered to {out.dtype}: use torch.bfloat16 or torch.float16.")
        if not out.is_contiguous() or out.device != weight.device:
            return out.copy_(self.cast(weight.contiguous(), out.dtype, name, start))
        source, target = weight.reshape(-1), out.view(-1)
        for low, high, steps in self._steps(name, source, start):
            _round_piece(target[low:high], source[low:high].float(), steps)
        return out

    def noise(self, weight: Tensor, name: str, start: int | Tensor = 0) -> Tensor:
        """u for each element of `weight`: float32, of its shape, in (−½, ½). For codes: `round(codes + u)`."""
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        for low, high, steps in self._steps(name, weight.reshape(-1), start):
            torch.mul(steps, 1 / NOISE_STEPS, out=out.view(-1)[low:high]).sub_(0.5)
        return out

    def _steps(self, name: str, flat: Tensor, start: int | Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Yield `(low, high, (u + ½) · NOISE_STEPS)`, int32 and only to read, for the pieces of a flattened tensor."""
        key = _name_key(self.seed, name)
        table = _table(flat.device)
        size = _PIECE_PER_THREAD * torch.get_num_threads() if flat.device.type == "cpu" else BLOCK
        if isinstance(start, Tensor):
            indices = start.reshape(-1).to(flat.device)
            for low in range(0, len(indices), size):
                piece = indices[low : low + size]
                yield low, low + len(piece), table[_places(key, piece // BLOCK) + piece % BLOCK]
            return
        stretches = _stretches(key, start, flat.numel(), size)
        low = 0
        while group := list(islice(stretches, _at_once(flat.device))):
            parts = [table[place : place + length] for place, length in group]
            steps = parts[0] if len(parts) == 1 else torch.cat(parts)
            yield low, low + len(steps), steps
            low += len(steps)


@lru_cache(maxsize=64)
def is_coarser(dtype: torch.dtype, than: torch.dtype) -> bool:
    """Whether a cast of `than` to `dtype` rounds: both are floating, and some number of `than` is none of `dtype`."""
    if not (dtype.is_floating_point and than.is_floating_point) or dtype == than:
        return False
    # torch promotes no 8-bit formats: the others hold all of their numbers, and they some of each other's.
    return dtype.itemsize == 1 or (than.itemsize > 1 and torch.promote_types(dtype, than) != dtype)


def round_to_format(values: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 `values` to the grid of `dtype`, step · round(value / step + u), and return them in float32.

    Args:
        values: within the range of `dtype`.
        noise: u, broadcastable to `values`, with up to 20 bits after the point, so that float32 holds value / step + u
            and what lies on the grid stays there.
        dtype: float8_e4m3fn.
    """
    mantissa, least = _FORMATS[dtype]
    power = values.view(torch.int32).bitwise_and(_FLOAT32_EXPONENT).view(torch.float32)  # 2^⌊log2 |value|⌋
    step = power.clamp_(min=2.0**least).mul_(2.0**-mantissa)
    return torch.div(values, step).add_(noise).round_().mul_(step)


def _round_piece(out: Tensor, values: Tensor, steps: Tensor) -> None:
    """Round float32 `values` (n,) into `out` (n,); `steps` (n,) is (u + ½) · NOISE_STEPS."""
    # Of a float32 as an integer, the lower bits, for which the format has no room, are the distance to the grid:
    # adding u + ½ there and cutting them off rounds w / ulp + u to nearest. Magnitudes are rounded, so it is
    # symmetric; lower bits of 0 never carry into the upper ones.
    if out.dtype == torch.bfloat16:
        bits = torch.add(values.view(torch.int32), steps)
        out.copy_(bits.bitwise_and_(-NOISE_STEPS).view(torch.float32))
    else:
        # Scaled so that float32's subnormal numbers, whose steps are equal, lie where float16's do. 13 bits are cut
        # off, and as many of u are added. (With `torch.set_flush_denormal(True)`, weights below 2^-14 become 0.)
        bits = (values * _TO_SUBNORMAL).view(torch.int32).add_(steps.bitwise_right_shift(3).bitwise_or_(1))
        out.copy_(bits.bitwise_and_(-(1 << 13)).view(torch.float32).mul_(1 / _TO_SUBNORMAL))
    # Where looking would stall the device, the values out of range are always mended, elsewhere only if there are any.
    if out.device.type != "cpu" or not _all_within(values, out.dtype):
        nearest = values.to(out.dtype)
        torch.where(nearest.isfinite() & out.isfinite(), out, nearest, out=out)


def _all_within(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether all values are finite and far from the largest number of `dtype`; False if in doubt."""
    if dtype == torch.bfloat16:
        # In a third of the time that looking at every value takes: not finite if one of them is not.
        return abs(float(values.sum())) < 1e30
    return float(torch.dot(values, values)) < torch.finfo(dtype).max ** 2


def _stretches(key: int, start: int, count: int, size: int) -> Iterator[tuple[int, int]]:
    """Place in the table and length, at most `size`, of the stretches for `count` elements from `start` on."""
    end = start + count
    first = start // BLOCK
    places = _block_places(key, first, -(-end // BLOCK))
    while start < end:
        block, offset = divmod(start, BLOCK)
        length = min(size, BLOCK - offset, end - start)
        yield places[block - first] + offset, length
        start += length


def _at_once(device: torch.device) -> int:
    """Stretches that are rounded together: on accelerators, where launching a kernel costs more than its work."""
    return 1 if device.type == "cpu" else 64


@lru_cache(maxsize=8)
def _table(device: torch.device) -> Tensor:
    """Odd numbers below NOISE_STEPS, int32 (PLACES + BLOCK,): each as often as any other, in a random order."""
    order = torch.argsort(_mix(torch.arange(PLACES + BLOCK, dtype=torch.int64)))  # of numbers that all differ
    return (2 * order % NOISE_STEPS + 1).to(torch.int32).to(device)


@lru_cache(maxsize=4096)
def _block_places(key: int, first: int, end: int) -> list[int]:
    """Where in the table the blocks [first, end) of a tensor begin."""
    return _places(key, torch.arange(first, end, dtype=torch.int64)).tolist()


def _places(key: int, blocks: Tensor) -> Tensor:
    return _mix(blocks + key) & (PLACES - 1)


@lru_cache(maxsize=4096)
def _name_key(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    # Half the range, so that adding the number of a block does not overflow.
    return int.from_bytes(digest, "little") >> 2


def _mix(numbers: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014) on int64 numbers, which wrap as unsigned ones do."""
    numbers = numbers + -0x61C8864680B583EB
    numbers = (numbers ^ _shifted(numbers, 30)) * -0x40A7B892E31B1A47
    numbers = (numbers ^ _shifted(numbers, 27)) * -0x6B2FB644ECCEEE15
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Right shift that fills with zeros; torch's own fills an int64 with its sign."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
