# SPDX-License-Identifier: Apache-2.0
"""What the package's pictures share: a canvas of their own, colours, axes."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# From a palette that colour-blind readers can tell apart (Okabe and Ito).
BLUE, LIGHT_BLUE, ORANGE, VERMILION = "#0072B2", "#56B4E9", "#E69F00", "#D55E00"
TEXT = "#333333"

_COLOURS = 192


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches, and its axes in reading order.

    It has a canvas of its own: neither pyplot's list of figures nor the display that a notebook chose is touched.
    """
    figure = Figure(figsize=(width, height), dpi=105, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def dress(axis: Axes, title: str, x_label: str) -> None:
    """Title, label, ticks and frame of an axis, the same in every picture."""
    axis.set_title(title, fontsize=10, loc="left", color=TEXT)
    axis.set_xlabel(x_label, fontsize=8, color=TEXT)
    axis.tick_params(labelsize=8, colors=TEXT)
    axis.yaxis.get_offset_text().set_fontsize(8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)


def save_png(figure: Figure, path: Path) -> None:
    """Draws the figure and saves it; the same figure gives the same bytes."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    # Fewer colours than anti-aliasing makes: some half of the size, and it looks the same.
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(_COLOURS, Image.Quantize.MAXCOVERAGE).save(path, "PNG", optimize=True)
