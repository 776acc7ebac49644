# SPDX-License-Identifier: Apache-2.0
"""Length-decay (arXiv 2602.01826): Algorithm 1's learning-rate scale, its application, and a detector of surges."""

import math
from bisect import bisect_right
from statistics import median
from typing import Any

_MIN_RECENT = 3  # the smallest median that a single outlier cannot move far
_MIN_BASELINE = 5

# The attributes from which schedulers compute rates: torch's LambdaLR and kin and CyclicLR; ReduceLROnPlateau and
# GreedyLR (bounds); DeepSpeed's WarmupLR, WarmupDecayLR, OneCycle and WarmupCosineLR.
_RATE_LISTS = ("base_lrs", "min_lrs", "max_lrs", "delta_lrs", "org_lrs")


def length_decay_scale(step: int, period: int, min_ratio: float = 0.1) -> float:
    """Factor on the base learning rate at update `step`: max(0.5 ** (step // period), min_ratio).

    Algorithm 1 of arXiv 2602.01826: before update t, if t mod T_decay = 0, η_t = max(η_{t−1} / 2, η_∞). The clock
    starts at step 0, wherever the surge was found, so update number `period` is the first with half the rate.

    Args:
        step: number t of the update that will use the rate; the first update is 1.
        period: T_decay, in updates.
        min_ratio: η_∞ / η_0; the paper's is 0.1.

    Raises:
        ValueError: if `step` is negative, `period` is not a positive integer, or `min_ratio` is outside (0, 1].
    """
    if step < 0:
        raise ValueError(f"`step` is {step}: updates are counted upwards from 0. Pass the number of the update.")
    check_period(period)
    check_min_ratio(min_ratio)
    return max(0.5 ** (step // period), min_ratio)


def decay_period(surge_step: int, factor: float = 1.8) -> int:
    """T_decay = round(factor · surge_step), at least 1 (arXiv 2602.01826, section 4.2).

    Args:
        surge_step: step of the surge, from 1.
        factor: period as a multiple of it; the paper's is 1.8.

    Returns:
        The period, in updates.

    Raises:
        ValueError: if `surge_step` is below 1, or `factor` is not finite and positive.
    """
    if surge_step < 1:
        raise ValueError(f"`surge_step` is {surge_step}: a period needs a surge at step 1 or later. Pass such a step.")
    check_factor(factor)
    return max(1, round(factor * surge_step))


def check_period(period: int, name: str = "period") -> None:
    """Raises ValueError unless `period` is an integer of 1 or more (updates)."""
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise ValueError(f"`{name}` is {period!r}: it counts updates between halvings. Pass an integer of 1 or more.")


def check_factor(factor: float, name: str = "factor") -> None:
    """Raises ValueError unless `factor` is finite and positive."""
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"`{name}` is {factor}: the period would not be positive. Pass e.g. the paper's 1.8.")


def check_min_ratio(min_ratio: float, name: str = "min_ratio") -> None:
    """Raises ValueError unless 0 < `min_ratio` ≤ 1."""
    if not 0 < min_ratio <= 1:
        raise ValueError(
            f"`{name}` is {min_ratio}: it is the floor of the decay as a fraction of the initial rate, in (0, 1]. "
            "Pass e.g. the paper's 0.1, or 1 for no decay."
        )


class LengthSurgeDetector:
    """Finds, online, the step at which the mean response length triples "in just a few steps" (arXiv 2602.01826, 3.3).

    The paper found surges by eye; this rule and its values are ours:

        surge_ratio = median length of the last `window` steps
                      / median length of the `baseline` steps that ended `lag` steps ago

    It fires when surge_ratio ≥ ratio ** (1 − margin) at every observation of `patience` consecutive steps (at two
    observations at least). The medians pass over single outliers, the lag keeps the rise out of its own baseline and
    lets slow growth cancel, and the margin is there because noise keeps half the windows of an exact tripling below 3.
    It fires once; with the defaults some 9 steps after the middle of a fast rise.

    Steps may have gaps (metrics logged now and then, a resumed run). Windows are in steps, but hold at least the
    last 3 observations (5 in the baseline), so that a surge among sparse ones is found, later. Until there is such a
    baseline, 35 steps after the start, nothing fires; a surge within the first 20 steps or so is not seen at all.

    What it cannot tell: healthy growth that triples within 50 steps or so fires too; so does a change of the data that
    makes answers three times longer; so may outliers where they are a tenth of all batches or more. A surge cut off by
    the length limit does not show.

    Args:
        ratio: growth that counts as a surge; above 1.
        window: length of the recent window, in steps.
        lag: distance from now back to the end of the baseline, in steps; at least `window`.
        baseline: length of the baseline, in steps.
        patience: number of consecutive steps above the threshold.
        margin: share of the growth, in logarithms, that is given up to noise; in [0, 1).

    Attributes:
        surge_step: the step at which it fired, or None.
        surge_ratio: the latest ratio, or None while there is no baseline.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        ratio: float = 3.0,
        window: int = 9,
        lag: int = 30,
        baseline: int = 40,
        patience: int = 4,
        margin: float = 0.08,
    ) -> None:
        if not (math.isfinite(ratio) and ratio > 1):
            raise ValueError(f"`ratio` is {ratio}: a surge is growth, so it must exceed 1. Pass e.g. the paper's 3.")
        for name, value in (("window", window), ("lag", lag), ("baseline", baseline), ("patience", patience)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}: it counts steps. Pass 1 or more.")
        if lag < window:
            raise ValueError(f"`lag` ({lag}) is below `window` ({window}): the windows would overlap. Raise `lag`.")
        if not 0 <= margin < 1:
            raise ValueError(f"`margin` is {margin}: it must leave a threshold above 1. Pass a value in [0, 1).")
        self.ratio, self.margin = ratio, margin
        self.window, self.lag, self.baseline, self.patience = window, lag, baseline, patience
        self.surge_step: int | None = None
        self.surge_ratio: float | None = None
        self._steps: list[int] = []
        self._lengths: list[float] = []
        self._above_since: int | None = None

    @property
    def last_step(self) -> int | None:
        """The newest step observed, or None."""
        return self._steps[-1] if self._steps else None

    @property
    def recent_length(self) -> float | None:
        """Median length over the recent window, in tokens; None before the third observation."""
        if len(self._steps) < _MIN_RECENT:
            return None
        return median(self._lengths[self._recent_start() :])

    def update(self, step: int, mean_length: float) -> bool:
        """Takes the mean response length (tokens) of one step; returns True once, when the surge is found.

        A length that is not finite or not positive is ignored (no completion was measured), and so is a step that is
        not newer than the last one (the batch was counted).
        """
        is_newer = self.last_step is None or step > self.last_step
        if not (math.isfinite(mean_length) and mean_length > 0 and is_newer):
            return False
        self._steps.append(int(step))
        self._lengths.append(float(mean_length))
        self.surge_ratio = self._ratio_now()
        if self.surge_ratio is None or self.surge_ratio < self.ratio ** (1 - self.margin):
            self._above_since = None
            return False
        if self._above_since is None:
            self._above_since = int(step)
        long_enough = step > self._above_since and step - self._above_since >= self.patience - 1
        if self.surge_step is None and long_enough:
            self.surge_step = int(step)
            return True
        return False

    def _recent_start(self) -> int:
        newest = bisect_right(self._steps, self._steps[-1] - self.window)
        return max(0, min(newest, len(self._steps) - _MIN_RECENT))

    def _ratio_now(self) -> float | None:
        """The current ratio; drops the observations that no later window can need."""
        baseline_end = self._steps[-1] - self.lag
        end = min(bisect_right(self._steps, baseline_end), self._recent_start())
        if end < _MIN_BASELINE:
            return None
        start = min(bisect_right(self._steps, baseline_end - self.baseline), end - _MIN_BASELINE)
        ratio = median(self._lengths[self._recent_start() :]) / median(self._lengths[start:end])
        del self._steps[:start], self._lengths[:start]
        return ratio

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs, as JSON-ready values; the settings come from the constructor."""
        return {
            "steps": list(self._steps),
            "lengths": list(self._lengths),
            "above_since": self._above_since,
            "surge_step": self.surge_step,
            "surge_ratio": self.surge_ratio,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`.

        Raises:
            ValueError: if steps and lengths do not pair up.
        """
        if len(state["steps"]) != len(state["lengths"]):
            raise ValueError(
                f"Stored detector has {len(state['steps'])} steps and {len(state['lengths'])} lengths: the checkpoint "
                "is damaged. Resume from an earlier one."
            )
        self._steps, self._lengths = list(state["steps"]), list(state["lengths"])
        self._above_since, self.surge_step = state["above_since"], state["surge_step"]
        self.surge_ratio = state["surge_ratio"]


class RateScaler:
    """Multiplies the learning rates that an optimizer and its scheduler hold, and knows by how much.

    Schedulers such as LambdaLR rewrite each `param_groups["lr"]` from `base_lrs` at every step; others, such as
    ReduceLROnPlateau, change it in place. So both are scaled: the scheduler's lists for all later updates, the
    optimizer's groups for the next one.

    Args:
        optimizer: has `param_groups`; Accelerate's and DeepSpeed's wrappers do.
        scheduler: a scheduler, or a wrapper with the real one in `.scheduler` (Accelerate, DeepSpeed), or None.

    Raises:
        ValueError: if the scheduler keeps its rates where they cannot be scaled.
    """

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        while hasattr(scheduler, "scheduler"):
            scheduler = scheduler.scheduler
        if hasattr(scheduler, "_schedulers") or any("max_lr" in group for group in optimizer.param_groups):
            raise ValueError(
                f"The learning-rate scheduler is {type(scheduler).__name__}: it keeps its rates in sub-schedulers or "
                "in the optimizer's groups, where length-decay cannot scale them. Use an `lr_scheduler_type`, e.g. "
                "'constant', or a LambdaLR."
            )
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._applied = dict.fromkeys(self._read(), 1.0)

    def apply(self, scale: float) -> None:
        """Brings every rate to `scale` times its unscaled value; nothing happens where it is there already."""
        for name, values in self._read().items():
            # The ratio to what is applied, not to a remembered rate: the base schedule moves in between.
            factor = scale / self._applied[name]
            self._applied[name] = scale
            if factor != 1:
                self._write(name, [value * factor for value in values])

    def state_dict(self) -> dict[str, Any]:
        """The rates as they stand and the scale in each, as JSON-ready values."""
        return {"applied": dict(self._applied), "rates": self._read()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Finds out which of the present rates already hold the saved scale.

        A checkpoint brings back most rates as they were saved, scaled. Some it does not: those of a scheduler that
        does not save its lists (DeepSpeed's), or all of them with `save_only_model`. A list that equals the saved one
        was restored with its scale; any other was built anew and is unscaled.
        """
        for name, values in self._read().items():
            saved = state["rates"].get(name, [])
            restored = len(saved) == len(values) and all(map(_is_same_rate, values, saved))
            self._applied[name] = state["applied"][name] if restored else 1.0

    def _read(self) -> dict[str, list[float]]:
        rates = {"lr": [float(group["lr"]) for group in self._optimizer.param_groups]}
        for name in _RATE_LISTS:
            values = getattr(self._scheduler, name, None)
            if isinstance(values, list | tuple):
                rates[name] = [float(value) for value in values]
        return rates

    def _write(self, name: str, values: list[float]) -> None:
        if name != "lr":
            setattr(self._scheduler, name, values)
            return
        for group, value in zip(self._optimizer.param_groups, values, strict=True):
            if hasattr(group["lr"], "fill_"):  # a tensor, as compiled and capturable optimizers hold it
                group["lr"].fill_(value)
            else:
                group["lr"] = value
        if hasattr(self._scheduler, "_last_lr"):
            self._scheduler._last_lr = values  # what `get_last_lr`, hence the logged learning rate, reads


def _is_same_rate(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=1e-6)  # some optimizers keep rates in single precision
