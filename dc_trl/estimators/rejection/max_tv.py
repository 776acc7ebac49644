# SPDX-License-Identifier: Apache-2.0
"""`max_tv`: rejects sequences with a token whose probability differs too much."""

from torch import Tensor

from dc_trl.estimators.rejection.rule import Bound, RejectionInputs, RejectionRule, probability_shift, sequences


def max_tv(inputs: RejectionInputs, *, high: float) -> Tensor:
    """Keeps a sequence where max_t |π_t − μ_t| ≤ high: trust region masking, TRM (arXiv 2512.23075), max criterion.

    TRM masks a sequence by the largest token-level divergence in it, since its bounds on the surrogate's error depend
    on that maximum. Its D_TV is over the vocabulary; |π − μ| of the sampled token is a lower bound of it, the
    constraint's own metric, and needs no logits.

    Args:
        inputs: see `RejectionInputs`; reads `train_logps` and `sampling_logps`.
        high: the largest difference of probabilities that is tolerated.

    Returns:
        (B, T) bool, the same for all tokens of a sequence.
    """
    passes = probability_shift(inputs.train_logps, inputs.sampling_logps, inputs.valid).abs() <= high
    return sequences(passes.all(-1, keepdim=True), inputs.valid)


RULE = RejectionRule(
    kept=max_tv,
    bounds={"high": Bound(0.15, 0.0, 1.0, "our value: DPPO's for the same quantity")},
    level="sequence",
    keeps="max_t |π_t − μ_t| ≤ high",
    needs=("train_logps", "sampling_logps"),
    source="TRM, arXiv 2512.23075, on the sampled token",
)
