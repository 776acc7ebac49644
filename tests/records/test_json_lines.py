# SPDX-License-Identifier: Apache-2.0
"""Files that are appended to: what a killed process or an editor left at their end."""

import math
from pathlib import Path

import pytest
from hostile import BAD_LINES, DEEP

from dc_trl.records.json_lines import MAX_DEPTH, append_lines, mend_end, numbered_lines, parse_json


@pytest.mark.parametrize(
    ("left", "mended"),
    [
        ("", ""),
        ('{"a": 1}\n', '{"a": 1}\n'),
        ('{"a": 1}\n{"b": "é', '{"a": 1}\n'),
        ('{"a": 1', ""),
        ('{"a": 1}\n{"b": ' + DEEP + "}", '{"a": 1}\n'),
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


@pytest.mark.parametrize("name", BAD_LINES)
def test_what_is_no_json_is_a_value_error_with_the_reason(name: str) -> None:
    line, reason = BAD_LINES[name]
    with pytest.raises(ValueError, match=reason):
        parse_json(line)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_the_limit_of_nesting(opening: str) -> None:
    closing = {"[": "]", '{"a":': "}"}[opening]
    deepest = opening * MAX_DEPTH + '"[[[{{{"' + closing * MAX_DEPTH
    assert parse_json(deepest) == parse_json(deepest.encode())
    with pytest.raises(ValueError, match="nested deeper than 100 levels"):
        parse_json(opening + deepest + closing)
    wide = "[" + ",".join(["[]"] * 1000) + "]"
    assert len(parse_json(wide)) == 1000


def test_a_byte_order_mark_is_no_part_of_the_json() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": "\xc3\xa9"}') == {"a": "é"}


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'\n{"a": "\xe2\x80\xa8"}\r\n \n{"b"')  # U+2028 ends no line
    lines = list(numbered_lines(tmp_path / "log.jsonl"))
    assert lines == [(2, b'{"a": "\xe2\x80\xa8"}\r\n'), (4, b'{"b"')]
