# SPDX-License-Identifier: Apache-2.0
"""log.jsonl: the whole log while the run goes on, and after it was killed and resumed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import transformers
from hostile import BAD_LINES
from runs import PROMPTS, dc_trainer, trl_trainer
from transformers import TrainerCallback

from dc_trl.commands.report.tokens.choice import token_logs
from dc_trl.records.run_log import RunLogCallback
from dc_trl.records.run_reader import LOG_FILE, read_run


class Reading(TrainerCallback):
    """Reads the log at the end of each step, as a report on a running run would."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append([entry["step"] for entry in read_run(Path(args.output_dir)).entries])


def test_the_log_is_the_history_and_grows_with_the_run(tmp_path: Path) -> None:
    reading = Reading()
    trainer = dc_trainer(tmp_path, callbacks=[reading])
    trainer.train()
    run = read_run(tmp_path)
    assert run.entries == trainer.state.log_history and len(run.entries) == 4
    assert reading.seen == [[], [1], [1, 2]]  # a step is logged after its end
    assert run.start["step"] == 0 and run.start["max_steps"] == 3
    assert run.settings["constraint"] == "lagrangian" and run.settings["rollout_precision"] == "int4"
    assert run.name == tmp_path.name


def test_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    dc_trainer(tmp_path, **options).train()
    first = read_run(tmp_path).entries
    log = tmp_path / LOG_FILE
    log.write_text(log.read_text() + '{"step": 5, "rew')  # killed in the middle of a line
    assert read_run(tmp_path).entries == first
    resumed = dc_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    run = read_run(tmp_path)
    assert [entry["step"] for entry in run.entries] == [1, 2, 3, 4, 4]
    assert run.entries == resumed.state.log_history and run.start["step"] == 2


def test_a_new_run_in_the_same_directory_starts_anew(tmp_path: Path) -> None:
    dc_trainer(tmp_path, max_steps=2).train()
    second = dc_trainer(tmp_path, max_steps=1)
    second.train()
    assert read_run(tmp_path).entries == second.state.log_history


def evaluating(folder: Path, **options: Any) -> Any:
    """A trainer that evaluates at step 0 too."""
    return dc_trainer(
        folder,
        max_steps=1,
        eval_dataset=PROMPTS.select(range(4)),
        eval_strategy="steps",
        eval_on_start=True,
        **options,
    )


def test_a_new_run_keeps_no_entry_of_step_0_of_the_old_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = evaluating(tmp_path, log_tokens=True)
    first.train()
    old = (tmp_path / LOG_FILE).read_bytes()
    transformers.utils.logging.enable_propagation()
    second = evaluating(tmp_path)
    second.train()
    transformers.utils.logging.disable_propagation()
    assert [entry["step"] for entry in second.state.log_history] == [0, 1, 1, 1]
    assert read_run(tmp_path).entries == second.state.log_history
    assert (tmp_path / "log-1.jsonl").read_bytes() == old  # nothing is lost
    assert not token_logs(tmp_path) and list((tmp_path / "tokens-1").iterdir())
    said = [record.getMessage() for record in caplog.records if "earlier run" in record.getMessage()]
    assert said == [f"{tmp_path} holds the log of an earlier run, which is now log-1.jsonl and tokens-1."]
    third = evaluating(tmp_path)
    third.train()
    assert (tmp_path / "log-2.jsonl").is_file() and read_run(tmp_path).entries == third.state.log_history


def test_what_was_evaluated_before_training_is_of_the_run(tmp_path: Path) -> None:
    evaluating(tmp_path).train()
    old = (tmp_path / LOG_FILE).read_text()
    (tmp_path / LOG_FILE).write_text(old + '{"step": 2, "rew')  # killed in the middle of a line
    trainer = evaluating(tmp_path)
    first = trainer.evaluate()
    trainer.train()
    run = read_run(tmp_path)
    assert [entry["step"] for entry in run.entries] == [0, 0, 1, 1, 1]
    assert run.entries[0]["eval_reward"] == first["eval_reward"]
    assert run.entries[1:] == trainer.state.log_history
    assert (tmp_path / "log-1.jsonl").read_text() == old


