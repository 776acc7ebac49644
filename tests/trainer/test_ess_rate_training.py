# SPDX-License-Identifier: Apache-2.0
"""`ess_rate` of the configuration: each update's learning rate is scaled by the ESS of its own rollouts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import dc_trainer, logged, replayed_rollouts, weights

from dc_trl.estimators.ess_rate import ess_rate_scale
from dc_trl.length_decay import length_decay_scale
from dc_trl.training.length_decay_callback import LengthDecayCallback

RATE = 1e-2


def used_rates(trainer: Any) -> list[float]:
    """The rate at which each update was made, as the optimizer had it."""
    rates: list[float] = []
    step = trainer.create_optimizer

    def create(*args: Any) -> Any:
        optimizer = step(*args)
        optimizer.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
        return optimizer

    trainer.create_optimizer = create
    trainer.train()
    return rates


def test_each_update_takes_the_ess_of_its_own_batch(tmp_path: Path) -> None:
    trainer = dc_trainer(tmp_path, ess_rate=True, ess_rate_reference=0.9, lr_scheduler_type="linear", max_steps=4)
    rates = used_rates(trainer)
    scales = [ess_rate_scale(ess, 0.9) for ess in logged(trainer, "dc/ess")]
    assert rates == pytest.approx([RATE * (1 - i / 4) * scale for i, scale in enumerate(scales)], rel=1e-6)
    assert rates == pytest.approx(logged(trainer, "learning_rate"))
    assert logged(trainer, "ess_rate/lr_scale") == pytest.approx(scales)
    assert len(set(scales)) > 1 and max(scales) < 1


def test_a_batch_that_serves_two_updates_scales_from_its_end_on(tmp_path: Path) -> None:
    layout = {"gradient_accumulation_steps": 1, "steps_per_generation": 1, "num_iterations": 2}
    trainer = dc_trainer(tmp_path, ess_rate=True, max_steps=6, logging_steps=1, **layout)
    rates = used_rates(trainer)
    first, second, third = (ess_rate_scale(ess) for ess in logged(trainer, "dc/ess"))
    assert rates == pytest.approx([RATE * x for x in (1.0, first, first, second, second, third)], rel=1e-6)


def test_a_mean_over_the_logging_window_is_not_observed(tmp_path: Path) -> None:
    layout = {"gradient_accumulation_steps": 1, "steps_per_generation": 1, "num_iterations": 2}
    seldom = used_rates(dc_trainer(tmp_path, ess_rate=True, max_steps=7, logging_steps=5, **layout))
    assert seldom == used_rates(dc_trainer(tmp_path, ess_rate=True, max_steps=7, logging_steps=1, **layout))


def test_it_multiplies_with_length_decay_and_both_resume_to_the_bit(tmp_path: Path) -> None:
    options = {"ess_rate": True, "length_decay": True, "length_decay_period": 2, "max_steps": 5}
    options |= {"save_strategy": "steps", "save_steps": 3}
    whole = dc_trainer(tmp_path / "run", **options)
    rates = used_rates(whole)
    scales = [ess_rate_scale(ess) for ess in logged(whole, "dc/ess")]
    expected = [RATE * scale * length_decay_scale(step, 2) for step, scale in enumerate(scales, start=1)]
    assert rates == pytest.approx(expected, rel=1e-6)
    resumed = dc_trainer(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert torch.equal(weights(resumed), weights(whole))
    for key in ("learning_rate", "ess_rate/lr_scale", "dc/ess", "length_decay/lr_scale"):
        assert logged(resumed, key) == logged(whole, key)


def test_off_adds_nothing(tmp_path: Path) -> None:
    trainer = dc_trainer(tmp_path, max_steps=2)
    trainer.train()
    assert trainer._ess_rate is None and logged(trainer, "learning_rate") == [RATE, RATE]
    assert not any(key.startswith("ess_rate") for entry in trainer.state.log_history for key in entry)


def test_a_batch_that_measures_nothing_keeps_the_rate(tmp_path: Path) -> None:
    def unscored(logprobs: list[list[Any]]) -> None:
        for row in logprobs:
            row[:] = [None] * len(row)

    trainer = dc_trainer(tmp_path, ess_rate=True, rollout_func=replayed_rollouts(edit=unscored), max_steps=2)
    assert used_rates(trainer) == [RATE, RATE]


@pytest.mark.parametrize("name", ["ess_rate_reference", "ess_rate_min_scale"])
def test_bad_settings_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is 1.5.*fraction"):
        dc_trainer(tmp_path, **{name: 1.5})


def test_length_decay_alone_is_found_by_its_kind(tmp_path: Path) -> None:
    trainer = dc_trainer(tmp_path, length_decay=True, length_decay_period=2, ess_rate=True)
    assert isinstance(trainer._length_decay, LengthDecayCallback) and trainer._ess_rate is not trainer._length_decay
