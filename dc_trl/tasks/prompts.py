# SPDX-License-Identifier: Apache-2.0
"""How a problem becomes a prompt: as messages, through the model's chat template, or as plain text, which a base model
goes on with. Training, calibration and evaluation decide and tokenize by the functions of this module."""

from collections.abc import Sequence
from typing import Any

PROMPT_FORMATS = ("auto", "chat", "plain")
Prompt = str | list[dict[str, str]]


class PromptFormatError(ValueError):
    """A prompt format that a model cannot take, with the reason and the way out."""


def resolve_prompt_format(asked: str, tokenizer: Any, model: str) -> str:
    """The format in force, `chat` or `plain`.

    Args:
        asked: one of `PROMPT_FORMATS`; `auto` is chat where the tokenizer has a chat template, and plain elsewhere.
        tokenizer: of the model.
        model: its name, for messages.

    Raises:
        PromptFormatError: an unknown format, or chat without a template.
    """
    if asked not in PROMPT_FORMATS:
        raise PromptFormatError(f"`prompt_format` is {asked!r}, which is unknown: use one of {PROMPT_FORMATS}.")
    chats = bool(getattr(tokenizer, "chat_template", None))
    if asked == "chat" and not chats:
        raise PromptFormatError(
            f"`prompt_format` is 'chat', and the tokenizer of {model} has no chat template to write messages with: a "
            "base model's has none. Use 'plain' or 'auto', which make the prompt of the problem's text alone; or, if "
            "the model was trained on a template, write it into chat_template.jinja in the model's directory."
        )
    return asked if asked != "auto" else "chat" if chats else "plain"


def plain_text(messages: Sequence[dict[str, str]]) -> str:
    """Messages as plain text: their contents, with an empty line between them, and no roles."""
    return "\n\n".join(message["content"] for message in messages)


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The token ids of a prompt, as TRL makes them: of messages by the template, which brings its own special tokens,
    of a text with those that the tokenizer adds."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
