# SPDX-License-Identifier: Apache-2.0
"""The regimes and arms of the protocol: public options of the library, and trainers of this folder that say so."""

from functools import partial
from typing import Any

from papers.controls import ShuffledPenaltyTrainer
from papers.penalty_forms import FormTrainer, PenaltyForm
from papers.setups import Arm, Regime

# Regimes

CALM = Regime("calm", precision="int4", learning_rate=2e-4, rollouts=100)
STRESSED = Regime("stressed", precision="int3", learning_rate=1e-3, rollouts=40, updates=4)
MILD = Regime("mild", precision="int3", learning_rate=5e-4, rollouts=50, updates=4)
UNSEEN_FP8 = Regime("unseen-fp8", precision="fp8", learning_rate=1e-4, rollouts=60, grid="fp8")
UNSEEN_BF16 = Regime("unseen-bf16", precision="bf16", learning_rate=1e-5, rollouts=60, grid="bf16")
OFF_GRID_FP8 = Regime("off-grid-fp8", precision="fp8", learning_rate=1e-4, rollouts=60)

PUBLISHED_BF16 = Regime(
    "published-bf16",
    precision="bf16",
    learning_rate=1e-6,
    rollouts=10,
    batch=32,
    published=True,
    extra={"max_completion_length": 1},
)

# What arms are made of

Options = dict[str, Any]

NEAREST: Options = {"sync_rounding": "nearest"}
DITHER: Options = {"sync_rounding": "dither"}
PLAIN: Options = {"constraint": "none", "vllm_importance_sampling_correction": False}
TIS: Options = {"constraint": "none"}
NO_TIS: Options = {"vllm_importance_sampling_correction": False}
STRONG: Options = {"multiplier_init": 2.0, "multiplier_max": 5.0, "dual_lr": 5.0}


def decay(period: int) -> Options:
    """Length-decay with its period given: no length triples on this task, so that there is no surge to find."""
    return {"length_decay": True, "length_decay_period": period}


# Where updates are lost by the sync, H5

_SIDES = {"nearest": NEAREST, "dither": DITHER}
_REMEDIES: dict[str, Options] = {
    "": PLAIN,
    "-tis": TIS,
    "-dc": {},
    "-dc-strong": STRONG,
    "-decay": PLAIN | decay(15),
}
SYNC_ARMS = tuple(
    Arm(side + name, {**options, **remedy}) for name, remedy in _REMEDIES.items() for side, options in _SIDES.items()
)
# As fast as the dithered sync at one, by the pilots.
NEAREST_TWICE = Arm("nearest-x2", {**NEAREST, **PLAIN}, rate=2.0)
NEAREST_HALF_MORE = Arm("nearest-x1.5", {**NEAREST, **PLAIN}, rate=1.5)
ONE_ROUNDING = tuple(Arm(f"one-{side}", {**options, **PLAIN, "bf16": True}) for side, options in _SIDES.items())


def _named(arms: tuple[Arm, ...], *names: str) -> tuple[Arm, ...]:
    return tuple(arm for arm in arms if arm.name in names)


BOTH_PLAIN = _named(SYNC_ARMS, "nearest", "dither")
NEAREST_REMEDIES = tuple(arm for arm in SYNC_ARMS if arm.name.startswith("nearest-"))
DITHER_REMEDIES = tuple(arm for arm in SYNC_ARMS if arm.name.startswith("dither-"))

# The same on a published model: 10 updates

PUBLISHED_ARMS = (
    *BOTH_PLAIN,
    *_named(NEAREST_REMEDIES, "nearest-tis", "nearest-dc", "nearest-dc-strong"),
    Arm("nearest-decay", {**NEAREST, **PLAIN, **decay(3)}),
)

# What the penalty does, and what else there is, in the stressed regime

CAUSE_ARMS = (
    Arm("plain", PLAIN),
    Arm("exact", {**PLAIN, "rollout_precision": None}),
)
STABILITY_ARMS = (
    Arm("tis", TIS),
    Arm("dc", {}),
    Arm("dc-alone", NO_TIS),
    Arm("dc-strong", STRONG),
    Arm("dc-strong-placebo", STRONG, trainer=ShuffledPenaltyTrainer),
    Arm("mis-token", {**TIS, "vllm_importance_sampling_mode": "token_mask"}),
    Arm("mis-sequence", {**TIS, "vllm_importance_sampling_mode": "sequence_mask"}),
    Arm("decay", PLAIN | decay(40)),
    Arm("decay-tis", TIS | decay(40)),
    Arm("ess-rate", {**TIS, "ess_rate": True}),
    Arm("tis-rate-fifth", TIS, rate=0.2),
    Arm("exact-rate-fifth", {**PLAIN, "rollout_precision": None}, rate=0.2),
)

