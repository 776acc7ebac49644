# SPDX-License-Identifier: Apache-2.0
"""The token logs of runs, cut to what a page can hold: completions, the tokens that disagree most, and a histogram."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dc_trl.commands.report.text import NAME_LIMIT
from dc_trl.records.run_reader import Run
from dc_trl.records.text import visible
from dc_trl.records.token_schema import FOLDER, OPTIONAL, SCHEMA

STEPS = 4
"""Token logs shown of a run, unless one is asked for."""
COMPLETIONS = 16
"""Completions shown of a step: half of them those of the highest mean discrepancy, half evenly from the others."""
TOKENS = 60_000
"""Tokens embedded in a page, all runs, steps and completions together."""
TOP = 20
"""Rows of the table of the tokens that disagree most."""

# On either side of a token in that table: tokens, and characters of them.
_CONTEXT = 6
_CONTEXT_TEXT = 24
# Characters of a token and of a prompt.
_TOKEN_TEXT = 80
_PROMPT_TEXT = 2_000
_CANDIDATES = 20  # tokens looked at for each row of that table
_DIGITS = 5

# Bounds of the sampling probability μ. Fine near 1, where most tokens of a trained policy lie.
_BUCKETS = (0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


class TokenLogError(ValueError):
    """A token log was asked for that is not there or cannot be read."""


@dataclass
class TokenView:
    """What the page shows of tokens: one dict a step, newest first, and sentences on what could not be read."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Log:
    """One token log in numpy, sorted by completion and position. `group` numbers the completions from 0."""

    columns: dict[str, np.ndarray]
    token: pa.ChunkedArray
    prompt: pa.ChunkedArray
    group: np.ndarray
    starts: np.ndarray

    @classmethod
    def read(cls, path: Path) -> "_Log":
        """Raises ValueError or OSError if the file is no token log, or is not complete yet."""
        needed = [kind for kind in SCHEMA if kind.name not in OPTIONAL]
        table = pq.ParquetFile(path).read(columns=[kind.name for kind in needed])
        if missing := {kind.name for kind in needed} - set(table.column_names):
            raise ValueError(f"it has no column {', '.join(sorted(missing))}")
        wrong = [kind.name for kind in needed if table[kind.name].type != kind.type or table[kind.name].null_count]
        if wrong:
            raise ValueError(f"its column {', '.join(wrong)} holds other values than a token log")
        if not table.num_rows:
            raise ValueError("it holds no token")
        table = table.sort_by([("completion", "ascending"), ("position", "ascending")])
        columns = {name: table[name].to_numpy() for name in table.column_names if name not in ("token", "prompt")}
        with np.errstate(invalid="ignore", over="ignore"):  # -inf on both sides; "log-probs" of any size
            columns |= {"pi": np.exp(columns["train_logp"]), "mu": np.exp(columns["sampling_logp"])}
            columns["log_ratio"] = columns["train_logp"] - columns["sampling_logp"]
        starts, group = np.unique(columns["completion"], return_index=True, return_inverse=True)[1:]
        return cls(columns, table["token"].cast(pa.string()), table["prompt"].cast(pa.string()), group, starts)

    def rows(self, group: int) -> slice:
        """The rows of a completion."""
        end = self.starts[group + 1] if group + 1 < len(self.starts) else len(self.group)
        return slice(int(self.starts[group]), int(end))

    def length(self, group: int) -> int:
        """Tokens of a completion."""
        rows = self.rows(group)
        return rows.stop - rows.start

    def texts(self, rows: slice) -> list[str]:
        """The tokens of a stretch, fit to be shown."""
        return [visible(token, _TOKEN_TEXT) for token in self.token[rows].to_pylist()]

    def numbers(self, name: str, rows: Any) -> list[float | None]:
        """A float column, rounded; None for what is not finite."""
        return [_rounded(value) for value in self.columns[name][rows].tolist()]


