# SPDX-License-Identifier: Apache-2.0
"""pyproject.toml says what the package imports, and in which versions it was tried."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from places import ROOT

import dc_trl

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Not at their floors in requirements/lowest.txt, which says why; what is for vLLM is TRL's word.
NOT_LOWERED = {"torch", "trl"}
FOR_VLLM = {"vllm", "aiohttp"}
DISTRIBUTIONS = packages_distributions() | {"vllm": ["vllm"]}  # whichever build of it is installed


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """By canonical name."""
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(each.name): each for each in parsed}


def pins(name: str) -> dict[str, str]:
    """What a file of constraints pins, by canonical name."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("==")[::2] for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(package): pinned for package, pinned in pairs}


def floor(requirement: Requirement) -> str:
    return next(each.version for each in requirement.specifier if each.operator == ">=")


NEEDED = requirements(PROJECT["dependencies"])
DEVELOPMENT = ("test", "docs", "dev")
OPTIONAL = requirements([line for name, lines in EXTRAS.items() if name not in DEVELOPMENT for line in lines])
TESTED = requirements([line for name in DEVELOPMENT for line in EXTRAS[name]])


def imported(folder: str) -> set[str]:
    """The top-level packages that the files of a folder import, wherever in the file; not the standard library's."""
    found: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"dc_trl"}


@pytest.mark.parametrize(
    ("folder", "declared"),
    [
        ("dc_trl", NEEDED.keys() | OPTIONAL.keys()),
        ("examples", NEEDED.keys() | OPTIONAL.keys() | TESTED.keys()),
        ("tests", NEEDED.keys() | OPTIONAL.keys() | TESTED.keys() | {"packaging"}),  # pytest's own
    ],
)
def test_every_import_is_declared(folder: str, declared: set[str]) -> None:
    files = [path for place in ("tests", "examples") for path in (ROOT / place).rglob("*.py")]
    own = {path.stem for path in files} | {path.parent.name for path in files if path.name == "__init__.py"}
    names = imported(folder) - own
    assert {"torch", "trl"} <= names
    undeclared = {
        name for name in names if not {canonicalize_name(each) for each in DISTRIBUTIONS.get(name, [name])} & declared
    }
    assert undeclared == set()


def test_the_lowest_versions_are_the_floors() -> None:
    lowest = pins("requirements/lowest.txt")
    tried = {name: each for name, each in (NEEDED | OPTIONAL).items() if name not in NOT_LOWERED | FOR_VLLM}
    assert lowest.keys() - NOT_LOWERED == tried.keys()
    for name, requirement in tried.items():
        assert Version(lowest[name]) == Version(floor(requirement)), name
    assert Version(pins("requirements/trl-floor.txt")["trl"]) == Version(floor(NEEDED["trl"]))


@pytest.mark.parametrize("name", ["constraints.txt", "requirements/lowest.txt", "requirements/trl-floor.txt"])
def test_tried_versions_are_within_the_ranges(name: str) -> None:
    pinned = pins(name)
    for package, requirement in (NEEDED | OPTIONAL | TESTED).items():
        if package in pinned:
            assert requirement.specifier.contains(pinned[package]), package
    assert pinned["torch"] == pins("constraints.txt")["torch"]


def test_the_installed_versions_are_within_the_ranges() -> None:
    for package, requirement in NEEDED.items():
        assert requirement.specifier.contains(version(package)), package


def test_the_page_of_versions_has_the_ranges() -> None:
    text = (ROOT / "docs" / "seams.md").read_text(encoding="utf-8")
    table = text.partition("## Versions")[2].partition("\n## ")[0]
    pinned = pins("constraints.txt")
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in table.splitlines() if line.startswith("| ")]
    names = [canonicalize_name(name) for name, _, _ in rows[1:]]
    assert {"trl", "transformers"} <= set(names)
    for name, (_, low, pin) in zip(names, rows[1:], strict=True):
        expected = pinned[name] if name == "torch" else floor((NEEDED | OPTIONAL)[name])
        assert (Version(low), Version(pin)) == (Version(expected), Version(pinned[name])), name


def test_every_job_of_the_matrix_has_its_files() -> None:
    matrix = ROOT / ".ci" / "matrix"
    jobs = subprocess.run([matrix], capture_output=True, text=True, check=True).stdout.split()
    assert jobs == ["constraints", "lowest", "newest", "trl-floor"]
    unknown = subprocess.run([matrix, "no-such"], capture_output=True, text=True)
    assert unknown.returncode == 2 and "constraints lowest newest trl-floor" in unknown.stderr
    text = matrix.read_text(encoding="utf-8")
    files = [word for word in text.replace(")", " ").split() if word.endswith(".txt") or word.startswith("tests/")]
    assert files and all(Path(ROOT, file).exists() for file in files)


def test_changelog_and_citation_are_of_this_version() -> None:
    assert dc_trl.__version__ == PROJECT["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\d\S*)", changes, flags=re.MULTILINE)[0] == PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
