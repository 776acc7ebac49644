# SPDX-License-Identifier: Apache-2.0
"""What a range is made of: a value that is judged, the bounds that give it a colour, and where to read on."""

import operator
from collections.abc import Callable
from dataclasses import dataclass

RED = "red"
AMBER = "amber"
GREEN = "green"

FIRST = "its first value"
"""Stands for the quantity that a value is divided by, where that is the key's own first value in the run."""

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "above": operator.gt,
    "at least": operator.ge,
    "below": operator.lt,
    "at most": operator.le,
}


@dataclass(frozen=True)
class Section:
    """A heading of a page of docs/, which has the way out."""

    title: str
    page: str = "troubleshooting"

    @property
    def anchor(self) -> str:
        """The heading's anchor, as GitHub makes it."""
        kept = "".join(c for c in self.title.lower() if c.isalnum() or c in "_- ")
        return kept.replace(" ", "-")


@dataclass(frozen=True)
class Bound:
    """What gives a value a colour.

    Attributes:
        colour: `RED` or `AMBER`.
        comparison: a key of `COMPARISONS`, of the value with `limit`.
        limit: in the unit of the value.
        source: whose the limit is, in the words of docs/metrics.md.
        meaning: what such a value says; a sentence.
        section: where to read on.
    """

    colour: str
    comparison: str
    limit: float
    source: str
    meaning: str
    section: Section

    def holds(self, value: float) -> bool:
        """Whether the value gets this colour."""
        return COMPARISONS[self.comparison](value, self.limit)


@dataclass(frozen=True)
class Check:
    """A value that is judged, and by what.

    Attributes:
        key: of the log.
        title: the value in words.
        fine: what a value within all bounds says; a sentence.
        bounds: the first that holds gives the colour; `GREEN` where none does.
        over: what the value is divided by: a key of the log, a setting of the run, or `FIRST`; "" for nothing.
    """

    key: str
    title: str
    fine: str
    bounds: tuple[Bound, ...]
    over: str = ""

    def judge(self, value: float) -> Bound | None:
        """The bound that the value breaks, the first one; None where it is in range."""
        return next((bound for bound in self.bounds if bound.holds(value)), None)
