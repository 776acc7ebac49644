# SPDX-License-Identifier: Apache-2.0
"""JSON files of problems, looked through before `datasets` reads them.

Its parsers say neither file nor line of what they cannot read, and one of them ends the process where a value is
nested too deep.
"""

import json
from pathlib import Path
from typing import Any

from dc_trl.records.json_lines import numbered_lines, parse_json


class BadFileError(ValueError):
    """A file that holds no rows of JSON; the message names file, line and reason."""


def check_json_file(path: Path) -> None:
    """Reads a file of JSON Lines, or of one JSON document, which may be a list of rows, in a .json.

    Raises:
        BadFileError: a line, or the document, is not JSON, not UTF-8, nested too deep, no object, or has text that is
            none.
        OSError: the file cannot be read.
    """
    if path.suffix == ".json" and _is_document(path):
        return
    for number, line in numbered_lines(path):
        try:
            _check_row(parse_json(line), line)
        except ValueError as error:
            raise BadFileError(
                f"line {number} of {path} is no row of JSON Lines: {error}. Correct or remove that line"
            ) from error


def _is_document(path: Path) -> bool:
    """Whether a .json is one document, which must then be sound; otherwise its lines are."""
    _, first = next(numbered_lines(path), (0, b""))
    if not first.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
        try:
            parse_json(first)
            return False
        except ValueError:
            pass
    try:
        content = path.read_bytes()
        value = parse_json(content)
        for row in value if isinstance(value, list) else [value]:
            _check_row(row, content)
    except ValueError as error:
        raise BadFileError(f"{path} is no list of rows of JSON: {error}. Correct it") from error
    return True


def _check_row(row: Any, source: bytes) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"it is of type {type(row).__name__}, not an object")
    if b"\\u" in source and _has_half_pair(row):
        raise ValueError("it has half of a surrogate pair (\\ud800 to \\udfff), which is no character")


def _has_half_pair(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def line_of_row(path: Path, row: int) -> int | None:
    """The line, from 1, of a row of JSON Lines, from 0; blank lines are no rows. None if there is no such row."""
    return next((number for index, (number, _) in enumerate(numbered_lines(path)) if index == row), None)
