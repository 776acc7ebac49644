# SPDX-License-Identifier: Apache-2.0
"""The documentation site: `make docs` builds it from the Markdown pages of this folder into outputs/site."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).parent
PROJECT = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"].get("Repository")
# A link that is named by its file is named by its title on the site.
FILE_NAME = re.compile(r"\[(\w+\.md)\]\((?=\1)")
LINK_OUT = re.compile(r"\[([^\]`]+)\]\(\.\./([^)#]+)(#[^)]*)?\)")

project = PROJECT["name"]
author = PROJECT["authors"][0]["name"]
version = release = PROJECT["version"]

extensions = ["myst_parser"]
# Anchors as GitHub makes them, so that one link works on both.
myst_heading_anchors = 4
html_theme = "pydata_sphinx_theme"
html_theme_options = {"navbar_center": [], "secondary_sidebar_items": ["page-toc"], "show_prev_next": False}
html_sidebars = {"**": ["globaltoc.html"]}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"{project} {release}"
html_show_sourcelink = False
html_copy_source = False
# `make docs-links` alone looks at what lies outside.
linkcheck_anchors = False
linkcheck_timeout = 20


def contents() -> str:
    """The table of contents of `_toctree.yml`, as Sphinx wants it."""
    trees = []
    for section in yaml.safe_load((DOCS / "_toctree.yml").read_text(encoding="utf-8")):
        pages = [f"{page['title']} <{page['local']}>" for page in section["sections"] if page["local"] != "index"]
        options = [":hidden:", ":titlesonly:", f":caption: {section['title']}"]
        trees.append("\n".join(["```{toctree}", *options, "", *pages, "```"]))
    return "\n\n".join(trees)


def linked_out(match: re.Match[str]) -> str:
    """A link to what is no page of the site: into the repository where its address is known, else to the file."""
    label, path, anchor = match.groups()
    if REPOSITORY:
        return f"[{label}]({REPOSITORY}/blob/main/{path}{anchor or ''})"
    if (DOCS.parent / path).is_file():
        return f"{{download}}`{label} <../{path}>`"
    return label  # a folder


def read_page(app: Any, name: str, source: list[str]) -> None:
    """What is made of a page before Sphinx parses it."""
    source[0] = FILE_NAME.sub("[](", LINK_OUT.sub(linked_out, source[0]))
    if name == "index":
        source[0] += f"\n\n{contents()}\n"


def setup(app: Any) -> None:
    app.connect("source-read", read_page)
