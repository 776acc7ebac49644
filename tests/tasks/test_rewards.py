# SPDX-License-Identifier: Apache-2.0
"""math-verify rewards: verdicts, time limits that hold, workers that come back."""

import json
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from problems import write_rows
from tiny import save_tiny_policy

import dc_trl.tasks.judge
from dc_trl.commands.cli import main
from dc_trl.tasks.judge import judge
from dc_trl.tasks.rewards import GoldAnswerError, MathAccuracyReward, load_rewards
from dc_trl.tasks.workers import Workers

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


def test_says_which_answers_it_found(reward: MathAccuracyReward) -> None:
    found: dict[str, list[Any]] = {}
    completions = [r"so \boxed{\frac{1}{3}}", "Answer: 5", "no idea", "Answer: 7"]
    rewards = reward(completions, ["1/3", "4", "4", None], log_extra=found.__setitem__)
    assert rewards == [1.0, 0.0, 0.0, None]
    assert found == {"answer": ["1/3", "5", None, None]}


def test_works_outside_the_main_thread(reward: MathAccuracyReward) -> None:
    # Where math-verify's own time limit, signal.alarm, raises.
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(reward([r"\boxed{4}"], ["4"])))
    thread.start()
    thread.join()
    assert results == [1.0]


def hanging_worker(tmp_path: Path, body: str, loading: float = 0.0) -> str:
    """A stand-in for the worker program that loads for so many seconds, and whose answer to "hang" is `body`."""
    script = tmp_path / "worker.py"
    script.write_text(
        f"import json, os, sys, time\ntime.sleep({loading})\nprint('ready', flush=True)\nfor line in sys.stdin:\n"
        f"    if json.loads(line)[1] == 'hang':\n        {body}\n    print('right', flush=True)\n"
    )
    return str(script)


def test_kills_what_hangs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dc_trl.tasks.judge, "__file__", hanging_worker(tmp_path, "time.sleep(600)"))
    reward = MathAccuracyReward(timeout=0.5, workers=1)
    start = time.monotonic()
    assert reward(["fine", "hang", "fine"], ["4"] * 3) == [1.0, 0.0, 1.0]
    assert time.monotonic() - start < 10
    assert reward.counts == {"right": 2, "timeout": 1}
    reward.close()


def test_a_worker_that_dies_is_an_error_and_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dc_trl.tasks.judge, "__file__", hanging_worker(tmp_path, "os._exit(3)"))
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


def test_the_successor_of_a_killed_worker_loads_while_others_judge(tmp_path: Path) -> None:
    workers = Workers(hanging_worker(tmp_path, "time.sleep(600)", loading=2.0), count=1, seconds=1.0)
    workers.ask(["4", "fine"])
    time.sleep(2.5)  # the spare one has loaded too
    start = time.monotonic()
    assert workers.ask(["4", "hang"]) == ("", True)
    assert workers.ask(["4", "fine"]) == ("right", False)
    assert time.monotonic() - start < 2.0  # the limit of the first, and no start
    workers.close()


def test_the_bound_on_the_time_holds_where_every_answer_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, timeout, count, completions = 1.0, 0.5, 2, 6
    script = hanging_worker(tmp_path, "time.sleep(600)", loading)
    monkeypatch.setattr(dc_trl.tasks.judge, "__file__", script)
    reward = MathAccuracyReward(timeout, count)
    start = time.monotonic()
    assert reward(["hang"] * completions, ["4"] * completions) == [0.0] * completions
    # Room for the processes themselves beside the bound of (0.5 + 1) * 6 / 2 s.
    assert time.monotonic() - start < (timeout + loading) * completions / count + 1.5
    reward.close()


def test_a_worker_that_died_while_it_was_idle_is_replaced(tmp_path: Path) -> None:
    workers = Workers(hanging_worker(tmp_path, "pass"), count=1, seconds=5.0)
    for _ in range(2):
        assert workers.ask(["4", "fine"]) == ("right", False)
        worker = workers._idle.get()
        assert worker._process is not None
        worker._process.kill()
        worker._process.wait()
        workers._idle.put(worker)
    assert workers.ask(["4", "fine"]) == ("right", False)
    workers.close()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit(1)", "did not start: it ended while it loaded.*import math_verify"),
        ("print('math-verify 0.5.2 judges 4 as unparsable_gold')", r"0\.5\.2 judges 4 as .*math-verify>=0\.8\.0"),
    ],
)
def test_a_math_verify_that_does_not_work_is_found_at_construction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    broken = tmp_path / "worker.py"
    broken.write_text(f"{program}\n")
    monkeypatch.setattr(dc_trl.tasks.judge, "__file__", str(broken))
    with pytest.raises(ImportError, match=message):
        MathAccuracyReward(workers=1)


