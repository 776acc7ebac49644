# SPDX-License-Identifier: Apache-2.0
"""What the numbers of a calibration mean: verdicts, and the tolerance to train with. No model is touched here."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dc_trl.commands.calibrate.grid import Grid, describe_grid
from dc_trl.commands.calibrate.scores import (
    Mean,
    Scores,
    describe,
    difference_stderr,
    mean_discrepancy,
    staleness,
)
from dc_trl.discrepancy import METRICS, valid_tokens

if TYPE_CHECKING:
    from dc_trl.commands.calibrate.measure import Measurement

PASS = "pass"
WARN = "warn"
FAIL = "fail"
NOT_RUN = "not run"

# A repeated pass must not be higher by both more than chance (four standard errors) and more than the default slack.
REPEAT_ERRORS = 4.0
REPEAT_RATIO = 1.25
# With fewer problems a standard error says little about chance.
REPEAT_PROBLEMS = 4
# The figures behind these thresholds, their command and their hardware are in docs/calibration.md, "The checks".
# After a nudge and a sync, a working sync gave 1.0 to 1.3 times the floor, one that forgets the head 3.4, a stale
# prefix cache 7. But the floor rises with the nudge where it makes a policy that was sure of itself unsure: to 26
# times, on one trained on sums. So the ratio alone convicts nobody.
SYNC_RATIO = 2.0
# Share of the change that the sampler missed, from which its weights are old: a dead sync came to 1.0.
DEAD_SHARE = 0.5
# Beyond two standard errors, above which a part of it was missed. Working syncs came to -0.10 to 0.004, one that
# forgets the head to 0.04, a stale prefix cache to 0.22.
PART_SHARE = 0.02
# Below this share of what a dead sync would show, a difference is rounding, however small the floor is.
SYNC_SHARE = 0.05
# A dead sync must show this far above the floor, or a part of one would be hidden.
SYNC_CONTRAST = 3.0
# Another temperature must fit by this factor better. Healthy int3 engines, whose rounding acts a little like a
# temperature, came to 0.83; raw log-probs at int4 to 0.66, at bf16 to 0.04.
TEMPERATURE_MARGIN = 0.7
# Misfit in nats at which two engines agree and no temperature can fit better.
AGREEMENT = 1e-4
# Relative standard error of the mean above which the tolerance is a guess. Under half of the slack of 1.25.
STDERR_SHARE = 0.1
# Rounding errors of adding and taking out adapters in float32 stay below; in bf16 they are far above.
WEIGHTS_MOVED = 1e-5
# A token of which one engine gives 150 times the probability of the other: no rounding of a sound model does that.
TAIL_NATS = 5.0
TAIL_SHARE = 0.01
# verl's alert threshold ("Rollout Correction" documentation).
LEAST_ESS = 0.3

_PAGE = "docs/troubleshooting.md"


@dataclass(frozen=True)
class Verdict:
    """One check: `status` is pass, warn, fail or not run; `message` has the numbers; `remedy` what to do, or ""."""

    name: str
    status: str
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class Plan:
    """What the run will do with the discrepancy: the recipe's metric, average and slack, and problems a batch."""

    metric: str
    average: str
    slack: float
    problems_per_batch: float


@dataclass(frozen=True)
class Recommendation:
    """`discrepancy_tolerance` and why; None where there is nothing to recommend."""

    tolerance: float | None
    reason: str


def check_scored(scores: Scores) -> Verdict:
    """Whether both engines gave a log-prob for every token."""
    tokens, valid = int(scores.mask.sum()), int(scores.valid.sum())
    unscored = tokens - int(valid_tokens(scores.sampling_logps, scores.mask).sum())
    name = "scored tokens"
    if not tokens:
        remedy = "Raise `max_completion_length`, or set `mask_truncated_completions: false`."
        return Verdict(name, FAIL, "No token counts: every completion is masked.", remedy)
    if unscored:
        message = f"{unscored} of {tokens} tokens have no sampling log-prob (NaN, infinite, above 0, a placeholder)."
        return Verdict(name, FAIL, message, f"{_PAGE}#nan-log-probs")
    if valid < tokens:
        message = f"{tokens - valid} of {tokens} tokens have no finite log-prob of the trainer's."
        return Verdict(name, FAIL, message, f"{_PAGE}#nan-log-probs")
    return Verdict(name, PASS, f"All {tokens} tokens have a sampling log-prob.")


