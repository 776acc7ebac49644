# SPDX-License-Identifier: Apache-2.0
"""`kpop`: rejects tokens whose binary KL divergence is too large in either direction."""

import torch
from torch import Tensor

from dc_trl.estimators.rejection.binary_kl import binary_kl
from dc_trl.estimators.rejection.rule import Bound, RejectionInputs, RejectionRule, tokens


def kpop(inputs: RejectionInputs, *, high: float) -> Tensor:
    """Keeps a token where max(KL(π ‖ μ), KL(μ ‖ π)) ≤ high, both over {this token, any other}; KPop (Guo et al. 2026).

    Unlike a band of ratios it widens where both probabilities are small, and narrows where they are large.

    Args:
        inputs: see `RejectionInputs`; reads `train_logps` and `sampling_logps`.
        high: τ, in nats.

    Returns:
        (B, T) bool.
    """
    log_pi, log_mu = (torch.where(inputs.valid, x, 0.0) for x in (inputs.train_logps, inputs.sampling_logps))
    divergence = torch.maximum(binary_kl(log_pi, log_mu), binary_kl(log_mu, log_pi))
    return tokens(divergence <= high, inputs.valid)


RULE = RejectionRule(
    kept=kpop,
    bounds={"high": Bound(2.0, 0.0, float("inf"), "AReaL's example")},
    level="token",
    keeps="max(KL_bin(π‖μ), KL_bin(μ‖π)) ≤ high",
    needs=("train_logps", "sampling_logps"),
    source="KPop, ringtech.notion.site/kpop",
)
