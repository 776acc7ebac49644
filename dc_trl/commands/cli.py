# SPDX-License-Identifier: Apache-2.0
"""The console script `dc-trl`. A subcommand is one entry of `COMMANDS`, imported when it is called."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from dc_trl import __version__
from dc_trl.commands.quiet import silence_imports
from dc_trl.commands.usage import UsageError
from dc_trl.records.text import terminal

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
    "export": (
        "write a policy as it samples: in the sampler's precision, rounded as at a weight sync",
        "dc_trl.commands.export.command:export_command",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `dc-trl`. Returns the exit status: 0, or 2 for a command that cannot be carried out as given."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="dc-trl", description="Discrepancy-constrained GRPO for TRL.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (help, _) in COMMANDS.items():
        commands.add_parser(name, help=help, add_help=False)
    command = parser.parse_known_args(argv[:1])[0].command
    silence_imports()
    module, _, function = COMMANDS[command][1].partition(":")
    try:
        return int(getattr(import_module(module), function)(argv[1:]))
    except UsageError as error:
        print(f"dc-trl {command}: error: {terminal(error, lines=True)}", file=sys.stderr)
        return 2
