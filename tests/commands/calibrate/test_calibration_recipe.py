# SPDX-License-Identifier: Apache-2.0
"""`dc-trl calibrate --set`: one line of a recipe changes, every other byte stays, and what would break is refused."""

from pathlib import Path

import pytest
import yaml
from places import ROOT

from dc_trl.commands.calibrate.recipe import check_recipe, set_tolerance
from dc_trl.commands.usage import UsageError

RECIPES = sorted((ROOT / "examples/configs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_changes_in_one_line(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    copy.chmod(0o640)
    for value in (0.0123, 3e-05):
        set_tolerance(copy, value, "measured: x")
        old, new = path.read_bytes().splitlines(True), copy.read_bytes().splitlines(True)
        at = next((i for i, line in enumerate(old) if line.startswith(b"discrepancy_tolerance:")), len(old))
        assert old[:at] == new[:at] and old[at + 1 :] == new[at + 1 :]
        assert new[at].startswith(b"discrepancy_tolerance: ") and new[at].endswith(b"  # measured: x\n")
        assert yaml.safe_load(copy.read_text()) == yaml.safe_load(path.read_text()) | {"discrepancy_tolerance": value}
    assert copy.stat().st_mode & 0o777 == 0o640 and list(tmp_path.iterdir()) == [copy]


LINE = b"discrepancy_tolerance: 0.5  # c"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"a: 1\n", b"a: 1\n" + LINE + b"\n"),
        (b"a: 1", b"a: 1\n" + LINE + b"\n"),
        (b"a: 1\r\nb: 2\r\n", b"a: 1\r\nb: 2\r\n" + LINE + b"\r\n"),
        (b"discrepancy_tolerance: 1\r\nb: 2", LINE + b"\r\nb: 2"),
        (b"# discrepancy_tolerance: 1\na: 1\n", b"# discrepancy_tolerance: 1\na: 1\n" + LINE + b"\n"),
        (b"a: 1\ndiscrepancy_tolerance:   # calibrated\nb: 2\n", b"a: 1\n" + LINE + b"\nb: 2\n"),
        (b"discrepancy_tolerance:\n", LINE + b"\n"),
        (b"discrepancy_tolerance: '1'", LINE),
        ("a: π # λ\ndiscrepancy_tolerance: 1 # π\n".encode(), "a: π # λ\n".encode() + LINE + b"\n"),
        (b"a: |\n  discrepancy_tolerance: 1\nb: 2\n", b"a: |\n  discrepancy_tolerance: 1\nb: 2\n" + LINE + b"\n"),
    ],
)  # fmt: skip
def test_everything_else_stays(before: bytes, after: bytes, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(before)
    check_recipe(path)
    set_tolerance(path, 0.5, "c")
    assert path.read_bytes() == after


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("discrepancy_tolerance: 1\na: 2\ndiscrepancy_tolerance: 3\n", "2 times, in lines 1, 3"),
        ("a:\n  discrepancy_tolerance: 1\n", "inside another option"),
        ("a:\n  - discrepancy_tolerance: 1\n", "inside another option"),
        ("discrepancy_tolerance:\n  0.1\n", "on a line of its own"),
        ("discrepancy_tolerance: [1, 2]\n", "on a line of its own"),
        ("{discrepancy_tolerance: 1}\n", "one option a line"),
        ("- a\n", "one option a line"),
        ("a: [\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
    ],
)
def test_a_recipe_that_cannot_be_set_is_refused_before_measuring(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        check_recipe(path)
    assert path.read_text() == text


@pytest.mark.parametrize("text", ["a: &x 1\ndiscrepancy_tolerance: &y 2\nb: *y\n", "a: 1\n...\n"])
def test_a_recipe_that_setting_would_break_is_left(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    for refuse in (check_recipe, lambda path: set_tolerance(path, 0.5, "c")):
        with pytest.raises(UsageError, match="by hand"):
            refuse(path)
    assert path.read_text() == text
