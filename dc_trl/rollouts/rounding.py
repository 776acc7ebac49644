# SPDX-License-Identifier: Apache-2.0
"""Rounding that loses nothing on average: a cast with a fixed dither, q(w) = ulp(w) · round(w / ulp(w) + u).

A published checkpoint lies on the bf16 grid. Training moves its weights by far less than the grid's step, so rounding
to the nearest number puts most of them back where they were, and the sampler does not learn what the trainer has
learnt. With u uniform in (−½, ½), drawn once per weight and kept, a weight on the grid stays where it is, a move of δ
flips the weight with probability |δ| / ulp, so the rounded weights follow in expectation from the first update; and
as u is kept, nothing moves from one cast to the next unless the weight did.

u is not stored. It is a hash of the seed, the tensor's name and the element's index in the whole tensor, and so the
same on every rank, after a resume, on any device and for any shard. The hash is the product, modulo 2^16, of two
random odd numbers: one looked up by the low bits of the index, one made from the seed, the name and the rest of the
index. That takes two integer operations an element, where a hash that mixes bits takes eight. (The exclusive or of the
two would save one more, but leave the noise of two blocks correlated by 0.6 instead of 0.01.)
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 1 << 15
"""Elements of a tensor that share the second number: the low 15 bits of the index look up the first."""

NOISE_STEPS = 1 << 16
"""u + ½ is an odd multiple of 1 / NOISE_STEPS, so |u| < ½ strictly and its mean is 0."""

# Elements rounded at once: large enough to hide what calling an operation costs, small enough that the temporary
# numbers stay in a core's cache.
_PIECE_PER_THREAD = 4 * BLOCK
_PIECE_ON_ACCELERATOR = 512 * BLOCK

# Bits of the mantissa that are stored, and exponent of the smallest normal number.
_FORMATS = {torch.float16: (10, -14), torch.float8_e4m3fn: (3, -6)}
_FLOAT32_EXPONENT = 0x7F800000


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
        source = weight.reshape(-1)
        for low, high, steps in self._steps(name, source, start):
            _round_piece(out.view(-1)[low:high], source[low:high].float(), steps)
        return out

    def noise(self, weight: Tensor, name: str, start: int | Tensor = 0) -> Tensor:
        """u for each element of `weight`: float32, of its shape, in (−½, ½). For codes: `round(codes + u)`."""
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        for low, high, steps in self._steps(name, weight.reshape(-1), start):
            torch.mul(steps, 1 / NOISE_STEPS, out=out.view(-1)[low:high]).sub_(0.5)
        return out

    def _steps(self, name: str, flat: Tensor, start: int | Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Yield `(low, high, (u + ½) · NOISE_STEPS)` for the pieces of a flattened tensor; the int32 one is reused."""
        key = _name_key(self.seed, name)
        table = _table(flat.device)
        size = _piece_size(flat.device)
        if isinstance(start, Tensor):
            yield from _steps_at(start.reshape(-1), key, table, size)
            return
        end = start + flat.numel()
        first = start // BLOCK
        keys, numbers = _block_keys(key, first, -(-end // BLOCK), flat.device)
        buffer = torch.empty(min(size, flat.numel()), dtype=torch.int32, device=flat.device)
        for low, high in _pieces(start, end, size):
            steps = buffer[: high - low]
            block, offset = divmod(low, BLOCK)
            if (high - low) % BLOCK == 0:
                rows = (high - low) // BLOCK
                torch.mul(table, keys[block - first : block - first + rows, None], out=steps.view(rows, BLOCK))
            else:
                torch.mul(table[offset : offset + high - low], numbers[block - first], out=steps)
            yield low - start, high - start, steps.bitwise_and_(NOISE_STEPS - 1)


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
        noise: u, broadcastable to `values`, with 13 bits after the point for float16 and up to 20 for float8_e4m3fn,
            so that float32 holds value / step + u and what lies on the grid stays there.
        dtype: float16 or float8_e4m3fn.
    """
    mantissa, least = _FORMATS[dtype]
    power = values.view(torch.int32).bitwise_and(_FLOAT32_EXPONENT).view(torch.float32)  # 2^⌊log2 |value|⌋
    step = power.clamp_(min=2.0**least).mul_(2.0**-mantissa)
    return torch.div(values, step).add_(noise).round_().mul_(step)


def _round_piece(out: Tensor, values: Tensor, steps: Tensor) -> None:
    """Round float32 `values` (n,) into `out` (n,); `steps` (n,) is (u + ½) · NOISE_STEPS and is overwritten."""
    if out.dtype == torch.bfloat16:
        # bfloat16 is the upper half of a float32, so the lower half, as an integer, is the distance to the grid in
        # units of 1 / NOISE_STEPS of its step: adding u + ½ there and cutting it off rounds w / ulp + u to nearest.
        # Magnitudes are rounded, so it is symmetric; a lower half of 0 never carries into the upper one.
        steps.add_(values.view(torch.int32)).bitwise_and_(-NOISE_STEPS)
        out.copy_(steps.view(torch.float32))
    else:
        # 13 bits of u: as many as float32 can add to a float16 without rounding the sum.
        noise = steps.bitwise_right_shift_(3).bitwise_or_(1).mul(2.0**-13).sub_(0.5)
        out.copy_(round_to_format(values, noise, out.dtype))
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


def _pieces(begin: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """Split [begin, end) into pieces of at most `size`: whole blocks, and a part of one block at either end."""
    while begin < end:
        if begin % BLOCK or end - begin < BLOCK:
            stop = min(end, (begin // BLOCK + 1) * BLOCK)
        else:
            stop = min(begin + size, end // BLOCK * BLOCK)
        yield begin, stop
        begin = stop


def _steps_at(indices: Tensor, key: int, table: Tensor, size: int) -> Iterator[tuple[int, int, Tensor]]:
    for low in range(0, len(indices), size):
        piece = indices[low : low + size].to(table.device)
        keys = _odd_16_bits(_mix(piece // BLOCK + key))
        yield low, low + len(piece), (table[piece % BLOCK] * keys) & (NOISE_STEPS - 1)


def _piece_size(device: torch.device) -> int:
    return _PIECE_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else _PIECE_ON_ACCELERATOR


@lru_cache(maxsize=8)
def _table(device: torch.device) -> Tensor:
    """Odd numbers for the low bits of an index, int32 (BLOCK,)."""
    return _odd_16_bits(_mix(torch.arange(BLOCK, dtype=torch.int64))).to(device)


@lru_cache(maxsize=4096)
def _block_keys(key: int, first: int, end: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """Odd numbers for the blocks [first, end) of a tensor: int32 on `device`, and the same for Python."""
    keys = _odd_16_bits(_mix(torch.arange(first, end, dtype=torch.int64) + key))
    return keys.to(device), keys.tolist()


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


def _odd_16_bits(numbers: Tensor) -> Tensor:
    return (numbers >> 48).to(torch.int32) | 1
