# SPDX-License-Identifier: Apache-2.0
"""`dc-trl evaluate` stopped, repeated and changed: what is drawn again, and what is never mixed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import BAD_LINES
from known_engine import SUMS, KnownEngine, evaluate, sample_files
from problems import write_rows
from tiny import save_tiny_policy

from dc_trl.commands.evaluate.benchmarks import Benchmark, load_problems
from dc_trl.commands.evaluate.engines import Completion, Request
from dc_trl.commands.evaluate.run import weights_identity
from dc_trl.commands.evaluate.sampling import SampleFile, planned_draws
from dc_trl.commands.usage import UsageError
from dc_trl.records.results import read_results
from dc_trl.tasks.data import BOXED_TEMPLATE

SAMPLE = {"problem": 0, "hash": "a", "sample": 0, "seed": 1, "tokens": 3, "truncated": False, "correct": True}


def figures(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "time"}


@pytest.mark.parametrize("survives", [0, 5, 11])
def test_a_killed_run_draws_only_the_rest(
    engine: KnownEngine, survives: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dc_trl.commands.evaluate.sampling._JUDGED_TOGETHER", 2)
    assert evaluate("--output_dir", "whole") == 0
    uninterrupted = json.loads(Path("whole/results.jsonl").read_text())
    engine.seen, engine.survives = [], survives
    assert evaluate() == 2
    assert "the same command draws only the rest" in capsys.readouterr().err
    assert not Path("policy/evaluation/results.jsonl").exists()
    with sample_files()[0].open("a") as file:
        file.write('{"problem": 0, "hash": "')  # the line that the crash cut off
    recorded = survives  # also the one that waited to be judged with another
    engine.survives, before = 10**9, len(engine.seen)
    assert evaluate() == 0
    assert len(engine.seen) - before == 12 - recorded
    assert set(engine.seen[:recorded]).isdisjoint(engine.seen[before:])
    assert figures(read_results("policy")[0]) == figures(uninterrupted)


def test_a_finished_run_draws_nothing_and_more_samples_only_what_is_missing(engine: KnownEngine) -> None:
    assert evaluate("--samples", "2", "--limit", "2") == 0
    assert len(engine.seen) == 4
    assert evaluate("--samples", "2", "--limit", "2") == 0
    assert len(engine.seen) == 4
    assert evaluate() == 0
    assert len(engine.seen) == 12
    subset, whole = read_results("policy")
    assert (subset["limit"], subset["metric"], subset["problems"]) == (2, "avg@2", 2)
    # Samples 0 and 1: both right for the first problem, the second right for the second: (1 + 1/2) / 2.
    assert subset["mean"] == pytest.approx(0.75)
    assert (whole["limit"], whole["mean"]) == (None, pytest.approx(0.5))
    assert len(Path("policy/evaluation/results.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("change", ["--temperature=1.0", "--top_p=0.9", "--max_tokens=64", "--seed=1", "weights"])
def test_other_settings_are_never_mixed(engine: KnownEngine, change: str) -> None:
    assert evaluate() == 0
    first = sample_files()
    engine.learn(Benchmark("sums", "sums", "sums.jsonl", 4, "train"), seed=1)
    if change == "weights":
        save_tiny_policy(Path("policy"))
    assert evaluate(*([] if change == "weights" else [change])) == 0
    assert len(engine.seen) == 24
    assert len(sample_files()) == 2 and set(first) < set(sample_files())
    assert len(read_results("policy")) == 2


@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_hub_models_weights_go_by_their_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert weights_identity("me/policy", revision) is None
    # As the Hub's client keeps a model that moved on: a folder a commit, and what each name stands for.
    for commit, name in ((40 * "a", "main"), (40 * "b", "v2")):
        for path, text in ((f"snapshots/{commit}/config.json", "{}"), (f"refs/{name}", commit)):
            file = tmp_path / "models--me--policy" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    assert weights_identity("me/policy", revision) == 40 * ("a" if revision is None else "b")


def test_equal_problems_are_drawn_independently(policy: Path) -> None:
    write_rows(Path("twice.jsonl"), [SUMS[0], SUMS[0]])
    draws = planned_draws(load_problems(Benchmark("twice", "twice", "twice.jsonl", 4, "train"), BOXED_TEMPLATE), 4, 0)
    assert len({draw.seed for draw in draws}) == 8 and len({draw.problem.hash for draw in draws}) == 1


def test_a_changed_problem_is_drawn_again(engine: KnownEngine) -> None:
    assert evaluate() == 0
    write_rows(Path("sums.jsonl"), [SUMS[0], SUMS[1] | {"answer": "0.5"}, SUMS[2]])
    engine.learn(Benchmark("sums", "sums", "sums.jsonl", 4, "train"))
    assert evaluate() == 0
    assert len(engine.seen) == 12 + 4
    assert len(read_results("policy")) == 1


@pytest.mark.parametrize(
    ("number", "line", "message"),
    [
        (1, '{"settings": {}}', "is not this run's settings (ValueError('other settings')). Move the file away"),
        (1, "garbage", "is not this run's settings"),
        (3, "garbage", "is not a sample"),
        (3, '{"problem": 1}', "is not a sample (KeyError('hash')). Remove that line: its sample is drawn again"),
        (3, "[1]", "is not a sample"),
    ],
)
def test_a_damaged_file_of_samples_is_refused_and_left_as_it_is(
    engine: KnownEngine, number: int, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate() == 0
    (path,) = sample_files()
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")
    assert evaluate() == 2
    assert f"line {number} of {path.relative_to('.')} {message}" in capsys.readouterr().err
    assert path.read_text().splitlines() == lines
    if number > 1:
        path.write_text("\n".join(lines[: number - 1] + lines[number:]) + "\n")
        assert evaluate() == 0 and len(engine.seen) == 13


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("place", [0, 2])
def test_a_sample_that_is_no_json_is_named(tmp_path: Path, place: int, name: str) -> None:
    with SampleFile(tmp_path, "sums", {}) as file:
        file.add([SAMPLE, SAMPLE | {"sample": 1}])
    lines = file.path.read_bytes().splitlines()
    lines[place] = BAD_LINES[name][0]
    file.path.write_bytes(b"\n".join(lines) + b"\n")
    what = "a sample" if place else "this run's settings"
    with pytest.raises(UsageError, match=f"line {place + 1} of .* is not {what} .*{BAD_LINES[name][1]}"):
        SampleFile(tmp_path, "sums", {})


@pytest.mark.parametrize(
    ("field", "value"), [("problem", []), ("tokens", "3"), ("truncated", None), ("correct", 1), ("hash", {})]
)
def test_a_sample_with_another_value_is_named(tmp_path: Path, field: str, value: Any) -> None:
    with SampleFile(tmp_path, "sums", {}) as file:
        write_rows(file.path, [{"settings": {}}, SAMPLE | {field: value}])
    with pytest.raises(UsageError, match=f"line 2 of .* is not a sample .*its '{field}' is .*Remove that line"):
        SampleFile(tmp_path, "sums", {})


def test_an_interrupt_loses_nothing_that_was_drawn(engine: KnownEngine, capsys: pytest.CaptureFixture[str]) -> None:
    complete = engine.complete

    def interrupted(requests: list[Request], max_tokens: int) -> Iterator[tuple[int, Completion]]:
        for count, drawn in enumerate(complete(requests, max_tokens)):
            if count == 7:
                raise KeyboardInterrupt
            yield drawn

    engine.complete = interrupted  # type: ignore[method-assign]
    assert evaluate() == 130
    assert "the same command draws only the rest" in capsys.readouterr().err
    assert len(sample_files()[0].read_text().splitlines()) == 1 + 7
    engine.complete, engine.seen = complete, []  # type: ignore[method-assign]
    assert evaluate() == 0 and len(engine.seen) == 12 - 7


def test_two_processes_do_not_draw_into_one_file(engine: KnownEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate() == 0
    (path,) = sample_files()
    before = path.read_bytes()
    code = "import sys, filelock as f; l = f.FileLock(sys.argv[1]); l.acquire(); print('held', flush=True); input()"
    held = str(path.parent / f".{path.stem}.lock")
    with subprocess.Popen(
        [sys.executable, "-c", code, held], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert evaluate("--samples", "8") == 2
        assert f"another process is drawing the samples of {path}" in capsys.readouterr().err
        other.kill()
    assert path.read_bytes() == before
    assert evaluate() == 0  # the lock of a process that was killed does not stay
