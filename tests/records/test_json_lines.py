# SPDX-License-Identifier: Apache-2.0
"""Files that are appended to: what a killed process or an editor left at their end."""

import math
from pathlib import Path

import pytest

from dc_trl.records.json_lines import append_lines, mend_end


@pytest.mark.parametrize(
    ("left", "mended"),
    [
        ("", ""),
        ('{"a": 1}\n', '{"a": 1}\n'),
        ('{"a": 1}\n{"b": "é', '{"a": 1}\n'),
        ('{"a": 1', ""),
        ('{"a": 1}\n{"b": 2}', '{"a": 1}\n{"b": 2}\n'),  # an editor's: nothing is lost
    ],
)
def test_a_line_that_was_cut_off_goes_and_a_whole_one_stays(tmp_path: Path, left: str, mended: str) -> None:
    path = tmp_path / "new" / "log.jsonl"
    mend_end(path)
    assert not path.exists()
    append_lines(path, [])
    path.write_bytes(left.encode()[:-1] if left.endswith("é") else left.encode())
    mend_end(path)
    append_lines(path, [{"c": 3}, {"path": Path("x")}])
    assert path.read_text() == mended + '{"c": 3}\n{"path": "x"}\n'


def test_numbers_that_json_has_no_word_for_are_null(tmp_path: Path) -> None:
    append_lines(tmp_path / "log.jsonl", [{"a": math.inf, "b": [-math.inf, 1.5, {"c": math.nan}], "d": True}])
    assert (tmp_path / "log.jsonl").read_text() == '{"a": null, "b": [null, 1.5, {"c": null}], "d": true}\n'
