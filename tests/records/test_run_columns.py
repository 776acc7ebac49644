# SPDX-License-Identifier: Apache-2.0
"""A log read as columns says what the same log read entry by entry says."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_pages import write_log

from dc_trl.records.run_columns import columns_of, read_columns
from dc_trl.records.run_reader import is_finite, read_run

ODD = [None, True, 7, 2**60, 10**400, 1e300, -0.0, 5e-324, math.nan, math.inf, "1.5", "", [1], {"a": 2}]


def odd_log(folder: Path, lines: int, seed: int) -> Path:
    """Entries with other keys from line to line, values of every kind, and two resumes."""
    draw = random.Random(seed)
    write_log(folder, [])
    layouts = [["step", *draw.sample("abcdef", draw.randint(0, 6))] for _ in range(5)]
    step = 0
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        for number in range(lines):
            if number in (lines // 3, lines // 2):
                step = max(step - draw.randint(0, 200), 0)
                file.write(json.dumps({"start": {"step": step, "max_steps": 9, "settings": {"seed": number}}}) + "\n")
            step += draw.randint(0, 1)
            keys = draw.choice(layouts) if draw.random() < 0.99 else ["b", "step", "g"]
            values = [draw.choice(ODD) if draw.random() < 0.02 else draw.random() for _ in keys]
            file.write(json.dumps(dict(zip(keys, values, strict=True)) | {"step": step}) + "\n")
    return folder


def expected(folder: Path, key: str) -> tuple[list[int], list[float], Any]:
    entries = [(entry["step"], entry[key]) for entry in read_run(folder).entries if key in entry]
    numbers = [float(value) if is_finite(value) else math.nan for _, value in entries]
    return [step for step, _ in entries], numbers, next((v for _, v in reversed(entries) if v is not None), None)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("lines", [3, 300, 3_000])
def test_columns_hold_what_the_entries_hold(tmp_path: Path, lines: int, seed: int) -> None:
    folder = odd_log(tmp_path, lines, seed)
    run, columns = read_run(folder), read_columns(folder)
    assert (columns.name, columns.source, columns.start, columns.settings) == (
        *(run.name, run.source),
        *(run.start, run.settings),
    )
    assert columns.steps.tolist() == [entry["step"] for entry in run.entries]
    assert set(columns.columns) == {key for entry in run.entries for key in entry}
    for key, column in columns.columns.items():
        steps, numbers, last = expected(folder, key)
        found, values = columns.series(key)
        assert found.tolist() == steps
        np.testing.assert_array_equal(values, numbers)
        assert column.rows.tolist() == [row for row, entry in enumerate(run.entries) if key in entry]
        # Of what a resumed run repeats and is no number, nothing is kept: then the last number stands for it.
        assert column.last == last or column.last is last or not is_finite(last)
        assert (key in columns.drawable) == any(map(is_finite, numbers))
    same = columns_of(run)
    assert set(same.columns) == set(columns.columns)


def test_the_value_of_an_entry(tmp_path: Path) -> None:
    columns = read_columns(write_log(tmp_path, [{"step": 1, "a": 0.5}, {"step": 2}, {"step": 3, "a": None}]))
    assert [columns.at("a", row) for row in range(4)] == [0.5, None, None, None]
    assert columns.at("b", 0) is None and columns.last("a") == 0.5 and columns.last("b") is None


def test_an_empty_log(tmp_path: Path) -> None:
    columns = read_columns(write_log(tmp_path, []))
    assert len(columns.steps) == 0 and columns.columns == {} and columns.series("a")[1].tolist() == []


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '{"a": 1}', '{"step": "1"}', '{"step": true}', '{"step": 1e3}', '{"step": 99999999999999999999}']
    + ['{"step": 1, "max_steps": "x"}', '{"start": {"step": 1}}', '{"step": 1, "a": ' + "[" * 200 + "]" * 200 + "}"],
)
def test_a_line_that_is_no_entry_is_refused_as_by_the_other_reader(tmp_path: Path, line: str) -> None:
    folder = write_log(tmp_path, [{"step": 1, "a": 0.5}])
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    messages = []
    for read in (read_run, read_columns):
        with pytest.raises(ValueError, match="line 3 of") as error:
            read(folder)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
