# SPDX-License-Identifier: Apache-2.0
"""Theorem B.1 of DC-GRPO (arXiv 2606.08779): the policies that three quadratic penalties leave optimal in one state.

    maximise over π in the simplex   Σ_a π_a A_a − (λ/2) D(π, μ)

with D one of (the weights, lost from the paper's text, are those under which its solutions follow)

    difference   Σ (π − μ)²              π = μ + (A − ν)/λ
    ratio        Σ μ (π/μ − 1)²          π = μ (1 + (A − ν)/λ)
    log          Σ μ (log π − log μ)²    π = μ exp(−W(−(A − ν)/λ))

where ν makes the probabilities sum to 1, what would be negative is 0, and W is Lambert's function, its principal
branch. One-sided penalties, as in the paper's figure 7, charge only what lies above μ.

The third has such a policy only where A − ν ≤ λ/e for every action. Elsewhere an action is best beyond π = e·μ, where
the penalty is concave and W takes its other branch, which the theorem does not say.

Shapes: A actions; everything is float64.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

MODELS = ("difference", "ratio", "log")


def lambert_w(x: Tensor) -> Tensor:
    """W(x) ≥ −1 with W·exp(W) = x, elementwise; NaN below −1/e. By Halley's iteration."""
    x = x.double()
    # Near the branch point W is −1 + √(2(e·x + 1)); elsewhere log(1 + x) is close enough to start from.
    root = (2 * (math.e * x + 1)).clamp(min=0).sqrt()
    w = torch.where(x < 0, -1 + root - root**2 / 3, x.clamp(min=0).log1p())
    for _ in range(12):
        exponential = w.exp()
        error = w * exponential - x
        slope = exponential * (w + 1) - (w + 2) * error / (2 * w + 2)
        w = w - torch.where(slope.abs() > 1e-300, error / slope, 0.0).nan_to_num(0.0)
    return torch.where(x < -1 / math.e, torch.nan, w)


def penalty(policy: Tensor, reference: Tensor, model: str, one_sided: bool = False) -> Tensor:
    """D(π, μ), scalar, of `policy` π and `reference` μ, both (A,)."""
    above = policy > reference if one_sided else torch.ones_like(policy, dtype=torch.bool)
    if model == "difference":
        terms = (policy - reference) ** 2
    elif model == "ratio":
        terms = reference * (policy / reference - 1) ** 2
    else:
        terms = reference * (policy.clamp(min=1e-300).log() - reference.log()) ** 2
    return torch.where(above, terms, 0.0).sum()


def objective(policy: Tensor, advantage: Tensor, reference: Tensor, strength: float, model: str) -> Tensor:
    """Σ π A − (λ/2) D(π, μ), scalar."""
    return (policy * advantage).sum() - strength / 2 * penalty(policy, reference, model)


def optimum(advantage: Tensor, reference: Tensor, strength: float, model: str) -> Tensor | None:
    """The theorem's policy, (A,); None where the log model has no stationary one that sums to 1.

    Args:
        advantage: A, (A,).
        reference: μ, (A,), positive.
        strength: λ > 0.
        model: one of `MODELS`.
    """
    low = float(advantage.min()) - strength / float(reference.min())
    if model == "log":
        low = float(advantage.max()) - strength / math.e  # below it some action has no stationary point
        if float(_stationary(advantage, reference, strength, model, low).sum()) < 1:
            return None
    high = float(advantage.max()) + strength * 1e3
    return bisect(lambda nu: _stationary(advantage, reference, strength, model, nu), low, high)


def bisect(policy: Callable[[float], Tensor], low: float, high: float) -> Tensor:
    """The policy at the ν between `low` and `high` at which it sums to 1; the sum falls as ν grows."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(policy(middle).sum()) > 1 else (low, middle)
    return policy((low + high) / 2)


def _stationary(advantage: Tensor, reference: Tensor, strength: float, model: str, nu: float) -> Tensor:
    gain = (advantage - nu) / strength
    if model == "difference":
        return (reference + gain).clamp(min=0)
    if model == "ratio":
        return (reference * (1 + gain)).clamp(min=0)
    return reference * (-lambert_w(-gain.clamp(max=1 / math.e))).exp()


def maximise(advantage: Tensor, reference: Tensor, strength: float, model: str, steps: int = 4000) -> Tensor:
    """The optimum that ascent finds from μ, (A,): exponentiated gradient, which knows nothing of the theorem."""
    policy = reference.clone()
    rate = 0.2 / (1 + strength)
    for _ in range(steps):
        policy.requires_grad_(True)
        (slope,) = torch.autograd.grad(objective(policy, advantage, reference, strength, model), policy)
        with torch.no_grad():
            slope = (slope - (policy * slope).sum()).clamp(-50, 50)
            policy = policy * (rate * slope).exp()
            policy = policy / policy.sum()
    return policy.detach()
