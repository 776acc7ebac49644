# SPDX-License-Identifier: Apache-2.0
"""README.md: short enough to be read, and what it quotes stands where it says."""

import re

from pages import DOCS, README
from places import ROOT

import dc_trl

TEXT = README.read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_prose_and_tables_are_short() -> None:
    assert len(PROSE.split()) <= 900  # as `wc -w` counts them, blocks of code apart


def test_what_was_shown_is_what_the_results_say() -> None:
    shown = TEXT.partition("### What was shown")[2].partition("\n## ")[0]
    rows = [line for line in shown.splitlines() if line.startswith("| ")][1:]
    results = (DOCS / "results.md").read_text(encoding="utf-8").splitlines()
    assert rows
    for row in rows:
        assert row in results, f"copy the row of this claim from docs/results.md: {row}"


def test_the_two_lines_change_what_they_say() -> None:
    block = TEXT.partition("```diff\n")[2].partition("```")[0].splitlines()
    old = {name for line in block if line.startswith("-") for name in re.findall(r"GRPO\w+", line)}
    new = dict(
        re.findall(r"import (\w+) as (\w+)", line)[0]
        for line in block
        if line.startswith("+") and line.startswith("+from dc_trl import")
    )
    assert len(new) == 2 and set(new.values()) == old
    assert all(issubclass(getattr(dc_trl, ours), _theirs(name)) for ours, name in new.items())


def _theirs(name: str) -> type:
    import trl

    return getattr(trl, name)


def test_its_commands_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z-]+)", TEXT))
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{name}:", makefile, flags=re.MULTILINE) for name in named)
    for path in re.findall(r"(?:--config|python) (examples/\S+)", TEXT):
        assert (ROOT / path).is_file(), path


def test_every_picture_exists() -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", TEXT)
    assert pictures and all((ROOT / path).stat().st_size > 1000 for path in pictures)
