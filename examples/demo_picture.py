# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: what the deployed policy learns, and how far the engines are apart, under either weight sync."""

from pathlib import Path

import matplotlib
import numpy as np
from demo_report import DISCREPANCY, REWARD, Log, series

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

COLOURS = ("#c0392b", "#1f6fb2")
SMOOTHED = 5  # steps


def draw(logs: dict[str, Log], path: Path) -> None:
    """Draws runs, by their names, into a file."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (accuracy, discrepancy) = plt.subplots(1, 2, figsize=(10, 3.4), constrained_layout=True)
    for colour, (name, log) in zip(COLOURS, logs.items(), strict=True):
        accuracy.plot(_smoothed(series(log, REWARD)), color=colour, linewidth=2, label=name)
        discrepancy.plot(_smoothed(series(log, DISCREPANCY)), color=colour, linewidth=2)
    accuracy.set(
        xlabel="optimizer steps", ylabel="right answers on fresh problems", title="What the sampler has learnt"
    )
    accuracy.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    accuracy.legend(frameon=False, title="the weight sync rounds")
    discrepancy.set(
        xlabel="optimizer steps", ylabel="mean |π − μ|", title="How far the engines are apart", yscale="log"
    )
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _smoothed(values: list[float]) -> np.ndarray:
    """Means over the last `SMOOTHED` steps, fewer at the start."""
    return np.array([np.mean(values[max(0, i + 1 - SMOOTHED) : i + 1]) for i in range(len(values))])
