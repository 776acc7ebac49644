# SPDX-License-Identifier: Apache-2.0
"""What one pass of a calibration sampled and scored, and its statistics: tables, standard errors, tolerance.

Shapes: B completions, T tokens of the longest one. Numbers in, numbers out; no model is touched here.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dc_trl.discrepancy import METRICS, discrepancy_metrics, token_discrepancy, valid_tokens

# Edges of the buckets of π. An engine that rounds is furthest off, in |π − μ|, where π is neither 0 nor 1; in
# |log π − log μ| where π is small.
PROBABILITY_EDGES = (0.0, 1e-4, 1e-2, 0.1, 0.5, 0.9, 1.0)

# Changes of a log-prob count up to this, in nats, so that a few tokens do not decide.
CLIP = 1.0


@dataclass(frozen=True)
class Scores:
    """Log-probs of both engines for the completions of a pass.

    Attributes:
        train_logps, sampling_logps: log π and log μ, (B, T) float32, as the engines gave them.
        mask: (B, T) bool, tokens that count as training counts them, unscored ones included.
        problems: (B,) int64, which problem a completion belongs to.
        cut: (B,) bool, completions that ended at `max_completion_length`.
    """

    train_logps: Tensor
    sampling_logps: Tensor
    mask: Tensor
    problems: Tensor
    cut: Tensor

    @property
    def valid(self) -> Tensor:
        """(B, T) bool: tokens that count and that both engines scored."""
        return valid_tokens(self.sampling_logps, self.mask, self.train_logps)

    def discrepancy(self, metric: str) -> Tensor:
        """(B, T), 0 at tokens that are not valid."""
        return torch.where(self.valid, token_discrepancy(self.train_logps, self.sampling_logps, metric), 0.0)

    def log_ratios(self) -> Tensor:
        """log π − log μ of the valid tokens, (n,)."""
        return (self.train_logps - self.sampling_logps)[self.valid]


def merge(records: list[dict[str, Any]]) -> Scores:
    """One `Scores` of the records of several batches and processes, whose T may differ.

    Args:
        records: `train_logps`, `sampling_logps`, `mask` (b, t), `cut` (b,), and `prompts`, b tuples of token ids.
    """
    width = max(record["mask"].size(1) for record in records)
    numbers: dict[tuple[int, ...], int] = {}
    problems = [numbers.setdefault(prompt, len(numbers)) for record in records for prompt in record["prompts"]]

    def padded(key: str) -> Tensor:
        parts = [record[key] for record in records]
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.size(1))) for part in parts])

    return Scores(
        train_logps=padded("train_logps"),
        sampling_logps=padded("sampling_logps"),
        mask=padded("mask").bool(),
        problems=torch.tensor(problems),
        cut=torch.cat([record["cut"] for record in records]),
    )


def join(first: Scores, second: Scores) -> Scores:
    """Both passes in one; they must have sampled the same problems in the same order."""
    parts = [
        {
            "train_logps": scores.train_logps,
            "sampling_logps": scores.sampling_logps,
            "mask": scores.mask,
            "cut": scores.cut,
            "prompts": [(int(problem),) for problem in scores.problems],
        }
        for scores in (first, second)
    ]
    return merge(parts)


@dataclass(frozen=True)
class Mean:
    """A mean discrepancy, its standard error, and the spread of one problem's mean, all in units of the metric."""

    value: float
    stderr: float
    spread: float


def mean_discrepancy(scores: Scores, metric: str, average: str) -> Mean:
    """The mean as the trainer averages it, with a standard error clustered by problem.

    Completions of one problem resemble each other, so problems, not completions or tokens, are what was drawn
    independently. The mean is a ratio Σ S_c / Σ N_c over problems c; its standard error is that of a ratio estimator.

    Args:
        scores: a pass.
        metric: the discrepancy metric.
        average: `"trajectory"`, over completions of their token means, or `"token"`, over all tokens.

    Returns:
        NaN throughout where no token counts; a NaN standard error with fewer than two problems.
    """
    totals, counts = _clusters(scores, metric, average)
    n = len(totals)
    if not counts.sum():
        return Mean(math.nan, math.nan, math.nan)
    value = totals.sum() / counts.sum()
    if n < 2:
        return Mean(float(value), math.nan, math.nan)
    residuals = totals - value * counts
    spread = np.sqrt((residuals**2).sum() / (n - 1)) / counts.mean()
    return Mean(float(value), float(spread / math.sqrt(n)), float(spread))


def difference_stderr(first: Scores, second: Scores, metric: str, average: str) -> float:
    """Standard error of the difference of two passes' means over the same problems, paired by problem."""
    residuals = []
    for scores in (first, second):
        totals, counts = _clusters(scores, metric, average)
        residuals.append((totals - totals.sum() / counts.sum() * counts) / counts.mean())
    n = min(map(len, residuals))
    difference = residuals[0][:n] - residuals[1][:n]
    return float(np.sqrt((difference**2).sum() / (n - 1) / n)) if n > 1 else math.nan


@dataclass(frozen=True)
class Staleness:
    """Share of a change of the weights that the sampler missed, and its standard error."""

    value: float
    stderr: float


