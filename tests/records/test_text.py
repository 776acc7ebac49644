# SPDX-License-Identifier: Apache-2.0
"""Untrusted text in Markdown and in terminals: whatever it is, it stays text, on its line, and readable."""

import re
import unicodedata
from typing import Any

import pytest
from hostile_text import HOSTILE
from markdown_it import MarkdownIt

from dc_trl.records.text import TEXT_LIMIT, escaped, markdown, terminal, visible

READER = MarkdownIt("gfm-like", {"html": True, "linkify": False})


def inline(text: str) -> list[Any]:
    """The only inline block that a Markdown reader finds in a text."""
    tokens = READER.parse(text)
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"], tokens
    return tokens[1].children or []


def read(children: list[Any]) -> str:
    """What a reader sees; whatever is not text is an error."""
    assert {child.type for child in children} <= {"text", "text_special"}, children
    return "".join(child.content for child in children)


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_reads_it_as_the_same_text(text: str) -> None:
    assert read(inline(markdown(text))) == visible(text).strip()
    assert "<" not in markdown(text) and not re.search(r"(?<!\\)(\\\\)*\$", markdown(text))  # no HTML, no formula


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_in_a_table_is_one_cell(text: str) -> None:
    tokens = READER.parse(f"| a | b |\n| --- | --- |\n| {markdown(text)} | 1 |\n")
    rows = [token.children for token in tokens if token.type == "inline"]
    assert len(rows) == 4 and read(rows[2]) == visible(text).strip() and read(rows[3]) == "1"


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_after_other_words_is_text(text: str) -> None:
    assert read(inline(f"Evaluated on {markdown(text)}, and")) == f"Evaluated on {visible(text)}, and"


@pytest.mark.parametrize(
    "name",
    ["prob_diff, token, trajectory", "Qwen/Qwen3-0.6B", "vLLM colocated (kv_cache_dtype=fp8)", "0.7, 1.0", "-0.5"],
)
def test_names_and_numbers_are_left_as_they_are(name: str) -> None:
    assert markdown(name) == name == terminal(name) == escaped(name)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_terminal_gets_one_line_without_a_control_character(text: str) -> None:
    shown = terminal(text)
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert len(shown.splitlines()) == 1
    shown.encode("utf-8")


def test_a_message_keeps_its_own_lines_and_nothing_else() -> None:
    assert terminal("one\n\ttwo\x1b[31m\r\u202e", lines=True) == "one\n\ttwo⟨U+001B⟩[31m⟨U+000D⟩⟨U+202E⟩"
    assert terminal("x" * (TEXT_LIMIT + 1), lines=True) == "x" * (TEXT_LIMIT + 1)


def test_any_value_can_be_written() -> None:
    assert (markdown(None), terminal(0.5), escaped(["<"])) == ("None", "0.5", "[&#x27;&lt;&#x27;]")
