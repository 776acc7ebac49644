# SPDX-License-Identifier: Apache-2.0
"""Weights and rollouts of an earlier step, which TRL takes for current where the number of the step repeats.

The sampler has the trainer's own precision, so that the discrepancy is rounding unless its weights are old.
"""

from pathlib import Path
from typing import Any

from runs import PROMPTS, dc_trainer, logged, replayed_rollouts

CURRENT = 1e-6  # measured: 6e-8 with current weights, 0.05 to 0.9 with old ones


def float32_trainer(folder: Path, **options: Any) -> Any:
    return dc_trainer(folder, rollout_precision=None, discrepancy_tolerance=0.01, **options)


def evaluated(trainer: Any) -> float:
    return float(trainer.evaluate()["eval_dc/discrepancy/mean"])


def test_the_best_model_is_what_samples_after_it_was_loaded(tmp_path: Path) -> None:
    trainer = float32_trainer(
        tmp_path,
        eval_dataset=PROMPTS.select(range(8)),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="reward",
        greater_is_better=False,  # the first step's, far from the last one's
    )
    trainer.train()
    assert trainer.state.best_global_step < 4
    assert 0 < evaluated(trainer) < CURRENT


def test_a_second_run_samples_from_the_weights_that_the_first_one_left(tmp_path: Path) -> None:
    trainer = float32_trainer(tmp_path, max_steps=1)
    for _ in range(2):
        trainer.train()
        assert 0 < logged(trainer, "dc/discrepancy/mean")[0] < CURRENT


def test_a_resumed_run_samples_from_the_weights_of_the_checkpoint(tmp_path: Path) -> None:
    trainer = float32_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert 0 < max(logged(trainer, "dc/discrepancy/mean")) < CURRENT


def test_a_second_run_draws_its_own_rollouts(tmp_path: Path) -> None:
    # Two updates a rollout, and a first run that ends between them.
    rollout, steps = replayed_rollouts(), []

    def recorded(prompts: list[str], trainer: Any) -> dict[str, Any]:
        steps.append(trainer.state.global_step)
        return rollout(prompts, trainer)

    trainer = dc_trainer(
        tmp_path,
        rollout_func=recorded,
        discrepancy_tolerance=0.01,
        gradient_accumulation_steps=1,
        num_iterations=2,
        max_steps=1,
        log_tokens=True,
    )
    trainer.train()
    trainer.args.max_steps = 2
    trainer.train()
    assert steps == [0, 0]  # at the start of each
    assert len(logged(trainer, "dc/discrepancy/mean")) == 1  # of its own rollout alone
