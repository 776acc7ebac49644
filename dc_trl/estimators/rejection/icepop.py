# SPDX-License-Identifier: Apache-2.0
"""`icepop`: rejects tokens whose ρ lies outside a band."""

from torch import Tensor

from dc_trl.estimators.rejection.rule import Bound, RejectionInputs, RejectionRule, log_ratio, tokens


def icepop(inputs: RejectionInputs, *, low: float, high: float) -> Tensor:
    """Keeps a token where low ≤ ρ = π/μ ≤ high; IcePop (Zhou et al. 2025; INTELLECT-3, arXiv 2512.16144, eq. 1).

    IcePop also weighs what it keeps by ρ: that is the importance-sampling correction, which is set apart from this.

    Args:
        inputs: see `RejectionInputs`; reads `train_logps` and `sampling_logps`.
        low, high: α and β.

    Returns:
        (B, T) bool.
    """
    ratio = log_ratio(inputs.train_logps, inputs.sampling_logps, inputs.valid).exp()
    return tokens((ratio >= low) & (ratio <= high), inputs.valid)


RULE = RejectionRule(
    kept=icepop,
    bounds={
        "low": Bound(0.5, 0.0, 1.0, "AReaL's example, and SkyRL's"),
        "high": Bound(5.0, 1.0, float("inf"), "AReaL's example; SkyRL's is 2"),
    },
    level="token",
    keeps="low ≤ ρ_t ≤ high",
    needs=("train_logps", "sampling_logps"),
    source="IcePop, ringtech.notion.site/icepop",
)
