# SPDX-License-Identifier: Apache-2.0
"""The verdicts on a run, all of one step."""

from dataclasses import dataclass
from typing import Any

from dc_trl.commands.report.verdict.bounds import ANCHOR, CHECKS, FIRST, GREEN, Bound, Check
from dc_trl.records.run_reader import Run, is_finite


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


def judge(run: Run) -> Judgement | None:
    """Judges the newest step at which the discrepancy has a number; None where there is no such step."""
    entry = next((entry for entry in reversed(run.entries) if is_finite(entry.get(ANCHOR))), None)
    if entry is None:
        return None
    verdicts = []
    without = []
    for check in CHECKS:
        value = _value(check, entry, run)
        if value is not None:
            verdicts.append(Verdict(check, value, check.judge(value)))
        elif check.key in run.drawable:
            without.append(check)
    return Judgement(entry["step"], run.entries[-1]["step"], verdicts, without)


def _value(check: Check, entry: dict[str, Any], run: Run) -> float | None:
    value = entry.get(check.key)
    if value is None or not is_finite(value):
        return None
    if not check.over:
        return float(value)
    base = _base(check, entry, run)
    return value / base if is_finite(base) and base > 0 else None


def _base(check: Check, entry: dict[str, Any], run: Run) -> Any:
    """What a value is divided by."""
    if check.over == FIRST:
        return next(value for value in run.columns[check.key][1] if is_finite(value))
    return entry.get(check.over, run.settings.get(check.over))
