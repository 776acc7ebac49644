# SPDX-License-Identifier: Apache-2.0
"""`dppo_tv`: a trust region in |π − μ|, in place of ratio clipping."""

from torch import Tensor

from dc_trl.estimators.rejection.rule import (
    Bound,
    RejectionInputs,
    RejectionRule,
    drifts_away,
    probability_shift,
    tokens,
)


def dppo_tv(inputs: RejectionInputs, *, high: float) -> Tensor:
    """Rejects a token where A > 0 and π − μ > high, or A < 0 and π − μ < −high: DPPO-Binary-TV (arXiv 2602.04879).

    π is the policy of this very update, so from the second update on a rollout it bounds drift and discrepancy
    together; where a rollout serves one update, the discrepancy alone. Only what would move further away is rejected:
    a token on its way back to μ is kept however far it is. A is taken before the penalty, and where it is 0 the token
    is kept (verl treats 0 as negative; without a penalty that makes no difference).

    Args:
        inputs: see `RejectionInputs`; reads `current_logps`, `sampling_logps` and `advantages`.
        high: δ, a difference of probabilities.

    Returns:
        (B, T) bool.
    """
    shift = probability_shift(inputs.current_logps, inputs.sampling_logps, inputs.valid)
    return tokens(~drifts_away(shift, inputs.token_advantages) | (shift.abs() <= high), inputs.valid)


RULE = RejectionRule(
    kept=dppo_tv,
    bounds={"high": Bound(0.15, 0.0, 1.0, "verl's recipe of the paper; prime-rl 0.2")},
    level="token",
    keeps="|π_t − μ_t| ≤ high or A (π_t − μ_t) ≤ 0",
    needs=("current_logps", "sampling_logps", "advantages"),
    source="DPPO, arXiv 2602.04879",
)