def _rounded(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None


def token_view(folders: list[Path], runs: list[Run], wanted: int | None = None) -> TokenView:
    """Reads the token logs of all runs: of each the `wanted` step, or `STEPS` steps, newest and oldest among them.

    Args:
        folders: the runs' output directories.
        runs: what their logs say, in the same order.
        wanted: an optimizer step.

    Raises:
        TokenLogError: no run has a readable token log of the `wanted` step; the message lists the steps there are.
    """
    view = TokenView()
    available = [token_logs(folder) for folder in folders]
    planned = sum(min(1 if wanted is not None else STEPS, len(paths)) for paths in available)
    budget = TOKENS // max(planned, 1)
    for index, (run, paths) in enumerate(zip(runs, available, strict=True)):
        metric = visible(str(run.settings.get("discrepancy_metric", "prob_diff")), NAME_LIMIT)
        for step, shown in _chosen(paths, wanted, budget, view.notes):
            view.steps.append({"run": index, "step": step, "metric": metric} | shown)
    if wanted is not None and not view.steps:
        steps = sorted({step for paths in available for step in paths})[-TOP:]
        there = ", ".join(map(str, steps)) or "none (train with `log_tokens=True`)"
        raise TokenLogError(f"there is no readable token log of step {wanted}. The last of those there are: {there}.")
    return view


def token_logs(folder: Path) -> dict[int, Path]:
    """The token logs of a run by their step, newest first."""
    pattern = re.compile(r"tokens_(\d{1,15})\.parquet", re.ASCII)  # a number with more digits is no step
    names = ((pattern.fullmatch(path.name), path) for path in (folder / FOLDER).glob("*"))
    return dict(sorted(((int(match[1]), path) for match, path in names if match), reverse=True))


def _chosen(
    paths: dict[int, Path], wanted: int | None, budget: int, notes: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads the wanted steps one by one; where a file cannot be shown, the next older one stands for it."""
    steps = [step for step in paths if wanted in (None, step)]
    done: set[int] = set()
    for place in np.unique(np.linspace(0, len(steps) - 1, min(STEPS, len(steps))).round().astype(int)):
        for step in steps[place:]:
            if step in done:
                break
            try:
                shown = _step(_Log.read(paths[step]), budget)
            except Exception as error:  # Arrow and NumPy raise most kinds on a damaged file: the page is made without
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                note = f"{paths[step]} was left out: {reason}. It may not be complete yet."
                notes += [note] if note not in notes else []
                continue
            done.add(step)
            yield step, shown
            break


def _step(log: _Log, budget: int) -> dict[str, Any]:
    valid = log.columns["valid"]
    finite = valid & np.isfinite(log.columns["discrepancy"])
    counts = np.maximum(np.bincount(log.group, weights=valid), 1)
    means = np.bincount(log.group, weights=np.where(valid, log.columns["discrepancy"], 0)) / counts
    means = np.where(np.isnan(means), np.inf, means)  # a NaN is the worst there is: it must not sort behind all others
    different = _different(log, means)
    selected = _selected(different)
    share = _share([log.length(group) for group, _ in selected], budget)
    sizes = {"discrepancy": log.columns["discrepancy"], "log_ratio": np.abs(log.columns["log_ratio"])}
    sizes = {name: np.where(valid & ~np.isnan(size), size, 0) for name, size in sizes.items()}
    return {
        "total": {"completions": len(means), "different": len(different), "tokens": len(valid)},
        "scale": {name: _scale(size[valid & np.isfinite(size)]) for name, size in sizes.items()},
        "completions": [
            _completion(log, group, float(means[group]), share) | {"times": times} for group, times in selected
        ],
        "top": {name: _top(log, size) for name, size in sizes.items()},
        "figure": _histogram(log.columns["mu"][finite], log.columns["discrepancy"][finite]),
    }


def _different(log: _Log, means: np.ndarray) -> list[tuple[int, int]]:
    """The completions, of highest mean first, each with the number of those that have its prompt and its tokens."""
    groups: dict[tuple[str, bytes], list[int]] = {}
    for group in np.argsort(-means, kind="stable").tolist():
        rows = log.rows(group)
        same = (log.prompt[rows.start].as_py(), log.columns["token_id"][rows].tobytes())
        groups.setdefault(same, []).append(group)
    return [(members[0], len(members)) for members in groups.values()]


def _selected(order: list[Any]) -> list[Any]:
    """At most `COMPLETIONS` of a list: the first ones, and as many spread evenly over the rest."""
    if len(order) <= COMPLETIONS:
        return order
    half = COMPLETIONS // 2
    others = order[half:]
    return order[:half] + [others[i] for i in np.linspace(0, len(others) - 1, COMPLETIONS - half).astype(int)]


def _share(lengths: list[int], budget: int) -> int:
    """The most tokens that each completion may show: what short ones leave of the budget, long ones get."""
    for place, length in enumerate(sorted(lengths)):
        share = budget // (len(lengths) - place)
        if length > share:
            return share
        budget -= length
    return max(lengths)


def _scale(sizes: np.ndarray) -> float:
    """The value that is shaded in full: the 99th percentile, or the maximum where that is 0."""
    top = float(np.quantile(sizes, 0.99)) if len(sizes) else 0.0
    return _rounded(top or float(sizes.max(initial=0.0))) or 0.0


def _completion(log: _Log, group: int, mean: float, share: int) -> dict[str, Any]:
    rows = log.rows(group)
    shown = slice(rows.start, min(rows.stop, rows.start + share))
    valid = log.columns["valid"]
    return {
        "completion": int(log.columns["completion"][rows.start]),
        "tokens": rows.stop - rows.start,
        "mean": _rounded(mean),
        "max": _rounded(np.max(log.columns["discrepancy"][rows], where=valid[rows], initial=0)),
        "advantage": log.numbers("advantage", [rows.start])[0],
        "prompt": visible(log.prompt[rows.start].as_py(), _PROMPT_TEXT),
        "text": log.texts(shown),
        "id": log.columns["token_id"][shown].tolist(),
        "position": log.columns["position"][shown].tolist(),
        "invalid": np.flatnonzero(~valid[shown]).tolist(),
        "train_logp": log.numbers("train_logp", shown),
        "sampling_logp": log.numbers("sampling_logp", shown),
        "discrepancy": log.numbers("discrepancy", shown),
        "penalty": log.numbers("penalty", shown),
    }


def _top(log: _Log, sizes: np.ndarray) -> list[dict[str, Any]]:
    """The valid tokens of the whole step with the largest sizes, and what stands around them."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in np.argsort(-sizes, kind="stable")[: _CANDIDATES * TOP].tolist():
        if not sizes[row]:
            break
        token = _token(log, row)
        # A group often holds the same completion several times; its tokens would fill the table.
        same = (token["before"], token["id"], token["after"], f"{sizes[row]:.3g}")
        if same in found:
            found[same]["times"] += 1
        elif len(found) < TOP:
            found[same] = token
    return list(found.values())


def _token(log: _Log, row: int) -> dict[str, Any]:
    around = log.rows(int(log.group[row]))
    token = {
        "completion": int(log.columns["completion"][row]),
        "position": int(log.columns["position"][row]),
        "id": int(log.columns["token_id"][row]),
        "before": "".join(log.texts(slice(max(around.start, row - _CONTEXT), row)))[-_CONTEXT_TEXT:],
        "text": log.texts(slice(row, row + 1))[0],
        "after": "".join(log.texts(slice(row + 1, min(around.stop, row + 1 + _CONTEXT))))[:_CONTEXT_TEXT],
        "times": 1,
    }
    return token | {name: log.numbers(name, [row])[0] for name in ("train_logp", "sampling_logp", "discrepancy")}


def _histogram(mu: np.ndarray, discrepancy: np.ndarray) -> dict[str, Any]:
    """Mean and 99th percentile of the discrepancy by sampling probability, as a plotly figure."""
    bucket = np.clip(np.digitize(mu, _BUCKETS) - 1, 0, len(_BUCKETS) - 2)
    groups = [discrepancy[bucket == index] for index in range(len(_BUCKETS) - 1)]
    names = [f"{low:g}–{high:g}" for low, high in zip(_BUCKETS, _BUCKETS[1:], strict=False)]
    means = [_rounded(group.mean()) if len(group) else None for group in groups]
    tails = [_rounded(np.quantile(group, 0.99)) if len(group) else None for group in groups]
    counts = [f"{len(group):,} tokens" for group in groups]
    bars = {
        "type": "bar",
        "name": "mean",
        "x": names,
        "y": means,
        "marker": {"color": "var(--run-0)"},
        "customdata": counts,
        "hovertemplate": "%{y:.4g}, %{customdata}",
    }
    marks = {
        "type": "scatter",
        "mode": "markers",
        "name": "99th percentile",
        "x": names,
        "y": tails,
        "marker": {"symbol": "line-ew-open", "size": 16, "color": "var(--limit)", "line": {"width": 2}},
    }
    title = {"text": "sampling probability μ"}
    axis = {"type": "category", "nticks": len(names), "title": title}
    return {"data": [bars, marks], "layout": {"xaxis": axis, "yaxis": {"rangemode": "tozero"}, "showlegend": True}}
