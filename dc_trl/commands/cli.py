# SPDX-License-Identifier: Apache-2.0
"""The console script `dc-trl`. A subcommand is one entry of `COMMANDS`, imported when it is called."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from dc_trl import __version__

# Name → (line of help, "module:function"). The function takes the arguments after the name, returns the exit status,
# and raises `UsageError` for arguments that cannot be carried out.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": (
        "train a policy: --config RECIPE.yaml [--accelerate_config NAME] [--dry_run]",
        "dc_trl.commands.train.command:train_command",
    ),
    "calibrate": (
        "measure the discrepancy of a model and an engine before training, and recommend a tolerance",
        "dc_trl.commands.calibrate.command:calibrate_command",
    ),
    "evaluate": (
        "score a model on the papers' benchmarks, or on your own problems",
        "dc_trl.commands.evaluate.command:evaluate_command",
    ),
    "report": (
        "write one HTML page about one or several runs, finished or going on",
        "dc_trl.commands.report.command:report_command",
    ),
}


class UsageError(Exception):
    """A command that cannot be carried out as given: message and exit status 2, without a traceback."""


def model_directory(name: str) -> Path | None:
    """The directory that `--model_name_or_path` names, or None for a model of the Hub.

    Raises:
        UsageError: the name is that of a directory, and there is none.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(
            f"the model directory {name} does not exist (looked from {Path.cwd()}; `~` is not expanded). Check it, or "
            "name a model of the Hub as OWNER/NAME."
        )
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `dc-trl`. Returns the exit status: 0, or 2 for a command that cannot be carried out as given."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="dc-trl", description="Discrepancy-constrained GRPO for TRL.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (help, _) in COMMANDS.items():
        commands.add_parser(name, help=help, add_help=False)
    command = parser.parse_known_args(argv[:1])[0].command
    module, _, function = COMMANDS[command][1].partition(":")
    try:
        return int(getattr(import_module(module), function)(argv[1:]))
    except UsageError as error:
        print(f"dc-trl {command}: error: {error}", file=sys.stderr)
        return 2
