# SPDX-License-Identifier: Apache-2.0
"""Loading problems: DAPO-Math-17k's columns, local files, and errors that say what is missing."""

from pathlib import Path
from typing import Any

import pytest
from problems import dapo_rows, write

from dc_trl.tasks.data import BOXED_TEMPLATE, DatasetError, load_math_dataset, local_path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_reads_the_columns_of_dapo(tmp_path: Path, suffix: str) -> None:
    rows = dapo_rows()
    data = load_math_dataset(write(tmp_path / f"dapo{suffix}", rows))
    assert data.column_names == ["prompt", "solution"]
    assert data[1]["prompt"] == rows[1]["prompt"]  # as it is: it brings its own instructions
    assert data["solution"] == ["1", "2", "3"]


@pytest.mark.parametrize("problem", ["prompt", "problem", "question"])
@pytest.mark.parametrize("answer", ["answer", "solution"])
def test_reads_plain_columns(tmp_path: Path, problem: str, answer: str) -> None:
    data = load_math_dataset(write(tmp_path / "local.jsonl", [{problem: "1+1?", answer: 2, "level": "easy"}]))
    message = {"role": "user", "content": BOXED_TEMPLATE.replace("{problem}", "1+1?")}
    assert data[0] == {"prompt": [message], "solution": "2"}


def test_template_and_named_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [{"text": r"\frac{a}{b}", "gold": "7", "answer": "wrong"}])
    data = load_math_dataset(
        path, problem_column="text", answer_column="gold", prompt_template="Solve {problem} {now}."
    )
    assert data[0]["prompt"][0]["content"] == r"Solve \frac{a}{b} {now}."
    assert data[0]["solution"] == "7"


def test_reads_a_directory(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", dapo_rows())
    assert len(load_math_dataset(str(tmp_path))) == 3


def test_drops_repeated_problems_and_warns_of_conflicts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = dapo_rows(problems=4, repeats=5)
    path = write(tmp_path / "repeated.parquet", rows)
    assert len(load_math_dataset(path)) == 20
    assert load_math_dataset(path, deduplicate=True)["solution"] == ["1", "2", "3", "4"]
    assert not caplog.records
    rows[-1]["reward_model"]["ground_truth"] = "999"
    data = load_math_dataset(write(tmp_path / "conflict.parquet", rows), deduplicate=True)
    assert data["solution"] == ["1", "2", "3", "4"]  # the first answer stands
    assert "1 problems have rows with different answers" in caplog.text


def test_says_which_column_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"text": "1+1", "answer": "2"}])
    with pytest.raises(
        DatasetError, match="no problem column: looked for prompt, problem, question, found text, answer"
    ):
        load_math_dataset(path)
    with pytest.raises(DatasetError, match="no answer column: looked for gold, found text, answer.*`answer_column`"):
        load_math_dataset(path, problem_column="text", answer_column="gold")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": " ", "answer": "2"}, "problem in row 0"),
        ({"prompt": [{"role": "user"}], "answer": "2"}, "problem in row 0"),
        ({"prompt": "1+1", "answer": None}, "answer in row 0.*is None"),
        ({"prompt": "1+1", "reward_model": {"style": "rule"}}, "answer in row 0"),
        ({"prompt": "1+1", "answer": [2]}, r"answer in row 0.*\[2\]"),
    ],
)
def test_says_which_row_is_wrong(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load_math_dataset(write(tmp_path / "x.jsonl", [row]))


def test_says_that_a_file_is_empty(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(DatasetError, match="x.jsonl is empty: there are no problems"):
        load_math_dataset(str(tmp_path / "x.jsonl"))


def test_says_which_file_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("missing.jsonl", "./missing", "/no/such/data", "a/b/c"):
        with pytest.raises(DatasetError, match="does not exist"):
            local_path(name)
    (tmp_path / "data.csv").write_text("prompt,answer\n")
    with pytest.raises(DatasetError, match="not of a known format: use .json, .jsonl, .parquet"):
        local_path("data.csv")
    broken = tmp_path / "broken.parquet"
    broken.write_text("not parquet")
    with pytest.raises(DatasetError, match="Could not load split 'train' of .*broken.parquet"):
        load_math_dataset(str(broken))
    with pytest.raises(DatasetError, match="Could not load split 'test'"):
        load_math_dataset(write(tmp_path / "good.jsonl", dapo_rows()), split="test")


def test_hub_names_are_left_to_the_hub() -> None:
    assert local_path("BytedTSinghua-SIA/DAPO-Math-17k") is None
