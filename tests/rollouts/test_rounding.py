# SPDX-License-Identifier: Apache-2.0
"""The dithered cast: exact on the grid, unbiased, the same everywhere, and safe at the ends of the range."""

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dc_trl.rollouts import rounding
from dc_trl.rollouts.quantization import fake_quantize
from dc_trl.rollouts.rounding import BLOCK, NOISE_STEPS, PLACES, Dither, is_coarser, round_to_format

CASTS = [torch.bfloat16, torch.float16]
EDGES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7]


def on_grid(dtype: torch.dtype, count: int = 50_000) -> Tensor:
    """Float32 numbers of every binade that `dtype` can hold exactly, powers of two and subnormal ones among them."""
    generator = torch.Generator().manual_seed(0)
    least = int(math.log2(torch.finfo(dtype).smallest_normal)) - 3
    exponents = torch.randint(max(least, -126), 16, (count,), generator=generator)
    mantissas = 1 + torch.rand(count, generator=generator)
    mantissas[::7] = 1.0
    mantissas[::11] = 0.0
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    values = (signs * mantissas * torch.exp2(exponents.float())).to(dtype)
    return values.float()


@pytest.mark.parametrize("dtype", CASTS)
def test_what_lies_on_the_grid_stays_there(dtype: torch.dtype) -> None:
    weight = on_grid(dtype)
    for seed in range(5):
        assert torch.equal(Dither(seed).cast(weight, dtype, "w").float(), weight)


def test_worked_by_hand() -> None:
    # 1 + 2^-9 lies a quarter of the way from 1 to the next bfloat16, 1 + 2^-7: round(128.25 + u) is 129 where u > 1/4.
    weight = torch.full((100_000,), 1 + 2.0**-9)
    dither = Dither(3)
    up = dither.noise(weight, "w") > 0.25
    assert torch.equal(dither.cast(weight, torch.bfloat16, "w").float(), torch.where(up, 1 + 2.0**-7, 1.0))
    assert 0.24 < up.float().mean() < 0.26
    # Magnitudes are rounded: the mirror image of a weight goes to the mirror image.
    assert torch.equal(dither.cast(-weight, torch.bfloat16, "w"), -dither.cast(weight, torch.bfloat16, "w"))


@pytest.mark.parametrize("dtype", CASTS)
@pytest.mark.parametrize("scale", [1.0, 2e-2, 3e-6, 1e-8])
@pytest.mark.parametrize("outwards", [False, True], ids=["signed", "magnitude"])
def test_unbiased(dtype: torch.dtype, scale: float, outwards: bool) -> None:
    """Σ (q − w) over its standard deviation is a standard normal number: over n seeds their sum is within 3 √n."""
    scores = []
    for seed in range(10):
        weight = scale * torch.randn(200_000, generator=torch.Generator().manual_seed(seed))
        error = Dither(seed).cast(weight, dtype, f"layer.{seed}").double() - weight.double()
        # Each number lies between two of the grid, at the fraction f: the error's variance is step² f (1 − f).
        magnitude = weight.double().abs()
        step = torch.exp2(torch.floor(torch.log2(magnitude.clamp(min=torch.finfo(dtype).smallest_normal))))
        step *= torch.finfo(dtype).eps
        fraction = (magnitude / step) % 1
        deviation = (step**2 * fraction * (1 - fraction)).sum().sqrt()
        scores.append(float((error * weight.sign() if outwards else error).sum() / deviation))
        assert 0.95 < error.norm() / deviation < 1.05
    assert abs(sum(scores)) < 3 * math.sqrt(len(scores))


@pytest.mark.parametrize("fraction", [0.45, 0.045, 0.0036])
def test_a_small_move_arrives_in_expectation_and_nearest_loses_it(fraction: float) -> None:
    """Of weights moved by the fraction f of a step, f flip, by a whole step; rounding to nearest moves none."""
    weight = on_grid(torch.bfloat16, 400_000).abs().clamp(1e-3, 1.0).bfloat16().float()
    ulp = torch.exp2(torch.floor(torch.log2(weight))) / 128
    moved = weight + fraction * ulp
    flips = [((Dither(s).cast(moved, torch.bfloat16, "w").float() - weight) / ulp).double() for s in range(5)]
    assert all(set(flip.unique().tolist()) == {0.0, 1.0} for flip in flips)
    mean = torch.stack(flips).mean().item()
    assert mean == pytest.approx(fraction, abs=3 * math.sqrt(fraction / (5 * len(weight))))
    assert torch.equal(moved.bfloat16().float(), weight)


