# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of `dc-trl evaluate`: the papers' protocol and figures, Hub and local data."""

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
from known_engine import STDERR, SUMS, KnownEngine, write

from dc_trl.commands.cli import main
from dc_trl.commands.evaluate.benchmarks import (
    BENCHMARKS,
    PAPER_BENCHMARKS,
    PAPER_FIGURES,
    Benchmark,
    load_problems,
    paper_figures,
)
from dc_trl.commands.evaluate.command import chosen_benchmarks, make_parser
from dc_trl.commands.evaluate.table import results_table
from dc_trl.records.results import read_results


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
            scores = {name: pair[method] for name, pair in column.items()}
            average = scores.pop("average")
            assert tuple(scores) == PAPER_BENCHMARKS and sum(scores.values()) / 6 == pytest.approx(average, abs=0.051)
    assert paper_figures("olympiadbench")[0] == "70.1 / 74.4"
    assert paper_figures("sums") == [""] * 4
    assert paper_figures("average")[0] == "67.3 / 71.0"


def test_a_seventh_benchmark_has_no_figures_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    seventh = Benchmark("gsm8k", "GSM8K", "openai/gsm8k", 4)
    monkeypatch.setitem(BENCHMARKS, "gsm8k", seventh)
    assert paper_figures("gsm8k") == [""] * 4
    assert paper_figures("average")[0] == "67.3 / 71.0"
    results = [result_of(BENCHMARKS[name]) for name in PAPER_BENCHMARKS]
    assert "average of the six" not in results_table([*results[1:], result_of(seventh)])
    table = results_table([*results, result_of(seventh)])
    # Not one of the six: it neither keeps their average away nor enters it. (6 · 50 %) / 6, error 6 % · √6 / 6.
    assert "| average of the six |  | 50.0 ± 2.4 |  |  | 67.3 / 71.0 |" in table
    assert "| GSM8K, avg@4 | 10 | 50.0 ± 6.0 | 0.0 | 9 |  |  |  |  |" in table


def result_of(benchmark: Benchmark) -> dict[str, Any]:
    """A result as `dc-trl evaluate` records it, half of the answers right."""
    return {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "metric": f"avg@{benchmark.samples}",
        "mean": 0.5,
        "stderr": 0.06,
        "problems": 10,
        "unjudged_problems": 0,
        "limit": None,
        "truncated": 0.0,
        "mean_tokens": 9.0,
    }


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

    monkeypatch.setattr("dc_trl.tasks.data.load_dataset", offline)
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


def test_datasets_of_one_name_are_refused(engine: KnownEngine, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("a", "b"):
        write(Path(folder, "sums.jsonl"), SUMS)
    assert main(["evaluate", "--model_name_or_path", "policy", "--dataset", "a/sums.jsonl", "b/sums.jsonl"]) == 2
    assert "2 benchmarks are named sums" in capsys.readouterr().err
    named = chosen_benchmarks(
        make_parser().parse_args(["--model_name_or_path", "m", "--dataset", "me/sums-v1.5", "."])
    )
    assert [benchmark.name for benchmark in named] == ["sums-v1.5", Path.cwd().name]
