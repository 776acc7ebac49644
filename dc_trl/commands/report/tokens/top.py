# SPDX-License-Identifier: Apache-2.0
"""The tokens of a step on which the engines disagree most."""

from typing import Any

import numpy as np

from dc_trl.commands.report.tokens.log import TokenLogFile

TOP = 20
"""Rows of the table."""

# On either side of a token: tokens, and characters of them.
_CONTEXT = 6
_CONTEXT_TEXT = 24
_CANDIDATES = 20  # tokens looked at for each row of the table


def top(log: TokenLogFile, sizes: np.ndarray) -> list[dict[str, Any]]:
    """The valid tokens of the whole step with the largest sizes, and what stands around them.

    A group often begins alike: a token that has the same prompt and the same tokens before it is the same place for
    both engines, and is listed once, with its largest size and the number of times.
    """
    found: dict[tuple[str, bytes], dict[str, Any]] = {}
    for row in np.argsort(-sizes, kind="stable")[: _CANDIDATES * TOP].tolist():
        if not sizes[row]:
            break
        same = (log.prompt(row), log.columns["token_id"][log.rows(int(log.group[row])).start : row + 1].tobytes())
        if same in found:
            found[same]["times"] += 1
        elif len(found) < TOP:
            found[same] = _token(log, row)
    return list(found.values())


def _token(log: TokenLogFile, row: int) -> dict[str, Any]:
    around = log.rows(int(log.group[row]))
    token = {
        "completion": int(log.columns["completion"][row]),
        "position": int(log.columns["position"][row]),
        "id": int(log.columns["token_id"][row]),
        "before": "".join(log.texts(slice(max(around.start, row - _CONTEXT), row)))[-_CONTEXT_TEXT:],
        "text": log.texts(slice(row, row + 1))[0],
        "after": "".join(log.texts(slice(row + 1, min(around.stop, row + 1 + _CONTEXT))))[:_CONTEXT_TEXT],
        "times": 1,
    }
    return token | {name: log.numbers(name, [row])[0] for name in ("train_logp", "sampling_logp", "discrepancy")}
