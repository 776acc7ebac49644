# SPDX-License-Identifier: Apache-2.0
"""`dc-trl calibrate`: arguments, launch, measurement, verdicts, outputs, exit status."""

import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dc_trl.commands.calibrate import checks
from dc_trl.commands.calibrate.checks import Plan, Recommendation, Verdict
from dc_trl.commands.calibrate.measure import Measurement, Recording, measure
from dc_trl.commands.calibrate.output import Calibration, as_text, hardware, save, versions
from dc_trl.commands.calibrate.recipe import check_recipe, set_tolerance
from dc_trl.commands.calibrate.scores import describe, mean_discrepancy
from dc_trl.commands.cli import UsageError
from dc_trl.commands.train.arguments import CommandLine, TrainArguments, make_parser
from dc_trl.commands.train.command import build_trainer, load_data
from dc_trl.rollouts.engines import check_log_prob_source, engine_name, engine_of

# What a measurement must not do, or does not need: constrain, report, save, hold a reference model, drop groups (all
# rewards are 0), score twice.
OVERRIDES = (
    *("--constraint", "none", "--report_to", "none", "--save_strategy", "no", "--push_to_hub", "false"),
    *("--eval_strategy", "no", "--load_best_model_at_end", "false", "--disable_tqdm", "true"),
    *("--log_completions", "false", "--log_tokens", "false", "--length_decay", "false", "--beta", "0"),
    *("--zero_variance_groups", "keep", "--vllm_importance_sampling_correction", "false"),
)
HEALTHY, UNHEALTHY = 0, 1


@dataclass
class CalibrateArguments(TrainArguments):
    """What `dc-trl calibrate` takes beside what `dc-trl train` does."""

    problems: int = field(
        default=16,
        metadata={"help": "Problems to sample, from the start of the data; `num_generations` completions each."},
    )
    set: str | None = field(
        default=None, metadata={"help": "Recipe in which to set `discrepancy_tolerance`, if the engine is healthy."}
    )


def calibrate_command(argv: Sequence[str]) -> int:
    """`dc-trl calibrate`: measures, prints, writes calibration.json and calibration.png.

    Returns:
        The exit status: 0 for a healthy engine, 1 for an unhealthy one.

    Raises:
        UsageError: for what cannot be measured as given.
    """
    line = CommandLine.read(argv, make_parser(CalibrateArguments, "calibrate"))
    if line.options.dry_run:
        raise UsageError("--dry_run is an option of dc-trl train. Measure fewer --problems instead.")
    if line.options.problems < 1:
        raise UsageError(f"--problems is {line.options.problems}: at least 1 is needed.")
    if line.options.set:
        check_recipe(Path(line.options.set))
    if line.must_launch:
        return _launch(line)
    script, training, model = _parse(line)
    folder = Path(str(training.output_dir))
    found = calibrate(script, training, model)
    ok = checks.healthy(found.verdicts)
    if training.process_index == 0:
        paths = save(found, folder)
        print(as_text(found))
        print("wrote " + ", ".join(map(str, paths)))
        if script.set:
            print(_set(Path(script.set), found))
    return HEALTHY if ok else UNHEALTHY


