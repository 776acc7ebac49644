# SPDX-License-Identifier: Apache-2.0
"""docs/migration.md: what has moved is where the page says, and no longer where it was."""

import importlib
import importlib.util
import re

import pytest
from pages import DOCS, rows

import dc_trl

TEXT = (DOCS / "migration.md").read_text(encoding="utf-8")
MOVES = {
    re.findall(r"`([\w.]+)`", cells[0])[0]: re.findall(r"`(dc_trl\.[\w.]+)`", cells[1])
    for cells in rows("migration.md")
    if cells[0].strip().startswith("`dc_trl")
}


def test_the_page_is_of_this_version() -> None:
    assert TEXT.splitlines()[0] == f"# From 0.1 to {dc_trl.__version__.rpartition('.')[0]}"


@pytest.mark.parametrize("old", MOVES)
def test_what_has_moved_is_there_and_not_here(old: str) -> None:
    assert MOVES[old]
    for new in MOVES[old]:
        assert importlib.util.find_spec(new) is not None
    parent, _, name = old.rpartition(".")
    # A module whose parent has gone cannot be looked for.
    parent_is_there = parent == "dc_trl" or importlib.util.find_spec(parent) is not None
    assert not parent_is_there or importlib.util.find_spec(f"{parent}.{name}") is None


def test_what_stays_is_importable_from_where_it_was() -> None:
    named = re.findall(r"`(dc_trl(?:\.\w+)?)`", TEXT.partition("## ")[0])
    assert named == ["dc_trl", "dc_trl.discrepancy", "dc_trl.dual", "dc_trl.length_decay"]
    for name in named:
        importlib.import_module(name)
    constraint = importlib.import_module("dc_trl.constraint")
    assert constraint.discrepancy_penalty and constraint.penalised_advantages
