# SPDX-License-Identifier: Apache-2.0
"""An export from a folder to a folder: how the run rounded, its weights, and the same rounding once more."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoProcessor

from dc_trl.commands.usage import UsageError
from dc_trl.records.run_reader import LOG_FILE, Run, read_run
from dc_trl.rollouts.deployed import save_deployed
from dc_trl.rollouts.engines import engine_of
from dc_trl.rollouts.handover import Handover
from dc_trl.rollouts.precisions import CAST_DTYPES, PRECISIONS
from dc_trl.rollouts.rounding import Dither
from dc_trl.rollouts.transformers import TransformersGeneration
from dc_trl.rollouts.weights import iter_policy_weights, plain_model

_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Deployment:
    """How a policy samples.

    Attributes:
        precision: one of `PRECISIONS`.
        dither: None rounds to nearest.
        in_process: whether the copy in the training process samples; otherwise an engine that keeps in float32 what
            the model's class wants there.
        source: where this was read, in words.
    """

    precision: str
    dither: Dither | None
    in_process: bool
    source: str


def read_deployment(folder: Path, precision: str | None, rounding: str | None, seed: int | None) -> Deployment:
    """How the policy in a folder samples: as given, and what is not given as the run's log has it.

    Args:
        folder: an output directory, or a checkpoint in one.
        precision, rounding, seed: of the command line.

    Raises:
        UsageError: something is neither given nor in the log, or the log cannot be read.
    """
    run = _run_of(folder)
    settings: dict[str, Any] = {} if run is None else run.settings
    where = f"{folder} has no {LOG_FILE}, and the folder above it has none" if run is None else str(run.source)
    in_process = engine_of(settings).copies_policy
    sampled = settings.get("rollout_precision") if in_process else None
    precision = precision or sampled
    if precision is None:
        why = where if run is None else f"{where} has no rollout_precision, and vLLM serves in a dtype of its own"
        raise UsageError(f"the sampler's precision is not known: {why}. Add --precision {'|'.join(PRECISIONS)}.")
    if rounding is None and precision == (sampled or precision):
        rounding = _rounding_of(run)
    if rounding is None:
        why = where if run is None else f"the run of {where} rounded nothing to {precision}, or its log does not say"
        raise UsageError(f"the way of rounding is not known: {why}. Add --rounding dither, or nearest.")
    seed = settings.get("seed") if seed is None else seed
    if rounding == "dither" and seed is None:
        raise UsageError(f"the seed of the dither is not known: {where}. Add --seed, that of the run.")
    dither = Dither(int(str(seed))) if rounding == "dither" else None
    return Deployment(precision, dither, in_process or precision not in CAST_DTYPES, "" if run is None else where)


def _run_of(folder: Path) -> Run | None:
    """The run of an output directory or of a checkpoint, if it has a log with settings."""
    for place in (folder, folder.resolve().parent):
        if (place / LOG_FILE).is_file():
            try:
                return read_run(place)
            except (OSError, ValueError) as error:
                raise UsageError(str(error)) from error
    return None


def _rounding_of(run: Run | None) -> str | None:
    """The rounding that was in force, as far as the log knows it."""
    if run is None:
        return None
    asked = run.settings.get("sync_rounding")  # of logs that do not say what `auto` came to
    known: str | None = run.start.get("rounding_in_force", asked if asked in ("dither", "nearest") else None)
    return known


def export(source: Path, target: Path, deployment: Deployment) -> str:
    """Write the policy in `source` to `target` as it samples; returns what was written, in words.

    Equal to `DCGRPOTrainer.save_deployed` to the bit for the same weights, on the same kind of device: quantised
    precisions are multiplied in another dtype on CUDA than on CPUs.

    Raises:
        UsageError: `source` holds no model that can be loaded, or one without a layer to quantise.
    """
    accelerator = Accelerator()
    try:
        # In float32, which holds every training dtype exactly: the rounding below is the only one.
        model = _load(source).to(accelerator.device).eval()
        processor = AutoProcessor.from_pretrained(source)
        engine = _engine(model, accelerator, processor, deployment)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UsageError(f"{source} cannot be exported: {error}") from error
    save_deployed(engine, model, accelerator, target)
    processor.save_pretrained(target)
    way = "rounded to nearest" if deployment.dither is None else f"dithered with seed {deployment.dither.seed}"
    origin = f" ({deployment.source})" if deployment.source else ""
    dtype = str(engine.deployed_dtype).removeprefix("torch.")
    words = f"wrote {target}: {deployment.precision} in {dtype}, {way}{origin}."
    held = _dtypes_of(source)
    if held and "F32" not in held:
        words += f"\nnote: {source} holds {', '.join(sorted(held))} and no float32: its weights were rounded before."
    return words


def _engine(model: Any, accelerator: Accelerator, processor: Any, deployment: Deployment) -> Any:
    """What `save_deployed` asks an engine for."""
    if deployment.in_process:
        return TransformersGeneration(
            model, accelerator, processor, precision=deployment.precision, dither=deployment.dither
        )
    dtype = getattr(torch, CAST_DTYPES[deployment.precision])
    handover = Handover(plain_model(model, accelerator), dtype, deployment.dither)
    return SimpleNamespace(
        deployed_weights=lambda: handover.deployed(iter_policy_weights(model, accelerator)), deployed_dtype=dtype
    )


def _load(folder: Path) -> Any:
    """The policy in float32, of the class that trained it, with its adapters where the folder holds adapters."""
    if (folder / _ADAPTER).is_file():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        found = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        hint = f" Its newest checkpoint is {found[-1]}: name that." if found else ""
        raise UsageError(f"{folder} holds no model (config.json and *.safetensors, or {_ADAPTER}).{hint}")
    config = AutoConfig.from_pretrained(folder)
    names = config.architectures or []
    kind = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if kind is None:
        raise UsageError(f"config.json in {folder} names the architecture {names}, which transformers does not have.")
    model, loaded = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(loaded["missing_keys"]):
        raise UsageError(
            f"the files in {folder} hold no {missing[0]!r} ({len(missing)} tensors are missing): it would be random."
        )
    return model


def _dtypes_of(folder: Path) -> set[str]:
    """Dtypes of the weights in a folder's files, as safetensors calls them; of adapters, those of the adapters."""
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            found |= {weights.get_slice(name).get_dtype() for name in weights.keys()}
    return found
