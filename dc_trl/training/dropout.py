# SPDX-License-Identifier: Apache-2.0
"""Dropout of the policy, which would be measured as discrepancy.

π comes from a forward in training mode, μ from an engine that drops nothing. So with dropout on, every token has a
discrepancy that no weight sync and no precision explains, and λ rises against it.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

# How transformers and PEFT name probabilities that a module keeps as numbers, such as `attention_dropout`.
_NAMES = re.compile(r"dropout|pdrop|layer_?drop|drop_?(path|prob|rate)")


def find_dropout(model: nn.Module) -> dict[str, float]:
    """The dropout probabilities above 0 that the modules of a model hold, by dotted name.

    Beside `nn.Dropout` these are numbers that a forward hands to `nn.functional.dropout`, as attention layers do, and
    numbers per adapter, as some of PEFT's layers have. What a forward reads from the model's config is not seen.
    """
    return {f"{name}.{key}".lstrip("."): holder[index] for name, key, holder, index in _places(model)}


def switch_off_dropout(model: nn.Module) -> dict[str, float]:
    """Sets every probability that `find_dropout` finds to 0, in place, and returns what they were."""
    found = find_dropout(model)
    for _, _, holder, index in _places(model):
        holder[index] = 0.0
    return found


def describe_dropout(found: dict[str, float]) -> str:
    """How many places, the largest probability, and an example, for a message."""
    name, largest = max(found.items(), key=lambda item: item[1])
    count = f"{len(found)} places" if len(found) > 1 else "one place"
    return f"in {count} of the policy (p up to {largest:g}, e.g. {name})"


def _places(model: nn.Module) -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """Module, attribute, and the dict and key under which the probability lies."""
    for name, module in model.named_modules():
        attributes = vars(module)
        is_dropout = "dropout" in type(module).__name__.lower()
        for key in list(attributes):
            if key.startswith("_") or not (_NAMES.search(key.lower()) or (is_dropout and key == "p")):
                continue
            value = attributes[key]
            if isinstance(value, dict):
                yield from ((name, f"{key}.{index}", value, index) for index in value if _drops(value[index]))
            elif _drops(value):
                yield name, key, attributes, key


def _drops(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 < value <= 1
