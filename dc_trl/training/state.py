# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint keeps of the constraint, what that was measured with, and what a resumed run makes of it.

A number means something only under the settings that it was measured with: a tolerance of |π − μ| is none of
|log π − log μ|, a floor of bf16 none of int4, and a fixed λ_0 no λ that an ascent has reached. So the file records
them, and a resumed run takes up what still means the same and says what does not.
"""

import json
from pathlib import Path
from typing import Any

from dc_trl.constraint import DiscrepancyConstraint
from dc_trl.estimators.gradient_guard import GradientGuard
from dc_trl.records.json_lines import parse_json
from dc_trl.records.whole_files import write_whole
from dc_trl.rollouts.engines import engine_name
from dc_trl.rollouts.shown import mark, shown
from dc_trl.training.instruments import Instruments

STATE_FILE = "dc_grpo_state.json"

# Of the configuration, what a measured discrepancy depends on beside the engines.
_MEASURED_OPTIONS = (
    "discrepancy_metric",
    "discrepancy_average",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "generation_kwargs",
    "vllm_structured_outputs_regex",
    "mask_truncated_completions",
    "disable_dropout",
    "use_liger_kernel",
    "sync_rounding",
)

_WAY_OUT = (
    "Resume from another checkpoint; or, to go on from this one all the same, remove the file: multiplier and "
    "calibration then start anew."
)


def measured_with(trainer: Any) -> dict[str, Any]:
    """What the discrepancy of a trainer's rollouts is measured with: metric, both engines, and how tokens are drawn.

    Returns:
        Values of JSON's types by name. Read after the trainer has prepared its model, whose dtype that may change.
    """
    args, model = trainer.args, trainer.model
    rollout_func = getattr(trainer, "rollout_func", None)
    values = {name: _comparable(name, getattr(args, name, None)) for name in _MEASURED_OPTIONS}
    values |= {
        "engine": engine_name(vars(args)),
        "engine_arguments": mark("vllm_engine_kwargs", args.vllm_engine_kwargs or {}),
        # Low-precision weights that are real where a library runs, and simulated elsewhere.
        "engine_quantization": getattr(getattr(trainer, "vllm_generation", None), "quantization", None),
        "rollout_func": rollout_func and getattr(rollout_func, "__qualname__", type(rollout_func).__name__),
        "training_dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})),
        "training_autocast": trainer.accelerator.mixed_precision,
        "training_attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "training_device": trainer.accelerator.device.type,
    }
    return dict(json.loads(json.dumps(values, default=str)))


def _comparable(name: str, value: Any) -> Any:
    """A setting as it may be shown; where that hides something, with what tells it from another."""
    known = mark(name, value)
    return shown(name, value) if known is None else {"shown": shown(name, value), "mark": known}


def write_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Writes the state into a checkpoint, which need not exist yet: sharded weights are written after it.

    Raises:
        OSError: the file cannot be written.
    """
    write_whole(checkpoint / STATE_FILE, json.dumps(state))


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """The state that a checkpoint keeps; None if it has none, as one of another trainer.

    Raises:
        ValueError: the file is cut off, or is no such state.
    """
    path = checkpoint / STATE_FILE
    if not path.exists():
        return None
    try:
        state = parse_json(path.read_bytes())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON, so it may be cut off: {error}. {_WAY_OUT}") from error
    if missing := {"dual", "tolerance", "instruments"} - set(state if isinstance(state, dict) else ()):
        raise ValueError(
            f"{path} is not the state of a DCGRPOTrainer: it has no {', '.join(sorted(missing))}. {_WAY_OUT}"
        )
    return dict(state)