def _launch(line: CommandLine) -> int:
    """Runs the command in processes of its own; their exit status."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        line.launch("calibrate")
    except subprocess.CalledProcessError as error:  # one process
        return error.returncode
    except ChildFailedError as error:  # several
        return error.get_first_failure()[1].exitcode
    return HEALTHY


def _parse(line: CommandLine) -> tuple[CalibrateArguments, Any, Any]:
    """The arguments with the overrides, after a look at them without: what training would refuse is refused."""
    try:
        own = make_parser(CalibrateArguments, "calibrate").parse_args_and_config(line.arguments)[1]
        check_log_prob_source(own, None)
        parsed = make_parser(CalibrateArguments, "calibrate").parse_args_and_config([*line.arguments, *OVERRIDES])
    except (ValueError, ImportError, OSError) as error:
        raise UsageError(str(error)) from error
    if not engine_of(vars(own)).gives_log_probs:
        raise UsageError(
            "there is no engine whose log-probs could be measured: set use_vllm, or rollout_backend: transformers."
        )
    return parsed


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
    run: dict[str, Any] = {"model": str(model.model_name_or_path), "engine": engine_name(vars(training), server)}
    run["settings"] = _settings(training)
    try:
        with training.main_process_first(desc="loading the data"):
            data, _ = load_data(script)
        batch = training.generation_batch_size
        counts = (script.problems, len(data), training.num_generations, batch, training.world_size)
        problems, training.per_device_eval_batch_size = plan_batches(*counts)
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
    averaged = training.discrepancy_metric, training.discrepancy_average
    plan = Plan(*averaged, training.tolerance_slack, batch / training.num_generations)
    run |= {"hardware": hardware(training.world_size), "processes": training.world_size, "versions": versions()}
    run |= {"time": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": time.monotonic() - started}
    verdicts = judge(measurement, plan, trainer.temperature)
    return Calibration(run, plan, measurement, verdicts, _recommendation(measurement, plan, verdicts))


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
    from transformers import PrinterCallback
    from transformers.trainer_callback import ProgressCallback

    from dc_trl.records.run_log import RunLogCallback
    from dc_trl.trainer import DCGRPOTrainer

    kind = type("CalibrationTrainer", (Recording, DCGRPOTrainer), {})
    trainer = build_trainer(kind, training, model, [_no_reward], data)
    for callback in (PrinterCallback, ProgressCallback, RunLogCallback):  # the report is all that is to be printed
        trainer.remove_callback(callback)
    return trainer


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    """Nothing is learnt here, so nothing is judged."""
    return [0.0] * len(completions)


def _settings(training: Any) -> dict[str, Any]:
    names = (
        *("discrepancy_metric", "discrepancy_average", "tolerance_slack", "temperature", "max_completion_length"),
        *("num_generations", "generation_batch_size", "per_device_train_batch_size", "seed", "bf16", "fp16"),
        *("rollout_backend", "rollout_precision", "use_vllm", "vllm_mode", "vllm_engine_kwargs", "weight_sync"),
    )
    return {name: getattr(training, name) for name in names}


def judge(m: Measurement, plan: Plan, temperature: float) -> list[Verdict]:
    """Every check of a measurement, in the order in which a cause is to be looked for."""
    verdicts = [checks.check_scored(m.floor)]
    if not bool(m.floor.valid.any()):
        return verdicts
    floor = mean_discrepancy(m.floor, plan.metric, plan.average)
    table = describe(m.floor)
    return [
        *verdicts,
        checks.check_precision(floor, table["problems"]),
        checks.check_temperature(temperature, m.misfits, m.other_temperature, m.other_misfits),
        checks.check_repeat(m.first, m.second, plan),
        checks.check_sync(m.floor, m.stale, m.nudged, m.undone, m.nudge_size),
        checks.check_weights(m.weights_moved),
        checks.check_tail(m.floor, table["dc"]["ess"]),
    ]


def _recommendation(m: Measurement, plan: Plan, verdicts: list[Verdict]) -> Recommendation:
    failed = ", ".join(checks.failures(verdicts))
    if failed:
        return Recommendation(None, f"Failed: {failed}. A tolerance would hide it, so none is recommended.")
    return checks.recommend(m.floor, plan)


def _set(path: Path, found: Calibration) -> str:
    """Writes the tolerance into the recipe, where there is one; says what was done."""
    tolerance = found.recommendation.tolerance
    if tolerance is None:
        return f"{path} is left as it was: there is no tolerance to set."
    day = found.run["time"][:10]
    measured = f"{found.run['model']}, {found.run['engine']}, {found.plan.metric}"
    set_tolerance(path, tolerance, f"[measured] by dc-trl calibrate on {day}: {measured}, {found.run['hardware']}")
    return f"set discrepancy_tolerance: {tolerance:g} in {path}"
