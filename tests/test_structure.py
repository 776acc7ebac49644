# SPDX-License-Identifier: Apache-2.0
"""The maths stays pure, and what engines say of themselves light; test_rooms.py has the arrows between modules."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

PACKAGE = ROOT / "dc_trl"
TORCH = {"constraint", "step"}
for room in ("discrepancy", "estimators"):
    TORCH |= {str(path.relative_to(PACKAGE).with_suffix("")) for path in (PACKAGE / room).rglob("*.py")}
PYTHON = {"dual", "length_decay"}


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
    own = {f"dc_trl.{module}".replace("/", ".").removesuffix(".__init__") for module in TORCH | PYTHON}
    foreign = {module for module in imports(PACKAGE / f"{name}.py") if module.split(".")[0] not in allowed}
    assert foreign <= own


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("rollouts/engines/*.py")), ids=lambda path: path.name)
def test_declaring_an_engine_imports_nothing_else_of_the_package(path: Path) -> None:
    # The configuration, and pages about runs, ask engines what they are without loading one.
    top = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    own = {node.module for node in top if (node.module or "").startswith("dc_trl")}
    assert all(module.startswith("dc_trl.rollouts.engines") for module in own)


def test_maths_loads_without_trl() -> None:
    code = "import sys, dc_trl.dual, dc_trl.discrepancy; assert not {'trl', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
