# SPDX-License-Identifier: Apache-2.0
"""The results of the calculations as lines; a minute or two on one core."""

from pathlib import Path
from typing import Any

import torch

from dc_trl.records.json_lines import append_lines
from papers.theory import chain, entropy, toy
from papers.theory.optima import MODELS, maximise, optimum

STATES = 20
STRENGTHS = (0.5, 2.0, 8.0)


def optima_lines(states: int = STATES, seed: int = 0) -> list[dict[str, Any]]:
    """For each model and λ: how far the theorem's policy is from what ascent finds, in total variation.

    `stationary` counts the states in which the model has the theorem's solution at all, and `distance` is the largest
    distance among those; `interior` counts those where no action was set to 0.
    """
    generator = torch.Generator().manual_seed(seed)
    problems = [
        (
            torch.randn(8, generator=generator, dtype=torch.float64),
            torch.randn(8, generator=generator, dtype=torch.float64).softmax(-1),
        )
        for _ in range(states)
    ]
    found = []
    for model in MODELS:
        for strength in STRENGTHS:
            distances, interior = [], 0
            for advantage, reference in problems:
                best = optimum(advantage, reference, strength, model)
                if best is None:
                    continue
                interior += bool((best > 0).all())
                distances.append(float((best - maximise(advantage, reference, strength, model)).abs().sum()) / 2)
            found.append(
                {
                    "calculation": "optima",
                    "model": model,
                    "strength": strength,
                    "states": states,
                    "stationary": len(distances),
                    "interior": interior,
                    "distance": float(f"{max(distances, default=0.0):.2g}"),
                }
            )
    return found


def write_lines(results: Path) -> None:
    """Writes `theory.jsonl` anew; the same numbers each time."""
    torch.set_num_threads(1)
    path = results / "theory.jsonl"
    found = [*optima_lines(), *toy.lines(), *entropy.lines(), *chain.lines()]
    path.unlink(missing_ok=True)
    append_lines(path, found)
    print(f"{len(found)} lines in {path}")
