# SPDX-License-Identifier: Apache-2.0
"""Short training runs of the tiny policy, shared by the trainer's tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from dc_trl import DCGRPOConfig, DCGRPOTrainer
from dc_trl.rollouts.transformers import TransformersGeneration

PROMPTS = Dataset.from_dict({"prompt": [f"{i}+{i + 1}=" for i in range(32)]})


def count_digits(completions: list[str], **_: Any) -> list[float]:
    """A reward that a policy can raise: digits and a's."""
    return [float(sum(c.isdigit() or c == "a" for c in text)) for text in completions]


def settings(output_dir: Path, **overrides: Any) -> dict[str, Any]:
    """Arguments of a run of a few steps on one thread's worth of work."""
    return {
        "output_dir": str(output_dir),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "loss_type": "dapo",
    } | overrides


def dc_trainer(output_dir: Path, *, model: Any = None, **options: Any) -> DCGRPOTrainer:
    """A DCGRPOTrainer, by default with in-process int4 rollouts. Trainer arguments go by their own names."""
    names = ["rollout_func", "train_dataset", "eval_dataset", "callbacks", "peft_config", "processing_class", "tools"]
    names += ["optimizers"]
    arguments = {name: options.pop(name) for name in names if name in options}
    reward = options.pop("reward_funcs", count_digits)
    if "rollout_func" not in arguments and not options.get("use_vllm"):
        options = {"rollout_backend": "transformers", "rollout_precision": "int4"} | options
    args = DCGRPOConfig(**settings(output_dir, **options))
    policy = tiny_model() if model is None else model
    arguments = {"train_dataset": PROMPTS, "processing_class": tiny_tokenizer()} | arguments
    return quiet(DCGRPOTrainer(policy, reward, args, **arguments))


def quiet(trainer: Any) -> Any:
    """Without the callback that prints the log."""
    trainer.remove_callback(PrinterCallback)
    return trainer


def trl_trainer(output_dir: Path, precision: str | None = "int4", **options: Any) -> GRPOTrainer:
    """TRL's own trainer, fed by the same in-process engine, with its default second forward."""
    defaults = {
        "lr_scheduler_type": "constant",
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 2.0,
    }
    args = GRPOConfig(**settings(output_dir, **(defaults | options)))
    trainer = GRPOTrainer(tiny_model(), count_digits, args, train_dataset=PROMPTS, processing_class=tiny_tokenizer())
    trainer.vllm_generation = TransformersGeneration(
        trainer.model,
        trainer.accelerator,
        trainer.processing_class,
        precision=precision,
        temperature=args.temperature,
        max_completion_length=args.max_completion_length,
        eos_token_ids=trainer.eos_token_ids,
    )
    trainer.use_vllm, trainer.vllm_mode, trainer._last_loaded_step = True, "transformers", -1
    return quiet(trainer)


def logged(trainer: GRPOTrainer, key: str) -> list[float]:
    """The values of a key in the order of the log."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(trainer: GRPOTrainer) -> torch.Tensor:
    """All parameters in one flat vector."""
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def record_losses(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What TRL's loss saw, one entry a micro-batch: its inputs as they were at its end, and `train_logps`, its own."""
    records: list[dict[str, Any]] = []
    latest: list[torch.Tensor] = []
    forward, loss = GRPOTrainer._get_per_token_logps_and_entropies, GRPOTrainer._compute_loss

    def recording_forward(self: GRPOTrainer, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        latest[:] = [outputs[0].detach()]
        return outputs

    def recording_loss(self: GRPOTrainer, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        value = loss(self, model, inputs)
        records.append(inputs | {"train_logps": latest[0]})
        return value

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", recording_forward)
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", recording_loss)
    return records


def replayed_rollouts(
    shift: float = 0.1, length: int = 6, edit: Callable[[list[list[Any]]], None] | None = None
) -> Callable[..., dict[str, Any]]:
    """A `rollout_func` whose completions and log-probs depend on the prompt and its place in the group alone.

    Log-probs are those of a policy that gives every token e^(−2 − shift·position). `edit` may change them in place.
    """

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        tokenizer = trainer.processing_class
        prompt_ids = tokenizer(text=prompts)["input_ids"]
        completions, logprobs = [], []
        for index, ids in enumerate(prompt_ids):
            count = 2 + (ids[0] + index % trainer.num_generations) % (length - 1)
            completions.append([6 + (ids[0] * 7 + index % trainer.num_generations * 3 + t) % 30 for t in range(count)])
            logprobs.append([-2.0 - shift * t for t in range(count)])
        if edit is not None:
            edit(logprobs)
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": logprobs}

    return rollout
