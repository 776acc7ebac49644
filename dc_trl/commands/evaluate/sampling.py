# SPDX-License-Identifier: Apache-2.0
"""Draws and judges a benchmark's samples, each one recorded as a line of JSON when it is judged.

The file of samples is named after a hash of everything that decides what is drawn. A run that was killed goes on from
its file and draws only what is missing; with other settings it is another file.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from tqdm import tqdm

from dc_trl.commands.evaluate.benchmarks import Problem, short_hash
from dc_trl.commands.evaluate.engines import Completion, Engine, Request
from dc_trl.commands.usage import UsageError
from dc_trl.records.json_lines import append_lines, mend_end, numbered_lines, parse_json
from dc_trl.records.text import terminal

# Right, wrong, or None: the gold answer cannot be parsed.
Judge = Callable[[list[str], list[str]], list[bool | None]]
Record = dict[str, Any]

# What is read of a recorded sample.
_FIELDS: dict[str, tuple[type, ...]] = {
    **{"problem": (int,), "hash": (str,), "sample": (int,), "tokens": (int,)},
    **{"truncated": (bool,), "correct": (bool, type(None))},
}

# Samples judged and written at once: what a crash can lose.
_JUDGED_TOGETHER = 16


@dataclass(frozen=True)
class Draw:
    """One sample to draw: the problem, the number of the sample, and the seed."""

    problem: Problem
    sample: int
    seed: int


class SampleFile:
    """The recorded samples of one benchmark under one set of settings.

    The first line is the settings, every other one a sample. A last line that a crash cut off is removed. Used in a
    `with` statement; until its end no other process can use the file.

    Args:
        folder: directory of the files; made if missing.
        name: of the benchmark.
        settings: everything that decides what is drawn, of JSON's types.

    Raises:
        UsageError: another process uses the file, or it does not hold samples with these settings.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any]) -> None:
        self.key = short_hash(settings)
        self.path = folder / f"{name}-{self.key}.jsonl"
        self._records: dict[tuple[int, str, int], Record] = {}
        self._lock = FileLock(folder / f".{self.path.stem}.lock", timeout=0)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UsageError(f"another process is drawing the samples of {self.path}: wait for its end.") from error
        mend_end(self.path)
        self._read(settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _read(self, settings: dict[str, Any]) -> None:
        lines = list(numbered_lines(self.path)) if self.path.is_file() else []
        if not lines:
            append_lines(self.path, [{"settings": settings}])
        for place, (number, line) in enumerate(lines):
            try:
                record = parse_json(line)
                if place > 0:
                    _check_sample(record)
                    self._keep(record)
                elif record["settings"] != json.loads(json.dumps(settings)):
                    raise ValueError("other settings")
            except (ValueError, KeyError, TypeError) as error:
                what = "a sample" if place > 0 else "this run's settings"
                way_out = "Remove that line: its sample is drawn again" if place > 0 else "Move the file away"
                raise UsageError(f"line {number} of {self.path} is not {what} ({error!r}). {way_out}.") from error

    def get(self, draw: Draw) -> Record | None:
        """The record of a draw; None where it is missing."""
        return self._records.get((draw.problem.index, draw.problem.hash, draw.sample))

    def add(self, records: list[Record]) -> None:
        """Records samples, on disk too."""
        append_lines(self.path, records)
        for record in records:
            self._keep(record)

    def _keep(self, record: Record) -> None:
        self._records[record["problem"], record["hash"], record["sample"]] = record


def _check_sample(record: Record) -> None:
    """Raises an error that names the field which is missing, or holds another value than was written."""
    for name, kinds in _FIELDS.items():
        if type(record[name]) not in kinds:
            raise ValueError(f"its {name!r} is {record[name]!r}")


def planned_draws(problems: list[Problem], samples: int, seed: int) -> list[Draw]:
    """Every draw of a benchmark, problem by problem. The seed depends on run seed, problem and sample only."""

    def of(problem: Problem, sample: int) -> int:
        text = f"{seed}:{problem.index}:{problem.hash}:{sample}"
        return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) >> 1  # 31 bits: every generator takes them

    return [Draw(problem, sample, of(problem, sample)) for problem in problems for sample in range(samples)]


def sample_benchmark(
    draws: list[Draw],
    prompts: dict[int, list[int]],
    engine: Engine,
    max_tokens: int,
    file: SampleFile,
    judge: Judge,
    save_completions: bool = False,
) -> list[Record]:
    """Draws and judges what the file lacks, and returns the records of all draws, in their order.

    A completion that was cut at `max_tokens` counts as wrong, whatever it says. `prompts` has the token ids for each
    problem's index.
    """
    missing = [draw for draw in draws if file.get(draw) is None]
    progress = tqdm(total=len(draws), initial=len(draws) - len(missing), desc=terminal(file.path.stem), mininterval=1)
    for batch in _batches(draws, missing, engine.batch_size):
        requests = [Request(prompts[draw.problem.index], draw.seed) for draw in batch]
        waiting: list[tuple[Draw, Completion]] = []
        try:
            for index, completion in engine.complete(requests, max_tokens):
                if file.get(batch[index]) is None:
                    waiting.append((batch[index], completion))
                if len(waiting) == _JUDGED_TOGETHER:
                    file.add(_judged(waiting, judge, save_completions))
                    progress.update(len(waiting))
                    waiting = []
        finally:  # also what was drawn before an interrupt, or before the server was gone
            file.add(_judged(waiting, judge, save_completions))
            progress.update(len(waiting))
    progress.close()
    return [record for draw in draws if (record := file.get(draw)) is not None]


def _batches(draws: list[Draw], missing: list[Draw], size: int | None) -> Iterator[list[Draw]]:
    """What to hand to the engine together: a batch that shares a random stream is drawn again whole."""
    if size is None:
        if missing:
            yield missing
        return
    wanted = set(map(id, missing))
    for start in range(0, len(draws), size):
        batch = draws[start : start + size]
        if any(id(draw) in wanted for draw in batch):
            yield batch


def _judged(waiting: list[tuple[Draw, Completion]], judge: Judge, save_completions: bool) -> list[Record]:
    # Nothing is read of what was cut off, but its gold answer is: it must be left out for every model alike.
    texts = ["" if completion.truncated else completion.text for _, completion in waiting]
    verdicts = judge(texts, [draw.problem.gold for draw, _ in waiting])
    records = []
    for (draw, completion), correct in zip(waiting, verdicts, strict=True):
        record: Record = {
            "problem": draw.problem.index,
            "hash": draw.problem.hash,
            "sample": draw.sample,
            "seed": draw.seed,
            "tokens": completion.tokens,
            "truncated": completion.truncated,
            "correct": correct,
        }
        if save_completions:
            record["completion"] = completion.text
        records.append(record)
    return records
