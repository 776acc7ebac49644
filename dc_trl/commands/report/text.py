# SPDX-License-Identifier: Apache-2.0
"""Untrusted text made fit for a page: nothing in it can act, hide, or change the order of what stands around it."""

import html
import json
import unicodedata
from typing import Any

from dc_trl.records.run_log import is_finite

# Control, format (among them every bidirectional control and zero-width character), surrogate, line and paragraph
# separators: a reader could not see them, and some of them move other text.
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_SYMBOLS = {"\n": "↵", "\t": "⇥"}

# Of a name in a legend, and of any other text, in characters.
NAME_LIMIT = 32
TEXT_LIMIT = 4_000


def visible(text: str, limit: int = TEXT_LIMIT) -> str:
    """The text with every character that cannot be seen written out, as ⟨U+202E⟩, and cut after `limit` characters.

    A newline becomes ↵ and a tab ⇥. A combining mark at the start stands on a dotted circle, not on its neighbour.
    """
    shown = "".join(map(_shown, text[:limit]))
    if shown and unicodedata.category(shown[0]).startswith("M"):
        shown = f"◌{shown}"
    return f"{shown}… ({len(text) - limit:,} more characters)" if len(text) > limit else shown


def _shown(character: str) -> str:
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    return f"⟨U+{ord(character):04X}⟩" if unicodedata.category(character) in _INVISIBLE else character


def escaped(value: Any) -> str:
    """Any value as text of an HTML element or of a quoted attribute."""
    return html.escape(visible(value if isinstance(value, str) else str(value)))


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
