# SPDX-License-Identifier: Apache-2.0
"""What is made when a package is built: its description is the README with absolute links, as an index needs them.

The links lead to `Repository` of `project.urls` in pyproject.toml. While that address is not known they stay as they
are.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)")


def with_absolute_links(text: str, repository: str | None) -> str:
    """Markdown whose relative links and pictures lead into the repository; as it is without an address."""
    if not repository:
        return text
    address = repository.rstrip("/")

    def absolute(match: re.Match[str]) -> str:
        picture, label, path = match.groups()
        return f"{picture}[{label}]({address}/{'raw' if picture else 'blob'}/main/{path})"

    return RELATIVE_LINK.sub(absolute, text)


class ReadmeHook(MetadataHookInterface):
    """Gives the package its description."""

    def update(self, metadata: dict[str, Any]) -> None:
        root = Path(self.root)
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        text = (root / "README.md").read_text(encoding="utf-8")
        text = with_absolute_links(text, project["urls"].get("Repository"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
