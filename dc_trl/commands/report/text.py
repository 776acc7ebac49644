# SPDX-License-Identifier: Apache-2.0
"""Untrusted text and numbers made fit for the report's scripts and charts. Its HTML has `dc_trl.records.text`."""

import html
import json
from typing import Any

from dc_trl.records.run_reader import is_finite
from dc_trl.records.text import visible

# Of a name in a legend, in characters.
NAME_LIMIT = 32


def label(name: str) -> str:
    """A name as plotly takes it, which reads tags and entities: cut to `NAME_LIMIT`, with both escaped."""
    short = name if len(name) <= NAME_LIMIT else f"{name[: NAME_LIMIT - 1]}…"
    return html.escape(visible(short), quote=False)


def embedded_json(value: Any) -> str:
    """JSON for a `<script type="application/json">`: no character in it can end the element or open a comment.

    Raises:
        ValueError: if the value holds a NaN or an infinity, which JSON has no word for.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII: U+2028 and surrogates are escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def number(value: Any, digits: int = 4) -> str:
    """A logged value for a reader, with so many significant digits; – where there is none."""
    if not is_finite(value):
        return "–"
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Seconds in the largest unit that suits them."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
