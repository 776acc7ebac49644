# SPDX-License-Identifier: Apache-2.0
"""`token_veto`: rejects sequences with a token that the training engine finds all but impossible."""

from torch import Tensor

from dc_trl.estimators.rejection.rule import Bound, RejectionInputs, RejectionRule, log_ratio, sequences


def token_veto(inputs: RejectionInputs, *, low: float) -> Tensor:
    """Keeps a sequence where ρ_t = π_t/μ_t ≥ low at every valid token; one token below vetoes all of it.

    verl's `rollout_token_veto_threshold`, slime's `mis_veto_threshold`, SkyRL's `outlier_token_is_threshold_low`.

    Args:
        inputs: see `RejectionInputs`; reads `train_logps` and `sampling_logps`.
        low: the smallest ratio that is tolerated.

    Returns:
        (B, T) bool, the same for all tokens of a sequence.
    """
    passes = log_ratio(inputs.train_logps, inputs.sampling_logps, inputs.valid).exp() >= low
    return sequences(passes.all(-1, keepdim=True), inputs.valid)


RULE = RejectionRule(
    kept=token_veto,
    bounds={"low": Bound(1e-4, 0.0, 1.0, "slime's and SkyRL's; verl names 1e-4 to 1e-6")},
    level="sequence",
    keeps="min_t ρ_t ≥ low",
    needs=("train_logps", "sampling_logps"),
    source="verl, rollout correction",
)
