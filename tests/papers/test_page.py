# SPDX-License-Identifier: Apache-2.0
"""docs/results.md says what the lines say, number by number."""

import re
from typing import Any

from places import ROOT


def test_the_page_is_what_the_lines_come_to() -> None:
    from papers.page import PAGE, read_runs, read_theory, render
    from papers.results_file import RESULTS

    text = render(read_runs(RESULTS), read_theory(RESULTS))
    assert PAGE.read_text(encoding="utf-8") == text, "run `python examples/papers write`"


def test_every_figure_that_is_shown_exists() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    names = re.findall(r"\(images/([\w.-]+)\)", page)
    assert names
    assert all((ROOT / "docs" / "images" / name).stat().st_size > 1000 for name in names)


def fake(arm: str, seed: int, accuracy: float) -> dict[str, Any]:
    outcomes = {"accuracy": accuracy, "accuracy_all": accuracy, "discrepancy_all": 0.01, "collapsed": 0.0}
    kept = {"seconds": 60.0, "hardware": "a machine", "date": "2026-01-01", "curves": {}, "options": {}}
    return {"regime": "stressed", "arm": arm, "seed": seed, "block": "cause", "outcomes": outcomes} | kept


def test_a_changed_line_changes_the_page() -> None:
    from papers.page import render

    lines = [fake(arm, seed, 0.5 + 0.3 * (arm == "exact")) for arm in ("plain", "exact") for seed in range(8)]
    page = render(lines, [])
    row = next(x for x in page.splitlines() if x.startswith("| the stressed regime is unstable"))
    assert "**holds** | +0.300 [+0.300, +0.300], p = 0.0078 | 8 |" in row
    assert "16 runs, seeds 0 to 7, 16 minutes" in page
    lines[-1]["outcomes"]["accuracy"] = 0.7
    assert render(lines, []) != page


def test_another_metric_is_not_shown_as_a_probability_difference() -> None:
    from papers.page import render

    lines = [fake("exact", 0, 0.5), fake("plain", 0, 0.5)]
    lines[0]["options"] = {"discrepancy_metric": "logit_diff"}
    rows = [x for x in render(lines, []).splitlines() if x.startswith("| stressed |")]
    assert "| 0.01 |" in rows[0] and "| 0.01 |" not in rows[1]  # plain, then exact


def test_few_seeds_give_no_verdict() -> None:
    from papers.page import render

    lines = [fake(arm, seed, 0.5) for arm in ("plain", "exact") for seed in range(4)]
    row = next(x for x in render(lines, []).splitlines() if x.startswith("| the stressed regime is unstable"))
    assert "**not yet run** | +0.000, no interval yet | 4 |" in row
