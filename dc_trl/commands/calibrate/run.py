# SPDX-License-Identifier: Apache-2.0
"""A calibration from a recipe to its result: the trainer, the passes, the verdicts, the recommendation."""

import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import PrinterCallback
from transformers.trainer_callback import ProgressCallback

from dc_trl.commands.calibrate import checks
from dc_trl.commands.calibrate.arguments import CalibrateArguments
from dc_trl.commands.calibrate.checks import Plan
from dc_trl.commands.calibrate.measure import Recording, measure
from dc_trl.commands.calibrate.output import Calibration, hardware, versions
from dc_trl.commands.train.run import build_trainer, has_plain_prompts, load_data
from dc_trl.commands.usage import UsageError
from dc_trl.records.run_log import RunLogCallback, shown_settings
from dc_trl.rollouts.engines import engine_name
from dc_trl.rollouts.shown import shown_address
from dc_trl.trainer import DCGRPOTrainer

SETTINGS = (
    "discrepancy_metric",
    "discrepancy_average",
    "tolerance_slack",
    "temperature",
    "max_completion_length",
    "num_generations",
    "generation_batch_size",
    "per_device_train_batch_size",
    "seed",
    "bf16",
    "fp16",
    "rollout_backend",
    "rollout_precision",
    "use_vllm",
    "vllm_mode",
    "vllm_engine_kwargs",
    "weight_sync",
    "sync_rounding",
)
"""Fields of the configuration that decide what is measured; they are written down with the result."""


def calibrate(script: CalibrateArguments, training: Any, model: Any) -> Calibration:
    """Builds the trainer of a recipe, runs every pass and every check.

    In a distributed run every process must call it. The trainer works in `output_dir/calibration-work`, which is
    removed; `training` is changed.

    Args:
        script: which data, how many problems.
        training: a `DCGRPOConfig`, parsed with `OVERRIDES`.
        model: TRL's `ModelConfig`.

    Raises:
        UsageError: for data that cannot be used, and an engine that does not answer.
    """
    started = time.monotonic()
    work = Path(str(training.output_dir), "calibration-work")
    server = training.vllm_server_base_url or f"{training.vllm_server_host}:{training.vllm_server_port}"
    engine = engine_name(vars(training), shown_address(server))
    settings = shown_settings(training, SETTINGS)
    try:
        plain = has_plain_prompts(script, training, model)
        with training.main_process_first(desc="loading the data"):
            data, _ = load_data(script, plain)
        batch = training.generation_batch_size
        problems, training.per_device_eval_batch_size = plan_batches(
            script.problems, len(data), training.num_generations, batch, training.world_size
        )
        training.num_generations_eval = None
        training.output_dir = str(work)
        work.mkdir(parents=True, exist_ok=True)
        trainer = _build(training, model, data)
        measurement = measure(trainer, data.select(range(problems)))
    except (ValueError, ImportError, OSError) as error:  # ConnectionError is an OSError
        raise UsageError(str(error)) from error
    finally:
        if training.process_index == 0:
            shutil.rmtree(work, ignore_errors=True)
    plan = Plan(
        metric=training.discrepancy_metric,
        average=training.discrepancy_average,
        slack=training.tolerance_slack,
        problems_per_batch=batch / training.num_generations,
    )
    verdicts = checks.judge(measurement, plan, trainer.temperature)
    run = {
        "model": str(model.model_name_or_path),
        "engine": engine,
        "settings": settings | {"prompt_format": "plain" if plain else "chat"},
        "hardware": hardware(training.world_size),
        "processes": training.world_size,
        "versions": versions(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": time.monotonic() - started,
    }
    return Calibration(run, plan, measurement, verdicts, checks.conclude(measurement, plan, verdicts))


def plan_batches(problems: int, available: int, generations: int, batch: int, processes: int) -> tuple[int, int]:
    """How many problems are measured, and completions a process samples at once: a training generation batch or less.

    Every batch must be whole, or Accelerate would fill it up with problems that were measured already.

    Args:
        problems: asked for; the most that is no more than this and fits is taken.
        available: problems in the data.
        generations: completions a problem.
        batch: completions of a training generation batch, all processes.
        processes: number of them.

    Raises:
        ValueError: if no number of problems up to the one asked for fits.
    """
    per_batch = batch // generations
    for count in range(min(problems, available), 0, -1):
        size = min(count, per_batch)
        if count % size == 0 and size * generations % processes == 0:
            return count, size * generations // processes
    raise ValueError(
        f"`--problems {problems}` of {available} in the data: {generations} completions of each do not divide among "
        f"{processes} processes. Use at least {processes} problems."
    )


def _build(training: Any, model: Any, data: Any) -> Any:
    kind = type("CalibrationTrainer", (Recording, DCGRPOTrainer), {})
    trainer = build_trainer(kind, training, model, [_no_reward], data)
    for callback in (PrinterCallback, ProgressCallback, RunLogCallback):  # the report is all that is to be printed
        trainer.remove_callback(callback)
    return trainer


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    """Nothing is learnt here, so nothing is judged."""
    return [0.0] * len(completions)
