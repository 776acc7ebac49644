# SPDX-License-Identifier: Apache-2.0
"""`dc-trl evaluate` with an engine whose answers are known: scores, resume, files, table, model card, errors."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import ModelCard
from tiny import save_tiny_policy

from dc_trl.cli import main
from dc_trl.data import BOXED_TEMPLATE
from dc_trl.evaluation import model_index_results, read_results
from dc_trl.evaluation.benchmarks import BENCHMARKS, PAPER_FIGURES, Benchmark, load_problems, paper_figures
from dc_trl.evaluation.command import chosen_benchmarks, make_parser
from dc_trl.evaluation.engines import Completion, Request
from dc_trl.evaluation.results import mean_and_stderr, results_table
from dc_trl.evaluation.runs import load_judge
from dc_trl.evaluation.sampling import Judge, planned_draws

# Which samples of which problem are right: means 1, 1/2 and 0, so the mean is 1/2, their standard deviation
# √((1/4 + 0 + 1/4) / 2) = 1/2, and the standard error (1/2) / √3.
RIGHT = {(0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (1, 2)}
STDERR = 0.5 / math.sqrt(3)
SUMS = [{"problem": "2 + 2 = ?", "answer": 4}, {"problem": "1/3 + 1/6 = ?", "answer": "\\frac{1}{2}"}]
SUMS += [{"problem": "10^3 = ?", "answer": "1000"}]


class KnownEngine:
    """Answers the samples in `right` rightly and cuts those in `cut`; counts requests; fails after `survives`."""

    name, precision, batch_size = "known", "exact", None

    def __init__(self, right: set[tuple[int, int]] = RIGHT, cut: set[tuple[int, int]] | None = None) -> None:
        self.right, self.cut, self.context = right, cut or set(), 512
        self.options: dict[str, Any] = {}
        self.seen: list[int] = []
        self.survives = 10**9
        self.script: dict[int, Completion] = {}

    def learn(self, benchmark: Benchmark, seed: int = 0, samples: int = 32) -> None:
        """Prepares the answers to a benchmark's problems, by seed."""
        for draw in planned_draws(load_problems(benchmark, BOXED_TEMPLATE), samples, seed):
            place = (draw.problem.index, draw.sample)
            text = f"I think it is \\boxed{{{draw.problem.gold if place in self.right else -1}}}."
            self.script[draw.seed] = Completion(text, 10 + draw.sample, place in self.cut)

    def complete(self, requests: list[Request], max_tokens: int) -> Iterator[tuple[int, Completion]]:
        self.max_tokens = max_tokens
        for index in reversed(range(len(requests))):  # any order will do
            if len(self.seen) == self.survives:
                raise ConnectionError("the machine is gone")
            self.seen.append(requests[index].seed)
            yield index, self.script[requests[index].seed]


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny policy's directory, and the current directory with sums.jsonl in it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "sums.jsonl", SUMS)
    return save_tiny_policy(tmp_path / "policy")


@pytest.fixture(scope="module")
def judge() -> Judge:
    """math-verify, its workers started once."""
    return load_judge()


