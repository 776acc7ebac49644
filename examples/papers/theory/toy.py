# SPDX-License-Identifier: Apache-2.0
"""The one-state toy of DC-GRPO's appendix B.2 (figures 6 and 7): what each penalty makes of the same advantages.

Six actions pair a high, a medium and a low probability with an advantage of either sign. The paper's numbers were lost
from its text: these are ours. For each model λ is such that the penalty D(π, μ) spends the same budget.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from papers.theory.optima import MODELS, bisect, lambert_w, optimum, penalty

REFERENCE = torch.tensor([0.40, 0.30, 0.12, 0.10, 0.05, 0.03], dtype=torch.float64)
ADVANTAGE = torch.tensor([-0.5, 0.3, -0.6, 0.6, -0.8, 1.0], dtype=torch.float64)
ACTIONS = ("high −", "high +", "medium −", "medium +", "low −", "low +")
BUDGET = 0.02


def one_sided(advantage: Tensor, reference: Tensor, strength: float, model: str) -> Tensor | None:
    """The optimum (A,) where only mass above μ is charged; None where the log model has none.

    At the multiplier ν an action with A < ν is worth less than it costs in the sum and free to leave: it gets 0. One
    with A > ν goes above μ to its stationary point. At ν equal to an action's A it may be anywhere in between, and
    takes what the others leave.
    """

    def policy(nu: float) -> Tensor:
        gain = (advantage - nu) / strength
        if model == "difference":
            above = reference + gain
        elif model == "ratio":
            above = reference * (1 + gain)
        else:
            above = reference * (-lambert_w(-gain.clamp(0, 1 / torch.e))).exp()
        return torch.where(advantage > nu, above, 0.0)

    low, high = float(advantage.min()) - 10 * strength / float(reference.min()), float(advantage.max())
    if model == "log":
        low = max(low, float(advantage.max()) - strength / torch.e)
        if float(policy(low).sum()) < 1:
            return None
    found = bisect(policy, low, high)
    rest = 1 - float(found.sum())
    if abs(rest) > 1e-9:  # the sum jumps at an action's own A: that action takes the rest
        edge = int((advantage - _jump(policy, low, high)).abs().argmin())
        found[edge] = found[edge] + rest if rest > 0 else reference[edge] + rest
    return found


def _jump(policy: Callable[[float], Tensor], low: float, high: float) -> float:
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(policy(middle).sum()) > 1 else (low, middle)
    return (low + high) / 2


def spend(model: str, sided: int, budget: float = BUDGET) -> tuple[float, Tensor] | None:
    """λ at which a model's optimum spends the budget, and that optimum; None where the log model cannot spend it."""
    solve = optimum if sided == 2 else one_sided
    low, high = 1e-3, 1e4  # a larger λ spends less
    best: tuple[float, Tensor] | None = None
    for _ in range(40):
        middle = (low * high) ** 0.5
        policy = solve(ADVANTAGE, REFERENCE, middle, model)
        if policy is None or float(penalty(policy, REFERENCE, model, sided == 1)) > budget:
            low = middle
        else:
            high, best = middle, (middle, policy)
    return best


def lines() -> list[dict[str, Any]]:
    """One for each model and side: λ, what the budget comes to, and the policy."""
    found = []
    for sided in (2, 1):
        for model in MODELS:
            best = spend(model, sided)
            if best is None:
                continue
            strength, policy = best
            found.append(
                {
                    "calculation": "toy",
                    "model": model,
                    "sides": sided,
                    "strength": round(strength, 5),
                    "spent": round(float(penalty(policy, REFERENCE, model, sided == 1)), 6),
                    "policy": [round(float(p), 5) for p in policy],
                    "gain": round(float((policy * ADVANTAGE).sum() - (REFERENCE * ADVANTAGE).sum()), 5),
                }
            )
    return found
