# SPDX-License-Identifier: Apache-2.0
"""Scoring a ragged batch in parts: rows of like length together, each part no wider than its longest row.

TRL pads a batch to its longest completion and multiplies the padding too. Where completions end early, that is most of
the training phase. The log-probs of the tokens are the same up to rounding.

Shapes: B sequences, P prompt tokens, T completion tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_PARTS = 4


def tokens_of_a_part(device: torch.device) -> int:
    """What another forward and backward cost, in tokens: a part has to save as much.

    On CPUs a few dozen were measured for models of one to thirty million parameters; 256 leaves batches alone that
    have little to gain. A GPU needs some hundred tokens more to be busy: the 1,024 are an estimate.
    """
    return 256 if device.type == "cpu" else 1024


def partition(lengths: Sequence[int], prompt_width: int, cost: int) -> list[list[int]]:
    """Rows in as many parts of equal size as make the least work, the longest first.

    Args:
        lengths: completion tokens of each row.
        prompt_width: P, which no part can be narrower than.
        cost: of a part, in tokens.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])

    def split(parts: int) -> list[list[int]]:
        size = -(-len(order) // parts)
        return [order[start : start + size] for start in range(0, len(order), size)]

    def work(parts: list[list[int]]) -> int:
        return sum(len(rows) * (prompt_width + lengths[rows[0]]) + cost for rows in parts)

    return min((split(parts) for parts in range(1, MOST_PARTS + 1)), key=work)


def score_in_parts(
    score: Callable[..., tuple[Any, ...]],
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    **options: Any,
) -> tuple[Any, ...]:
    """As `score`: log-probs and entropies (B, T), from one call for each part; 0 beyond the last column of a part.

    Args:
        score: TRL's `_get_per_token_logps_and_entropies`.
        model: the policy.
        input_ids, attention_mask: (B, P + T), prompts padded on the left and completions on the right.
        logits_to_keep: T.
        **options: the other arguments of `score`, with entropies, without images and auxiliary loss.
    """
    # A row without any token to score keeps one column, because a forward needs one.
    lengths = attention_mask[:, -logits_to_keep:].sum(1).clamp(min=1).tolist()
    parts = partition(lengths, input_ids.shape[1] - logits_to_keep, tokens_of_a_part(input_ids.device))
    if len(parts) == 1:
        return score(model, input_ids, attention_mask, logits_to_keep, **options)
    scored: tuple[list[Tensor], list[Tensor]] = ([], [])
    for rows in parts:
        cut = logits_to_keep - lengths[rows[0]]
        ids, mask = (x[rows, : x.shape[1] - cut] for x in (input_ids, attention_mask))
        outputs = score(model, ids, mask, lengths[rows[0]], **options)
        for values, output in zip(scored, outputs[:2], strict=True):
            values.append(F.pad(output, (0, cut)))
    place = torch.tensor([row for rows in parts for row in rows], device=input_ids.device).argsort()
    logps, entropies = (torch.cat(values)[place] for values in scored)
    return logps, entropies, None
