# SPDX-License-Identifier: Apache-2.0
"""EssRateCallback: `dc_trl.estimators.ess_rate` for any trainer that logs `dc/ess`, or calls `observe`."""

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from dc_trl.estimators.ess_rate import EssRate
from dc_trl.training.rate_callback import RateCallback

ESS_KEY = "dc/ess"


class EssRateCallback(RateCallback):
    """Scales each update's learning rate by √(ESS/B) of its own batch: VCPO, arXiv 2602.17616.

    Multiplies whatever base schedule runs, and whatever other callback scales it through a `RateScaler`
    (`LengthDecayCallback`): each remembers its own factor in every rate, so their order does not matter.

    A trainer that knows the ESS of a batch before its optimizer step calls `observe`; the scale then acts on that very
    update, and the log is no longer read. From the log alone, where `dc/ess` appears after its update, it acts on the
    next. Under DeepSpeed, whose optimizer steps inside the last backward, it acts on the next as well. Where a batch
    serves several updates, its scale holds until the next is observed.

    Every rank must see the same ESS, one of all ranks together. A resumed run goes on as if it had not stopped: the
    state travels in `trainer_state.json`. One such callback per trainer.

    Args:
        reference: ESS/B at which the rate is whole; the authors' 1.
        min_scale: floor of the scale. Our value.

    Raises:
        ValueError: if an argument is outside (0, 1].
    """

    def __init__(self, reference: float = 1.0, min_scale: float = 0.1) -> None:
        self.reference = reference
        self.min_scale = min_scale
        self._reset()

    def _reset(self) -> None:
        self.rate = EssRate(self.reference, self.min_scale)
        self._is_told = False

    def _restore(self, progress: dict[str, Any]) -> None:
        self.rate.load_state_dict(progress["rate"])

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps: the constructor's arguments and the progress of the run."""
        progress = {"rate": self.rate.state_dict(), "rates": self._saved_rates()}
        arguments = {"reference": self.reference, "min_scale": self.min_scale}
        return {"args": arguments, "attributes": {"progress": progress}}

    def metrics(self) -> dict[str, float]:
        """`ess_rate/lr_scale`, of the last update observed."""
        return {"ess_rate/lr_scale": self.rate.scale}

    def observe(self, step: int, ess: float) -> None:
        """Takes ESS/B, in (0, 1], of the batch of update `step`, before the optimizer's step where it is known.

        What is logged is then ignored: a mean over the logging window. Every rank must pass the same number.
        """
        self._is_told = True
        self.rate.update(step, ess)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Applies what is known when the update begins, for optimizers that step before `on_pre_optimizer_step`."""
        self._apply()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Applies what was observed while the gradient was computed."""
        self._apply()

    def _apply(self) -> None:
        if self._scaler is not None:
            self._scaler.apply(self.rate.scale)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds `metrics()` to the record of a training log and observes its `dc/ess`; leaves evaluation logs alone."""
        if logs is None or not (ESS_KEY in logs or "loss" in logs):
            return
        # Of the update that is logged, which did not know the value that comes with its log.
        self._into_record(state, logs, self.metrics())
        ess = logs.get(ESS_KEY)
        if ess is not None and not self._is_told:
            self.rate.update(state.global_step, ess)
