# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint keeps of the constraint, and what a run resumed with other settings takes up of it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from hostile import DEEP
from runs import dc_trainer, logged, replayed_rollouts, trl_trainer

from dc_trl import DCGRPOTrainer
from dc_trl.records.whole_files import write_whole
from dc_trl.training.state import STATE_FILE, read_state, write_state

OPTIONS = {"max_steps": 4, "tolerance_calibration_batches": 1, "tolerance_slack": 0.5, "dual_lr": 5.0}
SAVING = OPTIONS | {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> Any:
    """transformers' warnings reach caplog."""
    transformers.utils.logging.enable_propagation()
    yield
    transformers.utils.logging.disable_propagation()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said of a resumed state."""
    messages = (record.getMessage() for record in caplog.records)
    return [message for message in messages if message.startswith("DC-GRPO, resuming: ")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint after step 2 of a run under a constraint; its tolerance is known, and a λ that can has moved."""
    folder = tmp_path_factory.mktemp("saved")

    def checkpoint(constraint: str) -> Path:
        if not (folder / constraint).exists():
            dc_trainer(folder / constraint, constraint=constraint, **SAVING).train()
        return folder / constraint / "checkpoint-2"

    return checkpoint


@pytest.fixture
def checkpoint(runs: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the lagrangian run's."""
    return Path(shutil.copytree(runs("lagrangian"), tmp_path / "checkpoint-2"))


def resumed(checkpoint: Path, folder: Path, **changes: Any) -> DCGRPOTrainer:
    """The trainer of a run that went on from the checkpoint up to step 4, in a directory of its own."""
    trainer = dc_trainer(folder / "resumed", **(OPTIONS | changes))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


def multiplier(checkpoint: Path) -> float:
    return float(json.loads((checkpoint / STATE_FILE).read_text())["dual"]["value"])


def test_an_unchanged_run_goes_on_and_says_nothing(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert multiplier(checkpoint) != 0.1
    trainer = resumed(checkpoint, tmp_path)
    assert logged(trainer, "dc/multiplier")[2] == multiplier(checkpoint)
    assert said(caplog) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"discrepancy_metric": "logprob_diff"}, "`discrepancy_metric` is 'logprob_diff', was 'prob_diff'"),
        ({"discrepancy_average": "token"}, "`discrepancy_average` is 'token', was 'trajectory'"),
        ({"rollout_precision": "int3"}, "transformers, int3', was 'in-process transformers, int4'"),
        ({"temperature": 0.7}, "`temperature` is 0.7, was 1.0"),
        ({"bf16": True}, "`training_autocast` is 'bf16', was 'no'"),
        ({"rollout_func": replayed_rollouts()}, "`rollout_func` is 'replayed_rollouts.<locals>.rollout', was None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_measure_calibrates_anew(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], words: str
) -> None:
    trainer = resumed(checkpoint, tmp_path, **changes)
    measured = logged(trainer, "dc/discrepancy/mean")[2:]
    assert logged(trainer, "dc/tolerance")[-1] == pytest.approx(0.5 * measured[0])  # of the resumed run's first batch
    assert logged(trainer, "dc/multiplier")[2] == 0.0  # no penalty while the tolerance is unknown
    (message,) = [message for message in said(caplog) if "calibrated anew" in message]
    assert words in message


def test_a_multiplier_in_other_units_starts_anew(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = resumed(checkpoint, tmp_path, discrepancy_metric="logprob_diff", discrepancy_tolerance=0.3)
    assert logged(trainer, "dc/multiplier")[2] == 0.1
    (message,) = [message for message in said(caplog) if "multiplier starts" in message]
    assert f"{multiplier(checkpoint):.4g}" in message and "`discrepancy_metric` is 'logprob_diff'" in message
    assert any("The tolerance in use is the 0.3 that was given" in message for message in said(caplog))


@pytest.mark.parametrize("before", ["none", "fixed", "threshold", "lagrangian"])
@pytest.mark.parametrize("after", ["fixed", "threshold", "lagrangian"])
def test_the_multiplier_moves_from_lagrangian_to_lagrangian_only(
    runs: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, before: str, after: str
) -> None:
    checkpoint = runs(before)
    trainer = resumed(checkpoint, tmp_path, constraint=after, multiplier_init=0.3)
    both = before == after == "lagrangian"
    assert logged(trainer, "dc/multiplier")[2] == (multiplier(checkpoint) if both else 0.3)
    assert logged(trainer, "dc/tolerance")[2] == logged(trainer, "dc/tolerance")[0]  # the measure is the same
    starts = [message for message in said(caplog) if "multiplier starts at `multiplier_init` = 0.3" in message]
    assert len(starts) == int(before != after)
    if both:
        assert any("the multiplier goes on from" in message for message in said(caplog))


def test_what_the_configuration_sets_is_in_force_and_said(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"dual_lr": 0.0, "multiplier_max": 0.05, "multiplier_init": 0.05, "tolerance_slack": 1.0}
    trainer = resumed(checkpoint, tmp_path, **changes)
    assert logged(trainer, "dc/multiplier")[2:] == [0.05, 0.05]
    assert logged(trainer, "dc/tolerance")[2] == pytest.approx(2 * logged(trainer, "dc/tolerance")[0])
    cut, settings = said(caplog)
    assert f"{multiplier(checkpoint):.4g}, cut to `multiplier_max` = 0.05" in cut
    for words in (
        "`dual_lr` is 0.0, was 5.0",
        "`multiplier_max` is 0.05, was 1.0",
        "`tolerance_slack` is 1.0, was 0.5",
    ):
        assert words in settings


def test_a_tolerance_may_be_given_to_a_calibrated_run(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = resumed(checkpoint, tmp_path, discrepancy_tolerance=0.0123)
    assert trainer.discrepancy_tolerance == 0.0123
    (message,) = said(caplog)
    assert "`discrepancy_tolerance` is 0.0123, was None" in message


def test_a_state_without_its_measure_is_not_trusted(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = json.loads((checkpoint / STATE_FILE).read_text())
    del state["measured_with"], state["settings"]
    (checkpoint / STATE_FILE).write_text(json.dumps(state))
    trainer = resumed(checkpoint, tmp_path)
    assert logged(trainer, "dc/multiplier")[2:] == [0.0, 0.1]
    assert "does not say what it was measured with" in said(caplog)[0] and "was 'unknown'" in said(caplog)[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"dual": {"value": 0.1}, "toler', "cannot be read as JSON, so it may be cut off"),
        ("", "cannot be read as JSON"),
        pytest.param(DEEP, "nested deeper than 100 levels", id="nested"),
        ("[1, 2]", "is not the state of a DCGRPOTrainer: it has no dual, instruments, tolerance"),
        ('{"entropy_coef": 0.1}', "it has no dual, instruments, tolerance"),
        ('{"dual": {}, "tolerance": {}, "instruments": {}}', "KeyError"),
        (
            '{"dual": {"value": -1}, "tolerance": {"total": 0, "count": 0}, "instruments": {"grad_norm": null}}',
            "multiplier is -1",
        ),
        (
            '{"dual": {"value": 1}, "tolerance": {"total": NaN, "count": 1}, "instruments": {"grad_norm": null}}',
            "calibration is nan over 1",
        ),
        (
            '{"dual": {"value": 1}, "tolerance": {"total": 1, "count": 1}, "instruments": {"grad_norm": "big"}}',
            "could not convert",
        ),
        (
            '{"dual": {"value": 1}, "tolerance": {"total": 1, "count": 1}, "instruments": {"grad_norm": 1},'
            ' "settings": 5}',
            "TypeError",
        ),
    ],
)
def test_a_damaged_or_foreign_state_is_named(checkpoint: Path, tmp_path: Path, content: str, words: str) -> None:
    (checkpoint / STATE_FILE).write_text(content)
    with pytest.raises(ValueError, match="Resume from another checkpoint; or.*remove the file") as error:
        resumed(checkpoint, tmp_path)
    assert str(checkpoint / STATE_FILE) in str(error.value) and words in str(error.value)


def test_a_checkpoint_of_trls_trainer_says_that_the_constraint_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trl_trainer(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2).train()
    trainer = resumed(tmp_path / "run/checkpoint-2", tmp_path, multiplier_init=0.25)
    (message,) = said(caplog)
    for words in ("checkpoint-2 has no dc_grpo_state.json", "`multiplier_init` = 0.25", "`discrepancy_tolerance`"):
        assert words in message
    assert logged(trainer, "dc/multiplier") == [0.0, 0.25]


def test_a_trainer_that_has_trained_starts_anew_as_well(tmp_path: Path) -> None:
    trl_trainer(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2).train()
    trainer = dc_trainer(tmp_path / "resumed", **OPTIONS)
    trainer.train()
    assert trainer.dual.value != 0.1
    trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert logged(trainer, "dc/multiplier") == [0.0, 0.1]


def test_a_state_is_written_whole_into_a_directory_that_need_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"dual": {"value": 0.5}, "tolerance": {"total": 0.1, "count": 3}, "instruments": {"grad_norm": None}}
    write_state(tmp_path / "deep/checkpoint-2", state)
    assert read_state(tmp_path / "deep/checkpoint-2") == state
    assert read_state(tmp_path) is None

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "deep/checkpoint-2" / STATE_FILE, "half of i")
    assert read_state(tmp_path / "deep/checkpoint-2") == state
