# SPDX-License-Identifier: Apache-2.0
"""LengthDecayCallback: `dc_trl.length_decay` as a callback for any TRL trainer that logs `completions/mean_length`."""

import logging
import math
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from dc_trl.length_decay import (
    LengthSurgeDetector,
    check_factor,
    check_min_ratio,
    check_period,
    decay_period,
    length_decay_scale,
)
from dc_trl.training.rate_callback import RateCallback

LENGTH_KEY = "completions/mean_length"

_DECAYING_SCHEDULES = {
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
}


class LengthDecayCallback(RateCallback):
    """Halves the learning rate every T_decay updates, down to a floor: length-decay, arXiv 2602.01826, Algorithm 1.

    Multiplies whatever base schedule runs, with any number of parameter groups. Update t uses
    `length_decay_scale(t, period)` times the base rate, so update number `period` is the first with half of it. With
    `period` None the rate stays as it is until `LengthSurgeDetector` finds a surge of the mean completion length, at
    step s; the period is then round(surge_factor · s). A factor below 1 catches up at once on halvings already due.

    Lengths come from the logged `completions/mean_length`, so set `logging_steps=1`, or call `observe` at every step.
    That metric is gathered over the ranks before it is logged, and every rank logs, so all ranks decide alike. A
    resumed run goes on as if it had not stopped: the state travels in `trainer_state.json`, and
    `restore_callback_states_from_checkpoint` is not needed. One such callback per trainer.

    Metrics (`metrics`) go into the record of `state.log_history` and into `logs`, where callbacks that come later
    see them. Trackers (wandb, TensorBoard) come earlier in a trainer's list: for them the trainer's `log` must add
    `metrics()`, or this callback must be moved to the front of `trainer.callback_handler.callbacks`.

    Args:
        period: T_decay in updates; None derives it from the surge.
        surge_factor: the paper's 1.8.
        min_lr_ratio: floor of the scale; the paper's 0.1.
        surge_ratio: growth of the mean length that counts as a surge; the paper saw 3 to 4.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        period: int | None = None,
        surge_factor: float = 1.8,
        min_lr_ratio: float = 0.1,
        surge_ratio: float = 3.0,
    ) -> None:
        if period is not None:
            check_period(period)
        check_factor(surge_factor, "surge_factor")
        check_min_ratio(min_lr_ratio, "min_lr_ratio")
        if not (math.isfinite(surge_ratio) and surge_ratio > 1):
            raise ValueError(f"`surge_ratio` is {surge_ratio}: a surge is growth, so it must exceed 1. Pass e.g. 3.")
        self._given_period = period
        self.surge_factor = surge_factor
        self.min_lr_ratio = min_lr_ratio
        self.surge_ratio = surge_ratio
        self._reset()

    def _reset(self) -> None:
        self.period = self._given_period
        self.lr_scale = 1.0
        self.detector = LengthSurgeDetector(ratio=self.surge_ratio)
        self._length_limit: int | None = None
        self._sparse_warned = False

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps: the constructor's arguments and the progress of the run."""
        progress = {
            "lr_scale": self.lr_scale,
            "detector": self.detector.state_dict(),
            "rates": self._saved_rates(),
        }
        arguments = {
            "period": self._given_period,
            "surge_factor": self.surge_factor,
            "min_lr_ratio": self.min_lr_ratio,
            "surge_ratio": self.surge_ratio,
        }
        return {"args": arguments, "attributes": {"progress": progress}}

    def metrics(self) -> dict[str, float]:
        """`length_decay/lr_scale` of the last update and, once known, `surge_ratio`, `surge_step` and `period`."""
        values = {
            "lr_scale": self.lr_scale,
            "surge_ratio": self.detector.surge_ratio,
            "surge_step": self.detector.surge_step,
            "period": self.period,
        }
        return {f"length_decay/{name}": float(value) for name, value in values.items() if value is not None}

    def observe(self, step: int, mean_length: float) -> None:
        """Takes the mean completion length (tokens) of update `step`; on a surge, sets the period.

        For a trainer that knows it at every step, over all generation batches of the update: a step is counted once,
        and a second call for it is ignored. The logged value of a step observed before is then ignored. Every
        rank must pass the same number.
        """
        surged = self.detector.update(step, mean_length)
        if self._given_period is not None:
            return
        self._check_length_limit()
        if surged:
            self.period = decay_period(step, self.surge_factor)
            self._log(
                logging.WARNING,
                f"The mean completion length rose to {self.detector.surge_ratio:.2f} times its baseline: a surge at "
                f"step {step}. The learning rate will be halved every {self.period} updates, counted from the start "
                f"of training, down to {self.min_lr_ratio:g} of its schedule.",
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes up the optimizer and, in a resumed run, the saved progress; warns if the base schedule decays too.

        Raises:
            ValueError: if the trainer has two of these callbacks, or its scheduler cannot be scaled.
        """
        super().on_train_begin(args, state, control, **kwargs)
        self._length_limit = getattr(args, "max_completion_length", None)
        self._check_base_schedule(args)

    def _restore(self, progress: dict[str, Any]) -> None:
        self.detector.load_state_dict(progress["detector"])
        self.lr_scale = progress["lr_scale"]
        if self._given_period is None and self.detector.surge_step is not None:
            self.period = decay_period(self.detector.surge_step, self.surge_factor)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the scale of the update that begins: number `global_step` + 1, as `global_step` counts finished ones.

        At the beginning, since under DeepSpeed the update happens inside the last backward.
        """
        if self.period is None or self._scaler is None:
            return
        update = state.global_step + 1
        scale = length_decay_scale(update, self.period, self.min_lr_ratio)
        self._scaler.apply(scale)
        if scale != self.lr_scale:
            self.lr_scale = scale
            self._log(logging.INFO, f"From update {update} on, the learning rate is {scale:g} of its schedule.")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Observes the logged training length and adds `metrics()` to the record; leaves evaluation logs alone."""
        if logs is None or not (LENGTH_KEY in logs or "loss" in logs):
            return
        length = logs.get(LENGTH_KEY)
        if length is not None:  # None: TRL had no valid value
            self._check_sparse_logs(state)
            self.observe(state.global_step, length)
        self._into_record(state, logs, self.metrics())

    def _check_length_limit(self) -> None:
        typical = self.detector.recent_length
        if self._length_limit is None or typical is None:
            return
        if self.detector.surge_step is None and typical * self.surge_ratio > self._length_limit:
            self._log(
                logging.WARNING,
                f"`max_completion_length` is {self._length_limit} and completions already have {typical:.0f} tokens "
                f"on average: a {self.surge_ratio:g}-fold surge cannot show. Raise the limit, or give the period.",
            )
        self._length_limit = None  # said once

    def _check_sparse_logs(self, state: TrainerState) -> None:
        is_observed = self.detector.last_step is not None and self.detector.last_step >= state.global_step
        if self._sparse_warned or is_observed or self._given_period is not None or state.logging_steps <= 1:
            return
        self._sparse_warned = True
        self._log(
            logging.WARNING,
            f"`logging_steps` is {state.logging_steps}: a surge of the completion length is found two or three logs "
            "late, and the period grows with its step. Set `logging_steps=1`, or give the period.",
        )

    def _check_base_schedule(self, args: TrainingArguments) -> None:
        schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        if schedule in _DECAYING_SCHEDULES:
            self._log(
                logging.WARNING,
                f"`lr_scheduler_type` is '{schedule}', which lowers the learning rate by itself, and length-decay "
                "multiplies it. Set `lr_scheduler_type='constant'`, the paper's base, unless both are meant.",
            )
