# SPDX-License-Identifier: Apache-2.0
"""How long a report takes on a long run: `dc-trl report` on 200,000 log entries of 60 values, as a user starts it.

    python examples/benchmarks/report_time.py

Prints seconds of the processor's time, start included, and the most memory. It writes a log of 450 MB, and removes it.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from dc_trl.commands.report.panels import MAIN_PANELS, TAIL_PANELS

ENTRIES, VALUES = 200_000, 60


def write_log(folder: Path) -> int:
    """A log whose keys are those that are drawn, and others; returns its size in bytes."""
    drawn = [series.key for panel in (*MAIN_PANELS, *TAIL_PANELS) for row in panel.rows for series in row.series]
    keys = [*dict.fromkeys(drawn), *(f"other/{number}" for number in range(VALUES))][:VALUES]
    draw = random.Random(0)
    path = folder / "log.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"start": {"step": 0, "max_steps": ENTRIES, "settings": {}}}) + "\n")
        for step in range(1, ENTRIES + 1):
            file.write(json.dumps({"step": step} | {key: draw.random() for key in keys}) + "\n")
    return path.stat().st_size


def main() -> None:
    """Writes the log, reports on it three times, and prints what it took."""
    with tempfile.TemporaryDirectory() as name:
        size = write_log(Path(name))
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-m", "dc_trl", "report", name], check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            print(f"{size / 1e6:.0f} MB: {seconds:.1f} s of the processor's time, {after.ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
