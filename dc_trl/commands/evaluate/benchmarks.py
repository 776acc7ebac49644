# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the DC-GRPO paper: where they lie on the Hub, how many samples, what the paper measured.

How each row was confirmed, and which Hub copies the paper may have used instead, is in docs/evaluation.md.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """A set of problems and how it is scored.

    Attributes:
        name: as on the command line.
        title: as in tables.
        dataset: Hub dataset, or a local file or directory.
        samples: completions a problem, the n of avg@n.
        split: of the dataset.
        config: of a Hub dataset.
        problem_column: None: the first known name.
        answer_column: likewise.
        problems: how many there are; 0: unknown.
    """

    name: str
    title: str
    dataset: str
    samples: int
    split: str = "test"
    config: str | None = None
    problem_column: str | None = None
    answer_column: str | None = None
    problems: int = 0


@dataclass(frozen=True)
class Problem:
    """One problem: its prompt as messages, and the gold answer."""

    index: int
    prompt: list[dict[str, str]]
    gold: str

    @cached_property
    def hash(self) -> str:
        """Short hash of prompt and gold answer: a sample counts for this very problem and no other."""
        return short_hash([self.prompt, self.gold])


# Samples: the paper's section 6.1 has two numbers, which its text version drops; 32 and 4 are the project's protocol.
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("aime24", "AIME24", "HuggingFaceH4/aime_2024", 32, "train", None, "problem", "answer", 30),
        Benchmark("aime25", "AIME25", "math-ai/aime25", 32, "test", None, "problem", "answer", 30),
        Benchmark("amc23", "AMC23", "math-ai/amc23", 32, "test", None, "question", "answer", 40),
        Benchmark("math500", "MATH-500", "HuggingFaceH4/MATH-500", 4, "test", None, "problem", "answer", 500),
        Benchmark("minerva", "Minerva", "math-ai/minervamath", 4, "test", None, "question", "answer", 272),
        Benchmark(
            "olympiadbench", "OlympiadBench", "math-ai/olympiadbench", 4, "test", None, "question", "final_answer", 674
        ),
    )
}

# arXiv 2606.08779, tables 1 (BF16) and 2 (FP8 deployment): percent, (GRPO, DC-GRPO), in the order of `BENCHMARKS`,
# then the paper's average.
PAPER_FIGURES: dict[str, tuple[tuple[float, float], ...]] = {
    "Qwen3-8B BF16, table 1": (
        *((58.8, 63.2), (40.0, 52.5), (90.4, 91.8), (93.7, 94.2), (51.0, 50.1), (70.1, 74.4)),
        (67.3, 71.0),
    ),
    "Qwen3-30B-A3B BF16, table 1": (
        *((60.2, 66.8), (43.6, 49.1), (91.4, 91.9), (95.5, 95.8), (52.0, 52.9), (71.3, 74.5)),
        (69.0, 71.8),
    ),
    "Qwen3-8B FP8, table 2": (
        *((53.2, 55.0), (35.2, 44.1), (89.5, 90.2), (92.9, 94.4), (50.0, 54.0), (67.4, 70.9)),
        (64.7, 68.1),
    ),
    "Qwen3-30B-A3B FP8, table 2": (
        *((52.4, 56.6), (37.5, 41.2), (87.3, 91.8), (93.8, 94.0), (49.6, 50.5), (70.5, 72.0)),
        (65.2, 67.7),
    ),
}


def paper_figures(name: str) -> list[str]:
    """The paper's "GRPO / DC-GRPO" for a benchmark or for "average", one cell a column of `PAPER_FIGURES`."""
    places = [*BENCHMARKS, "average"]
    if name not in places:
        return ["" for _ in PAPER_FIGURES]
    pairs = [column[places.index(name)] for column in PAPER_FIGURES.values()]
    return [f"{grpo:.1f} / {dc:.1f}" for grpo, dc in pairs]


def load_problems(benchmark: Benchmark, prompt_template: str, limit: int | None = None) -> list[Problem]:
    """Loads a benchmark's problems, the first `limit` of them.

    Raises:
        DatasetError: for a missing file, column or answer, or no network, with the way out.
    """
    from dc_trl.tasks.data import load_math_dataset

    dataset = load_math_dataset(
        benchmark.dataset,
        config=benchmark.config,
        split=benchmark.split,
        problem_column=benchmark.problem_column,
        answer_column=benchmark.answer_column,
        prompt_template=prompt_template,
    )
    rows = dataset.select(range(min(limit or len(dataset), len(dataset))))
    return [Problem(index, row["prompt"], row["solution"]) for index, row in enumerate(rows)]


def short_hash(value: Any) -> str:
    """Ten hexadecimal digits that stand for a value made of JSON's types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]
