# SPDX-License-Identifier: Apache-2.0
"""Train high, deploy low: float32 trainers, one and two processes, and a real vLLM server with an FP8 KV cache."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import SUPPORT
from processes import run_ranks
from tiny import save_tiny_policy
from vllm_process import VLLMServer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not torch.cpu._is_avx512_supported(),
        reason="vLLM has no FP8 KV cache on CPUs without AVX-512",
    ),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    directory = tmp_path_factory.mktemp("fp8")
    server = VLLMServer(save_tiny_policy(directory / "policy"), directory / "server.log")
    try:
        yield server.start("--dtype", "float32", "--kv-cache-dtype", "fp8")
    finally:
        server.kill()


def train(server: VLLMServer, directory: Path, ranks: int) -> list[dict[str, Any]]:
    """What every rank saw of the run in server_ranks_run.py."""
    run_ranks(SUPPORT / "server_ranks_run.py", server.url, directory, ranks=ranks, vllm=True)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def test_an_fp8_deployment_stays_in_step_and_drives_the_multiplier(server: VLLMServer, tmp_path: Path) -> None:
    (report,) = train(server, tmp_path, ranks=1)
    means = report["dc/discrepancy/mean"]
    assert len(means) == 4 and all(1e-3 < mean < 0.03 for mean in means)  # FP8, and synchronised
    assert report["moved"] > 0.01
    assert report["dc/tolerance"] == pytest.approx([1.25 * means[0]] * 3)
    assert report["dc/multiplier"][:2] == [0.0, 0.1]
    assert report["dc/multiplier"][2] == pytest.approx(0.1 + means[1] - 1.25 * means[0])


def test_two_trainer_processes_share_one_server(server: VLLMServer, tmp_path: Path) -> None:
    first, second = train(server, tmp_path, ranks=2)
    assert first == second | {"completions": first["completions"]}  # every metric, λ and the weights
    assert first["completions"] != second["completions"]  # each has its own half of the batch
    assert all(1e-3 < mean < 0.03 for mean in first["dc/discrepancy/mean"])