@pytest.fixture
def engine(policy: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> KnownEngine:
    engine = KnownEngine()
    engine.learn(Benchmark("sums", "sums", "sums.jsonl", 4, "train"))
    monkeypatch.setattr("dc_trl.evaluation.runs.make_engine", lambda *args: engine)
    monkeypatch.setattr("dc_trl.evaluation.runs.load_judge", lambda: judge)
    return engine


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def evaluate(*flags: str, model: str = "policy", data: str = "sums.jsonl") -> int:
    return main(["evaluate", "--model_name_or_path", model, "--dataset", data, *flags])


def sample_files(folder: Path = Path("policy/evaluation")) -> list[Path]:
    return sorted((folder / "samples").glob("*.jsonl"))


def figures(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "time"}


def test_the_score_is_the_hand_worked_one(engine: KnownEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate() == 0
    (result,) = read_results("policy")
    assert result["mean"] == pytest.approx(0.5) and result["stderr"] == pytest.approx(STDERR)
    assert (result["metric"], result["problems"], result["truncated"]) == ("avg@4", 3, 0.0)
    assert result["mean_tokens"] == 11.5  # (10 + 11 + 12 + 13) / 4
    assert "| sums, avg@4 | 3 | 50.0 ± 28.9 | 0.0 | 12 |" in capsys.readouterr().out
    lines = [json.loads(line) for line in sample_files()[0].read_text().splitlines()][1:]
    assert {(line["problem"], line["sample"]) for line in lines if line["correct"]} == RIGHT
    assert len(lines) == len({line["seed"] for line in lines}) == 12
    assert not any("completion" in line for line in lines)


def test_mean_and_standard_error() -> None:
    # m = (3/4, 1/4): mean 1/2, deviations ±1/4, s = √(2/16 / 1), divided by √2: 1/4.
    assert mean_and_stderr([[True, True, True, False], [False, False, True, False]]) == (0.5, pytest.approx(0.25))
    assert mean_and_stderr([[True, False]]) == (0.5, None)
    # Clustered: eight copies of the same verdict on two problems tell no more than one.
    assert mean_and_stderr([[True] * 8, [False] * 8]) == mean_and_stderr([[True], [False]])
    for empty in ([], [[True], []]):
        with pytest.raises(ValueError, match="at least one"):
            mean_and_stderr(empty)


def test_what_does_not_end_is_wrong(engine: KnownEngine) -> None:
    engine.cut = {(0, 0), (0, 1), (2, 3)}  # the first two would be right
    engine.learn(Benchmark("sums", "sums", "sums.jsonl", 4, "train"))
    assert evaluate("--save_completions") == 0
    (result,) = read_results("policy")
    assert result["mean"] == pytest.approx((2 / 4 + 2 / 4 + 0) / 3)
    assert result["truncated"] == pytest.approx(3 / 12)
    lines = [json.loads(line) for line in sample_files()[0].read_text().splitlines()][1:]
    assert all("boxed" in line["completion"] for line in lines)


def test_a_gold_answer_that_cannot_be_parsed_is_left_out_and_said(
    engine: KnownEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write(Path("sums.jsonl"), [*SUMS, {"problem": "why?", "answer": "because $ of"}])
    engine.learn(Benchmark("sums", "sums", "sums.jsonl", 4, "train"))
    assert evaluate() == 0
    (result,) = read_results("policy")
    assert (result["problems"], result["unjudged_problems"]) == (3, 1)
    assert result["mean"] == pytest.approx(0.5)
    assert "3 (1 without a usable gold answer left out)" in capsys.readouterr().out
    # For a model that is cut off each time too, or two models would be scored on different problems.
    engine.cut = {(3, sample) for sample in range(4)}
    engine.learn(Benchmark("sums", "sums", "sums.jsonl", 4, "train"), seed=1)
    assert evaluate("--seed", "1") == 0
    assert read_results("policy")[-1]["problems"] == 3


@pytest.mark.parametrize("survives", [0, 5, 11])
def test_a_killed_run_draws_only_the_rest(
    engine: KnownEngine, survives: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dc_trl.evaluation.sampling._JUDGED_TOGETHER", 2)
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


def test_equal_problems_are_drawn_independently(policy: Path) -> None:
    write(Path("twice.jsonl"), [SUMS[0], SUMS[0]])
    draws = planned_draws(load_problems(Benchmark("twice", "twice", "twice.jsonl", 4, "train"), BOXED_TEMPLATE), 4, 0)
    assert len({draw.seed for draw in draws}) == 8 and len({draw.problem.hash for draw in draws}) == 1


def test_a_changed_problem_is_drawn_again(engine: KnownEngine) -> None:
    assert evaluate() == 0
    write(Path("sums.jsonl"), [SUMS[0], SUMS[1] | {"answer": "0.5"}, SUMS[2]])
    engine.learn(Benchmark("sums", "sums", "sums.jsonl", 4, "train"))
    assert evaluate() == 0
    assert len(engine.seen) == 12 + 4
    assert len(read_results("policy")) == 1


def test_max_tokens_is_cut_to_the_context_and_said(
    engine: KnownEngine, capsys: pytest.CaptureFixture[str], policy: Path
) -> None:
    prompt = BOXED_TEMPLATE.replace("{problem}", SUMS[1]["problem"])
    engine.context = len(prompt) + 50  # one token a character
    assert evaluate() == 0
    assert engine.max_tokens == read_results("policy")[0]["max_tokens"] == 50
    assert "limited to 50 tokens instead of --max_tokens 32768" in capsys.readouterr().out
    engine.context = len(prompt)
    assert evaluate() == 2
    assert "fills the context" in capsys.readouterr().err


def test_local_copies_of_the_papers_benchmarks(engine: KnownEngine, capsys: pytest.CaptureFixture[str]) -> None:
    """All six from local files named after them: the paper's samples, its figures beside ours, and the average."""
    files = []
    for name, benchmark in BENCHMARKS.items():
        files.append(str(write(Path(f"{name}.jsonl"), SUMS)))
        engine.learn(Benchmark(name, name, files[-1], benchmark.samples, "train"))
    arguments = ["evaluate", "--model_name_or_path", "policy", "--dataset", *files]
    assert main(arguments) == 0
    assert len(engine.seen) == 3 * (3 * 32 + 3 * 4)
    output = capsys.readouterr().out
    assert "aime24: aime24.jsonl has 3 problems, not 30." in output
    # Of 32 samples of the first problem four are right, of the second two: (4/32 + 2/32) / 3 = 1/16.
    assert "| AIME24, avg@32 | 3 | 6.2 ± 3.6 | 0.0 | 26 | 58.8 / 63.2 | 60.2 / 66.8 | 53.2 / 55.0 | " in output
    average = (3 * 1 / 16 + 3 * 1 / 2) / 6
    # m = (1/8, 1/16, 0), so s = 1/16 and the standard error is (1/16) / √3; the three of avg@4 as above.
    error = math.sqrt(3 * (1 / 16 / math.sqrt(3)) ** 2 + 3 * STDERR**2) / 6
    assert f"| average of the six |  | {100 * average:.1f} ± {100 * error:.1f} |  |  | 67.3 / 71.0 |" in output
    assert [result["metric"] for result in read_results("policy")] == ["avg@32"] * 3 + ["avg@4"] * 3


def test_the_papers_figures_add_up() -> None:
    for column in PAPER_FIGURES.values():
        for method in (0, 1):
            scores = [pair[method] for pair in column]
            assert len(scores) == 7 and sum(scores[:6]) / 6 == pytest.approx(scores[6], abs=0.051)
    assert paper_figures("olympiadbench")[0] == "70.1 / 74.4"
    assert paper_figures("sums") == [""] * 4


# The columns of each dataset on the Hub, as docs/evaluation.md has them.
HUB_ROWS: dict[str, dict[str, Any]] = {
    "aime24": {"id": 60, "problem": "P", "solution": "S", "answer": "204", "url": "u", "year": "2024"},
    "aime25": {"problem": "P", "answer": "70", "id": "0"},
    "amc23": {"id": 0, "question": "P", "answer": "27.0", "url": "u"},
    "math500": {"problem": "P", "solution": "S", "answer": "\\frac12", "subject": "Algebra", "level": 2},
    "minerva": {"question": "P", "answer": "4.5e33"},
    "olympiadbench": {"id": 1606, "question": "P", "solution": ["S"], "final_answer": ["$2$", "$5$"], "context": None},
}


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_hub_datasets_load(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark, row = BENCHMARKS[name], HUB_ROWS[name]
    write(tmp_path / benchmark.dataset / f"{benchmark.split}.jsonl", [row, row | {"id": 1}])
    real = datasets.load_dataset

    def offline(path: str, config: str | None = None, *, split: str) -> Any:
        """The Hub's side: the repository's files, under its name."""
        return real(str(tmp_path / path), config, split=split)

    monkeypatch.setattr("dc_trl.data.load_dataset", offline)
    problems = load_problems(benchmark, "Q: {problem}")
    assert [problem.index for problem in problems] == [0, 1]
    assert problems[0].prompt == [{"role": "user", "content": "Q: P"}]
    answer = row.get("answer") or ", ".join(row["final_answer"])
    assert problems[0].gold == answer
    assert len(load_problems(benchmark, "{problem}", limit=1)) == 1


def test_samples_and_sizes_are_the_papers() -> None:
    sizes = {name: (benchmark.samples, benchmark.problems) for name, benchmark in BENCHMARKS.items()}
    assert sizes == {
        **{"aime24": (32, 30), "aime25": (32, 30), "amc23": (32, 40)},
        **{"math500": (4, 500), "minerva": (4, 272), "olympiadbench": (4, 674)},
    }
    by_default = chosen_benchmarks(make_parser().parse_args(["--model_name_or_path", "m"]))
    assert by_default == list(BENCHMARKS.values())


OLD_CARD = """---
license: mit
model-index:
- name: Old name
  results:
  - task: {type: text-generation}
    dataset: {name: Other, type: other/data}
    metrics: [{type: bleu, value: 12.5}]
- name: Second
  results: []
---

# Title

Text with --- and é.
"""


def card_results(path: str = "policy/README.md") -> dict[tuple[str, str, Any], float]:
    found = ModelCard.load(path).data.eval_results or []
    keys = [(r.dataset_name, r.metric_name, (r.metric_args or {}).get("temperature")) for r in found]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, (r.metric_value for r in found), strict=True))


def test_the_card_keeps_what_it_has(engine: KnownEngine) -> None:
    Path("policy/README.md").write_text(OLD_CARD, encoding="utf-8")
    assert evaluate() == 0
    expected = {
        ("Other", None, None): 12.5,
        ("sums", "avg@4", 0.7): 50.0,
        ("sums", "avg@4 standard error", 0.7): round(100 * STDERR, 2),
    }
    assert card_results() == expected
    card = ModelCard.load("policy/README.md")
    assert "Text with --- and é." in card.text and card.data.license == "mit"
    written = Path("policy/README.md").read_text(encoding="utf-8")
    assert "- name: Old name\n" in written and "- name: Second\n" in written

    engine.right = {(0, 0), (1, 0), (2, 0)}
    engine.learn(Benchmark("sums", "sums", "sums.jsonl", 4, "train"), seed=1)
    assert evaluate("--seed", "1") == 0  # the same settings as far as a reader cares: replaced
    assert card_results() == expected | {
        ("sums", "avg@4", 0.7): 25.0,
        ("sums", "avg@4 standard error", 0.7): 0.0,
    }
    engine.learn(Benchmark("sums", "sums", "sums.jsonl", 4, "train"))
    assert evaluate("--temperature", "1.0") == 0
    assert len(card_results()) == 5
    assert len(read_results("policy")) == 3 and len(model_index_results(read_results("policy"))) == 4


def test_a_card_is_made_where_there_is_none_and_elsewhere_when_asked(engine: KnownEngine) -> None:
    assert evaluate() == 0
    assert ModelCard.load("policy/README.md").data.model_name == "policy"
    assert evaluate("--model_card", "cards/mine.md") == 0
    assert card_results("cards/mine.md") == card_results()


def test_a_broken_card_is_found_before_sampling(engine: KnownEngine, capsys: pytest.CaptureFixture[str]) -> None:
    Path("policy/README.md").write_text("---\na: [\n---\n")
    assert evaluate() == 2
    assert "policy/README.md is not valid" in capsys.readouterr().err
    assert not engine.seen


def test_push_to_hub(engine: KnownEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pushed: list[Any] = []

    def hub(repository: str, metadata: dict[str, Any], *, overwrite: bool) -> str:
        pushed.append((repository, metadata["model-index"], overwrite))
        if len(pushed) == 2:
            raise OSError("no network")
        return "https://example.org/commit"

    monkeypatch.setattr("dc_trl.evaluation.card.metadata_update", hub)
    assert evaluate("--push_to_hub", "--hub_model_id", "me/policy") == 0
    repository, index, overwrite = pushed[0]
    assert (repository, index[0]["name"], overwrite) == ("me/policy", "policy", True)
    assert index[0]["results"][0]["metrics"][0]["value"] == 50.0
    assert evaluate("--push_to_hub", "--hub_model_id", "me/policy") == 2
    assert "no network" in capsys.readouterr().err and len(engine.seen) == 12


def test_results_of_a_crash_are_passed_over(tmp_path: Path) -> None:
    assert read_results(tmp_path) == []
    line = {"benchmark": "a", "settings": "1", "mean": 0.1}
    lines = [line, line | {"mean": 0.2}, line | {"settings": "2"}, line | {"benchmark": "b"}]
    path = write(tmp_path / "evaluation" / "results.jsonl", lines)
    path.write_text("null\n" + path.read_text() + '{"mean": 0.5}\ngarbage\n{"benchmark": "a", "set')
    assert read_results(tmp_path) == [lines[1], lines[2], lines[3]]
    path.write_text(path.read_text() + "\n" + json.dumps(line | {"mean": 0.3}))
    assert read_results(tmp_path) == [lines[2], lines[3], line | {"mean": 0.3}]


@pytest.mark.parametrize(
    ("number", "line", "message"),
    [
        (1, '{"settings": {}}', "is not this run's settings (ValueError('other settings')). Move the file away"),
        (1, "garbage", "is not this run's settings"),
        (3, "garbage", "is not a sample"),
        (3, '{"problem": 1}', "is not a sample (KeyError('hash')). Remove that line: its sample is drawn again"),
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


def test_what_cannot_be_written_is_found_before_sampling(
    engine: KnownEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("")
    assert evaluate("--output_dir", "file/x") == 2
    assert "nothing can be written to file/x" in capsys.readouterr().err
    assert evaluate("--model_card", ".") == 2
    assert "the model card . is not valid" in capsys.readouterr().err
    assert not engine.seen
    assert evaluate("--model_card", "file/README.md") == 2
    assert "the scores are recorded, but the model card cannot be written" in capsys.readouterr().err
    assert len(read_results("policy")) == 1


def test_datasets_of_one_name_are_refused(engine: KnownEngine, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("a", "b"):
        write(Path(folder, "sums.jsonl"), SUMS)
    assert main(["evaluate", "--model_name_or_path", "policy", "--dataset", "a/sums.jsonl", "b/sums.jsonl"]) == 2
    assert "2 benchmarks are named sums" in capsys.readouterr().err
    named = chosen_benchmarks(
        make_parser().parse_args(["--model_name_or_path", "m", "--dataset", "me/sums-v1.5", "."])
    )
    assert [benchmark.name for benchmark in named] == ["sums-v1.5", Path.cwd().name]


def test_a_card_has_no_score_of_older_weights(engine: KnownEngine) -> None:
    assert evaluate() == 0
    save_tiny_policy(Path("policy"))
    engine.right = set()
    engine.learn(Benchmark("sums", "sums", "sums.jsonl", 4, "train"))
    assert evaluate() == 0
    old, new = read_results("policy")
    assert (old["mean"], new["mean"]) == (0.5, 0.0)
    assert [entry.metric_value for entry in model_index_results([old, new])] == [0.0, 0.0]
    other = old | {"temperature": 1.0}
    assert [entry.metric_value for entry in model_index_results([old, other, new])][::2] == [0.0, 50.0]


def test_no_score_for_a_table_of_nothing() -> None:
    result = {"benchmark": "x", "title": "x", "metric": "avg@4", "limit": None, "problems": 0, "unjudged_problems": 1}
    row = results_table([result | {"mean": None, "stderr": None, "truncated": 0.0, "mean_tokens": 5.0}])
    assert row.endswith("| x, avg@4 | 0 (1 without a usable gold answer left out) | none | 0.0 | 5 |")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--benchmarks", "aime23"], "'aime23': it must be of aime24, "),
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--engine", "transformers", "--answer_column", "gold"], "no answer column: looked for gold"),
        (["--model_name_or_path", "./nowhere"], "model directory ./nowhere does not exist"),
        (["--model_name_or_path", "empty"], "cannot load configuration and tokenizer of empty"),
        (["--temperature", "0"], "--temperature is 0.0"),
        (["--top_p", "0"], "--top_p 0.0"),
        (["--samples", "0"], "0 is not a positive whole number"),
        (["--limit", "-1"], "-1 is not a positive whole number"),
        (["--max_tokens", "1e3"], "1e3 is not a positive whole number"),
        (["--model_name_or_path", "adapter"], "adapter holds a PEFT adapter, not a whole model: merge it"),
        (["--model_name_or_path", "bare"], "write it into chat_template.jinja"),
        (["--model_name_or_path", "strict"], "chat template does not take problem 0: alternate!"),
        (["--vllm_engine_kwargs", "{"], "is not JSON"),
        (["--vllm_engine_kwargs", "[]"], "must be a JSON mapping"),
        (["--engine", "transformers", "--vllm_engine_kwargs", '{"a": 1}'], "is for --engine vllm, not transformers"),
        (["--engine", "transformers", "--top_p", "0.9"], "the in-process engine samples from the whole distribution"),
        (["--engine", "server", "--server_base_url", "http://127.0.0.1:9"], "no vLLM server answers"),
        (["--precision", "fp8"], "--precision fp8 is for the other engines"),
        (["--prompt_template", "Solve."], "has no {problem}"),
        (["--push_to_hub"], "needs --hub_model_id"),
    ],
)
def test_errors_name_the_value_and_the_way_out(
    policy: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    Path("empty").mkdir()
    write(Path("adapter/adapter_config.json"), [{"peft_type": "LORA"}])
    (save_tiny_policy("bare") / "chat_template.jinja").unlink()
    (save_tiny_policy("strict") / "chat_template.jinja").write_text("{{ raise_exception('alternate!') }}")
    monkeypatch.setattr("dc_trl.evaluation.runs.sample_benchmark", lambda *args: pytest.fail("it samples"))
    try:
        status = main(["evaluate", "--model_name_or_path", "policy", "--dataset", "sums.jsonl", *flags])
    except SystemExit as error:  # argparse's own
        status = int(error.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err


def test_vllm_that_is_not_installed(
    policy: Path, judge: Judge, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dc_trl.evaluation.runs.load_judge", lambda: judge)
    monkeypatch.setattr("dc_trl.evaluation.vllm_engines.importlib.util.find_spec", lambda name: None)
    assert evaluate() == 2
    assert "pip install 'dc-trl[vllm]'" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_casts_nothing_silently(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_policy(policy, dtype="float32")
    assert evaluate() == 2
    assert "stored in float32" in capsys.readouterr().err


def test_the_documentation_has_every_option() -> None:
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    options = {option for action in make_parser()._actions for option in action.option_strings} - {"-h", "--help"}
    assert set(re.findall(r"^\| `(--\w+)", page, flags=re.MULTILINE)) == options
    assert set(re.findall(r"(?<![\w-])--[a-z]\w+", page)) <= options | {"--model", "--host"}
    for name, benchmark in BENCHMARKS.items():
        assert f"| `{name}` | `{benchmark.dataset}` | {benchmark.split} | {benchmark.problems} |" in page
        assert f"| `{benchmark.problem_column}`, `{benchmark.answer_column}` |" in page


def test_the_readers_load_no_torch() -> None:
    code = "import sys, dc_trl.evaluation; assert not {'torch', 'vllm', 'datasets', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
