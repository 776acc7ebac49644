# SPDX-License-Identifier: Apache-2.0
"""The results: no run counts twice, and a killed writer costs its own line alone."""

from pathlib import Path
from typing import Any

import pytest


def line(seed: int, accuracy: float = 0.5) -> dict[str, Any]:
    return {"regime": "r", "arm": "a", "seed": seed, "outcomes": {"accuracy": accuracy}}


def test_a_run_is_added_once(tmp_path: Path) -> None:
    from papers import results_file

    path = tmp_path / "results" / "block.jsonl"
    assert results_file.add(path, line(1, 0.5))
    assert not results_file.add(path, line(1, 0.9))
    assert results_file.add(path, line(2))
    assert [(x["seed"], x["outcomes"]["accuracy"]) for x in results_file.read(path)] == [(1, 0.5), (2, 0.5)]


def test_a_torn_line_is_no_run_and_is_cut_off(tmp_path: Path) -> None:
    from papers import results_file

    path = tmp_path / "block.jsonl"
    results_file.add(path, line(1))
    with path.open("a") as file:
        file.write('{"regime": "r", "arm": "a", "seed": 2, "outc')
    assert [x["seed"] for x in results_file.read(path)] == [1]
    assert results_file.add(path, line(2))
    assert [x["seed"] for x in results_file.read(path)] == [1, 2]


def test_two_lines_of_a_run_are_an_error(tmp_path: Path) -> None:
    from papers import results_file

    path = tmp_path / "block.jsonl"
    path.write_text('{"regime": "r", "arm": "a", "seed": 1}\n' * 2)
    with pytest.raises(ValueError, match="two lines"):
        results_file.read(path)


def test_what_a_log_comes_to() -> None:
    from papers.outcomes import curve, outcomes

    log: list[dict[str, Any]] = [{"reward": x / 10, "entropy": 1.0} for x in (0, 2, 4, 6, 8, 8, 1, 1)]
    log.append({"dc/discrepancy/mean": 0.5, "train_runtime": 1.0})
    found = outcomes(log)
    assert found["accuracy"] == pytest.approx(0.1)  # of the last two
    assert found["best"] == pytest.approx(0.65)  # .4 .6 .8 .8 or .6 .8 .8 .1: the first
    assert found["final"] == pytest.approx((0.8 + 0.8 + 0.1 + 0.1) / 4)
    assert found["collapsed"] == 0.0
    assert found["discrepancy_all"] == 0.5
    assert curve(log, "reward", points=4) == pytest.approx([0.1, 0.5, 0.8, 0.1])
    assert curve([{"x": float("nan")}], "x") == [None]


def test_a_run_that_ends_below_half_of_its_best_collapsed() -> None:
    from papers.outcomes import outcomes

    assert outcomes([{"reward": x} for x in [0.9] * 4 + [0.4] * 4])["collapsed"] == 1.0
    with pytest.raises(ValueError, match="no reward"):
        outcomes([{"loss": 1.0}])
