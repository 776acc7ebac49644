# SPDX-License-Identifier: Apache-2.0
"""The scores of a model on benchmarks, as they are kept: `evaluation/results.jsonl`, one line for each."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dc_trl.records.json_lines import append_lines, mend_end, numbered_lines, parse_json

logger = logging.getLogger(__name__)

RESULTS_FILE = "results.jsonl"

# Beyond what a float holds, and beyond what whole numbers a reader of JSON keeps apart.
_LARGEST, _LARGEST_COUNT = 1e300, 2**53

# What tells two results of a benchmark apart in a model card.
CARD_SETTINGS = ("temperature", "top_p", "max_tokens", "precision", "engine", "limit")


def append_result(folder: Path, result: dict[str, Any]) -> None:
    """Appends a benchmark's result to `results.jsonl` in `folder`."""
    mend_end(folder / RESULTS_FILE)
    append_lines(folder / RESULTS_FILE, [result])


def read_results(run_dir: str | Path) -> list[dict[str, Any]]:
    """The benchmark results of a run or model directory, from `<run_dir>/evaluation/results.jsonl`.

    Returns:
        One dict for each benchmark and settings, the last written, in the order of writing; empty where nothing was
        evaluated. Lines that a crash cut off, and whatever else is no result, are passed over and named in a warning:
        scores never stop a run's end.
    """
    path = Path(run_dir, "evaluation", RESULTS_FILE)
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for result in _results(path):
        key = result["benchmark"], result["settings"]
        last.pop(key, None)
        last[key] = result
    return list(last.values())


def _results(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    try:
        for number, line in numbered_lines(path):
            try:
                result = parse_json(line)
                _check(result)
            except ValueError as error:
                logger.warning("line %d of %s is no benchmark result, and is passed over: %s.", number, path, error)
            else:
                yield result
    except OSError as error:
        logger.warning("the benchmark results are left out: %s cannot be read (%s).", path, error)


def _is_text(value: Any) -> bool:
    # A lone surrogate, which JSON can spell, is no character and cannot be written into a card.
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST  # NaN is not


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST_COUNT


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


# What is read of a result, by what it must be. `None` stands for what there is none of.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("benchmark", "settings", "title", "dataset", "split", "metric", "engine", "precision", "time"),
        (_is_text, "text"),
    ),
    "config": (lambda value: value is None or _is_text(value), "text or null"),
    "limit": (lambda value: value is None or _is_count(value), "a whole number or null"),
    "problems": (_is_count, "a whole number"),
    "max_tokens": (_is_count, "a whole number"),
    "temperature": (_is_number, "a number"),
    "top_p": (_is_number, "a number"),
    "mean": (lambda value: value is None or _is_fraction(value), "a number from 0 to 1, or null"),
    "stderr": (lambda value: value is None or _is_fraction(value), "a number from 0 to 1, or null"),
}


def _check(result: Any) -> None:
    """Raises ValueError for what is no result, with the reason."""
    if not isinstance(result, dict):
        raise ValueError(f"it is of type {type(result).__name__}, not an object")
    for name, (fits, kind) in _FIELDS.items():
        if name not in result:
            raise ValueError(f"it has no {name!r}")
        if not fits(result[name]):
            raise ValueError(f"its {name!r} is {ascii(result[name])[:80]}, not {kind}")


def newest_results(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of results that a model card cannot tell apart, because only weights, seed or prompt differ, the last."""
    last = {}
    for result in results:
        identity = tuple(result[key] for key in ("benchmark", "dataset", "metric", *CARD_SETTINGS))
        last[identity] = result
    return list(last.values())


def score(mean: float | None, stderr: float | None) -> str:
    """Fractions as percent: "63.2 ± 6.1"."""
    if mean is None:
        return "none"
    return f"{100 * mean:.1f}" + ("" if stderr is None else f" ± {100 * stderr:.1f}")
