# SPDX-License-Identifier: Apache-2.0
"""Taking what was rejected out of a loss's normaliser, by weights on the advantages and one factor on the loss.

TRL's losses are linear in the advantages, and divide by counts: of tokens of a sequence, of sequences, of tokens of a
micro-batch or of a whole batch. A rejected token has advantage 0, which takes it out of the numerator. What is left
gets a weight for the counts that its own micro-batch knows; the count that spans micro-batches and ranks is known when
all of them were judged, and is put right by a factor that all of them share, on the gradient if need be.

Shapes: B sequences, T completion tokens.
"""

import torch
from torch import Tensor

# What the divisor that spans micro-batches and ranks counts, by TRL's loss type.
TOKEN_MEAN_LOSSES = ("dapo", "cispo", "vespo")
SEQUENCE_MEAN_LOSSES = ("grpo", "sapo", "dr_grpo", "luspo")
MICRO_BATCH_MEAN_LOSSES = ("bnpo",)
LOSS_TYPES = (*TOKEN_MEAN_LOSSES, *SEQUENCE_MEAN_LOSSES, *MICRO_BATCH_MEAN_LOSSES)


def kept_weights(kept: Tensor, mask: Tensor, loss_type: str) -> Tensor:
    """What multiplies each token's advantage: 0 where rejected, else the local divisor over what is left of it.

    Args:
        kept: (B, T) bool, of `dc_trl.estimators.rejection.reject`.
        mask: (B, T), the tokens of the loss before rejection.
        loss_type: TRL's.

    Returns:
        (B, T) float32. Exactly 1 throughout where nothing is rejected.

    Raises:
        ValueError: for a loss type whose divisor is not known here.
    """
    _check(loss_type)
    before = mask.bool()
    after = before & kept
    weights = torch.ones_like(mask, dtype=torch.float32)
    if loss_type in ("grpo", "sapo"):  # each divides a sequence by its own tokens
        weights = weights * before.sum(-1, keepdim=True) / after.sum(-1, keepdim=True).clamp(min=1)
    elif loss_type == "bnpo":
        weights = weights * before.sum() / after.sum().clamp(min=1)
    return torch.where(after, weights, (~before).float())


def divisor_counts(kept: Tensor, mask: Tensor, loss_type: str, measured: Tensor | None = None) -> Tensor:
    """What one micro-batch adds to the divisor that spans all of them, before and after rejection.

    Args:
        kept, mask, loss_type: as for `kept_weights`.
        measured: (B, T), the mask before whole groups were dropped from the loss, and from its divisor; None where
            none are.

    Returns:
        (2,) int64: tokens for `dapo`, `cispo` and `vespo`; sequences for `grpo`, `sapo`, `dr_grpo` and `luspo`;
        micro-batches, 1 or 0, for `bnpo`. A sequence or micro-batch that was empty before is not rejected, and stays;
        one that was dropped is not counted, and with dropping, no empty micro-batch is.

    Raises:
        ValueError: for a loss type whose divisor is not known here.
    """
    _check(loss_type)
    before = mask.bool()
    after = before & kept
    if loss_type in TOKEN_MEAN_LOSSES:
        return torch.stack([before.sum(), after.sum()])
    if loss_type in SEQUENCE_MEAN_LOSSES:
        present = before.any(-1)
        counted = torch.ones_like(present) if measured is None else present | ~measured.bool().any(-1)
        lost = present & ~after.any(-1)
    else:
        present = before.any()
        counted = torch.ones_like(present) if measured is None else present
        lost = present & ~after.any()
    return torch.stack([counted.sum(), (counted & ~lost).sum()])


def shared_factor(counts: Tensor) -> float:
    """The factor on the loss of every micro-batch, or on the sum of their gradients: the old divisor over the new.

    Args:
        counts: (2,), of `divisor_counts`, added up over micro-batches and ranks.

    Returns:
        1 where nothing is rejected, and where all of it is: the gradient is 0 then, and stays 0.
    """
    before, after = (int(count) for count in counts)
    return before / after if after else 1.0


def _check(loss_type: str) -> None:
    if loss_type not in LOSS_TYPES:
        raise ValueError(
            f"`loss_type` is {loss_type!r}, whose divisor is not known, so that nothing can be taken out of it: use "
            f"one of {LOSS_TYPES}, or no `rejection`."
        )
