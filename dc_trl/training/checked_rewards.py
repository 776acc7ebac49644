# SPDX-License-Identifier: Apache-2.0
"""What a reward function returns, looked at before TRL makes a tensor of it, so that an error names the function."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from trl.trainer.utils import is_async_callable

# Squares of larger numbers overflow in float32.
LARGEST_REWARD = 1e18

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


def check_size(rewards: Tensor, names: Sequence[str]) -> None:
    """Refuses infinite rewards, and those of which TRL's deviation of a group overflows in float32.

    The first make every advantage of their group NaN, and then every weight; the second make them 0.

    Args:
        rewards: (N, F), of all processes, in float32; NaN where a function gave none.
        names: of the F functions.

    Raises:
        ValueError: names function and completion.
    """
    beyond = (rewards.abs() > LARGEST_REWARD).nonzero()  # NaN is not
    if len(beyond):
        row, column = beyond[0].tolist()
        raise ValueError(
            f"The reward function `{names[column]}` returned {rewards[row, column].item():.4g} (in float32) for "
            f"completion {row}: beyond {LARGEST_REWARD:.0e} the mean or deviation of its group overflows. Return "
            "smaller numbers, or None for a completion that it does not judge."
        )
