# SPDX-License-Identifier: Apache-2.0
"""docs/contributing.md: every place that it names is there."""

import re

import pytest
from pages import DOCS, rows
from places import ROOT

TEXT = (DOCS / "contributing.md").read_text(encoding="utf-8")
PLACES = {cells[0].strip(): cells[1] for cells in rows("contributing.md") if cells[1].strip().startswith("`dc_trl/")}
QUESTIONS = {
    "discrepancy metric",
    "kind of constraint",
    "rollout engine",
    "importance-sampling mask",
    "rejection rule",
    "panel of the report",
    "check of a calibration",
    "benchmark",
    "per-token column from the engine to the batch",
    "guard that skips a batch",
    "field of the configuration",
}


def test_every_question_has_one_place() -> None:
    assert set(PLACES) == QUESTIONS
    assert all(len(re.findall(r"`dc_trl/", place)) == 1 for place in PLACES.values())


@pytest.mark.parametrize("question", sorted(QUESTIONS))
def test_the_place_is_there(question: str) -> None:
    path, *names = re.findall(r"`([^`]+)`", PLACES[question])
    source = (ROOT / path).read_text(encoding="utf-8")
    assert names
    for name in names:
        assert re.search(rf"^\s*(def |class )?{name}\b", source, flags=re.MULTILINE), name


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:dc_trl|tests)/[\w./]*)`", TEXT))))
def test_every_path_exists(path: str) -> None:
    assert (ROOT / path).exists()
