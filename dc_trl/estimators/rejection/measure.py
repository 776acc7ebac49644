# SPDX-License-Identifier: Apache-2.0
"""How much each rule rejects: counts that add up over micro-batches and ranks, and the fractions made of them.

Shapes: B sequences, T completion tokens, R verdicts.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# The name of what at least one rule rejects.
ANY = "any"

_TOTALS = 2  # valid tokens, sequences with a valid token


def rejection_counts(kept: Mapping[str, Tensor], valid: Tensor) -> Tensor:
    """Counts of one micro-batch; those of micro-batches and ranks are merged by adding them.

    Args:
        kept: (B, T) bool by name, e.g. the second result of `dc_trl.estimators.rejection.reject`; R of them.
        valid: (B, T) bool, the tokens that the rules judged.

    Returns:
        (2 + 2 R,) int64: valid tokens, sequences that have one, and for each name the valid tokens that are rejected
        and the sequences that lose at least one.
    """
    counts = [valid.sum(), valid.any(-1).sum()]
    for verdict in kept.values():
        rejected = valid & ~verdict
        counts += [rejected.sum(), rejected.any(-1).sum()]
    return torch.stack(counts)


def rejection_metrics(counts: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Fractions of what was valid, as scalars in [0, 1]; NaN if nothing was.

    Args:
        counts: (2 + 2 R,), of `rejection_counts`, added up.
        names: the R names, in the order of `kept`.

    Returns:
        For each name `rejection/<name>/tokens`, the fraction of tokens that are rejected, and
        `rejection/<name>/sequences`, of sequences that lose at least one: for a rule of sequences, all of it.
    """
    counts = counts.double() if counts.device.type != "mps" else counts.float()
    tokens, sequences = counts[:_TOTALS]
    values = {}
    for name, (lost, touched) in zip(names, counts[_TOTALS:].view(-1, 2), strict=True):
        values[f"rejection/{name}/tokens"] = lost / tokens
        values[f"rejection/{name}/sequences"] = touched / sequences
    return values


def emptied_notices(counts: Tensor, names: Sequence[str]) -> list[tuple[str, str]]:
    """What to say of an iteration in which a rank had tokens, and none that was kept, as (topic, message).

    Args:
        counts: (ranks, 2 + 2 (R + 1)), of `rejection_counts` with the verdicts of the rules and then that of all.
        names: the R rules.

    Returns:
        Nothing; or one notice, of the whole batch or of the ranks that were emptied, with the rules that did it.
    """
    judged, rejected = counts[:, 0], counts[:, -2]
    emptied = (judged > 0) & (rejected >= judged)
    if not emptied.any():
        return []
    lost = counts[emptied, _TOTALS:-2:2].sum(0) / judged[emptied].sum()
    shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(names, lost.tolist(), strict=True) if share)
    ways_out = (
        "If that goes on, look for what parts the engines, or widen `rejection_bounds` of the rules that did it: "
        f"{shares} of these tokens."
    )
    if (emptied | (judged == 0)).all():
        what = "`rejection` rejected every token of a batch, which therefore trained on nothing."
        return [("rejected", f"{what} {ways_out}")]
    ranks = ", ".join(map(str, emptied.nonzero().flatten().tolist()))
    what = (
        f"`rejection` rejected every token of process {ranks} (of 0 to {len(counts) - 1}), which therefore trained on "
        "nothing, while the others did."
    )
    return [("rejected on a rank", f"{what} {ways_out}")]
