# SPDX-License-Identifier: Apache-2.0
"""A calibration in words and as JSON."""

import importlib.metadata
import json
import os
import platform
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dc_trl import __version__
from dc_trl.commands.calibrate.checks import FAIL, Plan, Recommendation, Verdict, healthy, off_grid_floor
from dc_trl.commands.calibrate.measure import Measurement
from dc_trl.commands.calibrate.scores import describe, mean_discrepancy
from dc_trl.discrepancy import METRICS
from dc_trl.records.text import terminal, visible

JSON_FILE = "calibration.json"
# Tolerances of arXiv 2606.08779 (secondary source), of |π − μ|, on its authors' stack.
SCALE = "For scale: 0.0037 on Qwen3-8B, 0.0050 on Qwen3-30B-A3B, on the authors' stack (secondary source)."

_LOGGED = (
    "differs",
    "kl",
    "k3_kl",
    "chi2_token",
    "ess",
    "pearson",
    "ppl_ratio",
    "log_ppl_abs_diff",
    "importance_ratio/min",
    "importance_ratio/mean",
    "importance_ratio/max",
    "nan_fraction",
)
_VERSIONS = ("trl", "transformers", "torch", "accelerate", "peft", "torchao", "vllm")


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Attributes:
        run: what was measured and where: `model`, `engine`, `hardware`, `time`, `seconds`, `versions`, `settings`.
        plan: the recipe's metric, average and slack.
        measurement: the passes.
        verdicts: the checks.
        recommendation: the tolerance, None where a check failed or the engines agree.
    """

    run: dict[str, Any]
    plan: Plan
    measurement: Measurement
    verdicts: list[Verdict]
    recommendation: Recommendation


def versions() -> dict[str, str]:
    """Versions of this package and of those that decide what the engines compute; those that are not there are not."""
    found = {"dc_trl": __version__}
    for name in _VERSIONS:
        for distribution in (name, f"{name}-cpu"):
            try:
                found[name] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def hardware(processes: int) -> str:
    """The machine in one line, such as "1 × NVIDIA H100" or "2 CPU cores (x86_64), no GPU"."""
    if torch.cuda.is_available():
        return f"{processes} × {torch.cuda.get_device_name()}"
    if torch.accelerator.is_available():
        return f"{processes} × {torch.accelerator.current_accelerator()}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU"


def as_json(found: Calibration) -> str:
    """Everything, as one JSON object; docs/calibration.md explains its keys. Numbers that do not exist are null."""
    m, plan = found.measurement, found.plan
    passes = {name: getattr(m, name) for name in ("first", "second", "stale", "nudged", "undone", "off_grid")}
    content = {
        "healthy": healthy(found.verdicts),
        "discrepancy_tolerance": found.recommendation.tolerance,
        "reason": found.recommendation.reason,
        "floor": asdict(mean_discrepancy(m.floor, plan.metric, plan.average)) | asdict(plan),
        "grid": _grid(m, plan),
        "checks": [asdict(verdict) for verdict in found.verdicts],
        "distribution": describe(m.floor),
        "passes": {name: describe(scores) for name, scores in passes.items() if scores is not None},
        "nudge_size": m.nudge_size,
        "weights_moved": m.weights_moved,
        "temperature": {
            "asked": found.run["settings"]["temperature"],
            "misfits": _rows(m.misfits),
            "other": m.other_temperature,
            "other_misfits": None if m.other_misfits is None else _rows(m.other_misfits),
        },
        "run": found.run,
    }
    return json.dumps(_without_nan(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _grid(measurement: Measurement, plan: Plan) -> dict[str, Any]:
    """Where the weights lie, and the floor off the grid, as far as they were measured."""
    grid, floor = measurement.grid, off_grid_floor(measurement, plan)
    names = ("share", "dtype", "rounding", "forward_rounds")
    return {name: getattr(grid, name, None) for name in names} | {
        name: getattr(floor, name, None) for name in ("value", "stderr", "spread")
    }


def _rows(misfits: dict[float, float]) -> list[dict[str, float]]:
    return [{"temperature": t, "logprob_diff": misfits[t]} for t in sorted(misfits)]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(x) for x in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


# Text


def as_text(found: Calibration) -> str:
    """The report that `dc-trl calibrate` prints."""
    table = describe(found.measurement.floor)
    lines = [terminal(f"{found.run['model']}: {found.run['engine']}"), *_size(found, table), "", *_metrics(table), ""]
    lines += _bins("by probability π", table["by_probability"], lambda x: f"{x:g}")
    lines += ["", *_bins("by position", table["by_position"], str), "", "over all tokens"]
    lines += [f"  {key:24}{_number(table['dc'][key])}" for key in _LOGGED]
    lines += ["", "checks"]
    for verdict in found.verdicts:
        status = verdict.status.upper() if verdict.status == FAIL else verdict.status
        lines += _wrapped(f"  {status:8}{verdict.name}: {verdict.message}", 10)
        if verdict.remedy:
            lines += _wrapped(f"          → {verdict.remedy}", 12)
    return "\n".join([*lines, "", *_conclusion(found)])


def _size(found: Calibration, table: dict[str, Any]) -> list[str]:
    floor = mean_discrepancy(found.measurement.floor, found.plan.metric, found.plan.average)
    off_grid = off_grid_floor(found.measurement, found.plan)
    mean = f"mean {METRICS[found.plan.metric].symbol} by {found.plan.average}"
    floors = {"floor" if off_grid is None else "floor at step 0": floor, "floor off the grid": off_grid}
    return [
        f"  2 passes, {table['completions']} completions of {table['problems']} problems, {table['tokens']:,} tokens",
        f"  {table['mean_length']:.0f} tokens a completion, {table['cut_fraction']:.0%} cut at max_completion_length",
        f"  {found.run['hardware']}, {found.run['seconds']:.0f} s",
        *(
            f"  {name}: {mean} {found_floor.value:.4g} ± {found_floor.stderr:.1g} (standard error)"
            for name, found_floor in floors.items()
            if found_floor is not None
        ),
    ]


def _metrics(table: dict[str, Any]) -> list[str]:
    columns = ("mean", "p50", "p90", "p99", "max")
    lines = [f"{'discrepancy of a token':32}" + "".join(f"{column:>11}" for column in columns)]
    for name, metric in METRICS.items():
        cells = "".join(f"{_number(table['metrics'][name][column]):>11}" for column in columns)
        lines.append(f"  {name:14}{metric.symbol:16}{cells}")
    return lines


def _bins(title: str, rows: list[dict[str, Any]], edge: Any) -> list[str]:
    lines = [f"{title:20}{'tokens':>11}" + "".join(f"{metric:>14}" for metric in METRICS)]
    for row in rows:
        label = f"{edge(row['from'])} to {edge(row['to'])}"
        cells = "".join(f"{_number(row[metric]):>14}" for metric in METRICS)
        lines.append(f"  {label:18}{row['tokens']:>11,}{cells}")
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _conclusion(found: Calibration) -> list[str]:
    chosen = found.recommendation
    if not healthy(found.verdicts):
        return _wrapped(f"UNHEALTHY: {chosen.reason}", 2)
    if chosen.tolerance is None:
        return _wrapped(f"healthy: {chosen.reason}", 2)
    scale = f" {SCALE}" if found.plan.metric == "prob_diff" else ""
    return [
        f"healthy. Recommended: discrepancy_tolerance: {chosen.tolerance:g}",
        *_wrapped(f"  {chosen.reason}{scale}", 2),
    ]


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, 110, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def save(found: Calibration, folder: Path) -> list[Path]:
    """Writes calibration.json and calibration.png; returns their paths."""
    from dc_trl.commands.calibrate.picture import PICTURE_FILE, save_picture

    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON_FILE).write_text(as_json(found), encoding="utf-8")
    title = visible(f"{found.run['model']}, {found.run['engine']}")
    save_picture(found.measurement.floor, found.plan, found.recommendation.tolerance, title, folder / PICTURE_FILE)
    return [folder / JSON_FILE, folder / PICTURE_FILE]
