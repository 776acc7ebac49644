# SPDX-License-Identifier: Apache-2.0
"""`dc-trl export MODEL_DIR --output_dir DIR`: arguments, their checks, what is printed."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dc_trl.commands.usage import UsageError
from dc_trl.records.text import terminal
from dc_trl.rollouts.precisions import PRECISIONS

ROUNDINGS = ("dither", "nearest")


def make_parser() -> argparse.ArgumentParser:
    """The parser of `dc-trl export`."""
    parser = argparse.ArgumentParser(
        prog="dc-trl export",
        description="Write the weights as they sample, in the sampler's precision and rounded as at a weight sync. "
        "What is not given is read from the run's log.jsonl, in MODEL_DIR or above a checkpoint.",
    )
    add = parser.add_argument
    add("model_dir", type=Path, metavar="MODEL_DIR", help="a trainer's output_dir, or a checkpoint in it")
    add("--output_dir", type=Path, required=True, help="directory to write; made if it is not there")
    add("--precision", choices=PRECISIONS, help="of the sampler; default: the run's rollout_precision")
    add("--rounding", choices=ROUNDINGS, help="default: as the run's weight syncs rounded")
    add("--seed", type=int, help="of the dither; default: the run's seed")
    add("--overwrite", action="store_true", help="write into a directory that is not empty")
    return parser


def export_command(argv: Sequence[str]) -> int:
    """Entry point of `dc-trl export`: writes the model directory and says what it is. Returns 0.

    Raises:
        UsageError: for what cannot be exported as given, before anything is written.
    """
    args = make_parser().parse_args(argv)
    _check_directories(args.model_dir, args.output_dir, args.overwrite)
    from dc_trl.commands.export.run import export, read_deployment

    deployment = read_deployment(args.model_dir, args.precision, args.rounding, args.seed)
    print(terminal(export(args.model_dir, args.output_dir, deployment), lines=True))
    return 0


def _check_directories(source: Path, target: Path, overwrite: bool) -> None:
    if not source.is_dir():
        raise UsageError(f"the model directory {source} does not exist (looked from {Path.cwd()}).")
    if target.resolve() == source.resolve():
        raise UsageError(
            f"--output_dir {target} is MODEL_DIR: the weights in training would be lost. Name another directory."
        )
    if target.exists() and not target.is_dir():
        raise UsageError(f"--output_dir {target} is a file: name a directory.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UsageError(f"--output_dir {target} is not empty: name another directory, or add --overwrite.")