MILD_ARMS = (
    *CAUSE_ARMS,
    *_named(STABILITY_ARMS, "tis", "dc", "dc-alone", "dc-strong"),
    Arm("decay", PLAIN | decay(50)),
)

# The penalty's other forms, with TIS

_BITES: Options = {"multiplier_init": 0.1, "multiplier_max": 0.3, "dual_lr": 0.05}
_LOGIT: Options = {"discrepancy_metric": "logit_diff"}
_RELATIVE = PenaltyForm(relative=True)
_TO_GO = PenaltyForm(relative=True, to_go=True)
_CENTRED = PenaltyForm(relative=True, to_go=True, group=True)


def _form(name: str, form: PenaltyForm, options: Options | None = None, placebo: bool = False) -> Arm:
    kind = ShuffledPenaltyTrainer if placebo else FormTrainer
    return Arm(name, _BITES | (options or {}), trainer=partial(kind, form=form))


FORM_ARMS = (
    _form("relative", _RELATIVE),
    _form("relative-logit", _RELATIVE, _LOGIT),
    _form("relative-placebo", _RELATIVE, placebo=True),
    _form("relative-logit-placebo", _RELATIVE, _LOGIT, placebo=True),
    _form("relative-ratio", _RELATIVE, {"discrepancy_metric": "prob_ratio"}),
    _form("relative-logprob", _RELATIVE, {"discrepancy_metric": "logprob_diff"}),
    _form("relative-to-go", _TO_GO),
    _form("relative-logit-to-go", _TO_GO, _LOGIT),
    _form("relative-to-go-centred", _CENTRED),
    _form("relative-logit-to-go-centred", _CENTRED, _LOGIT),
    Arm("tis-entropy", {**TIS, "use_adaptive_entropy": True, "entropy_target": 3.4, "entropy_coef_delta": 0.02}),
    _form("relative-capped", PenaltyForm(relative=True, share_cap=0.05)),
    Arm("rejection-geometric", {**TIS, "rejection": ["geometric"]}),
    Arm("rejection-dppo-tv", {**TIS, "rejection": ["dppo_tv"]}),
)

# What the papers claim

CALM_ARMS = (Arm("plain", PLAIN), Arm("tis", TIS), Arm("dc", {}))
CLAIM_ARMS = (
    Arm("temperature-0.7", {**PLAIN, "temperature": 0.7}),
    Arm("temperature-1.3", {**PLAIN, "temperature": 1.3}),
    Arm("dual", {**NO_TIS, "constraint": "fixed"}),
    Arm("threshold", {**NO_TIS, "constraint": "threshold"}),
    Arm("dc-sequence", {**NO_TIS, "discrepancy_level": "sequence"}),
    Arm("dc-ratio", {**NO_TIS, "discrepancy_metric": "prob_ratio"}),
    Arm("dc-logprob", {**NO_TIS, "discrepancy_metric": "logprob_diff"}),
    Arm("dc-init-0.05", {**NO_TIS, "multiplier_init": 0.05}),
    Arm("dc-init-0.2", {**NO_TIS, "multiplier_init": 0.2}),
    Arm("dc-dual-lr-0.5", {**NO_TIS, "dual_lr": 0.5}),
    Arm("dc-dual-lr-1.5", {**NO_TIS, "dual_lr": 1.5}),
    Arm("dc-slack-0.6", {**NO_TIS, "tolerance_slack": 0.6}),
    Arm("dc-slack-2.5", {**NO_TIS, "tolerance_slack": 2.5}),
    Arm("rate-tenth", PLAIN, rate=0.1),
    Arm("data-quarter", PLAIN, data=0.25),
    Arm("data-fortieth", PLAIN, data=0.025),
    Arm("decay-early", PLAIN | decay(10)),
    Arm("decay-late", PLAIN | decay(80)),
    Arm("decay-mis", TIS | {"vllm_importance_sampling_mode": "token_mask"} | decay(40)),
    Arm("decay-dc", NO_TIS | decay(40)),
    Arm("fp16", {**PLAIN, "rollout_precision": "fp16"}),
    Arm("fp16-decay", {**PLAIN, "rollout_precision": "fp16"} | decay(40)),
)
