# SPDX-License-Identifier: Apache-2.0
"""Configuration of the DC-GRPO trainer: the fields that TRL's config does not have, and their validation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from dc_trl.constraint import CONSTRAINTS, DISCREPANCY_LEVELS
from dc_trl.discrepancy import METRICS
from dc_trl.estimators import combinations
from dc_trl.estimators.drpo import DRPO_LIMIT, check_limit
from dc_trl.estimators.ess_rate import check_fraction
from dc_trl.estimators.gradient_guard import check_guard, check_patience
from dc_trl.estimators.importance import CORRECTIONS, DRPO
from dc_trl.estimators.rejection import RULES, resolve_bounds
from dc_trl.estimators.rejection.combinations import check_rejection
from dc_trl.length_decay import check_factor, check_min_ratio, check_period
from dc_trl.rollouts.engines import BACKENDS, engine_of
from dc_trl.rollouts.engines.base import Engine
from dc_trl.rollouts.precisions import PRECISIONS
from dc_trl.rollouts.sampling_options import ANY_ENGINE, IN_PROCESS, VLLM, check_decoding, objection
from dc_trl.rollouts.shown import check_address, shown, without_secrets


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class DCGRPOConfig(GRPOConfig):
    """Configuration of [`DCGRPOTrainer`]: [`~trl.GRPOConfig`] and the parameters below.

    Three inherited defaults differ: `lr_scheduler_type="constant"` (both papers train at a constant rate, before
    length-decay), `vllm_importance_sampling_mode="token_truncate"` and `vllm_importance_sampling_clip_max=2.0` (the
    length-decay paper's C). TRL's `sequence_mask` zeroes the loss of the worst sequences, so that the penalty would
    never reach the tokens that drive the multiplier up. docs/paper_index.md says where each default comes from.

    Raises:
        ValueError: for values or combinations that cannot work, naming field, value, reason and remedy.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["vllm_engine_kwargs", "rejection_bounds"]

    lr_scheduler_type: str = _option("constant", "Base learning-rate schedule; length-decay multiplies it.")
    vllm_importance_sampling_mode: str = _option(
        "token_truncate",
        "Importance-sampling correction, from whichever engine the sampling log-probs come: TRL's modes, or `drpo`, "
        "the whole ratio times DRPO's weight (2606.09821), in place of ratio clipping.",
    )
    vllm_importance_sampling_clip_max: float | None = _option(2.0, "Upper bound C of the importance-sampling ratio.")

    constraint: str = _option(
        "lagrangian",
        "`lagrangian` (DC-GRPO), `fixed` (Dual-GRPO, eq. 3), `threshold` (figure 3), or `none` (plain GRPO, with the "
        "discrepancy still measured).",
        choices=list(CONSTRAINTS),
    )
    discrepancy_metric: str = _option(
        "prob_diff",
        "Discrepancy of a token, eq. 2; the default is the paper's.",
        choices=METRICS.keys(),
    )
    discrepancy_level: str = _option(
        "token",
        "`token`, or `sequence`: the trajectory's mean for each of its tokens.",
        choices=list(DISCREPANCY_LEVELS),
    )
    discrepancy_average: str = _option(
        "trajectory",
        "Mean that drives λ, eq. 11: over trajectories of their token means (the paper's), or over all tokens.",
        choices=["trajectory", "token"],
    )
    discrepancy_tolerance: float | None = _option(
        None,
        "Tolerance ε of the mean discrepancy. None calibrates it: the mean of the first "
        "`tolerance_calibration_batches` generation batches times `tolerance_slack`; no penalty until it is known.",
    )
    tolerance_slack: float = _option(1.25, "Tolerance as a multiple of the calibrated floor. Our value.")
    tolerance_calibration_batches: int = _option(8, "Generation batches that calibrate the tolerance. Our value.")
    multiplier_init: float = _option(0.1, "λ_0; 0.1 on Qwen3-8B, 0.05 on Qwen3-30B-A3B (secondary source).")
    multiplier_max: float = _option(1.0, "Upper end of λ's range. Not given by the paper: our value.")
    dual_lr: float = _option(1.0, "Dual learning rate, eq. 11; 1.0 in the paper (secondary source).")

    rejection: list[str] | None = _option(
        None,
        "Rules by which tokens or sequences on which the engines are too far apart are left out of loss, normaliser "
        f"and penalty: {', '.join(RULES)}. None for no rule.",
    )
    rejection_bounds: dict | str | None = _option(
        None, "Bounds of the rules by name, such as {'icepop': {'high': 2.0}}; what is left out keeps its default."
    )
    drpo_limit: float = _option(DRPO_LIMIT, "δ of `drpo`, a difference of probabilities; its authors' code's.")

    length_decay: bool = _option(False, "Halve the learning rate after a surge of the response length (2602.01826).")
    length_decay_period: int | None = _option(
        None, "Steps between halvings. None: `length_decay_factor` times the step of the surge, once it is detected."
    )
    length_surge_ratio: float = _option(3.0, "Growth of the mean response length that counts as a surge.")
    length_decay_factor: float = _option(1.8, "Period as a multiple of the surge step; the paper's 1.8.")
    length_decay_min_lr_ratio: float = _option(0.1, "Floor of the decay, as a fraction of the initial rate; paper's.")

    ess_rate: bool = _option(False, "Scale each update's learning rate by √ESS of its rollouts (2602.17616).")
    ess_rate_reference: float = _option(1.0, "ESS, `dc/ess`, at which the rate is whole; the authors' code's.")
    ess_rate_min_scale: float = _option(0.1, "Floor of that scale. Our value.")

    gradient_guard: float | None = _option(
        None,
        "Leave out an optimizer step whose gradient norm, before clipping, is not finite or above this multiple of "
        "the median of the last 32, and write it to `output_dir/skipped.jsonl`; `inf`: if it is not finite alone.",
    )
    gradient_guard_patience: int = _option(5, "Steps left out in a row at which the guard ends the run. Our value.")

    advantage_estimator: str = _option(
        "grpo", "`grpo`: TRL's normalisation; `rloo`: leave-one-out baseline, not scaled.", choices=["grpo", "rloo"]
    )
    zero_variance_groups: str = _option(
        "keep",
        "`drop` takes groups whose rewards are all equal out of gradient, penalty and loss normaliser.",
        choices=["keep", "drop"],
    )
    rollout_backend: str = _option(
        "vllm",
        "Engine that samples: `vllm` (TRL's, with `use_vllm=True`) or `transformers`, a copy of the policy in this "
        "process, in `rollout_precision`.",
        choices=list(BACKENDS),
    )
    rollout_precision: str | None = _option(
        None, "Precision of the sampling copy; None: as trained.", choices=[None, *PRECISIONS]
    )
    vllm_engine_kwargs: dict | str | None = _option(
        None,
        "Arguments of the colocated `vllm.LLM` on top of TRL's, such as {'quantization': 'fp8'} or {'kv_cache_dtype': "
        "'fp8'}: train high, deploy low. A server takes them when it is started.",
    )
    log_tokens: bool = _option(
        False,
        "With each log entry, write log π, log μ, discrepancy and penalty of every token of the last generation batch "
        "to `output_dir/tokens/`; `dc-trl report` shows them.",
    )
    log_format: str = _option(
        "line",
        "What a log entry prints: `line`, reward, length, discrepancy of tolerance, λ and seconds; `full`, all of it, "
        "as TRL. `output_dir/log.jsonl` has all in either case.",
        choices=["line", "full"],
    )
    router_replay: bool = _option(
        False,
        "Mixtures of experts: train through the experts that the sampler chose for each token, with live scores "
        "(R3, 2510.11370).",
    )
    weight_sync: str = _option(
        "nccl",
        "How a vLLM server gets the weights: `nccl` (TRL's), or `disk`, through a checkpoint that it reloads.",
        choices=["nccl", "disk"],
    )
    weight_sync_readers: str = _option(
        "owner",
        "Who may read the weights that `weight_sync='disk'` writes: `owner` (mode 0600), `group` (0640) or `all` "
        "(0644). A server under another user needs one of the latter two.",
        choices=["owner", "group", "all"],
    )
    sync_rounding: str = _option(
        "auto",
        "How weights are rounded for the sampler: `nearest`, which loses updates of less than half a step of its "
        "format; `dither`, by which they arrive in expectation, and where the trainer computes in bf16 has the same "
        "weights, of float32 masters; `auto`: dithered to fp8, and to bf16 and fp16 where the trainer multiplies "
        "with finer weights; to nearest under autocast or FSDP's mixed precision.",
        choices=["auto", "nearest", "dither"],
    )

    @property
    def _engine(self) -> Engine:
        """The engine that these settings choose."""
        return engine_of(vars(self))

    @property
    def extra_sampling_parameters(self) -> dict[str, Any]:
        """`generation_kwargs` as the dict that TRL makes of it."""
        return self.generation_kwargs if isinstance(self.generation_kwargs, dict) else {}

    @property
    def completion_limit(self) -> int:
        """Most tokens of a completion in the in-process engine, which needs a bound: if none is given, TRL's 256."""
        return 256 if self.max_completion_length is None else int(self.max_completion_length)

    @property
    def corrects_itself(self) -> bool:
        """Whether this package applies the importance-sampling correction, from the loss's forward, and not TRL."""
        return self.constraint != "none" or self.vllm_importance_sampling_mode == DRPO

    @property
    def needs_log_probs(self) -> str | None:
        """The option that compares the two engines, as it is to be named in an error; None where nothing does."""
        if self.constraint != "none":
            return f"`constraint={self.constraint!r}`"
        if self.rejection:
            return f"`rejection={self.rejection}`"
        return f"`vllm_importance_sampling_mode={DRPO!r}`" if self.corrects_itself else None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as transformers gives them, among others to trackers; without secrets.

        `vllm_engine_kwargs` is given as it is shown, see `dc_trl.rollouts.shown`.
        """
        fields = {name: without_secrets(name, value) for name, value in super().to_dict().items()}
        return fields | {"vllm_engine_kwargs": shown("vllm_engine_kwargs", self.vllm_engine_kwargs)}

    def __str__(self) -> str:
        fields = (f"{name}={value!r},\n" for name, value in self.to_dict().items())
        return f"{type(self).__name__}(\n{''.join(fields)})"

    __repr__ = __str__

    def __post_init__(self) -> None:
        super().__post_init__()
        mode = self.vllm_importance_sampling_mode
        if mode not in CORRECTIONS:
            raise ValueError(
                f"`vllm_importance_sampling_mode` is {mode!r}, which is unknown: use one of {CORRECTIONS}."
            )
        self._check_rejection()
        self._check_choices()
        self._check_numbers()
        self._check_length_decay()
        self._check_rollouts()
        if self.router_replay:
            self._check_router_replay()
        if self.advantage_estimator == "rloo":
            self._set_up_rloo()
        if self.zero_variance_groups == "drop":
            combinations.check_dropping(self)
        if self.needs_log_probs or self._engine.copies_policy:
            self._check_sampling()
        if self.constraint != "none":
            combinations.check_penalty(self)
        self._check_guard()

    def _check_rejection(self) -> None:
        self.rejection = [self.rejection] if isinstance(self.rejection, str) else list(self.rejection or [])
        if not isinstance(self.rejection_bounds, Mapping | None):
            raise ValueError(
                f"`rejection_bounds` is {self.rejection_bounds!r}, which is no mapping of rules to their bounds. Use "
                "e.g. {'icepop': {'high': 2.0}}."
            )
        resolve_bounds(self.rejection, self.rejection_bounds or {})
        if self.rejection:
            check_rejection(self)
        check_limit(self.drpo_limit, "drpo_limit")
        if self.vllm_importance_sampling_mode == DRPO:
            combinations.check_drpo(self)

    def _check_choices(self) -> None:
        """Every field of this class's own that says its choices holds one of them."""
        for name, option in self.__dataclass_fields__.items():
            allowed = option.metadata.get("choices")
            if allowed is not None and name not in GRPOConfig.__dataclass_fields__:
                value = getattr(self, name)
                if value not in allowed:
                    names = ", ".join(repr(choice) for choice in allowed if choice is not None)
                    unset = ", or leave it unset" if None in allowed else ""
                    raise ValueError(f"`{name}` is {value!r}, which is unknown: use one of {names}{unset}.")

    def _check_numbers(self) -> None:
        for name in ("multiplier_init", "multiplier_max", "dual_lr", "tolerance_slack", "discrepancy_tolerance"):
            value = getattr(self, name)
            if value is not None and (not math.isfinite(value) or value < 0):
                raise ValueError(f"`{name}` is {value}: it must be finite and not negative. Use a number ≥ 0.")
        if self.multiplier_init > self.multiplier_max:
            raise ValueError(
                f"`multiplier_init` is {self.multiplier_init}, above `multiplier_max` = {self.multiplier_max}: the "
                "multiplier would start outside its range. Lower the first or raise the second."
            )
        if self.tolerance_calibration_batches < 1:
            raise ValueError(
                f"`tolerance_calibration_batches` is {self.tolerance_calibration_batches}: calibration needs at least "
                "one batch. Use 1 or more, or set `discrepancy_tolerance`."
            )

    def _check_length_decay(self) -> None:
        if self.length_decay_period is not None:
            check_period(self.length_decay_period, "length_decay_period")
        check_factor(self.length_decay_factor, "length_decay_factor")
        check_min_ratio(self.length_decay_min_lr_ratio, "length_decay_min_lr_ratio")
        check_fraction(self.ess_rate_reference, "ess_rate_reference")
        check_fraction(self.ess_rate_min_scale, "ess_rate_min_scale")
        if not (math.isfinite(self.length_surge_ratio) and self.length_surge_ratio > 1):
            raise ValueError(
                f"`length_surge_ratio` is {self.length_surge_ratio}: a surge is growth, so it exceeds 1. Use e.g. 3."
            )

    def _check_guard(self) -> None:
        check_patience(self.gradient_guard_patience, "gradient_guard_patience")
        if self.gradient_guard is not None:
            check_guard(self.gradient_guard, "gradient_guard")
            combinations.check_guarding(self)

    def _check_rollouts(self) -> None:
        self._engine.check_config(self)
        if self.rollout_precision is not None and not self._engine.copies_policy:
            raise ValueError(
                f"`rollout_precision` is {self.rollout_precision!r} with vLLM, which takes its precision from the "
                "server's or engine's own start-up options (for example `--quantization fp8`). Leave it unset, or "
                "use `rollout_backend='transformers'`."
            )
        if not isinstance(self.vllm_engine_kwargs, dict | None):
            raise ValueError(
                f"`vllm_engine_kwargs` is a {type(self.vllm_engine_kwargs).__name__}: it must be a dict of arguments "
                'of `vllm.LLM`, or one as JSON, such as \'{"quantization": "fp8"}\'.'
            )
        if self.vllm_engine_kwargs and not (self.use_vllm and self.vllm_mode == "colocate"):
            raise ValueError(
                f"`vllm_engine_kwargs` is {shown('vllm_engine_kwargs', self.vllm_engine_kwargs)}, which only a "
                "colocated engine can take. Set `use_vllm=True` and `vllm_mode='colocate'`, or start the server with "
                "these options."
            )
        if self.weight_sync == "disk" and not (self.use_vllm and self.vllm_mode == "server"):
            raise ValueError(
                "`weight_sync` is 'disk', which serves a vLLM server only. Set `use_vllm=True` and "
                "`vllm_mode='server'`, or leave it unset."
            )
        for name in ("vllm_server_base_url", "vllm_server_host"):
            check_address(name, getattr(self, name) or "")
        self._check_vespo()

    def _check_vespo(self) -> None:
        """TRL's own check of its correction, for the engines that TRL does not build and so does not check."""
        mode = self.vllm_importance_sampling_mode
        if self.loss_type != "vespo" or not (self._engine.is_ours and self.vllm_importance_sampling_correction):
            return
        if mode not in ("token_truncate", "token_mask"):
            raise ValueError(
                f"`vllm_importance_sampling_mode` is {mode!r} with `loss_type='vespo'`, which needs one ratio per "
                "token. Use 'token_truncate' or 'token_mask', or `vllm_importance_sampling_correction=False`."
            )

    def _check_router_replay(self) -> None:
        """The sampler's choice of experts must reach the trainer, and the trainer's forward must take it."""
        colocated = self.use_vllm and self.vllm_mode == "colocate"
        refused = {
            "use_vllm": (
                not self._engine.gives_log_probs,
                "TRL's `transformers.generate` records no experts",
                "`rollout_backend='transformers'`",
            ),
            "vllm_mode": (
                self.use_vllm and not colocated,
                "TRL's server does not hand out the experts that vLLM chose",
                "`vllm_mode='colocate'`, or `rollout_backend='transformers'`",
            ),
            "vllm_tensor_parallel_size": (
                colocated and self.vllm_tensor_parallel_size > 1,
                "each rank runs its own engine of TRL's, and vLLM gives the experts to the first alone",
                "1, or `rollout_backend='transformers'`",
            ),
            "torch_compile": (
                self.torch_compile,
                "replay hooks into the routers, which a compiled forward may not call",
                "False",
            ),
        }
        combinations.refuse(self, refused, "`router_replay=True`", "`router_replay=False`")

    def _set_up_rloo(self) -> None:
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"`multi_objective_aggregation` is {self.multi_objective_aggregation!r} with "
                "`advantage_estimator='rloo'`, which takes one summed reward per completion. Use 'sum_then_normalize'."
            )
        if self.scale_rewards == "batch":
            raise ValueError(
                "`scale_rewards` is 'batch' with `advantage_estimator='rloo'`, whose advantages are not scaled. Use "
                "'none', or `advantage_estimator='grpo'`."
            )
        self.scale_rewards = "none"

    def _check_sampling(self) -> None:
        """The two engines must mean the same distribution, or the discrepancy gets a floor of p(1/S − 1).

        The in-process engine can sample from no other, whatever the constraint.
        """
        in_process = self._engine.copies_policy
        engine = IN_PROCESS if in_process else VLLM if self.use_vllm else ANY_ENGINE
        cause = "`rollout_backend='transformers'`" if in_process else self.needs_log_probs
        settings = {"temperature": self.temperature, "max_completion_length": self.completion_limit}
        if in_process:
            check_decoding(self.temperature, self.completion_limit)
        # What is left for both: no constraint, no rules, and a correction of TRL's.
        without = "`constraint='none'`" + (" without `rejection`" if self.rejection else "")
        given = [(name, name, getattr(self, name)) for name in ("top_p", "top_k", "repetition_penalty")]
        given.append(("min_p", "min_p", 0.0 if self.min_p is None else self.min_p))  # as TRL hands it over
        given.append(("vllm_structured_outputs_regex", "structured_outputs", self.vllm_structured_outputs_regex))
        given += [(f"generation_kwargs[{k!r}]", k, v) for k, v in self.extra_sampling_parameters.items()]
        for name, option, value in given:
            refused = objection(option, value, engine, settings, without)
            if refused is not None:
                raise ValueError(f"`{name}` is {without_secrets(option, value)!r} with {cause}: {refused}")
