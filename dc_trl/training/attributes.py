# SPDX-License-Identifier: Apache-2.0
"""Attributes set for the duration of a block: how a parent's method is run under other settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def temporary_attributes(target: Any, **values: Any) -> Iterator[None]:
    """Sets attributes of `target` for the duration of a block."""
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)
