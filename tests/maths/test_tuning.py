# SPDX-License-Identifier: Apache-2.0
"""docs/tuning.md and its picture: each setting does to λ what the page says."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from example_scripts import load_example
from pages import DOCS, rows
from places import ROOT

from dc_trl import DCGRPOConfig

SETTINGS = {"discrepancy_tolerance", "tolerance_slack", "multiplier_max", "dual_lr", "multiplier_init"}


@pytest.fixture(scope="module")
def tuning() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        module = load_example("tuning")
    sys.modules.pop("closed_loop", None)
    return module


def story(tuning: ModuleType, number: int) -> tuple[np.ndarray, np.ndarray]:
    return tuning.run(tuning.SETTINGS[number])


def test_the_defaults_bring_the_discrepancy_back_and_rest(tuning: ModuleType) -> None:
    setting = tuning.SETTINGS[0]
    fields = DCGRPOConfig.__dataclass_fields__
    assert setting.slack == fields["tolerance_slack"].default
    assert setting.maximum == fields["multiplier_max"].default
    d, multiplier = story(tuning, 0)
    assert d[tuning.FALLS - 1] == pytest.approx(setting.slack, rel=0.05)
    assert multiplier[: tuning.GROWS].max() == 0.0 and multiplier[-1] == 0.0


def test_a_tolerance_below_the_floor_is_never_met(tuning: ModuleType) -> None:
    d, multiplier = story(tuning, 1)
    assert d.min() > tuning.SETTINGS[1].slack
    assert np.diff(multiplier).min() > 0.0 and multiplier[-1] > 0.3


def test_a_large_slack_is_plain_grpo(tuning: ModuleType) -> None:
    d, multiplier = story(tuning, 2)
    assert multiplier.max() == 0.0 and d.max() > 2.4


def test_a_small_maximum_holds_the_multiplier(tuning: ModuleType) -> None:
    d, multiplier = story(tuning, 3)
    setting = tuning.SETTINGS[3]
    assert multiplier.max() == setting.maximum and multiplier[tuning.FALLS - 1] == setting.maximum
    assert d[tuning.FALLS - 1] > 1.5 * setting.slack


def test_the_page_has_the_defaults(tuning: ModuleType) -> None:
    fields = DCGRPOConfig.__dataclass_fields__
    listed = [(cells[0].split("`")[1], cells[1]) for cells in rows("tuning.md") if cells[0].strip().startswith("`")]
    settings = {name: value.strip() for name, value in listed if name in fields}
    assert set(settings) == SETTINGS
    for name, value in settings.items():
        assert value.partition(":")[0].strip("`") == str(fields[name].default)


def test_it_draws_and_prints(tuning: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tuning.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tuning.py", "--output", str(path)])
        tuning.main()
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert capsys.readouterr().out.count("late in the disturbance") == len(tuning.SETTINGS)
    assert (DOCS / "images" / "tuning.png").stat().st_size > 1000
