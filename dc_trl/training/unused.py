# SPDX-License-Identifier: Apache-2.0
"""Settings that do nothing beside others: what each option needs for an effect, so that none is ignored in silence.

Options beside which another could not work are refused by the configuration. These are merely idle, as `dual_lr` is
with a constraint that moves no multiplier, and an ablation may leave them where they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from dc_trl.constraint import KINDS
from dc_trl.estimators.importance import DRPO


class Need(NamedTuple):
    """What an option needs.

    Attributes:
        is_met: of the configuration, and whether the rollouts have the sampler's log-probs.
        words: the same, to go after "needs".
    """

    is_met: Callable[[Any, bool], bool]
    words: str


_COMPARED = Need(
    lambda args, compared: compared,
    "the sampler's log-probs: `rollout_backend='transformers'`, `use_vllm=True`, or a `rollout_func` with `logprobs`",
)
_PENALTY = Need(lambda args, compared: args.constraint != "none", "a `constraint`")
_ASCENT = Need(lambda args, compared: KINDS[args.constraint].adapts, "`constraint='lagrangian'`")
_CALIBRATION = Need(
    lambda args, compared: compared and args.discrepancy_tolerance is None, "`discrepancy_tolerance` to be calibrated"
)
_DRPO = Need(
    lambda args, compared: args.vllm_importance_sampling_mode == DRPO, f"`vllm_importance_sampling_mode={DRPO!r}`"
)
_CORRECTION = Need(
    lambda args, compared: compared and args.vllm_importance_sampling_correction,
    "`vllm_importance_sampling_correction=True` and the sampler's log-probs",
)
_CLIPPED = Need(
    lambda args, compared: _CORRECTION.is_met(args, compared) and not _DRPO.is_met(args, compared),
    f"{_CORRECTION.words}, and a mode other than {DRPO!r}, which clips nothing",
)
_DECAY = Need(lambda args, compared: args.length_decay, "`length_decay=True`")
_SURGE = Need(
    lambda args, compared: args.length_decay and args.length_decay_period is None,
    "`length_decay=True` without `length_decay_period`, which it is there to find",
)
_ESS = Need(lambda args, compared: args.ess_rate, "`ess_rate=True`")
_GUARD = Need(lambda args, compared: args.gradient_guard is not None, "`gradient_guard`")
_DISK = Need(lambda args, compared: args.weight_sync == "disk", "`weight_sync='disk'`")

NEEDS: Mapping[str, Need] = {
    "discrepancy_metric": _COMPARED,
    "discrepancy_level": _PENALTY,
    "discrepancy_average": _COMPARED,
    "discrepancy_tolerance": _COMPARED,
    "tolerance_slack": _CALIBRATION,
    "tolerance_calibration_batches": _COMPARED,
    "multiplier_init": _PENALTY,
    "multiplier_max": _PENALTY,
    "dual_lr": _ASCENT,
    "drpo_limit": _DRPO,
    "length_decay_period": _DECAY,
    "length_surge_ratio": _DECAY,
    "length_decay_factor": _SURGE,
    "length_decay_min_lr_ratio": _DECAY,
    "ess_rate": _COMPARED,
    "ess_rate_reference": _ESS,
    "ess_rate_min_scale": _ESS,
    "gradient_guard_patience": _GUARD,
    "log_tokens": _COMPARED,
    "weight_sync_readers": _DISK,
    "vllm_importance_sampling_mode": _CORRECTION,
    "vllm_importance_sampling_clip_min": _CLIPPED,
    "vllm_importance_sampling_clip_max": _CLIPPED,
}
"""What an option needs beside it to have an effect, by name. Every other option has one by itself, or is refused."""


def unused(args: Any, compared: bool) -> dict[str, str]:
    """Options that are set otherwise than by default and have no effect, with what each needs.

    Args:
        args: a `DCGRPOConfig`.
        compared: whether the rollouts have the sampler's log-probs.
    """
    defaults = {field.name: field.default for field in fields(args) if field.default is not MISSING}
    given = (name for name in NEEDS if name in defaults and getattr(args, name) != defaults[name])
    return {name: NEEDS[name].words for name in given if not NEEDS[name].is_met(args, compared)}


def unused_notices(args: Any, compared: bool) -> list[tuple[str, str]]:
    """What a person should be told of `unused`, as (topic, message)."""
    found = unused(args, compared)
    if not found:
        return []
    listed = "; ".join(f"`{name}` = {getattr(args, name)!r} needs {words}" for name, words in found.items())
    return [
        ("unused", f"set, and without effect: {listed}. Leave them as they are by default, or set what they need.")
    ]
