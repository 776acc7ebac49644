# SPDX-License-Identifier: Apache-2.0
"""The figures of docs/results.md, and the README's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from papers.theory.toy import ACTIONS, REFERENCE

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

Line = Mapping[str, Any]

ROUNDING_ARMS = {
    "unseen-fp8": ("nearest", "nearest-x2", "dither"),
    "unseen-bf16": ("nearest", "nearest-x1.5", "dither", "one-nearest", "one-dither"),
}
CAUSE_ARMS = ("plain", "exact", "tis", "dc")
CAUSE_REGIMES = {"stressed": 40, "mild": 50}
"""Regime → its rollouts."""
REMEDY_ARMS = ("nearest", "nearest-tis", "nearest-dc", "nearest-dc-strong", "nearest-decay", "nearest-x2", "dither")
# The arms of the README's figure, in its words.
SYNC_NAMES = {"nearest": "sync rounds to nearest", "dither": "sync rounds with a dither (dc-trl)"}
DPI = 110


def draw(lines: Sequence[Line], theory: Sequence[Line], folder: Path) -> None:
    """Draws what there are lines for into a folder."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    for name, picture in (("rounding", _rounding), ("cause", _cause), ("remedies", _remedies)):
        figure = picture(lines)
        if figure is not None:
            _save(figure, folder / f"results-{name}.png")
    figure = _sync(lines)
    if figure is not None:
        _save(figure, folder / "sync.png")
    if theory:
        _save(_toy([x for x in theory if x["calculation"] == "toy"]), folder / "results-toy.png")
        _save(_entropy([x for x in theory if x["calculation"] == "entropy"]), folder / "results-entropy.png")


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)


def _curves(lines: Sequence[Line], regime: str, arm: str, name: str) -> np.ndarray | None:
    """The curves of an arm, (seeds, points); None without any."""
    found = [x["curves"][name] for x in lines if x["regime"] == regime and x["arm"] == arm and name in x["curves"]]
    return np.array(found, dtype=float) if found else None


def _plot(
    axes: Axes,
    lines: Sequence[Line],
    regime: str,
    arms: Sequence[str],
    name: str,
    rollouts: int,
    names: Mapping[str, str] | None = None,
) -> None:
    """Draws the mean of each arm's curves, and a band from the lowest to the highest seed."""
    for number, arm in enumerate(arms):
        curves = _curves(lines, regime, arm, name)
        if curves is None:
            continue
        x = np.linspace(0, rollouts, curves.shape[1])
        label = f"{(names or {}).get(arm, arm)} (n = {len(curves)})"
        axes.plot(x, np.nanmean(curves, 0), color=f"C{number}", label=label, linewidth=1.5)
        axes.fill_between(x, np.nanmin(curves, 0), np.nanmax(curves, 0), color=f"C{number}", alpha=0.12, linewidth=0)
    axes.set_xlabel("rollouts")
    axes.set_title(regime)


def _rounding(lines: Sequence[Line]) -> Any:
    known = {line["regime"] for line in lines}
    regimes = {regime: arms for regime, arms in ROUNDING_ARMS.items() if regime in known}
    if not regimes:
        return None
    figure, axes = plt.subplots(len(regimes), 2, figsize=(9, 3 * len(regimes)), squeeze=False)
    for row, (regime, arms) in zip(axes, regimes.items(), strict=True):
        _plot(row[0], lines, regime, arms, "accuracy", 60)
        row[0].set_ylabel("accuracy, deployed")
        row[0].legend(frameon=False, fontsize=8)
        _plot(row[1], lines, regime, arms, "discrepancy", 60)
        row[1].set_yscale("log")
        row[1].set_ylabel("mean |π − μ|")
    return figure


def _sync(lines: Sequence[Line]) -> Any:
    if not any(line["regime"] == "unseen-fp8" for line in lines):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3))
    for panel, name in zip(axes, ("discrepancy", "accuracy"), strict=True):
        _plot(panel, lines, "unseen-fp8", list(SYNC_NAMES), name, 60, SYNC_NAMES)
    axes[0].set(yscale="log", ylabel="mean |π − μ|", title="Discrepancy of trainer and fp8 sampler")
    axes[1].set(ylabel="accuracy", title="What the fp8 sampler has learnt")
    axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _cause(lines: Sequence[Line]) -> Any:
    known = {line["regime"] for line in lines}
    regimes = {regime: rollouts for regime, rollouts in CAUSE_REGIMES.items() if regime in known}
    if not regimes:
        return None
    figure, axes = plt.subplots(len(regimes), 2, figsize=(9, 3.2 * len(regimes)), squeeze=False)
    for row, (regime, rollouts) in zip(axes, regimes.items(), strict=True):
        for panel, name in zip(row, ("accuracy", "discrepancy"), strict=True):
            _plot(panel, lines, regime, CAUSE_ARMS, name, rollouts)
        row[0].set_ylabel("accuracy, deployed")
        row[1].set_ylabel("mean |π − μ|")
        row[0].legend(frameon=False, fontsize=8)
    return figure


def _remedies(lines: Sequence[Line]) -> Any:
    figure, axes = plt.subplots(figsize=(6, 4))
    drawn = False
    for number, arm in enumerate(REMEDY_ARMS):
        own = [x["outcomes"] for x in lines if x["regime"] == "unseen-fp8" and x["arm"] == arm]
        if not own:
            continue
        drawn = True
        x, y = ([one[key] for one in own] for key in ("discrepancy_all", "accuracy_all"))
        axes.scatter(x, y, color=f"C{number}", s=14, label=f"{arm} (n = {len(own)})")
    axes.set_xscale("log")
    axes.set_xlabel("mean |π − μ| over the run")
    axes.set_ylabel("accuracy over the run, deployed")
    axes.set_title("unseen-fp8, a point for each seed")
    axes.legend(frameon=False, fontsize=8)
    return figure if drawn else None


def _toy(lines: Sequence[Line]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    x = np.arange(len(ACTIONS))
    for panel, sides in zip(axes, (2, 1), strict=True):
        panel.bar(x - 0.3, REFERENCE, 0.2, color="0.75", label="μ")
        own = [line for line in lines if line["sides"] == sides]
        for number, line in enumerate(own):
            panel.bar(x - 0.1 + 0.2 * number, line["policy"], 0.2, label=line["model"])
        panel.set_xticks(x, ACTIONS, fontsize=8)
        panel.set_title("two-sided" if sides == 2 else "one-sided")
    axes[0].set_ylabel("probability")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _entropy(lines: Sequence[Line]) -> Any:
    figure, axes = plt.subplots(figsize=(6, 3.2))
    for metric in dict.fromkeys(line["metric"] for line in lines):
        own = [line for line in lines if line["metric"] == metric]
        axes.scatter([x["confidence"] for x in own], [100 * x["rises"] for x in own], s=14, label=metric)
    axes.axhline(50, color="0.8", linewidth=1)
    axes.set_xlabel("confidence: mean probability of the likeliest action")
    axes.set_ylabel("% of states whose entropy rises")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, fontsize=8)
    return figure
