# SPDX-License-Identifier: Apache-2.0
"""The log of a run as columns of numbers: a long log as dictionaries takes ten times the memory and the time."""

from array import array
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dc_trl.records.json_lines import fast_parser
from dc_trl.records.run_reader import LARGEST_DRAWN, LOG_FILE, Run, is_finite, log_lines, read_run, run_source

_CHUNK = 256  # entries with the same keys that are turned into columns at once


@dataclass(frozen=True)
class Column:
    """What was logged under a key.

    Attributes:
        rows: (n,) int64, ascending: which entries have the key.
        values: (n,) float64; NaN where the logged value is no number that can be drawn.
        last: the last value that is not None, as it was logged; None if there is none.
    """

    rows: np.ndarray
    values: np.ndarray
    last: Any


@dataclass
class RunColumns:
    """What the log of a run says, as of now; see `dc_trl.records.run_reader.Run`.

    Attributes:
        name, source, start, settings: as of `Run`.
        steps: (N,) int64, of each entry.
        columns: by key, `step` among them.
    """

    name: str
    source: Path
    start: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    columns: dict[str, Column] = field(default_factory=dict)

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a key, (n,) each; NaN where the logged value is no number that can be drawn."""
        column = self.columns.get(key)
        if column is None:
            return np.zeros(0, np.int64), np.zeros(0)
        return self.steps[column.rows], column.values

    def at(self, key: str, row: int) -> float | None:
        """The number of a key in an entry; None where it has none."""
        column = self.columns.get(key)
        if column is None:
            return None
        place = int(np.searchsorted(column.rows, row))
        if place == len(column.rows) or column.rows[place] != row or np.isnan(column.values[place]):
            return None
        return float(column.values[place])

    def last(self, key: str) -> Any:
        """The value logged last under a key, or None."""
        return self.columns[key].last if key in self.columns else None

    @cached_property
    def drawable(self) -> set[str]:
        """The keys under which a number was logged that can be drawn."""
        return {key for key, column in self.columns.items() if np.isfinite(column.values).any()}


def read_columns(folder: Path) -> RunColumns:
    """Reads a run's log as `read_run` does, as columns.

    Raises:
        FileNotFoundError, ValueError: as `read_run`.
        ImportError: orjson is not installed.
    """
    source = run_source(folder)
    if source.name != LOG_FILE:
        return columns_of(read_run(folder))
    builder = ColumnBuilder()
    start: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for line in log_lines(source, fast_parser()):
        if "start" in line:
            start = line["start"]
            settings = start.pop("settings")
            builder.keep_until(start["step"])
        else:
            builder.add(line)
    return builder.finish(folder.resolve().name, source, start, settings)


def columns_of(run: Run) -> RunColumns:
    """A run that was read entry by entry, as columns."""
    builder = ColumnBuilder()
    for entry in run.entries:
        builder.add(entry)
    return builder.finish(run.name, run.source, run.start, run.settings)


class ColumnBuilder:
    """Collects entries, and forgets those that a resumed run repeats."""

    def __init__(self) -> None:
        self._steps = array("q")
        self._tables: list[_Table] = []
        self._waiting: dict[tuple[str, ...], _Waiting] = {}
        self._last: dict[str, tuple[int, Any]] = {}  # row and value

    def add(self, entry: dict[str, Any]) -> None:
        """Takes in an entry with its `step`."""
        keys = tuple(entry)
        waiting = self._waiting.get(keys)
        if waiting is None:
            waiting = self._waiting[keys] = _Waiting()
        waiting.add(len(self._steps), tuple(entry.values()))
        self._steps.append(entry["step"])
        if len(waiting.rows) == _CHUNK:
            self._settle(keys)

    def keep_until(self, step: int) -> None:
        """Forgets the entries of later steps: a run was resumed from this one."""
        steps = np.array(self._steps, dtype=np.int64)
        kept = steps <= step
        if kept.all():
            return
        self._settle_all()
        places = np.cumsum(kept) - 1
        cut = [(keys, rows[kept[rows]], table[kept[rows]]) for keys, rows, table in self._tables]
        self._tables = [(keys, places[rows], table) for keys, rows, table in cut if len(rows)]
        self._steps = array("q", steps[kept].tobytes())
        lost = {key for key, (row, _) in self._last.items() if not kept[row]}
        self._last = {key: (int(places[row]), value) for key, (row, value) in self._last.items() if key not in lost}
        for keys, rows, table in self._tables:  # of what is no number nothing is kept but the last
            for number in [number for number, key in enumerate(keys) if key in lost]:
                found = np.flatnonzero(np.isfinite(table[:, number]))
                if len(found):
                    self._note(keys[number], int(rows[found[-1]]), float(table[found[-1], number]))

    def finish(self, name: str, source: Path, start: dict[str, Any], settings: dict[str, Any]) -> RunColumns:
        """The run of what was taken in."""
        self._settle_all()
        parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for keys, rows, table in self._tables:
            for number, key in enumerate(keys):
                parts.setdefault(key, []).append((rows, table[:, number]))
        columns = {key: self._column(key, found) for key, found in parts.items()}
        return RunColumns(name, source, start, settings, np.array(self._steps, dtype=np.int64), columns)

    def _column(self, key: str, parts: list[tuple[np.ndarray, np.ndarray]]) -> Column:
        rows = np.concatenate([rows for rows, _ in parts])
        values = np.concatenate([values for _, values in parts])
        values[np.abs(values) > LARGEST_DRAWN] = np.nan
        order = np.argsort(rows, kind="stable")  # entries with other keys may have come between
        return Column(rows[order], values[order], self._last.get(key, (-1, None))[1])

    def _settle_all(self) -> None:
        for keys in list(self._waiting):
            self._settle(keys)

    def _settle(self, keys: tuple[str, ...]) -> None:
        """Makes a table of waiting entries, which all have these keys."""
        waiting = self._waiting.pop(keys)
        rows = np.array(waiting.rows, dtype=np.int64)
        self._tables.append((keys, rows, np.array(waiting.numbers).reshape(len(rows), -1)))
        for number, key in enumerate(keys):
            self._note(key, *waiting.last(number))

    def _note(self, key: str, row: int, value: Any) -> None:
        """Takes a value for the last of its key, if it is."""
        if row > self._last.get(key, (-1, None))[0]:
            self._last[key] = row, value


_Table = tuple[tuple[str, ...], np.ndarray, np.ndarray]
"""Keys, (k,); rows, (n,); values, (n, k), NaN for what is no number."""


class _Waiting:
    """Entries with the same k keys, as numbers at once: while they are in the processor's cache."""

    def __init__(self) -> None:
        self.rows = array("q")
        self.numbers = array("d")  # k for each entry; NaN for what is no number
        self._odd: dict[int, tuple[Any, ...]] = {}  # entries with something that is no number, as logged

    def add(self, row: int, values: tuple[Any, ...]) -> None:
        """Takes the values, (k,) in the order of the keys, of the entry of this row."""
        try:
            numbers = array("d", values)
        except (TypeError, OverflowError):  # something that is no number, or beyond what a float holds
            numbers = array("d", [float(value) if is_finite(value) else np.nan for value in values])
            self._odd[len(self.rows)] = values
        self.rows.append(row)
        self.numbers.extend(numbers)
        self._newest = values

    def last(self, number: int) -> tuple[int, Any]:
        """Row and value of the last entry that has one at this place among the keys; (-1, None) if there is none."""
        if self._newest[number] is not None:
            return self.rows[-1], self._newest[number]
        size = len(self._newest)
        for place in range(len(self.rows) - 2, -1, -1):
            value = self._odd[place][number] if place in self._odd else self.numbers[place * size + number]
            if value is not None:
                return self.rows[place], value
        return -1, None
