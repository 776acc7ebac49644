# SPDX-License-Identifier: Apache-2.0
"""The policy as it samples: saved as a checkpoint, and what a run's checkpoints keep of its weight syncs.

Saving a float32 policy in bf16 by rounding to nearest throws most of what it has learnt away, as a weight sync does.
"""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from dc_trl.rollouts.weights import plain_model

SYNC_FILE = "dc_sync_start.safetensors"


def save_deployed(engine: Any, model: torch.nn.Module, accelerator: Accelerator, path: Path) -> None:
    """Save the policy's weights as `engine` samples from them, as `save_pretrained` does. A collective.

    Args:
        engine: with `deployed_weights()`, which yields the weights as rounded, and `deployed_dtype`.
        model: the policy, prepared by Accelerate or not, with adapters or without.
        accelerator: the trainer's; its main process writes.
        path: a directory, made if it is not there.
    """
    weights = engine.deployed_weights()
    if not accelerator.is_main_process:
        for _ in weights:  # takes part in gathering the shards
            pass
    else:
        state = {name: tensor.to("cpu", copy=True) for name, tensor in weights}
        plain_model(model, accelerator).save_pretrained(path, state_dict=state)
        # transformers writes the dtype of the model in training there, and engines serve in what they read there.
        config = json.loads((path / "config.json").read_text())
        config["dtype"] = str(engine.deployed_dtype).removeprefix("torch.")
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    accelerator.wait_for_everyone()


def save_sync_state(engine: Any, directory: Path) -> None:
    """Keep the reference of `dc/sync/update_seen_since_start` in a checkpoint, if there was a sync."""
    state = engine.update_seen.state_dict() if hasattr(engine, "update_seen") else {}
    if state:
        save_file(state, directory / SYNC_FILE)


def load_sync_state(engine: Any, directory: Path) -> None:
    """Go on counting from the start of the run that saved this; without the file, from the first sync."""
    if hasattr(engine, "update_seen") and (directory / SYNC_FILE).exists():
        engine.update_seen.load_state_dict(load_file(directory / SYNC_FILE))
