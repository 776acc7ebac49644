# SPDX-License-Identifier: Apache-2.0
"""Training with real vLLM in the trainer's process: weights reach the engine, and the constraint is driven by it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from places import SUPPORT
from processes import free_port, run_python

pytestmark = pytest.mark.vllm


def run(directory: Path, **engine: Any) -> dict[str, Any]:
    """What vllm_colocate_run.py reports, with these arguments of the engine."""
    # A process of its own: vLLM initialises torch.distributed and does not give it back.
    script = SUPPORT / "vllm_colocate_run.py"
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "MASTER_PORT": str(free_port()),  # torch's own, 29500, may be another test's
    }
    done = run_python(script, directory, json.dumps(engine), vllm=True, status=None, timeout=500, **variables)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("colocate"))


def test_training_moves_the_weights_and_the_engines_stay_together(result: dict[str, Any]) -> None:
    assert result["moved"] > 0.01
    means = result["dc/discrepancy/mean"]
    assert len(means) == 5 and all(0 < mean < 0.01 for mean in means)  # bfloat16 against float32
    assert set(result["dc/nan_fraction"]) == {0.0}
    assert all(0 < abs(chi2) < 0.1 for chi2 in result["dc/chi2_token"])


def test_the_engine_gets_dithered_weights_in_its_own_dtype(result: dict[str, Any]) -> None:
    assert result["served"] == "torch.bfloat16" and result["dithered"]
    assert len(result["dc/sync/update_seen"]) == 4
    assert all(0.95 < share < 1.05 for share in result["dc/sync/update_seen"])


def test_vllm_drives_calibration_and_multiplier(result: dict[str, Any]) -> None:
    floor = sum(result["dc/discrepancy/mean"][:2]) / 2
    assert result["dc/tolerance"] == pytest.approx([1.25 * floor] * 3)
    assert result["dc/multiplier"][:3] == [0.0, 0.0, 0.1]
    for step in (2, 3):
        violation = result["dc/discrepancy/mean"][step] - result["dc/tolerance"][0]
        assert result["dc/multiplier"][step + 1] == pytest.approx(result["dc/multiplier"][step] + violation)


def test_a_stale_engine_shows_in_the_discrepancy(result: dict[str, Any]) -> None:
    assert result["stale"] > 5 * result["synchronised"]
    assert 0.5 < result["resynchronised"] / result["synchronised"] < 2


@pytest.mark.skipif(
    not torch.cuda.is_available() and not torch.cpu._is_avx512_supported(),
    reason="vLLM has no FP8 KV cache on CPUs without AVX-512",
)
def test_arguments_of_the_engine_deploy_it_lower(tmp_path: Path) -> None:
    deployed = run(tmp_path, kv_cache_dtype="fp8", dtype="float32", enforce_eager=True)
    assert deployed["kv_cache"] == "fp8"
    # float32 against float32 would be below 1e-5: what is left is the FP8 cache, and it stays.
    assert all(1e-3 < mean < 0.03 for mean in deployed["dc/discrepancy/mean"])
    assert deployed["stale"] > 2 * deployed["synchronised"]
    assert 0.5 < deployed["resynchronised"] / deployed["synchronised"] < 2
