# SPDX-License-Identifier: Apache-2.0
"""The gradient guard in a run: what a step that is left out changes, what is written of it, and when it stops."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from runs import dc_trainer, logged, weights
from transformers import TrainerCallback

from dc_trl import DCGRPOTrainer
from dc_trl.estimators.gradient_guard import LEAST
from dc_trl.training import guard_trainer

STEPS = {"max_steps": LEAST + 3, "learning_rate": 1e-4, "constraint": "none", "gradient_guard": 50.0}
BAD = LEAST + 1  # the first step after a median is known
Fault = Callable[[torch.Tensor], torch.Tensor]


def spike(gradient: torch.Tensor) -> torch.Tensor:
    return gradient * 1e4


def broken(gradient: torch.Tensor) -> torch.Tensor:
    return gradient * math.nan


class FaultyGradient(TrainerCallback):
    """At the given steps the gradient of a weight is another; keeps weights and optimizer as each step leaves them."""

    def __init__(self, steps: set[int], fault: Fault = spike) -> None:
        self.steps, self.fault = steps, fault
        self.weights: dict[int, torch.Tensor] = {}
        self.moments: dict[int, list[Any]] = {}
        self.rates: dict[int, float] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weight = next(kwargs["model"].parameters())
        self._handle = weight.register_hook(self.fault) if state.global_step + 1 in self.steps else None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._handle is not None:
            self._handle.remove()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        self.weights[state.global_step] = torch.cat([p.detach().flatten() for p in kwargs["model"].parameters()])
        self.moments[state.global_step] = [
            torch.as_tensor(value).clone()
            for kept in optimizer.state_dict()["state"].values()
            for value in kept.values()
        ]
        self.rates[state.global_step] = optimizer.param_groups[0]["lr"]


def guarded(folder: Path, faulty: FaultyGradient, train: bool = True, **options: Any) -> DCGRPOTrainer:
    trainer = dc_trainer(folder, callbacks=[faulty], **(STEPS | options))
    if train:
        trainer.train()
    return trainer


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("fault", [spike, broken])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_a_step_left_out_moves_neither_weights_nor_moments(tmp_path: Path, fault: Fault, optim: str) -> None:
    faulty = FaultyGradient({BAD}, fault)
    options = {"weight_decay": 0.1, "lr_scheduler_type": "linear", "optim": optim}
    trainer = guarded(tmp_path, faulty, **options)
    assert torch.equal(faulty.weights[BAD], faulty.weights[BAD - 1])
    before, after = faulty.moments[BAD - 1], faulty.moments[BAD]
    assert all(map(torch.equal, before, after)) and len(before) == len(after)
    assert not torch.equal(faulty.weights[BAD + 1], faulty.weights[BAD])
    assert faulty.rates[BAD] < faulty.rates[BAD - 1]  # the schedule goes on
    assert trainer.state.global_step == STEPS["max_steps"]
    assert logged(trainer, "dc/guard/skipped") == [0.0] * (BAD - 1) + [1.0, 0.0, 0.0]


@pytest.mark.parametrize("fault", [spike, broken])
def test_without_a_guard_the_same_gradient_moves_the_weights(tmp_path: Path, fault: Fault) -> None:
    faulty = FaultyGradient({BAD}, fault)
    guarded(tmp_path, faulty, gradient_guard=None, max_steps=BAD)
    assert not torch.equal(faulty.weights[BAD], faulty.weights[BAD - 1])
    assert not (tmp_path / "skipped.jsonl").exists()


def test_one_rounding_leaves_masters_alone(tmp_path: Path) -> None:
    faulty = FaultyGradient({BAD})
    guarded(tmp_path, faulty, bf16=True, sync_rounding="dither", rollout_precision="bf16")
    assert torch.equal(faulty.weights[BAD], faulty.weights[BAD - 1])
    assert all(map(torch.equal, faulty.moments[BAD - 1], faulty.moments[BAD]))


def test_the_record_has_places_and_numbers_but_no_text(tmp_path: Path) -> None:
    guarded(tmp_path, FaultyGradient({BAD}), gradient_accumulation_steps=2, per_device_train_batch_size=4)
    (record,) = records(tmp_path)
    assert record["step"] == BAD and record["in_a_row"] == 1 and "times the median" in record["reason"]
    rows = record["completions"]
    assert [(row["micro_batch"], row["row"]) for row in rows] == [(m, r) for m in range(2) for r in range(4)]
    assert {row["process"] for row in rows} == {0}
    names = {"process", "micro_batch", "row", "tokens", "advantage", "loss"}
    assert all(names <= set(row) <= names | {"importance_ratio_max"} for row in rows)
    assert all(0 < row["tokens"] <= 8 for row in rows) and any(row["advantage"] for row in rows)


def test_the_record_has_texts_where_tokens_are_logged(tmp_path: Path) -> None:
    guarded(tmp_path, FaultyGradient({BAD}), log_tokens=True, max_steps=BAD)
    row = records(tmp_path)[0]["completions"][0]
    assert "+" in row["prompt"] and row["prompt"].endswith("=") and row["completion"]


def test_a_new_run_sets_the_record_aside(tmp_path: Path) -> None:
    guarded(tmp_path, FaultyGradient({BAD}), max_steps=BAD)
    guarded(tmp_path, FaultyGradient({BAD}), max_steps=BAD)
    assert len(records(tmp_path)) == 1 and (tmp_path / "skipped-1.jsonl").is_file()


@pytest.mark.parametrize(("fault", "words"), [(spike, "raise `gradient_guard` = 50.0"), (broken, "float32")])
def test_it_stops_after_so_many_in_a_row(tmp_path: Path, fault: Fault, words: str) -> None:
    faulty = FaultyGradient({BAD, BAD + 1, BAD + 2}, fault)
    trainer = guarded(tmp_path, faulty, train=False, gradient_guard_patience=2)
    with pytest.raises(FloatingPointError, match="^2 optimizer steps in a row") as error:
        trainer.train()
    assert words in str(error.value) and f"step {BAD + 1}," in str(error.value)
    assert [record["in_a_row"] for record in records(tmp_path)] == [1, 2]
    assert torch.equal(weights(trainer), faulty.weights[BAD - 1])


@pytest.mark.parametrize("save_steps", [BAD - 1, BAD])
def test_a_resumed_run_goes_on_with_the_median_and_the_count(tmp_path: Path, save_steps: int) -> None:
    options = {"save_strategy": "steps", "save_steps": save_steps, "constraint": "lagrangian"}
    options |= {"discrepancy_tolerance": 1e-3}
    bad = {BAD, BAD + 1}
    whole = guarded(tmp_path / "whole", FaultyGradient(bad), **options)
    checkpoint = tmp_path / "whole" / f"checkpoint-{save_steps}"
    resumed = guarded(tmp_path / "resumed", FaultyGradient(bad), train=False, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(weights(whole), weights(resumed))
    assert whole._guard.state_dict() == resumed._guard.state_dict()
    assert resumed._guard.skipped == 2
    later = [record for record in records(tmp_path / "whole") if record["step"] > save_steps]
    assert records(tmp_path / "resumed") == later


def test_a_damaged_state_of_the_guard_is_named(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    guarded(tmp_path, FaultyGradient(set()), **options)
    path = tmp_path / "checkpoint-1" / "dc_grpo_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"guard": {"norms": ["many"]}}))
    again = guarded(tmp_path / "again", FaultyGradient(set()), train=False, **options)
    with pytest.raises(ValueError, match="is not the state of a DCGRPOTrainer"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_guard_that_skips_nothing_changes_no_bit(tmp_path: Path) -> None:
    first = guarded(tmp_path / "with", FaultyGradient(set()))
    second = guarded(tmp_path / "without", FaultyGradient(set()), gradient_guard=None)
    assert torch.equal(weights(first), weights(second))
    assert logged(second, "dc/guard/skipped") == []


def test_under_a_constraint_a_broken_forward_is_left_out(tmp_path: Path) -> None:
    options = {"constraint": "fixed", "gradient_guard": math.inf, "max_steps": 4}
    faulty = FaultyGradient(set())
    trainer = guarded(tmp_path, faulty, train=False, **options)
    forward = trainer.model.forward

    def broken_forward(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if trainer.state.global_step == 1:
            output.log_probs[:, -1] = output.log_probs[:, -1] * math.nan  # a graph that NaN flows back through
        return output

    trainer.model.forward = broken_forward  # type: ignore[method-assign]
    trainer.train()
    assert torch.equal(faulty.weights[2], faulty.weights[1]) and faulty.weights[4].isfinite().all()
    assert [record["step"] for record in records(tmp_path)] == [2]


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise", "schedule_free_adamw"])
def test_optimizers_whose_step_cannot_be_left_out_are_refused(tmp_path: Path, optim: str) -> None:
    with pytest.raises(ValueError, match="`optim` is .*`gradient_guard=50.0`.*adamw_torch_fused"):
        dc_trainer(tmp_path, **(STEPS | {"optim": optim}))


def test_deepspeed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its engine needs a GPU's toolchain; what is asked is what Accelerate says of it.
    monkeypatch.setattr(guard_trainer, "DistributedType", SimpleNamespace(DEEPSPEED=DistributedType.NO))
    with pytest.raises(ValueError, match="`gradient_guard` is 50.0 with DeepSpeed.*Use FSDP2"):
        dc_trainer(tmp_path, **STEPS)
