# SPDX-License-Identifier: Apache-2.0
"""Advantages: the discrepancy penalty, leave-one-out baselines, groups without signal.

Shapes: B sequences, T completion tokens, G completions per group; N = all completions of the generation batch.
"""

import torch
from torch import Tensor

from dc_trl.discrepancy import trajectory_mean

CONSTRAINTS = ("none", "fixed", "threshold", "lagrangian")
DISCREPANCY_LEVELS = ("token", "sequence")


def discrepancy_penalty(
    discrepancy: Tensor,
    valid: Tensor,
    *,
    constraint: str,
    multiplier: float,
    tolerance: float | None,
    level: str = "token",
) -> Tensor:
    """The penalty that DC-GRPO (arXiv 2606.08779) takes off every token's advantage; never negative, detached.

    - `none`: 0
    - `fixed`: λ·d (eq. 3, Dual-GRPO)
    - `threshold`: λ·d where d > tolerance, else 0 (figure 3)
    - `lagrangian`: λ_k·d (eq. 8–10)

    Args:
        discrepancy: d, (B, T), of `token_discrepancy`.
        valid: (B, T) bool, of `valid_tokens`; the others get no penalty.
        constraint: one of the four.
        multiplier: λ of this iteration.
        tolerance: the tolerance in use; None while it is being calibrated, when only `fixed` applies a penalty.
        level: `"token"`, or `"sequence"` to use each trajectory's mean d for all of its tokens (the ablation).

    Returns:
        (B, T) float32.

    Raises:
        ValueError: for an unknown constraint or level.
    """
    if constraint not in CONSTRAINTS:
        raise ValueError(f"`constraint` is {constraint!r}, which is unknown: use one of {CONSTRAINTS}.")
    if level not in DISCREPANCY_LEVELS:
        raise ValueError(f"`level` is {level!r}, which is unknown: use one of {DISCREPANCY_LEVELS}.")
    zeros = torch.zeros_like(discrepancy)
    if constraint == "none" or (tolerance is None and constraint != "fixed"):
        return zeros
    d = discrepancy.detach()
    if level == "sequence":
        d = trajectory_mean(d, valid).expand_as(d)
    applies = valid
    if constraint == "threshold" and tolerance is not None:
        applies = valid & (d > tolerance)
    return torch.where(applies, multiplier * d, zeros)


def penalised_advantages(advantages: Tensor, penalty: Tensor) -> Tensor:
    """Ã_{i,t} = A_i − penalty_{i,t}, eq. 8.

    Args:
        advantages: A, (B,) per sequence or (B, T).
        penalty: (B, T), of `discrepancy_penalty`.

    Returns:
        (B, T).
    """
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    return advantages - penalty


def rloo_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """Leave-one-out advantages, the estimator of the length-decay paper (arXiv 2602.01826, table 1).

    A_i = r_i − mean_{j ≠ i} r_j over the other completions of the group; no division by a standard deviation.

    Args:
        rewards: (N,), groups of `num_generations` contiguous completions; NaN where no reward function applied.
        num_generations: G.

    Returns:
        (N,); 0 for a completion without a reward, or without another that has one.
    """
    grouped = rewards.view(-1, num_generations)
    scored = ~grouped.isnan()
    values = torch.where(scored, grouped, torch.zeros_like(grouped))
    others = scored.sum(1, keepdim=True) - 1
    baseline = (values.sum(1, keepdim=True) - values) / others.clamp(min=1)
    advantages = torch.where(scored & (others > 0), values - baseline, torch.zeros_like(values))
    return advantages.flatten()


def zero_variance_groups(rewards: Tensor, num_generations: int) -> Tensor:
    """Completions whose whole group has one and the same reward, (N,) bool: their advantage says nothing.

    Args:
        rewards: (N,), groups contiguous; NaN entries are ignored, and a group without any reward counts.
        num_generations: G.
    """
    grouped = rewards.view(-1, num_generations)
    highest = grouped.nan_to_num(nan=-torch.inf).amax(1)
    lowest = grouped.nan_to_num(nan=torch.inf).amin(1)
    return (highest <= lowest).repeat_interleave(num_generations)