def test_noise_is_uniform_centred_and_never_a_half() -> None:
    weight = torch.empty(2**20)
    noise = Dither(0).noise(weight, "w")
    assert noise.abs().max() < 0.5
    counts = torch.histc(noise, bins=64, min=-0.5, max=0.5)
    expected = len(weight) / 64
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 63 + 4 * math.sqrt(2 * 63)
    assert abs(float(noise.mean())) < 4 / math.sqrt(12 * len(weight))


def test_names_blocks_rows_and_seeds_share_no_noise() -> None:
    weight = torch.empty(8, BLOCK)
    noise = Dither(0).noise(weight, "a")
    columns = torch.cat([noise, Dither(0).noise(weight, "b"), Dither(1).noise(weight, "a")])
    correlation = (torch.corrcoef(columns) - torch.eye(len(columns))).square().mean().sqrt()
    assert correlation < 0.004  # of independent numbers: 1 / √BLOCK = 0.002
    # Neighbours within a block, at the strides that rows of common widths have.
    flat = noise.reshape(-1)
    for stride in (1, 2, 64, 576, 1024, 4096):
        pairs = torch.stack([flat[:-stride], flat[stride:]])
        assert torch.corrcoef(pairs)[0, 1].abs() < 0.005  # of independent numbers: 1 / √PLACES = 0.001


@pytest.mark.parametrize("start", EDGES)
@pytest.mark.parametrize("length", [1, 5, BLOCK - 1, BLOCK, 3 * BLOCK + 11])
def test_a_shard_is_rounded_as_its_part_of_the_whole(start: int, length: int) -> None:
    weight = 0.02 * torch.randn(7 * BLOCK + 3, generator=torch.Generator().manual_seed(0))
    dither = Dither(7)
    whole = dither.cast(weight, torch.bfloat16, "w")
    part = slice(start, start + length)
    assert torch.equal(dither.cast(weight[part], torch.bfloat16, "w", start), whole[part])
    assert torch.equal(
        dither.cast(weight[part], torch.bfloat16, "w", torch.arange(start, start + length)), whole[part]
    )
    assert torch.equal(dither.noise(weight[part], "w", start), dither.noise(weight, "w")[part])


@pytest.mark.parametrize("dtype", CASTS)
def test_a_shard_of_columns_and_a_strided_tensor(dtype: torch.dtype) -> None:
    weight = 0.02 * torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    dither = Dither(7)
    whole = dither.cast(weight, dtype, "w")
    indices = torch.arange(weight.numel()).view_as(weight)[:, 100:200]
    assert torch.equal(dither.cast(weight[:, 100:200], dtype, "w", indices), whole[:, 100:200])
    out = torch.zeros(400, 300, dtype=dtype).T
    assert torch.equal(dither.cast_into(out, weight.T.contiguous().T, "w"), whole)


