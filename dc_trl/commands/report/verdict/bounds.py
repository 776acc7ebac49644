# SPDX-License-Identifier: Apache-2.0
"""The ranges that the report judges by. docs/metrics.md lists them; a test holds the two together."""

from dc_trl.commands.report.verdict.checks import AMBER, FIRST, RED, Bound, Check, Section

CONTROL = Section("The control run")
SYNC = Section("Broken or stale weight sync")
ROUNDING = Section("Rounding at the weight sync")
TRUNCATED = Section("Truncated sampling")
RAW = Section("Raw log-probs from the server")
UNSCORED = Section("NaN log-probs")
COLLAPSE = Section("The discrepancy falls: entropy collapse")
NOTHING = Section("Nothing differs at all")
ALONE = Section("A penalty alone")
GLANCE = Section("At a glance")
GUARD = Section("Steps that are left out", page="method")

ANCHOR = "dc/discrepancy/mean"
"""All verdicts are of one step: the newest at which this key has a number."""

CHECKS = (
    Check(
        ANCHOR,
        "Discrepancy over tolerance",
        "At or below the tolerance.",
        (
            Bound(
                RED,
                "above",
                2.0,
                "ours",
                "Far above the tolerance: look for a bug in the set-up first, which no constraint repairs.",
                CONTROL,
            ),
            Bound(
                AMBER,
                "above",
                1.0,
                "paper",
                "Above the tolerance, so λ rises. If it stays there, find the cause before you constrain harder.",
                CONTROL,
            ),
        ),
        over="dc/tolerance",
    ),
    Check(
        "dc/differs",
        "Tokens that differ at all",
        "The two sides are measured apart.",
        (
            Bound(
                RED,
                "at most",
                0.0,
                "ours",
                "Both sides are the same numbers: nothing is measured, and every other value here is dead.",
                NOTHING,
            ),
        ),
    ),
    Check(
        "dc/nan_fraction",
        "Tokens without log-prob",
        "Every token has a log-prob of both engines.",
        (
            Bound(
                RED,
                "above",
                0.05,
                "ours",
                "Many tokens have no constraint and no correction, and no metric sees them.",
                UNSCORED,
            ),
            Bound(
                AMBER,
                "above",
                0.0,
                "ours",
                "Some tokens have no constraint and no correction, and no metric sees them.",
                UNSCORED,
            ),
        ),
    ),
    Check(
        "dc/sync/update_seen_since_start",
        "Share of the update that the sampler sees",
        "What is learnt reaches the sampler.",
        (
            Bound(
                RED,
                "below",
                0.5,
                "ours",
                "Rounding at the weight sync puts most of the update back: what samples hardly learns.",
                ROUNDING,
            ),
            Bound(
                RED,
                "above",
                2.0,
                "ours",
                "The sampler moves further than the trainer: weights on a tie flip together.",
                ROUNDING,
            ),
            Bound(
                AMBER,
                "below",
                0.9,
                "ours",
                "Rounding at the weight sync puts a part of the update back.",
                ROUNDING,
            ),
            Bound(
                AMBER,
                "above",
                1.1,
                "ours",
                "The sampler moves further than the trainer: weights on a tie flip together.",
                ROUNDING,
            ),
        ),
    ),
    Check(
        "dc/ess",
        "Effective sample size, fraction of the tokens",
        "Many tokens carry the correction.",
        (
            Bound(
                RED,
                "below",
                0.3,
                "verl",
                "A few tokens carry the correction: old weights, or a coarser precision than the model bears.",
                SYNC,
            ),
            Bound(
                AMBER,
                "below",
                0.9,
                "ours",
                "Fewer tokens carry the correction than rounding to bf16 explains.",
                SYNC,
            ),
        ),
    ),
    Check(
        "dc/chi2_token",
        "χ² per token",
        "The tail is light.",
        (
            Bound(
                RED,
                "above",
                1.0,
                "verl",
                "The tail is heavy, which |π − μ| does not see: old weights, or a coarse precision.",
                SYNC,
            ),
            Bound(
                AMBER,
                "above",
                0.1,
                "ours",
                "The tail is heavier than rounding to bf16 explains.",
                SYNC,
            ),
            Bound(
                AMBER,
                "below",
                -0.05,
                "ours",
                "It estimates something positive. Below 0 in every batch: sampling is truncated.",
                TRUNCATED,
            ),
        ),
    ),
    Check(
        "dc/kl",
        "KL(μ‖π), nats per token",
        "Around 0.",
        (
            Bound(
                RED,
                "above",
                0.1,
                "verl",
                "The trainer finds the samples far less likely than the sampler did: old weights, or truncation.",
                SYNC,
            ),
            Bound(
                RED,
                "below",
                -0.1,
                "verl",
                "No divergence is negative: the reported log-probs are not those of what was sampled from.",
                RAW,
            ),
            Bound(
                AMBER,
                "above",
                0.02,
                "ours",
                "The trainer finds the samples less likely than the sampler did.",
                SYNC,
            ),
            Bound(
                AMBER,
                "below",
                -0.02,
                "ours",
                "Negative beyond the noise. In every batch: the log-probs are not those of what was sampled from.",
                RAW,
            ),
        ),
    ),
    Check(
        "dc/importance_ratio/mean",
        "Mean of π/μ",
        "Near 1, its expectation.",
        (
            Bound(
                RED,
                "below",
                0.5,
                "verl",
                "Half of π lies where the sampler never goes: truncated sampling.",
                TRUNCATED,
            ),
            Bound(
                RED,
                "above",
                2.0,
                "verl",
                "The two engines do not have the same policy.",
                SYNC,
            ),
            Bound(
                AMBER,
                "below",
                0.97,
                "ours",
                "Below its expectation. In every batch: sampling is truncated.",
                TRUNCATED,
            ),
            Bound(
                AMBER,
                "above",
                1.03,
                "ours",
                "Above its expectation: a few tokens have far more probability in training.",
                SYNC,
            ),
        ),
    ),
    Check(
        "dc/abs_log_ratio/p99",
        "99th percentile of |log π − log μ|",
        "The clip at 2 leaves 99 of 100 tokens alone.",
        (
            Bound(
                AMBER,
                "above",
                0.69,
                "ours",
                "The clip at 2 takes weight off more than one token in a hundred.",
                GLANCE,
            ),
        ),
    ),
    Check(
        "entropy",
        "Entropy over its first value",
        "The policy is not yet certain, so the discrepancy has a meaning.",
        (
            Bound(
                AMBER,
                "below",
                0.1,
                "ours",
                "The policy is certain, and then both engines agree by themselves. Good only if the reward holds.",
                COLLAPSE,
            ),
        ),
        over=FIRST,
    ),
    Check(
        "dc/multiplier",
        "Multiplier over its maximum",
        "λ has room to act.",
        (
            Bound(
                AMBER,
                "at least",
                1.0,
                "paper",
                "λ is at its maximum: find the cause of the discrepancy, then raise the tolerance.",
                CONTROL,
            ),
        ),
        over="multiplier_max",
    ),
    Check(
        "dc/penalty_share",
        "Penalty over advantage",
        "The reward is the objective.",
        (
            Bound(
                RED,
                "above",
                1.0,
                "ours",
                "The penalty is larger than the advantage: it has become the objective.",
                ALONE,
            ),
            Bound(
                AMBER,
                "above",
                0.1,
                "ours",
                "The penalty is a large part of the signal: lower multiplier_max or dual_lr.",
                ALONE,
            ),
        ),
    ),
    Check(
        "dc/penalty_only",
        "Sequences that a penalty alone moves",
        "Most sequences with a penalty have an advantage too.",
        (
            Bound(
                AMBER,
                "above",
                0.5,
                "ours",
                "Most sequences are only pushed down, whatever they say.",
                ALONE,
            ),
        ),
    ),
    Check(
        "dc/rejection/any/tokens",
        "Rejected tokens",
        "The rules leave most tokens in the loss.",
        (
            Bound(
                RED,
                "at least",
                1.0,
                "ours",
                "Every token is rejected: nothing is trained on.",
                CONTROL,
            ),
            Bound(
                AMBER,
                "above",
                0.5,
                "ours",
                "The rules hide what parts the engines: find the cause before bounds are widened.",
                CONTROL,
            ),
        ),
    ),
    Check(
        "dc/guard/skipped",
        "Steps that the gradient guard left out",
        "No step was left out.",
        (
            Bound(
                AMBER,
                "above",
                0.0,
                "ours",
                "The gradient norm of this step was far from the usual: skipped.jsonl has its completions.",
                GUARD,
            ),
        ),
    ),
)
"""In the order of what to look at first: what makes the others meaningless, then the tail, then the constraint."""
