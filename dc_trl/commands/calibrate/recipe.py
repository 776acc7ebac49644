# SPDX-License-Identifier: Apache-2.0
"""`dc-trl calibrate --set`: one value in a recipe, everything else byte for byte as it was."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from dc_trl.commands.usage import UsageError

KEY = "discrepancy_tolerance"


def set_tolerance(path: Path, value: float, comment: str) -> None:
    """Sets `discrepancy_tolerance` in a YAML recipe, with a comment after it, and replaces the file in one step.

    The line is replaced, its old comment included, which spoke of the old value; where there is none, one is added at
    the end. Lines that are comments do not count.

    Args:
        path: of the recipe.
        value: the tolerance.
        comment: one line, without `#`.

    Raises:
        UsageError: as `check_recipe`, or if the file cannot be written.
    """
    _replace(path, _edited(path, value, comment))


def check_recipe(path: Path) -> None:
    """Refuses a recipe that `set_tolerance` could not change, before anything is measured.

    Raises:
        UsageError: no such file, no YAML mapping, the key twice or inside another, its value not on its line, or
            something else that a changed line would break.
    """
    if not path.is_file():
        raise UsageError(f"--set {path} does not exist (looked from {Path.cwd()}). Name the recipe to change.")
    _edited(path, 0.5, "a trial")


def _edited(path: Path, value: float, comment: str) -> str:
    """The recipe's text with the value set."""
    text = _read(path)
    line = f"{KEY}: {_number(value)}  # {comment}"
    node = _find(path, text)
    if node is None:
        newline = "\r\n" if "\r\n" in text else "\n"
        new = text + ("" if not text or text.endswith("\n") else newline) + line + newline
    else:
        start = node.start_mark.index
        new = text[:start] + line + text[_line_end(text, start) :]
    try:
        if yaml.safe_load(new) == yaml.safe_load(text) | {KEY: value}:
            return new
    except yaml.YAMLError:
        pass
    raise UsageError(f"{path} is written in a way that setting {KEY} would break. Set it by hand: {line}")


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8")  # not read_text, which would change the ends of lines


def _find(path: Path, text: str) -> Any:
    """The node of the key at the top level, or None."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode) or root.flow_style:
        raise UsageError(f"{path} must be a YAML mapping with one option a line. Set {KEY} by hand.")
    everywhere = [key for node in _mappings(root) for key, _ in node.value if key.value == KEY]
    here = [(key, value) for key, value in root.value if key.value == KEY]
    if len(everywhere) > len(here):
        raise UsageError(f"{path} has {KEY} inside another option, where training does not read it. Remove it there.")
    if len(here) > 1:
        lines = ", ".join(str(key.start_mark.line + 1) for key, _ in here)
        raise UsageError(f"{path} has {KEY} {len(here)} times, in lines {lines}: YAML takes the last. Keep one.")
    if not here:
        return None
    key, value = here[0]
    simple = isinstance(value, yaml.ScalarNode) and (not value.value or value.end_mark.line == key.start_mark.line)
    if not simple or (value.value and value.end_mark.index > _line_end(text, key.start_mark.index)):
        raise UsageError(f"{path} has the value of {KEY} on a line of its own. Put it on the line of its name.")
    return key


def _mappings(node: Any) -> list[Any]:
    """A node's mappings, itself included. An alias is the node that it names, so each is looked at once."""
    found, pending, seen = [], [node], set()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            found.append(node)
            pending += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value
    return found


def _line_end(text: str, start: int) -> int:
    """Index of the line break after `start`, a carriage return included, or the text's length."""
    end = text.find("\n", start)
    if end < 0:
        return len(text)
    return end - 1 if text[end - 1] == "\r" else end


def _number(value: float) -> str:
    """The number as YAML 1.1 reads one: an exponent needs a point before it."""
    text = repr(value)
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}{'' if '.' in mantissa else '.0'}{e}{exponent}"


def _replace(path: Path, text: str) -> None:
    target = path.resolve()  # a link stays a link
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text.encode("utf-8"))
            shutil.copymode(target, name)
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error}. Set it by hand.") from error
