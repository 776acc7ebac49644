# SPDX-License-Identifier: Apache-2.0
"""What tests read of a model card."""

from pathlib import Path


def quick_start(folder: Path) -> str:
    """The Python code of the card's quick start, which says that it is to be run in the card's folder."""
    section = (folder / "README.md").read_text(encoding="utf-8").partition("## Quick start\n")[2].partition("\n## ")[0]
    assert "In this folder:" in section
    return section.partition("```python\n")[2].partition("```")[0]
