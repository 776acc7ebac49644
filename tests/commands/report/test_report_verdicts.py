# SPDX-License-Identifier: Apache-2.0
"""The strip of verdicts: its bounds are the documentation's, and its values are of one step."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from pages import DOCS, rows
from report_pages import Page, report, write_log

from dc_trl.commands.report.verdict.bounds import ANCHOR, CHECKS
from dc_trl.commands.report.verdict.checks import AMBER, FIRST, GREEN, RED, Check
from dc_trl.commands.report.verdict.judge import judge
from dc_trl.commands.report.verdict.links import repository_link, section_link
from dc_trl.constraint import NOTABLE_PENALTY_SHARE
from dc_trl.records.run_columns import RunColumns, columns_of
from dc_trl.records.run_reader import Run

BY_KEY = {check.key: check for check in CHECKS}
HEALTHY = {
    ANCHOR: 0.004,
    "dc/tolerance": 0.005,
    "dc/differs": 1.0,
    "dc/nan_fraction": 0.0,
    "dc/sync/update_seen_since_start": 1.0,
    "dc/ess": 0.999,
    "dc/chi2_token": -0.001,
    "dc/kl": 0.001,
    "dc/importance_ratio/mean": 1.0,
    "dc/abs_log_ratio/p99": 0.06,
    "entropy": 1.0,
    "dc/multiplier": 0.4,
    "dc/penalty_share": 0.01,
    "dc/penalty_only": 0.1,
    "dc/rejection/any/tokens": 0.01,
    "dc/guard/skipped": 0.0,
}


def run_of(*entries: dict[str, Any], **settings: Any) -> RunColumns:
    steps = [{"step": step} | entry for step, entry in enumerate(entries, start=1)]
    return columns_of(Run("r", Path("log.jsonl"), settings={"multiplier_max": 1.0} | settings, entries=steps))


def colours(run: RunColumns) -> dict[str, str]:
    judgement = judge(run)
    assert judgement is not None
    return {verdict.check.key: verdict.colour for verdict in judgement.verdicts}


# The documentation


def row(check: Check, place: int) -> list[str]:
    bound = check.bounds[place]
    over = "" if not check.over else f" / {check.over}" if check.over == FIRST else f" / `{check.over}`"
    section = f"[{bound.section.title}]({bound.section.page}.md#{bound.section.anchor})"
    cells = [bound.colour, f"`{check.key}`{over}", f"{bound.comparison} {bound.limit:g}", bound.source, section]
    return [f" {cell} " for cell in cells]


def test_the_page_lists_the_bounds_in_their_order() -> None:
    listed = [cells for cells in rows("metrics.md") if cells[0].strip() in (RED, AMBER)]
    assert listed == [row(check, place) for check in CHECKS for place in range(len(check.bounds))]


def test_verls_alerts_are_all_judged_with_the_pages_numbers() -> None:
    ranges = {cells[0].strip().strip("`"): cells[3] for cells in rows("metrics.md") if "/" in cells[0]}
    alerts = {key: text for key, text in ranges.items() if "(verl)" in text}
    bounds = {c.key: [abs(b.limit) for b in c.bounds if b.source == "verl"] for c in CHECKS}
    assert set(alerts) == {key for key, limits in bounds.items() if limits}
    for key, text in alerts.items():
        (alert,) = re.findall(r"alert ([^;(]*)\(verl\)", text)
        assert {float(figure) for figure in re.findall(r"\d+(?:\.\d+)?", alert)} == set(bounds[key])


def test_what_the_trainer_says_of_the_penalty_is_the_reports_bound() -> None:
    assert NOTABLE_PENALTY_SHARE in [bound.limit for bound in BY_KEY["dc/penalty_share"].bounds]


def test_every_section_is_a_heading_of_its_page() -> None:
    for section in {bound.section for check in CHECKS for bound in check.bounds}:
        headings = re.findall(r"^#+ (.*)$", (DOCS / f"{section.page}.md").read_text("utf-8"), flags=re.MULTILINE)
        assert section.title in headings


# Judging


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.key)
def test_every_bound_gives_its_colour_and_the_others_stay_green(check: Check) -> None:
    assert set(colours(run_of(HEALTHY)).values()) == {GREEN} and len(colours(run_of(HEALTHY))) == len(CHECKS)
    base = {"": 1.0, FIRST: 1.0, "multiplier_max": 1.0, "dc/tolerance": 0.005}[check.over]
    for bound in check.bounds:
        sign = {"above": 1, "at least": 0, "below": -1, "at most": 0}[bound.comparison]
        value = base * (bound.limit + 0.001 * sign)
        found = colours(run_of(HEALTHY, HEALTHY | {check.key: value}))
        assert found.pop(check.key) == bound.colour
        assert set(found.values()) == {GREEN}


def test_all_values_are_of_the_newest_step_that_has_a_discrepancy(tmp_path: Path) -> None:
    entries = [HEALTHY, HEALTHY | {"dc/ess": 0.1, "dc/kl": None}, {ANCHOR: None, "dc/ess": 0.999, "dc/kl": 0.5}]
    judgement = judge(run_of(*entries, {"train_runtime": 1.0}))
    assert judgement is not None and (judgement.step, judgement.newest) == (2, 4)
    assert {v.check.key: v.value for v in judgement.verdicts}["dc/ess"] == 0.1
    assert [check.key for check in judgement.open] == ["dc/kl"]
    page = report(write_log(tmp_path, [{"step": s} | entry for s, entry in enumerate(entries, start=1)]))
    assert "All values are of step 2, the newest that has them. No later entry has a discrepancy, up to step 3." in (
        page.text
    )


def test_while_the_tolerance_is_not_known_the_discrepancy_has_no_colour() -> None:
    entry = {key: value for key, value in HEALTHY.items() if key != "dc/tolerance"}
    judgement = judge(run_of(entry))
    assert judgement is not None and ANCHOR in [check.key for check in judgement.open]
    assert ANCHOR not in colours(run_of(entry))


@pytest.mark.parametrize("maximum", [None, "1", 0, math.nan])
def test_a_maximum_that_is_no_number_judges_nothing(maximum: Any) -> None:
    assert "dc/multiplier" not in colours(run_of(HEALTHY, multiplier_max=maximum))


def test_a_run_without_discrepancy_has_no_verdict(tmp_path: Path) -> None:
    assert judge(run_of({"reward": 1.0})) is None
    assert "no verdict yet" in report(write_log(tmp_path, [{"step": 1, "reward": 1.0}])).text


# The strip


def verdicts(page: Page) -> str:
    return re.sub(r"\s+", " ", page.text.partition("Verdicts")[2].partition("before this page")[0])


def test_the_strip_says_each_verdict_in_words(tmp_path: Path) -> None:
    entry = {"step": 7} | HEALTHY | {"dc/ess": 0.1, "dc/penalty_share": 0.2}
    page = report(write_log(tmp_path, [entry], settings={"multiplier_max": 1.0}))
    text = verdicts(page)
    assert "1 out of range, 1 to look into, 13 in range" in text
    assert "✕ red 0.1 Effective sample size, fraction of the tokens A few tokens carry the correction" in text
    assert "red below 0.3 (verl)" in text and "! amber 0.2 Penalty over advantage" in text
    classes = [attributes.get("class") for _, attributes in page.elements]
    assert classes.count("verdict red") == 1 and classes.count("badge green") == 13


def test_every_run_has_a_strip_with_its_name(tmp_path: Path) -> None:
    one = write_log(tmp_path / "one", [{"step": 1} | HEALTHY])
    two = write_log(tmp_path / "two", [{"step": 1} | HEALTHY | {"dc/differs": 0}])
    text = verdicts(report(one, two))
    assert "one: 14 in range" in text and "two: 1 out of range, 13 in range" in text


PROJECT = "https://github.com/an-owner/a-name"


def test_the_links_lead_to_the_repository_that_the_package_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stated(monkeypatch, "Homepage, https://example.org/", f"Repository, {PROJECT}/")
    entry = {"step": 1} | HEALTHY | {"dc/nan_fraction": 0.5}
    page = report(write_log(tmp_path, [entry]))
    links = [attributes for tag, attributes in page.elements if tag == "a" and "rel" in attributes]
    wanted = f"{PROJECT}/blob/main/docs/troubleshooting.md#nan-log-probs"
    assert links[0] == {"href": wanted, "rel": "noreferrer"}
    assert all((link["href"] or "").startswith(f"{PROJECT}/blob/main/docs/") for link in links)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["Documentation, https://example.org/docs"],
        ["Repository, http://github.com/a/b"],
        ["Source, https://github.com.example.org/a/b"],
        ["Homepage, javascript:alert(1)"],
    ],
)
def test_without_a_repository_the_page_and_the_section_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    stated(monkeypatch, *lines)
    assert repository_link() is None and section_link(CHECKS[0].bounds[0].section) is None
    page = report(write_log(tmp_path, [{"step": 1} | HEALTHY]))
    assert "Read on: docs/troubleshooting.md, “The control run”." in page.text
    assert not [a for tag, a in page.elements if tag == "a" and not (a["href"] or "").startswith("#")]


def stated(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Puts these project URLs into the package's metadata."""

    class Metadata:
        def get_all(self, name: str) -> list[str] | None:
            assert name == "Project-URL"
            return list(lines) or None

    monkeypatch.setattr("dc_trl.commands.report.verdict.links.metadata", lambda name: Metadata())
