# SPDX-License-Identifier: Apache-2.0
"""What is kept of a run: short curves of what it logged, and the outcomes that the protocol names. Plain Python.

The sampler is the deployed policy and every problem is new to it, so the reward that a run logs is the accuracy of the
deployed policy, sampled at temperature 1, measured on as many fresh problems as a rollout has groups.
"""

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

CURVE_POINTS = 40

CURVES = {
    "accuracy": "reward",
    "entropy": "entropy",
    "discrepancy": "dc/discrepancy/mean",
    "discrepancy_p99": "dc/discrepancy/p99",
    "log_ppl": "dc/log_ppl_abs_diff",
    "k3_kl": "dc/k3_kl",
    "chi2": "dc/chi2_token",
    "ess": "dc/ess",
    "multiplier": "dc/multiplier",
    "tolerance": "dc/tolerance",
    "penalty_share": "dc/penalty_share",
    "grad_norm": "grad_norm",
    "length": "completions/mean_length",
    "seen": "dc/sync/update_seen_since_start",
    "lr": "learning_rate",
}
"""Name of a curve → key of the log."""


def curve(log: Sequence[dict[str, Any]], key: str, points: int = CURVE_POINTS) -> list[float | None]:
    """What a run logged under a key, as means over at most `points` stretches of equal length; None for NaN."""
    values = [entry[key] for entry in log if entry.get(key) is not None]
    if not values:
        return []
    bins = min(points, len(values))
    edges = [round(i * len(values) / bins) for i in range(bins + 1)]
    return [_mean(values[a:b]) for a, b in zip(edges, edges[1:], strict=False)]


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(f"{mean(known):.4g}") if known else None


def curves(log: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Every curve that the log has, by its name."""
    found = {name: curve(log, key) for name, key in CURVES.items()}
    return {name: values for name, values in found.items() if values}


def outcomes(log: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The outcomes of the protocol that come from the log.

    `accuracy` is the primary one, the mean over the last quarter of the rollouts, and `accuracy_all` that over the
    whole run, a measure of the speed of learning. `best` is the highest mean of four rollouts in a row, `final` that
    of the last four, `collapsed` whether it is below half of the best. Other curves are averaged over the last
    quarter, as `…_first` over the first tenth, as `…_all` over the run, and `…_peak` is the highest mean of four.
    """
    accuracy = [entry["reward"] for entry in log if entry.get("reward") is not None]
    if not accuracy:
        raise ValueError("the log has no reward: the run made no rollout.")
    fours = _means_of_four(accuracy)
    found: dict[str, float | None] = {
        "accuracy": mean(last_quarter(accuracy)),
        "accuracy_all": mean(accuracy),
        "best": max(fours),
        "final": fours[-1],
        "collapsed": float(fours[-1] < 0.5 * max(fours)),
    }
    for name, key in CURVES.items():
        values = [entry[key] for entry in log if entry.get(key) is not None]
        if values and name != "accuracy":
            found[name] = _mean(last_quarter(values))
            found[f"{name}_first"] = _mean(values[: max(1, len(values) // 10)])
            found[f"{name}_all"] = _mean(values)
            found[f"{name}_peak"] = max(_means_of_four([v for v in values if math.isfinite(v)]), default=None)
    return {name: None if value is None else float(f"{value:.5g}") for name, value in found.items()}


def _means_of_four(values: Sequence[float]) -> list[float]:
    """Means over each four values in a row; over all where there are fewer, and none of none."""
    if not values:
        return []
    return [mean(values[i : i + 4]) for i in range(max(1, len(values) - 3))]


def last_quarter(values: Sequence[float]) -> Sequence[float]:
    """The last quarter of a series, one value at least."""
    return values[-max(1, len(values) // 4) :]