def staleness(new: Scores, old: Scores) -> Staleness:
    """How much of a change of the weights the sampler missed: 0 if it samples with the new ones, 1 with the old ones.

    The slope, through the origin, of log π_new − log μ on log π_new − log π_old over the tokens that were sampled
    after the sync. What the sampler's precision adds to log μ has nothing to do with the change, so it makes the slope
    less certain and no larger; a sampler with old weights misses the change itself. Ours.

    Args:
        new: samples after the change and a sync, scored by the new weights.
        old: the same samples, scored by the old weights.

    Returns:
        NaN where the change moved no token's log-prob; a standard error clustered by problem.
    """
    valid = new.valid & old.valid
    change = _clipped(new.train_logps - old.train_logps, valid)
    missed = _clipped(new.train_logps - new.sampling_logps, valid)
    size = (change**2).sum()
    if not size:
        return Staleness(math.nan, math.nan)
    slope = (change * missed).sum() / size
    residuals = (change * (missed - slope * change)).sum(1)
    return Staleness(slope.item(), (_by_problem(residuals, new.problems).norm() / size).item())


def _clipped(difference: Tensor, valid: Tensor) -> Tensor:
    """Differences of log-probs, (B, T) float64, within ±`CLIP`; 0 at tokens that are not valid."""
    return torch.where(valid, difference.clamp(-CLIP, CLIP), 0.0).double()


def _clusters(scores: Scores, metric: str, average: str) -> tuple[np.ndarray, np.ndarray]:
    """Each problem's sum S_c and weight N_c, (problems,) float64 each."""
    valid = scores.valid
    totals = scores.discrepancy(metric).double().sum(1)
    weights = valid.double().sum(1)
    if average == "trajectory":
        totals = totals / weights.clamp(min=1)
        weights = valid.any(1).double()
    return _by_problem(totals, scores.problems).numpy(), _by_problem(weights, scores.problems).numpy()


def _by_problem(values: Tensor, problems: Tensor) -> Tensor:
    """Sums of the completions' values, (B,), over each problem, (problems,) float64."""
    size = int(problems.max()) + 1
    return torch.zeros(size, dtype=torch.float64).index_add_(0, problems, values)


# Tables


def describe(scores: Scores) -> dict[str, Any]:
    """Everything that is reported of a pass: each metric's distribution, by probability and position, and the rest.

    Returns:
        `tokens`, `completions`, `problems`, `cut_fraction`, `mean_length`; `metrics` (metric → mean, p50, p90, p99,
        max over tokens); `by_probability` and `by_position` (rows of `from`, `to`, `tokens` and each metric's mean);
        and `dc`, what the trainer would log under `dc/`. Means are over tokens. Numbers that do not exist are None.
    """
    valid = scores.valid
    values = {metric: scores.discrepancy(metric)[valid].double().numpy() for metric in METRICS}
    logged = discrepancy_metrics(scores.train_logps, scores.sampling_logps, scores.mask)
    probability = scores.train_logps[valid].double().exp().numpy()
    position = valid.nonzero()[:, 1].numpy()
    return {
        "tokens": int(valid.sum()),
        "completions": len(scores.problems),
        "problems": int(scores.problems.max()) + 1,
        "cut_fraction": float(scores.cut.double().mean()),
        "mean_length": float(scores.mask.sum(1).double().mean()),
        "metrics": {metric: distribution(x) for metric, x in values.items()},
        "by_probability": _binned(probability, np.array(PROBABILITY_EDGES), values),
        "by_position": _binned(position, position_edges(valid.size(1)), values),
        "dc": {key: _finite(value.item()) for key, value in logged.items()},
    }


def distribution(values: np.ndarray) -> dict[str, float | None]:
    """Mean, median, 90th and 99th percentile and maximum, exact; None where there are no values."""
    if not len(values):
        return dict.fromkeys(("mean", "p50", "p90", "p99", "max"))
    return {
        "mean": float(values.mean()),
        "p50": float(np.quantile(values, 0.5)),
        "p90": float(np.quantile(values, 0.9)),
        "p99": float(np.quantile(values, 0.99)),
        "max": float(values.max()),
    }


def position_edges(longest: int) -> np.ndarray:
    """Edges of position bins that double, 0, 1, 2, 4, … up to the longest completion: early tokens are the ones that
    a stale prefix cache touches first."""
    edges = [0]
    while edges[-1] < longest:
        edges.append(min(max(2 * edges[-1], 1), longest))
    return np.array(edges)


def _binned(where: np.ndarray, edges: np.ndarray, values: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Token count and mean of each metric by bin; the last bin includes its upper edge."""
    index = np.clip(np.searchsorted(edges, where, side="right") - 1, 0, len(edges) - 2)
    rows = []
    for i in range(len(edges) - 1):
        inside = index == i
        means = {metric: float(x[inside].mean()) if inside.any() else None for metric, x in values.items()}
        rows.append({"from": edges[i].item(), "to": edges[i + 1].item(), "tokens": int(inside.sum()), **means})
    return rows


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
