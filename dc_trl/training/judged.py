# SPDX-License-Identifier: Apache-2.0
"""What is known of the completions of a generation batch beside their rewards: the extracted and the gold answer."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from trl.trainer.utils import is_async_callable

GOLD_COLUMN = "solution"
"""Column of the data set that holds the gold answer, TRL's name for it."""
ANSWER_COLUMNS = ("answer", "answer_parsed")
"""Columns under which a reward function logs what it extracted (`log_extra`): this package's, and TRL's."""
_LONGEST = 1_000  # characters of an answer


class Judged:
    """Answers of one process's rows of a generation batch.

    Args:
        inputs: TRL's rows, B of them.

    Attributes:
        gold: B texts; None where the data has no gold answer.
        answer: B texts; None where no reward function logged what it extracted.
    """

    def __init__(self, inputs: Sequence[dict[str, Any]]) -> None:
        self.gold = [_text(row.get(GOLD_COLUMN)) for row in inputs]
        self.answer: list[str | None] = [None] * len(inputs)

    def texts(self, rows: Sequence[int]) -> dict[str, list[str | None]]:
        """`answer` and `gold` of some of the rows."""
        return {name: [getattr(self, name)[row] for row in rows] for name in ("answer", "gold")}

    def listening(self, function: Any) -> Any:
        """A reward function whose `log_extra` is listened to; a reward model as it is."""
        if isinstance(function, nn.Module):
            return function
        if is_async_callable(function):

            async def call_async(**inputs: Any) -> Any:
                return await function(**self._heard(inputs))

            return call_async

        def call(**inputs: Any) -> Any:
            return function(**self._heard(inputs))

        return call

    def _heard(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a reward function, with a `log_extra` that also comes here."""
        forward: Callable[[str, Any], None] = inputs["log_extra"]

        def log_extra(column: str, values: Any) -> None:
            if column in ANSWER_COLUMNS and len(values) == len(self.answer):
                self.answer = [_text(value) for value in values]
            forward(column, values)

        return inputs | {"log_extra": log_extra}


def _text(value: Any) -> str | None:
    return None if value is None else str(value)[:_LONGEST]
