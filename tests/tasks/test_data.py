# SPDX-License-Identifier: Apache-2.0
"""Loading problems: DAPO-Math-17k's columns, local files, and errors that say what is missing."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import BAD_LINES, DEEP
from problems import dapo_rows, write_rows

from dc_trl.tasks.data import BOXED_TEMPLATE, DatasetError, load_math_dataset, local_path

PARTS = [{"type": "text", "text": "1+1"}]
GOOD = {"prompt": "1+1", "answer": "2"}


def messages(role: Any, content: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_reads_the_columns_of_dapo(tmp_path: Path, suffix: str) -> None:
    rows = dapo_rows()
    data = load_math_dataset(str(write_rows(tmp_path / f"dapo{suffix}", rows)))
    assert data.column_names == ["prompt", "solution"]
    assert data[1]["prompt"] == rows[1]["prompt"]  # as it is: it brings its own instructions
    assert data["solution"] == ["1", "2", "3"]


@pytest.mark.parametrize("problem", ["prompt", "problem", "question"])
@pytest.mark.parametrize("answer", ["answer", "solution"])
def test_reads_plain_columns(tmp_path: Path, problem: str, answer: str) -> None:
    data = load_math_dataset(
        str(write_rows(tmp_path / "local.jsonl", [{problem: "1+1?", answer: 2, "level": "easy"}]))
    )
    message = {"role": "user", "content": BOXED_TEMPLATE.replace("{problem}", "1+1?")}
    assert data[0] == {"prompt": [message], "solution": "2"}


def test_template_and_named_columns(tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "x.json", [{"text": r"\frac{a}{b}", "gold": "7", "answer": "wrong"}]))
    data = load_math_dataset(
        path, problem_column="text", answer_column="gold", prompt_template="Solve {problem} {now}."
    )
    assert data[0]["prompt"][0]["content"] == r"Solve \frac{a}{b} {now}."
    assert data[0]["solution"] == "7"


def test_reads_a_directory(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", dapo_rows())
    assert len(load_math_dataset(str(tmp_path))) == 3


def test_drops_repeated_problems_and_warns_of_conflicts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = dapo_rows(problems=4, repeats=5)
    path = str(write_rows(tmp_path / "repeated.parquet", rows))
    assert len(load_math_dataset(path)) == 20
    assert load_math_dataset(path, deduplicate=True)["solution"] == ["1", "2", "3", "4"]
    assert not caplog.records
    rows[-1]["reward_model"]["ground_truth"] = "999"
    data = load_math_dataset(str(write_rows(tmp_path / "conflict.parquet", rows)), deduplicate=True)
    assert data["solution"] == ["1", "2", "3", "4"]  # the first answer stands
    assert "1 problems have rows with different answers" in caplog.text


def test_says_which_column_is_missing(tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "x.jsonl", [{"text": "1+1", "answer": "2"}]))
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
        ({"prompt": "1+1", "answer": math.nan}, "answer in row 0.*is nan"),
        ({"prompt": messages("user", None), "answer": "2"}, "row 0 .*has the content None: it must be a text"),
        ({"prompt": messages("user", 7), "answer": "2"}, "row 0 .*has the content 7"),
        ({"prompt": messages("user", PARTS), "answer": "2"}, "row 0 .*has the content .*Join the texts of a content"),
        ({"prompt": messages({"name": "user"}, "1+1"), "answer": "2"}, "row 0 .*has the role {'name': 'user'}"),
        ({"prompt": messages(3, "1+1"), "answer": "2"}, "row 0 .*has the role 3"),
    ],
)
def test_says_which_row_is_wrong(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load_math_dataset(str(write_rows(tmp_path / "x.jsonl", [row])))


def test_a_message_names_the_line_whatever_was_left_out_before_it(tmp_path: Path) -> None:
    rows = [GOOD, GOOD, {"prompt": "a", "answer": "1"}, {"prompt": " ", "answer": "2"}]
    path = tmp_path / "x.jsonl"
    path.write_text("\n\n" + "".join(json.dumps(row) + "\n\n" for row in rows))
    for deduplicate in (False, True):  # which leaves the second row out
        with pytest.raises(DatasetError, match=r"problem in row 3 of .*x\.jsonl \(line 9\) is ' '"):
            load_math_dataset(str(path), deduplicate=deduplicate)


BAD_ROWS = BAD_LINES | {
    "a list": (b"[1]", "it is of type list, not an object"),
    "a number": (b"3", "it is of type int, not an object"),
    "half of a pair": (rb'{"prompt": "\ud800", "answer": "2"}', "half of a surrogate pair"),
    "nested where nothing is read": (b'{"prompt": "1", "answer": "2", "more": %s}' % DEEP.encode(), "nested deeper"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    line, reason = BAD_ROWS[name]
    good = json.dumps(GOOD).encode()
    path = tmp_path / "folder" / "train.jsonl"
    path.parent.mkdir()
    path.write_bytes(good + b"\n\n" + line + b"\n" + good)
    for given in (path, path.parent):
        with pytest.raises(DatasetError, match=f"line 3 of {path} is no row of JSON Lines: .*{reason}") as caught:
            load_math_dataset(str(given))
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_document_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"[%s,\n%s]" % (json.dumps(GOOD).encode(), BAD_ROWS[name][0]))
    with pytest.raises(DatasetError, match=f"{path} is no list of rows of JSON: "):
        load_math_dataset(str(path))


@pytest.mark.parametrize(
    "text",
    [
        '[\n {"prompt": "1+1",\n  "answer": "2"}\n]',
        '{"prompt": "1+1",\n "answer": "2"}',
        '{"prompt": "1+1", "answer": "2"}\n',
        '\ufeff{"prompt": "1+1", "answer": "2"}\n',
        '\ufeff[{"prompt": "1+1", "answer": "2"}]',
    ],
)
def test_reads_documents_and_lines(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert load_math_dataset(str(tmp_path / "x.json"))["solution"] == ["2"]


def test_the_reason_of_a_loader_is_given(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "prompt": "b", "answer": "2"}\n')
    with pytest.raises(DatasetError, match="Could not load split 'train' of .*prompt.* was specified twice"):
        load_math_dataset(str(path))


def test_parquet_with_text_that_is_none_is_named(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.int32([0, 1])), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"prompt": bad, "answer": ["2"]}), tmp_path / "x.parquet")
    with pytest.raises(DatasetError, match=r"A row of .*x\.parquet cannot be read: UnicodeDecodeError"):
        load_math_dataset(str(tmp_path / "x.parquet"))


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
        load_math_dataset(str(write_rows(tmp_path / "good.jsonl", dapo_rows())), split="test")


def test_hub_names_are_left_to_the_hub() -> None:
    assert local_path("BytedTSinghua-SIA/DAPO-Math-17k") is None
