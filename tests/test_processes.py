# SPDX-License-Identifier: Apache-2.0
"""The processes that tests start as forks: they are what a fresh process would be, and their failures are seen."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from processes import run_python, run_ranks

TOLD = """
import atexit, json, os, sys
atexit.register(print, "the end")
hidden = "vllm" in sys.modules
print(json.dumps([__name__, sys.argv, os.getcwd(), sys.path[0], os.environ.get("OMP_NUM_THREADS"), hidden]))
print("to stderr", file=sys.stderr)
"""


@pytest.mark.parametrize("fresh", [False, True])
def test_a_fork_is_told_what_a_fresh_process_is(tmp_path: Path, fresh: bool) -> None:
    script = tmp_path / "script.py"
    script.write_text(TOLD)
    done = run_python(script, "a word", cwd=tmp_path, fresh=fresh)
    told, end = done.stdout.splitlines()
    expected = ["__main__", [str(script), "a word"], os.path.realpath(tmp_path), str(tmp_path), "1", True]
    assert json.loads(told) == expected and end == "the end"
    assert "to stderr" in done.stderr


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(3)", 3), ("raise ValueError('why')", 1)])
def test_a_failure_is_seen(tmp_path: Path, code: str, status: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"print('before')\n{code}\n")
    done = run_python(script, status=status)
    assert done.stdout == "before\n" and ("why" in done.stderr) == (status == 1)
    with pytest.raises(AssertionError, match=f"status {status}"):
        run_python(script)


def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, subprocess, time\nown = subprocess.Popen(['sleep', '600'])\n"
        "pathlib.Path('pids').write_text(f'{os.getpid()} {own.pid}')\ntime.sleep(600)\n"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        run_python(script, cwd=tmp_path, timeout=3)
    one, started = (tmp_path / "pids").read_text().split()
    assert not Path("/proc", one).exists()
    assert _ended(int(started))  # what it started is no child of ours, and somebody else reaps it


def _ended(pid: int) -> bool:
    try:
        return Path("/proc", str(pid), "stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, sys, time\nrank = os.environ['RANK']\npid = pathlib.Path(sys.argv[1], rank)\n"
        "pid.write_text(str(os.getpid()))\n"
        "while len(list(pid.parent.iterdir())) < 2: time.sleep(0.01)\n"
        "sys.exit(5) if rank == '1' else time.sleep(600)\n"
    )
    (tmp_path / "pids").mkdir()
    with pytest.raises(AssertionError, match="status 5"):
        run_ranks(script, tmp_path / "pids")
    assert not Path("/proc", (tmp_path / "pids/0").read_text()).exists()
