# SPDX-License-Identifier: Apache-2.0
"""The short help of `dc-trl train`: short, whole where it must be, and true to the parser that reads the options."""

import dataclasses
from typing import Any

import pytest
from trl import GRPOConfig

from dc_trl.commands.cli import main
from dc_trl.commands.train.arguments import TrainArguments, make_parser
from dc_trl.commands.train.help import GROUPS, WIDTH, Flag, short_help
from dc_trl.config import DCGRPOConfig

FLAGS = [flag for flags in GROUPS.values() for flag in flags]


@pytest.fixture(scope="module")
def actions() -> dict[str, Any]:
    """What the real parser knows, by the option as it is written."""
    return make_parser()._option_string_actions


def test_it_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "x.yaml", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == short_help().splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= WIDTH == 120
    assert sum(line.endswith(":") and not line.startswith(" ") for line in lines) == len(GROUPS) == 4


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_a_flag_is_the_parsers(flag: Flag, actions: dict[str, Any]) -> None:
    if flag.name == "config":  # read before the parser
        return
    assert f"--{flag.name}" in actions, f"--{flag.name} is no option of dc-trl train"
    action = actions[f"--{flag.name}"]
    words = [str(getattr(word, "value", word)) for word in action.choices or [] if word is not None]
    listed = flag.values.split("|")
    assert not words or sorted(listed) == sorted(words) or not flag.values.islower()
    assert (flag.values == "") == (action.nargs in (0, "?") and action.default is not True)
    if flag.default:
        assert same(flag.default, action.default), action.default


def same(shown: str, default: Any) -> bool:
    value = ", ".join(default) if isinstance(default, list) else str(getattr(default, "value", default))
    return shown == value


def test_no_option_of_this_package_is_missing() -> None:
    theirs = {field.name for field in dataclasses.fields(GRPOConfig)}
    own = {field.name for field in dataclasses.fields(DCGRPOConfig)} - theirs
    own |= {field.name for field in dataclasses.fields(TrainArguments)}
    names = [flag.name for flag in FLAGS]
    assert own <= set(names) and len(names) == len(set(names))


@pytest.mark.parametrize("command", ["train", "calibrate"])
def test_everything_is_under_help_all(command: str, capsys: pytest.CaptureFixture[str], actions: Any) -> None:
    assert main([command, "--help-all"]) == 0
    text = capsys.readouterr().out
    assert "--config RECIPE.yaml" in text
    assert all(option in text for option in actions)
