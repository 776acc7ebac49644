# SPDX-License-Identifier: Apache-2.0
"""Files with one JSON object a line that processes append to, and may be killed while they do."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def append_lines(path: Path, values: Iterable[Any]) -> None:
    """Appends a line for each value; makes the directory if missing.

    Numbers that JSON has no word for, NaN and the infinities, become null; other things that it has none for, text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(_finite(value), default=str, allow_nan=False) + "\n" for value in values))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mend_end(path: Path) -> None:
    """Ends a file at its last whole line, before something is appended.

    A last line without a newline is what a killed process left of one, and is removed; if it is whole JSON, as an
    editor may leave it, it gets its newline.
    """
    if not path.is_file() or (text := path.read_bytes()).endswith(b"\n"):
        return
    kept, _, last = text.rpartition(b"\n")
    try:
        json.loads(last)
    except ValueError:
        path.write_bytes(kept + b"\n" if kept else b"")
    else:
        path.write_bytes(text + b"\n")
