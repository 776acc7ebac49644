# SPDX-License-Identifier: Apache-2.0
"""EssRateCallback beside LengthDecayCallback: real optimizers and schedulers, and a real Trainer that resumes."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, get_scheduler

from dc_trl.estimators.ess_rate import ess_rate_scale
from dc_trl.length_decay import length_decay_scale
from dc_trl.training.ess_rate_callback import ESS_KEY, EssRateCallback
from dc_trl.training.length_decay_callback import LengthDecayCallback

RATES = (1e-3, 4e-4)  # two parameter groups
SCHEDULES = ["constant", "constant_with_warmup", "linear", "cosine"]


def ess_of(step: int) -> float:
    """Between 0.1 and 0.9, different at every step."""
    return 0.5 + 0.4 * math.sin(2.3 * step)


class Loop:
    """The parts of transformers' training loop that the callbacks meet, in its order."""

    def __init__(self, callbacks: list[Any], schedule: str = "constant", feed: str = "observe") -> None:
        parameters = [torch.nn.Parameter(torch.ones(1)) for _ in RATES]
        self.optimizer = torch.optim.AdamW([{"params": [p], "lr": r} for p, r in zip(parameters, RATES, strict=True)])
        self.scheduler: Any = get_scheduler(schedule, self.optimizer, num_warmup_steps=4, num_training_steps=60)
        self.callbacks = callbacks
        self.feed = feed  # "observe" before the optimizer's step, "log" after it, "late": a step inside the backward
        self.args: Any = SimpleNamespace(max_completion_length=None, lr_scheduler_type=schedule)
        self.state = TrainerState(stateful_callbacks=list(callbacks), logging_steps=1)
        self.rates: list[list[float]] = []
        self.logged: list[float] = []

    @property
    def ess_rate(self) -> EssRateCallback:
        return next(c for c in self.callbacks if isinstance(c, EssRateCallback))

    def call(self, event: str, **kwargs: Any) -> None:
        for callback in self.callbacks:
            kwargs |= {"optimizer": self.optimizer, "lr_scheduler": self.scheduler}
            getattr(callback, event)(self.args, self.state, TrainerControl(), **kwargs)

    def run(self, until: int) -> "Loop":
        self.call("on_train_begin")
        for step in range(self.state.global_step + 1, until + 1):
            self.call("on_step_begin")
            if self.feed == "late":
                self.step()
            if self.feed != "log":
                self.ess_rate.observe(step, ess_of(step))
            self.call("on_pre_optimizer_step")
            if self.feed != "late":
                self.step()
            self.scheduler.step()
            self.state.global_step = step
            logs = {"loss": 0.0, ESS_KEY: ess_of(step)}
            self.state.log_history.append({**logs, "step": step})
            self.call("on_log", logs=logs)
        return self

    def step(self) -> None:
        self.rates.append([float(group["lr"]) for group in self.optimizer.param_groups])
        self.logged.append(self.scheduler.get_last_lr()[0])
        self.optimizer.step()

    def save(self) -> dict[str, Any]:
        self.state.stateful_callbacks = {type(c).__name__: c.state() for c in self.callbacks}  # type: ignore[assignment]
        states = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        return copy.deepcopy({"trainer": json.dumps(vars(self.state)), **states})

    def resume(self, saved: dict[str, Any], model_only: bool = False) -> "Loop":
        self.state = TrainerState(**json.loads(saved["trainer"]))
        if not model_only:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scheduler.load_state_dict(saved["scheduler"])
        return self


def both(reverse: bool = False) -> list[Any]:
    callbacks: list[Any] = [LengthDecayCallback(period=5), EssRateCallback()]
    return callbacks[::-1] if reverse else callbacks


def base_rates(schedule: str, steps: int) -> list[list[float]]:
    loop = Loop([], schedule)
    loop.feed = "log"
    return loop.run(steps).rates


def expected_rates(base: list[list[float]], period: int | None = 5, lag: int = 0) -> list[list[float]]:
    scales = []
    for step in range(1, len(base) + 1):
        known = step - lag
        scales.append(ess_rate_scale(ess_of(known)) if known >= 1 else 1.0)
        if period:
            scales[-1] *= length_decay_scale(step, period)
    return [[rate * scale for rate in row] for row, scale in zip(base, scales, strict=True)]


