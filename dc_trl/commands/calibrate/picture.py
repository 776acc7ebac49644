# SPDX-License-Identifier: Apache-2.0
"""The picture of a calibration: how far apart the engines are, for which tokens, and where in a completion."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dc_trl.commands.calibrate.checks import Plan
from dc_trl.commands.calibrate.scores import Scores, describe, mean_discrepancy
from dc_trl.discrepancy import METRICS
from dc_trl.records.card.plotting import BLUE, LIGHT_BLUE, TEXT, VERMILION, dress, new_figure, save_png

PICTURE_FILE = "calibration.png"

_BINS = 48
# What is drawn at the left end of the axis: anything smaller, an exact 0 included, is agreement.
_SMALLEST = 1e-9


def save_picture(scores: Scores, plan: Plan, tolerance: float | None, title: str, path: Path) -> None:
    """Draws histogram, mean by probability and mean by position of the recipe's metric, and saves a PNG.

    Args:
        scores: of the passes with equal weights.
        plan: the metric and the average.
        tolerance: marked in the histogram; None for no mark.
        title: of the picture.
        path: of the PNG.
    """
    table = describe(scores)
    figure, axes = new_figure(1, 3, 13, 3.9)
    figure.suptitle(title, fontsize=11, color=TEXT, parse_math=False)  # a $ in a name is no formula
    symbol = METRICS[plan.metric].symbol
    values = scores.discrepancy(plan.metric)[scores.valid].double().numpy()
    floor = mean_discrepancy(scores, plan.metric, plan.average).value
    _histogram(axes[0], values, floor, tolerance, symbol)
    labels = [f"{row['from']:g}–{row['to']:g}" for row in table["by_probability"]]
    _bars(axes[1], table["by_probability"], labels, plan.metric, f"mean {symbol} by probability π of the token")
    labels = [_positions(row) for row in table["by_position"]]
    _bars(axes[2], table["by_position"], labels, plan.metric, f"mean {symbol} by position in the completion")
    save_png(figure, path)


def _histogram(axis: Axes, values: np.ndarray, floor: float, tolerance: float | None, symbol: str) -> None:
    dress(axis, f"{symbol}, {len(values):,} tokens", "discrepancy of a token, logarithmic")
    axis.set_ylabel("share of tokens", fontsize=8, color=TEXT)
    if not len(values) or not values.max():
        axis.text(0.5, 0.5, "no difference", transform=axis.transAxes, ha="center", color=TEXT)
        return
    shown = np.clip(values, _SMALLEST, None)
    # The lowest half per cent would stretch the axis over decades in which nothing happens.
    low = max(np.quantile(shown, 0.005), _SMALLEST)
    edges = np.logspace(np.log10(low), np.log10(max(shown.max(), 10 * low)), _BINS + 1)
    axis.hist(
        np.clip(shown, low, None), bins=edges.tolist(), weights=np.full(len(shown), 1 / len(shown)), color=LIGHT_BLUE
    )
    axis.set_xscale("log")
    if floor > 0:
        axis.axvline(floor, color=BLUE, linewidth=1.4, label=f"mean {floor:.3g}")
    if tolerance is not None:
        axis.axvline(tolerance, color=VERMILION, linewidth=1.4, linestyle="--", label=f"tolerance {tolerance:.3g}")
    axis.legend(fontsize=8, frameon=False, labelcolor=TEXT, loc="upper left")


def _bars(axis: Axes, rows: list[dict[str, Any]], labels: list[str], metric: str, title: str) -> None:
    heights = [row[metric] or 0.0 for row in rows]
    places = range(len(rows))
    axis.bar(places, heights, color=LIGHT_BLUE, width=0.8)
    top = max(heights, default=0.0) or 1.0
    for place, row, height in zip(places, rows, heights, strict=True):
        axis.text(place, height + 0.015 * top, _count(row["tokens"]), ha="center", fontsize=7, color=TEXT)
    axis.set_ylim(0, 1.1 * top)
    axis.set_xticks(places, labels, rotation=35, ha="right", rotation_mode="anchor")
    dress(axis, title, "tokens are counted above the bars")
    axis.ticklabel_format(axis="y", scilimits=(-3, 4))
    axis.grid(axis="y", alpha=0.25)


def _positions(row: dict[str, Any]) -> str:
    first, last = row["from"], row["to"] - 1
    return str(first) if first == last else f"{first}–{last}"


def _count(number: int) -> str:
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
