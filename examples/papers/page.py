# SPDX-License-Identifier: Apache-2.0
"""docs/results.md: every number in it is calculated here from the lines, so that none can differ from them."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from papers import results_file
from papers.blocks import BLOCKS, planned
from papers.comparisons import ALL, SECTIONS, Claim
from papers.intervals import FEWEST, NOT_YET_RUN, Estimate, compare, verdict
from papers.theory.page import first_rows, theory_page

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "results.md"

Line = Mapping[str, Any]

INTRO = """\
# Results

What the papers claim and what we claim, tested on a small policy with a real discrepancy between its engines, and how it
came out. The protocol was written before the runs: [PROTOCOL.md](../examples/papers/PROTOCOL.md). This page is made from
[the results](../examples/papers/results) by `python examples/papers write`, and a test holds each number in it against
them. Nothing here was measured on a large model: it says what happens on this policy and this task, and why. One section is
about a published model of 135 million parameters.
"""  # noqa: E501

READING = """\
How to read it: a difference is a mean over seeds, arms paired by seed, with its 95 % bootstrap interval and the exact p of
flipping signs; n is the number of seeds. Accuracies are the deployed policy's on fresh problems, sampled; where problems are
repeated on held-out ones, sampled; and the published model's on held-out ones, exactly. Of discrepancies, mean |π − μ| over
the run, the ratio is given. With 5 to 7 seeds a verdict only *points to* what 8 would say, since such intervals are too
short; with fewer than 5 it is *not yet run*. No interval is widened for the number of comparisons.
"""  # noqa: E501

COLUMNS = {
    "accuracy": ("accuracy, last quarter", ".3f"),
    "accuracy_all": ("accuracy, whole run", ".3f"),
    "best": ("best", ".3f"),
    "final": ("final", ".3f"),
    "collapsed": ("ends below half of its best", ".0%"),
    "held_out_accuracy": ("held out", ".3f"),
    "held_out_greedy": ("greedy, held out", ".3f"),
    "discrepancy_all": ("mean \\|π − μ\\|", ".2g"),
    "discrepancy_p99": ("p99, last quarter", ".2g"),
    "entropy": ("entropy", ".3f"),
    "penalty_share": ("penalty / \\|A\\|", ".1%"),
    "seen": ("update seen", ".2f"),
}
"""Of the tables of arms: outcome → its heading and format."""

FIGURES = {
    "Rounding at the weight sync": "results-rounding.png",
    "Do remedies make up for it?": "results-remedies.png",
    "Is the discrepancy the cause?": "results-cause.png",
}


def render(lines: Sequence[Line], theory: Sequence[Line]) -> str:
    """The page's text."""
    parts = [INTRO, _first_page(lines, theory), READING]
    # A block that several sections need has its table in the last of them.
    last = {claim.block: title for title, claims in SECTIONS.items() for claim in claims}
    for title, claims in SECTIONS.items():
        blocks = [name for name in dict.fromkeys(claim.block for claim in claims) if last[name] == title]
        parts.append(_section(title, claims, blocks, lines))
    parts += [theory_page(theory), _cost(lines)]
    return "\n".join(parts)


def _first_page(lines: Sequence[Line], theory: Sequence[Line]) -> str:
    head = ["| claim | verdict | difference | n |", "|---|---|---|---|"]
    rows = [_row(claim, lines, source=False) for claim in ALL if claim.first]
    return "\n".join([_tally(lines), "", *head, *rows, *first_rows(theory), ""])


def _tally(lines: Sequence[Line]) -> str:
    """How many claims have which verdict, as text."""
    words = Counter(verdict(compare(lines, x.comparison), x.comparison.margin, x.equal) for x in ALL)
    told = ", ".join(f"{count} {word}" for word, count in sorted(words.items()) if word != NOT_YET_RUN)
    return f"Of {len(ALL)} comparisons, so far: {told or 'none told'}; {words[NOT_YET_RUN]} not yet run."


def _row(claim: Claim, lines: Sequence[Line], source: bool = True) -> str:
    found = compare(lines, claim.comparison)
    word = verdict(found, claim.comparison.margin, claim.equal)
    text = claim.text.replace("|", "\\|")  # which would end a cell
    cells = [text, *([claim.source] if source else []), f"**{word}**", difference(found, claim.comparison.log)]
    return f"| {' | '.join(cells)} | {found.n} |"


