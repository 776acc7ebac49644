# SPDX-License-Identifier: Apache-2.0
"""The scores of a model on benchmarks, as they are kept: `evaluation/results.jsonl`, one line for each."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dc_trl.records.json_lines import append_lines, mend_end

RESULTS_FILE = "results.jsonl"

# What tells two results of a benchmark apart in a model card.
CARD_SETTINGS = ("temperature", "top_p", "max_tokens", "precision", "engine", "limit")


def append_result(folder: Path, result: dict[str, Any]) -> None:
    """Appends a benchmark's result to `results.jsonl` in `folder`."""
    mend_end(folder / RESULTS_FILE)
    append_lines(folder / RESULTS_FILE, [result])


def read_results(run_dir: str | Path) -> list[dict[str, Any]]:
    """The benchmark results of a run or model directory, from `<run_dir>/evaluation/results.jsonl`.

    Returns:
        One dict for each benchmark and settings, the last written, in the order of writing; empty where nothing was
        evaluated. Lines that a crash cut off, and whatever else is no result, are passed over.
    """
    path = Path(run_dir, "evaluation", RESULTS_FILE)
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            result = json.loads(line)
        except ValueError:
            continue
        if isinstance(result, dict) and {"benchmark", "settings"} <= result.keys():
            key = result["benchmark"], result["settings"]
            last.pop(key, None)
            last[key] = result
    return list(last.values())


def newest_results(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of results that a model card cannot tell apart, because only weights, seed or prompt differ, the last."""
    keys = ("dataset", "metric", *CARD_SETTINGS)
    return list({(result["benchmark"], *(result[key] for key in keys)): result for result in results}.values())


def score(mean: float | None, stderr: float | None) -> str:
    """Fractions as percent: "63.2 ± 6.1"."""
    if mean is None:
        return "none"
    return f"{100 * mean:.1f}" + ("" if stderr is None else f" ± {100 * stderr:.1f}")
