# SPDX-License-Identifier: Apache-2.0
"""`dc-trl report RUN_DIR…`: one HTML file that needs no network, from the logs of finished and of running runs."""

import argparse
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dc_trl.commands.cli import UsageError
from dc_trl.records.run_log import Run, read_run

REPORT_FILE = "report.html"


def report_command(argv: Sequence[str]) -> int:
    """Entry point of `dc-trl report`: writes the page and says where it is. Returns 0.

    Raises:
        UsageError: a directory holds no run, the page cannot be written, or plotly is not installed.
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
    text = build_report(args.runs, args.tokens_step)
    try:
        _write(output, text)
    except OSError as error:
        raise UsageError(
            f"the report cannot be written to {output}: {error}. Name another file with --output."
        ) from error
    print(f"{output} ({len(text.encode()) / 1e6:.1f} MB): open it in a browser.")
    return 0


def build_report(folders: Sequence[Path], tokens_step: int | None = None) -> str:
    """The report on the runs in `folders`, as HTML.

    Args:
        folders: output directories of trainers.
        tokens_step: optimizer step whose tokens are shown; None shows the newest, and some before it.

    Raises:
        UsageError: a folder holds no run, no token log of that step can be read, or plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UsageError("the report needs plotly: pip install 'dc-trl[report]'.") from error
    from dc_trl.commands.report.page import render
    from dc_trl.commands.report.tokens import token_view

    try:
        runs = [read_run(folder) for folder in folders]
        view = token_view(list(folders), runs, tokens_step)
    except (OSError, ValueError) as error:  # TokenLogError is a ValueError
        raise UsageError(str(error)) from error
    _tell_apart(folders, runs)
    now = time.time()
    ages = [now - run.source.stat().st_mtime for run in runs]
    return render(runs, ages, view, get_plotlyjs())


def _tell_apart(folders: Sequence[Path], runs: list[Run]) -> None:
    """Puts the path for the name where several runs have the same one."""
    counts = Counter(run.name for run in runs)
    for folder, run in zip(folders, runs, strict=True):
        if counts[run.name] > 1:
            run.name = str(folder)


def _write(path: Path, text: str) -> None:
    """Replaces the file in one step: a browser that reloads it while the run goes on never sees half a page."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
