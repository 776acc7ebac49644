# SPDX-License-Identifier: Apache-2.0
"""Panels and runs to plotly figures, as plain data. Colours are CSS variables: they follow the theme."""

from typing import Any

import numpy as np

from dc_trl.commands.report.panels import LIMIT, MAIN, POINTS, SECOND, Panel, Row, Series
from dc_trl.commands.report.text import label
from dc_trl.records.run_columns import RunColumns
from dc_trl.records.run_reader import is_finite

COLORS = 8
"""Runs that get a colour of their own; the next ones repeat the colours with dashes."""

# A chart is some 600 pixels wide. Beyond this, extremes are kept and what lies between them is left out.
MAX_POINTS = 2_000
MAX_HALVINGS = 50
"""Halvings of the rate that are marked; Algorithm 1 makes four."""
# Fewer points than this are marked one by one.
_MARKED = 20
# Of the height, between two rows of a panel: room for the lower one's title. Less where there are many rows.
_GAP = 0.14
_GAPS = 0.4
_DIGITS = 6

_DASHES = {MAIN: "solid", SECOND: "dot", LIMIT: "dash"}
_WIDTHS = {MAIN: 2.0, SECOND: 1.5, LIMIT: 1.5}

Points = tuple[list[int], list[float | None]]


def points(run: RunColumns, key: str) -> Points:
    """Steps and values of a key, thinned to `MAX_POINTS`; None where the logged value is no finite number."""
    steps, values = run.series(key)
    kept = _extremes(values)
    return steps[kept].tolist(), _rounded(values[kept])


def _extremes(values: np.ndarray) -> np.ndarray:
    """The places to draw, in order: both ends, and of each stretch the smallest and the largest, so spikes stay."""
    count = len(values)
    if count <= MAX_POINTS:
        return np.arange(count)
    stretch = -(-2 * count // (MAX_POINTS - 4))  # room for the ends, and for a last stretch that is not whole
    rows = np.pad(values, (0, -count % stretch), constant_values=np.nan).reshape(-1, stretch)
    low = np.where(np.isnan(rows), np.inf, rows).argmin(axis=1)  # the first place where there is no number
    high = np.where(np.isnan(rows), -np.inf, rows).argmax(axis=1)
    starts = stretch * np.arange(len(rows))
    return np.unique(np.concatenate([[0], starts + low, starts + high, [count - 1]]))


def _rounded(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.{_DIGITS}g}") if value == value else None for value in values.tolist()]


def color(index: int) -> str:
    """The CSS variable of a run's colour."""
    return f"var(--run-{index % COLORS})"


def never_logged(panel: Panel, runs: list[RunColumns]) -> list[str]:
    """The panel's keys, evaluation's apart, that no run logged a finite value of."""
    keys = [series.key for row in panel.rows for series in row.series if series.kind != POINTS]
    return [key for key in keys if not _is_logged(key, runs)]


def _is_logged(key: str, runs: list[RunColumns]) -> bool:
    return any(key in run.drawable for run in runs)


def _has_values(series: Series, runs: list[RunColumns]) -> bool:
    """Whether a series is worth an axis: a limit alone is not."""
    return series.kind in (MAIN, POINTS) and _is_logged(series.key, runs)


def figure(panel: Panel, runs: list[RunColumns]) -> dict[str, Any] | None:
    """The panel as a plotly figure: a row for each quantity, all runs in it; None if none of its keys was logged."""
    rows = [row for row in panel.rows if any(_has_values(series, runs) for series in row.series)]
    if not rows:
        return None
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {"shapes": [], "annotations": [], "showlegend": len(runs) > 1, "hoversubplots": "axis"}
    for number, (row, (bottom, top)) in enumerate(zip(rows, _domains(rows), strict=True), start=1):
        axis = f"y{number}" if number > 1 else "y"
        for index, run in enumerate(runs):
            for series in row.series:
                data += _traces(series, run, index, len(runs), axis)
        layout[axis.replace("y", "yaxis")] = {"domain": [bottom, top]} | _range(data, axis)
        layout["annotations"].append(_caption(row.title, 0, top))
    layout["xaxis"] = {"anchor": axis, "title": {"text": "step"}}
    for index, run in enumerate(runs):
        _mark(layout, panel.marks, run, color(index), len(runs))
    return {"data": data, "layout": layout}


def _domains(rows: list[Row]) -> list[tuple[float, float]]:
    """Vertical extent of each row, from the top; fractions of the plot."""
    gap = min(_GAP, _GAPS / max(len(rows) - 1, 1))
    room = 1 - gap * (len(rows) - 1)
    total = sum(row.share for row in rows)
    top = 1.0
    domains = []
    for row in rows:
        height = room * row.share / total
        domains.append((round(max(top - height, 0), 4), round(top, 4)))
        top -= height + gap
    return domains


def _range(data: list[dict[str, Any]], axis: str) -> dict[str, Any]:
    """The range of an axis whose values are all the same, from 0; plotly would put them in the middle of −1 to 1."""
    values = {value for trace in data if trace["yaxis"] == axis for value in trace["y"] if value is not None}
    if len(values) != 1:
        return {}
    (value,) = values
    return {"range": sorted([0, 1.2 * value]) if value else [0, 1]}


def _traces(series: Series, run: RunColumns, index: int, count: int, axis: str) -> list[dict[str, Any]]:
    steps, values = points(run, series.key)
    if not any(value is not None for value in values):
        return []
    name = series.label if count == 1 else label(run.name) + ("" if series.kind == MAIN else f", {series.label}")
    limit_color = "var(--limit)" if series.kind == LIMIT and count == 1 else color(index)
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": name,
        "x": steps,
        "y": values,
        "yaxis": axis,
        "legendgroup": str(index),
        "showlegend": series.kind == MAIN and axis == "y",
        "mode": "markers" if series.kind == POINTS else "lines+markers" if len(steps) < _MARKED else "lines",
        "marker": {"size": 9 if series.kind == POINTS else 5, "color": limit_color},
    }
    if series.kind == POINTS:
        trace["marker"]["symbol"] = "diamond"
    else:
        dash = "longdashdot" if series.kind == MAIN and index >= COLORS else _DASHES[series.kind]
        trace["line"] = {"color": limit_color, "width": _WIDTHS[series.kind], "dash": dash}
    if series.kind == LIMIT:
        trace["line"]["shape"] = "hv"
    if series.kind == SECOND:
        trace["opacity"] = 0.65
    return _band(series, run, index, axis, 0.16 / count) + [trace]


