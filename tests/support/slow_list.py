# SPDX-License-Identifier: Apache-2.0
"""Which tests are slow: measured, and written to a list that `make check` leaves out."""

from collections import Counter

import pytest
from places import ROOT

LIST = ROOT / "tests/slow.txt"
SECONDS = 0.2
"""What a test may take in the mean over its parameters, on an idle machine, for `make check` to run it."""
SETUP_SECONDS = 1.0
"""What its fixtures may; those that take longer serve a file, all of which is slow then."""


def slow_functions() -> set[str]:
    """What the list names."""
    return set(LIST.read_text(encoding="utf-8").split())


def function_of(test: str) -> str:
    """The name of a test without its parameters, with the path of its file."""
    return test.partition("[")[0]


class Clock:
    """How long each test of a session took, those of other processes included."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.slow_files: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.when == "setup" and report.duration >= SETUP_SECONDS:
            self.slow_files.add(report.fspath)

    def pytest_sessionfinish(self) -> None:
        """Writes which functions are slow; of those that did not run, it leaves what is there."""
        total, count = Counter[str](), Counter[str]()
        for test, seconds in self.seconds.items():
            total[function_of(test)] += seconds
            count[function_of(test)] += 1
        kept = slow_functions() - total.keys()
        slow = {
            name
            for name in total
            if total[name] >= SECONDS * count[name] or name.partition("::")[0] in self.slow_files
        }
        LIST.write_text("\n".join(sorted(kept | slow)) + "\n", encoding="utf-8")
