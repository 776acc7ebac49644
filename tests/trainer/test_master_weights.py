# SPDX-License-Identifier: Apache-2.0
"""The optimizer of 16-bit weights: float32 masters step as without it, and the weights are their dithered cast."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dc_trl.rollouts.rounding import Dither
from dc_trl.training.master_weights import MASTER, MasterWeights

DITHER = Dither(3)
RATE = 1e-4


class Model(nn.Module):
    """Two weights in bf16, one of them never used, and a norm in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter((0.1 * torch.randn(300, 200)).bfloat16())
        self.norm = nn.Parameter(torch.ones(200) + 0.1 * torch.randn(200))
        self.unused = nn.Parameter(torch.randn(7).bfloat16())


def model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.1, fused=True)


def wrapped(of: nn.Module, build: Callable[[Any], torch.optim.Optimizer] = adamw, **options: Any) -> MasterWeights:
    return MasterWeights(build(list(of.parameters())), of.named_parameters(), DITHER, **options)


def set_gradients(of: Model, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in (of.matrix, of.norm):
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def steps(of: Model, optimizer: Any, first: int, end: int) -> None:
    for step in range(first, end):
        set_gradients(of, step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "build",
    [
        adamw,
        lambda parameters: torch.optim.AdamW(parameters, lr=RATE, foreach=True),
        lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=0.9),
    ],
    ids=["fused", "foreach", "sgd"],
)
def test_masters_step_as_plain_float32_weights_do(build: Callable[[Any], torch.optim.Optimizer]) -> None:
    live = model()
    optimizer = wrapped(live, build)
    plain = [p.detach().float().clone().requires_grad_() for p in live.parameters()]
    reference = build(plain)
    start = live.matrix.detach().clone()
    for step in range(5):
        set_gradients(live, step)
        # Clipped as a trainer clips: by the norm of the model's gradients, in place.
        norm = nn.utils.clip_grad_norm_(live.parameters(), 0.5)
        assert norm > 0.5
        for mine, theirs in zip(live.parameters(), plain, strict=True):
            theirs.grad = None if mine.grad is None else mine.grad.float()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        assert live.matrix.grad is None
    assert torch.equal(optimizer.state[live.matrix][MASTER], plain[0])
    assert torch.equal(live.norm, plain[1]) and MASTER not in optimizer.state[live.norm]
    assert torch.equal(live.matrix, DITHER.cast(plain[0].detach(), torch.bfloat16, "matrix"))
    assert live.matrix.dtype == live.unused.dtype == torch.bfloat16
    assert live.unused not in optimizer.state
    # Moves of a fifth of a step of bf16 or less, which rounding to nearest would have lost.
    changed = live.matrix != start
    assert 0 < changed.float().mean() < 0.9
    assert (plain[0].detach().bfloat16() != start).sum() < changed.sum()


def test_given_masters_keep_what_the_cast_has_cut_off() -> None:
    live = model()
    exact = 0.1 * torch.randn(300, 200)
    live.matrix.data = DITHER.cast(exact, torch.bfloat16, "matrix")
    masters = {"matrix": exact.clone()}
    optimizer = wrapped(live, lambda p: torch.optim.SGD(p, lr=0.0), masters=masters)
    steps(live, optimizer, 0, 1)
    assert torch.equal(optimizer.state[live.matrix][MASTER], exact)
    assert torch.equal(live.matrix, DITHER.cast(exact, torch.bfloat16, "matrix"))
    assert masters == {}  # held once, not twice


def test_the_rate_of_a_scheduler_reaches_the_masters_through_accelerate() -> None:
    live = model()
    accelerator = Accelerator(cpu=True)
    live, optimizer = accelerator.prepare(live, wrapped(live))
    assert not optimizer.state  # or FSDP2, which puts shards in the place of weights, would leave these behind
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    steps(live, optimizer, 0, 1)
    scheduler.step()
    before = [p.detach().clone() for p in live.parameters()]
    master = optimizer.state[live.matrix][MASTER].clone()
    steps(live, optimizer, 1, 2)
    assert torch.equal(optimizer.state[live.matrix][MASTER], master)
    assert all(torch.equal(now, then) for now, then in zip(live.parameters(), before, strict=True))
    assert optimizer.param_groups[0]["lr"] == 0.0


