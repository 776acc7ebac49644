# SPDX-License-Identifier: Apache-2.0
"""math-verify rewards: verdicts, time limits that hold, workers that come back."""

import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dc_trl.tasks.rewards
from dc_trl.tasks.rewards import MathAccuracyReward, judge, load_rewards

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def reward() -> Iterator[MathAccuracyReward]:
    shared = MathAccuracyReward(timeout=5.0, workers=2)
    yield shared
    shared.close()


@pytest.mark.parametrize(
    ("gold", "text", "verdict"),
    [
        ("34", r"so \boxed{34}", "right"),
        ("34", "Answer: 34", "right"),
        ("34", "…\n\nAnswer: $34$", "right"),
        ("34", "**Answer:** 34", "right"),
        (r"\frac{1}{3}", r"\boxed{1/3}", "right"),
        (r"The roots sum to $\boxed{0.5}$.", r"\boxed{\frac{1}{2}}", "right"),
        ("34", r"\boxed{35}", "wrong"),
        ("34", "34", "wrong"),  # neither boxed nor announced
        ("34", "", "wrong"),
        ("34", r"\boxed{34} or \boxed{35}", "wrong"),  # hedging
        ("34", r"<think>\boxed{12}?</think> \boxed{34}", "right"),
        ("34", r"\boxed{", "wrong"),
        ("", r"\boxed{34}", "unparsable_gold"),
        ("???", r"\boxed{34}", "unparsable_gold"),
    ],
)
def test_judges(gold: str, text: str, verdict: str) -> None:
    assert judge(gold, text) == verdict


def test_rewards_messages_and_texts_and_excludes_bad_golds(reward: MathAccuracyReward) -> None:
    logged: dict[str, float] = {}
    before = reward.counts.copy()
    completions: list[Any] = [[{"role": "assistant", "content": r"\boxed{4}"}], "Answer: 5", r"\boxed{4}", "no idea"]
    rewards = reward(completions, solution=["4", "4", "", "4"], log_metric=logged.__setitem__, prompts=None)
    assert rewards == [1.0, 0.0, None, 0.0]
    assert reward.counts - before == {"right": 1, "wrong": 2, "unparsable_gold": 1}
    assert logged == {"math_verify/error": 0.0, "math_verify/timeout": 0.0, "math_verify/unparsable_gold": 0.25}


def test_works_outside_the_main_thread(reward: MathAccuracyReward) -> None:
    # Where math-verify's own time limit, signal.alarm, raises.
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(reward([r"\boxed{4}"], ["4"])))
    thread.start()
    thread.join()
    assert results == [1.0]


def hanging_worker(tmp_path: Path, body: str) -> str:
    """A stand-in for the worker program whose answer to "hang" is `body`."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys, time\nprint('ready', flush=True)\nfor line in sys.stdin:\n"
        f"    if json.loads(line)[1] == 'hang':\n        {body}\n    print('right', flush=True)\n"
    )
    return str(script)


def test_kills_what_hangs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dc_trl.tasks.rewards, "__file__", hanging_worker(tmp_path, "time.sleep(600)"))
    reward = MathAccuracyReward(timeout=0.5, workers=1)
    start = time.monotonic()
    assert reward(["fine", "hang", "fine"], ["4"] * 3) == [1.0, 0.0, 1.0]
    assert time.monotonic() - start < 10
    assert reward.counts == {"right": 2, "timeout": 1}
    reward.close()


def test_a_worker_that_dies_is_an_error_and_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dc_trl.tasks.rewards, "__file__", hanging_worker(tmp_path, "os._exit(3)"))
    reward = MathAccuracyReward(timeout=5.0, workers=1)
    assert reward(["hang", "fine"], ["4"] * 2) == [0.0, 1.0]
    assert reward.counts == {"right": 1, "error": 1}
    reward.close()


def test_sympy_cannot_stall_training() -> None:
    # A power tower: evaluating it takes all time and all memory there is. Killed, or refused by the memory limit.
    reward = MathAccuracyReward(timeout=2.0, workers=1)
    start = time.monotonic()
    rewards = reward([r"\boxed{9^{9^{9^{9}}}}", r"\boxed{4}"], ["4", "4"])
    assert rewards == [0.0, 1.0]
    assert time.monotonic() - start < 30
    reward.close()


def test_a_worker_that_cannot_start_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "worker.py"
    broken.write_text("raise SystemExit(1)\n")
    monkeypatch.setattr(dc_trl.tasks.rewards, "__file__", str(broken))
    with pytest.raises(RuntimeError, match="did not start"):
        MathAccuracyReward(workers=1)(["x"], ["4"])


def test_workers_end_with_their_parent() -> None:
    code = (
        "from dc_trl.tasks.rewards import MathAccuracyReward\n"
        "reward = MathAccuracyReward(workers=1)\n"
        "reward(['Answer: 4'], ['4'])\n"
        "worker = reward._idle.get()\n"
        "print(worker._process.pid, flush=True)\n"
        "import os; os._exit(0)"  # no clean-up: as if killed
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    worker = Path("/proc") / result.stdout.strip()
    deadline = time.monotonic() + 10
    while worker.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupt_is_the_parents_business(reward: MathAccuracyReward) -> None:
    assert reward(["Answer: 34"], ["34"]) == [1.0]  # a worker runs
    idle = reward._idle
    assert idle is not None
    workers = [idle.get() for _ in range(reward.workers)]  # by turns, so the one that runs may be any of them
    for worker in workers:
        idle.put(worker)
    process = next(worker._process for worker in workers if worker._process is not None)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    assert reward(["Answer: 34"] * 2, ["34"] * 2) == [1.0, 1.0]


def test_pickles_without_its_processes(reward: MathAccuracyReward) -> None:
    reward(["Answer: 4"], ["4"])
    copy = pickle.loads(pickle.dumps(reward))
    assert (copy.timeout, copy.workers, copy.__name__) == (5.0, 2, "accuracy")
    assert copy(["Answer: 4"], ["4"]) == [1.0]
    copy.close()


def test_refuses_impossible_settings() -> None:
    with pytest.raises(ValueError, match="`timeout` is 0"):
        MathAccuracyReward(timeout=0)
    with pytest.raises(ValueError, match="`workers` 0"):
        MathAccuracyReward(workers=0)


def test_says_how_to_install_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"dc-trl\[math\]"):
        MathAccuracyReward()


def test_loads_rewards_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards_for_test.py").write_text("def brevity(completions, **_):\n    return [0.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    accuracy, brevity = load_rewards(["accuracy", "my_rewards_for_test.brevity"], timeout=1.5, workers=3)
    assert isinstance(accuracy, MathAccuracyReward) and (accuracy.timeout, accuracy.workers) == (1.5, 3)
    assert brevity(["x"]) == [0.0]
    for name in ("acuracy", "my_rewards_for_test.missing", "no_such_module.f"):
        with pytest.raises(ValueError, match="Use 'accuracy'"):
            load_rewards([name], 1.0, 1)