def check_precision(floor: Mean, problems: int) -> Verdict:
    """Whether enough was sampled for the mean to be known."""
    name = "enough tokens"
    if not math.isfinite(floor.stderr):
        return Verdict(name, WARN, f"{problems} problem gives no standard error.", "Raise --problems.")
    share = floor.stderr / floor.value if floor.value else 0.0
    message = f"The mean is known to ±{share:.1%} (one standard error, over {problems} problems)."
    if share > STDERR_SHARE:
        return Verdict(name, WARN, message, "Raise --problems.")
    return Verdict(name, PASS, message)


def check_repeat(first: Scores, second: Scores, plan: Plan) -> Verdict:
    """Whether a second pass with the same weights, synced again, gives the same mean."""
    name = "repeat"
    before = mean_discrepancy(first, plan.metric, plan.average).value
    after = mean_discrepancy(second, plan.metric, plan.average).value
    error = difference_stderr(first, second, plan.metric, plan.average)
    message = (
        f"The same weights, synced again: {before:.3g} → {after:.3g}, standard error of the difference {error:.1g}."
    )
    if len(first.problems.unique()) < REPEAT_PROBLEMS:
        return Verdict(name, NOT_RUN, f"{message} Fewer than {REPEAT_PROBLEMS} problems.", "Raise --problems.")
    if after - before > REPEAT_ERRORS * error and after > REPEAT_RATIO * before:
        cause = "The sync corrupts what it sends (a second quantisation, merged adapters)"
        return Verdict(name, FAIL, message, f"{cause}: {_PAGE}#broken-or-stale-weight-sync")
    return Verdict(name, PASS, message)


def check_sync(
    floor: Scores, stale: Scores | None, nudged: Scores | None, undone: Scores | None, size: float | None
) -> Verdict:
    """Whether the engine followed when the weights were moved. In nats, where a nudge shows in every token.

    Args:
        floor: the passes before the nudge.
        stale: their samples, scored by the moved weights.
        nudged, undone: samples after the nudge and a sync, scored by the moved weights and by those before.
        size: relative size of the nudge.
    """
    name, page = "sync", f"{_PAGE}#broken-or-stale-weight-sync"
    if stale is None or nudged is None or undone is None or size is None:
        return Verdict(name, NOT_RUN, "No token was scored.")
    low = mean_discrepancy(floor, "logprob_diff", "token").value
    high = mean_discrepancy(stale, "logprob_diff", "token").value
    now = mean_discrepancy(nudged, "logprob_diff", "token").value
    missed = staleness(nudged, undone)
    numbers = (
        f"Weights moved by {size:.0%} and synced: mean |log π − log μ| {low:.3g} → {now:.3g}; a dead sync would give "
        f"{high:.3g}. The sampler missed {missed.value:.1%} ± {missed.stderr:.1%} of the move."
    )
    if not math.isfinite(now):
        return Verdict(name, FAIL, f"{numbers} The engine gave no log-probs.", page)
    if missed.value > DEAD_SHARE and high > (1 + SYNC_SHARE) * low:
        return Verdict(name, FAIL, f"{numbers} The engine samples with the old weights.", page)
    if now > max(SYNC_RATIO * low, low + SYNC_SHARE * (high - low)):
        if missed.value > PART_SHARE + 2 * missed.stderr:
            remedy = f"{_PAGE}#stale-prefix-cache, then #broken-or-stale-weight-sync"
            return Verdict(name, FAIL, f"{numbers} A cache, or part of the weights, is old.", remedy)
        message = (
            f"{numbers} The rise does not follow the move: the moved policy is less sure of itself, and the engines "
            "differ more on it. A small part that stayed old would be hidden."
        )
        return Verdict(name, WARN, message, "Raise --problems.")
    if high < SYNC_CONTRAST * low:
        return Verdict(name, NOT_RUN, f"{numbers} The floor is so high that it would hide a part that stayed old.")
    return Verdict(name, PASS, numbers)


