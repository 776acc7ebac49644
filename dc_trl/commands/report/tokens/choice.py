# SPDX-License-Identifier: Apache-2.0
"""Which steps of a run have their tokens shown: the newest, the first, the one with the largest discrepancy."""

import math
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dc_trl.records.token_schema import FOLDER

NEWEST = "newest"
FIRST = "first"
WORST = "largest discrepancy"


def token_logs(folder: Path) -> dict[int, Path]:
    """The token logs of a run by their step, newest first."""
    pattern = re.compile(r"tokens_(\d{1,15})\.parquet", re.ASCII)  # a number with more digits is no step
    names = ((pattern.fullmatch(path.name), path) for path in (folder / FOLDER).glob("*"))
    return dict(sorted(((int(match[1]), path) for match, path in names if match), reverse=True))


def kept_steps(paths: dict[int, Path], count: int) -> dict[int, list[str]]:
    """The steps to show, newest first, each with why: `NEWEST`, `FIRST`, `WORST`, or nothing for one in between.

    Args:
        paths: token logs by step, newest first.
        count: steps, of which three have a reason.
    """
    steps = list(paths)
    if not steps:
        return {}
    reasons: dict[int, list[str]] = {steps[0]: [NEWEST]}
    reasons.setdefault(steps[-1], []).append(FIRST)
    worst = worst_step(paths)
    if worst is not None:
        reasons.setdefault(worst, []).append(WORST)
    for place in np.linspace(0, len(steps) - 1, min(count, len(steps))).round().astype(int):
        if len(reasons) < count:
            reasons.setdefault(steps[place], [])
    return dict(sorted(reasons.items(), reverse=True))


def worst_step(paths: dict[int, Path]) -> int | None:
    """The step whose valid tokens have the largest discrepancy, the newest of equals; None if none can be read.

    What parquet says of a column bounds its valid tokens from above, so that few columns need be read.
    """
    bounds = {step: bound for step, path in paths.items() if (bound := _bound(path)) is not None}
    worst, largest = None, -math.inf
    for step in sorted(bounds, key=lambda step: (bounds[step], step), reverse=True):
        if bounds[step] < largest or (bounds[step] == largest and worst is not None and step < worst):
            break
        found = _largest(paths[step])
        if found is not None and (found > largest or (found == largest and worst is not None and step > worst)):
            worst, largest = step, found
    return worst


def _bound(path: Path) -> float | None:
    """At least the largest discrepancy of a token log; None if it is no token log."""
    try:
        file = pq.ParquetFile(path)
        column = file.schema_arrow.names.index("discrepancy")
        groups = [file.metadata.row_group(group).column(column) for group in range(file.metadata.num_row_groups)]
        stated = [group.statistics for group in groups]
        return max(float(s.max) if s is not None and s.has_min_max else math.inf for s in stated)
    except Exception:  # Arrow raises most kinds on a damaged file
        return None


def _largest(path: Path) -> float | None:
    """The largest discrepancy of the valid tokens of a log; None where there is none, or it cannot be read."""
    try:
        table = pq.ParquetFile(path).read(columns=["discrepancy", "valid"])
        values = table["discrepancy"].to_numpy()[table["valid"].to_numpy().astype(bool)]
    except Exception:  # as above
        return None
    values = values[~np.isnan(values)]
    return float(values.max()) if len(values) else None
