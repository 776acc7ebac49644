# SPDX-License-Identifier: Apache-2.0
"""What a package holds: in the source distribution all that its tests read, in the metadata what an index shows."""

import email
import importlib.util
import re
import subprocess
import sys
import tarfile
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

pytest.importorskip("hatchling", reason="builds the package")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of this checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    code = "import sys, hatchling.build; print(hatchling.build.build_sdist(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def files(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        found = ((item.name.partition("/")[2], tar.extractfile(item)) for item in tar.getmembers() if item.isfile())
        return {name: content.read() for name, content in found if content is not None}


@pytest.fixture(scope="module")
def metadata(files: dict[str, bytes]) -> Message:
    return email.message_from_string(files["PKG-INFO"].decode())


def test_it_holds_every_file_of_the_repository(files: dict[str, bytes]) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a repository: there is nothing to compare with")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert {"pyproject.toml", "hatch_build.py", "docs/conf.py", ".ci/matrix"} <= tracked
    assert tracked - set(files) == set()


def test_it_holds_nothing_that_a_run_left(files: dict[str, bytes]) -> None:
    left = re.compile(r"(^|/)(outputs|__pycache__|\.venv|\.pytest_cache|\.mypy_cache)/|\.pyc$")
    assert [name for name in files if left.search(name)] == []


def test_the_description_is_the_readme(metadata: Message) -> None:
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    addresses = dict(line.split(", ") for line in metadata.get_all("Project-URL") or [])
    assert all(address.startswith("https://") for address in addresses.values()) and len(addresses) >= 2


def test_no_python_is_named_that_was_not_tried(metadata: Message) -> None:
    page = (ROOT / "docs" / "seams.md").read_text(encoding="utf-8")
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(metadata.get_all("Classifier") or []))
    assert named == re.findall(r"Python (3\.\d+) \(no other was tried\)", page)


def hook() -> Any:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_with_an_address_no_link_of_the_readme_is_relative() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    made = hook().with_absolute_links(text, "https://git.example/dc-trl/")
    links = re.findall(r"\]\(([^)]+)\)", made)
    assert len(links) == len(re.findall(r"\]\(([^)]+)\)", text)) > 10
    assert all(link.startswith("https://") for link in links)
    assert "https://git.example/dc-trl/raw/main/docs/images/sync.png" in links
    assert "https://git.example/dc-trl/blob/main/docs/results.md#rounding-at-the-weight-sync" in links
    assert hook().with_absolute_links(text, None) == text
