# SPDX-License-Identifier: Apache-2.0
"""The study's modules, which lie beside the demo's in examples/ and not in the package."""

import sys
from collections.abc import Iterator

import pytest
from places import ROOT


@pytest.fixture(autouse=True, scope="session")
def examples_are_on_the_path() -> Iterator[None]:
    folder = str(ROOT / "examples")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)
