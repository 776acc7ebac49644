# SPDX-License-Identifier: Apache-2.0
"""The documentation site builds without a warning, and a link to what is not there is one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import DOCS, PAGES
from places import ROOT

pytest.importorskip("sphinx", reason="the site needs the extra docs")


def build(source: Path, target: Path, builder: str = "html") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-b", builder, "-q", "-W", "--keep-going", str(source), str(target)]
    environment = os.environ | {"NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = build(DOCS, target)
    assert (done.returncode, done.stderr) == (0, "")
    return target


def test_every_page_is_on_the_site_and_in_its_contents(site: Path) -> None:
    front = (site / "index.html").read_text(encoding="utf-8")
    for page in PAGES:
        assert (site / f"{page.stem}.html").is_file()
        assert f'href="{page.stem}.html"' in front or page.stem == "index"


def test_it_asks_no_other_host(site: Path) -> None:
    for path in site.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|link|img)\b[^>]*?(?:src|href)="(https?://[^"]+)"', text)
        assert loaded == [], path.name


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A site of two pages with the configuration of the real one."""
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(DOCS / "conf.py", docs)
    shutil.copytree(DOCS / "_static", docs / "_static")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (docs / "_toctree.yml").write_text("- title: All\n  sections: [{local: index, title: A}, {local: b, title: B}]\n")
    (docs / "b.md").write_text("# B\n\n## The loop of λ\n")
    return docs


def front_page(docs: Path, line: str) -> Path:
    (docs / "index.md").write_text(f"# A\n\n{line}\n", encoding="utf-8")
    return docs


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[b](c.md)", "c.md"),
        ("[b](b.md#no-such-heading)", "no-such-heading"),
        ("![b](images/none.png)", "none.png"),
        ("[b](../no-such-file.py)x {doc}`nowhere`", "nowhere"),
    ],
)
def test_a_link_to_nothing_is_an_error(small: Path, tmp_path: Path, line: str, said: str) -> None:
    done = build(front_page(small, line), tmp_path / "out", "dummy")
    assert done.returncode != 0 and said in done.stderr


def test_links_out_of_the_pages_follow_the_address_of_the_repository(small: Path, tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("a licence")
    (tmp_path / "folder").mkdir()
    line = "[b](b.md#the-loop-of-λ), [file](../LICENSE), [part](../LICENSE#part), [folder](../folder)"
    done = build(front_page(small, line), tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert len(re.findall(r'href="_downloads/\w+/LICENSE"', text)) == 2 and "../" not in text

    project = tmp_path / "pyproject.toml"
    address = "https://git.example/dc-trl"
    project.write_text(project.read_text().replace("[project.urls]", f'[project.urls]\nRepository = "{address}"'))
    done = build(front_page(small, line), tmp_path / "again")
    assert (done.returncode, done.stderr) == (0, "")
    text = (tmp_path / "again" / "index.html").read_text(encoding="utf-8")
    for path in ("LICENSE", "LICENSE#part", "folder"):
        assert f'href="{address}/blob/main/{path}"' in text
