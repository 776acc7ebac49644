# SPDX-License-Identifier: Apache-2.0
"""Problems with a known answer, from the Hub or from local files, in the two columns that training reads.

DAPO-Math-17k as it is on the Hub has 1.79 million rows for some 17,000 problems: each was repeated about 100 times by
accident (github.com/BytedTsinghua-SIA/DAPO/issues/36, github.com/verl-project/verl/issues/3065). Without `deduplicate`
one epoch is a hundred.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, load_dataset

from dc_trl.tasks.json_files import BadFileError, check_json_file, line_of_row
from dc_trl.tasks.prompts import plain_text

logger = logging.getLogger(__name__)

# In the order in which they are looked for. `reward_model` is DAPO-Math-17k's {"style", "ground_truth"}.
PROBLEM_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMNS = ("reward_model", "answer", "solution")
FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}

BOXED_TEMPLATE = "{problem}\n\nReason step by step, and put your final answer within \\boxed{}."


# Named, or a numeric column `solution` of the source would turn the answers back into numbers.
_MESSAGES = [{"role": Value("string"), "content": Value("string")}]


class DatasetError(ValueError):
    """A dataset that cannot be used, with the reason and the way out."""


def local_path(name: str) -> Path | None:
    """The file or directory that `name` means, or None for a dataset on the Hub.

    Raises:
        DatasetError: for a local path that does not exist, or a file of an unknown format.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.suffix in FORMATS and path.is_file():
        return path
    if path.is_file():
        raise DatasetError(f"{name} is not of a known format: use {', '.join(FORMATS)}, or a directory of them.")
    if path.suffix in FORMATS or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise DatasetError(
            f"The data file {name} does not exist (looked from {Path.cwd()}). Check the path; a dataset of the Hub is "
            "named owner/name, such as BytedTSinghua-SIA/DAPO-Math-17k."
        )
    return None


def load_math_dataset(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    problem_column: str | None = None,
    answer_column: str | None = None,
    prompt_template: str = BOXED_TEMPLATE,
    deduplicate: bool = False,
    plain: bool = False,
) -> Dataset:
    """Loads problems and their answers.

    Known to work: DAPO-Math-17k (`prompt`: messages, `reward_model`: {ground_truth}, `data_source`, `ability`,
    `extra_info`), and any JSON, JSON Lines or Parquet file with a column `prompt`, `problem` or `question` and a
    column `reward_model`, `answer` or `solution`.

    Args:
        name: a Hub dataset, a local file, or a directory of such files.
        config: configuration of a Hub dataset.
        split: split to load. A local file has one split, `train`.
        problem_column: column of the problem; None: the first of `prompt`, `problem`, `question` that is there.
        answer_column: column of the answer; None: the first of `reward_model`, `answer`, `solution` that is there.
        prompt_template: makes the user message of a problem given as text, at `{problem}`. Message lists stay as they
            are: they bring their instructions.
        deduplicate: keep the first row of each problem, which DAPO-Math-17k needs (see this module).
        plain: give prompts as plain text, for a model without a chat template; see `dc_trl.tasks.prompts`.

    Returns:
        A dataset with the columns `prompt`, a list of messages or a string, and `solution`, a string.

    Raises:
        DatasetError: for a missing file, column or answer, with the way out.
    """
    dataset = _load(name, config, split)
    numbers: Sequence[int] = range(len(dataset))
    problem = _column(dataset, name, problem_column, PROBLEM_COLUMNS, "problem")
    answer = _column(dataset, name, answer_column, ANSWER_COLUMNS, "answer")
    if deduplicate:
        numbers = _first_of_each(dataset, problem, answer)
        dataset = dataset.select(numbers)

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        where = _Place(name, numbers[index])
        messages = _messages(row[problem], prompt_template, where)
        return {"prompt": plain_text(messages) if plain else messages, "solution": _answer(row[answer], where)}

    columns = dataset.column_names
    features = Features({"prompt": Value("string") if plain else _MESSAGES, "solution": Value("string")})
    try:
        return dataset.map(convert, with_indices=True, remove_columns=columns, features=features, desc="Formatting")
    except DatasetError:
        raise
    except Exception as error:  # Arrow hands out a row when it is asked for: text that is no UTF-8 shows here
        raise DatasetError(
            f"A row of {name} cannot be read: {_root(error)}. Write the file anew as UTF-8 .jsonl or .parquet."
        ) from error


@dataclass(frozen=True)
class _Place:
    """Where a row stands, for messages: the line is looked up when it is asked for."""

    name: str
    row: int

    def __str__(self) -> str:
        path = Path(self.name).expanduser()
        line = line_of_row(path, self.row) if path.suffix == ".jsonl" and path.is_file() else None
        return f"row {self.row} of {self.name}" + (f" (line {line})" if line else "")


