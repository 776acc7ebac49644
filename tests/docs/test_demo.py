# SPDX-License-Identifier: Apache-2.0
"""The demo of the README: a short run from end to end, offline."""

import json
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from processes import run_python
from transformers import AutoModelForCausalLM

STEPS = 4


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that a short run wrote, and its output."""
    folder = tmp_path_factory.mktemp("demo")
    sizes = ("--steps", str(STEPS), "--held_out", "16", "--batch_size", "16", "--warmup_steps", "20")
    done = run_python(ROOT / "examples/demo.py", "--output_dir", folder, *sizes, cwd=folder)
    return folder, done.stdout


@pytest.fixture(scope="module")
def summaries(demo: tuple[Path, str]) -> dict[str, dict[str, Any]]:
    summary = json.loads((demo[0] / "summary.json").read_text())
    assert summary.pop("wall_seconds") > 0
    return summary


def test_the_runs_differ_in_the_sync_alone(summaries: dict[str, dict[str, Any]]) -> None:
    assert list(summaries) == ["nearest", "dither"]
    nearest, dither = summaries.values()
    assert (nearest["sync_rounding"], dither["sync_rounding"]) == ("nearest", "dither")
    for key in ("accuracy_before", "greedy_before", "length_before", "steps", "seed", "rollout_precision"):
        assert nearest[key] == dither[key]
    assert nearest["rollout_precision"] == "fp8"
    assert nearest["steps"] == STEPS


def test_the_dithered_sync_brings_the_whole_update(summaries: dict[str, dict[str, Any]]) -> None:
    assert summaries["dither"]["update_seen"] == pytest.approx(1.0, abs=0.1)
    assert summaries["nearest"]["update_seen"] != pytest.approx(1.0, abs=0.1)


def test_the_table_is_of_the_summaries(demo: tuple[Path, str], summaries: dict[str, dict[str, Any]]) -> None:
    lines = demo[1].splitlines()
    (held_out,) = (line for line in lines if "held-out accuracy, sampled" in line)
    nearest, dither = summaries.values()
    accuracies = (nearest["accuracy_before"], nearest["accuracy_after"], dither["accuracy_after"])
    assert held_out.split()[-3:] == [f"{accuracy:.1%}" for accuracy in accuracies]
    (discrepancy,) = (line for line in lines if "mean |π − μ|, all steps" in line)
    assert discrepancy.split()[-2:] == [f"{arm['discrepancy_all']:.4f}" for arm in (nearest, dither)]


def test_runs_picture_and_page_are_there(demo: tuple[Path, str]) -> None:
    folder = demo[0]
    assert (folder / "two_syncs.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    page = (folder / "report.html").read_text(encoding="utf-8")
    for arm in ("nearest", "dither"):
        assert (folder / arm / "log.jsonl").is_file()
        assert "2606.08779" in (folder / arm / "README.md").read_text(encoding="utf-8")
        assert AutoModelForCausalLM.from_pretrained(folder / arm).config.model_type == "qwen3"
        assert f">{arm}<" in page or f'"{arm}"' in page
