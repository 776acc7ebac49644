# SPDX-License-Identifier: Apache-2.0
"""DRPO's weight by hand, and as the gradient of the paper's objective."""

import math

import pytest
import torch

from dc_trl.estimators.drpo import drpo_weight

VALID = torch.tensor([[True, True, True, False]])
# π − μ: 0.25, −0.2, 0, and a token that does not count.
PI = torch.tensor([[0.5, 0.2, 0.3, 1.0]]).log()
MU = torch.tensor([[0.25, 0.4, 0.3, 0.5]]).log()


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        # δ = 0.5. A > 0: 1 − 0.25/0.5, 1 + 0.2/0.5, 1. A < 0: the other way round.
        (3.0, [0.5, 1.4, 1.0, 1.0]),
        (-0.1, [1.5, 0.6, 1.0, 1.0]),
        (0.0, [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_weight_by_hand(advantage: float, expected: list[float]) -> None:
    for advantages in (torch.tensor([advantage]), torch.tensor([[advantage]]), torch.full((1, 4), advantage)):
        weight = drpo_weight(PI, MU, VALID, advantages, limit=0.5)
        torch.testing.assert_close(weight, torch.tensor([expected]))


def test_at_the_limit_the_weight_is_zero_and_beyond_it_turns_round() -> None:
    weight = drpo_weight(PI, MU, VALID, torch.tensor([1.0]), limit=0.25)
    torch.testing.assert_close(weight[0, 0], torch.tensor(0.0), atol=1e-6, rtol=0)
    assert drpo_weight(PI, MU, VALID, torch.tensor([1.0]), limit=0.2)[0, 0] < 0


@pytest.mark.parametrize("advantage", [1.7, -1.7])
def test_it_is_the_gradient_of_the_papers_objective(advantage: float) -> None:
    # d/d log π of ρ A − |A| μ (ρ − 1)² / 2δ, by autograd, is ρ A w.
    log_pi, limit = PI[:, :3].clone().requires_grad_(), 0.3
    ratio = (log_pi - MU[:, :3]).exp()
    objective = ratio * advantage - abs(advantage) * MU[:, :3].exp() * (ratio - 1) ** 2 / (2 * limit)
    objective.sum().backward()
    weight = drpo_weight(log_pi, MU[:, :3], VALID[:, :3], torch.tensor([advantage]), limit)
    assert not weight.requires_grad
    torch.testing.assert_close(log_pi.grad, ratio.detach() * advantage * weight)


@pytest.mark.parametrize("value", [1e4, -1e4, math.nan, math.inf, -math.inf])
def test_what_is_not_valid_weighs_one(value: float) -> None:
    poisoned = [torch.where(VALID, x, value) for x in (PI, MU, torch.ones(1, 4))]
    expected = drpo_weight(PI, MU, VALID, torch.ones(1, 4))
    assert torch.equal(drpo_weight(poisoned[0], poisoned[1], VALID, poisoned[2]), expected)
    nothing = torch.zeros_like(VALID)
    assert torch.equal(drpo_weight(poisoned[0], poisoned[1], nothing, poisoned[2]), torch.ones(1, 4))


def test_the_papers_limit_stays_close_to_one() -> None:
    far, near = torch.tensor([[0.0]]), torch.tensor([[-30.0]])
    valid, sign = torch.tensor([[True]]), torch.tensor([1.0])
    assert float(drpo_weight(far, near, valid, sign)) == pytest.approx(1 - 1 / 12.5)
    assert float(drpo_weight(near, far, valid, sign)) == pytest.approx(1 + 1 / 12.5)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf])
def test_a_limit_that_is_none_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match=f"`limit` is {limit}.*Use e.g. 12.5"):
        drpo_weight(PI, MU, VALID, torch.tensor([1.0]), limit)
