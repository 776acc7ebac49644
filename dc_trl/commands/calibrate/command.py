# SPDX-License-Identifier: Apache-2.0
"""`dc-trl calibrate`: arguments, their checks, launch, what is printed, exit status."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_trl.commands.calibrate.arguments import OVERRIDES, CalibrateArguments
from dc_trl.commands.calibrate.recipe import check_recipe, set_tolerance
from dc_trl.commands.quiet import whole_lines
from dc_trl.commands.train.arguments import (
    CommandLine,
    asks_for_all_help,
    asks_for_help,
    make_parser,
    print_all_help,
    print_help,
)
from dc_trl.commands.usage import UsageError
from dc_trl.records.text import terminal
from dc_trl.rollouts.engines import check_log_prob_source, engine_of

if TYPE_CHECKING:
    from dc_trl.commands.calibrate.output import Calibration

HEALTHY = 0
UNHEALTHY = 1


def calibrate_command(argv: Sequence[str]) -> int:
    """`dc-trl calibrate`: measures, prints, writes calibration.json and calibration.png.

    Returns:
        The exit status: 0 for a healthy engine, 1 for an unhealthy one.

    Raises:
        UsageError: for what cannot be measured as given.
    """
    if asks_for_help(argv):
        print_help(CalibrateArguments, "calibrate", "Measure how far a model and an engine are apart before training.")
        return 0
    if asks_for_all_help(argv):
        print_all_help(CalibrateArguments, "calibrate")
        return 0
    line = CommandLine.read(argv, make_parser(CalibrateArguments, "calibrate"))
    if line.options.dry_run:
        raise UsageError("--dry_run is an option of dc-trl train. Measure fewer --problems instead.")
    if line.options.problems < 1:
        raise UsageError(f"--problems is {line.options.problems}: at least 1 is needed.")
    if line.options.set:
        check_recipe(Path(line.options.set))
    if line.must_launch:
        return line.launch("calibrate")
    # Torch, TRL and the rest come only now: help and wrong arguments are answered without them.
    from dc_trl.commands.calibrate.checks import healthy
    from dc_trl.commands.calibrate.ending import cleans_up_when_terminated
    from dc_trl.commands.calibrate.output import as_text, save
    from dc_trl.commands.calibrate.run import calibrate

    script, training, model = _parse(line)
    folder = Path(str(training.output_dir))
    with cleans_up_when_terminated(), whole_lines():
        found = calibrate(script, training, model)
    if training.process_index == 0:
        paths = save(found, folder)
        print(as_text(found))
        print("wrote " + ", ".join(map(terminal, paths)))
        if script.set:
            print(terminal(_set(Path(script.set), found)))
    return HEALTHY if healthy(found.verdicts) else UNHEALTHY


def _parse(line: CommandLine) -> tuple[CalibrateArguments, Any, Any]:
    """The arguments with the overrides, after a look at them without: what training would refuse is refused."""
    overrides = [part for name, value in OVERRIDES.items() for part in (f"--{name}", value)]
    try:
        own = make_parser(CalibrateArguments, "calibrate").parse_args_and_config(line.arguments)[1]
        check_log_prob_source(own, None)
        parsed = make_parser(CalibrateArguments, "calibrate").parse_args_and_config([*line.arguments, *overrides])
    except (ValueError, ImportError, OSError) as error:
        raise UsageError(str(error)) from error
    if not engine_of(vars(own)).gives_log_probs:
        raise UsageError(
            "there is no engine whose log-probs could be measured: set use_vllm, or rollout_backend: transformers."
        )
    return parsed


def _set(path: Path, found: "Calibration") -> str:
    """Writes the tolerance into the recipe, where there is one; says what was done."""
    tolerance = found.recommendation.tolerance
    if tolerance is None:
        return f"{path} is left as it was: there is no tolerance to set."
    day = found.run["time"][:10]
    measured = f"{found.run['model']}, {found.run['engine']}, {found.plan.metric}, {found.run['hardware']}"
    set_tolerance(path, tolerance, terminal(f"[measured] by dc-trl calibrate on {day}: {measured}"))
    return f"set discrepancy_tolerance: {tolerance:g} in {path}"
