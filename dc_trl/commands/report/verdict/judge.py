# SPDX-License-Identifier: Apache-2.0
"""The verdicts on a run, all of one step."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from dc_trl.commands.report.verdict.bounds import ANCHOR, CHECKS
from dc_trl.commands.report.verdict.checks import FIRST, GREEN, Bound, Check
from dc_trl.records.run_columns import RunColumns
from dc_trl.records.run_reader import is_finite


@dataclass(frozen=True)
class Verdict:
    """A value and what it broke: `bound` is None where it is in range."""

    check: Check
    value: float
    bound: Bound | None

    @property
    def colour(self) -> str:
        """`RED`, `AMBER` or `GREEN`."""
        return self.bound.colour if self.bound else GREEN


@dataclass(frozen=True)
class Judgement:
    """What is said of a run.

    Attributes:
        step: the one that all values are of.
        newest: the last step that was logged.
        verdicts: in the order of `CHECKS`.
        open: checks whose value the run logs, but not at this step, or has nothing yet to compare with.
    """

    step: int
    newest: int
    verdicts: list[Verdict]
    open: list[Check]


def judge(run: RunColumns) -> Judgement | None:
    """Judges the newest step at which the discrepancy has a number; None where there is no such step."""
    column = run.columns.get(ANCHOR)
    rows = [] if column is None else column.rows[np.isfinite(column.values)]
    if not len(rows):
        return None
    row = int(rows[-1])
    verdicts = []
    without = []
    for check in CHECKS:
        value = _value(check, row, run)
        if value is not None:
            verdicts.append(Verdict(check, value, check.judge(value)))
        elif check.key in run.drawable:
            without.append(check)
    return Judgement(int(run.steps[row]), int(run.steps[-1]), verdicts, without)


def _value(check: Check, row: int, run: RunColumns) -> float | None:
    value = run.at(check.key, row)
    if value is None or not check.over:
        return value
    base = _base(check, row, run)
    return value / base if is_finite(base) and base > 0 else None


def _base(check: Check, row: int, run: RunColumns) -> Any:
    """What a value is divided by."""
    if check.over == FIRST:
        values = run.columns[check.key].values
        return float(values[np.isfinite(values)][0])
    base = run.at(check.over, row)
    return run.settings.get(check.over) if base is None else base
