# SPDX-License-Identifier: Apache-2.0
"""The list of slow tests: what it names is there, and how it is written."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import slow_list
from places import ROOT


def test_what_it_names_is_there() -> None:
    for name in slow_list.slow_functions():
        file, *_, function = name.split("::")
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), name


def test_it_names_what_was_slow_and_keeps_what_did_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = tmp_path / "slow.txt"
    written.write_text("a.py::test_elsewhere\nb.py::test_quick_now\n")
    monkeypatch.setattr(slow_list, "LIST", written)
    clock = slow_list.Clock()

    def report(test: str, seconds: float, when: str = "call") -> Any:
        return SimpleNamespace(nodeid=test, fspath=test.partition("::")[0], duration=seconds, when=when)

    slow, setup = slow_list.SECONDS, slow_list.SETUP_SECONDS
    for entry in (
        report("b.py::test_quick_now", 0.5 * slow),
        report("b.py::test_slow[1]", 0.9 * slow),
        report("b.py::test_slow[2]", 1.2 * slow),
        report("b.py::test_mostly_quick[1]", 0.1 * slow),
        report("b.py::test_mostly_quick[2]", 1.5 * slow),
        report("c.py::test_first", setup, "setup"),
        report("c.py::test_that_has_the_same_fixture", 0.0),
    ):
        clock.pytest_runtest_logreport(entry)
    clock.pytest_sessionfinish()
    assert written.read_text().split() == [
        "a.py::test_elsewhere",
        "b.py::test_slow",
        "c.py::test_first",
        "c.py::test_that_has_the_same_fixture",
    ]
