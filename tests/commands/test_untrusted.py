# SPDX-License-Identifier: Apache-2.0
"""What commands print and write of names that they were given, and what they never print of a command line."""

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hostile_text import HOSTILE
from markdown_it import MarkdownIt
from problems import write_sums
from tiny import save_tiny_policy

from dc_trl.commands.calibrate.command import _set
from dc_trl.commands.cli import main
from dc_trl.commands.evaluate.table import results_table
from dc_trl.records.text import visible

SECRET = "hf_" + "q" * 34
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Of them, what can be a name of a file.
NAMES = [text.replace("/", "").replace("\x00", "") for text in HOSTILE if "\ud800" not in text]


@pytest.mark.parametrize("name", NAMES)
def test_an_error_says_a_name_without_its_control_characters(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", f"./{name}"]) == 2
    said = capsys.readouterr().err
    assert not CONTROL.search(said) and "does not exist" in said


def test_a_name_that_is_no_text_is_said_all_the_same(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = Path(str(tmp_path), "run\udcff\x1b[2J")  # as Python has a file name of other bytes than UTF-8
    folder.mkdir()
    assert main(["report", str(folder)]) == 2
    said = capfd.readouterr().err
    assert "run⟨U+DCFF⟩⟨U+001B⟩[2J holds no run" in said


@pytest.mark.parametrize("text", HOSTILE)
def test_the_table_of_scores_has_a_row_for_each(text: str) -> None:
    result: dict[str, Any] = {"benchmark": "own", "title": text, "metric": "avg@4", "problems": 3, "limit": None}
    result |= {"mean": 0.5, "stderr": 0.1, "truncated": 0.0, "mean_tokens": 5.0, "unjudged_problems": 0}
    table = results_table([result, result])
    assert not CONTROL.search(table) and len(table.splitlines()) == 4
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(table)
    cells = [token.children or [] for token in tokens if token.type == "inline"]
    read = ["".join(part.content for part in cell) for cell in cells]
    assert len(read) == 15 and read[5] == read[10] == f"{visible(text)}, avg@4".strip()
    assert {part.type for cell in cells for part in cell} <= {"text", "text_special"}


@pytest.mark.parametrize("text", HOSTILE)
def test_a_recipe_gets_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("learning_rate: 1.0e-6\ndiscrepancy_tolerance: 0.5  # old\nseed: 1\n")
    run = {"time": "2026-11-24T00:00:00", "model": text, "engine": text, "hardware": "2 CPU cores"}
    found: Any = SimpleNamespace(
        run=run, plan=SimpleNamespace(metric="prob_diff"), recommendation=SimpleNamespace(tolerance=0.25)
    )
    _set(path, found)
    lines = path.read_text(encoding="utf-8").split("\n")
    assert yaml.safe_load(path.read_text()) == {"learning_rate": 1e-6, "discrepancy_tolerance": 0.25, "seed": 1}
    assert len(lines) == 4 and visible(text) in lines[1] and lines[1].endswith("2 CPU cores")


def test_a_plan_shows_the_data_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_policy(tmp_path / "policy")
    rows = [{"prompt": "1+1=", "answer": "2\x1b[2J\nname  forged"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"model_name_or_path": "policy", "dataset_name": "data.jsonl", "bf16": "false", "use_cpu": "true"}
    options |= {"rollout_backend": "transformers", "per_device_train_batch_size": "8", "output_dir": "out"}
    assert main(["train", *(part for key, value in options.items() for part in (f"--{key}", value)), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "2⟨U+001B⟩[2J↵name  forged" in said and not CONTROL.search(said)


@pytest.mark.parametrize("command", ["train", "calibrate"])
def test_a_launch_that_fails_does_not_print_the_command_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)

    def fail(args: Any) -> None:
        assert SECRET in args.training_script_args  # it is for the processes
        raise subprocess.CalledProcessError(3, ["python", *args.training_script_args])

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    write_sums(tmp_path / "sums.jsonl")
    arguments = ["--model_name_or_path", "owner/model", "--dataset_name", str(tmp_path / "sums.jsonl")]
    arguments += ["--accelerate_config", "single_gpu", "--hub_token", SECRET]
    assert main([command, *arguments]) == 3
    captured = capsys.readouterr()
    assert SECRET not in captured.out + captured.err
