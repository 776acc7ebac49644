# SPDX-License-Identifier: Apache-2.0
"""`dc-trl report RUN_DIR…`: one HTML file that needs no network, from the logs of finished and of running runs."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from dc_trl.commands.usage import UsageError
from dc_trl.records.text import terminal

REPORT_FILE = "report.html"


def report_command(argv: Sequence[str]) -> int:
    """Entry point of `dc-trl report`: writes the page and says where it is. Returns 0.

    Raises:
        UsageError: a directory holds no run, the page cannot be written, or plotly or orjson is not installed.
    """
    parser = argparse.ArgumentParser(
        prog="dc-trl report",
        description="Write one HTML file that shows a run, or compares several, and their tokens.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="output_dir of a trainer")
    parser.add_argument("--output", type=Path, help=f"file to write; default: {REPORT_FILE} in the first RUN_DIR")
    parser.add_argument(
        "--tokens_step", type=int, metavar="STEP", help="show the tokens of this step; default: the newest, and others"
    )
    args = parser.parse_args(argv)
    output = args.output or args.runs[0] / REPORT_FILE
    if output.is_dir():
        raise UsageError(f"--output {output} is a directory: name a file in it.")
    from dc_trl.commands.report.run import build_report

    text = build_report(args.runs, args.tokens_step)
    try:
        _write(output, text)
    except OSError as error:
        raise UsageError(
            f"the report cannot be written to {output}: {error}. Name another file with --output."
        ) from error
    print(f"{terminal(output)} ({len(text.encode()) / 1e6:.1f} MB): open it in a browser.")
    return 0


def _write(path: Path, text: str) -> None:
    """Replaces the file in one step: a browser that reloads it while the run goes on never sees half a page."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
