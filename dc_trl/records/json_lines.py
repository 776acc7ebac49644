# SPDX-License-Identifier: Apache-2.0
"""Files with one JSON object a line that processes append to, and may be killed while they do.

What is read is not trusted: whoever reads JSON that came from outside takes `parse_json`.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

MAX_DEPTH = 100
"""Levels of lists and mappings that are read. Far deeper ones take the stack of whatever walks through them."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; a byte order mark before it is passed over.

    Raises:
        ValueError: it is not JSON, not UTF-8, or nested deeper than `MAX_DEPTH`.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(text.removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise ValueError(str(error)) from error  # its own `repr` is the whole text
    except RecursionError as error:
        raise ValueError(_too_deep()) from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise ValueError(_too_deep())
    return value


def fast_parser() -> Callable[[bytes], Any]:
    """A `parse_json` of one line that is several times as fast; it needs orjson.

    What orjson does not take, such as NaN or a lone surrogate, `parse_json` reads or refuses.

    Raises:
        ImportError: orjson is not installed.
    """
    import orjson

    def parse(line: bytes) -> Any:
        """The value of a line; raises as `parse_json` does."""
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:
            return parse_json(line)
        nested = b"[" in line or line.rfind(b"{") > 0
        if nested and line.count(b"[") + line.count(b"{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
            raise ValueError(_too_deep())
        return value

    return parse


def _too_deep() -> str:
    return f"nested deeper than {MAX_DEPTH} levels"


def _is_deeper(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        level = [member for item in level if isinstance(item, dict | list) for member in _members(item)]
    return any(isinstance(item, dict | list) for item in level)


def _members(container: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and bytes of each line that is not blank, its newline included.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                yield number, line


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
        parse_json(last)
    except ValueError:
        path.write_bytes(kept + b"\n" if kept else b"")
    else:
        path.write_bytes(text + b"\n")
