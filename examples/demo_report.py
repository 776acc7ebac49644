# SPDX-License-Identifier: Apache-2.0
"""What the quickstart shows: a progress bar while it trains, then a table, a plot, and what they do not show."""

from pathlib import Path
from typing import Any

import demo_quiet  # noqa: F401
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import TrainerCallback

DISCREPANCY = "dc/discrepancy/mean"
TOLERANCE = "dc/tolerance"
MULTIPLIER = "dc/multiplier"
ENTROPY = "entropy"

# Title of each panel, and the logged values drawn in it.
PANELS: dict[str, tuple[str, ...]] = {
    "reward": ("reward",),
    "discrepancy, mean |π − μ|": (DISCREPANCY, TOLERANCE),
    "multiplier λ": (MULTIPLIER,),
    "tokens per completion": ("completions/mean_length",),
    "entropy, nats": (ENTROPY,),
}

Log = list[dict[str, Any]]


class ProgressCallback(TrainerCallback):
    """One line that says how the run stands: reward, discrepancy against tolerance, and multiplier."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Opens the bar."""
        line = "DC-GRPO {n_fmt}/{total_fmt} |{bar:12}| {desc}"
        self.bar = tqdm(total=state.max_steps, bar_format=line, mininterval=0.5)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Moves the bar to the step that was just logged."""
        if "reward" not in logs:
            return
        limit = f" of {logs[TOLERANCE]:.4f}" if TOLERANCE in logs else ""
        self.bar.set_description_str(
            f"reward {logs['reward']:.2f}, discrepancy {logs[DISCREPANCY]:.4f}{limit}, λ {logs[MULTIPLIER]:.3f}",
            refresh=False,
        )
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Closes the bar."""
        self.bar.close()


def series(log: Log, key: str) -> list[float]:
    """The values that training logged under a key, in order; steps without one, or with NaN, are left out."""
    return [entry[key] for entry in log if "reward" in entry and entry.get(key) is not None]


def plot_curves(log: Log, path: Path) -> None:
    """Draws `PANELS` against the training step and saves them as PNG."""
    entries = [entry for entry in log if "reward" in entry]
    figure = Figure(figsize=(3.2 * len(PANELS), 2.8), layout="constrained")
    for axis, (title, keys) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for key, style in zip(keys, ("-", "--"), strict=False):
            points = [entry for entry in entries if entry.get(key) is not None]
            steps, values = [entry["step"] for entry in points], [entry[key] for entry in points]
            axis.plot(steps, values, style, linewidth=1.2, label=key.removeprefix("dc/"))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def table(summary: dict[str, Any]) -> str:
    """Accuracy and length on the held-out problems, before and after, as text."""
    rows = {"accuracy, sampled": ("accuracy", ".1%"), "accuracy, greedy": ("greedy", ".1%")}
    rows |= {"tokens per completion, sampled": ("length", ".1f")}
    lines = [f"  {'':<32}{'before':>9}{'after':>9}"]
    for label, (key, form) in rows.items():
        before, after = (format(summary[f"{key}_{when}"], form) for when in ("before", "after"))
        lines.append(f"  {label:<32}{before:>9}{after:>9}")
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
