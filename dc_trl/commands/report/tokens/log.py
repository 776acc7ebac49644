# SPDX-License-Identifier: Apache-2.0
"""One token log in memory: columns, completions, and texts that are fit to be shown."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dc_trl.records.text import visible
from dc_trl.records.token_schema import OPTIONAL, SCHEMA

_TEXTS = ("token", "prompt", "answer", "gold")
_TOKEN_TEXT = 80  # characters of a token
_DIGITS = 5


@dataclass(frozen=True)
class TokenLogFile:
    """One token log in numpy, sorted by completion and position. `group` numbers the completions from 0.

    Attributes:
        columns: numbers by name, those of the schema, and `pi`, `mu`, `log_ratio`.
        words: texts by name, `answer` and `gold` where the file has them.
        group: (n,) of each row.
        starts: the first row of each completion.
    """

    columns: dict[str, np.ndarray]
    words: dict[str, pa.ChunkedArray]
    group: np.ndarray
    starts: np.ndarray

    @classmethod
    def read(cls, path: Path) -> "TokenLogFile":
        """Raises ValueError or OSError if the file is no token log, or is not complete yet."""
        file = pq.ParquetFile(path)
        kinds = [kind for kind in SCHEMA if kind.name not in OPTIONAL or kind.name in file.schema_arrow.names]
        table = file.read(columns=[kind.name for kind in kinds])
        if missing := {kind.name for kind in kinds} - set(table.column_names):
            raise ValueError(f"it has no column {', '.join(sorted(missing))}")
        if wrong := [kind.name for kind in kinds if not _fits(table[kind.name], kind)]:
            raise ValueError(f"its column {', '.join(wrong)} holds other values than a token log")
        if not table.num_rows:
            raise ValueError("it holds no token")
        table = table.sort_by([("completion", "ascending"), ("position", "ascending")])
        columns = {name: table[name].to_numpy() for name in table.column_names if name not in _TEXTS}
        if "rejected" in columns:
            columns["rejected"] = np.equal(columns["rejected"], True)  # null in a run without rules
        with np.errstate(invalid="ignore", over="ignore"):  # -inf on both sides; "log-probs" of any size
            columns |= {"pi": np.exp(columns["train_logp"]), "mu": np.exp(columns["sampling_logp"])}
            columns["log_ratio"] = columns["train_logp"] - columns["sampling_logp"]
        starts, group = np.unique(columns["completion"], return_index=True, return_inverse=True)[1:]
        words = {name: table[name].cast(pa.string()) for name in _TEXTS if name in table.column_names}
        return cls(columns, words, group, starts)

    def rows(self, group: int) -> slice:
        """The rows of a completion."""
        end = self.starts[group + 1] if group + 1 < len(self.starts) else len(self.group)
        return slice(int(self.starts[group]), int(end))

    def length(self, group: int) -> int:
        """Tokens of a completion."""
        rows = self.rows(group)
        return rows.stop - rows.start

    def texts(self, rows: slice) -> list[str]:
        """The tokens of a stretch, fit to be shown."""
        return [visible(token, _TOKEN_TEXT) for token in self.words["token"][rows].to_pylist()]

    def prompt(self, row: int) -> str:
        """The prompt of a row, as it is."""
        return self.words["prompt"][row].as_py()

    def word(self, name: str, row: int, limit: int) -> str | None:
        """A text of a row, fit to be shown; None where the file does not have it."""
        value = self.words[name][row].as_py() if name in self.words else None
        return None if value is None else visible(value, limit)

    def numbers(self, name: str, rows: Any) -> list[float | None]:
        """A float column, rounded; None for what is not finite, and all over where the file does not have it."""
        if name not in self.columns:
            return [None] * len(self.group[rows])
        return [rounded(value) for value in self.columns[name][rows].tolist()]


def _fits(column: pa.ChunkedArray, kind: pa.Field) -> bool:
    return column.type == kind.type and (kind.name in OPTIONAL or not column.null_count)


def rounded(value: float) -> float | None:
    """A number with so many digits as a page shows; None for what is not finite."""
    return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None
