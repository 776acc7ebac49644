# SPDX-License-Identifier: Apache-2.0
"""The bound of length-decay's theorem 3.1 (arXiv 2602.01826) on chains small enough to enumerate.

    ‖E_{y∼μ}[R(y) ∇log π(y)] − E_{y∼π}[R(y) ∇log π(y)]‖ ≤ 2 B Δ T²

with B the largest norm of a token's score and Δ the largest total variation between π and μ in a state. The policy is
a table of logits for each last token, shared by all positions. The sampler's logits have noise on them. The reward of
each sequence of T tokens is 0 or 1, by chance.

Shapes: V tokens, V + 1 states (the last token, or the start).
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

TOKENS = 3
HORIZONS = (1, 2, 3, 4, 5, 6, 7, 8)
CHAINS = 50
NOISE = 0.1


def sequences(horizon: int) -> Tensor:
    """Every sequence of so many tokens, (V^T, T)."""
    return torch.tensor(list(itertools.product(range(TOKENS), repeat=horizon)))


def states(tokens: Tensor) -> Tensor:
    """The state before each token, same shape."""
    start = torch.full_like(tokens[:, :1], TOKENS)
    return torch.cat([start, tokens[:, :-1]], dim=1)


def gradient(logits: Tensor, sampler: Tensor, tokens: Tensor, reward: Tensor) -> Tensor:
    """Σ_y p(y) R(y) ∇log π(y), (V + 1, V), with p of the sampler's logits and π of `logits`, both (V + 1, V)."""
    at = states(tokens)
    weight = sampler.log_softmax(-1)[at, tokens].sum(1).exp() * reward  # (V^T,)
    scores = torch.nn.functional.one_hot(tokens, TOKENS).double() - logits.softmax(-1)[at]  # (V^T, T, V)
    total = torch.zeros_like(logits)
    total.index_put_((at.flatten(),), (weight[:, None, None] * scores).flatten(0, 1), accumulate=True)
    return total


def largest_score(logits: Tensor) -> float:
    """B: the largest norm of ∇log π(a|s) over states and tokens."""
    scores = torch.eye(TOKENS, dtype=torch.float64)[None] - logits.softmax(-1)[:, None]
    return float(scores.norm(dim=-1).max())


def largest_variation(logits: Tensor, sampler: Tensor) -> float:
    """Δ: the largest total variation between the two sides over states."""
    return float((logits.softmax(-1) - sampler.softmax(-1)).abs().sum(-1).max()) / 2


def lines(chains: int = CHAINS, seed: int = 0) -> list[dict[str, Any]]:
    """One for each horizon: means over chains of the gradient's error, of the bound, and of their ratio."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(TOKENS + 1, TOKENS, generator=generator, dtype=torch.float64)

    tables = [(normal(), NOISE * normal()) for _ in range(chains)]
    found = []
    for horizon in HORIZONS:
        tokens = sequences(horizon)
        errors, bounds = [], []
        for logits, noise in tables:
            reward = (torch.rand(len(tokens), generator=generator) < 0.5).double()
            sampler = logits + noise
            error = gradient(logits, sampler, tokens, reward) - gradient(logits, logits, tokens, reward)
            errors.append(float(error.norm()))
            bounds.append(2 * largest_score(logits) * largest_variation(logits, sampler) * horizon**2)
        ratios = [error / bound for error, bound in zip(errors, bounds, strict=True)]
        found.append(
            {
                "calculation": "chain",
                "horizon": horizon,
                "chains": chains,
                "error": float(f"{sum(errors) / chains:.4g}"),
                "bound": float(f"{sum(bounds) / chains:.4g}"),
                "largest_ratio": float(f"{max(ratios):.4g}"),
            }
        )
    return found


def growth(found: list[dict[str, Any]]) -> float:
    """The exponent k of error ∝ T^k, by least squares on logarithms from T = 2 on."""
    points = [(math.log(line["horizon"]), math.log(line["error"])) for line in found if line["horizon"] > 1]
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
