# SPDX-License-Identifier: Apache-2.0
"""The share of an update that the deployed weights have: worked by hand, sampled, and across a resume."""

import time

import pytest
import torch
from torch import Tensor

from dc_trl.rollouts.rounding import Dither
from dc_trl.rollouts.update_seen import SAMPLE_LIMIT, UpdateSeen


def sync(meter: UpdateSeen, **tensors: tuple[Tensor, Tensor]) -> dict[str, float]:
    for name, (trained, deployed) in tensors.items():
        meter.observe(name, trained, deployed)
    return meter.finish()


def test_worked_by_hand() -> None:
    meter = UpdateSeen({"w": 4})
    zero = torch.zeros(2, 2)
    assert sync(meter, w=(zero, zero)) == {}
    # Δtrained = (1, 2, 0, 0), Δdeployed = (2, 1, 0, 5): (1·2 + 2·1) / (1 + 4) = 0.8, three of four changed.
    first = (torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[2.0, 1.0], [0.0, 5.0]]))
    expected = {"update_seen": 0.8, "update_seen_since_start": 0.8, "changed": 0.75}
    assert sync(meter, w=first) == pytest.approx(expected)
    # Since the last sync: Δtrained = (0, 0, 2, 0), Δdeployed = (0, 0, 1, 0): 1 · 2 / 4 = 0.5.
    # Since the start: Δtrained = (1, 2, 2, 0), Δdeployed = (2, 1, 1, 5): (2 + 2 + 2) / 9.
    second = (torch.tensor([[1.0, 2.0], [2.0, 0.0]]), torch.tensor([[2.0, 1.0], [1.0, 5.0]]))
    expected = {"update_seen": 0.5, "update_seen_since_start": 6 / 9, "changed": 0.25}
    assert sync(meter, w=second) == pytest.approx(expected)
    # Nothing was trained, and yet a deployed weight moved: there is no share, but a fraction that changed.
    third = (second[0], second[1] + torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    expected = {"update_seen_since_start": (2 + 4 + 2) / 9, "changed": 0.25}
    assert sync(meter, w=third) == pytest.approx(expected)


def test_what_is_deployed_to_the_bit_is_seen_whole() -> None:
    meter = UpdateSeen({"a": 5000, "b": 7})
    for _ in range(3):
        a, b = torch.randn(50, 100), torch.randn(7)
        metrics = sync(meter, a=(a, a.clone()), b=(b, b))
    assert metrics == {"update_seen": 1.0, "update_seen_since_start": 1.0, "changed": 1.0}


@pytest.mark.parametrize("fraction", [0.4, 0.1])
def test_nearest_loses_a_move_of_less_than_half_a_step_and_dither_does_not(fraction: float) -> None:
    start = 0.02 * torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    start = start.bfloat16().float()
    step = torch.exp2(torch.floor(torch.log2(start.abs().clamp(min=1e-30)))) / 128
    moved = start + fraction * step
    seen = {}
    for name in ("nearest", "dithered"):
        meter = UpdateSeen({"w": start.numel()}, limit=SAMPLE_LIMIT)
        for trained in (start, moved):
            deployed = Dither(0).cast(trained, torch.bfloat16, "w") if name == "dithered" else trained.bfloat16()
            metrics = sync(meter, w=(trained, deployed))
        seen[name] = metrics["update_seen"]
    assert seen["nearest"] < 0.01
    assert 0.95 < seen["dithered"] < 1.05
    assert metrics["changed"] == pytest.approx(fraction, rel=0.05)


def test_a_small_sample_of_a_large_model_stands_for_it() -> None:
    generator = torch.Generator().manual_seed(0)
    # Half of each matrix's columns get their update, the others do not: the whole has the share 0.5.
    start = {f"layer.{i}": torch.randn(576, 576, generator=generator) for i in range(20)}
    meter = UpdateSeen({name: tensor.numel() for name, tensor in start.items()}, limit=50_000)
    sync(meter, **{name: (tensor, tensor) for name, tensor in start.items()})
    trained = {name: torch.randn(576, 576, generator=generator) for name in start}
    half = (torch.arange(576) < 288).float()
    moves = {name: (start[name] + trained[name], start[name] + half * trained[name]) for name in start}
    metrics = sync(meter, **moves)
    assert metrics["update_seen"] == pytest.approx(0.5, abs=0.02)
    assert metrics["changed"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("kinds", range(2, 14))
def test_the_sample_has_tensors_of_every_size_however_a_layer_is_built(kinds: int) -> None:
    """Matrices count as much as they have weights: a sample of norms alone would see all of an update in fp8."""
    layer = {"norm": 576, "up": 576 * 1536} | {f"matrix{i}": 576 * 576 for i in range(kinds - 2)}
    sizes = {"embedding": 49152 * 576} | {f"{n}.{kind}": size for n in range(30) for kind, size in layer.items()}
    meter = UpdateSeen(sizes)
    counted = dict.fromkeys(["embedding", "norm", "up", "matrix"], 0)
    for name, runs in meter._runs.items():
        counted[next(kind for kind in counted if kind in name)] += runs.count
    for kind, count in counted.items():
        expected = sum(size for name, size in sizes.items() if kind in name) / sum(sizes.values())
        assert count / meter._trained.numel() == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(
    "sizes", [{"a": 134_000_000}, {f"{i}": 10**9 for i in range(300)}, {f"{i}": 3 for i in range(500)}]
)
def test_the_sample_stays_within_its_limit(sizes: dict[str, int]) -> None:
    meter = UpdateSeen(sizes)
    assert 0 < meter._trained.numel() <= SAMPLE_LIMIT
    assert 1 <= sum(map(meter.wants, sizes)) <= 32


def test_a_resumed_run_counts_from_the_start() -> None:
    first, moves = UpdateSeen({"w": 100}), torch.randn(3, 100)
    zero = torch.zeros(100)
    sync(first, w=(zero, zero))
    sync(first, w=(moves[0], 0.5 * moves[0]))
    expected = sync(first, w=(moves[1], moves[1]))
    resumed = UpdateSeen({"w": 100})
    resumed.load_state_dict(first.state_dict())
    assert sync(resumed, w=(moves[0], 0.5 * moves[0])) == {}
    assert sync(resumed, w=(moves[1], moves[1])) == expected
    other = UpdateSeen({"w": 50})
    other.load_state_dict(first.state_dict())
    assert other.state_dict() == {} == UpdateSeen({"w": 3}).state_dict()


def test_the_sample_costs_little_beside_a_copy() -> None:
    shapes = {f"layer.{i}": (1024, 1024) for i in range(40)}
    tensors = {name: (torch.randn(shape), torch.randn(shape)) for name, shape in shapes.items()}
    meter = UpdateSeen({name: trained.numel() for name, (trained, _) in tensors.items()})
    sync(meter, **tensors)

    def seconds(work: object) -> float:
        assert callable(work)
        times = []
        for _ in range(7):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return min(times)

    copied = seconds(lambda: [deployed.copy_(trained) for trained, deployed in tensors.values()])
    assert seconds(lambda: sync(meter, **tensors)) < 0.5 * copied
