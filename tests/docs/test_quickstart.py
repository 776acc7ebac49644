# SPDX-License-Identifier: Apache-2.0
"""The quickstart: its task and reward, and a short run from end to end, offline."""

import importlib
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from cards import quick_start
from places import ROOT
from processes import run_python
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = ROOT / "examples"

STEPS = 6


@pytest.fixture(scope="module")
def task() -> Iterator[Any]:
    """The module `demo_task`, which lies beside the script and not in the package."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("demo_task")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def reward(task: Any) -> Iterator[Any]:
    reward = task.SumReward(timeout=5.0, workers=1)
    yield reward
    reward.close()


def run_demo(output_dir: Path, *flags: str) -> str:
    """Runs the script as a user does, without a network; returns what it printed."""
    sizes = ("--steps", str(STEPS), "--held_out", "16", "--batch_size", "16")
    words = (EXAMPLES / "quickstart.py", "--output_dir", output_dir, *sizes, *flags)
    return run_python(*words, cwd=output_dir).stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that a short run wrote, and its output."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, "--warmup_steps", "20")


def test_reward_of_right_wrong_and_unparsable_answers(reward: Any) -> None:
    cases = {
        "8, 1, -4 \\boxed{-4}": 1.0,
        "\\boxed{-4}": 1.0,
        "\\boxed{ -4 } .": 1.0,
        "\\boxed{4}": 0.0,
        "8, 1, -4 \\boxed{5}": 0.0,
        "\\boxed{-4} \\boxed{5}": 0.0,
        "-4": 0.0,
        "\\boxed{-4": 0.0,
        "\\boxed{}": 0.0,
        "": 0.0,
    }
    assert dict(zip(cases, reward(list(cases), ["-4"] * len(cases)), strict=True)) == cases


def test_reward_does_not_pay_for_tricks(reward: Any) -> None:
    # The first four equal -4, but leave the work to the verifier; the others would keep it busy, or break it.
    tricks = ["\\boxed{8 - 12}", "\\boxed{8 + 0 - 12}", "\\boxed{-8/2}", "Answer: 8 - 12"]
    tricks += ["\\boxed{10^{10^{10}}}", "\\boxed{" * 500, "\\boxed{" + "(" * 90 + "}", "\\boxed{9" + "9" * 5000 + "}"]
    tricks += ["\\boxed{__import__('os')}", "\\boxed{\\infty}", "\\boxed{-4, 5}", "\\boxed{x}", "-4 \\boxed{\x00}"]
    assert dict(zip(tricks, reward(tricks, ["-4"] * len(tricks)), strict=True)) == dict.fromkeys(tricks, 0.0)


def test_reward_reads_the_last_message_of_a_conversation(reward: Any) -> None:
    conversations = [[{"role": "assistant", "content": f"\\boxed{{{answer}}}"}] for answer in (7, 8)]
    assert reward(conversations, ["7", "7"]) == [1.0, 0.0]


def test_reward_agrees_with_reasoning_gym(reward: Any) -> None:
    sums = reasoning_gym.create_dataset("chain_sum", size=20, seed=3, min_terms=5, max_terms=5, max_digits=1)
    entries = list(sums)
    answers = [str(int(entry["answer"]) + index % 2) for index, entry in enumerate(entries)]
    scores = [float(sums.score_answer(answer=a, entry=e) == 1.0) for a, e in zip(answers, entries, strict=True)]
    boxed = [f"\\boxed{{{answer}}}" for answer in answers]
    assert reward(boxed, [entry["answer"] for entry in entries]) == scores
    assert scores == [1.0, 0.0] * 10


def test_solutions_are_right_and_survive_the_tokenizer(task: Any, reward: Any) -> None:
    problems = task.make_problems("training", 30, seed=1)
    tokenizer = task.build_tokenizer()
    for worked in (True, False):
        texts = [task.render_solution(problem, worked) for problem in problems]
        assert reward(texts, [problem["solution"] for problem in problems]) == [1.0] * 30
        full = [problem["prompt"] + text for problem, text in zip(problems, texts, strict=True)]
        ids = tokenizer(full)["input_ids"]
        assert tokenizer.batch_decode(ids) == full
        assert not any(tokenizer.unk_token_id in row for row in ids)


def test_running_totals_by_hand(task: Any) -> None:
    # 3 + 5 = 8, 8 - 7 = 1, 1 + 0 = 1, 1 - 9 = -8
    assert task.running_totals("What is: 3 + 5 - 7 + 0 - 9 =") == [8, 1, 1, -8]


def test_streams_repeat_differ_and_leave_out_what_is_excluded(task: Any) -> None:
    held_out = task.make_problems("held-out", 50, seed=0)
    assert held_out == task.make_problems("held-out", 50, seed=0)
    assert held_out != task.make_problems("held-out", 50, seed=1)
    known = {problem["prompt"] for problem in held_out}
    assert not known & {problem["prompt"] for problem in task.make_problems("training", 500, seed=0, exclude=known)}
    assert len(task.make_problems("held-out", 50, seed=0, exclude=known)) == 50


def test_supervised_batch_labels_completions_only(task: Any) -> None:
    tokenizer = task.build_tokenizer()
    problem = {"prompt": "State the final answer to the following arithmetic problem: 3 + 5 =", "solution": "8"}
    batch = task.supervised_batch(
        tokenizer, [(problem["prompt"], task.render_solution(problem, worked)) for worked in (True, False)]
    )
    for labels, text in zip(batch["labels"], ("8 \\boxed{8}<eos>", "\\boxed{8}<eos>"), strict=True):
        assert tokenizer.decode(labels[labels != -100]) == text


def test_summary(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("accuracy_before", "accuracy_after", "greedy_before", "greedy_after"):
        assert 0.0 <= summary[key] <= 1.0
        assert (summary[key] * 16).is_integer()
        assert f"{summary[key]:.1%}" in printed
    assert summary["steps"] == STEPS
    assert summary["wall_seconds"] > 0
    assert (summary["rollout_backend"], summary["rollout_precision"]) == ("transformers", "int4")
    # Int4 rollouts disagree with a float32 trainer, so there is a floor, and a tolerance 1.25 times as high.
    assert 0.0 < summary["tolerance"] < 1.0
    assert 0.0 < summary["discrepancy_first"] < 1.0
    assert 0.0 < summary["discrepancy_last"] < 1.0
    assert 0.0 <= summary["multiplier_last"] <= 1.0
    assert 1.0 <= summary["length_after"] <= 16.0


def test_curves_are_a_png(demo: tuple[Path, str]) -> None:
    content = (demo[0] / "curves.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1000 and height > 200
    assert content.endswith(b"IEND\xaeB`\x82")


def test_policy_and_card(demo: tuple[Path, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo[0])
    assert model.config.model_type == "qwen3"
    assert len(AutoTokenizer.from_pretrained(demo[0])) == model.config.vocab_size
    assert "2606.08779" in (demo[0] / "README.md").read_text()


def test_the_quick_start_of_the_card_runs(
    demo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo[0])
    exec(quick_start(demo[0]), {})
    assert capsys.readouterr().out.strip()


def test_says_what_it_does_not_show(demo: tuple[Path, str]) -> None:
    assert "one run cannot say: compare with --constraint none over several seeds." in demo[1]


def test_own_model_and_data(demo: tuple[Path, str], tmp_path: Path, task: Any) -> None:
    sums = task.make_problems("training", 40, seed=5)
    rows = [{"problem": problem["prompt"], "answer": problem["solution"]} for problem in sums]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--model", str(demo[0]), "--dataset", str(data), "--max_completion_length", "8", "--precision", "int8")
    printed = run_demo(tmp_path, *flags, "--constraint", "none")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["model"], summary["rollout_precision"]) == (str(demo[0]), "int8")
    assert summary["multiplier_last"] == 0.0
    assert "Nothing was constrained" in printed
    assert "Warm-up" not in printed


def test_data_without_a_model_is_refused(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_LOGGING_LEVEL", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # which the script would set for good
    with pytest.raises(ValueError, match="--dataset needs --model"):
        importlib.import_module("quickstart").DemoArguments(dataset="sums.jsonl")
