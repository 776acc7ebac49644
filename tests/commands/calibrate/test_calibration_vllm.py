# SPDX-License-Identifier: Apache-2.0
"""`dc-trl calibrate` of real vLLM: a server with weights over disk, and an engine in the trainer's process."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from calibrations import statuses
from problems import write_sums
from processes import run_python
from served_policy import BFLOAT16, engine, gap
from tiny import OFF_TILE, save_tiny_policy, tiny_model
from vllm_process import VLLMServer

from dc_trl.commands.cli import main

pytestmark = pytest.mark.vllm

# Longer than two blocks of the prefix cache.
TEMPLATE = "the quick brown fox jumps over the lazy dog, 12 + 34 = 46. And then, {problem}? "
FLAGS = {
    "bf16": "false",
    "use_cpu": "true",
    "gradient_checkpointing": "false",
    "prompt_template": TEMPLATE,
    "num_generations": "8",
    "per_device_train_batch_size": "32",
    "gradient_accumulation_steps": "4",
    "max_completion_length": "12",
    "use_vllm": "true",
    "problems": "16",
}


def command(directory: Path, policy: Path, **flags: str) -> list[str]:
    """The command for a policy, with problems of its own; writes to `directory/out`."""
    options = FLAGS | {"model_name_or_path": str(policy), "output_dir": str(directory / "out")} | flags
    options["dataset_name"] = str(write_sums(directory / "sums.jsonl"))
    return ["calibrate", *(part for key, value in options.items() for part in (f"--{key}", value))]


def result(directory: Path) -> dict[str, Any]:
    """calibration.json of the command above."""
    return json.loads((directory / "out/calibration.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    directory = tmp_path_factory.mktemp("server")
    server = VLLMServer(save_tiny_policy(directory / "policy", tiny_model(**OFF_TILE)), directory / "server.log")
    try:
        yield server.start("--block-size", "32")  # in bfloat16, as its config.json says
    finally:
        server.kill()


def test_a_server_over_disk(server: VLLMServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"vllm_mode": "server", "weight_sync": "disk", "vllm_server_base_url": server.url}
    assert main(command(tmp_path, server.model, **flags)) == 0
    healthy = result(tmp_path)
    assert set(statuses(healthy).values()) == {"pass"}
    assert 1e-4 < healthy["floor"]["value"] < 0.01  # bfloat16 against float32
    assert healthy["discrepancy_tolerance"] >= healthy["floor"]["value"] * 1.24
    assert healthy["run"]["engine"] == f"vLLM server {server.url}, weights over disk"
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["calibration.json", "calibration.png"]
    # The nudged weights are gone: without any sync, the server has those of the policy.
    assert gap(engine(server, tiny_model(**OFF_TILE), tmp_path), tiny_model(**OFF_TILE).eval()) < BFLOAT16

    import requests

    post = requests.Session.post
    without_reset = lambda self, url, **kwargs: post(self, url.replace("reset_prefix", "reset_mm"), **kwargs)  # noqa: E731
    monkeypatch.setattr(requests.Session, "post", without_reset)
    assert main(command(tmp_path, server.model, **flags)) == 1
    stale = result(tmp_path)
    assert [name for name, status in statuses(stale).items() if status == "fail"] == ["sync"]
    assert stale["discrepancy_tolerance"] is None


def test_an_engine_in_the_trainers_process(tmp_path: Path) -> None:
    policy = save_tiny_policy(tmp_path / "policy", tiny_model(**OFF_TILE))
    flags = {"vllm_mode": "colocate", "vllm_max_model_length": "128"}
    flags["vllm_engine_kwargs"] = '{"enforce_eager": true}'  # to compile takes longer than all the rest
    # A process of its own: vLLM initialises torch.distributed and does not give it back.
    words = command(tmp_path, policy, **flags)
    run_python("-m", "dc_trl", *words, vllm=True, timeout=500, VLLM_CPU_KVCACHE_SPACE="1")
    found = result(tmp_path)
    assert set(statuses(found).values()) == {"pass"}
    assert 1e-4 < found["floor"]["value"] < 0.01
    assert found["run"]["engine"] == "vLLM colocated (enforce_eager=True)" and "vllm" in found["run"]["versions"]