def test_a_second_run_of_a_trainer_has_the_log_to_itself(tmp_path: Path) -> None:
    trainer = evaluating(tmp_path)
    trainer.train()
    trainer.evaluate()
    old = (tmp_path / LOG_FILE).read_bytes()
    trainer.train()
    assert read_run(tmp_path).entries == trainer.state.log_history
    assert (tmp_path / "log-1.jsonl").read_bytes() == old


def test_any_trainer_can_keep_the_log(tmp_path: Path) -> None:
    trainer = trl_trainer(tmp_path, max_steps=1)
    trainer.add_callback(RunLogCallback())
    trainer.train()
    assert read_run(tmp_path).entries == trainer.state.log_history


def test_trls_own_runs_are_read_from_the_newest_checkpoint(tmp_path: Path) -> None:
    trainer = trl_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    run = read_run(tmp_path)
    assert run.source == tmp_path / "checkpoint-2/trainer_state.json"
    assert run.entries == trainer.state.log_history[:2] and run.settings == {}


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no run: neither log.jsonl"):
        read_run(tmp_path)
    (tmp_path / LOG_FILE).write_text(f"{json.dumps({'step': 1})}\nnot JSON\n{json.dumps({'step': 2})}\n")
    with pytest.raises(ValueError, match="line 2 of .*log.jsonl is not JSON"):
        read_run(tmp_path)


START = {"step": 0, "max_steps": 3, "settings": {}}


@pytest.mark.parametrize(
    "line",
    [
        *(None, 3, [], {"reward": 1.0}, {"step": '"><img>'}, {"step": 1.5}, {"step": 1, "start": None}),
        *({"start": []}, {"start": {"step": 0}}, {"start": START | {"max_steps": "3"}}),
        *({"start": START | {"max_steps": math.inf}}, {"start": START | {"max_steps": math.nan}}),
        *({"step": 10**400}, {"step": -(2**60)}, {"step": math.inf}, {"step": True}),
        {"start": START | {"settings": [1]}},
    ],
)
def test_a_line_of_another_kind_is_named(tmp_path: Path, line: Any) -> None:
    (tmp_path / LOG_FILE).write_text(f"{json.dumps({'start': START})}\n{json.dumps(line)}\n")
    with pytest.raises(ValueError, match="line 2 of .*log.jsonl is neither a log entry with its step nor the start"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_is_no_json_is_named(tmp_path: Path, name: str) -> None:
    line, reason = BAD_LINES[name]
    sound = json.dumps({"step": 1, "reward": 0.5}).encode()
    (tmp_path / LOG_FILE).write_bytes(b"\n".join([sound, line, sound, b""]))
    with pytest.raises(ValueError, match=f"line 2 of .*log.jsonl is not JSON .*{reason}.*Remove that line"):
        read_run(tmp_path)
    (tmp_path / LOG_FILE).write_bytes(b"\n".join([sound, line]))  # being written
    assert read_run(tmp_path).entries == [{"step": 1, "reward": 0.5}]


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_state_that_is_no_json_is_named(tmp_path: Path, name: str) -> None:
    line, reason = BAD_LINES[name]
    (tmp_path / "trainer_state.json").write_bytes(b'{"max_steps": 3, "log_history": [%s]}' % line)
    with pytest.raises(ValueError, match="trainer_state.json is not the state of a transformers trainer") as caught:
        read_run(tmp_path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", r"trainer_state.json is not the state of a transformers trainer \(JSONDecodeError"),
        ("[]", "is not the state of a transformers trainer"),
        ('{"max_steps": Infinity, "log_history": []}', "OverflowError"),
        ('{"max_steps": NaN, "log_history": []}', "ValueError"),
        ('{"max_steps": 3, "log_history": {"step": 1}}', "entry 1 of .*trainer_state.json is neither"),
        ('{"max_steps": 3}', "KeyError"),
        ('{"max_steps": 3, "log_history": [{"step": 1}, {"loss": 1}]}', "entry 2 of .*trainer_state.json is neither"),
    ],
)
def test_a_state_of_another_kind_is_named(tmp_path: Path, state: str, message: str) -> None:
    (tmp_path / "trainer_state.json").write_text(state)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)
