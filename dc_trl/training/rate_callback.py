# SPDX-License-Identifier: Apache-2.0
"""What callbacks on the learning rate share: how they take up the rates and a saved run, and how they are logged."""

import logging
from abc import abstractmethod
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from dc_trl.length_decay import RateScaler


class RateCallback(TrainerCallback, ExportableState):
    """Multiplies the learning rate by a factor of its own. Several multiply: each `RateScaler` knows its factor alone.

    The state travels in `trainer_state.json`. A subclass has `state()` with the saved `progress`, `_reset` and
    `_restore` for it, and calls `_scaler.apply`.
    """

    _scaler: RateScaler | None = None
    _is_main = True

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps: the constructor's arguments and `progress`, with the scaler's `rates`."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """What is logged of the last update."""

    @abstractmethod
    def _reset(self) -> None:
        """Brings a run's state to its beginning."""

    @abstractmethod
    def _restore(self, progress: dict[str, Any]) -> None:
        """Takes up the saved progress, but for the rates."""

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
        self._is_main = state.is_world_process_zero
        self._scaler = RateScaler(kwargs["optimizer"], kwargs.get("lr_scheduler"))
        if state.global_step > 0 and saved is not None:  # at step 0 it is only the trainer's placeholder
            progress = saved["attributes"]["progress"]
            self._restore(progress)
            if progress["rates"]:
                self._scaler.load_state_dict(progress["rates"])
        elif state.global_step > 0:
            self._log(
                logging.WARNING,
                f"The checkpoint at step {state.global_step} has no state of {name}: it starts afresh, and the rates "
                "are taken as unscaled. Harmless if the run had none before.",
            )
            states[name] = self.state()  # the trainer looks the name up when it saves

    def _saved_rates(self) -> dict[str, Any] | None:
        return self._scaler.state_dict() if self._scaler else None

    def _into_record(self, state: TrainerState, logs: dict[str, Any], values: dict[str, float]) -> None:
        """Adds values to a log, and to its copy in the history, which the trainer makes before it calls callbacks."""
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def _log(self, level: int, message: str) -> None:
        if self._is_main:
            logging.getLogger(type(self).__module__).log(level, message)
