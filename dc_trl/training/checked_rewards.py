# SPDX-License-Identifier: Apache-2.0
"""What a reward function returns, looked at before TRL makes a tensor of it, so that an error names the function."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import is_async_callable

_ASKED = "Return one number for each completion, in order, or None for a completion that it does not judge."


def checked(function: Any, name: str) -> Any:
    """A reward function whose output is checked; a reward model as it is.

    Raises:
        TypeError: when the function is called, if it returns no list of numbers.
    """
    if isinstance(function, nn.Module):
        return function
    if is_async_callable(function):
        return _checked_async(function, name)

    def call(**inputs: Any) -> Sequence[Any]:
        return _rewards(function(**inputs), name)

    return call


def _checked_async(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    async def call(**inputs: Any) -> Sequence[Any]:
        return _rewards(await function(**inputs), name)

    return call


def _rewards(output: Any, name: str) -> Sequence[Any]:
    if isinstance(output, str | bytes | dict) or not (hasattr(output, "__iter__") and hasattr(output, "__len__")):
        what = repr(output) if output is None else f"a {type(output).__name__}"
        raise TypeError(f"The reward function `{name}` returned {what}, where rewards were expected. {_ASKED}")
    for row, reward in enumerate(output):
        if not (reward is None or hasattr(reward, "__float__")):
            kind = type(reward).__name__
            raise TypeError(f"The reward function `{name}` returned a {kind} for completion {row}. {_ASKED}")
    return output


def check_finite(rewards: Tensor, names: Sequence[str]) -> None:
    """Refuses infinite rewards, which would make every advantage of their group NaN, and then every weight.

    Args:
        rewards: (N, F), of all processes, in float32; NaN where a function gave none.
        names: of the F functions.

    Raises:
        ValueError: names function and completion.
    """
    infinite = rewards.isinf().nonzero()
    if len(infinite):
        row, column = infinite[0].tolist()
        raise ValueError(
            f"The reward function `{names[column]}` returned {rewards[row, column].item()} for completion {row}, or a "
            "number too large for float32. Its group would have no mean, and the weights would become NaN. Return a "
            "finite number, or None for a completion that it does not judge."
        )


def check_advantages(advantages: Tensor) -> None:
    """Refuses advantages that are not finite: rewards so large that their mean or deviation is not.

    Raises:
        ValueError: says so.
    """
    broken = int((~torch.isfinite(advantages)).sum())
    if broken:
        raise ValueError(
            f"{broken} of {advantages.numel()} advantages are NaN or infinite, although no reward is: the rewards, "
            "times `reward_weights`, are too large for their mean and deviation in float32. Scale them down."
        )
