# SPDX-License-Identifier: Apache-2.0
"""The DC-GRPO trainer: TRL's GRPO trainer and the discrepancy constraint between scoring and loss."""

import json
import textwrap
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers.utils import logging
from trl.trainer.utils import get_config_model_id

from dc_trl import model_card
from dc_trl.advantage import discrepancy_penalty, penalised_advantages
from dc_trl.attributes import temporary_attributes
from dc_trl.callbacks import LengthDecayCallback
from dc_trl.config import DCGRPOConfig
from dc_trl.constraint import DiscrepancyConstraint, DiscrepancyTolerance
from dc_trl.discrepancy import (
    correction_metrics,
    mean_discrepancy,
    metrics,
    summarise,
    token_discrepancy,
    valid_tokens,
)
from dc_trl.dual import DualVariable
from dc_trl.estimators import GroupEstimatorsTrainer
from dc_trl.importance import importance_sampling_ratio
from dc_trl.instruments import Instruments
from dc_trl.ragged import score_in_parts
from dc_trl.rollouts import factory
from dc_trl.run_log import RunLogCallback
from dc_trl.token_log import TokenLog

logger = logging.get_logger(__name__)

STATE_FILE = "dc_grpo_state.json"

# Above this share of the advantage, the penalty is part of what the policy learns, not a nudge. Our value.
NOTABLE_PENALTY_SHARE = 0.1