def _load(name: str, config: str | None, split: str) -> Dataset:
    path = local_path(name)
    for file in _json_files(path):
        try:
            check_json_file(file)
        except (BadFileError, OSError) as error:
            raise DatasetError(f"{error}.") from error
    try:
        if path is None or path.is_dir():
            dataset = load_dataset(name if path is None else str(path), config, split=split)
        else:
            dataset = load_dataset(FORMATS[path.suffix], data_files=str(path), split=split)
    except StopIteration as error:  # what `datasets` raises for a JSON file without a row
        raise _empty(name, split) from error
    except Exception as error:  # `datasets` raises many kinds: no network, no such dataset, broken file, no such split
        raise DatasetError(
            f"Could not load split {split!r} of {name}: {_root(error)}. Check name, split and "
            "network, or give the path of a local .jsonl or .parquet file."
        ) from error
    if len(dataset) == 0:
        raise _empty(name, split)
    return dataset


def _json_files(path: Path | None) -> list[Path]:
    """The JSON files that a local dataset is made of; hidden ones are none, as `datasets` has it."""
    if path is None or path.is_file():
        return [path] if path is not None and FORMATS[path.suffix] == "json" else []
    files = (file for file in sorted(path.rglob("*")) if FORMATS.get(file.suffix) == "json" and file.is_file())
    return [file for file in files if not any(part[0] in "._" for part in file.relative_to(path).parts)]


def _root(error: BaseException) -> str:
    """What an error goes back to: `datasets` wraps the reason into one that says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _empty(name: str, split: str) -> DatasetError:
    return DatasetError(f"{name} is empty: there are no problems in it. Check the file and the split {split!r}.")


def _column(dataset: Dataset, name: str, given: str | None, known: tuple[str, ...], what: str) -> str:
    wanted = (given,) if given else known
    for column in wanted:
        if column in dataset.column_names:
            return column
    raise DatasetError(
        f"{name} has no {what} column: looked for {', '.join(wanted)}, found {', '.join(dataset.column_names)}. "
        f"Rename the column, or name it with `{what}_column`."
    )


def _first_of_each(dataset: Dataset, problem: str, answer: str) -> list[int]:
    """Indices of the first row of each problem; answers that differ among a problem's rows are warned about."""
    first: dict[str, str] = {}
    kept: list[int] = []
    conflicts = set()
    for start, batch in enumerate(dataset.select_columns([problem, answer]).iter(batch_size=10_000)):
        for offset, (text, gold) in enumerate(zip(batch[problem], batch[answer], strict=True)):
            key = str(text)
            if key not in first:
                first[key] = str(gold)
                kept.append(start * 10_000 + offset)
            elif first[key] != str(gold):
                conflicts.add(key)
    logger.info("Kept %d different problems of %d rows.", len(kept), len(dataset))
    if conflicts:
        logger.warning("%d problems have rows with different answers: the first one is used.", len(conflicts))
    return kept


def _messages(problem: Any, template: str, where: _Place) -> list[dict[str, str]]:
    if isinstance(problem, str) and problem.strip():
        return [{"role": "user", "content": template.replace("{problem}", problem)}]
    if isinstance(problem, list) and problem and all(isinstance(m, dict) and "content" in m for m in problem):
        return [_message(message, where) for message in problem]
    raise DatasetError(
        f"The problem in {where} is {_shown(problem)}: it must be a text, or a list of messages with role and content."
    )


def _message(message: dict[str, Any], where: _Place) -> dict[str, str]:
    role = message.get("role") or "user"
    for name, value in (("role", role), ("content", message["content"])):
        if not isinstance(value, str):
            raise DatasetError(
                f"A message of the problem in {where} has the {name} {_shown(value)}: it must be a text. Join the "
                "texts of a content in parts; pictures are not supported."
            )
    return {"role": role, "content": message["content"]}


def _answer(answer: Any, where: _Place) -> str:
    if isinstance(answer, dict):
        answer = answer.get("ground_truth")
    if isinstance(answer, list) and answer and all(isinstance(part, str) for part in answer):
        answer = ", ".join(answer)  # OlympiadBench lists the several answers of a problem
    if answer is None or isinstance(answer, (dict, list)) or (isinstance(answer, float) and not math.isfinite(answer)):
        raise DatasetError(
            f"The answer in {where} is {_shown(answer)}: it must be a text, a finite number, a list of texts, or a "
            "dict with `ground_truth`. Correct or remove the row, or choose another `answer_column`."
        )
    return str(answer)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
