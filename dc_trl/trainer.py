# SPDX-License-Identifier: Apache-2.0
"""The DC-GRPO trainer: TRL's GRPO trainer and the discrepancy constraint between scoring and loss."""

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from dc_trl.config import DCGRPOConfig
from dc_trl.constraint import DiscrepancyConstraint, DiscrepancyTolerance, penalty_notices
from dc_trl.discrepancy import correction_metrics, mean_discrepancy, metrics
from dc_trl.dual import DualVariable
from dc_trl.estimators.importance import DRPO, ImportanceSampling
from dc_trl.records.run_log import RunLogCallback
from dc_trl.records.token_log import TokenLog
from dc_trl.rollouts.engines import check_log_prob_source, check_route_source
from dc_trl.step import Step, constrain
from dc_trl.training.attributes import temporary_attributes
from dc_trl.training.dropout import describe_dropout, find_dropout, switch_off_dropout
from dc_trl.training.ess_rate_callback import EssRateCallback
from dc_trl.training.instruments import Instruments
from dc_trl.training.judged import Judged
from dc_trl.training.length_decay_callback import LengthDecayCallback
from dc_trl.training.line_callbacks import in_lines
from dc_trl.training.ragged import score_in_parts
from dc_trl.training.rate_callback import RateCallback
from dc_trl.training.saving_trainer import SavingTrainer

Rate = TypeVar("Rate", bound=RateCallback)


