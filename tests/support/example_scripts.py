# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/ as modules."""

import importlib.util
from types import ModuleType

from places import ROOT


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
