# SPDX-License-Identifier: Apache-2.0
"""The figures of a benchmark from its samples: mean and standard error, and what was left out."""

import math
import statistics
from collections.abc import Sequence
from typing import Any


def mean_and_stderr(verdicts: Sequence[Sequence[bool]]) -> tuple[float, float | None]:
    """avg@n over P problems, and its standard error clustered by problem.

    With m_p the mean over problem p's samples: mean = Σ m_p / P, and stderr = s / √P where s is the standard deviation
    of the m_p with P − 1 in its denominator. The samples of a problem are not independent answers to "how good is
    the model", so P·n verdicts must not be taken for as many observations: the square root is of P, and the error
    holds for new problems of the same kind. Sampling noise within a problem is part of s (arXiv 2411.00640, §2.2).

    Args:
        verdicts: right or wrong, one sequence of samples for each problem.

    Returns:
        Two fractions; no standard error for a single problem.

    Raises:
        ValueError: there is no problem, or one without samples.
    """
    if not verdicts or not all(verdicts):
        raise ValueError("no verdicts: every problem needs at least one judged sample.")
    means = [sum(samples) / len(samples) for samples in verdicts]
    if len(means) == 1:
        return means[0], None
    return statistics.fmean(means), statistics.stdev(means) / math.sqrt(len(means))


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a benchmark from its recorded samples.

    A problem whose gold answer math-verify cannot parse cannot be answered rightly: it is left out, and counted in
    `unjudged_problems`.

    Returns:
        `mean` and `stderr` (fractions; None where there is none), `problems` (in the mean), `unjudged_problems`,
        `truncated` (share of all samples cut at the token limit), `mean_tokens` (of a completion).
    """
    verdicts: dict[int, list[bool]] = {}
    unjudged = {record["problem"] for record in records if record["correct"] is None}
    for record in records:
        if record["problem"] not in unjudged:
            verdicts.setdefault(record["problem"], []).append(record["correct"])
    mean, stderr = mean_and_stderr(list(verdicts.values())) if verdicts else (None, None)
    return {
        "mean": mean,
        "stderr": stderr,
        "problems": len(verdicts),
        "unjudged_problems": len(unjudged),
        "truncated": sum(record["truncated"] for record in records) / len(records),
        "mean_tokens": sum(record["tokens"] for record in records) / len(records),
    }
