# SPDX-License-Identifier: Apache-2.0
"""The completions of a step that a page shows, each with its tokens."""

from typing import Any

import numpy as np

from dc_trl.commands.report.tokens.log import TokenLogFile, rounded

COMPLETIONS = 16
"""Completions shown of a step: half of them those of the highest mean discrepancy, half evenly from the others."""

_PROMPT_TEXT = 2_000  # characters of a prompt
_ANSWER_TEXT = 120  # characters of an answer


def mean_discrepancies(log: TokenLogFile) -> np.ndarray:
    """Of each completion, over its valid tokens; infinite where one is NaN, the worst there is."""
    valid = log.columns["valid"]
    counts = np.maximum(np.bincount(log.group, weights=valid), 1)
    means = np.bincount(log.group, weights=np.where(valid, log.columns["discrepancy"], 0)) / counts
    return np.where(np.isnan(means), np.inf, means)


def different(log: TokenLogFile, means: np.ndarray) -> list[tuple[int, int]]:
    """The completions, of highest mean first, each with the number of those that have its prompt and its tokens."""
    groups: dict[tuple[str, bytes], list[int]] = {}
    for group in np.argsort(-means, kind="stable").tolist():
        rows = log.rows(group)
        same = (log.prompt(rows.start), log.columns["token_id"][rows].tobytes())
        groups.setdefault(same, []).append(group)
    return [(members[0], len(members)) for members in groups.values()]


def completions(
    log: TokenLogFile, means: np.ndarray, order: list[tuple[int, int]], budget: int
) -> list[dict[str, Any]]:
    """The completions to show.

    Args:
        log: the tokens.
        means: the mean discrepancy of each completion.
        order: the different completions, from `different`.
        budget: tokens, of all of them together.
    """
    selected = _selected(order)
    share = _share([log.length(group) for group, _ in selected], budget)
    return [_completion(log, group, float(means[group]), share) | {"times": times} for group, times in selected]


def _selected(order: list[Any]) -> list[Any]:
    """At most `COMPLETIONS` of a list: the first ones, and as many spread evenly over the rest."""
    if len(order) <= COMPLETIONS:
        return order
    half = COMPLETIONS // 2
    others = order[half:]
    return order[:half] + [others[i] for i in np.linspace(0, len(others) - 1, COMPLETIONS - half).astype(int)]


def _share(lengths: list[int], budget: int) -> int:
    """The most tokens that each completion may show: what short ones leave of the budget, long ones get."""
    for place, length in enumerate(sorted(lengths)):
        share = budget // (len(lengths) - place)
        if length > share:
            return share
        budget -= length
    return max(lengths)


def _completion(log: TokenLogFile, group: int, mean: float, share: int) -> dict[str, Any]:
    rows = log.rows(group)
    first = rows.start
    shown = slice(first, min(rows.stop, first + share))
    valid = log.columns["valid"]
    rejected = log.columns.get("rejected", np.zeros_like(valid))
    return {
        "completion": int(log.columns["completion"][first]),
        "tokens": rows.stop - first,
        "mean": rounded(mean),
        "max": rounded(np.max(log.columns["discrepancy"][rows], where=valid[rows], initial=0)),
        "advantage": log.numbers("advantage", [first])[0],
        "reward": log.numbers("reward", [first])[0],
        "answer": log.word("answer", first, _ANSWER_TEXT),
        "gold": log.word("gold", first, _ANSWER_TEXT),
        "prompt": log.word("prompt", first, _PROMPT_TEXT),
        "text": log.texts(shown),
        "id": log.columns["token_id"][shown].tolist(),
        "position": log.columns["position"][shown].tolist(),
        "invalid": np.flatnonzero(~valid[shown]).tolist(),
        "rejected": np.flatnonzero(rejected[shown]).tolist(),
        "train_logp": log.numbers("train_logp", shown),
        "sampling_logp": log.numbers("sampling_logp", shown),
        "discrepancy": log.numbers("discrepancy", shown),
        "penalty": log.numbers("penalty", shown),
    }
