# SPDX-License-Identifier: Apache-2.0
"""The maths stays pure; `test_rooms.py` holds where imports point."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

PACKAGE = ROOT / "dc_trl"
TORCH = {"discrepancy", "advantage", "importance"}
PYTHON = {"dual", "constraint", "length_decay"}


def imports(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("name", sorted(TORCH | PYTHON))
def test_maths_imports_torch_or_the_standard_library_only(name: str) -> None:
    allowed = set(sys.stdlib_module_names) | ({"torch"} if name in TORCH else set())
    own = {f"dc_trl.{module}" for module in TORCH | PYTHON}
    foreign = {module for module in imports(PACKAGE / f"{name}.py") if module.split(".")[0] not in allowed}
    assert foreign <= own


def test_maths_loads_without_trl() -> None:
    code = "import sys, dc_trl.dual, dc_trl.discrepancy; assert not {'trl', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
