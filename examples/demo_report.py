# SPDX-License-Identifier: Apache-2.0
"""What the quickstart shows: a progress bar while it trains, then a table, and what it does not show."""

from typing import Any

import demo_quiet  # noqa: F401
from tqdm import tqdm
from transformers import TrainerCallback

from dc_trl.training.line_callbacks import standing

DISCREPANCY = "dc/discrepancy/mean"
MULTIPLIER = "dc/multiplier"
ENTROPY = "entropy"
REWARD = "reward"
UPDATE_SEEN = "dc/sync/update_seen_since_start"

Log = list[dict[str, Any]]


class ProgressCallback(TrainerCallback):
    """The line that `dc-trl train` prints at each step, in one place beside a progress bar."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Opens the bar."""
        line = "{n_fmt}/{total_fmt} |{bar:4}| {desc}"
        self.bar = tqdm(total=state.max_steps, bar_format=line, mininterval=0.5, dynamic_ncols=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Moves the bar to the step that was just logged."""
        if "reward" not in logs:
            return
        self.bar.set_description_str(standing(logs), refresh=False)
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Closes the bar."""
        self.bar.close()


def series(log: Log, key: str) -> list[float]:
    """The values that training logged under a key, in order; steps without one, or with NaN, are left out."""
    return [entry[key] for entry in log if "reward" in entry and entry.get(key) is not None]


def table(summary: dict[str, Any]) -> str:
    """Accuracy and length on the held-out problems, before and after, as text."""
    rows = {"accuracy, sampled": ("accuracy", ".1%"), "accuracy, greedy": ("greedy", ".1%")}
    rows |= {"tokens per completion, sampled": ("length", ".1f")}
    lines = [f"  {'':<32}{'before':>9}{'after':>9}"]
    for label, (key, form) in rows.items():
        before, after = (format(summary[f"{key}_{when}"], form) for when in ("before", "after"))
        lines.append(f"  {label:<32}{before:>9}{after:>9}")
    return "\n".join(lines)


def side_by_side(summaries: dict[str, dict[str, Any]]) -> str:
    """Runs from the same start as the columns of a table, and what it shows, as text.

    Args:
        summaries: of the runs, by their names.
    """
    first = next(iter(summaries.values()))
    rows = [("accuracy on fresh problems, all steps", [None, *(s["accuracy_all"] for s in summaries.values())], ".1%")]
    for label, key in (("held-out accuracy, sampled", "accuracy"), ("held-out accuracy, greedy", "greedy")):
        rows.append((label, [first[f"{key}_before"], *(s[f"{key}_after"] for s in summaries.values())], ".1%"))
    for label, key, form in (
        ("discrepancy, mean |π − μ|, all steps", "discrepancy_all", ".4f"),
        ("tolerance, calibrated", "tolerance", ".4f"),
        ("multiplier λ, at its highest", "multiplier_max", ".3f"),
        ("share of the training the sampler has", "update_seen", ".0%"),
    ):
        rows.append((label, [None, *(s[key] for s in summaries.values())], form))
    lines = [f"  {'':<40}" + "".join(f"{name:>12}" for name in ("before", *summaries))]
    for label, values, form in rows:
        lines.append(f"  {label:<40}" + "".join(f"{'' if v is None else format(v, form):>12}" for v in values))
    return "\n".join(lines)


def conclusion(summary: dict[str, Any], log: Log) -> str:
    """What the run shows about the constraint, and what it does not show."""
    discrepancy, entropy = (
        f"{summary[f'{key}_first']:.2g} in the first tenth of the steps, {summary[f'{key}_last']:.2g} in the last"
        for key in ("discrepancy", "entropy")
    )
    return (
        f"Discrepancy, mean |π − μ|: {discrepancy}.\n{_constraint_line(summary, log)}\n"
        f"A discrepancy falls with the entropy too ({entropy}):\n"
        "a small mean alone does not prove that the engines agree; the log has dc/discrepancy/p99 and max.\n"
        "The accuracy is what reinforcement learning gained with the constraint in place. Whether the constraint\n"
        "helped or hurt, one run cannot say: compare with --constraint none over several seeds."
    )


def _constraint_line(summary: dict[str, Any], log: Log) -> str:
    if summary["constraint"] == "none":
        return "Nothing was constrained: it was only measured."
    if summary["tolerance"] is None:
        return "The run ended while the tolerance was being calibrated, so nothing was constrained."
    violations, share = series(log, "dc/violation"), max(series(log, "dc/penalty_share"), default=0.0)
    return (
        f"It was above the tolerance, {summary['tolerance']:.2g}, in {sum(v > 0 for v in violations)} of "
        f"{len(violations)} steps; λ ended at {summary['multiplier_last']:.3f}, and the penalty was at most\n"
        f"{share:.1%} of the advantage{': the constraint was all but inactive.' if share < 0.01 else '.'}"
    )
