# SPDX-License-Identifier: Apache-2.0
"""The results of benchmarks as a table, beside the figures of the paper."""

import math
import statistics
from typing import Any

from dc_trl.commands.evaluate.benchmarks import AVERAGE, PAPER_BENCHMARKS, PAPER_FIGURES, paper_figures
from dc_trl.records.results import score
from dc_trl.records.text import markdown


def results_table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each result; percent. Beside the paper's benchmarks, its GRPO / DC-GRPO figures.

    The paper's average, the mean of the six benchmarks' means, is added where all six are there. Its standard error
    takes the benchmarks as independent: √(Σ stderr²) / 6.
    """
    header = ["benchmark", "problems", "score, %", "truncated, %", "mean tokens"]
    rows = [[*_cells(result), *paper_figures(result["benchmark"])] for result in results]
    scored = {result["benchmark"]: result for result in results if result["stderr"] is not None}
    if set(PAPER_BENCHMARKS) <= set(scored) and not any(result["limit"] for result in results):
        six = [scored[name] for name in PAPER_BENCHMARKS]
        error = math.sqrt(sum(result["stderr"] ** 2 for result in six)) / len(six)
        average = statistics.fmean(result["mean"] for result in six)
        rows.append(["average of the six", "", score(average, error), "", "", *paper_figures(AVERAGE)])
    if any(result["benchmark"] in PAPER_BENCHMARKS for result in results):
        header += [f"GRPO / DC-GRPO, {name}" for name in PAPER_FIGURES]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line[: len(header)])} |" for line in lines)


def _cells(result: dict[str, Any]) -> list[str]:
    problems = f"first {result['problems']}" if result["limit"] else str(result["problems"])
    if result["unjudged_problems"]:
        problems += f" ({result['unjudged_problems']} without a usable gold answer left out)"
    return [
        markdown(f"{result['title']}, {result['metric']}"),
        problems,
        score(result["mean"], result["stderr"]),
        f"{100 * result['truncated']:.1f}",
        f"{result['mean_tokens']:.0f}",
    ]
