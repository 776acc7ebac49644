# SPDX-License-Identifier: Apache-2.0
"""Rollouts on TRL's GRPO trainer: the engine in TRL's slot, whether it is current, and whether what it says is sound.

Shapes: B sequences, T completion tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from dc_trl.config import DCGRPOConfig
from dc_trl.rollouts.engines import engine_of
from dc_trl.rollouts.rollout_func import check_completions, describe_faults, faulty_rows
from dc_trl.rollouts.sync_rounding import rounding_in_force
from dc_trl.training.attributes import temporary_attributes
from dc_trl.training.one_rounding import one_rounding
from dc_trl.training.replay_trainer import RouterReplayTrainer
from dc_trl.training.scoring_device import check_scoring_device
from dc_trl.training.unused import unused_notices

logger = logging.get_logger(__name__)

# TRL's word for an engine whose weights are those of no step.
NOT_LOADED = -1


class RolloutsTrainer(RouterReplayTrainer):
    """GRPO whose rollouts come from the engine that [`DCGRPOConfig`] chooses, and are checked.

    - The engine is built into `vllm_generation`, after the model has the weights that both are to share.
    - What counts as current by the number of the step alone is dropped where that number starts again.
    - Log-probs that a constraint needs and cannot have end the run; without a constraint their rows are left out of
      what is measured, as the batch key `measured_logps`, (B, T).
    - What the last weight sync brought goes among the metrics.
    """

    def __init__(self, model: Any, reward_funcs: Any, args: DCGRPOConfig, *rest: Any, **kwargs: Any) -> None:
        self._said: set[str] = set()
        self._faulty_rows: dict[int, str] = {}  # of the last `rollout_func`'s output
        self._engine = engine = engine_of(vars(args))
        hidden = temporary_attributes(args, use_vllm=args.use_vllm and not engine.is_ours)
        with hidden, engine.construction(args):
            super().__init__(model, reward_funcs, args, *rest, **kwargs)
        check_scoring_device(self.accelerator.device)
        if engine.is_ours:
            self.use_vllm = True
            self.vllm_mode = args.vllm_mode if args.use_vllm else "transformers"
            self._last_loaded_step = NOT_LOADED
        # Before the engine is built, which copies the dtypes of the model.
        self._one_rounding = one_rounding(args, self.model, self.accelerator)
        if self.use_vllm:
            self.vllm_generation = engine.build(self, args)
        self._say_once(unused_notices(args, engine.gives_log_probs or self.rollout_func is not None))

    @property
    def _sync_rounding(self) -> str | None:
        return rounding_in_force(getattr(self, "vllm_generation", None), self.args, self.accelerator)

    def create_optimizer(self, model: Any = None) -> Any:
        """Creates the optimizer as TRL does; where trainer and sampler share one rounding, with float32 masters."""
        self.optimizer: Any = super().create_optimizer(model)
        if self._one_rounding is not None:
            self.optimizer = self._one_rounding.wrap(self.optimizer, self.model, self.accelerator)
        return self.optimizer

    # What is current

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as TRL does, from fresh rollouts: what an earlier run of this trainer left is dropped."""
        self._forget_rollouts()
        with self._engine.in_use(self):
            return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates as TRL does, with the engine in use."""
        with self._engine.in_use(self):
            return super().evaluation_loop(*args, **kwargs)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._last_loaded_step = NOT_LOADED

    def _forget_rollouts(self) -> None:
        """Drops what is current by the number of the step alone, which starts again with each run."""
        self._last_loaded_step = NOT_LOADED
        self._step, self._buffered_inputs = 0, None

    # What is sound

    def _generate(self, prompts: list[Any]) -> Any:
        self._faulty_rows = {}
        if self.rollout_func is None:
            return super()._generate(prompts)
        with temporary_attributes(self, rollout_func=partial(self._checked_rollouts, self.rollout_func)):
            return super()._generate(prompts)

    def _checked_rollouts(self, rollout_func: Callable[..., Any], prompts: list[Any], trainer: Any) -> Any:
        """The output of the user's `rollout_func`, whose faulty log-probs end a run that has a constraint."""
        output = rollout_func(prompts, trainer)
        check_completions(output)
        self._faulty_rows = faulty_rows(output)
        if self._faulty_rows:
            words = describe_faults(self._faulty_rows)
            if self.args.constraint != "none":
                raise ValueError(f"{words}; or set `constraint='none'`, where such rows train but are not measured.")
            self._say_once([("rollout_func", f"{words}. These rows train as with TRL, and are not measured.")])
        return output

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        self._note_sync("train" if self.model.training else "eval")
        needing = self.args.needs_log_probs
        if needing and "sampling_per_token_logps" not in batch:
            raise ValueError(
                f"The rollouts carry no log-probs, which {needing} needs. Return `logprobs` from `rollout_func`, use "
                "another rollout engine, or leave it out (`constraint='none'`)."
            )
        if self._faulty_rows:
            batch["measured_logps"] = _without_rows(batch, list(self._faulty_rows))
        return batch

    def _note_sync(self, mode: str) -> None:
        """Puts what the last weight sync brought, once, among the metrics."""
        engine: Any = getattr(self, "vllm_generation", None)
        measured = getattr(engine, "sync_metrics", None)
        if measured:
            for key, value in measured.items():
                self._metrics[mode][f"dc/sync/{key}"].append(value)
            engine.sync_metrics = {}

    def _check_train_logps(self, logps: Tensor, train_logps: Tensor, completion_mask: Tensor) -> None:
        """Stops a step whose gradient is NaN before it reaches the weights.

        transformers logs such a loss as 0, and the checkpoints that follow push the good ones out.

        Args:
            logps, train_logps: the loss forward's log-probs, and those that stand for π, (B, T).
            completion_mask: (B, T). Tool tokens count here: their NaN times a mask of 0 is NaN.

        Raises:
            FloatingPointError: a log-prob of the training engine's is not finite. Said once instead where the step is
                left out, with fp16 by the loss scaler and with `gradient_guard` by that, and with
                `constraint="none"`, which trains on as TRL does.
        """
        broken = int((completion_mask.bool() & ~(logps.isfinite() & train_logps.isfinite())).sum())
        if not broken:
            return
        message = (
            f"{broken} log-probs of the training engine are NaN or infinite at step {self.state.global_step}, so the "
            "gradient is NaN, and the weights will be. Weights or activations overflowed: go back to the last "
            "checkpoint and lower `learning_rate`, or train in bf16 or float32"
        )
        is_left_out = self.args.fp16 or self.args.gradient_guard is not None
        if self.args.constraint != "none" and not is_left_out:
            raise FloatingPointError(f"{message}. `constraint='none'` trains on, as TRL does.")
        self._say_once([("non-finite", f"{message}.")])

    def _say_once(self, notices: list[tuple[str, str]]) -> None:
        """Warns of each (topic, message) whose topic was not spoken of before, on the main process."""
        for topic, message in notices:
            if topic not in self._said and self.accelerator.is_main_process:
                logger.warning("DC-GRPO: %s", message)
            self._said.add(topic)


def _without_rows(batch: dict[str, Any], rows: list[int]) -> Tensor:
    """The batch's sampling log-probs, (B, T), with NaN, which is unscored, in the given rows."""
    logps, shape = batch["sampling_per_token_logps"], batch["completion_ids"].shape
    measured = logps.new_full(shape, torch.nan)
    sound = [row for row in range(shape[0]) if row not in rows]
    if sound:  # a sound row is as long as its completion, so what is cut or missing is padding
        width = min(logps.size(1), shape[1])
        measured[sound, :width] = logps[sound, :width]
    return measured