def difference(found: Estimate, log: bool) -> str:
    """The estimate as text: `×12.3 [9.8, 15.4]` for a ratio, `+.105 [+.080, +.131]` for accuracies."""
    if found.n == 0:
        return "–"
    numbers = (found.mean, found.low, found.high)
    middle, low, high = (f"{math.exp(x):.2f}" for x in numbers) if log else (f"{x:+.3f}" for x in numbers)
    if found.n < FEWEST:
        return f"{'×' if log else ''}{middle}, no interval yet"
    return f"{'×' if log else ''}{middle} [{low}, {high}], p = {found.p:.2g}"


def _section(title: str, claims: Sequence[Claim], blocks: Sequence[str], lines: Sequence[Line]) -> str:
    """A section's claims, and the tables of these blocks."""
    parts = [f"## {title}", ""]
    if title in FIGURES and (DOCS / "images" / FIGURES[title]).exists():
        parts += [f"![{title}](images/{FIGURES[title]})", ""]
    parts += ["| claim | whose | verdict | difference | n |", "|---|---|---|---|---|"]
    parts += [_row(claim, lines) for claim in claims]
    for name in blocks:
        parts += ["", _arms(name, lines)]
    return "\n".join([*parts, ""])


def _arms(block: str, lines: Sequence[Line]) -> str:
    """The table of a block's arms, and what it cost."""
    own = [line for line in lines if line["block"] == block]
    command = f"`python examples/papers run --only {block}`"
    if not own:
        return f"*{block}* has not been run: {command}."
    by_arm: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in own:
        by_arm[line["regime"], line["arm"]].append(line)
    columns = {key: form for key, form in COLUMNS.items() if _informative(own, key)}
    head = ["regime", "arm", "n", *(name for name, _ in columns.values())]
    rows = []
    for regime, arm in ((regime.name, arm.name) for regime, arm in BLOCKS[block].runs):
        group = by_arm.get((regime, arm), [])
        cells = [_mean_of(group, key, form) for key, (_, form) in columns.items()] if group else ["–"] * len(columns)
        rows.append(f"| {' | '.join([regime, arm, str(len(group)), *cells])} |")
    table = "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows])
    return f"{table}\n\n{command}: {spent(own)}."


def _informative(lines: Sequence[Line], key: str) -> bool:
    """Whether an outcome is known, and differs from 0, in any line."""
    return any(line["outcomes"].get(key) for line in lines)


def _mean_of(lines: Sequence[Line], key: str, form: str) -> str:
    if key.startswith("discrepancy"):  # what another metric measures does not belong into a column of |π − μ|
        lines = [line for line in lines if line["options"].get("discrepancy_metric", "prob_diff") == "prob_diff"]
    known = [line["outcomes"][key] for line in lines if line["outcomes"].get(key) is not None]
    return format(mean(known), form) if known else "–"


def spent(lines: Sequence[Line]) -> str:
    """Seeds, time, machine and day of some runs, as text."""
    seeds = sorted({line["seed"] for line in lines})
    span = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    minutes = sum(line["seconds"] for line in lines) / 60
    machines = ", ".join(sorted({line["hardware"] for line in lines}))
    dates = sorted({line["date"] for line in lines})
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{len(lines)} runs, {span}, {minutes:.0f} minutes on one of 2 CPU cores ({machines}), shared; {days}"


def _cost(lines: Sequence[Line]) -> str:
    rows = ["## What has been run", "", "| block | runs | of |", "|---|---|---|"]
    for name in BLOCKS:
        done = sum(line["block"] == name for line in lines)
        rows.append(f"| {name} | {done} | {sum(1 for _ in planned([name]))} |")
    return "\n".join(
        [*rows, "", "`make papers` goes on where the lines end; `make papers-quick` is a smoke of it all.", ""]
    )


def read_theory(results: Path) -> list[dict[str, Any]]:
    """The lines of the calculations."""
    path = results / "theory.jsonl"
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def read_runs(results: Path) -> list[dict[str, Any]]:
    """The lines of every block."""
    return [line for name in BLOCKS for line in results_file.read(results / f"{name}.jsonl")]


def write(results: Path) -> None:
    """Writes figures and page."""
    from papers.figures import draw

    lines, theory = read_runs(results), read_theory(results)
    draw(lines, theory, DOCS / "images")
    PAGE.write_text(render(lines, theory), encoding="utf-8")
    print(f"{PAGE}, from {len(lines)} runs")