class DCGRPOTrainer(SavingTrainer):
    """GRPO under a discrepancy constraint: DC-GRPO (arXiv 2606.08779) on TRL's [`~trl.GRPOTrainer`].

    Takes the arguments of `GRPOTrainer`; `args` is a [`DCGRPOConfig`]. With `constraint="none"` it trains exactly as
    `GRPOTrainer` does, and measures. With a constraint it switches the policy's dropout off, which would be measured
    as discrepancy.

    Seams of TRL 1.16 that this class and its helpers use, each held by a contract test:

    - `_generate`: what a `rollout_func` returns is checked row by row
    - `_generate_and_score_completions`, `vllm_importance_sampling_correction`: scored without the second forward;
      advantages of other estimators
    - `_calculate_rewards`, `_prepare_inputs`, `_buffered_inputs`, `_logs`: rewards and micro-batches, for these (in
      `GroupEstimatorsTrainer`)
    - `reward_func_names`: what reward functions return is checked
    - `_compute_loss`, `_get_per_token_logps_and_entropies`: while the loss is computed, the log-probs of its forward
      are π, from which penalty and importance ratio are filled in between forward and loss. It reads `advantages`,
      (B,) or (B, T), and `importance_sampling_ratio` after that forward. A ragged batch takes one forward for each of
      its parts.
    - `training_step`, `evaluation_loop`, `_step`, `_metrics`: where a generation batch, or an evaluation, ends;
      the end of the first is also that of the backward, up to which router replay holds, and after the last of which
      rejection settles what the loss is divided by
    - `_get_grad_norm`: the gradient guard, before the optimizer steps
    - `create_optimizer`, `optimizer`: float32 masters of weights in bf16, where trainer and sampler share one rounding
    - `train`, `_load_best_model`: where the engine's weights, `_last_loaded_step`, and what it sampled, `_step` and
      `_buffered_inputs`, are no longer current
    - `log`, `callback_handler`, `_tokenizer`: metrics of length-decay and of the gradient norm; the token log
    - `push_to_hub`, `_push_from_checkpoint`: a push sends the model and its card
    - `_save_rng_state`, `train`: a checkpoint is sealed when every process has written it, and resumed from if it is
    - `_run_epoch`, `control`: a finished run that is resumed trains nothing
    - `save_model`, `_load_optimizer_and_scheduler`, `create_model_card`, `_name`, `_paper`, `_tag_names`: state, card
    - `vllm_generation`, `use_vllm`, `vllm_mode`, `_last_loaded_step`, `temperature`: the slot of the rollout engine,
      `sync_weights()` and `generate()`
    - `accelerator`, `eos_token_ids`, `hub_model_id`, `loss_type`, `num_generations`, `num_generations_eval`: read
    - `aux_loss_enabled`, `router_aux_loss_coef`: read
    - `num_iterations`, `multi_objective_aggregation`, `ref_model`, `reward_weights`, `state`: read

    An iteration of the dual is one generation batch, or one optimizer step where a step spans several; λ is constant
    within it. The metrics of an iteration are logged at its end.

    Args:
        model: a name, a path or a model.
        reward_funcs: as TRL's.
        args: the configuration; None makes one with the defaults.
        rest: further positional arguments of `GRPOTrainer`, in its order.
        kwargs: its keyword arguments: `train_dataset`, `eval_dataset`, `processing_class`, `callbacks`, `peft_config`,
            `tools`, `rollout_func`, …

    Raises:
        TypeError: `args` is a plain `GRPOConfig`.
        ValueError: `constraint` is not "none" and nothing gives sampling log-probs, or a vLLM server gives raw ones;
            in training, a row of a `rollout_func`'s `logprobs` does not fit its completion.
        ConnectionError: that server does not answer. This and the former before the model loads.
        FloatingPointError: in training, `constraint` is not "none" and the model's own log-probs are not finite,
            before the weights are NaN. With `fp16`, whose loss scaler skips the step, it is said once.

    Attributes:
        dual ([`~dc_trl.dual.DualVariable`]): the multiplier λ.
        discrepancy_tolerance (`float` or `None`): the tolerance in use, in units of the metric; None while it is being
            calibrated. Can be set.
        step_observers (`list`): called as `observer(inputs, step)` with TRL's batch and the record of each
            micro-batch, [`~dc_trl.step.Step`]; the instruments and the token log are the first two.
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
        defaulted = args is None
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = DCGRPOConfig(f"{name.split('/')[-1]}-DC-GRPO")
        elif not isinstance(args, DCGRPOConfig):
            raise TypeError(
                f"`args` is a {type(args).__name__}: DCGRPOTrainer needs a DCGRPOConfig, which takes the same "
                "parameters. Rename GRPOConfig to DCGRPOConfig."
            )
        given = inspect.signature(GRPOTrainer.__init__).bind(self, model, reward_funcs, args, *rest, **kwargs)
        check_log_prob_source(args, given.arguments.get("rollout_func"), defaulted)
        check_route_source(args, given.arguments)
        self.dual = DualVariable(args.multiplier_init, args.dual_lr, args.multiplier_max)
        self._constraint = DiscrepancyConstraint(
            args.constraint,
            self.dual,
            DiscrepancyTolerance(args.discrepancy_tolerance, args.tolerance_slack, args.tolerance_calibration_batches),
            args.discrepancy_level,
        )
        self._instruments = Instruments()
        self._token_log = TokenLog(Path(str(args.output_dir))) if args.log_tokens else None
        self.step_observers: list[Callable[[dict[str, Any], Step], None]] = [self._measure, self._log_tokens]
        self._rollout_lengths: list[float] = []  # of the optimizer step at hand
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self._handle_dropout()
        if args.length_decay:
            decay = LengthDecayCallback(
                period=args.length_decay_period,
                surge_factor=args.length_decay_factor,
                min_lr_ratio=args.length_decay_min_lr_ratio,
                surge_ratio=args.length_surge_ratio,
            )
            self.add_callback(decay)
        if args.ess_rate:
            self.add_callback(EssRateCallback(args.ess_rate_reference, args.ess_rate_min_scale))
        if args.log_format == "line":
            self.callback_handler.callbacks = in_lines(self.callback_handler.callbacks)
        self.add_callback(RunLogCallback({"rounding_in_force": self._sync_rounding}))

    def _handle_dropout(self) -> None:
        """Switches dropout off under a constraint. Without one, TRL's training stands, and only `dc/*` suffers."""
        self._dropout = find_dropout(self.model)
        if self.args.constraint == "none" or not self._dropout:
            return
        words, self._dropout = describe_dropout(switch_off_dropout(self.model)), {}
        message = (
            f"dropout is switched off {words}: the training forward would drop what the sampling engine does not, and "
            "the constraint would take that for discrepancy. Set it to 0 in the configuration of the model or of the "
            "adapter, or keep it with `constraint='none'`."
        )
        self._say_once([("dropout", message)])

    def _rate_callback(self, kind: type[Rate]) -> Rate | None:
        # Looked up each time: transformers may replace callbacks when it restores a checkpoint.
        return next((c for c in self.callback_handler.callbacks if isinstance(c, kind)), None)

    @property
    def _length_decay(self) -> LengthDecayCallback | None:
        return self._rate_callback(LengthDecayCallback)

    @property
    def _ess_rate(self) -> EssRateCallback | None:
        return self._rate_callback(EssRateCallback)

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
        correction = self.vllm_importance_sampling_correction and not self.args.corrects_itself
        with temporary_attributes(self, vllm_importance_sampling_correction=correction):
            batch = super()._generate_and_score_completions(inputs)
        if self._judging:
            batch["reward"] = self._local(self._rewards, batch)
            batch["row"] = torch.arange(len(batch["reward"]), device=batch["reward"].device)
        if self._length_decay is not None and self.model.training:
            # Once a generation batch, whatever `logging_steps` is; gathered by TRL, so the same on every rank.
            self._rollout_lengths.append(self._metrics["train"]["completions/mean_length"][-1])
        return batch

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Tensor:
        if not self._judging:
            return super()._calculate_rewards(inputs, *args, **kwargs)
        self._judged = Judged(inputs)
        functions = [self._judged.listening(function) for function in self.reward_funcs]
        with temporary_attributes(self, reward_funcs=functions):
            return super()._calculate_rewards(inputs, *args, **kwargs)

    @property
    def _judging(self) -> bool:
        """Whether the token log is to know what was said of the completions; of evaluation nothing is written."""
        return self._token_log is not None and self.model.training

    # Loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if "sampling_per_token_logps" not in inputs:
            return super()._compute_loss(model, inputs)
        # The correction applies to log-probs from any source, although TRL asks for vLLM's.
        correct = {"use_vllm": True} if self.args.corrects_itself else {}
        own = dict(inputs)  # the generation batch may be used again
        with temporary_attributes(self, _loss_inputs=own, **correct):
            return super()._compute_loss(model, own)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        score: Any = super()._get_per_token_logps_and_entropies
        if self._loss_inputs is None:
            return score(*args, **kwargs)
        outputs = score_in_parts(score, *args, **kwargs) if self._may_split(kwargs) else score(*args, **kwargs)
        self._constrain(self._loss_inputs, outputs[0].detach())
        return outputs

    def _may_split(self, options: dict[str, Any]) -> bool:
        """Whether the loss forward may be one of several parts.

        Not where it is to equal TRL's to the bit; not with images, a router's loss or its replay, which belong to a
        whole batch; and not with several processes, whose forwards communicate, so that their number must be the same.
        """
        whole = any(value is not None for name, value in options.items() if not name.startswith("compute_"))
        alone = self.accelerator.num_processes == 1
        whole |= bool(options["compute_aux_loss"]) or self.args.router_replay
        return self.args.constraint != "none" and alone and not whole

    @torch.no_grad()
    def _constrain(self, inputs: dict[str, Any], logps: Tensor) -> None:
        """Fills penalty and importance ratio into `inputs`, and hands the record on. `logps` (B, T): the loss's."""
        # Recomputed before the first of several updates, so that policy drift is not taken for discrepancy.
        train_logps = inputs.get("old_per_token_logps", logps)
        if self.model.training:
            self._check_train_logps(logps, train_logps, inputs["completion_mask"])
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        step = constrain(
            train_logps,
            inputs.get("measured_logps", inputs["sampling_per_token_logps"]),
            inputs["advantages"],
            mask=mask,
            measured_mask=inputs.get("measured_mask", mask),
            metric=self.args.discrepancy_metric,
            constraint=self._constraint,
            correction=self._correction,
            loss_weight=inputs.get("loss_weight", 1.0),
            rejection=self._rejection,
            early=inputs.get("rejected_early"),
            current_logps=logps,
        )
        self._take_verdict(step.verdict)
        if self.args.constraint != "none":
            inputs["advantages"] = step.penalised_advantages
        elif step.verdict is not None:
            inputs["advantages"] = step.rejected_advantages
        if self.args.corrects_itself:
            inputs["importance_sampling_ratio"] = step.importance_ratio
        if self.args.vllm_importance_sampling_mode == DRPO:
            # Its ratio is to the sampler, whole: TRL's, to the policy before the update, is 1, and clips nothing.
            inputs["old_per_token_logps"] = logps
        for observe in self.step_observers:
            observe(inputs, step)

    @property
    def _correction(self) -> ImportanceSampling | None:
        """The importance-sampling weight: measured also where TRL does not apply it."""
        args = self.args
        if not args.vllm_importance_sampling_correction:
            return None
        return ImportanceSampling(
            mode=args.vllm_importance_sampling_mode,
            clip_min=args.vllm_importance_sampling_clip_min,
            clip_max=args.vllm_importance_sampling_clip_max,
            limit=args.drpo_limit,
        )

    def _measure(self, inputs: dict[str, Any], step: Step) -> None:
        self._instruments.add("train" if self.model.training else "eval", step)

    def _log_tokens(self, inputs: dict[str, Any], step: Step) -> None:
        if self._token_log is not None and self.model.training and self._first_use:
            texts = self._judged.texts(inputs["row"].tolist()) if "row" in inputs else None
            self._token_log.add(inputs, step, texts)

    # Iterations and logs

    def _forget_rollouts(self) -> None:
        super()._forget_rollouts()
        self._instruments.discard()
        if self._token_log is not None:
            self._token_log.discard()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trains on one micro-batch as TRL does; at the end of an iteration, logs and steps the dual variable."""
        loss = super().training_step(*args, **kwargs)
        if self.args.gradient_accumulation_steps > self._steps_per_rollout:
            complete = self.accelerator.sync_gradients
        else:
            complete = self._step % self._steps_per_rollout == 0
        if complete:
            self._finish_iteration("train")
        if self.accelerator.sync_gradients:
            self._observe_lengths()
        return loss

    def _observe_lengths(self) -> None:
        """Tells length-decay, at the end of an optimizer step, the mean length over the rollouts made in it."""
        lengths, self._rollout_lengths = self._rollout_lengths, []
        if lengths and self._length_decay is not None:
            # All rollouts have as many completions, so this is the mean over completions, and what TRL logs.
            self._length_decay.observe(self.state.global_step + 1, sum(lengths) / len(lengths))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates as TRL does; the discrepancy is reduced once, over all batches."""
        output = super().evaluation_loop(*args, **kwargs)
        self._finish_iteration("eval")
        return output

    def _finish_iteration(self, mode: str) -> None:
        """Reduces the iteration's summaries over micro-batches and ranks, logs them, and steps the dual variable."""
        reduced = self._instruments.reduce(mode, self.accelerator.gather)
        if reduced is None:
            return
        summary, rejected = reduced
        mean = mean_discrepancy(summary, self.args.discrepancy_average).item()
        values = {f"dc/{key}": v.item() for key, v in metrics(summary, self.args.discrepancy_average).items()}
        values |= {f"dc/{key}": value for key, value in self._constraint.metrics(mean).items()}
        values |= {f"dc/{key}": v.item() for key, v in self._rejection_metrics(rejected.sum(0)).items()}
        if self.args.corrects_itself and self.vllm_importance_sampling_correction:
            values |= {f"sampling/{key}": v.item() for key, v in correction_metrics(summary).items()}
        for key, value in values.items():
            self._metrics[mode][key].append(value)
        if mode == "train":
            if self._token_log is not None:
                self._token_log.end_iteration()
            if self._ess_rate is not None:
                self._ess_rate.observe(self.state.global_step + 1, values["dc/ess"])
            notices = self._constraint.update(mean)
            notices += penalty_notices(values["dc/penalty_share"], values["dc/penalty_only"])
            notices += self._of_rejection(rejected)
            if self._dropout:
                notices.append(("dropout", f"dropout is on {describe_dropout(self._dropout)}, which `dc/*` measures."))
            self._say_once(notices)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as TRL does, with `dc/grad_norm_smoothed`, `length_decay/*` and `ess_rate/*` added to training logs."""
        if self.model.training and "grad_norm" in logs:
            smoothed = self._instruments.smooth_grad_norm(float(logs["grad_norm"]))
            if smoothed is not None:
                logs["dc/grad_norm_smoothed"] = smoothed
        if self.model.training and "loss" in logs:
            for callback in filter(None, (self._length_decay, self._ess_rate)):
                logs |= callback.metrics()
        super().log(logs, start_time)
        if self._token_log is not None and self.model.training:
            writer = self._tokenizer.decode if self.is_world_process_zero() else None
            self._token_log.write(self.state.global_step, gather_object, writer)
