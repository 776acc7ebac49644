# SPDX-License-Identifier: Apache-2.0
"""A TRL that cannot score on the device is named before anything is trained."""

from pathlib import Path

import pytest
import torch
from runs import dc_trainer

from dc_trl.training.scoring_device import check_scoring_device

VERSION = "dc_trl.rollouts.versions.version"


def install(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(VERSION, {"trl": installed}.__getitem__)


def test_trl_1_15_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "1.15.0")
    with pytest.raises(RuntimeError, match="TRL 1.15.0.*does not run on 'cpu'. Install TRL 1.16"):
        dc_trainer(tmp_path)
    check_scoring_device(torch.device("cuda"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_scoring_device(torch.device("cpu"))


@pytest.mark.parametrize("installed", ["1.16.0", "1.17.0.dev0", "2.0.0"])
def test_later_ones_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    install(monkeypatch, installed)
    assert dc_trainer(tmp_path).accelerator.device == torch.device("cpu")
