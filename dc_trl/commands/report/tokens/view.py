# SPDX-License-Identifier: Apache-2.0
"""The token logs of runs as the page's script takes them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dc_trl.commands.report.text import NAME_LIMIT
from dc_trl.commands.report.tokens.choice import kept_steps, token_logs
from dc_trl.commands.report.tokens.completions import completions, different, mean_discrepancies
from dc_trl.commands.report.tokens.figures import figures
from dc_trl.commands.report.tokens.log import TokenLogFile, rounded
from dc_trl.commands.report.tokens.top import TOP, top
from dc_trl.records.run_columns import RunColumns
from dc_trl.records.text import visible

STEPS = 4
"""Token logs shown of a run, unless one is asked for."""
TOKENS = 60_000
"""Tokens embedded in a page, all runs, steps and completions together."""


class TokenLogError(ValueError):
    """A token log was asked for that is not there or cannot be read."""


@dataclass
class TokenView:
    """What the page shows of tokens: one dict a step, newest first, and sentences on what could not be read."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def token_view(folders: list[Path], runs: list[RunColumns], wanted: int | None = None) -> TokenView:
    """Reads the token logs of all runs: of each the `wanted` step, or `STEPS` steps, see `kept_steps`.

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


def _chosen(
    paths: dict[int, Path], wanted: int | None, budget: int, notes: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads the wanted steps one by one; where a file cannot be shown, the next older one stands for it."""
    steps = [step for step in paths if wanted in (None, step)]
    done: set[int] = set()
    for kept, reasons in kept_steps({step: paths[step] for step in steps}, STEPS).items():
        for step in steps[steps.index(kept) :]:
            if step in done:
                break
            try:
                shown = _step(TokenLogFile.read(paths[step]), budget)
            except Exception as error:  # Arrow and NumPy raise most kinds on a damaged file: the page is made without
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                note = f"{paths[step]} was left out: {reason}. It may not be complete yet."
                notes += [note] if note not in notes else []
                continue
            done.add(step)
            yield step, shown | {"why": reasons if wanted is None and step == kept else []}
            break


def _step(log: TokenLogFile, budget: int) -> dict[str, Any]:
    valid = log.columns["valid"]
    means = mean_discrepancies(log)
    order = different(log, means)
    sizes = {"discrepancy": log.columns["discrepancy"], "log_ratio": np.abs(log.columns["log_ratio"])}
    sizes = {name: np.where(valid & ~np.isnan(size), size, 0) for name, size in sizes.items()}
    return {
        "total": {"completions": len(means), "different": len(order), "tokens": len(valid)},
        "scale": {name: _scale(size[valid & np.isfinite(size)]) for name, size in sizes.items()},
        "completions": completions(log, means, order, budget),
        "top": {name: top(log, size) for name, size in sizes.items()},
        "figures": figures(log),
    }


def _scale(sizes: np.ndarray) -> float:
    """The value that is shaded in full: the 99th percentile, or the maximum where that is 0."""
    full = float(np.quantile(sizes, 0.99)) if len(sizes) else 0.0
    return rounded(full or float(sizes.max(initial=0.0))) or 0.0
