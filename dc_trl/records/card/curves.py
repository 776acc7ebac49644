# SPDX-License-Identifier: Apache-2.0
"""A picture of a run for its model card: what was learnt, how far the engines disagreed, what the constraint did."""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dc_trl.records.card.plotting import BLUE, ORANGE, TEXT, VERMILION, dress, new_figure, save_png
from dc_trl.records.card.series import DISCREPANCY, Log, Series, series

# Title of each panel, and the logged key drawn in it.
PANELS: dict[str, str] = {
    "reward": "reward",
    "discrepancy, mean": DISCREPANCY,
    "multiplier λ": "dc/multiplier",
    "entropy, nats": "entropy",
    "tokens per completion": "completions/mean_length",
    "learning rate": "learning_rate",
}

# What an evaluation measures too, under `eval_` and the same key, and is drawn as dots.
_EVALUATED = ("reward", DISCREPANCY, "entropy", "completions/mean_length")

_COLUMNS = 3
_PANEL_INCHES = (3.3, 2.3)
# Fewer points than this are marked one by one: a line between two of them would say too much.
_MARKED = 20


def save_curves(log_history: Log, tolerance: float | None, path: Path) -> bool:
    """Draws a panel for each of `PANELS` that was logged, and saves them as one PNG.

    The same log gives the same bytes. Nothing is drawn, and no file written, where none of the keys was logged.

    Args:
        log_history: the Trainer's, or `Run.entries`; entries carry `step`.
        tolerance: drawn across the discrepancy, in its units; None for no line.
        path: of the PNG.

    Returns:
        whether a picture was written.
    """
    drawn = {title: key for title, key in PANELS.items() if series(log_history, key).steps}
    if not drawn:
        return False
    columns = min(_COLUMNS, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    width, height = _PANEL_INCHES
    figure, axes = new_figure(rows, columns, width * columns, height * rows)
    for axis, (title, key) in zip(axes, drawn.items(), strict=False):
        limit = tolerance if key == DISCREPANCY else None
        evaluation = series(log_history if key in _EVALUATED else (), f"eval_{key}")
        _panel(axis, title, series(log_history, key), evaluation, limit)
    for axis in axes[len(drawn) :]:
        axis.set_axis_off()
    save_png(figure, path)
    return True


def _panel(axis: Axes, title: str, train: Series, evaluation: Series, limit: float | None) -> None:
    marker = "o" if len(train.steps) < _MARKED else ""
    axis.plot(train.steps, train.values, color=BLUE, linewidth=1.3, marker=marker, markersize=3, label="training")
    if evaluation.steps:
        axis.plot(evaluation.steps, evaluation.values, "D", color=ORANGE, markersize=4, label="evaluation")
    if limit is not None:
        axis.axhline(limit, color=VERMILION, linestyle="--", linewidth=1.2, label=f"tolerance {limit:.3g}")
    if evaluation.steps or limit is not None:
        axis.legend(fontsize=7, frameon=False, labelcolor=TEXT)
    values = [*train.values, *evaluation.values, *([] if limit is None else [limit])]
    if min(values) >= 0:
        axis.set_ylim(0, 1.08 * max(values) or 1.0)  # an axis that starts elsewhere makes noise look like a trend
    dress(axis, title, "optimizer step")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.ticklabel_format(axis="y", scilimits=(-3, 4))
    axis.grid(alpha=0.25)
