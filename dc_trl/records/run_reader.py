# SPDX-License-Identifier: Apache-2.0
"""What the log of a run says. Apart from its writer, so that a report starts without loading torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dc_trl.records.json_lines import numbered_lines, parse_json

LOG_FILE = "log.jsonl"
STATE_FILE = "trainer_state.json"

LARGEST_DRAWN = 1e100
"""Size up to which values are drawn. Near what a float can hold, the ends of an axis or of a band overflow."""
_LARGEST_STEP = 2**53


@dataclass
class Run:
    """What the log of a run says, as of now.

    Attributes:
        name: the directory's.
        start: the last start's `step`, `time`, `max_steps`, `model` and other facts, of this package's trainer
            `rounding_in_force`; from transformers' state, `max_steps` alone.
        settings: the last start's; empty from transformers' state.
        entries: the log history, in order, without what a resumed run repeated.
        source: the file that was read.
    """

    name: str
    source: Path
    start: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)


def read_run(folder: Path) -> Run:
    """Reads a run's log, also while it is being written.

    A run without `log.jsonl`, such as one of TRL's own trainer, is read from `trainer_state.json` in the folder or in
    its newest checkpoint.

    Raises:
        FileNotFoundError: the folder does not exist, or holds neither.
        ValueError: a line of the log, other than a last one that is cut off, or the state, is not what was written.
    """
    source = run_source(folder)
    return _read_log(folder) if source.name == LOG_FILE else _read_state(folder, source)


def run_source(folder: Path) -> Path:
    """The file that says what a run in this folder logged: its log, or the state of its newest checkpoint.

    Raises:
        FileNotFoundError: the folder does not exist, or holds neither.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"the run directory {folder} {what} (looked from {Path.cwd()}).")
    if (folder / LOG_FILE).is_file():
        return folder / LOG_FILE
    states = sorted(folder.glob(f"checkpoint-*/{STATE_FILE}"), key=lambda path: path.stat().st_mtime)
    states += [path for path in [folder / STATE_FILE] if path.is_file()]
    if not states:
        raise FileNotFoundError(
            f"{folder} holds no run: neither {LOG_FILE}, which DCGRPOTrainer writes while it trains, nor a checkpoint "
            f"with {STATE_FILE}. Name a trainer's output_dir; for other trainers, add RunLogCallback to `callbacks`."
        )
    return states[-1]


def _read_state(folder: Path, source: Path) -> Run:
    try:
        state = parse_json(source.read_bytes())
        start = {"max_steps": int(state["max_steps"])}
        entries = list(state["log_history"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:  # the last of an infinity
        raise ValueError(f"{source} is not the state of a transformers trainer ({error!r}): remove it.") from error
    for number, entry in enumerate(entries, start=1):
        _check_line(entry, f"entry {number} of {source}")
    return Run(folder.resolve().name, source, start, {}, entries)


def _read_log(folder: Path) -> Run:
    run = Run(folder.resolve().name, folder / LOG_FILE)
    names: dict[tuple[str, ...], tuple[str, ...]] = {}  # the keys of all lines alike are the same texts in memory
    for line in log_lines(run.source):
        if "start" in line:
            run.start = line["start"]
            run.settings = run.start.pop("settings")
            run.entries = [entry for entry in run.entries if entry["step"] <= run.start["step"]]
        else:
            keys = tuple(line)
            run.entries.append(dict(zip(names.setdefault(keys, keys), line.values(), strict=True)))
    return run


def is_finite(value: Any) -> bool:
    """Whether a logged value is a number that can be drawn: finite, and no larger than `LARGEST_DRAWN`."""
    return isinstance(value, int | float) and abs(value) <= LARGEST_DRAWN  # NaN is not


def log_lines(path: Path, parse: Callable[[bytes], Any] = parse_json) -> Iterator[dict[str, Any]]:
    """The lines of a log, entries and starts, each checked to be one; a last one that is cut off is left out.

    Raises:
        ValueError: another line is not what was written.
    """
    for number, line in numbered_lines(path):
        try:
            value = parse(line)
        except ValueError as error:
            if not line.endswith(b"\n"):  # it is being written
                return
            raise ValueError(f"line {number} of {path} is not JSON ({error}). Remove that line.") from error
        if not _is_entry(value):
            _check_line(value, f"line {number} of {path}")
        yield value


def _is_entry(line: Any) -> bool:
    """Whether a line is plainly a log entry: what `_check_line` finds of most lines, in a tenth of the time."""
    if type(line) is not dict or "start" in line or "max_steps" in line:
        return False
    step = line.get("step")
    return type(step) is int and -_LARGEST_STEP <= step <= _LARGEST_STEP


def _check_line(line: Any, where: str) -> None:
    """Readers count on the numbers of steps, and pages print them."""
    is_start = isinstance(line, dict) and "start" in line
    holder = line["start"] if is_start else line
    numbers = [holder.get("step"), holder.get("max_steps", 0)] if isinstance(holder, dict) else [None]
    wrong = any(type(number) is not int or abs(number) > _LARGEST_STEP for number in numbers)
    if wrong or (is_start and not isinstance(holder.get("settings"), dict)):
        raise ValueError(f"{where} is neither a log entry with its step nor the start of a run. Remove it.")
