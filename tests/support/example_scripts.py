# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/ as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from places import ROOT

TINY = ROOT / "examples" / "configs" / "tiny_cpu.yaml"


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def enter_tiny_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a folder the working directory, in which `TINY` runs as it is, in one process."""
    monkeypatch.chdir(folder)
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    load_example("make_tiny_policy").main(Path("outputs/tiny"))
