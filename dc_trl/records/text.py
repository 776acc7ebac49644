# SPDX-License-Identifier: Apache-2.0
"""Untrusted text made fit for where it goes: a page, Markdown, a terminal. Nothing in it can act, hide, or change the
order of what stands around it.

Untrusted is whatever this package did not write: names of directories, models and data sets, texts of models and of
servers, files that somebody else may have written.
"""

import html
import re
import unicodedata
from typing import Any

# Control, format (among them every bidirectional control and zero-width character), surrogate, line and paragraph
# separators: a reader could not see them, and some of them move other text.
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_SYMBOLS = {"\n": "↵", "\t": "⇥"}

TEXT_LIMIT = 4_000
"""Characters after which a text is cut."""

# What Markdown, GitHub's and the Hub's included, reads as more than a character, wherever it stands in a line. An
# underscore within a word is none of it.
_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
# A text that begins like this would be a heading or a list, or underline one, if it came first in its line.
_LINE_START = re.compile(r"^\s*(#+|-+|=+|\+|\d+[.)])(?=\s|$)")


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


def markdown(value: Any) -> str:
    """Any value as text within a line of Markdown, or a cell of a table: no markup, no link, no HTML, no formula.

    An address that is spelt out may still be made a link to itself.
    """
    text = html.escape(visible(value if isinstance(value, str) else str(value)), quote=False)
    text = _MARKUP.sub(lambda match: f"\\{match[0]}", text)
    return _LINE_START.sub(lambda match: f"{match[0][:-1]}\\{match[0][-1]}", text)


def terminal(value: Any, lines: bool = False) -> str:
    """Any value as text for a terminal: no escape code, no second line.

    Args:
        value: of any type.
        lines: keep line breaks and tabs, of a whole message that this package put together.
    """
    text = value if isinstance(value, str) else str(value)
    if not lines:
        return visible(text)
    return "".join(character if character in _SYMBOLS else _shown(character) for character in text)