def check_weights(moved: float) -> Verdict:
    """Whether syncs only read the trainer's weights."""
    message = f"The trainer's weights moved by {moved:.1g} of their norm over two syncs."
    if moved > WEIGHTS_MOVED:
        return Verdict("weights untouched", WARN, message, f"{_PAGE}#lora-on-a-bf16-base")
    return Verdict("weights untouched", PASS, message)


def check_temperature(
    asked: float, misfits: dict[float, float], other: float | None, other_misfits: dict[float, float] | None
) -> Verdict:
    """Whether the engine's log-probs are those of the temperature asked for, at the recipe's and at another one.

    Args:
        asked, other: the temperatures that were asked for.
        misfits, other_misfits: mean |log π − log μ| by the temperature at which the trainer scored.
    """
    name = "temperature"
    parts = []
    for temperature, table in ((asked, misfits), (other, other_misfits)):
        if temperature is None or table is None:
            continue
        own = table[temperature]
        best = min(table, key=lambda t: table[t])
        if own > AGREEMENT and table[best] < TEMPERATURE_MARGIN * own:
            message = (
                f"Asked for {temperature:g}, the engine's log-probs fit {best:g} better: mean |log π − log μ| "
                f"{table[best]:.3g} against {own:.3g}."
            )
            anchor = "raw-log-probs-from-the-server" if best == 1.0 else "temperature"
            return Verdict(name, FAIL, message, f"{_PAGE}#{anchor}")
        others = ", ".join(f"{table[t]:.3g} at {t:g}" for t in sorted(table) if t != temperature)
        parts.append(f"asked for {temperature:g}, mean |log π − log μ| {own:.3g} there, {others}")
    message = f"No other temperature fits clearly better: {'; '.join(parts)}."
    if other_misfits is None:
        remedy = "Set `temperature` alone, not in `generation_kwargs`."
        return Verdict(name, WARN, f"{message} No other temperature was tried.", remedy)
    return Verdict(name, PASS, message)


def check_tail(scores: Scores, ess: float | None) -> Verdict:
    """Whether a few tokens are far off, which a mean of |π − μ| does not show."""
    name = "tail"
    size = scores.log_ratios().abs()
    if not len(size):
        return Verdict(name, NOT_RUN, "No token was scored.")
    share = (size > TAIL_NATS).double().mean().item()
    message = (
        f"Largest |log π − log μ| {size.max().item():.3g}; {share:.2%} of the tokens above {TAIL_NATS:g}; effective "
        f"sample size {math.nan if ess is None else ess:.3g}."
    )
    if share > TAIL_SHARE:
        remedy = f"Weights that are old in part, another tokenizer or template: {_PAGE}#at-a-glance"
        return Verdict(name, FAIL, message, remedy)
    if share or (ess is not None and ess < LEAST_ESS):
        remedy = f"{_PAGE}#mixture-of-experts-routing, or a rollout precision that the model bears"
        return Verdict(name, WARN, message, remedy)
    return Verdict(name, PASS, message)


def check_grid(grid: Grid | None, floor: Mean, off_grid: Mean | None) -> Verdict:
    """Whether the floor at step 0 is that of training, and whether training will reach the sampler."""
    name = "rounding"
    if grid is None:
        return Verdict(name, NOT_RUN, "No token was scored.")
    message = describe_grid(grid, floor, off_grid)
    if grid.loses_updates:
        return Verdict(name, WARN, message, f"Set sync_rounding='dither': {_PAGE}#rounding-at-the-weight-sync")
    return Verdict(name, PASS, message)


