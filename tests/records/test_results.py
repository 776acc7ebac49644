# SPDX-License-Identifier: Apache-2.0
"""results.jsonl: the last result of a benchmark counts, and what is no result is passed over and named."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import BAD_RESULTS, RESULT

from dc_trl.records.card.model_index import check_card, update_card
from dc_trl.records.results import append_result, read_results

OTHER = RESULT | {"benchmark": "aime25", "title": "AIME25", "dataset": "math-ai/aime25"}


def write(folder: Path, *lines: bytes) -> Path:
    path = folder / "evaluation" / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def encoded(*results: dict[str, Any]) -> list[bytes]:
    return [json.dumps(result).encode() for result in results]


def test_the_last_result_of_a_benchmark_and_its_settings_counts(tmp_path: Path) -> None:
    assert read_results(tmp_path) == []
    later, others = RESULT | {"mean": 0.25}, RESULT | {"settings": "other"}
    path = write(tmp_path, *encoded(RESULT, later, others, OTHER))
    assert read_results(tmp_path) == [later, others, OTHER]
    path.write_bytes(path.read_bytes() + b'{"benchmark": "aime24", "set')  # a crash
    assert read_results(tmp_path) == [later, others, OTHER]
    append_result(path.parent, RESULT)
    assert read_results(tmp_path) == [others, OTHER, RESULT]


@pytest.mark.parametrize("name", BAD_RESULTS)
def test_what_is_no_result_is_passed_over_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    bad, reason = BAD_RESULTS[name]
    good = encoded(RESULT, OTHER)
    path = write(tmp_path, good[0], bad, good[1])
    with caplog.at_level(logging.WARNING, "dc_trl.records.results"):
        assert read_results(tmp_path) == [RESULT, OTHER]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"line 2 of {path} is no benchmark result, and is passed over: ")
    assert re.search(reason, said)
    assert len(said) < 400 and said.isprintable()


def test_whatever_passes_can_be_written_into_a_card(tmp_path: Path) -> None:
    write(tmp_path, *encoded(RESULT, OTHER), *(line for line, _ in BAD_RESULTS.values()))
    card = tmp_path / "README.md"
    update_card(card, "policy", read_results(tmp_path))
    check_card(card)
    header = yaml.safe_load(card.read_text(encoding="utf-8").split("---")[1])
    (entry,) = header["model-index"]
    assert [result["dataset"]["name"] for result in entry["results"]] == ["AIME24", "AIME25"]


@pytest.mark.parametrize("mode", ["a directory", "not readable"])
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    path = tmp_path / "evaluation" / "results.jsonl"
    if mode == "a directory":
        path.mkdir(parents=True)
    else:  # whoever runs the tests as root may read everything

        def refuse(*_: Any, **__: Any) -> None:
            raise PermissionError(13, "Permission denied")

        write(tmp_path, *encoded(RESULT))
        monkeypatch.setattr(Path, "open", refuse)
    assert read_results(tmp_path) == []
    assert f"the benchmark results are left out: {path} cannot be read" in caplog.text
