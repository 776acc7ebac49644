# SPDX-License-Identifier: Apache-2.0
"""How a problem becomes a prompt: which format is in force, its text, its tokens."""

from pathlib import Path

import pytest
from problems import write_rows
from tiny import tiny_tokenizer

from dc_trl.tasks.data import load_math_dataset
from dc_trl.tasks.prompts import PromptFormatError, plain_text, prompt_ids, resolve_prompt_format


def test_the_format_in_force() -> None:
    chatty, base = tiny_tokenizer(), tiny_tokenizer()
    base.chat_template = None
    asked = ("auto", "chat", "plain")
    assert [resolve_prompt_format(each, chatty, "m") for each in asked] == ["chat", "chat", "plain"]
    assert [resolve_prompt_format(each, base, "m") for each in ("auto", "plain")] == ["plain", "plain"]
    with pytest.raises(PromptFormatError, match="is 'chat', and the tokenizer of owner/base has no chat template"):
        resolve_prompt_format("chat", base, "owner/base")
    with pytest.raises(PromptFormatError, match="`prompt_format` is 'text', which is unknown: use one of"):
        resolve_prompt_format("text", chatty, "m")


def test_plain_text_is_the_contents() -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1+1="}]
    assert plain_text(messages) == "Be short.\n\n1+1="


def test_the_tokens_are_those_of_trl() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}="
    digits = tokenizer("1+1", add_special_tokens=False)["input_ids"]
    chat = prompt_ids(tokenizer, [{"role": "user", "content": "1+1"}])
    assert chat == [tokenizer.bos_token_id, *digits, tokenizer.convert_tokens_to_ids("=")]
    assert prompt_ids(tokenizer, "1+1") == tokenizer("1+1")["input_ids"]


def test_a_data_set_of_plain_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1", "answer": "2"}, {"prompt": "2+2", "answer": "4"}]
    path = write_rows(tmp_path / "sums.jsonl", rows)
    loaded = load_math_dataset(str(path), prompt_template="{problem} =", plain=True)
    assert loaded["prompt"] == ["1+1 =", "2+2 ="]
    write_rows(path, [{"prompt": [{"role": "user", "content": "1+1"}], "answer": "2"}])
    assert load_math_dataset(str(path), prompt_template="{problem} =", plain=True)["prompt"] == ["1+1"]
