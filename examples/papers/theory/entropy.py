# SPDX-License-Identifier: Apache-2.0
"""The entropy argument: what a small step against the discrepancy does to the entropy of one state.

The penalty enters as an advantage of −λ·d(a), held constant, for actions drawn from π. The expected score-function
step on the logits z is then g_a = −π_a (d_a − Σ_b π_b d_b), and to first order it changes the entropy H by

    ΔH = Σ_a (∂H/∂z_a) g_a = Σ_a π_a² (log π_a + H)(d_a − Σ_b π_b d_b).

The reason in words: |π − μ| ≈ π(1 − π)·|noise| is largest for likely actions, so pushing them down flattens the
policy. |log π − log μ| ≈ (1 − π)·|noise| is smallest for them, so it does the opposite. |logit π − logit μ| ≈ |noise|
knows nothing of how likely an action is.

Shapes: S states, A actions.
"""

from typing import Any

import torch
from torch import Tensor

ACTIONS = (16, 64, 256)
SCALES = (1.0, 2.0, 3.0, 4.0, 6.0)  # standard deviation of the logits: the larger, the more confident
NOISES = (0.1, 0.3, 0.5)
STATES = 2000


def discrepancies(train: Tensor, sampling: Tensor) -> dict[str, Tensor]:
    """Each metric's d, (S, A), of the log-probs of both sides, (S, A), by its name in the library."""
    pi, mu = train.exp(), sampling.exp()
    return {
        "prob_diff": (pi - mu).abs(),
        "prob_ratio": (pi / mu - 1).abs(),
        "logprob_diff": (train - sampling).abs(),
        "logit_diff": (logit(train) - logit(sampling)).abs(),
    }


def logit(logps: Tensor) -> Tensor:
    """log p − log(1 − p) of log-probs."""
    return logps - torch.log1p(-logps.exp().clamp(max=1 - 1e-12))


def entropy_change(train: Tensor, d: Tensor) -> Tensor:
    """ΔH of a step of size 1, (S,), of log π and d, both (S, A)."""
    pi = train.exp()
    entropy = -(pi * train).sum(-1, keepdim=True)
    centred = d - (pi * d).sum(-1, keepdim=True)
    return (pi**2 * (train + entropy) * centred).sum(-1)


def lines(states: int = STATES, seed: int = 0) -> list[dict[str, Any]]:
    """For each number of actions, confidence and noise, and each metric: the share of states whose entropy rises.

    `change` is the mean of ΔH / (mean d), so that metrics of different units can be compared.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for actions in ACTIONS:
        for scale in SCALES:
            for noise in NOISES:
                z = scale * torch.randn(states, actions, generator=generator, dtype=torch.float64)
                other = z + noise * torch.randn(states, actions, generator=generator, dtype=torch.float64)
                train, sampling = z.log_softmax(-1), other.log_softmax(-1)
                confidence = float(train.exp().amax(-1).mean())
                for metric, d in discrepancies(train, sampling).items():
                    change = entropy_change(train, d)
                    size = (train.exp() * d).sum(-1)
                    found.append(
                        {
                            "calculation": "entropy",
                            "actions": actions,
                            "logit_scale": scale,
                            "noise": noise,
                            "confidence": round(confidence, 4),
                            "metric": metric,
                            "rises": round(float((change > 0).double().mean()), 4),
                            "change": float(f"{float((change / size).mean()):.4g}"),
                        }
                    )
    return found
