# SPDX-License-Identifier: Apache-2.0
"""What the report draws: for each panel the logged keys, and what healthy looks like (docs/metrics.md)."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

MAIN = "main"
SECOND = "second"
LIMIT = "limit"
POINTS = "points"

STYLES = {MAIN: "solid", SECOND: "dotted", LIMIT: "dashed", POINTS: "diamonds"}
"""How each kind of series is drawn, in words for the reader."""


@dataclass(frozen=True)
class Series:
    """One logged key. `kind` is one of `STYLES`; `band` names a key whose value is drawn as plus and minus."""

    key: str
    label: str
    kind: str = MAIN
    band: str | None = None


@dataclass(frozen=True)
class Row:
    """Series that share a vertical axis, with the axis' title (quantity and unit) and its share of the height."""

    title: str
    series: tuple[Series, ...]
    share: float = 1.0


@dataclass(frozen=True)
class Panel:
    """A chart, and the sentence beside it."""

    name: str
    title: str
    healthy: str
    rows: tuple[Row, ...]
    marks: str = ""


def _tail(name: str, title: str, unit: str, healthy: str, *series: Series) -> Panel:
    return Panel(name, title, healthy, (Row(unit, series),))


MAIN_PANELS = (
    Panel(
        "discrepancy",
        "Discrepancy against tolerance",
        "Healthy: flat at the stack’s floor, and below the tolerance. It also falls when the policy becomes certain: "
        "a fall is good news only where entropy and reward hold.",
        (
            Row(
                "mean of the batch",
                (
                    Series("dc/discrepancy/mean", "mean"),
                    Series("dc/tolerance", "tolerance", LIMIT),
                    Series("eval_dc/discrepancy/mean", "evaluation", POINTS),
                ),
                2.0,
            ),
            Row(
                "99th and 90th percentile over tokens",
                (Series("dc/discrepancy/p99", "99th percentile"), Series("dc/discrepancy/p90", "90th", SECOND)),
            ),
            Row("median over tokens", (Series("dc/discrepancy/p50", "median"),)),
        ),
        marks="calibration",
    ),
    Panel(
        "reward",
        "Reward",
        "Healthy: rises, then holds. If both engines use the same wrong weights or template they agree, and only the "
        "reward shows it.",
        (
            Row(
                "mean ± standard deviation",
                (Series("reward", "training", band="reward_std"), Series("eval_reward", "evaluation", POINTS)),
            ),
        ),
    ),
    Panel(
        "multiplier",
        "Multiplier and penalty",
        "Healthy: the multiplier stays strictly between 0 and its maximum, or at 0 where nothing is violated; the "
        "penalty’s share of the advantage stays below 0.1 (our limit), and a penalty alone moves few sequences.",
        (
            Row("multiplier λ", (Series("dc/multiplier", "multiplier"),)),
            Row("penalty share of |advantage|", (Series("dc/penalty_share", "penalty share"),)),
            Row("sequences with a penalty alone, fraction", (Series("dc/penalty_only", "penalty alone"),)),
        ),
    ),
    Panel(
        "length",
        "Completion length",
        "Healthy: no sudden change. A surge, the mean length tripling within a few steps, announces the collapse "
        "(length-decay §3.3) and sets the period of the decays.",
        (
            Row("tokens, mean", (Series("completions/mean_length", "mean"),), 2.0),
            Row("share cut off", (Series("completions/clipped_ratio", "cut off"),)),
        ),
        marks="decay",
    ),
    Panel(
        "learning_rate",
        "Learning rate",
        "Healthy: as its schedule says; length-decay halves it each period, down to a tenth. Too early a fall: set "
        "length_decay_period.",
        (Row("learning rate", (Series("learning_rate", "learning rate"),)),),
        marks="decay",
    ),
    Panel(
        "entropy",
        "Entropy",
        "Healthy: holds. When it collapses, π and μ both approach 1 and the discrepancy falls by itself, whatever the "
        "engines do.",
        (Row("nats per token", (Series("entropy", "entropy"),)),),
    ),
    Panel(
        "grad_norm",
        "Gradient norm",
        "Healthy: flat or falling. It escalates before the collapse (length-decay figure 3); then lower the learning "
        "rate, or set length_decay=True.",
        (
            Row(
                "norm",
                (Series("dc/grad_norm_smoothed", "smoothed"), Series("grad_norm", "as measured", SECOND)),
            ),
        ),
    ),
    Panel(
        "sync",
        "Share of the update that the sampler sees",
        "Healthy: around 1. Near 0: rounding at the weight sync puts the weights back, and what is deployed does not "
        "learn; far above 1: weights on a tie flip together. Then set sync_rounding='dither'. The fraction of the "
        "weights that change is small either way.",
        (
            Row(
                "deployed move / trained move",
                (
                    Series("dc/sync/update_seen_since_start", "since the start"),
                    Series("dc/sync/update_seen", "since the last sync", SECOND),
                ),
                2.0,
            ),
            Row("fraction of the weights", (Series("dc/sync/changed", "changed since the last sync"),)),
        ),
    ),
)

