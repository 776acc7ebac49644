# SPDX-License-Identifier: Apache-2.0
"""A run goes on from a checkpoint that was written to its end, whatever a killed process left beside it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from places import ROOT
from processes import run_python
from runs import PROMPTS, dc_trainer, logged, replayed_rollouts, weights
from transformers import Trainer

from dc_trl.commands.cli import main
from dc_trl.commands.train.run import _asked_checkpoint
from dc_trl.training.resuming import CheckpointError, newest, seals

LAST = seals(adaptive_entropy=False)
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "rollout_func": replayed_rollouts()}


def cut(name: str) -> Callable[[Path], None]:
    """Leaves the first half of a file."""

    def damage(checkpoint: Path) -> None:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])

    return damage


def without(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def empty(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).write_bytes(b"")


HALF_WRITTEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (without("trainer_state.json"), "it has no trainer_state.json"),
    "cut": (cut("trainer_state.json"), "its trainer_state.json is cut off"),
    "empty": (empty("trainer_state.json"), "its trainer_state.json is cut off"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of four steps with checkpoints after the second and the fourth."""
    trainer = dc_trainer(tmp_path_factory.mktemp("whole"), **SAVING)
    trainer.train()
    return trainer


@pytest.fixture
def folder(whole: Any, tmp_path: Path) -> Path:
    """A copy of its output directory."""
    return Path(shutil.copytree(whole.args.output_dir, tmp_path / "run"))


@pytest.mark.parametrize("name", HALF_WRITTEN)
def test_a_half_written_checkpoint_is_passed_over(
    folder: Path, whole: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, words = HALF_WRITTEN[name]
    damage(folder / "checkpoint-4")
    trainer = dc_trainer(folder, **SAVING)
    transformers.utils.logging.enable_propagation()
    trainer.train(resume_from_checkpoint=True)
    transformers.utils.logging.disable_propagation()
    assert f"{folder / 'checkpoint-4'} is passed over: it was not written to its end, {words}." in caplog.text
    assert torch.equal(weights(trainer), weights(whole))
    assert logged(trainer, "dc/multiplier") == logged(whole, "dc/multiplier")
    assert newest(folder, LAST) == (folder / "checkpoint-4", {})  # written again


@pytest.mark.parametrize("name", HALF_WRITTEN)
def test_a_half_written_checkpoint_that_is_named_is_refused_with_the_way_out(folder: Path, name: str) -> None:
    damage, words = HALF_WRITTEN[name]
    damage(folder / "checkpoint-4")
    trainer = dc_trainer(folder, **SAVING)
    with pytest.raises(CheckpointError, match=f"not written to its end: {words}. Resume from checkpoint-2 beside it"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))


