# SPDX-License-Identifier: Apache-2.0
"""The page from the folders of runs."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dc_trl.commands.report.page import render
from dc_trl.commands.report.tokens.view import token_view
from dc_trl.commands.usage import UsageError
from dc_trl.records.run_columns import RunColumns, read_columns


def build_report(folders: Sequence[Path], tokens_step: int | None = None) -> str:
    """The report on the runs in `folders`, as HTML.

    Args:
        folders: output directories of trainers.
        tokens_step: optimizer step whose tokens are shown; None shows the newest, and some before it.

    Raises:
        UsageError: a folder holds no run, no token log of that step can be read, or plotly or orjson is not installed.
    """
    try:
        import orjson  # noqa: F401 (read_columns takes it)
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UsageError("the report needs plotly and orjson: pip install 'dc-trl[report]'.") from error
    try:
        runs = [read_columns(folder) for folder in folders]
        view = token_view(list(folders), runs, tokens_step)
    except (OSError, ValueError) as error:  # TokenLogError is a ValueError
        raise UsageError(str(error)) from error
    _tell_apart(folders, runs)
    now = time.time()
    ages = [now - run.source.stat().st_mtime for run in runs]
    return render(runs, ages, view, get_plotlyjs())


def _tell_apart(folders: Sequence[Path], runs: list[RunColumns]) -> None:
    """Puts the path for the name where several runs have the same one."""
    counts = Counter(run.name for run in runs)
    for folder, run in zip(folders, runs, strict=True):
        if counts[run.name] > 1:
            run.name = str(folder)
