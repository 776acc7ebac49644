# SPDX-License-Identifier: Apache-2.0
"""A run neither collects memory nor slows down: `examples/benchmarks/long_run.py` at a smaller count."""

import json
import subprocess
import sys
from typing import Any

import pytest
from places import ROOT

STEPS = 250


def figures(*options: str) -> tuple[int, dict[str, Any]]:
    """Status and figures of the script."""
    command = [sys.executable, str(ROOT / "examples/benchmarks/long_run.py"), "--steps", str(STEPS), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout, done.stderr[-4000:]
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
def test_memory_stays_flat_and_files_bounded() -> None:
    status, found = figures()
    assert status == 0, found
    assert found["steps"] == STEPS and len(found["memory_mib"]) == STEPS // 50
    assert found["checkpoints"] == 2 and found["leftovers"] == []
    assert found["log_bytes_a_step"] < 5_000


@pytest.mark.slow
def test_a_planted_leak_is_found() -> None:
    status, found = figures("--leak", "512")  # KiB a step: 125 MiB in all
    assert status == 1
    assert not found["memory_flat"]
