# SPDX-License-Identifier: Apache-2.0
"""Recipes on a base model, whose tokenizer has no chat template: plain prompts, or an error before anything loads."""

import json
from pathlib import Path
from typing import Any

import pytest
from example_scripts import TINY, enter_tiny_recipe

import dc_trl.commands.train.run
from dc_trl.commands.cli import main
from dc_trl.trainer import DCGRPOTrainer


@pytest.fixture
def base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which the tiny recipe names a model without a chat template; the model's directory."""
    enter_tiny_recipe(tmp_path, monkeypatch)
    (tmp_path / "outputs/tiny/policy/chat_template.jinja").unlink()
    return tmp_path / "outputs/tiny/policy"


@pytest.mark.parametrize("command", ["train", "calibrate"])
def test_chat_is_refused_before_anything_loads(
    base_model: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loads(*args: Any, **options: Any) -> None:
        pytest.fail("it loads more than the tokenizer")

    monkeypatch.setattr(dc_trl.commands.train.run, "load_math_dataset", loads)
    monkeypatch.setattr("dc_trl.tasks.rewards.load_rewards", loads)
    monkeypatch.setattr(DCGRPOTrainer, "__init__", loads)
    assert main([command, "--config", str(TINY), "--prompt_format", "chat"]) == 2
    message = capsys.readouterr().err
    assert f"dc-trl {command}: error: `prompt_format` is 'chat', and the tokenizer of outputs/tiny/policy" in message
    assert "has no chat template" in message and "Use 'plain' or 'auto'" in message


def test_a_base_model_trains_on_plain_prompts(base_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("math_verify")
    flags = ["--max_steps", "2", "--logging_steps", "1", "--log_tokens", "true", "--disable_tqdm", "true"]
    assert main(["train", "--config", str(TINY), "--steps_per_generation", "1", *flags]) == 0
    captured = capsys.readouterr()
    assert "no chat template, so prompts are plain text (prompt_format: auto)" in captured.err
    run = base_model.parent / "run"
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "reward" in entry] == [1, 2]
    assert "output = generator(question, " in (run / "README.md").read_text()


def test_the_plan_says_which_prompts(base_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(TINY), "--dry_run"]) == 0
    assert "plain text" in capsys.readouterr().out
