# SPDX-License-Identifier: Apache-2.0
"""`dppo_kl`: a trust region in the binary KL divergence, in place of ratio clipping."""

import torch
from torch import Tensor

from dc_trl.estimators.rejection.binary_kl import binary_kl
from dc_trl.estimators.rejection.rule import Bound, RejectionInputs, RejectionRule, drifts_away, tokens


def dppo_kl(inputs: RejectionInputs, *, high: float) -> Tensor:
    """Rejects a token where KL(μ ‖ π) > high and A would move π further from μ: DPPO-Binary-KL (arXiv 2602.04879).

    The divergence is over {this token, any other}. π, A and what is kept regardless are as in `dppo_tv`.

    Args:
        inputs: see `RejectionInputs`; reads `current_logps`, `sampling_logps` and `advantages`.
        high: δ, in nats.

    Returns:
        (B, T) bool.
    """
    log_pi, log_mu = (torch.where(inputs.valid, x, 0.0) for x in (inputs.current_logps, inputs.sampling_logps))
    divergence = binary_kl(log_mu, log_pi)
    return tokens(~drifts_away(log_pi - log_mu, inputs.token_advantages) | (divergence <= high), inputs.valid)


RULE = RejectionRule(
    kept=dppo_kl,
    bounds={"high": Bound(0.05, 0.0, float("inf"), "verl's recipe of the paper")},
    level="token",
    keeps="KL_bin(μ‖π) ≤ high or A (π_t − μ_t) ≤ 0",
    needs=("current_logps", "sampling_logps", "advantages"),
    source="DPPO, arXiv 2602.04879",
)
