# SPDX-License-Identifier: Apache-2.0
"""A loss without its rejected tokens equals the loss over the kept tokens alone, for every loss type."""

import pytest
import torch
from torch import Tensor

from dc_trl.estimators.rejection.normaliser import LOSS_TYPES, divisor_counts, kept_weights, shared_factor

MAX_LENGTH = 7


def part(values: Tensor, mask: Tensor, loss_type: str, micro_batches: int, tokens: int) -> Tensor:
    """What one micro-batch adds to a loss, as TRL divides it: (B, T) values, already times their advantages."""
    masked = values * mask
    if loss_type in ("grpo", "sapo"):
        return (masked.sum(-1) / mask.sum(-1).clamp(min=1.0)).mean() / micro_batches
    if loss_type == "bnpo":
        return masked.sum() / mask.sum().clamp(min=1.0) / micro_batches
    if loss_type == "dr_grpo":
        return masked.sum() / (len(values) * MAX_LENGTH) / micro_batches
    if loss_type == "luspo":
        return masked.sum(-1).mean() / micro_batches
    return masked.sum() / max(tokens, 1)  # dapo, cispo, vespo


def kept_alone(parts: list[tuple[Tensor, Tensor]], loss_type: str) -> float:
    """The loss over the kept tokens of every micro-batch, gathered one by one; (values, kept tokens) each."""
    rows = [[row[keep] for row, keep in zip(values, kept, strict=True)] for values, kept in parts]
    left = [[row for row in batch if len(row)] for batch in rows]  # what lost every token is not there
    flat = [row for batch in left for row in batch]
    if loss_type in ("grpo", "sapo"):
        return float(torch.stack([row.mean() for row in flat]).mean())
    if loss_type == "bnpo":
        return float(torch.stack([torch.cat(batch).mean() for batch in left if batch]).mean())
    if loss_type == "dr_grpo":
        return float(torch.cat(flat).sum() / (len(flat) * MAX_LENGTH))
    if loss_type == "luspo":
        return float(torch.stack([row.sum() for row in flat]).mean())
    return float(torch.cat(flat).mean())


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Values, mask and kept tokens of three micro-batches; one loses everything, one a sequence and some tokens."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 4, generator=generator) for _ in range(3)]
    lengths = [[4, 2, 3], [1, 4, 2], [3, 3, 4]]
    masks = [torch.tensor([[t < n for t in range(4)] for n in batch]) for batch in lengths]
    kept = [torch.ones(3, 4, dtype=torch.bool) for _ in range(3)]
    kept[0][0, 1] = kept[0][2, 0] = False
    kept[0][1] = False
    kept[1][:] = False
    return list(zip(values, masks, kept, strict=True))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_loss_is_that_of_the_kept_tokens(loss_type: str) -> None:
    data = batches()
    tokens = int(sum(mask.sum() for _, mask, _ in data))
    counts = torch.stack([divisor_counts(kept, mask, loss_type) for _, mask, kept in data]).sum(0)
    total = sum(
        part(values * kept_weights(kept, mask, loss_type), mask, loss_type, len(data), tokens)
        for values, mask, kept in data
    )
    expected = kept_alone([(values, mask & kept) for values, mask, kept in data], loss_type)
    assert float(total) * shared_factor(counts) == pytest.approx(expected, rel=1e-5)


def test_counts_by_hand() -> None:
    # Of 9, 7 and 10 tokens, 9 − 1 − 1 − 2 = 5, 0 and 10 are left; of 3, 3 and 3 sequences 2, 0 and 3.
    for loss_type, expected in {"dapo": (26, 15), "grpo": (9, 5), "luspo": (9, 5), "bnpo": (3, 2)}.items():
        counts = sum(divisor_counts(kept, mask, loss_type) for _, mask, kept in batches())
        assert tuple(torch.as_tensor(counts).tolist()) == expected
    assert shared_factor(torch.tensor([26, 15])) == 26 / 15


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        # Row 0 keeps 3 of 4 tokens, row 1 none, row 2 one of 2: 4/3, 0, 2/1 of a sequence; 9/4 of the micro-batch.
        ("grpo", [[4 / 3, 4 / 3, 4 / 3, 0], [0, 0, 0, 1], [0, 2, 1, 1]]),
        ("bnpo", [[9 / 4, 9 / 4, 9 / 4, 0], [0, 0, 0, 1], [0, 9 / 4, 1, 1]]),
        ("dapo", [[1, 1, 1, 0], [0, 0, 0, 1], [0, 1, 1, 1]]),
        ("dr_grpo", [[1, 1, 1, 0], [0, 0, 0, 1], [0, 1, 1, 1]]),
    ],
)
def test_weights_by_hand(loss_type: str, expected: list[list[float]]) -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    kept = torch.tensor([[True, True, True, False], [False] * 4, [False, True, True, True]])
    torch.testing.assert_close(kept_weights(kept, mask, loss_type), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_rejected_is_exactly_nothing_done(loss_type: str) -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])  # an empty sequence counts, as it does for TRL
    kept = torch.ones(3, 3, dtype=torch.bool)
    assert (kept_weights(kept, mask, loss_type) == 1).all()
    before, after = divisor_counts(kept, mask, loss_type).tolist()
    assert before == after
    assert shared_factor(divisor_counts(kept, mask, loss_type)) == 1.0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("mask", [torch.ones(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)])
def test_everything_rejected_is_zero_and_finite(loss_type: str, mask: Tensor) -> None:
    kept = torch.zeros(2, 3, dtype=torch.bool)
    weights = kept_weights(kept, mask, loss_type)
    assert (weights[mask.bool()] == 0).all() and weights.isfinite().all()
    assert shared_factor(divisor_counts(kept, mask, loss_type)) == 1.0


def test_an_unknown_loss_is_refused() -> None:
    for function in (kept_weights, divisor_counts):
        with pytest.raises(ValueError, match="`loss_type` is 'new'.*no `rejection`"):
            function(torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1), "new")
