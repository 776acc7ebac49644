# SPDX-License-Identifier: Apache-2.0
"""Recipes that tests calibrate, and what they read of a calibration.json."""

from pathlib import Path
from typing import Any

import yaml
from problems import write_sums
from tiny import save_tiny_policy


def write_recipe(folder: Path, **options: Any) -> Path:
    """A recipe for the tiny policy with in-process rollouts, in a folder with what it names; options go over it."""
    values = {
        "model_name_or_path": str(save_tiny_policy(folder / "policy")),
        "dataset_name": str(write_sums(folder / "sums.jsonl")),
        "prompt_template": "{problem}",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "num_generations": 8,
        "per_device_train_batch_size": 32,
        "max_completion_length": 16,
        "rollout_backend": "transformers",
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values | options), encoding="utf-8")
    return path


def statuses(found: dict[str, Any]) -> dict[str, str]:
    """Status of each check in calibration.json."""
    return {check["name"]: check["status"] for check in found["checks"]}
