# SPDX-License-Identifier: Apache-2.0
"""One run: a regime, an arm and a seed in, one JSON object out."""

import platform
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import demo_quiet  # noqa: F401 (silences the imports below)
import torch
from datasets import Dataset
from demo_task import SumReward
from quickstart import evaluate, prompts_for
from transformers import AutoTokenizer, PrinterCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from dc_trl import DCGRPOConfig, DCGRPOTrainer
from papers import published
from papers.outcomes import curves, outcomes
from papers.penalty_forms import add_logit_diff
from papers.setups import Arm, Regime
from papers.stack import Stack
from papers.start import WARMUP_STEPS, held_out_problems, load_policy, training_problems, warm_start


def train(
    regime: Regime,
    arm: Arm,
    seed: int,
    starts: Path,
    warmup_steps: int = WARMUP_STEPS,
    stack: Stack | None = None,
) -> dict[str, Any]:
    """The finished run as it is written down: its name, its outcomes, its curves, and what it ran on.

    Args:
        regime, arm, seed: what the run is.
        starts: folder of the warmed-up policies.
        warmup_steps: of the warm-up, where it has not been done yet.
        stack: another model or engine than the demo's.
    """
    stack = stack or Stack()
    torch.set_num_threads(1 if stack.model is None else torch.get_num_threads())
    disable_progress_bar()
    options = stack.options(regime.options | arm.options_in(regime), regime.learning_rate)
    started = time.perf_counter()
    policy = _start(regime, seed, starts, warmup_steps, stack)
    warmed = time.perf_counter()
    if stack.takes_published(regime):
        log, evaluations = published.train(regime, arm, seed, policy, options)
    else:
        log, evaluations = _train(regime, arm, seed, policy, options, stack)
    return {
        "regime": regime.name,
        "arm": arm.name,
        "seed": seed,
        **({} if stack.model is None else {"model": stack.model, "engine": stack.engine}),
        "options": options,
        "outcomes": outcomes(log) | {name: round(value, 5) for name, value in evaluations.items()},
        "curves": curves(log),
        "seconds": round(time.perf_counter() - warmed, 1),
        "warm_up_seconds": round(warmed - started, 1),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}",
    }


def _start(regime: Regime, seed: int, starts: Path, warmup_steps: int, stack: Stack) -> str:
    """The policy that a run starts from, by name or folder."""
    if stack.takes_published(regime):
        return str(published.start(starts))
    return stack.model or str(warm_start(seed, starts, warmup_steps))


def _train(
    regime: Regime, arm: Arm, seed: int, policy: str, options: dict[str, Any], stack: Stack
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A run's log, and what it has of the held-out problems before and after."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(regime, arm, seed, policy, options | {"output_dir": scratch}, stack)
        problems = prompts(held_out_problems(seed)[: regime.held_out], trainer.processing_class, stack)
        before = evaluate(trainer, problems, seed)
        trainer.train()
        after = evaluate(trainer, problems, seed)
    ended = {f"held_out_{key}": value for key, value in after.items()}
    ended |= {f"held_out_{key}_before": value for key, value in before.items()}
    return trainer.state.log_history, ended


def build_trainer(
    regime: Regime, arm: Arm, seed: int, policy: str, options: dict[str, Any], stack: Stack
) -> DCGRPOTrainer:
    """The trainer of a run, as any user would build it from the library's public options."""
    set_seed(seed)
    add_logit_diff()
    config = DCGRPOConfig(seed=seed, **options)
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    given = training_problems(seed, arm.problems_in(regime))
    problems = Dataset.from_list(prompts(given, tokenizer, stack))
    kind = arm.trainer or DCGRPOTrainer
    model = load_policy(policy, regime.grid)
    trainer = kind(model, SumReward(workers=1), config, problems, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def prompts(problems: list[dict[str, str]], tokenizer: Any, stack: Stack) -> list[dict[str, Any]]:
    """The problems as the stack's model needs them."""
    return prompts_for(problems, pretrained=stack.model is not None, chat=tokenizer.chat_template is not None)
