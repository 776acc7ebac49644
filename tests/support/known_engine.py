# SPDX-License-Identifier: Apache-2.0
"""`dc-trl evaluate` with an engine whose answers are known: what tests/commands/evaluate/ share."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dc_trl.commands.cli import main
from dc_trl.commands.evaluate.benchmarks import Benchmark, load_problems
from dc_trl.commands.evaluate.engines import Completion, Request
from dc_trl.commands.evaluate.sampling import planned_draws
from dc_trl.tasks.data import BOXED_TEMPLATE

# Which samples of which problem are right: means 1, 1/2 and 0, so the mean is 1/2, their standard deviation
# √((1/4 + 0 + 1/4) / 2) = 1/2, and the standard error (1/2) / √3.
RIGHT = {(0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (1, 2)}
STDERR = 0.5 / math.sqrt(3)
SUMS = [
    {"problem": "2 + 2 = ?", "answer": 4},
    {"problem": "1/3 + 1/6 = ?", "answer": "\\frac{1}{2}"},
    {"problem": "10^3 = ?", "answer": "1000"},
]


class KnownEngine:
    """Answers the samples in `right` rightly and cuts those in `cut`; counts requests; fails after `survives`."""

    name, precision, batch_size = "known", "exact", None

    def __init__(self, right: set[tuple[int, int]] = RIGHT, cut: set[tuple[int, int]] | None = None) -> None:
        self.right, self.cut, self.context = right, cut or set(), 512
        self.options: dict[str, Any] = {}
        self.seen: list[int] = []
        self.survives = 10**9
        self.script: dict[int, Completion] = {}

    def learn(self, benchmark: Benchmark, seed: int = 0, samples: int = 32, plain: bool = False) -> None:
        """Prepares the answers to a benchmark's problems, by seed."""
        for draw in planned_draws(load_problems(benchmark, BOXED_TEMPLATE, plain=plain), samples, seed):
            place = (draw.problem.index, draw.sample)
            text = f"I think it is \\boxed{{{draw.problem.gold if place in self.right else -1}}}."
            self.script[draw.seed] = Completion(text, 10 + draw.sample, place in self.cut)

    def complete(self, requests: list[Request], max_tokens: int) -> Iterator[tuple[int, Completion]]:
        self.max_tokens = max_tokens
        self.prompts = [request.prompt for request in requests]
        for index in reversed(range(len(requests))):  # any order will do
            if len(self.seen) == self.survives:
                raise ConnectionError("the machine is gone")
            self.seen.append(requests[index].seed)
            yield index, self.script[requests[index].seed]


def evaluate(*flags: str, model: str = "policy", data: str = "sums.jsonl") -> int:
    return main(["evaluate", "--model_name_or_path", model, "--dataset", data, *flags])


def sample_files(folder: Path = Path("policy/evaluation")) -> list[Path]:
    return sorted((folder / "samples").glob("*.jsonl"))