def test_the_number_of_threads_and_a_second_call_change_nothing() -> None:
    weight = 0.02 * torch.randn(4 * BLOCK + 5, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    expected = Dither(1).cast(weight, torch.bfloat16, "w")
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(Dither(1).cast(weight, torch.bfloat16, "w"), expected)
    finally:
        torch.set_num_threads(threads)


def test_stretches_that_are_rounded_together_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = 0.02 * torch.randn(4 * BLOCK + 5, generator=torch.Generator().manual_seed(0))
    expected = Dither(1).cast(weight, torch.bfloat16, "w", 11)
    monkeypatch.setattr(rounding, "_at_once", lambda device: 5)  # as on accelerators
    assert torch.equal(Dither(1).cast(weight, torch.bfloat16, "w", 11), expected)


def mixed(numbers: Any) -> Any:
    """SplitMix64's finaliser on numpy's unsigned integers."""
    numbers = np.asarray(numbers, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def test_the_noise_is_fixed_for_good() -> None:
    """A resumed run must meet the noise it began with, whatever was updated in between."""
    name = "model.layers.0.mlp.down_proj.weight"
    steps = (Dither(42).noise(torch.empty(BLOCK + 3), name) + 0.5) * NOISE_STEPS
    key = int.from_bytes(hashlib.blake2b(f"42/{name}".encode(), digest_size=8).digest(), "little") >> 2
    table = 2 * np.argsort(mixed(np.arange(PLACES + BLOCK)).view(np.int64)) % NOISE_STEPS + 1
    indices = np.array([0, 1, 2, BLOCK, BLOCK + 1, BLOCK + 2])
    places = mixed(indices // BLOCK + key) % np.uint64(PLACES) + (indices % BLOCK).astype(np.uint64)
    assert steps[indices].tolist() == table[places].tolist() == [32627, 5525, 34163, 56453, 32571, 49713]


def test_every_number_of_the_table_comes_as_often() -> None:
    counts = rounding._table(torch.device("cpu")).bincount()
    assert counts[::2].unique().tolist() == [0] and counts[1::2].unique().tolist() == [40]


@pytest.mark.parametrize("dtype", CASTS)
def test_the_ends_of_the_range(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    patterns = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    special = torch.tensor([math.inf, -math.inf, 0.0, -0.0, largest, -largest])
    # Above the largest number, yet nearer to it than to the next that the format would have.
    above = torch.tensor([largest]).double() * (1 + torch.finfo(dtype).eps / 8)
    beyond = torch.tensor([largest]).double() * (1 + torch.finfo(dtype).eps)
    weight = torch.cat([patterns, special, above.float(), beyond.float()]).repeat(500)
    for seed in range(5):
        rounded = Dither(seed).cast(weight, dtype, "w")
        expected = weight.to(dtype)
        nan = expected.isnan()
        assert torch.equal(rounded.isnan(), nan)
        assert torch.equal(rounded[~nan], expected[~nan])
        assert torch.equal(Dither(seed).cast(torch.zeros(2 * BLOCK), dtype, "w"), torch.zeros(2 * BLOCK, dtype=dtype))


@pytest.mark.parametrize(
    ("trained", "served"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")]
)
def test_a_cast_that_rounds_nothing_is_a_copy(trained: str, served: str) -> None:
    weight = torch.randn(1000).to(getattr(torch, trained))
    assert torch.equal(Dither(0).cast(weight, getattr(torch, served), "w"), weight.to(getattr(torch, served)))
    assert is_coarser(torch.bfloat16, torch.float16) and not is_coarser(torch.int64, torch.float32)


def test_casts_that_are_not_known_are_refused() -> None:
    with pytest.raises(ValueError, match="'w'.*float8_e4m3fn.*bfloat16"):
        Dither(0).cast(torch.randn(4), torch.float8_e4m3fn, "w")
    with pytest.raises(ValueError, match=r"'w'.*\(4,\).*\(2, 2\)"):
        Dither(0).cast_into(torch.empty(2, 2, dtype=torch.bfloat16), torch.randn(4), "w")


def test_fp8_codes_by_hand() -> None:
    # Between 16 and 32 the grid of e4m3 has the step 2; below 2^-6 the step 2^-9.
    values = torch.tensor([16.0, 17.0, 17.0, -17.0, 448.0, 1.5 * 2.0**-9, 1.5 * 2.0**-9])
    noise = torch.tensor([-0.49, -0.25, 0.25, 0.25, 0.49, -0.25, 0.25])
    # A negative value is rounded as a number, not as a magnitude: −8.5 + 0.25 goes to −8.
    expected = torch.tensor([16.0, 16.0, 18.0, -16.0, 448.0, 2.0**-9, 2.0**-8])
    assert torch.equal(round_to_format(values, noise, torch.float8_e4m3fn), expected)


@pytest.mark.parametrize("precision", ["fp8", "int8", "int4", "int3"])
def test_codes_are_dithered_without_bias_on_the_grid_of_nearest(precision: str) -> None:
    weight = 0.02 * torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    scores = []
    for seed in range(20):
        error = fake_quantize(weight, precision, noise=Dither(seed).noise(weight, "w")) - weight
        scores.append(float(error.sum() / error.norm()))
    assert abs(sum(scores)) < 3 * math.sqrt(len(scores))
    nearest = fake_quantize(weight, precision)
    # What is a code's value already is kept, the largest of each group among them; and so is the scale.
    again = fake_quantize(nearest, precision, noise=Dither(0).noise(weight, "w"))
    torch.testing.assert_close(again, nearest, rtol=1e-6, atol=0)
    # E[e²] of the dither is step²/6, of rounding to nearest step²/12.
    assert error.norm() / (nearest - weight).norm() == pytest.approx(math.sqrt(2), rel=0.05)


def test_int8_codes_by_hand() -> None:
    # Scale 1: 127 / 127. round(2.4 + 0.2) = 3, round(-2.4 + 0.2) = -2, and the largest code stays.
    weight = torch.tensor([[127.0, 2.4, -2.4, 0.0]])
    noise = torch.tensor([[0.49, 0.2, 0.2, -0.49]])
    assert fake_quantize(weight, "int8", noise=noise).tolist() == [[127.0, 3.0, -2.0, 0.0]]
