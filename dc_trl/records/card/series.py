# SPDX-License-Identifier: Apache-2.0
"""What was logged under a key, in order: the numbers of the card and of its picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dc_trl.records.run_reader import is_finite

Log = Sequence[dict[str, Any]]

DISCREPANCY = "dc/discrepancy/mean"


@dataclass(frozen=True)
class Series:
    """The values logged under one key, in order; `steps` are optimizer steps."""

    steps: list[int]
    values: list[float]


def series(log_history: Log, key: str) -> Series:
    """What was logged under a key. Entries without it, and values that are null or not finite, are left out."""
    points = [(entry["step"], float(entry[key])) for entry in log_history if is_finite(entry.get(key))]
    return Series([step for step, _ in points], [value for _, value in points])