def restore(
    constraint: DiscrepancyConstraint,
    instruments: Instruments,
    checkpoint: Path,
    now: dict[str, Any],
) -> list[str]:
    """Takes up of a checkpoint's state what still means the same, and starts the rest anew.

    The calibration carries over if everything that it was measured with is as it was. λ carries over from `lagrangian`
    to `lagrangian`, in the units of one metric; any other run starts at its own `multiplier_init`. What the
    configuration sets, such as `dual_lr`, is in force at once.

    Args:
        constraint, instruments: of the resumed run; both are changed.
        checkpoint: the directory.
        now: `measured_with` of the resumed run.

    Returns:
        What a person should be told, a sentence or two each. Empty where nothing changed.

    Raises:
        ValueError: the file is cut off, or is no such state.
    """
    state = read_state(checkpoint)
    if state is None:
        constraint.dual.restart()
        constraint.tolerance.restart()
        return [
            f"{checkpoint} has no {STATE_FILE}, as a checkpoint of another trainer: the multiplier starts at "
            f"`multiplier_init` = {constraint.dual.init:.4g} and the calibration anew. If the run had its own, resume "
            "from a checkpoint that has the file; or set `multiplier_init` and `discrepancy_tolerance` to what it had."
        ]
    try:
        constraint.load_state_dict(state)
        instruments.load_state_dict(state["instruments"])
        then, before = dict(state.get("measured_with") or {}), dict(state.get("settings") or {})
        saved = float(state["dual"]["value"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        where = checkpoint / STATE_FILE
        raise ValueError(f"{where} is not the state of a DCGRPOTrainer ({error!r}). {_WAY_OUT}") from error
    return _reconcile(constraint, saved, before, then, now)


def restore_guard(guard: GradientGuard | None, checkpoint: Path) -> None:
    """Takes up which gradient norms were usual, and how many steps in a row were left out.

    A checkpoint of a run without a guard has neither, and the guard starts anew.

    Args:
        guard: of the resumed run; None without one.
        checkpoint: the directory.

    Raises:
        ValueError: the file is cut off, or is no such state.
    """
    state = None if guard is None else read_state(checkpoint)
    if guard is None or state is None or "guard" not in state:
        return
    try:
        guard.load_state_dict(state["guard"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        where = checkpoint / STATE_FILE
        raise ValueError(f"{where} is not the state of a DCGRPOTrainer ({error!r}). {_WAY_OUT}") from error


def _reconcile(
    constraint: DiscrepancyConstraint,
    saved: float,
    before: dict[str, Any],
    then: dict[str, Any],
    now: dict[str, Any],
) -> list[str]:
    """Starts anew what another setting has taken the meaning of, and says so.

    Args:
        constraint: restored.
        saved: λ of the state.
        before: `DiscrepancyConstraint.settings` of the state.
        then: `measured_with` of the state.
        now: `measured_with` of the resumed run.
    """
    changed = _differences(then, now)
    settings = _differences(before, constraint.settings)
    kinds = before.get("constraint", "unknown"), constraint.kind
    notices = []
    if changed or not then:
        constraint.tolerance.restart()
        notices.append(_of_calibration(changed, constraint))
    if kinds == ("lagrangian", "lagrangian") and "discrepancy_metric" not in changed:
        if "multiplier_init" in settings or constraint.dual.value != saved:
            notices.append(_of_carried_multiplier(saved, constraint))
        settings.pop("multiplier_init", None)
    else:
        constraint.dual.restart()
        if kinds[0] != kinds[1] or constraint.kind == "lagrangian":
            was = {"constraint": kinds[0], **then}
            reason = _differences(was, {"constraint": kinds[1], "discrepancy_metric": now["discrepancy_metric"]})
            notices.append(_of_new_multiplier(saved, reason, constraint))
    settings.pop("constraint", None)
    if settings:
        notices.append(f"set otherwise than in the checkpoint, and now in force: {_listed(settings)}.")
    return notices


def _differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What both name and do not agree on, as (then, now)."""
    return {name: (then[name], value) for name, value in now.items() if name in then and then[name] != value}


def _listed(differences: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"`{name}` is {now!r}, was {then!r}" for name, (then, now) in differences.items())


def _of_calibration(changed: dict[str, tuple[Any, Any]], constraint: DiscrepancyConstraint) -> str:
    tolerance = constraint.tolerance
    reason = _listed(changed) or "the checkpoint does not say what it was measured with"
    if tolerance.given is not None:
        return f"{reason}. The tolerance in use is the {tolerance.given:.4g} that was given: see that it still fits."
    return f"{reason}. So the tolerance is calibrated anew, on {tolerance.batches} generation batches."


def _of_carried_multiplier(saved: float, constraint: DiscrepancyConstraint) -> str:
    cut = f", cut to `multiplier_max` = {constraint.dual.maximum:.4g}" if constraint.dual.value != saved else ""
    return f"the multiplier goes on from the checkpoint's {saved:.4g}{cut}, whatever `multiplier_init` is."


def _of_new_multiplier(saved: float, changed: dict[str, tuple[Any, Any]], constraint: DiscrepancyConstraint) -> str:
    return (
        f"{_listed(changed)}. So the multiplier starts at `multiplier_init` = {constraint.dual.init:.4g}, not at the "
        f"checkpoint's {saved:.4g}, which has another meaning."
    )
