# SPDX-License-Identifier: Apache-2.0
"""Advantages of a group: leave-one-out baselines, and groups without signal.

Shapes: G completions per group; N = all completions of the generation batch.
"""

import torch
from torch import Tensor


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


def zero_variance_groups(rewards: Tensor, num_generations: int, tolerance: float = 0.0) -> Tensor:
    """Completions whose whole group has one and the same reward, (N,) bool: their advantage says nothing.

    Args:
        rewards: or advantages, (N,), groups contiguous; NaN entries are ignored, and a group without any counts.
        num_generations: G.
        tolerance: largest difference within a group that is none, in units of `rewards`.
    """
    grouped = rewards.view(-1, num_generations)
    highest = grouped.nan_to_num(nan=-torch.inf).amax(1)
    lowest = grouped.nan_to_num(nan=torch.inf).amin(1)
    return (highest <= lowest + tolerance).repeat_interleave(num_generations)
