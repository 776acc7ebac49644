# SPDX-License-Identifier: Apache-2.0
"""The weight of divergence-regularised policy optimisation, DRPO: a trust region in |π − μ| without an edge.

Shapes: B sequences, T completion tokens.
"""

import torch
from torch import Tensor

# δ of the paper, section 4, by its authors' code (Tencent-Hunyuan/UniRL): secondary source. As |π − μ| ≤ 1, the weight
# then stays within 1 ± 0.08, and its corrective side, |π − μ| > δ, is never reached.
DRPO_LIMIT = 12.5


def drpo_weight(
    current_logps: Tensor, sampling_logps: Tensor, valid: Tensor, advantages: Tensor, limit: float = DRPO_LIMIT
) -> Tensor:
    """w = 1 − sign(A (ρ − 1)) · |π − μ| / δ, DRPO (arXiv 2606.09821) table 1: what ρ A ∇log π is multiplied by.

    It is the gradient of the paper's objective (eq. 8), ρ A − |A| μ (ρ − 1)² / 2δ. An update that moves π further from
    μ shrinks, to 0 where |π − μ| = δ and to its reverse beyond; one that moves it back grows, up to 1 + 1/δ. It stands
    beside the importance ratio ρ = π/μ, which the paper leaves untruncated, and in place of ratio clipping.

    Args:
        current_logps: log π of the policy in this update, (B, T), in nats; not differentiated.
        sampling_logps: log μ, (B, T).
        valid: (B, T) bool; the others get a weight of 1.
        advantages: (B,), (B, 1) or (B, T); those that the loss multiplies, after a penalty if there is one: by any
            other sign, what the weight means to hold back it would drive on.
        limit: δ, a difference of probabilities.

    Returns:
        (B, T) float32, within 1 ± 1/δ.

    Raises:
        ValueError: if `limit` is not finite and positive.
    """
    check_limit(limit)
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    shift = current_logps.detach().float().exp() - sampling_logps.float().exp()  # = sign(ρ − 1) |π − μ|
    return 1.0 - torch.where(valid, advantages.detach().sign() * shift, 0.0) / limit


def check_limit(limit: float, name: str = "limit") -> None:
    """Raises ValueError unless `limit` is finite and positive."""
    if not 0 < limit < float("inf"):
        raise ValueError(
            f"`{name}` is {limit}: it is the difference of probabilities at which the weight reaches 0, so it must be "
            f"finite and positive. Use e.g. {DRPO_LIMIT}."
        )
