# SPDX-License-Identifier: Apache-2.0
"""EssRateCallback: `dc_trl.training.ess_rate` as a callback for any trainer that logs `dc/ess`, or calls `observe`."""

import logging
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from dc_trl.length_decay import RateScaler
from dc_trl.training.ess_rate import EssRate

logger = logging.getLogger(__name__)

ESS_KEY = "dc/ess"


class EssRateCallback(TrainerCallback, ExportableState):
    """Scales each update's learning rate by √(ESS/B) of its own batch: VCPO, arXiv 2602.17616.

    Multiplies whatever base schedule runs, and whatever other callback scales it through a `RateScaler`
    (`LengthDecayCallback`): each remembers its own factor in every rate, so their order does not matter.

    A trainer that knows the ESS of a batch before its optimizer step calls `observe`; the scale then acts on that very
    update. From the log alone, where `dc/ess` appears after its update, it acts on the next. Under DeepSpeed, whose
    optimizer steps inside the last backward, it acts on the next as well.

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
        self._scaler: RateScaler | None = None

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps: the constructor's arguments and the progress of the run."""
        progress = {"rate": self.rate.state_dict(), "rates": self._scaler.state_dict() if self._scaler else None}
        arguments = {"reference": self.reference, "min_scale": self.min_scale}
        return {"args": arguments, "attributes": {"progress": progress}}

    def metrics(self) -> dict[str, float]:
        """`ess_rate/lr_scale`, of the last update observed."""
        return {"ess_rate/lr_scale": self.rate.scale}

    def observe(self, step: int, ess: float) -> None:
        """Takes ESS/B, in (0, 1], of the batch of update `step`, before the optimizer's step where it is known.

        The logged value of a step observed before is then ignored. Every rank must pass the same number.
        """
        self.rate.update(step, ess)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes up the optimizer and, in a resumed run, the saved progress.

        Raises:
            ValueError: if the trainer has two of these callbacks, or its scheduler cannot be scaled.
        """
        name = type(self).__name__
        # Declared as a list, but a dict of states by class name once the trainer has built or loaded it.
        states = cast(dict[str, Any], state.stateful_callbacks)
        saved = states.get(name)
        if isinstance(saved, list):
            raise ValueError(f"{len(saved)} {name}s on one trainer would each scale the learning rate: pass one.")
        self._reset()
        self._scaler = RateScaler(kwargs["optimizer"], kwargs.get("lr_scheduler"))
        if state.global_step > 0 and saved is not None:  # at step 0 it is only the trainer's placeholder
            progress = saved["attributes"]["progress"]
            self.rate.load_state_dict(progress["rate"])
            if progress["rates"]:
                self._scaler.load_state_dict(progress["rates"])
        elif state.global_step > 0:
            if state.is_world_process_zero:
                logger.warning(
                    "The checkpoint at step %d has no state of %s: the rates are taken as unscaled. Harmless if the "
                    "run had none before.",
                    state.global_step,
                    name,
                )
            states[name] = self.state()  # the trainer looks the name up when it saves

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
        used = self.metrics()  # of the update that is logged, which did not know the value that comes with its log
        logs.update(used)
        # The trainer copies the logs into the history before it calls its callbacks.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(used)
        ess = logs.get(ESS_KEY)
        if ess is not None:
            self.observe(state.global_step, ess)