def judge(measurement: "Measurement", plan: Plan, temperature: float) -> list[Verdict]:
    """Every check of a measurement, in the order in which a cause is to be looked for."""
    verdicts = [check_scored(measurement.floor)]
    if not bool(measurement.floor.valid.any()):
        return verdicts
    floor = mean_discrepancy(measurement.floor, plan.metric, plan.average)
    table = describe(measurement.floor)
    return [
        *verdicts,
        check_precision(floor, table["problems"]),
        check_temperature(temperature, measurement.misfits, measurement.other_temperature, measurement.other_misfits),
        check_repeat(measurement.first, measurement.second, plan),
        check_sync(
            measurement.floor, measurement.stale, measurement.nudged, measurement.undone, measurement.nudge_size
        ),
        check_weights(measurement.weights_moved),
        check_tail(measurement.floor, table["dc"]["ess"]),
        check_grid(measurement.grid, floor, off_grid_floor(measurement, plan)),
    ]


def off_grid_floor(measurement: "Measurement", plan: Plan) -> Mean | None:
    """The mean with the weights off the sampler's grid; None where it was not measured."""
    if measurement.off_grid is None:
        return None
    return mean_discrepancy(measurement.off_grid, plan.metric, plan.average)


def conclude(measurement: "Measurement", plan: Plan, verdicts: list[Verdict]) -> Recommendation:
    """The tolerance to train with, unless a check failed."""
    failed = ", ".join(failures(verdicts))
    if failed:
        return Recommendation(None, f"Failed: {failed}. A tolerance would hide it, so none is recommended.")
    floor, off_grid = mean_discrepancy(measurement.floor, plan.metric, plan.average), off_grid_floor(measurement, plan)
    if measurement.off_grid is None or off_grid is None or not off_grid.value > floor.value:
        return recommend(measurement.floor, plan)
    chosen = recommend(measurement.off_grid, plan, "floor off the grid")
    reason = (
        f"{chosen.reason} At step 0 it is {floor.value:.3g}, but training leaves the grid, so that one will not hold."
    )
    if measurement.grid is not None and measurement.grid.loses_updates:
        reason += " With sync_rounding='nearest' neither will: see the check of the rounding."
    return Recommendation(chosen.tolerance, reason)


def recommend(scores: Scores, plan: Plan, name: str = "floor") -> Recommendation:
    """The tolerance of a healthy engine: the floor times the slack, or above the noise of a batch's mean if that is
    more. The rule is ours; arXiv 2606.08779 gives numbers, not how they were found.

    Args:
        scores: of the passes with equal weights.
        plan: the run's.
        name: of the floor, in the reason.
    """
    floor = mean_discrepancy(scores, plan.metric, plan.average)
    if floor.value < METRICS[plan.metric].agreeing:
        reason = (
            f"The engines agree: a mean of {floor.value:.2g} is rounding in float32. No constraint is needed; "
            "`constraint: none` measures on."
        )
        if not scores.log_ratios().any():
            reason += f" Not one token differs, which two engines seldom manage: {_PAGE}#nothing-differs-at-all"
        return Recommendation(None, reason)
    slack = plan.slack * floor.value
    # Both passes sampled each problem; a training batch has its own problems, once.
    noise = 3 * floor.spread / math.sqrt(plan.problems_per_batch) if math.isfinite(floor.spread) else 0.0
    if floor.value + noise > slack:
        return Recommendation(
            _rounded(floor.value + noise),
            f"The {name} {floor.value:.3g} plus three standard errors of a training batch's mean ({noise / 3:.2g} "
            f"each, {plan.problems_per_batch:g} problems): `tolerance_slack` {plan.slack:g} alone would give "
            f"{slack:.3g}, which noise would exceed.",
        )
    return Recommendation(
        _rounded(slack),
        f"The {name} {floor.value:.3g} times `tolerance_slack` {plan.slack:g}. Three standard errors of a training "
        f"batch's mean would need {floor.value + noise:.3g} or more.",
    )


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def healthy(verdicts: list[Verdict]) -> bool:
    """Whether no check failed."""
    return all(verdict.status != FAIL for verdict in verdicts)


def failures(verdicts: list[Verdict]) -> Iterator[str]:
    """Names of the checks that failed."""
    return (verdict.name for verdict in verdicts if verdict.status == FAIL)
