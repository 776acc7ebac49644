# SPDX-License-Identifier: Apache-2.0
"""The maths stays pure, and imports point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

PACKAGE = ROOT / "dc_trl"
TORCH = {"discrepancy/tokens", "discrepancy/summary", "discrepancy/metrics", "discrepancy/__init__"}
TORCH |= {"constraint", "estimators/advantage", "estimators/importance", "step"}
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
    own = {f"dc_trl.{module}".replace("/", ".") for module in TORCH | PYTHON} | {"dc_trl.discrepancy"}
    foreign = {module for module in imports(PACKAGE / f"{name}.py") if module.split(".")[0] not in allowed}
    assert foreign <= own


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_but_the_command_imports_upwards(path: Path) -> None:
    # maths ← config ← rollouts ← trainer; only the package root and the command line may name the trainer.
    runtime = [n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ImportFrom)]
    modules = {n.module for n in runtime}
    if path.name not in {"__init__.py", "cli.py"}:
        assert "dc_trl.trainer" not in modules
    if path.name == "config.py":
        # What engines declare of themselves, and of sampling options, stands below the configuration that chooses one.
        assert not {m for m in modules if m and m.startswith("dc_trl.rollouts")} - {
            "dc_trl.rollouts.engines",
            "dc_trl.rollouts.sampling_options",
        }
    if "engines" in path.parts:
        assert all(m.startswith("dc_trl.rollouts.engines") for m in modules if m and m.startswith("dc_trl"))


def test_maths_loads_without_trl() -> None:
    code = "import sys, dc_trl.dual, dc_trl.discrepancy; assert not {'trl', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
