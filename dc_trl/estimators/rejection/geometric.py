# SPDX-License-Identifier: Apache-2.0
"""`geometric`: rejects sequences whose geometric mean of ρ lies outside a band."""

from torch import Tensor

from dc_trl.discrepancy import trajectory_mean
from dc_trl.estimators.rejection.rule import Bound, RejectionInputs, RejectionRule, log_ratio, sequences


def geometric(inputs: RejectionInputs, *, low: float, high: float) -> Tensor:
    """Keeps a sequence where low ≤ exp((1/T) Σ_t log ρ_t) ≤ high, with ρ = π/μ and T its valid tokens.

    Masked importance sampling with the geometric mean in place of the product, which does not shrink or explode with
    the length: Liu, Li et al., "When Speed Kills Stability" (2025); verl's `seq_mean_k1`, SkyRL's
    `sequence_mask_metric="geometric"`.

    Args:
        inputs: see `RejectionInputs`; reads `train_logps` and `sampling_logps`.
        low, high: the band, around 1.

    Returns:
        (B, T) bool, the same for all tokens of a sequence.
    """
    ratios = log_ratio(inputs.train_logps, inputs.sampling_logps, inputs.valid)
    mean = trajectory_mean(ratios, inputs.valid).exp()
    return sequences((mean >= low) & (mean <= high), inputs.valid)


RULE = RejectionRule(
    kept=geometric,
    bounds={
        "low": Bound(0.99, 0.0, 1.0, "SkyRL's first advice"),
        "high": Bound(1.01, 1.0, float("inf"), "SkyRL's first advice"),
    },
    level="sequence",
    keeps="low ≤ exp(mean_t log ρ_t) ≤ high",
    needs=("train_logps", "sampling_logps"),
    source="Liu, Li et al. 2025, richardli.xyz/rl-collapse",
)
