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
    """One problem: its prompt as messages or as plain text, and the gold answer."""

    index: int
    prompt: list[dict[str, str]] | str
    gold: str

    @cached_property
    def hash(self) -> str:
        """Short hash of prompt and gold answer: a sample counts for this very problem and no other."""
        return short_hash([self.prompt, self.gold])


# Samples: the paper's section 6.1 has two numbers, which its text version drops; 32 and 4 are the project's protocol.
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="aime24",
            title="AIME24",
            dataset="HuggingFaceH4/aime_2024",
            samples=32,
            split="train",
            problem_column="problem",
            answer_column="answer",
            problems=30,
        ),
        Benchmark(
            name="aime25",
            title="AIME25",
            dataset="math-ai/aime25",
            samples=32,
            problem_column="problem",
            answer_column="answer",
            problems=30,
        ),
        Benchmark(
            name="amc23",
            title="AMC23",
            dataset="math-ai/amc23",
            samples=32,
            problem_column="question",
            answer_column="answer",
            problems=40,
        ),
        Benchmark(
            name="math500",
            title="MATH-500",
            dataset="HuggingFaceH4/MATH-500",
            samples=4,
            problem_column="problem",
            answer_column="answer",
            problems=500,
        ),
        Benchmark(
            name="minerva",
            title="Minerva",
            dataset="math-ai/minervamath",
            samples=4,
            problem_column="question",
            answer_column="answer",
            problems=272,
        ),
        Benchmark(
            name="olympiadbench",
            title="OlympiadBench",
            dataset="math-ai/olympiadbench",
            samples=4,
            problem_column="question",
            answer_column="final_answer",
            problems=674,
        ),
    )
}

AVERAGE = "average"

# arXiv 2606.08779, tables 1 (BF16) and 2 (FP8 deployment): percent, (GRPO, DC-GRPO), by the name of the benchmark, and
# the paper's average of the six.
PAPER_FIGURES: dict[str, dict[str, tuple[float, float]]] = {
    "Qwen3-8B BF16, table 1": {
        "aime24": (58.8, 63.2),
        "aime25": (40.0, 52.5),
        "amc23": (90.4, 91.8),
        "math500": (93.7, 94.2),
        "minerva": (51.0, 50.1),
        "olympiadbench": (70.1, 74.4),
        AVERAGE: (67.3, 71.0),
    },
    "Qwen3-30B-A3B BF16, table 1": {
        "aime24": (60.2, 66.8),
        "aime25": (43.6, 49.1),
        "amc23": (91.4, 91.9),
        "math500": (95.5, 95.8),
        "minerva": (52.0, 52.9),
        "olympiadbench": (71.3, 74.5),
        AVERAGE: (69.0, 71.8),
    },
    "Qwen3-8B FP8, table 2": {
        "aime24": (53.2, 55.0),
        "aime25": (35.2, 44.1),
        "amc23": (89.5, 90.2),
        "math500": (92.9, 94.4),
        "minerva": (50.0, 54.0),
        "olympiadbench": (67.4, 70.9),
        AVERAGE: (64.7, 68.1),
    },
    "Qwen3-30B-A3B FP8, table 2": {
        "aime24": (52.4, 56.6),
        "aime25": (37.5, 41.2),
        "amc23": (87.3, 91.8),
        "math500": (93.8, 94.0),
        "minerva": (49.6, 50.5),
        "olympiadbench": (70.5, 72.0),
        AVERAGE: (65.2, 67.7),
    },
}

# The benchmarks that the paper's average is of.
PAPER_BENCHMARKS = tuple(name for name in next(iter(PAPER_FIGURES.values())) if name != AVERAGE)


def paper_figures(name: str) -> list[str]:
    """The paper's "GRPO / DC-GRPO" for a benchmark or for `AVERAGE`, one cell a column of `PAPER_FIGURES`.

    A cell is "" where the paper has no figure: for a benchmark that it did not run, in every column.
    """
    pairs = [column.get(name) for column in PAPER_FIGURES.values()]
    return ["" if pair is None else f"{pair[0]:.1f} / {pair[1]:.1f}" for pair in pairs]


def load_problems(
    benchmark: Benchmark, prompt_template: str, limit: int | None = None, plain: bool = False
) -> list[Problem]:
    """Loads a benchmark's problems, the first `limit` of them, with prompts as messages, or as `plain` text.

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
        plain=plain,
    )
    rows = dataset.select(range(min(limit or len(dataset), len(dataset))))
    return [Problem(index, row["prompt"], row["solution"]) for index, row in enumerate(rows)]


def short_hash(value: Any) -> str:
    """Ten hexadecimal digits that stand for a value made of JSON's types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]
