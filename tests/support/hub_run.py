# SPDX-License-Identifier: Apache-2.0
"""Runs that talk to the Hub stand-in of tests/trainer/test_hub.py: `hub_run.py FOLDER [URL of a vLLM server]`."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from runs import PROMPTS, dc_trainer, replayed_rollouts
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.generation import vllm_client

REPOSITORY = "tester/tiny-dc"
REFUSING = "tester/read-only"


def push(folder: Path) -> dict[str, Any]:
    """Trains with a checkpoint and an evaluation, pushes both, and loads everything back from the Hub."""
    trainer = dc_trainer(
        folder / "run",
        push_to_hub=True,
        hub_model_id=REPOSITORY,
        hub_strategy="checkpoint",
        save_strategy="steps",
        save_steps=3,
        eval_dataset=PROMPTS.select(range(8)),
        tolerance_calibration_batches=2,
        log_tokens=True,
        hub_always_push=True,
    )
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(REPOSITORY), AutoTokenizer.from_pretrained(REPOSITORY)
    snapshot_download(REPOSITORY, local_dir=folder / "pulled")
    pairs = zip(model.state_dict().values(), trainer.model.state_dict().values(), strict=True)
    return {
        "same_weights": all(torch.equal(*pair) for pair in pairs),
        "text": tokenizer.decode(tokenizer("3+4=")["input_ids"]),
        "log": trainer.state.log_history,
        "tolerance": trainer.discrepancy_tolerance,
        "multiplier": trainer.dual.value,
    }


def refused(folder: Path) -> dict[str, Any]:
    """A token that is refused before training; then one that may not commit, after it."""
    said = {}
    options = {"push_to_hub": True, "hub_model_id": REFUSING}
    try:
        dc_trainer(folder / "early", hub_token="hf_wrong", **options)
    except HfHubHTTPError as error:
        said["early"] = str(error)
    trainer = dc_trainer(folder / "late", **options)
    trainer.train()
    try:
        trainer.push_to_hub()
    except HfHubHTTPError as error:
        said["late"] = str(error)
    return said


def push_synced(folder: Path, url: str) -> None:
    """Trains with weights over disk to the server at `url`, which may be a stub, and pushes every checkpoint."""
    vllm_client.is_vllm_available = lambda: True
    trainer = dc_trainer(
        folder / "run",
        use_vllm=True,
        vllm_mode="server",
        weight_sync="disk",
        vllm_server_base_url=url,
        vllm_server_timeout=5,
        rollout_func=replayed_rollouts(),
        push_to_hub=True,
        hub_model_id=REPOSITORY,
        hub_always_push=True,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    trainer.push_to_hub()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if len(sys.argv) > 2:
        push_synced(place, sys.argv[2])
        sys.exit()
    (place / "result.json").write_text(json.dumps(push(place) | {"refused": refused(place)}))
