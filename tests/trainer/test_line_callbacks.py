# SPDX-License-Identifier: Apache-2.0
"""The line of a log entry: what it says, that nothing else is printed, and that log.jsonl keeps everything."""

import io
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import PROMPTS, count_digits, dc_trainer, settings
from tiny import tiny_model, tiny_tokenizer
from transformers import PrinterCallback
from transformers.trainer_callback import ProgressCallback
from transformers.utils.notebook import NotebookProgressCallback

from dc_trl import DCGRPOConfig, DCGRPOTrainer
from dc_trl.training.line_callbacks import LinePrinterCallback, LineProgressCallback, in_lines, line_of, standing

ENTRY = {
    "loss": 0.1,
    "reward": 0.53125,
    "completions/mean_length": 9.06,
    "dc/discrepancy/mean": 0.00412,
    "dc/tolerance": 0.0052,
    "dc/multiplier": 0.1042,
    "step_time": 3.2,
    "entropy": 2.0,
}
STATE: Any = SimpleNamespace(global_step=12, max_steps=150)


def test_a_line_says_how_the_run_stands() -> None:
    assert line_of(ENTRY, STATE) == (
        "step 12/150: reward 0.531, length 9.1, discrepancy 0.0041 of 0.0052, λ 0.104, 3.20 s"
    )
    evaluation = {f"eval_{key}": value for key, value in ENTRY.items() if key not in ("loss", "step_time")}
    assert line_of(evaluation | {"eval_runtime": 41.7}, STATE) == (
        "step 12/150, evaluation: reward 0.531, length 9.1, discrepancy 0.0041 of 0.0052, λ 0.104, 42 s"
    )
    assert line_of({"train_runtime": 100.0, "train_loss": 0.1}, STATE) == "step 12/150: the end, after 100 s"


def test_what_is_not_known_is_left_out() -> None:
    calibrating = {key: value for key, value in ENTRY.items() if key != "dc/tolerance"}
    assert "discrepancy 0.0041, λ" in standing(calibrating)
    assert standing({"loss": 0.1, "reward": None, "step_time": 1.0}) == "1.00 s"
    assert standing({"reward": math.nan, "dc/discrepancy/mean": 2e-5}) == "reward nan, discrepancy 2.0e-05"
    assert line_of({"my/metric": 1.0}, STATE) is None


def test_only_what_prints_to_a_terminal_is_replaced() -> None:
    class Own(PrinterCallback):
        """Of a user's."""

    kept = [NotebookProgressCallback(), Own()]
    found = in_lines([PrinterCallback(), *kept, ProgressCallback()])
    assert found[1:3] == kept
    assert [type(callback) for callback in (found[0], found[3])] == [LinePrinterCallback, LineProgressCallback]


def train(folder: Path, **options: Any) -> DCGRPOTrainer:
    """A run of three steps and an evaluation, as a user starts it, with what transformers prints."""
    given = {"rollout_backend": "transformers", "rollout_precision": "int4", "eval_strategy": "steps", "eval_steps": 3}
    args = DCGRPOConfig(**settings(folder, **(given | {"tolerance_calibration_batches": 1} | options)))
    data = {"train_dataset": PROMPTS, "eval_dataset": PROMPTS.select(range(4))}
    trainer = DCGRPOTrainer(tiny_model(), count_digits, args, processing_class=tiny_tokenizer(), **data)
    trainer.train()
    return trainer


@pytest.mark.parametrize("disable_tqdm", [True, False], ids=["printed", "above the bar"])
def test_a_run_prints_one_line_for_each_entry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], disable_tqdm: bool
) -> None:
    trainer = train(tmp_path, disable_tqdm=disable_tqdm)
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == len(trainer.state.log_history) == 5
    part = r"reward \d\.\d{3}, length \d\.\d, discrepancy \S+( of \S+)?, λ 0\.\d{3}, \d+\.\d\d s"
    assert all(re.fullmatch(rf"step {step}/3: {part}", lines[step - 1]) for step in (1, 2, 3))
    assert re.fullmatch(rf"step 3/3, evaluation: {part}", lines[3])
    assert lines[4].startswith("step 3/3: the end, after ")
    assert ("3/3" in captured.err) == (not disable_tqdm)  # the bar
    assert not re.search(r"[^\s\r]step \d/3", captured.err)
    kept = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    keys = [set(entry) for entry in trainer.state.log_history]
    assert [set(entry) for entry in kept if "start" not in entry] == keys and len(keys[0]) > 50


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_full_prints_what_trl_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str], disable_tqdm: bool) -> None:
    train(tmp_path, disable_tqdm=disable_tqdm, log_format="full", max_steps=1, eval_strategy="no")
    assert "'dc/discrepancy/p99'" in capsys.readouterr().out.splitlines()[0]


def test_an_entry_of_the_users_own_is_printed_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = train(tmp_path, max_steps=1, eval_strategy="no")
    trainer.log({"my/metric": 1.0})
    assert "'my/metric'" in capsys.readouterr().out.splitlines()[-1]


def test_the_callback_is_removed_as_the_one_it_replaces(tmp_path: Path) -> None:
    kinds = {type(callback) for callback in dc_trainer(tmp_path).callback_handler.callbacks}
    assert not kinds & {PrinterCallback, LinePrinterCallback}


def test_a_terminal_without_greek_letters_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", screen)
        train(tmp_path, max_steps=1, eval_strategy="no")
    assert b", ? 0." in screen.buffer.getvalue()  # type: ignore[attr-defined]


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="`log_format` is 'short', which is unknown: use one of 'line', 'full'"):
        DCGRPOConfig("x", use_cpu=True, bf16=False, log_format="short")