class DCGRPOTrainer(GroupEstimatorsTrainer):
    """GRPO under a discrepancy constraint: DC-GRPO (arXiv 2606.08779) on TRL's [`~trl.GRPOTrainer`].

    Takes the arguments of `GRPOTrainer`; `args` is a [`DCGRPOConfig`]. With `constraint="none"` it trains exactly as
    `GRPOTrainer` does, and measures.

    Seams of TRL 1.16 that this class hooks, each held by a contract test:

    - `_generate_and_score_completions`: scored without the second forward; advantages of other estimators
    - `_calculate_rewards`, `_prepare_inputs`: rewards and micro-batches, for these (in `GroupEstimatorsTrainer`)
    - `_compute_loss` and, while it runs, `_get_per_token_logps_and_entropies`: its log-probs are π, from which penalty
      and importance ratio are filled in between forward and loss. It reads `advantages`, (B,) or (B, T), and
      `importance_sampling_ratio` after that forward. A ragged batch takes one forward for each of its parts.
    - `training_step`, `evaluation_loop`: where a generation batch, or an evaluation, ends
    - `log`: metrics of length-decay and of the gradient norm
    - `save_model`, `_load_optimizer_and_scheduler`, `create_model_card`: state
    - `vllm_generation`: the slot of the rollout engine, `sync_weights()` and `generate()`

    An iteration of the dual is one generation batch, or one optimizer step where a step spans several; λ is constant
    within it. The metrics of an iteration are logged at its end.

    Attributes:
        dual ([`~dc_trl.dual.DualVariable`]): the multiplier λ.
        discrepancy_tolerance (`float` or `None`): the tolerance in use; None while it is being calibrated.
    """

    _tag_names = ["trl", "grpo", "dc-grpo"]
    _name = "DC-GRPO"
    _paper = {
        "title": "Reformulate LLM Reinforcement Learning for Efficient Training under Black-box Discrepancy",
        "id": "2606.08779",
        "citation": textwrap.dedent("""\
            @article{dcgrpo2026,
                title        = {{Reformulate LLM Reinforcement Learning for Efficient Training
                                 under Black-box Discrepancy}},
                year         = 2026,
                eprint       = {arXiv:2606.08779},
            }"""),
    }

    _loss_inputs: dict[str, Any] | None = None

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: DCGRPOConfig | None = None, *rest: Any, **kwargs: Any
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = DCGRPOConfig(f"{name.split('/')[-1]}-DC-GRPO")
        elif not isinstance(args, DCGRPOConfig):
            raise TypeError(
                f"`args` is a {type(args).__name__}: DCGRPOTrainer needs a DCGRPOConfig, which takes the same "
                "parameters. Rename GRPOConfig to DCGRPOConfig."
            )
        factory.check_log_prob_source(args, kwargs.get("rollout_func"))
        self.dual = DualVariable(args.multiplier_init, args.dual_lr, args.multiplier_max)
        self._constraint = DiscrepancyConstraint(
            args.constraint,
            self.dual,
            DiscrepancyTolerance(args.discrepancy_tolerance, args.tolerance_slack, args.tolerance_calibration_batches),
        )
        self._instruments = Instruments()
        self._token_log = TokenLog(Path(str(args.output_dir))) if args.log_tokens else None
        self._said: set[str] = set()
        hidden = temporary_attributes(args, use_vllm=args.use_vllm and not factory.needs_own_engine(args))
        with hidden, factory.colocated_engine_arguments(args):
            super().__init__(model, reward_funcs, args, *rest, **kwargs)
        if factory.needs_own_engine(args):
            self.use_vllm = True
            self.vllm_mode = args.vllm_mode if args.use_vllm else "transformers"
            self._last_loaded_step = -1
        if self.use_vllm:
            self.vllm_generation = factory.build_engine(self, args)
        if args.length_decay:
            names = ("length_decay_period", "length_decay_factor", "length_decay_min_lr_ratio", "length_surge_ratio")
            self.add_callback(LengthDecayCallback(*(getattr(args, name) for name in names)))
        self.add_callback(RunLogCallback())

    @property
    def _length_decay(self) -> LengthDecayCallback | None:
        # Looked up each time: transformers may replace callbacks when it restores a checkpoint.
        found = (c for c in self.callback_handler.callbacks if isinstance(c, LengthDecayCallback))
        return next(found, None)

    @property
    def discrepancy_tolerance(self) -> float | None:
        """Tolerance in use, in units of the discrepancy metric; None while it is being calibrated. Can be set."""
        return self._constraint.tolerance.value

    @discrepancy_tolerance.setter
    def discrepancy_tolerance(self, value: float | None) -> None:
        self._constraint.tolerance.given = value

    # Scoring

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # TRL's correction costs a second forward here; the loss forward gives the same log-probs for nothing.
        correction = self.vllm_importance_sampling_correction and self.args.constraint == "none"
        with temporary_attributes(self, vllm_importance_sampling_correction=correction):
            batch = super()._generate_and_score_completions(inputs)
        if self.args.constraint != "none" and "sampling_per_token_logps" not in batch:
            raise ValueError(
                f"The rollouts carry no log-probs, which `constraint={self.args.constraint!r}` needs. Return "
                "`logprobs` from `rollout_func`, use another rollout engine, or set `constraint='none'`."
            )
        if self._length_decay is not None and self.model.training:
            # Once a generation batch, whatever `logging_steps` is; gathered by TRL, so the same on every rank.
            mean_length = self._metrics["train"]["completions/mean_length"][-1]
            self._length_decay.observe(self.state.global_step + 1, mean_length)
        return batch

    # Loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if "sampling_per_token_logps" not in inputs:
            return super()._compute_loss(model, inputs)
        # The correction applies to log-probs from any source, although TRL asks for vLLM's.
        correct = {} if self.args.constraint == "none" else {"use_vllm": True}
        # A copy: the generation batch may be used again.
        with temporary_attributes(self, _loss_inputs=dict(inputs), **correct):
            return super()._compute_loss(model, self._loss_inputs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        score: Any = super()._get_per_token_logps_and_entropies
        if self._loss_inputs is None:
            return score(*args, **kwargs)
        outputs = score_in_parts(score, *args, **kwargs) if self._may_split(kwargs) else score(*args, **kwargs)
        self._constrain(self._loss_inputs, outputs[0].detach())
        return outputs

    def _may_split(self, options: dict[str, Any]) -> bool:
        """Whether the loss forward may be one of several parts.

        Not where it is to equal TRL's to the bit; not with images or a router's loss, which belong to a whole batch;
        and not with several processes, whose forwards communicate, so that their number must be the same.
        """
        whole = any(value is not None for name, value in options.items() if not name.startswith("compute_"))
        alone = self.accelerator.num_processes == 1
        return bool(self.args.constraint != "none" and alone and not whole and not options["compute_aux_loss"])

    @torch.no_grad()
    def _constrain(self, inputs: dict[str, Any], logps: Tensor) -> None:
        """Fills penalty and importance ratio into `inputs`, and measures. `logps` (B, T): the loss forward's."""
        args = self.args
        sampling_logps = inputs["sampling_per_token_logps"]
        # Recomputed before the first of several updates, so that policy drift is not taken for discrepancy.
        train_logps = inputs.get("old_per_token_logps", logps)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        measured: dict[str, Any] = {"mask": inputs.get("measured_mask", mask), "metric": args.discrepancy_metric}
        scored = valid_tokens(sampling_logps, measured["mask"])
        valid = valid_tokens(sampling_logps, mask)
        if self.use_vllm and args.vllm_importance_sampling_correction:
            measured["correction"], measured["kept"] = importance_sampling_ratio(
                *(train_logps, sampling_logps, scored),
                mode=args.vllm_importance_sampling_mode,
                clip_min=args.vllm_importance_sampling_clip_min,
                clip_max=args.vllm_importance_sampling_clip_max,
            )
        discrepancy = token_discrepancy(train_logps, sampling_logps, args.discrepancy_metric)
        advantages = inputs["advantages"].reshape(len(valid), -1)
        if args.constraint != "none":
            measured["advantages"] = advantages
            measured["penalty"] = inputs.get("loss_weight", 1.0) * discrepancy_penalty(
                *(discrepancy, valid),
                constraint=args.constraint,
                multiplier=self.dual.value,
                tolerance=self.discrepancy_tolerance,
                level=args.discrepancy_level,
            )
            inputs["advantages"] = penalised_advantages(inputs["advantages"], measured["penalty"])
            inputs["importance_sampling_ratio"] = measured.get("correction")
        mode = "train" if self.model.training else "eval"
        self._instruments.add(mode, summarise(train_logps, sampling_logps, **measured))
        if self._token_log is not None and mode == "train" and self._first_use:
            columns = {"train_logp": train_logps, "sampling_logp": sampling_logps, "discrepancy": discrepancy}
            columns |= {"advantage": advantages, "valid": scored}
            penalty = measured.get("penalty", torch.zeros_like(discrepancy))
            self._token_log.add(inputs, penalty=penalty, **columns)

    # Iterations and logs

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trains on one micro-batch as TRL does; at the end of an iteration, logs and steps the dual variable."""
        loss = super().training_step(*args, **kwargs)
        if self.args.gradient_accumulation_steps > self._steps_per_rollout:
            complete = self.accelerator.sync_gradients
        else:
            complete = self._step % self._steps_per_rollout == 0
        if complete:
            self._finish_iteration("train")
        return loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates as TRL does; the discrepancy is reduced once, over all batches."""
        output = super().evaluation_loop(*args, **kwargs)
        self._finish_iteration("eval")
        return output

    def _finish_iteration(self, mode: str) -> None:
        """Reduces the iteration's summaries over micro-batches and ranks, logs them, and steps the dual variable."""
        summary = self._instruments.reduce(mode, self.accelerator.gather)
        if summary is None:
            return
        mean = mean_discrepancy(summary, self.args.discrepancy_average).item()
        values = {f"dc/{key}": v.item() for key, v in metrics(summary, self.args.discrepancy_average).items()}
        values |= {f"dc/{key}": value for key, value in self._constraint.metrics(mean).items()}
        if self.args.constraint != "none" and self.vllm_importance_sampling_correction:
            values |= {f"sampling/{key}": v.item() for key, v in correction_metrics(summary).items()}
        for key, value in values.items():
            self._metrics[mode][key].append(value)
        if mode == "train":
            if self._token_log is not None:
                self._token_log.end_iteration()
            notices = self._constraint.update(mean)
            share = values["dc/penalty_share"]
            if share > NOTABLE_PENALTY_SHARE:
                notices.append(("penalty", f"the penalty is {share:.0%} of the advantage (`dc/penalty_share`)."))
            self._say_once(notices)

    def _say_once(self, notices: list[tuple[str, str]]) -> None:
        for topic, message in notices:
            if topic not in self._said and self.accelerator.is_main_process:
                logger.warning("DC-GRPO: %s", message)
            self._said.add(topic)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as TRL does, with `dc/grad_norm_smoothed` and `length_decay/*` added to training logs."""
        if self.model.training and "grad_norm" in logs:
            smoothed = self._instruments.smooth_grad_norm(float(logs["grad_norm"]))
            if smoothed is not None:
                logs["dc/grad_norm_smoothed"] = smoothed
        if self.model.training and "loss" in logs and self._length_decay is not None:
            logs |= self._length_decay.metrics()
        super().log(logs, start_time)
        if self._token_log is not None and self.model.training:
            writer = self._tokenizer.decode if self.is_world_process_zero() else None
            self._token_log.write(self.state.global_step, gather_object, writer)

    # State and card

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes TRL's model card with the constraint, the tolerance in use and the last measurements."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            state = (self.discrepancy_tolerance, self.dual.value, self.state.log_history)
            model_card.complete(Path(str(self.args.output_dir)), self.args, *state)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves as TRL does; a checkpoint also gets λ, tolerance, calibration, and the card."""
        super().save_model(output_dir, _internal_call)
        # transformers pushes a checkpoint at the end of `_save_checkpoint`, so what it is to hold is written here.
        if _internal_call and output_dir is not None and self.args.should_save:
            state = self._constraint.state_dict() | {"instruments": self._instruments.state_dict()}
            Path(output_dir, STATE_FILE).write_text(json.dumps(state))
            model_card.copy_card(Path(str(self.args.output_dir)), Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint, STATE_FILE)
        if path.exists():
            state = json.loads(path.read_text())
            self._constraint.load_state_dict(state)
            self._instruments.load_state_dict(state["instruments"])
        else:
            self._say_once([("state", f"{checkpoint} has no {STATE_FILE}: multiplier and tolerance start anew.")])
