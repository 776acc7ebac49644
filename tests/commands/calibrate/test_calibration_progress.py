# SPDX-License-Identifier: Apache-2.0
"""What a calibration says while it measures, and what it leaves when it is told to end."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from calibrations import write_recipe
from processes import environment

from dc_trl.commands.calibrate import progress
from dc_trl.commands.calibrate.progress import SAMPLING, SCORING, PassClock, shown
from dc_trl.commands.cli import main


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_what_a_pass_still_takes_by_hand() -> None:
    now = Time()
    clock = PassClock(now)
    clock.begin("pass 1", sampled=2, scored=4)  # 2 to sample, 6 to score
    assert clock.remaining() is None
    clock.start(SAMPLING)
    now.seconds = 10.0
    assert clock.remaining() is None  # an engine that does not say how far it is
    clock.share(0.25)
    assert clock.remaining() == 70.0  # 10 s were a quarter: two batches of 40 s less the 10 s
    assert (
        clock.text()
        == f"pass 1; {clock.standing()}"
        == "pass 1; sampling 25%, batches left: 2; 10 s so far; about 1 min 10 s left"
    )
    now.seconds = 40.0
    clock.end()
    clock.start(SCORING)
    now.seconds = 44.0
    clock.end()
    assert clock.remaining() == 40.0 + 5 * 4.0  # one to sample, five to score
    clock.start(SAMPLING)
    now.seconds = 104.0
    assert clock.remaining() == 5 * 4.0  # it should have ended 20 s ago
    clock.end()
    clock.begin("pass 2", sampled=1)
    assert clock.remaining() == (40.0 + 60.0) / 2 + 4.0  # by the means so far
    clock.begin("a search", sampled=None)
    clock.start(SCORING)
    assert clock.remaining() is None and clock.text() == "a search; scoring; 0 s so far"


def test_a_file_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    clock = PassClock()
    clock.begin("pass 1", sampled=1)
    with shown(clock, every=0.01):
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert lines and set(lines) == {"dc-trl calibrate: pass 1; 0 s so far"}


def test_a_terminal_gets_one_line_that_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "30")
    clock = PassClock()
    clock.begin("pass 1", sampled=1)
    clock.start(SAMPLING)
    with shown(clock, every=0.01):
        time.sleep(0.2)
    written = capsys.readouterr().err
    assert "\n" not in written
    assert "  sampling, batches left" in written and "so far" not in written  # cut at 29 columns


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe of the tiny policy with in-process rollouts, further options given."""

    own = {"gradient_accumulation_steps": 1, "rollout_precision": "int4", "output_dir": str(tmp_path / "out")}
    return lambda **options: write_recipe(tmp_path, **own | options)


def test_every_pass_says_how_far_it_is(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "FILE_SECONDS", 0.002)
    path = recipe()
    (path.parent / "policy" / "chat_template.jinja").unlink()  # a base model: plain prompts
    assert main(["calibrate", "--config", str(path)]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert any("has no chat template, so prompts are plain text (prompt_format: auto)" in line for line in errors)
    found = json.loads((path.parent / "out" / "calibration.json").read_text(encoding="utf-8"))
    assert found["run"]["settings"]["prompt_format"] == "plain"
    lines = [line for line in errors if line.startswith("dc-trl calibrate: ")]
    for title in ("pass 1: as loaded", "pass 2: ", "pass 3: ", "pass 4: "):
        told = [line for line in lines if title in line]
        assert "so far" not in told[0]  # the title alone
        assert any("so far; about " in line and line.endswith(" left") for line in told[1:])
    assert any("sampling " in line and "%, batches left: " in line for line in lines)


def test_sigterm_leaves_no_work_folder(recipe: Callable[..., Path], tmp_path: Path) -> None:
    # Long completions that hardly ever end: the signal comes while the first pass samples.
    path = recipe(max_completion_length=400, num_generations=32, per_device_train_batch_size=128)
    command = [sys.executable, "-m", "dc_trl", "calibrate", "--config", str(path), "--problems", "64"]
    work = tmp_path / "out" / "calibration-work"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment(), **pipes) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "pass 1: as loaded" in line:
                break
        time.sleep(1.0)
        assert process.poll() is None and work.is_dir()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 128 + signal.SIGTERM
        assert "Traceback" not in process.stderr.read()
    assert not work.exists() and not list((tmp_path / "out").iterdir())