def saved(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_a_resumed_run_goes_on_to_the_bit() -> None:
    whole, half = model(), model()
    optimizer, first = wrapped(whole), wrapped(half)
    steps(whole, optimizer, 0, 6)
    steps(half, first, 0, 3)
    weights, state = saved(half.state_dict()), saved(first.state_dict())
    resumed = model(seed=1)
    resumed.load_state_dict(weights)
    second = Accelerator(cpu=True).prepare(wrapped(resumed))
    second.load_state_dict(state)
    entry = second.state[resumed.matrix]
    assert {value.dtype for value in entry.values()} == {torch.float32}
    assert torch.equal(entry[MASTER], first.state[half.matrix][MASTER])
    steps(resumed, second, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    for key, value in optimizer.state[whole.matrix].items():
        assert torch.equal(value, second.state[resumed.matrix][key]), key


def test_the_state_of_an_optimizer_without_masters_is_taken_up() -> None:
    live = model()
    plain = adamw(live.parameters())
    steps(live, plain, 0, 2)
    assert plain.state[live.matrix]["exp_avg"].dtype == torch.bfloat16
    optimizer = wrapped(live)
    optimizer.load_state_dict(saved(plain.state_dict()))
    assert torch.equal(optimizer.state[live.matrix]["exp_avg"], plain.state[live.matrix]["exp_avg"].float())
    before = live.matrix.detach().float().clone()
    steps(live, optimizer, 2, 3)
    assert optimizer.state[live.matrix]["step"] == 3
    # The first master was the weight; a step of Adam moves by about the rate, and decays by RATE · 0.1 of the weight.
    moved = (optimizer.state[live.matrix][MASTER] - before).abs()
    assert 0 < moved.max() < 4 * RATE


def test_weights_that_another_hand_has_changed_are_where_the_master_goes_on_from() -> None:
    live = model()
    optimizer = wrapped(live, lambda p: torch.optim.SGD(p, lr=RATE))
    steps(live, optimizer, 0, 2)
    master = optimizer.state[live.matrix][MASTER].clone()
    with torch.no_grad():
        live.matrix.copy_(live.matrix.clone())  # written to, with what was there
    optimizer.param_groups[0]["lr"] = 0.0
    steps(live, optimizer, 2, 3)
    assert torch.equal(optimizer.state[live.matrix][MASTER], master)
    other = torch.randn(300, 200).bfloat16()
    with torch.no_grad():
        live.matrix.copy_(other)
    steps(live, optimizer, 3, 4)
    assert torch.equal(optimizer.state[live.matrix][MASTER], other.float()) and torch.equal(live.matrix, other)


def test_an_optimizer_that_fails_leaves_weights_where_they_belong() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise MemoryError

    live = model()
    optimizer = wrapped(live, lambda p: Failing(p, lr=RATE))
    set_gradients(live, 0)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], live.parameters(), strict=True))


def test_what_masters_cannot_follow_is_refused() -> None:
    class ScheduleFree(torch.optim.SGD):
        def train(self) -> None: ...

    live = model()
    with pytest.raises(ValueError, match="ScheduleFree moves weights between its steps.*adamw_torch_fused.*nearest"):
        wrapped(live, lambda p: ScheduleFree(p, lr=RATE))
    with pytest.raises(ValueError, match="1 of the tensors of SGD are no parameters of the model.*adamw_torch_fused"):
        MasterWeights(torch.optim.SGD([torch.zeros(1)], lr=RATE), live.named_parameters(), DITHER)
    optimizer = wrapped(live)
    with pytest.raises(ValueError, match="no closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(NotImplementedError, match="no more weights"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_the_hooks_of_the_wrapped_optimizer_can_be_set_on_it() -> None:
    live, calls = model(), []
    optimizer = wrapped(live)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    steps(live, optimizer, 0, 2)
    assert calls == [1, 1]


def test_fp16_weights_have_masters_too() -> None:
    live = model().half()
    optimizer = wrapped(live)
    steps(live, optimizer, 0, 2)
    master: Tensor = optimizer.state[live.matrix][MASTER]
    assert master.dtype == torch.float32
    assert torch.equal(live.matrix, DITHER.cast(master, torch.float16, "matrix"))
