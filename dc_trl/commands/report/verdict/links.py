# SPDX-License-Identifier: Apache-2.0
"""Where a section of docs/ is on the web."""

from importlib.metadata import PackageNotFoundError, metadata
from urllib.parse import urlsplit

from dc_trl.commands.report.verdict.checks import Section

# Labels of a project's address under which the repository is, the surest first, as packages write them.
_LABELS = ("repository", "source", "homepage")
_HOST = "github.com"


def section_link(section: Section) -> str | None:
    """Address of a section in the repository on the web; None where the package's metadata names no repository."""
    repository = repository_link()
    return repository and f"{repository}/blob/main/docs/{section.page}.md#{section.anchor}"


def repository_link() -> str | None:
    """Address of the package's repository, from the project URLs of its metadata; None where there is none."""
    try:
        lines = metadata("dc-trl").get_all("Project-URL") or []
    except PackageNotFoundError:  # run from a checkout that was not installed
        return None
    urls = {label.strip().lower(): url.strip() for label, _, url in (line.partition(",") for line in lines)}
    found = (urls[label] for label in _LABELS if label in urls)
    return next((url.rstrip("/") for url in found if _is_repository(url)), None)


def _is_repository(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "https" and parts.hostname == _HOST and len(parts.path.strip("/").split("/")) == 2
