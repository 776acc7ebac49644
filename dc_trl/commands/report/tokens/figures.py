# SPDX-License-Identifier: Apache-2.0
"""What the tokens of a whole step look like, as plotly figures. A figure without data is not there."""

from typing import Any

import numpy as np

from dc_trl.commands.report.tokens.log import TokenLogFile, rounded

# Bounds of the sampling probability μ. Fine near 1, where most tokens of a trained policy lie.
_BUCKETS = (0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)

POINTS = 1_000
"""Tokens drawn in π against μ: half of them those that disagree most, by either measure, half evenly over the step."""
_SMALLEST = 1e-12  # probability that is drawn; smaller ones lie on it

_BARS = 41  # of the histogram of log ρ; odd, so that one of them is around 0
_WIDEST = 0.999  # quantile of |log ρ| at which its outermost bars begin to collect the rest
_POSITIONS = 60  # bars of the discrepancy by position

Figure = dict[str, Any]


def figures(log: TokenLogFile) -> dict[str, Figure]:
    """The figures of a step by name, of its valid tokens with finite values."""
    c = log.columns
    kept = c["valid"] & np.isfinite(c["discrepancy"])
    drawn = {
        "buckets": by_probability(c["mu"][kept], c["discrepancy"][kept]),
        "probabilities": _against(c["mu"][kept], c["pi"][kept], c["discrepancy"][kept], c["log_ratio"][kept]),
        "log_ratios": _log_ratios(c["log_ratio"][kept]),
        "positions": _by_position(c["position"][kept], c["discrepancy"][kept]),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def by_probability(mu: np.ndarray, discrepancy: np.ndarray) -> Figure | None:
    """Mean and 99th percentile of the discrepancy by sampling probability, with the number of tokens over each bar."""
    if not len(mu):
        return None
    bucket = np.clip(np.digitize(mu, _BUCKETS) - 1, 0, len(_BUCKETS) - 2)
    groups = [discrepancy[bucket == index] for index in range(len(_BUCKETS) - 1)]
    names = [f"{low:g}–{high:g}" for low, high in zip(_BUCKETS, _BUCKETS[1:], strict=False)]
    axis = {"type": "category", "nticks": len(names), "title": {"text": "sampling probability μ"}}
    counts = [_count(name, len(group)) for name, group in zip(names, groups, strict=True)]
    figure = _mean_and_tail(names, groups, axis)
    figure["layout"]["annotations"] = counts
    return figure


def _mean_and_tail(names: list[Any], groups: list[np.ndarray], xaxis: dict[str, Any]) -> Figure:
    """Bars for the mean of each group, and a mark for its 99th percentile."""
    bars = {
        "type": "bar",
        "name": "mean",
        "x": names,
        "y": [rounded(group.mean()) if len(group) else None for group in groups],
        "marker": {"color": "var(--run-0)"},
        "customdata": [f"{len(group):,} tokens" for group in groups],
        "hovertemplate": "%{y:.4g}, %{customdata}",
    }
    marks = {
        "type": "scatter",
        "mode": "markers",
        "name": "99th percentile",
        "x": names,
        "y": [rounded(np.quantile(group, 0.99)) if len(group) else None for group in groups],
        "marker": {"symbol": "line-ew-open", "size": 16, "color": "var(--limit)", "line": {"width": 2}},
    }
    return {
        "data": [bars, marks],
        "layout": {"xaxis": xaxis, "yaxis": {"rangemode": "tozero"}, "showlegend": True},
    }


def _count(name: str, tokens: int) -> dict[str, Any]:
    """How many tokens a bar stands for, above the plot."""
    text = f"{tokens}" if tokens < 1_000 else f"{tokens / 1_000:.3g}k" if tokens < 1e6 else f"{tokens / 1e6:.3g}M"
    place = {"x": name, "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False}
    return place | {"text": text, "font": {"size": 11, "color": "var(--muted)"}}


def _against(mu: np.ndarray, pi: np.ndarray, discrepancy: np.ndarray, log_ratio: np.ndarray) -> Figure | None:
    """π over μ, a point for each of some tokens, and the line on which the engines agree."""
    if not len(mu):
        return None
    chosen = _sample(discrepancy, np.abs(log_ratio))
    across, up = _probabilities(mu[chosen]), _probabilities(pi[chosen])
    points = {
        "type": "scatter",
        "mode": "markers",
        "name": "token",
        "x": across,
        "y": up,
        "marker": {"size": 5, "color": "var(--run-0)", "opacity": 0.55},
        "hovertemplate": "μ %{x:.4~g}, π %{y:.4~g}<extra></extra>",
    }
    low = min(across + up)
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": "π = μ",
        "x": [low, 1],
        "y": [low, 1],
        "line": {"color": "var(--limit)", "width": 1.25, "dash": "dash"},
        "hoverinfo": "skip",
    }
    axes = {"xaxis": {"title": {"text": "μ, sampling"}}, "yaxis": {"title": {"text": "π, training"}}}
    options = {"hovermode": "closest", "showlegend": False, "meta": {"log_x": True}}
    return {"data": [line, points], "layout": axes | options}


def _sample(*sizes: np.ndarray) -> np.ndarray:
    """The rows of at most `POINTS` tokens: those largest by each size, and others evenly over the step."""
    count = len(sizes[0])
    if count <= POINTS:
        return np.arange(count)
    each = POINTS // (2 * len(sizes))
    largest = [np.argpartition(-np.nan_to_num(size, nan=np.inf), each)[:each] for size in sizes]
    return np.unique(np.concatenate([*largest, np.linspace(0, count - 1, POINTS // 2).astype(int)]))


def _probabilities(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in np.clip(np.nan_to_num(values), _SMALLEST, 2.0).tolist()]


def _log_ratios(log_ratio: np.ndarray) -> Figure | None:
    """How many tokens have which log π/μ; the outermost bars hold all that lies beyond."""
    finite = log_ratio[np.isfinite(log_ratio)].astype(np.float64)
    size = np.abs(finite)
    widest = float(np.quantile(size, _WIDEST)) if len(size) else 0.0
    widest = widest or float(size.max(initial=0.0))
    if not widest:
        return None
    width = 2 * widest / _BARS
    place = np.clip(np.floor((finite + widest) / width), 0, _BARS - 1).astype(int)
    counts = np.bincount(place, minlength=_BARS)
    lows = [-widest + width * bar for bar in range(_BARS)]
    spans = [f"{low:.3g} to {low + width:.3g}" for low in lows]
    spans[0] = f"below {lows[1]:.3g}, down to {finite.min():.3g}"
    spans[-1] = f"above {lows[-1]:.3g}, up to {finite.max():.3g}"
    bars = {
        "type": "bar",
        "name": "tokens",
        "x": [rounded(low + width / 2) for low in lows],
        "y": counts.tolist(),
        "marker": {"color": "var(--run-0)"},
        "customdata": spans,
        "hovertemplate": "%{customdata}: %{y:,} tokens<extra></extra>",
    }
    axes = {"xaxis": {"title": {"text": "log π/μ, nats"}}, "yaxis": {"title": {"text": "tokens"}}}
    return {"data": [bars], "layout": axes | {"bargap": 0.05, "hovermode": "closest", "showlegend": False}}


def _by_position(position: np.ndarray, discrepancy: np.ndarray) -> Figure | None:
    """Mean and 99th percentile of the discrepancy by place in the completion, in stretches of equal length."""
    if not len(position) or position.min() < 0 or position.max() == position.min():
        return None
    length = -(-(int(position.max()) + 1) // _POSITIONS)
    order = np.argsort(position, kind="stable")
    stretch = position[order] // length
    groups = np.split(discrepancy[order], np.flatnonzero(np.diff(stretch)) + 1)
    middles = (np.unique(stretch) * length + (length - 1) / 2).tolist()
    return _mean_and_tail(middles, groups, {"title": {"text": "position of the token in its completion"}})