def _band(series: Series, run: RunColumns, index: int, axis: str, opacity: float) -> list[dict[str, Any]]:
    """The area within the band's value of the series, as one closed outline; nothing where there is no band."""
    if series.band is None:
        return []
    steps, values = run.series(series.key)
    drawn = _extremes(values)  # the places of the line, which are others than the extremes of the width
    band_steps, band = run.series(series.band)
    widths = dict(zip(band_steps.tolist(), band.tolist(), strict=True))
    upper = []
    lower = []
    for step, value in zip(steps[drawn].tolist(), values[drawn].tolist(), strict=True):
        width = widths.get(step, np.nan)
        if np.isfinite(value + width):
            upper.append((step, value + width))
            lower.append((step, value - width))
    if not upper:
        return []
    outline = upper + lower[::-1]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "yaxis": axis,
            "line": {"width": 0, "color": color(index)},
            "fill": "toself",
            "fillcolor": color(index),
            "opacity": opacity,
            "hoverinfo": "skip",
            "x": [step for step, _ in outline],
            "y": [float(f"{value:.{_DIGITS}g}") for _, value in outline],
            "showlegend": False,
            "legendgroup": str(index),
        }
    ]


# Marks


def calibrated_until(run: RunColumns) -> int | None:
    """The last step without a tolerance, of a run that calibrated one; None if there was no such step."""
    tolerance, mean = (run.columns.get(key) for key in ("dc/tolerance", "dc/discrepancy/mean"))
    if mean is None:
        return None
    until = mean.rows if tolerance is None else mean.rows[mean.rows < tolerance.rows[0]]
    return int(run.steps[until[-1]]) if len(until) else None


def halvings(run: RunColumns) -> list[int]:
    """The steps whose entries are the first with a lower `length_decay/lr_scale`; at most `MAX_HALVINGS`."""
    steps, scales = run.series("length_decay/lr_scale")
    finite = np.flatnonzero(np.isfinite(scales))
    lower = finite[1:][np.diff(scales[finite]) < 0]
    return steps[lower[:MAX_HALVINGS]].tolist()


def _mark(layout: dict[str, Any], marks: str, run: RunColumns, run_color: str, count: int) -> None:
    named = count == 1
    until = calibrated_until(run)
    if marks == "calibration" and until is not None:
        layout["shapes"].append(_stretch(until, run_color, 0.1 / count))
    if marks == "decay":
        surge = run.last("length_decay/surge_step")
        if is_finite(surge):
            layout["shapes"].append(_upright(surge, "var(--limit)" if named else run_color, "solid"))
        if is_finite(surge) and named:
            layout["annotations"].append(_caption(f" surge, {surge:.0f}", surge, 1, xref="x", yanchor="top"))
        layout["shapes"] += [_upright(step, "var(--muted)" if named else run_color, "dot") for step in halvings(run)]


def _upright(step: float, line_color: str, dash: str) -> dict[str, Any]:
    line = {"color": line_color, "width": 1.25, "dash": dash}
    return {"type": "line", "x0": step, "x1": step, "y0": 0, "y1": 1, "yref": "paper", "line": line}


def _stretch(end: float, fill: str, opacity: float) -> dict[str, Any]:
    base = {"type": "rect", "x0": 0, "x1": end, "y0": 0, "y1": 1, "yref": "paper", "layer": "below"}
    return base | {"fillcolor": fill, "opacity": opacity, "line": {"width": 0}}


def _caption(text: str, x: float, y: float, **places: str) -> dict[str, Any]:
    base = {"text": text, "x": x, "y": y, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
    return base | {"showarrow": False, "font": {"size": 12, "color": "var(--muted)"}} | places
