# SPDX-License-Identifier: Apache-2.0
"""The theory's section of docs/results.md, from its lines."""

from collections.abc import Mapping, Sequence
from typing import Any

from papers.theory.chain import growth
from papers.theory.toy import ACTIONS

Line = Mapping[str, Any]

CLOSE, BETTER = 1e-2, 1e-6
"""Total variation, and difference of the objective, within which a numerical optimum is the theorem's."""


def theory_page(lines: Sequence[Line]) -> str:
    """The section; what has not been calculated is left out."""
    parts = ["## Theory", ""]
    by_name = {name: [x for x in lines if x["calculation"] == name] for name in ("optima", "toy", "entropy", "chain")}
    for name, write in (("optima", _optima), ("toy", _toy), ("entropy", _entropy), ("chain", _chain)):
        if by_name[name]:
            parts += [*write(by_name[name]), ""]
    parts.append("`python examples/papers theory`; no seed but that of the random states, 0.")
    return "\n".join([*parts, ""])


def first_rows(lines: Sequence[Line]) -> list[str]:
    """The rows of the first page, for what has been calculated."""
    by_name = {name: [x for x in lines if x["calculation"] == name] for name in ("optima", "toy", "entropy", "chain")}
    if not all(by_name.values()):
        return []
    optima, entropy, chain = by_name["optima"], by_name["entropy"], by_name["chain"]
    log = [x for x in optima if x["model"] == "log"]
    cases, unsolved = sum(x["states"] for x in log), sum(x["states"] - x["solved"] for x in log)
    rises = {name: [x["rises"] for x in entropy if x["metric"] == name] for name in ("prob_diff", "logit_diff")}
    apart = min(rises["prob_diff"]) > 0.5 > max(rises["logit_diff"])
    shares = (f"{min(x):.0%} to {max(x):.0%} of states" for x in rises.values())
    return [
        f"| theory: the optimal policies of theorem B.1 | {_word(_solved(optima))} | the log model has none in "
        f"{unsolved} of {cases} cases | |",
        "| theory: of equal penalties, \\|π − μ\\| moves most to improbable actions | "
        f"{_word(_ordered(by_name['toy']))} | two-sided and one-sided | |",
        f"| theory: a step against \\|π − μ\\| raises the entropy, one against logits does little | {_word(apart)} | "
        f"it rises in {next(shares)}; in {next(shares)} | |",
        f"| theory: the gradient's error is at most of order T² | {_word(_bounded(chain))} | it grows as T to the "
        f"{growth(list(chain)):.1f} | |",
    ]


def _solved(lines: Sequence[Line]) -> bool:
    return all(x["shortfall"] < BETTER and x["distance"] < CLOSE for x in lines)


def _ordered(lines: Sequence[Line]) -> bool:
    low = {(x["model"], x["sides"]): x["policy"][-1] for x in lines}
    return all(low["difference", s] > low["log", s] > low["ratio", s] for s in (1, 2))


def _bounded(lines: Sequence[Line]) -> bool:
    return max(x["largest_ratio"] for x in lines) <= 1


def _word(holds: bool) -> str:
    return "**holds**" if holds else "**does not hold**"


def _optima(lines: Sequence[Line]) -> list[str]:
    unsolved = sum(x["states"] - x["solved"] for x in lines)
    head = [
        "**Theorem B.1** (DC-GRPO): the three optimal policies against a numerical optimiser, in random states of 8 "
        f"actions. {_word(_solved(lines))} where the theorem has a policy: no optimum that ascent found was better by "
        f"more than {max(x['shortfall'] for x in lines):.0e}, or further than "
        f"{max(x['distance'] for x in lines):.0e} in total variation.",
        "",
        "| model | λ | states with a policy of the theorem's | of which interior | largest distance |",
        "|---|---|---|---|---|",
    ]
    rows = []
    for x in lines:
        cells = (x["model"], f"{x['strength']:g}", f"{x['solved']} of {x['states']}", x["interior"])
        rows.append(f"| {' | '.join(map(str, cells))} | {x['distance']:.1g} |")
    if not unsolved:
        return head + rows
    note = (
        f"In {unsolved} cases the log model has none, because an advantage exceeds ν + λ/e. In "
        f"{sum(x['beyond'] for x in lines)} of these the optimum has an action beyond π = e·μ, where the penalty is "
        "concave and W takes its other branch; the theorem does not say so."
    )
    return [*head, *rows, "", note]


def _toy(lines: Sequence[Line]) -> list[str]:
    head = [
        "**The toy of B.2** (DC-GRPO, figures 6 and 7; its numbers were lost, these are ours): at the same budget the "
        "difference moves most mass to the improbable action with the largest advantage, the ratio least, the log "
        f"lies between. {_word(_ordered(lines))}, two-sided and one-sided.",
        "",
        "![The toy](images/results-toy.png)",
        "",
        f"| penalty | sides | λ | {' | '.join(ACTIONS)} |",
        "|" + "---|" * (3 + len(ACTIONS)),
    ]
    rows = [
        f"| {x['model']} | {x['sides']} | {x['strength']:.2f} | {' | '.join(f'{p:.3f}' for p in x['policy'])} |"
        for x in lines
    ]
    return head + rows


def _entropy(lines: Sequence[Line]) -> list[str]:
    names = {
        "prob_diff": "\\|π − μ\\|",
        "prob_ratio": "\\|π/μ − 1\\|",
        "logprob_diff": "\\|log π − log μ\\|",
        "logit_diff": "\\|logit π − logit μ\\|",
    }
    head = [
        "**The entropy argument** (ours, H1 and H2): a small step against the discrepancy raises the entropy of a "
        "state for \\|π − μ\\|, lowers it for ratio and log-prob, and does little for logits. Random softmax states "
        "of 16 to 256 actions, logit noise 0.1 to 0.5; the range is over these and the confidence.",
        "",
        "![The entropy argument](images/results-entropy.png)",
        "",
        "| d | states whose entropy rises, least and most | mean change for a mean d of 1, least and most |",
        "|---|---|---|",
    ]
    rows = []
    for metric, name in names.items():
        own = [x for x in lines if x["metric"] == metric]
        shares, changes = [x["rises"] for x in own], [x["change"] for x in own]
        rows.append(
            f"| {name} | {min(shares):.0%} to {max(shares):.0%} | {min(changes):+.3f} to {max(changes):+.3f} |"
        )
    return head + rows


def _chain(lines: Sequence[Line]) -> list[str]:
    worst, exponent = max(x["largest_ratio"] for x in lines), growth(list(lines))
    head = [
        f"**The T² bound** (length-decay, theorem 3.1) on {lines[0]['chains']} chains that were enumerated: "
        f"{_word(_bounded(lines))}; the error is at most {worst:.1%} of the bound, and grows as T to the "
        f"{exponent:.1f}, not 2, on these chains.",
        "",
        "| T | error of the gradient | bound | largest error / bound |",
        "|---|---|---|---|",
    ]
    rows = [f"| {x['horizon']} | {x['error']:.3g} | {x['bound']:.3g} | {x['largest_ratio']:.1%} |" for x in lines]
    return head + rows
