# SPDX-License-Identifier: Apache-2.0
"""The study's modules, and what they use of demo and benchmarks: they lie in examples/ and not in the package."""

import sys
from collections.abc import Iterator

import pytest
from places import ROOT


@pytest.fixture(autouse=True, scope="session")
def examples_are_on_the_path() -> Iterator[None]:
    folders = [str(ROOT / "examples"), str(ROOT / "examples/benchmarks")]
    sys.path[:0] = folders
    yield
    for folder in folders:
        sys.path.remove(folder)
