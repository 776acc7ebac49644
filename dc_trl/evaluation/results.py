# SPDX-License-Identifier: Apache-2.0
"""The figures of a benchmark: mean and standard error, the line in results.jsonl, the table beside the paper's."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dc_trl.evaluation.benchmarks import BENCHMARKS, PAPER_FIGURES, paper_figures
from dc_trl.json_lines import append_lines, mend_end

RESULTS_FILE = "results.jsonl"

# What tells two results of a benchmark apart in a model card.
CARD_SETTINGS = ("temperature", "top_p", "max_tokens", "precision", "engine", "limit")


def mean_and_stderr(verdicts: Sequence[Sequence[bool]]) -> tuple[float, float | None]:
    """avg@n over P problems, and its standard error clustered by problem.

    With m_p the mean over problem p's samples: mean = Σ m_p / P, and stderr = s / √P where s is the standard deviation
    of the m_p with P − 1 in its denominator. The samples of a problem are not independent answers to "how good is
    the model", so P·n verdicts must not be taken for as many observations: the square root is of P, and the error
    holds for new problems of the same kind. Sampling noise within a problem is part of s (arXiv 2411.00640, §2.2).

    Args:
        verdicts: right or wrong, one sequence of samples for each problem.

    Returns:
        Two fractions; no standard error for a single problem.

    Raises:
        ValueError: there is no problem, or one without samples.
    """
    if not verdicts or not all(verdicts):
        raise ValueError("no verdicts: every problem needs at least one judged sample.")
    means = [sum(samples) / len(samples) for samples in verdicts]
    if len(means) == 1:
        return means[0], None
    return statistics.fmean(means), statistics.stdev(means) / math.sqrt(len(means))


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a benchmark from its recorded samples.

    A problem whose gold answer math-verify cannot parse cannot be answered rightly: it is left out, and counted in
    `unjudged_problems`.

    Returns:
        `mean` and `stderr` (fractions; None where there is none), `problems` (in the mean), `unjudged_problems`,
        `truncated` (share of all samples cut at the token limit), `mean_tokens` (of a completion).
    """
    verdicts: dict[int, list[bool]] = {}
    unjudged = {record["problem"] for record in records if record["correct"] is None}
    for record in records:
        if record["problem"] not in unjudged:
            verdicts.setdefault(record["problem"], []).append(record["correct"])
    mean, stderr = mean_and_stderr(list(verdicts.values())) if verdicts else (None, None)
    return {
        "mean": mean,
        "stderr": stderr,
        "problems": len(verdicts),
        "unjudged_problems": len(unjudged),
        "truncated": sum(record["truncated"] for record in records) / len(records),
        "mean_tokens": sum(record["tokens"] for record in records) / len(records),
    }


def append_result(folder: Path, result: dict[str, Any]) -> None:
    """Appends a benchmark's result to `results.jsonl` in `folder`."""
    mend_end(folder / RESULTS_FILE)
    append_lines(folder / RESULTS_FILE, [result])


def read_results(run_dir: str | Path) -> list[dict[str, Any]]:
    """The benchmark results of a run or model directory, from `<run_dir>/evaluation/results.jsonl`.

    Returns:
        One dict for each benchmark and settings, the last written, in the order of writing; empty where nothing was
        evaluated. Lines that a crash cut off, and whatever else is no result, are passed over.
    """
    path = Path(run_dir, "evaluation", RESULTS_FILE)
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            result = json.loads(line)
        except ValueError:
            continue
        if isinstance(result, dict) and {"benchmark", "settings"} <= result.keys():
            key = result["benchmark"], result["settings"]
            last.pop(key, None)
            last[key] = result
    return list(last.values())


def newest_results(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of results that a model card cannot tell apart, because only weights, seed or prompt differ, the last."""
    keys = ("dataset", "metric", *CARD_SETTINGS)
    return list({(result["benchmark"], *(result[key] for key in keys)): result for result in results}.values())


def results_table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each result; percent. Beside the paper's benchmarks, its GRPO / DC-GRPO figures.

    The paper's average, the mean of the six benchmarks' means, is added where all six are there. Its standard error
    takes the benchmarks as independent: √(Σ stderr²) / 6.
    """
    header = ["benchmark", "problems", "score, %", "truncated, %", "mean tokens"]
    rows = [[*_cells(result), *paper_figures(result["benchmark"])] for result in results]
    scored = {result["benchmark"]: result for result in results if result["stderr"] is not None}
    if set(BENCHMARKS) <= set(scored) and not any(result["limit"] for result in results):
        six = [scored[name] for name in BENCHMARKS]
        error = math.sqrt(sum(result["stderr"] ** 2 for result in six)) / len(six)
        average = statistics.fmean(result["mean"] for result in six)
        rows.append(["average of the six", "", score(average, error), "", "", *paper_figures("average")])
    if any(result["benchmark"] in BENCHMARKS for result in results):
        header += [f"GRPO / DC-GRPO, {name}" for name in PAPER_FIGURES]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line[: len(header)])} |" for line in lines)


def _cells(result: dict[str, Any]) -> list[str]:
    problems = f"first {result['problems']}" if result["limit"] else str(result["problems"])
    if result["unjudged_problems"]:
        problems += f" ({result['unjudged_problems']} without a usable gold answer left out)"
    return [
        f"{result['title']}, {result['metric']}",
        problems,
        score(result["mean"], result["stderr"]),
        f"{100 * result['truncated']:.1f}",
        f"{result['mean_tokens']:.0f}",
    ]


def score(mean: float | None, stderr: float | None) -> str:
    """Fractions as percent: "63.2 ± 6.1"."""
    if mean is None:
        return "none"
    return f"{100 * mean:.1f}" + ("" if stderr is None else f" ± {100 * stderr:.1f}")
