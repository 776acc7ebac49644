# SPDX-License-Identifier: Apache-2.0
"""The pages of docs/, and the README."""

import re

from places import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
README = ROOT / "README.md"


def rows(page: str) -> list[list[str]]:
    """The cells of every table row of a page; an escaped bar is part of its cell."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