def assert_same_rates(actual: list[list[float]], expected: list[list[float]]) -> None:
    torch.testing.assert_close(
        torch.tensor(actual, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_observed_ess_scales_its_own_update(schedule: str) -> None:
    loop = Loop([EssRateCallback()], schedule).run(30)
    assert_same_rates(loop.rates, expected_rates(base_rates(schedule, 30), period=None))
    assert loop.logged == [row[0] for row in loop.rates]  # what the trainer logs as learning_rate is what was used


@pytest.mark.parametrize("feed", ["log", "late"])
def test_an_ess_known_too_late_scales_the_next_update(feed: str) -> None:
    loop = Loop([EssRateCallback()], "cosine", feed).run(30)
    assert_same_rates(loop.rates, expected_rates(base_rates("cosine", 30), period=None, lag=1))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("reverse", [False, True])
def test_it_multiplies_with_length_decay_in_either_order(schedule: str, reverse: bool) -> None:
    loop = Loop(both(reverse), schedule).run(40)
    assert_same_rates(loop.rates, expected_rates(base_rates(schedule, 40)))
    assert loop.logged == [row[0] for row in loop.rates]


@pytest.mark.parametrize("feed", ["observe", "log", "late"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("stop", [1, 4, 5, 13])
def test_both_resume_to_the_bit(stop: int, reverse: bool, feed: str) -> None:
    whole = Loop(both(reverse), "cosine", feed).run(24)
    first = Loop(both(reverse), "cosine", feed).run(stop)
    second = Loop(both(reverse), "cosine", feed).resume(first.save()).run(24)
    assert first.rates + second.rates == whole.rates
    assert second.state.log_history == whole.state.log_history
    assert [c.state() for c in second.callbacks] == [c.state() for c in whole.callbacks]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_resume_with_fresh_optimizer_and_scheduler_scales_once(reverse: bool) -> None:
    """`save_only_model` brings back the trainer's state alone: rates are built anew, unscaled."""
    saved = Loop(both(reverse)).run(12).save()
    rest = Loop(both(reverse)).resume(saved, model_only=True).run(20)
    assert_same_rates(rest.rates, expected_rates([list(RATES)] * 20)[12:])


def test_a_checkpoint_without_the_callback_is_taken_up(caplog: pytest.LogCaptureFixture) -> None:
    decay_only = Loop([LengthDecayCallback(period=5)], feed="log").run(7).save()
    loop = Loop(both()).resume(decay_only).run(12)
    assert_same_rates(loop.rates, expected_rates([list(RATES)] * 12)[7:])
    assert "has no state of EssRateCallback" in caplog.text
    assert "EssRateCallback" in loop.state.stateful_callbacks  # or the trainer's next save raises KeyError


def test_a_second_fresh_run_starts_afresh() -> None:
    callback = EssRateCallback()
    first = Loop([callback]).run(10)
    assert Loop([callback]).run(10).rates == first.rates


def test_logs_show_the_scale_that_was_used_and_leave_evaluation_alone() -> None:
    loop = Loop([EssRateCallback()], feed="log").run(3)
    logged = [entry["ess_rate/lr_scale"] for entry in loop.state.log_history]
    assert logged == [1.0, ess_rate_scale(ess_of(1)), ess_rate_scale(ess_of(2))]
    logs = {"eval_loss": 0.0, f"eval_{ESS_KEY}": 0.1}
    loop.call("on_log", logs=logs)
    assert set(logs) == {"eval_loss", f"eval_{ESS_KEY}"} and loop.ess_rate.rate.ess == ess_of(3)
    loop.state.global_step = 4
    loop.call("on_log", logs={"loss": 0.0, ESS_KEY: None})  # TRL's value where it measured none
    assert loop.ess_rate.rate.last_step == 3


def test_two_callbacks_on_one_trainer_are_refused() -> None:
    loop = Loop([EssRateCallback(), EssRateCallback()])
    with pytest.raises(ValueError, match="2 EssRateCallbacks.*pass one"):
        # transformers keeps the states of two callbacks of one class in a list.
        loop.state.stateful_callbacks = {"EssRateCallback": [{}, {}]}  # type: ignore[assignment]
        loop.run(1)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="`min_scale` is 0.*Pass"):
        EssRateCallback(min_scale=0.0)


class Numbers(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.tensor([float(index) / 16])
        return {"x": x, "labels": 2 * x}


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.slope * x - labels) ** 2).mean()}


class Observed(Trainer):
    """Measures an ESS with every micro-batch, and hands it on with the last one of an update."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EssRateCallback) and self.accelerator.sync_gradients:
                callback.observe(self.state.global_step + 1, ess_of(self.state.global_step + 1))
        return loss


class Recorder(TrainerCallback):
    """The rate that each update uses, as the optimizer's step leaves it."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


def train(directory: Path, callbacks: list[Any], resume: bool = False, **overrides: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=8,
        save_steps=4,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to="none",
        use_cpu=True,
        seed=3,
        **overrides,
    )
    trainer = Observed(model=Line(), args=arguments, train_dataset=Numbers(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=str(directory / "checkpoint-4") if resume else None)
    return trainer


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_real_trainer_scales_by_both_and_resumes(restore: bool, reverse: bool, tmp_path: Path) -> None:
    base, whole, rest = Recorder(), Recorder(), Recorder()
    train(tmp_path / "base", [base], save_strategy="no")
    order = slice(None, None, -1 if reverse else 1)

    def callbacks() -> list[Any]:
        return [LengthDecayCallback(period=3), EssRateCallback()][order]

    first = train(tmp_path / "run", [*callbacks(), whole])
    overrides = {"restore_callback_states_from_checkpoint": restore}
    second = train(tmp_path / "run", [*callbacks(), rest], resume=True, **overrides)

    assert len(base.rates) == len(whole.rates) == 8
    expected = expected_rates([[rate] for rate in base.rates], period=3)
    assert whole.rates == pytest.approx([row[0] for row in expected], rel=1e-12)
    assert rest.rates == whole.rates[4:]
    assert torch.equal(first.model.slope, second.model.slope)
    logged = [entry for entry in second.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in logged] == whole.rates
    scales = [ess_rate_scale(ess_of(step)) for step in range(1, 9)]
    assert [entry["ess_rate/lr_scale"] for entry in logged] == scales
    # With `restore` transformers replaces the callback by a new object.
    (callback,) = [c for c in second.callback_handler.callbacks if isinstance(c, EssRateCallback)]
    assert callback.rate.last_step == 8
