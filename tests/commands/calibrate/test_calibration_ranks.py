# SPDX-License-Identifier: Apache-2.0
"""`dc-trl calibrate` on two gloo ranks whose weights FSDP2 shards. Run as a program, it is one of the ranks."""

import json
from pathlib import Path

from calibrations import statuses
from places import SUPPORT
from problems import write_sums
from processes import run_ranks
from tiny import save_tiny_policy


def test_sharded_weights_are_nudged_and_put_back(tmp_path: Path) -> None:
    flags = {
        "model_name_or_path": save_tiny_policy(tmp_path / "policy"),
        "output_dir": tmp_path / "out",
        "dataset_name": write_sums(tmp_path / "sums.jsonl"),
        "prompt_template": "{problem}",
    }
    options = {
        "bf16": "false",
        "use_cpu": "true",
        "gradient_checkpointing": "false",
        "problems": "8",
        "num_generations": "8",
        "per_device_train_batch_size": "32",
        "max_completion_length": "8",
        "rollout_backend": "transformers",
        "rollout_precision": "bf16",
    }
    words = [str(part) for key, value in (flags | options).items() for part in (f"--{key}", value)]
    done = run_ranks(SUPPORT / "calibration_ranks_run.py", *words)
    assert done.stdout.count("Recommended:") == 1  # the main process alone prints
    found = json.loads((tmp_path / "out/calibration.json").read_text(encoding="utf-8"))
    assert found["run"]["processes"] == 2 and found["distribution"]["completions"] == 2 * 8 * 8
    assert set(statuses(found).values()) == {"pass"} and found["weights_moved"] == 0.0
    assert 3e-4 < found["floor"]["value"] < 3e-3
    means = {name: table["metrics"]["logprob_diff"]["mean"] for name, table in found["passes"].items()}
    assert means["stale"] > 8 * means["second"] and 0.5 < means["nudged"] / means["second"] < 2