def test_what_holds_no_whole_checkpoint_is_refused(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        without("trainer_state.json")(checkpoint)
    trainer = dc_trainer(folder, **SAVING)
    with pytest.raises(CheckpointError, match="no checkpoint to resume from. checkpoint-4 was not written to its end"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="No checkpoint beside it is whole: train anew"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    with pytest.raises(CheckpointError, match="'nowhere', which is no directory"):
        trainer.train(resume_from_checkpoint="nowhere")


class Killed(Exception):
    """Stands for the end of the process."""


def test_a_whole_checkpoint_that_is_written_again_counts_as_half_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The old state beside new weights would pass for a checkpoint of either.
    def killed(*args: Any) -> None:
        raise Killed

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(Killed):
        dc_trainer(folder, **SAVING).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert newest(folder, LAST).taken.name == "checkpoint-2"


def test_with_adaptive_entropy_the_state_of_its_controller_is_the_last(tmp_path: Path) -> None:
    options = SAVING | {"use_adaptive_entropy": True}
    dc_trainer(tmp_path, **options).train()
    without("entropy_ctrl_state.json")(tmp_path / "checkpoint-4")  # TRL would go on, with the first coefficient
    assert newest(tmp_path, seals(adaptive_entropy=True)).taken.name == "checkpoint-2"
    trainer = dc_trainer(tmp_path, **options)
    trainer.train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-4/entropy_ctrl_state.json").is_file()


def test_checkpoints_are_taken_by_number_and_other_names_are_none(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "checkpoint-11-copy", "checkpoint-12.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-99").write_text("a file")
    assert newest(tmp_path, LAST).taken.name == "checkpoint-10"


def test_killed_runs_resume_to_the_bit() -> None:
    done = run_python(ROOT / "examples/benchmarks/kills.py", "--kills", "3", "--json", "-", timeout=500)
    figures = json.loads(done.stdout)
    assert figures["killed_in"] == {"saving": 2, "syncing": 1}
    assert figures["half_written"] == 2  # one for each kill in a save
    assert figures["bad"] == 0


@pytest.mark.parametrize(("step", "to_the_bit"), [(2, True), (3, False)])
def test_rollouts_that_a_checkpoint_cuts_are_made_anew(tmp_path: Path, step: int, to_the_bit: bool) -> None:
    # Four updates on two batches of rollouts. TRL saves none, so a run that stopped between the two updates of a batch
    # starts its batches there: with other completions than the uninterrupted run's.
    options = SAVING | {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "save_steps": 1}
    uninterrupted = dc_trainer(tmp_path, **options)
    uninterrupted.train()
    resumed = dc_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert torch.equal(weights(resumed), weights(uninterrupted)) == to_the_bit
    assert resumed.state.global_step == 4


FINISHED: dict[str, dict[str, Any]] = {
    "replayed": {},
    "accumulating": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "reused": {"num_iterations": 2},
    "one rounding": {"rollout_func": None, "bf16": True, "sync_rounding": "dither", "rollout_precision": "bf16"},
    "at the end of its epochs": {"train_dataset": PROMPTS.select(range(4)), "max_steps": -1, "num_train_epochs": 2},
}


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_run_that_is_resumed_trains_nothing(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = SAVING | {"optim": "adamw_torch"} | FINISHED[name]
    if options["rollout_func"] is None:
        del options["rollout_func"]
    first = dc_trainer(tmp_path, **options)
    first.train()
    files = sorted(path.name for path in tmp_path.iterdir())
    trainer = dc_trainer(tmp_path, **options)
    transformers.utils.logging.enable_propagation()
    output = trainer.train(resume_from_checkpoint=True)
    transformers.utils.logging.disable_propagation()
    assert output.global_step == trainer.state.global_step == first.state.global_step == 4
    assert torch.equal(weights(trainer), weights(first))
    assert trainer.dual.value == first.dual.value and trainer.discrepancy_tolerance == first.discrepancy_tolerance
    assert trainer.lr_scheduler.state_dict() == first.lr_scheduler.state_dict()
    mine, theirs = (list(t.optimizer.state_dict()["state"].values()) for t in (trainer, first))
    assert len(mine) == len(theirs) > 0
    for ours, before in zip(mine, theirs, strict=True):
        assert all(torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(before[key])) for key in before)
    # The log of the run, and that this one came to its end.
    assert trainer.state.log_history[:-1] == first.state.log_history[:-1]
    assert "train_runtime" in trainer.state.log_history[-1] and "reward" not in trainer.state.log_history[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == files  # no further checkpoint, no log set aside
    said = [record.message for record in caplog.records if "nothing is trained" in record.message]
    assert len(said) == 1 and "checkpoint-4 is of step 4, and this run ends at step 4" in said[0]
    assert "raise `max_steps`" in said[0]


def test_a_finished_run_goes_on_where_it_may_take_more_steps(whole: Any, folder: Path) -> None:
    shorter = dc_trainer(folder, **SAVING | {"max_steps": 3})
    shorter.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert shorter.state.global_step == 4 and torch.equal(weights(shorter), weights(whole))
    longer = dc_trainer(folder, **SAVING | {"max_steps": 5})
    longer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert longer.state.global_step == 5 and not torch.equal(weights(longer), weights(whole))


@pytest.mark.parametrize(
    ("said", "meant"), [("true", True), ("True", True), (True, True), ("false", None), (None, None), ("a/b", "a/b")]
)
def test_a_command_line_may_ask_for_the_newest(said: Any, meant: Any) -> None:
    assert _asked_checkpoint(said) == meant


def test_the_command_says_in_a_sentence_that_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*args: Any) -> None:
        newest(tmp_path, LAST)

    monkeypatch.setattr("dc_trl.commands.train.run.has_plain_prompts", lambda *args: False)
    monkeypatch.setattr("dc_trl.commands.train.run.load_data", lambda *args: (None, None))
    monkeypatch.setattr("dc_trl.commands.train.run.train", none)
    model = ["--model_name_or_path", "m", "--dataset_name", "d", "--rollout_backend", "transformers"]
    assert main(["train", *model, "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]) == 2
    assert f"{tmp_path} holds no checkpoint to resume from" in capsys.readouterr().err


def test_the_prompts_after_the_first_epoch_come_in_another_order(tmp_path: Path) -> None:
    # TRL's sampler shuffles every epoch with one generator, and a resumed run starts that anew. A limit, said in
    # docs/quickstart.md: when this fails, TRL or this package has mended it.
    options = SAVING | {"train_dataset": PROMPTS.select(range(4)), "max_steps": 6, "save_steps": 1}  # 2 steps an epoch
    uninterrupted = dc_trainer(tmp_path, **options)
    uninterrupted.train()
    for step, to_the_bit in ((1, True), (4, False)):
        resumed = dc_trainer(tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert torch.equal(weights(resumed), weights(uninterrupted)) == to_the_bit, step
