# SPDX-License-Identifier: Apache-2.0
"""Where weights over disk lie: not pushed, gone when nobody needs them, and one trainer's at a time.

The server is a stub. The rollouts come from a `rollout_func`, before which TRL syncs the engine all the same.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import HubStandIn
from places import SUPPORT
from processes import run_python
from runs import PROMPTS, dc_trainer, replayed_rollouts
from stub_server import Stub, vllm_stub
from tiny import tiny_model
from transformers import TrainerCallback

from dc_trl.records.run_reader import read_run
from dc_trl.rollouts.checkpoint import write_checkpoint

HUB_RUN = SUPPORT / "hub_run.py"

ANSWERS: dict[str, Any] = {
    "/health": {},
    "/v1/models": {"data": [{"id": "tiny"}]},
    "/server_info": {
        "vllm_config": {"device_config": {"device_type": "cpu"}, "model_config": {"dtype": "torch.bfloat16"}}
    },
    "/collective_rpc": {"results": [None]},
    "/reset_prefix_cache": {"success": True},
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """A stub that says yes to all that a trainer asks of a vLLM server."""
    with vllm_stub(monkeypatch, ANSWERS) as stub:
        yield stub


def synced_trainer(folder: Path, server: Stub, **options: Any) -> Any:
    defaults = {"use_vllm": True, "vllm_mode": "server", "weight_sync": "disk", "vllm_server_base_url": server.url}
    defaults |= {"vllm_server_timeout": 5, "rollout_func": replayed_rollouts(), "max_steps": 2}
    return dc_trainer(folder, **(defaults | options))


class AtStepEnd(TrainerCallback):
    """Calls a function at the end of each step."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.call()


def loaded(server: Stub) -> list[Path]:
    """The directories that the server was told to load, in order."""
    bodies = [json.loads(body) for path, body in server.posted if path == "/collective_rpc"]
    return [Path(body["kwargs"]["weights_path"]) for body in bodies]


def left(folder: Path) -> list[Path]:
    """The weights that lie in the output directory, outside transformers' checkpoints."""
    return sorted(path for path in folder.rglob("*.safetensors") if "checkpoint-" not in str(path))


def test_weights_lie_there_while_training_and_not_after_it(server: Stub, tmp_path: Path) -> None:
    seen = []
    trainer = synced_trainer(
        tmp_path,
        server,
        eval_dataset=PROMPTS.select(range(4)),
        callbacks=[AtStepEnd(lambda: seen.append(len(left(tmp_path))))],
    )
    trainer.train()
    assert seen == [1, 2] and len(loaded(server)) == 2
    assert left(tmp_path) == [] and not loaded(server)[0].parent.exists()
    trainer.evaluate()
    assert len(loaded(server)) == 3 and left(tmp_path) == []


def test_a_run_that_fails_leaves_no_weights_and_no_lock(server: Stub, tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyError("in a callback")

    with pytest.raises(KeyError):
        synced_trainer(tmp_path, server, callbacks=[AtStepEnd(fail)]).train()
    assert len(loaded(server)) == 1 and left(tmp_path) == []
    synced_trainer(tmp_path, server).train()


def test_a_sync_that_fails_leaves_no_lock(server: Stub, tmp_path: Path) -> None:
    first, second = synced_trainer(tmp_path, server), synced_trainer(tmp_path, server)
    server.answers["/collective_rpc"] = (404, {})
    with pytest.raises(RuntimeError, match="404"):
        first.vllm_generation.sync_weights()
    server.answers["/collective_rpc"] = (200, ANSWERS["/collective_rpc"])
    second.vllm_generation.sync_weights()


def test_a_second_trainer_on_the_directory_is_refused(server: Stub, tmp_path: Path) -> None:
    waiting = synced_trainer(tmp_path, server)
    message = f"Another trainer.*{tmp_path}.*`output_dir` of its own"
    refused = []

    def try_others() -> None:
        for attempt in (lambda: synced_trainer(tmp_path, server), waiting.train):
            with pytest.raises(RuntimeError, match=message):
                attempt()
            refused.append(len(left(tmp_path)))

    trainer = synced_trainer(tmp_path, server, max_steps=1, callbacks=[AtStepEnd(try_others)])
    trainer.train()
    assert refused == [1, 1]  # and the first one's weights are there still
    assert read_run(tmp_path).entries == trainer.state.log_history  # and its log
    waiting.train()
    assert waiting.state.global_step == 2


def test_the_lock_goes_with_the_process_that_held_it(server: Stub, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, dc_trl.rollouts.checkpoint as c; p = pathlib.Path(sys.argv[1]); "
        "held = c.holding(c.lock_beside(p), p); held.__enter__(); print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "_weight_sync")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match="Another trainer"):
            synced_trainer(tmp_path, server)
    finally:
        holder.kill()
        holder.wait()
    synced_trainer(tmp_path, server).train()


def test_the_weights_are_not_pushed(server: Stub, tmp_path: Path) -> None:
    with HubStandIn() as hub:
        run_python(HUB_RUN, tmp_path, server.url, vllm=True, cwd=tmp_path, **hub.environment(tmp_path / "home"))
        (repository,) = hub.repositories.values()
    assert len(loaded(server)) == 3 and len(repository.commits) >= 3
    assert "model.safetensors" in repository.files and "log.jsonl" not in repository.files
    pushed = {path for commit in repository.commits for path in commit.files}
    assert not [path for path in pushed if "policy-" in path or "lock" in path]


@pytest.mark.parametrize(
    ("readers", "file", "folder"), [("owner", 0o600, 0o700), ("group", 0o640, 0o750), ("all", 0o644, 0o755)]
)
@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_weights_are_for_those_who_may_read_them(
    tmp_path: Path, readers: str, file: int, folder: int, umask: int
) -> None:
    root = tmp_path / "run" / "_weight_sync"
    model = tiny_model()
    before = os.umask(umask)
    try:
        write_checkpoint(root / "policy-00000001", model, model.state_dict().items(), readers=readers)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [root, *root.rglob("*")]}
    assert modes == {"_weight_sync": folder, "policy-00000001": folder, "model-00001.safetensors": file}


def test_a_directory_that_is_there_keeps_its_mode_and_hands_its_group_on(tmp_path: Path) -> None:
    model = tiny_model()
    tmp_path.chmod(0o2711)
    write_checkpoint(tmp_path / "policy-00000001", model, model.state_dict().items(), readers="group")
    assert tmp_path.stat().st_mode & 0o7777 == 0o2711
    assert (tmp_path / "policy-00000001").stat().st_mode & 0o7777 == 0o2750


def test_a_run_writes_weights_for_the_readers_of_its_configuration(server: Stub, tmp_path: Path) -> None:
    modes = []
    trainer = synced_trainer(
        tmp_path,
        server,
        max_steps=1,
        weight_sync_readers="group",
        callbacks=[AtStepEnd(lambda: modes.extend(path.stat().st_mode & 0o777 for path in left(tmp_path)))],
    )
    trainer.train()
    assert modes == [0o640]
