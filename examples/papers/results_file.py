# SPDX-License-Identifier: Apache-2.0
"""The results: one JSON object a line, one line a finished run, at most one line for each run."""

import fcntl
import json
from pathlib import Path
from typing import Any

from dc_trl.records.json_lines import append_lines, mend_end

RESULTS = Path(__file__).parent / "results"

Run = tuple[str, str, int]
"""Regime, arm and seed: what a run is."""


def run_of(line: dict[str, Any]) -> Run:
    """The run that a line is of."""
    return line["regime"], line["arm"], line["seed"]


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, without a torn last one; none where there is no file.

    Raises:
        ValueError: if a run has two lines.
    """
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    lines = [json.loads(text) for text in whole.splitlines()]
    seen: set[Run] = set()
    for line in lines:
        if run_of(line) in seen:
            raise ValueError(f"{path} has two lines of {run_of(line)}: remove one, so that no run counts twice.")
        seen.add(run_of(line))
    return lines


def add(path: Path, line: dict[str, Any]) -> bool:
    """Appends the line of a finished run, unless the file has one of it; says whether it did.

    Processes may add to a file at the same time, and may be killed while they do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mend_end(path)
        if run_of(line) in {run_of(known) for known in read(path)}:
            return False
        append_lines(path, [line])
        return True
