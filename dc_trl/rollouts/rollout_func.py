# SPDX-License-Identifier: Apache-2.0
"""What a user's `rollout_func` returns, looked at before TRL pads it: one log-prob a completion token, row by row.

TRL pads short log-probs with 0.0, which is a sampling probability of 1.
"""

from collections.abc import Mapping
from typing import Any


def faulty_rows(output: Any) -> dict[int, str]:
    """The rows of a `rollout_func`'s output whose `logprobs` do not fit their `completion_ids`.

    Args:
        output: what the function returned. Without log-probs, or where TRL itself reports what is missing, no row is
            faulty.

    Returns:
        Row → what is wrong with it.

    Raises:
        ValueError: `logprobs` has another number of rows than `completion_ids`, so that none can be named.
    """
    if not isinstance(output, Mapping):
        return {}
    completions, logprobs = output.get("completion_ids"), output.get("logprobs")
    if completions is None or logprobs is None:
        return {}
    if len(completions) != len(logprobs):
        raise ValueError(
            f"`rollout_func` returned {len(logprobs)} rows of `logprobs` for {len(completions)} rows of "
            "`completion_ids`. Return one row per completion, in the same order."
        )
    found = ((row, _fault(*pair)) for row, pair in enumerate(zip(completions, logprobs, strict=True)))
    return {row: fault for row, fault in found if fault is not None}


def check_completions(output: Any) -> None:
    """Refuses completions without a token, of which TRL reads the last one.

    Args:
        output: what the function returned.

    Raises:
        ValueError: names the first of them, and how many there are.
    """
    given = output.get("completion_ids") if isinstance(output, Mapping) else None
    completions: Any = () if given is None else given
    empty = [row for row, ids in enumerate(completions) if len(ids) == 0]
    if empty:
        raise ValueError(
            f"`rollout_func`: row {empty[0]} of `completion_ids` has no token ({len(empty)} of {len(completions)} "
            "rows have none). A completion that ends at once has its end: return the end-of-sequence token, with its "
            "log-prob."
        )


def describe_faults(faults: dict[int, str]) -> str:
    """An error's words: the first row, how many there are, and the way out."""
    row, fault = next(iter(faults.items()))
    others = f" ({len(faults)} rows are faulty)" if len(faults) > 1 else ""
    return (
        f"`rollout_func`: row {row} of `logprobs` {fault}{others}. Return one number per completion token, in order: "
        "the log-prob of the sampled token, NaN or None where there is none, any number for tokens that `env_mask` "
        "leaves out"
    )


def _fault(completion: Any, logprobs: Any) -> str | None:
    if not hasattr(logprobs, "__len__") or getattr(logprobs, "shape", None) == ():
        return f"is {logprobs!r}, for {len(completion)} completion tokens"
    if len(logprobs) != len(completion):
        return f"has {len(logprobs)} log-probs for {len(completion)} completion tokens"
    for place, value in enumerate(logprobs):
        if not _is_number(value):
            return (
                f"has {value!r} at token {place}, which is not a number (an engine's `generate` returns a list for "
                "each token, the sampled token's log-prob first)"
            )
    return None


def _is_number(value: Any) -> bool:
    """Whether this is one number or None; arrays of no dimension count, as rows may be tensors."""
    return value is None or isinstance(value, float | int) or getattr(value, "shape", None) == ()
