# SPDX-License-Identifier: Apache-2.0
"""The study's command from end to end: short runs in processes of their own, and the count of what is done."""

import os
import subprocess
import sys
from pathlib import Path

from places import ROOT


def study(*words: str) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(ROOT / "examples" / "papers"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_block_runs(tmp_path: Path) -> None:
    output = study("run", "--quick", "--only", "cause", "--results", str(tmp_path / "unused"))
    assert "2 runs in" in output and output.count("exit 0") == 2
    assert not (tmp_path / "unused").exists()  # a smoke leaves nothing that could be counted


def test_the_list_counts_what_is_done(tmp_path: Path) -> None:
    (tmp_path / "cause.jsonl").write_text('{"regime": "stressed", "arm": "exact", "seed": 1000}\n')
    assert "cause: 1 of 24" in study("list", "--results", str(tmp_path))
