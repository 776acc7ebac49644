# SPDX-License-Identifier: Apache-2.0
"""The verdicts as HTML: words and signs beside the colours."""

from collections import Counter

from dc_trl.commands.report.text import number
from dc_trl.commands.report.verdict.checks import AMBER, GREEN, RED, Check, Section
from dc_trl.commands.report.verdict.judge import Judgement, Verdict, judge
from dc_trl.commands.report.verdict.links import section_link
from dc_trl.records.run_columns import RunColumns
from dc_trl.records.text import escaped

SIGNS = {RED: "✕", AMBER: "!", GREEN: "✓"}
WORDS = {RED: "out of range", AMBER: "to look into", GREEN: "in range"}


def strip(runs: list[RunColumns]) -> str:
    """The verdicts on each run."""
    return "".join(_strip(run, judge(run), len(runs) > 1) for run in runs)


def _strip(run: RunColumns, judgement: Judgement | None, named: bool) -> str:
    name = f"{escaped(run.name)}: " if named else ""
    if judgement is None:
        return (
            f'<div class="verdict"><h2>{name}no verdict yet</h2><p class="note">No step has a discrepancy. It needs '
            "DCGRPOTrainer and an engine that gives log-probs.</p></div>"
        )
    counts = Counter(verdict.colour for verdict in judgement.verdicts)
    colours = [colour for colour in SIGNS if counts[colour]]
    counted = ", ".join(f"{counts[colour]} {WORDS[colour]}" for colour in colours)
    listed = [verdict for colour in (RED, AMBER) for verdict in judgement.verdicts if verdict.colour == colour]
    fine = [verdict for verdict in judgement.verdicts if verdict.colour == GREEN]
    return (
        f'<div class="verdict {colours[0]}"><h2>{_badge(colours[0])} {name}{counted}</h2>{_when(judgement)}'
        f"{_items(listed)}{_folded(fine)}{_open(judgement.open)}</div>"
    )


def _badge(colour: str) -> str:
    return f'<span class="badge {colour}"><i aria-hidden="true">{SIGNS[colour]}</i> {colour}</span>'


def _when(judgement: Judgement) -> str:
    later = ""
    if judgement.newest > judgement.step:
        later = f" No later entry has a discrepancy, up to step {number(judgement.newest)}."
    return f'<p class="note">All values are of step {number(judgement.step)}, the newest that has them.{later}</p>'


def _items(verdicts: list[Verdict]) -> str:
    return f"<ul>{''.join(map(_item, verdicts))}</ul>" if verdicts else ""


def _folded(verdicts: list[Verdict]) -> str:
    if not verdicts:
        return ""
    return f"<details><summary>{len(verdicts)} {WORDS[GREEN]}</summary>{_items(verdicts)}</details>"


def _item(verdict: Verdict) -> str:
    check = verdict.check
    bound = verdict.bound or check.bounds[0]
    says = verdict.bound.meaning if verdict.bound else check.fine
    limit = f"{bound.colour} {bound.comparison} {number(bound.limit)} ({bound.source})"
    return (
        f'<li class="{verdict.colour}"><p class="judged">{_badge(verdict.colour)} '
        f'<span class="value">{number(verdict.value, 3)}</span></p>'
        f"<h3>{escaped(check.title)}</h3><p>{escaped(says)}</p>"
        f'<p class="note">{_quantity(check)}, {limit}. {_read_on(bound.section)}</p></li>'
    )


def _quantity(check: Check) -> str:
    over = f" / {_name(check.over)}" if check.over else ""
    return _name(check.key) + over


def _name(quantity: str) -> str:
    return escaped(quantity) if " " in quantity else f"<code>{escaped(quantity)}</code>"


def _read_on(section: Section) -> str:
    """The link, or where the page and the section are to be found."""
    link = section_link(section)
    if link is None:
        return f"Read on: docs/{section.page}.md, “{escaped(section.title)}”."
    return f'<a href="{escaped(link)}" rel="noreferrer">Read on: {escaped(section.title)}</a>'


def _open(checks: list[Check]) -> str:
    if not checks:
        return ""
    names = ", ".join(escaped(check.title) for check in checks)
    return f'<p class="note">Without a value at this step, or with nothing to compare it to yet: {names}.</p>'