def test_a_math_verify_that_parses_nothing_without_its_own_limit_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As 0.5.2 to 0.7.0 do: `parsing_timeout=None` gives no parse, and every gold answer would be unusable.
    old = tmp_path / "math_verify"
    old.mkdir()
    (old / "__init__.py").write_text(
        "class LatexExtractionConfig:\n    def __init__(self, **_):\n        pass\n"
        "ExprExtractionConfig = LatexExtractionConfig\n"
        "def parse(*args, parsing_timeout, **_):\n    return [4] if parsing_timeout else []\n"
        "def verify(*args, **_):\n    return True\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        ImportError, match=r"judges \\boxed\{4\} against the gold answer 4 as unparsable_gold.*>=0\.8\.0"
    ):
        MathAccuracyReward(workers=1)


@pytest.mark.parametrize(
    ("gold", "reward_of_four"),
    [(4, 1.0), (4.0, 1.0), (5, 0.0), (Fraction(8, 2), 1.0), (np.int64(4), 1.0), (np.float32(4), 1.0), (4e20, 0.0)]
    + [(None, None), (float("nan"), None), (float("inf"), None), ("", None)],
)
def test_gold_answers_that_are_no_text(reward: MathAccuracyReward, gold: Any, reward_of_four: float | None) -> None:
    assert reward([r"\boxed{4}", r"\boxed{4}"], [gold, "4"]) == [reward_of_four, 1.0]
    assert reward.counts["error"] == 0


@pytest.mark.parametrize("gold", [True, ["4"], {"ground_truth": "4"}, b"4", 4j])
def test_gold_answers_that_are_no_answer_are_refused(reward: MathAccuracyReward, gold: Any) -> None:
    with pytest.raises(TypeError, match="gold answer 1 in `solution` is .*, of type .*: give a text or a number"):
        reward(["x", "y"], ["4", gold])


@pytest.mark.parametrize("solution", [[], ["4"], ["4"] * 3, "44"])
def test_each_completion_needs_a_gold_answer(reward: MathAccuracyReward, solution: Any) -> None:
    with pytest.raises(ValueError, match="`solution` .* for 2 completions: give a list"):
        reward(["x", "y"], solution)


def test_no_completions_earn_no_rewards(reward: MathAccuracyReward) -> None:
    logged: dict[str, float] = {}
    assert reward([], [], logged.__setitem__) == []
    assert set(logged.values()) == {0.0}


def test_a_batch_without_a_usable_gold_answer_stops_the_run() -> None:
    reward = MathAccuracyReward(workers=1)
    with pytest.raises(GoldAnswerError, match=r"none of the gold answers of a batch \(2 completions\): '\?\?\?'\. .*"):
        reward(["x"] * 2, ["???"] * 2)  # the first batch
    assert reward(["x"], ["4"]) == [0.0]
    assert reward(["x"] * 2, ["???"] * 2) == [None] * 2  # one bad row in a data set that is good
    with pytest.raises(GoldAnswerError, match=r"'a\?', '\?b', None, …\..*`answer_column`"):
        reward(["x"] * 4, ["a?", "?b", None, "…?"])
    assert reward.verdicts(["x"], [None]) == ["unparsable_gold"]
    reward.close()


def test_training_without_usable_gold_answers_ends_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = save_tiny_policy(tmp_path / "policy")
    data = write_rows(tmp_path / "bad.jsonl", [{"problem": f"{i}+1=", "answer": "???"} for i in range(8)])
    recipe = tmp_path / "recipe.yaml"
    options = {"model_name_or_path": str(policy), "dataset_name": str(data), "output_dir": str(tmp_path / "out")}
    options |= {"rollout_backend": "transformers", "max_steps": 1, "max_completion_length": 4, "num_generations": 2}
    options |= {"per_device_train_batch_size": 4, "reward_workers": 1, "use_cpu": True, "report_to": "none"}
    recipe.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in options.items()))
    assert main(["train", "--config", str(recipe)]) == 2
    assert "can use none of the gold answers of a batch (4 completions): '???'" in capsys.readouterr().err


def test_workers_end_with_their_parent() -> None:
    code = (
        "from dc_trl.tasks.rewards import MathAccuracyReward\n"
        "reward = MathAccuracyReward(workers=1)\n"
        "reward(['Answer: 4'], ['4'])\n"
        "worker = reward._workers._idle.get()\n"
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
    assert reward._workers is not None
    idle = reward._workers._idle
    workers = [idle.get() for _ in range(reward.workers + 1)]  # by turns, so the one that runs may be any of them
    for worker in workers:
        idle.put(worker)
    process = next(worker._process for worker in workers if worker._is_ready and worker._process is not None)
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
