# SPDX-License-Identifier: Apache-2.0
"""The study's command from end to end: short runs in processes of their own, and the count of what is done."""

from pathlib import Path

import pytest
from places import ROOT
from processes import run_python
from tiny import save_tiny_policy


def study(*words: str) -> str:
    return run_python(ROOT / "examples" / "papers", *words, timeout=500).stdout


def test_a_block_runs_on_another_model(tmp_path: Path) -> None:
    save_tiny_policy(tmp_path / "policy", dtype="float32")
    words = ("--model", str(tmp_path / "policy"), "--max_completion_length", "8")
    output = study("run", "--quick", "--only", "cause", "--results", str(tmp_path / "unused"), *words)
    assert "2 runs in" in output and output.count("exit 0") == 2
    assert not (tmp_path / "unused").exists()  # a smoke leaves nothing that could be counted


@pytest.mark.parametrize(
    ("words", "reason"), [(("--engine", "vllm"), "needs --model"), (("--model", "x"), "needs --results")]
)
def test_what_cannot_be_is_refused(words: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    from papers.command import parse_args

    with pytest.raises(SystemExit):
        parse_args(["run", *words])
    assert reason in capsys.readouterr().err


def test_a_model_keeps_the_arms_factor_on_its_own_rate() -> None:
    from papers.arms import NEAREST_TWICE, UNSEEN_FP8
    from papers.stack import Stack

    options = UNSEEN_FP8.options | NEAREST_TWICE.options_in(UNSEEN_FP8)
    assert Stack().options(options, UNSEEN_FP8.learning_rate) == options
    there = Stack("model", "vllm", 1e-6).options(options, UNSEEN_FP8.learning_rate)
    assert there["learning_rate"] == pytest.approx(2e-6)
    assert there["use_vllm"] and "rollout_precision" not in there


def test_the_list_counts_what_is_done(tmp_path: Path) -> None:
    (tmp_path / "cause.jsonl").write_text('{"regime": "stressed", "arm": "exact", "seed": 1000}\n')
    assert "cause: 1 of 24" in study("list", "--results", str(tmp_path))
