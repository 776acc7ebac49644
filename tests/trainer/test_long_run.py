# SPDX-License-Identifier: Apache-2.0
"""A run neither collects memory nor slows down: `examples/benchmarks/long_run.py` at a smaller count."""

import json
from typing import Any

from places import ROOT
from processes import run_python

STEPS = 250


def figures(*options: str, status: int = 0) -> dict[str, Any]:
    """Figures of the script, which ends with this status."""
    script = ROOT / "examples/benchmarks/long_run.py"
    return json.loads(run_python(script, "--steps", str(STEPS), *options, status=status, timeout=500).stdout)


def test_memory_stays_flat_and_files_bounded() -> None:
    found = figures()
    assert found["steps"] == STEPS and len(found["memory_mib"]) == STEPS // 50
    assert found["checkpoints"] == 2 and found["leftovers"] == []
    assert found["log_bytes_a_step"] < 5_000


def test_a_planted_leak_is_found() -> None:
    found = figures("--leak", "512", status=1)  # KiB a step: 125 MiB in all
    assert not found["memory_flat"]
