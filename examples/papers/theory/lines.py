# SPDX-License-Identifier: Apache-2.0
"""The results of the calculations as lines; half a minute on one core."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dc_trl.records.json_lines import append_lines
from papers.theory import chain, entropy, toy
from papers.theory.optima import MODELS, maximise, objective, optimum

STATES = 10
STRENGTHS = (0.5, 2.0, 8.0)


def optima_lines(states: int = STATES, seed: int = 0) -> list[dict[str, Any]]:
    """For each model and λ: the theorem's policies against those that ascent finds.

    `solved` counts the states in which the theorem has a policy; over these, `distance` is the largest total variation
    and `shortfall` the most by which the ascent's objective is higher. `interior` counts those where no action was set
    to 0. Of the others, `beyond` counts those whose optimum has an action above e·μ.
    """
    generator = torch.Generator().manual_seed(seed)
    problems = [
        (
            torch.randn(8, generator=generator, dtype=torch.float64),
            torch.randn(8, generator=generator, dtype=torch.float64).softmax(-1),
        )
        for _ in range(states)
    ]
    return [_optima_line(model, strength, problems) for model in MODELS for strength in STRENGTHS]


def _optima_line(model: str, strength: float, problems: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    distances, shortfalls, interior, beyond = [], [], 0, 0
    for advantage, reference in problems:
        best = optimum(advantage, reference, strength, model)
        found = maximise(advantage, reference, strength, model)
        if best is None:
            beyond += bool((found / reference).max() > math.e)
            continue
        interior += bool((best > 0).all())
        distances.append(float((best - found).abs().sum()) / 2)
        values = [float(objective(policy, advantage, reference, strength, model)) for policy in (found, best)]
        shortfalls.append(values[0] - values[1])
    return {
        "calculation": "optima",
        "model": model,
        "strength": strength,
        "states": len(problems),
        "solved": len(distances),
        "interior": interior,
        "beyond": beyond,
        "distance": float(f"{max(distances, default=0.0):.2g}"),
        "shortfall": float(f"{max(0.0, *shortfalls):.1g}"),
    }


def write_lines(results: Path) -> None:
    """Writes `theory.jsonl` anew; the same numbers each time."""
    torch.set_num_threads(1)
    path = results / "theory.jsonl"
    found = [*optima_lines(), *toy.lines(), *entropy.lines(), *chain.lines()]
    path.unlink(missing_ok=True)
    append_lines(path, found)
    print(f"{len(found)} lines in {path}")
