# SPDX-License-Identifier: Apache-2.0
"""LengthDecayCallback: real optimizers and schedulers in a trainer's loop, and one real GRPOTrainer that resumes."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.scheduler import AcceleratedScheduler
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer
from transformers import TrainerCallback, TrainerControl, TrainerState, get_scheduler
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from dc_trl.length_decay import length_decay_scale
from dc_trl.training.length_decay_callback import LENGTH_KEY, LengthDecayCallback

RATES = (1e-3, 4e-4)  # two parameter groups
SCHEDULES = ["constant", "constant_with_warmup", "linear", "cosine", "polynomial", "inverse_sqrt"]


class Loop:
    """The parts of transformers' training loop that the callback meets, in its order."""

    def __init__(self, callback: LengthDecayCallback | None, schedule: str = "constant", limit: int | None = None):
        parameters = [torch.nn.Parameter(torch.ones(1)) for _ in RATES]
        self.optimizer = torch.optim.AdamW([{"params": [p], "lr": r} for p, r in zip(parameters, RATES, strict=True)])
        self.scheduler: Any = get_scheduler(schedule, self.optimizer, num_warmup_steps=4, num_training_steps=60)
        self.callback = callback
        self.args: Any = SimpleNamespace(max_completion_length=limit, lr_scheduler_type=schedule)
        self.state = TrainerState(stateful_callbacks=[callback] if callback else [], logging_steps=1)
        self.length: Callable[[int], float | None] = lambda step: 100.0
        self.every = 1
        self.rates: list[list[float]] = []
        self.logged: list[float] = []

    def call(self, event: str, **kwargs: Any) -> None:
        if self.callback:
            kwargs |= {"optimizer": self.optimizer, "lr_scheduler": self.scheduler}
            getattr(self.callback, event)(self.args, self.state, TrainerControl(), **kwargs)

    def run(self, until: int) -> "Loop":
        self.call("on_train_begin")
        for _ in range(self.state.global_step, until):
            self.call("on_step_begin")
            self.rates.append([float(group["lr"]) for group in self.optimizer.param_groups])
            self.logged.append(self.scheduler.get_last_lr()[0])
            self.step()
            self.state.global_step += 1
            if self.state.global_step % self.every == 0:
                self.log({"loss": 0.0, LENGTH_KEY: self.length(self.state.global_step)})
        return self

    def step(self) -> None:
        self.optimizer.step()
        self.scheduler.step()

    def log(self, logs: dict[str, Any]) -> dict[str, Any]:
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.call("on_log", logs=logs)
        return logs

    def save(self) -> dict[str, Any]:
        if self.callback:
            self.state.stateful_callbacks[type(self.callback).__name__] = self.callback.state()
        trainer = json.dumps(vars(self.state))
        return copy.deepcopy(
            {"trainer": trainer, "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        )

    def resume(self, saved: dict[str, Any]) -> "Loop":
        self.state = TrainerState(**json.loads(saved["trainer"]))
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        return self


def base_rates(schedule: str, steps: int) -> list[list[float]]:
    return Loop(None, schedule).run(steps).rates


def scaled(rates: list[list[float]], period: int, min_ratio: float = 0.1) -> list[list[float]]:
    return [[r * length_decay_scale(t, period, min_ratio) for r in row] for t, row in enumerate(rates, 1)]


def surge_at_60(step: int) -> float:
    return 100.0 if step < 60 else 350.0


def assert_same_rates(actual: list[list[float]], expected: list[list[float]]) -> None:
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_given_period_multiplies_the_base_schedule(schedule: str) -> None:
    loop = Loop(LengthDecayCallback(period=5), schedule).run(30)
    assert_same_rates(loop.rates, scaled(base_rates(schedule, 30), 5))
    assert loop.logged == [row[0] for row in loop.rates]  # what the trainer logs as learning_rate is what was used


def test_update_number_period_is_the_first_with_half_the_rate() -> None:
    rates = [row[0] for row in Loop(LengthDecayCallback(period=3)).run(12).rates]
    # Updates 1 and 2 whole, 3 to 5 half, 6 to 8 a quarter, 9 to 11 an eighth, from 12 on a tenth.
    assert rates == pytest.approx([1e-3] * 2 + [5e-4] * 3 + [2.5e-4] * 3 + [1.25e-4] * 3 + [1e-4])


def test_without_a_surge_nothing_changes() -> None:
    assert Loop(LengthDecayCallback(), "cosine").run(50).rates == base_rates("cosine", 50)


def test_plateau_without_base_lrs_is_scaled_in_place() -> None:
    loop = Loop(LengthDecayCallback(period=4))
    loop.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(loop.optimizer, factor=0.5, patience=100, min_lr=2e-4)

    def step() -> None:
        loop.optimizer.step()
        if loop.state.global_step == 5:  # after update 6
            loop.scheduler._reduce_lr(0)

    loop.step = step  # type: ignore[method-assign]
    rates = [row[0] for row in loop.run(9).rates]
    # The plateau halves 1e-3 after update 6; length-decay halves at updates 4 and 8. The bound of 2e-4 scales as well.
    assert rates == pytest.approx([1e-3] * 3 + [5e-4] * 3 + [2.5e-4] + [1.25e-4] * 2)
    assert loop.scheduler.min_lrs == pytest.approx([5e-5] * 2)


class DeepSpeedWarmup:
    """A double of DeepSpeed's WarmupLR: rates from `min_lrs` and `delta_lrs`; neither is in its state."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.count = optimizer, 0
        self.min_lrs = [0.0] * len(RATES)
        self.max_lrs = list(RATES)
        self.delta_lrs = list(RATES)
        self.update()

    def update(self) -> None:
        gamma = min(1.0, (self.count + 1) / 4)
        for group, low, delta in zip(self.optimizer.param_groups, self.min_lrs, self.delta_lrs, strict=True):
            group["lr"] = low + delta * gamma
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def step(self) -> None:
        self.count += 1
        self.update()

    def get_last_lr(self) -> list[float]:
        return self._last_lr

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def accelerated(loop: Loop) -> Loop:
    loop.scheduler = AcceleratedScheduler(loop.scheduler, loop.optimizer, step_with_optimizer=False)
    return loop


def deepspeed(loop: Loop) -> Loop:
    for group, rate in zip(loop.optimizer.param_groups, RATES, strict=True):
        group["lr"] = rate
    loop.scheduler = DeepSpeedWarmup(loop.optimizer)
    return accelerated(loop)


def tensor_rates(loop: Loop) -> Loop:
    for group in loop.optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]))
    return loop


@pytest.mark.parametrize("wrap", [accelerated, deepspeed, tensor_rates])
@pytest.mark.parametrize("stop", [3, 4, 9, 14, 20])
def test_wrapped_schedulers_scale_and_resume(wrap: Callable[[Loop], Loop], stop: int) -> None:
    base = wrap(Loop(None, "cosine")).run(24).rates
    whole = wrap(Loop(LengthDecayCallback(period=5), "cosine")).run(24)
    assert_same_rates(whole.rates, scaled(base, 5))
    first = wrap(Loop(LengthDecayCallback(period=5), "cosine")).run(stop)
    second = wrap(Loop(LengthDecayCallback(period=5), "cosine")).resume(first.save()).run(24)
    assert_same_rates(first.rates + second.rates, whole.rates)


@pytest.mark.parametrize("stop", [30, 62, 66, 80, 140])
def test_a_detected_surge_decays_and_resumes(stop: int, caplog: pytest.LogCaptureFixture) -> None:
    def loop() -> Loop:
        made = Loop(LengthDecayCallback(surge_factor=1.2))
        made.length = surge_at_60
        return made

    with caplog.at_level(logging.INFO, "dc_trl.training.length_decay_callback"):
        whole = loop().run(200)
    assert whole.callback and whole.callback.detector.surge_step
    found = whole.callback.detector.surge_step
    assert 60 < found < 75
    assert whole.callback.period == round(1.2 * found) > found
    assert_same_rates(whole.rates, scaled([list(RATES)] * 200, whole.callback.period))
    said = [record for record in caplog.records if "surge at step" in record.message]
    assert len(said) == 1 and said[0].levelno == logging.WARNING and str(whole.callback.period) in said[0].message
    assert len([record for record in caplog.records if record.message.startswith("From update")]) == 2

    first = loop().run(stop)
    second = loop().resume(first.save()).run(200)
    assert first.rates + second.rates == whole.rates
    assert second.state.log_history == whole.state.log_history
    assert second.callback and second.callback.state() == whole.callback.state()


def test_a_resume_with_fresh_optimizer_and_scheduler_scales_once() -> None:
    """`save_only_model` brings back the trainer's state alone: rates are built anew, unscaled."""
    saved = Loop(LengthDecayCallback(period=5)).run(12).save()
    loop = Loop(LengthDecayCallback(period=5))
    loop.state = TrainerState(**json.loads(saved["trainer"]))
    assert_same_rates(loop.run(16).rates, scaled([list(RATES)] * 16, 5)[12:])


def test_a_checkpoint_without_the_callback_is_taken_up(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(LengthDecayCallback(period=5)).resume(Loop(None).run(7).save())
    assert_same_rates(loop.run(12).rates, scaled([list(RATES)] * 12, 5)[7:])
    assert "has no state of LengthDecayCallback" in caplog.text
    assert "LengthDecayCallback" in loop.state.stateful_callbacks  # or the trainer's next save raises KeyError


def test_a_second_fresh_run_starts_afresh() -> None:
    callback = LengthDecayCallback(period=3)
    first = Loop(callback).run(10)
    assert Loop(callback).run(10).rates == first.rates


def test_sparse_logs_do_not_move_the_halvings() -> None:
    loop = Loop(LengthDecayCallback(period=3))
    loop.every = 7
    assert_same_rates(loop.run(12).rates, scaled([list(RATES)] * 12, 3))


def test_metrics_reach_the_history_and_later_callbacks() -> None:
    loop = Loop(LengthDecayCallback(surge_factor=1.2))
    loop.length = surge_at_60
    loop.run(100)
    before, after = loop.state.log_history[0], loop.state.log_history[-1]
    assert before["length_decay/lr_scale"] == 1.0
    assert "length_decay/surge_ratio" not in before and "length_decay/period" not in before
    assert loop.callback and loop.callback.detector.surge_step
    assert loop.state.log_history[50]["length_decay/surge_ratio"] == 1.0
    assert after["length_decay/lr_scale"] == 0.5
    assert after["length_decay/surge_step"] == loop.callback.detector.surge_step
    assert after["length_decay/period"] == loop.callback.period
    assert loop.log({"loss": 0.0}).items() >= loop.callback.metrics().items()


def test_evaluation_logs_are_left_alone() -> None:
    loop = Loop(LengthDecayCallback()).run(2)
    assert loop.callback
    assert loop.log({f"eval_{LENGTH_KEY}": 900.0, "eval_loss": 0.0}) == {f"eval_{LENGTH_KEY}": 900.0, "eval_loss": 0.0}
    assert loop.callback.detector.state_dict()["lengths"] == [100.0, 100.0]
    loop.state.global_step += 1
    loop.log({LENGTH_KEY: None})  # TRL's value where it measured none
    assert loop.callback.detector.last_step == 2


def test_lengths_observed_directly_take_precedence_over_the_log(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(LengthDecayCallback())
    loop.state.logging_steps = 10
    loop.run(0)
    assert loop.callback
    loop.state.global_step = 10
    loop.callback.observe(10, 50.0)
    loop.log({LENGTH_KEY: 900.0})
    assert loop.callback.detector.state_dict()["lengths"] == [50.0]
    assert "logging_steps" not in caplog.text


@pytest.mark.parametrize(
    ("schedule", "limit", "logging_steps", "length", "expected"),
    [
        ("constant", None, 1, 100.0, []),
        ("constant", 301, 1, 100.0, []),
        ("constant", 299, 1, 100.0, ["a 3-fold surge cannot show"]),
        ("linear", None, 1, 100.0, ["`lr_scheduler_type` is 'linear'"]),
        ("constant", None, 10, 100.0, ["`logging_steps` is 10"]),
    ],
)
def test_settings_that_hide_or_double_the_decay_are_said_once(
    schedule: str,
    limit: int | None,
    logging_steps: int,
    length: float,
    expected: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = Loop(LengthDecayCallback(), schedule, limit)
    loop.state.logging_steps = logging_steps
    loop.length = lambda step: length
    loop.run(20)
    messages = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(messages) == len(expected)
    assert all(part in message for part, message in zip(expected, messages, strict=True))


def test_other_ranks_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(LengthDecayCallback(surge_factor=1.2), "linear", limit=110)
    loop.length = surge_at_60
    loop.state.is_world_process_zero = False
    loop.run(60)
    assert caplog.records == []


def test_two_callbacks_on_one_trainer_are_refused() -> None:
    loop = Loop(LengthDecayCallback())
    loop.state = TrainerState(stateful_callbacks=[LengthDecayCallback(), LengthDecayCallback()])
    with pytest.raises(ValueError, match="2 LengthDecayCallbacks.*pass one"):
        loop.run(1)


def test_schedulers_that_keep_their_rates_elsewhere_are_refused() -> None:
    loop = Loop(LengthDecayCallback())
    loop.scheduler = torch.optim.lr_scheduler.OneCycleLR(loop.optimizer, max_lr=1e-3, total_steps=10)
    with pytest.raises(ValueError, match="OneCycleLR.*Use"):
        loop.run(1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("period", 0),
        ("period", 2.5),
        ("surge_factor", 0.0),
        ("min_lr_ratio", 0.0),
        ("min_lr_ratio", 1.1),
        ("surge_ratio", 1.0),
        ("surge_ratio", float("inf")),
    ],
)
def test_bad_arguments_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{field}` is {value}.*Pass"):
        LengthDecayCallback(**{field: value})  # type: ignore[arg-type]


class Recorder(TrainerCallback):
    """The rate that each update uses, read from the optimizer just before it."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


def build(
    directory: Path,
    callbacks: list[TrainerCallback],
    kinds: tuple[Any, Any] = (GRPOTrainer, GRPOConfig),
    **overrides: Any,
) -> Any:
    trainer, config = kinds
    args = config(
        output_dir=str(directory),
        max_steps=8,
        save_steps=4,
        logging_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=4,
        report_to="none",
        use_cpu=True,
        bf16=False,
        seed=3,
        **overrides,
    )
    return trainer(
        model=tiny_model(),
        processing_class=tiny_tokenizer(),
        args=args,
        reward_funcs=lambda completions, **kwargs: [float(len(set(text))) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": ["1+1=", "2+2=", "3+1=", "4+4="] * 4}),
        callbacks=callbacks,
    )


@pytest.mark.parametrize("restore", [False, True])
def test_a_real_grpo_trainer_decays_and_resumes(restore: bool, tmp_path: Path) -> None:
    base, whole, rest = Recorder(), Recorder(), Recorder()
    build(tmp_path / "base", [base]).train()
    first = build(tmp_path / "run", [LengthDecayCallback(period=3), whole])
    first.train()
    overrides = {"restore_callback_states_from_checkpoint": restore}
    second = build(tmp_path / "run", [LengthDecayCallback(period=3), rest], **overrides)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))

    assert len(base.rates) == len(whole.rates) == 8
    expected = [rate * length_decay_scale(update, 3) for update, rate in enumerate(base.rates, 1)]
    assert whole.rates == pytest.approx(expected, rel=1e-9)
    assert rest.rates == whole.rates[4:]
    # With `restore` transformers replaces the callback by a new object.
    (callback,) = [c for c in second.callback_handler.callbacks if isinstance(c, LengthDecayCallback)]
    assert len(callback.detector.state_dict()["steps"]) == 8
    logged = [entry for entry in second.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in logged] == whole.rates
    assert [entry["length_decay/lr_scale"] for entry in logged] == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]


def test_a_real_rloo_trainer_decays_and_is_observed(tmp_path: Path) -> None:
    recorder, callback = Recorder(), LengthDecayCallback(period=3)
    trainer = build(tmp_path, [callback, recorder], (RLOOTrainer, RLOOConfig), save_strategy="no", beta=0.0)
    trainer.train()
    base = Recorder()
    build(tmp_path, [base], (RLOOTrainer, RLOOConfig), save_strategy="no", beta=0.0).train()
    expected = [rate * length_decay_scale(update, 3) for update, rate in enumerate(base.rates, 1)]
    assert recorder.rates == pytest.approx(expected, rel=1e-9)
    assert len(callback.detector.state_dict()["steps"]) == 8  # its lengths were read from the log