_RULE_KEY = re.compile(r"dc/rejection/(\w{1,40})/(?:tokens|sequences)", re.ASCII)
_ANY = "any"
MOST_RULES = 12
"""Rows of the panel of rejection."""


def rejection_panel(keys: Iterable[str]) -> Panel | None:
    """A panel with a row for all rejection rules together and one for each; None where the run has none.

    Args:
        keys: all that was logged.
    """
    found = {match[1] for match in map(_RULE_KEY.fullmatch, keys) if match}
    if not found:
        return None
    rules = [_ANY, *sorted(found - {_ANY})][:MOST_RULES]
    return Panel(
        "rejection",
        "Rejected tokens and sequences",
        "Small and steady; no range published. Rises: the rules hide what parts the engines. 1: nothing is trained "
        "on. Widen rejection_bounds only once the cause is known.",
        tuple(_rejected_by(rule) for rule in rules),
    )


def _rejected_by(rule: str) -> Row:
    series = (
        Series(f"dc/rejection/{rule}/tokens", "of the tokens"),
        Series(f"dc/rejection/{rule}/sequences", "of the sequences", SECOND),
    )
    return Row("by any rule, fraction" if rule == _ANY else f"by {rule}, fraction", series)


TAIL_PANELS = (
    _tail(
        "max",
        "Largest discrepancy",
        "of one token",
        "No range published. A single token near 1: look at that completion below.",
        Series("dc/discrepancy/max", "max"),
    ),
    Panel(
        "abs_log_ratio",
        "|log π − log μ| of a token",
        "No range published. A tail that rises while the median holds is a few tokens; where the median rises too, "
        "all tokens differ more.",
        (
            Row(
                "99th and 90th percentile, nats",
                (Series("dc/abs_log_ratio/p99", "99th percentile"), Series("dc/abs_log_ratio/p90", "90th", SECOND)),
            ),
            Row("median, nats", (Series("dc/abs_log_ratio/p50", "median"),)),
        ),
    ),
    _tail(
        "differs",
        "Tokens that differ at all",
        "fraction of the tokens",
        "1 where the sampler computes in another precision, above a half where both sides compute in float32. 0: both "
        "sides are the same numbers, and nothing is measured.",
        Series("dc/differs", "differs"),
    ),
    _tail(
        "logp_difference",
        "Largest |log π − log μ|",
        "nats",
        "No range published. Sees the tail, which |π − μ| does not: 1e-2 against 1e-5 is 6.9 here.",
        Series("sampling/sampling_logp_difference/max", "max"),
    ),
    _tail(
        "importance_ratio",
        "Importance ratio π/μ",
        "π/μ, not clipped",
        "Largest below 2, the clip: nothing is clipped. Smallest near 0: tokens the trainer finds impossible.",
        Series("dc/importance_ratio/max", "largest"),
        Series("dc/importance_ratio/min", "smallest", SECOND),
    ),
    _tail(
        "k3_kl",
        "KL(μ‖π), k3",
        "nats per token",
        "At least 0; no range published. Ours: 2e-4 in bf16, 0.19 in int4. Little noise, blind to the sign.",
        Series("dc/k3_kl", "k3"),
    ),
    _tail(
        "chi2_token",
        "χ² per token",
        "mean of (π/μ)² − 1",
        "Around 0; alert above 1 (verl). Clearly below 0 in every batch: truncated sampling.",
        Series("dc/chi2_token", "χ²"),
    ),
    _tail(
        "chi2_seq",
        "χ² per sequence",
        "mean of Π(π/μ)² − 1",
        "Grows with length; no range published. Large: sequence-level importance sampling has no usable variance.",
        Series("dc/chi2_seq", "χ²"),
    ),
    _tail(
        "ess",
        "Effective sample size",
        "fraction of the tokens",
        "Near 1; alert below 0.3 (verl): a few tokens carry the correction.",
        Series("dc/ess", "ESS"),
    ),
    _tail(
        "log_ppl_abs_diff",
        "|Δ log perplexity|",
        "nats, summed",
        "Flat. Rises at equal length: lower the learning rate. Rises with length alone: nothing new.",
        Series("dc/log_ppl_abs_diff", "sum over tokens"),
    ),
    _tail(
        "nan_fraction",
        "Tokens without log-prob",
        "fraction",
        "0. Each one is a token without constraint and correction.",
        Series("dc/nan_fraction", "not scored"),
    ),
)
