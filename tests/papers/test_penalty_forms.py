# SPDX-License-Identifier: Apache-2.0
"""The forms of the penalty that the study tests, on numbers worked by hand."""

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from runs import PROMPTS, count_digits, settings
from tiny import tiny_model, tiny_tokenizer

from dc_trl import DCGRPOConfig
from dc_trl.constraint import DiscrepancyConstraint, DiscrepancyTolerance
from dc_trl.discrepancy import LOG_RATIO_BOUND, METRICS, token_discrepancy
from dc_trl.dual import DualVariable
from dc_trl.step import Step

D = torch.tensor([[0.4, 0.2, 0.6], [0.8, 0.0, 9.0]])
VALID = torch.tensor([[True, True, True], [True, True, False]])


def form(**options: Any) -> Any:
    from papers.penalty_forms import PenaltyForm

    return PenaltyForm(**options)


def constraint(form: Any = None, kind: str = "fixed", tolerance: float | None = 0.2) -> Any:
    own = DiscrepancyConstraint(kind, DualVariable(0.5, 1.0, 10.0), DiscrepancyTolerance(tolerance, 1.0, 1))
    if form is None:
        return own
    from papers.penalty_forms import FormConstraint

    return FormConstraint(own, form)


def test_by_default_a_token_pays_for_its_discrepancy() -> None:
    expected = torch.tensor([[0.2, 0.1, 0.3], [0.4, 0.0, 0.0]])
    torch.testing.assert_close(constraint().penalty(D, VALID), expected)
    assert torch.equal(constraint().penalty(D, VALID), constraint(form()).penalty(D, VALID, torch.ones(2, 1)))


def test_what_is_to_go_is_summed_over_what_follows() -> None:
    # (0.4 + 0.2 + 0.6)/3, (0.2 + 0.6)/3, 0.6/3; the masked 9.0 counts nowhere, so T_2 is 2
    expected = torch.tensor([[1.2 / 3, 0.8 / 3, 0.6 / 3], [0.4, 0.0, 0.0]])
    from papers.penalty_forms import to_go

    torch.testing.assert_close(to_go(D, VALID), expected)
    penalty = constraint(form(to_go=True)).penalty(D, VALID)
    torch.testing.assert_close(penalty, 0.5 * expected)


def test_a_group_costs_at_each_position_what_all_its_completions_do_in_the_mean() -> None:
    from papers.penalty_forms import group_mean

    d = torch.cat([D, D + 1])
    valid = torch.cat([VALID, VALID])
    first = torch.tensor([(0.4 + 0.8) / 2, 0.2 / 2, 0.6 / 2])  # the masked 9.0 is 0, and its completion counts
    second = torch.tensor([(1.4 + 1.8) / 2, (1.2 + 1.0) / 2, 1.6 / 2])
    torch.testing.assert_close(group_mean(d, valid, 2), torch.stack([first, first, second, second]))


def centred_trainer(output_dir: Path, to_go: bool, **options: Any) -> Any:
    from papers.penalty_forms import FormTrainer

    options |= {"rollout_backend": "transformers", "rollout_precision": "int4", "max_steps": 4}
    options |= {"constraint": "fixed", "multiplier_init": 0.5}
    return FormTrainer(
        tiny_model(),
        count_digits,
        DCGRPOConfig(**settings(output_dir, **options)),
        PROMPTS,
        processing_class=tiny_tokenizer(),
        form=form(to_go=to_go, group=True),
    )


def test_one_update_a_rollout_has_nothing_to_centre_by(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="raise `steps_per_generation`"):
        centred_trainer(tmp_path, to_go=False).train()


@pytest.mark.parametrize("to_go", [False, True])
def test_a_groups_penalties_cancel_however_it_is_dealt_out_over_the_updates(to_go: bool, tmp_path: Path) -> None:
    trainer = centred_trainer(tmp_path, to_go, steps_per_generation=4)
    sums: dict[tuple[int, ...], torch.Tensor] = {}
    sizes: list[float] = []

    def observe(inputs: dict[str, Any], step: Step) -> None:
        charged = torch.where(step.masks.valid, step.penalty, -0.5 * inputs["cost_baseline"])
        for prompt, row in zip(inputs["prompt_ids"].tolist(), charged, strict=True):
            sums[tuple(prompt)] = sums.get(tuple(prompt), 0.0) + row
        sizes.append(step.penalty.abs().mean().item())

    trainer.step_observers.append(observe)
    trainer.train()
    assert len(sizes) == 4 and min(sizes) > 1e-4 and len(sums) == 8  # 4 updates on 32 completions, 4 of each problem
    for row in sums.values():
        torch.testing.assert_close(row, torch.zeros_like(row), atol=1e-6, rtol=0)


@pytest.mark.parametrize("poison", [1e4, -1e4, math.nan, math.inf])
def test_masked_positions_change_nothing(poison: float) -> None:
    poisoned = D.clone()
    poisoned[1, 2] = poison
    own = form(relative=True, to_go=True, share_cap=0.1)
    before, after = (constraint(own).penalty(d, VALID, torch.ones(2, 1)) for d in (D, poisoned))
    assert torch.equal(before, after)


def test_a_relative_cost_is_in_units_of_the_tolerance() -> None:
    relative = constraint(form(relative=True))
    torch.testing.assert_close(relative.penalty(D, VALID), constraint().penalty(D, VALID) / 0.2)
    assert relative.violation(0.5) == pytest.approx(0.5 / 0.2 - 1)
    assert constraint().violation(0.5) == pytest.approx(0.3)


def test_a_relative_threshold_lies_where_the_absolute_one_does() -> None:
    absolute, relative = (constraint(one, "threshold").penalty(D, VALID) for one in (None, form(relative=True)))
    assert torch.equal(absolute > 0, relative > 0)
    assert (absolute > 0).tolist() == [[True, False, True], [True, False, False]]  # 0.2 is not above 0.2


def test_a_relative_scale_moves_the_multiplier_by_the_relative_violation() -> None:
    relative = constraint(form(relative=True), "lagrangian")
    relative.update(0.5)
    assert relative.multiplier == pytest.approx(0.5 + 1.5)


def test_a_relative_scale_waits_for_the_tolerance() -> None:
    waiting = constraint(form(relative=True), "lagrangian", tolerance=None)
    assert waiting.multiplier == 0.0 and not waiting.penalty(D, VALID).any()
    assert math.isnan(waiting.violation(0.4))
    waiting.update(0.4)
    assert waiting.multiplier == 0.5
    torch.testing.assert_close(waiting.penalty(D, VALID)[0], 0.5 * D[0] / 0.4)


def test_a_cap_is_a_share_of_the_advantage_in_the_mean() -> None:
    advantages = torch.tensor([[1.0], [-0.5]])  # mean |A| over the valid tokens: (3 · 1 + 2 · 0.5)/5 = 0.8
    capped = constraint(form(share_cap=0.1)).penalty(D, VALID, advantages)
    assert capped[VALID].mean() == pytest.approx(0.08)
    free = constraint().penalty(D, VALID)  # its mean is 0.2
    torch.testing.assert_close(capped, free * 0.4)
    loose = constraint(form(share_cap=0.5)).penalty(D, VALID, advantages)
    assert torch.equal(loose, free)


def test_a_capped_penalty_is_nothing_where_the_advantage_is() -> None:
    own = form(share_cap=0.1)
    assert not constraint(own).penalty(D, VALID, torch.zeros(2, 1)).any()
    assert not constraint(own).penalty(torch.zeros_like(D), VALID, torch.zeros(2, 1)).any()


def test_the_logit_difference_by_hand_and_of_a_certain_token() -> None:
    from papers.penalty_forms import add_logit_diff

    with patch.dict(METRICS):
        add_logit_diff()
        # the odds are 1 to 2/3, 1/4 to 1/3, equal, 1/9 to 1/4
        train, sampling = torch.tensor([0.5, 0.2, 0.3, 0.1]).log(), torch.tensor([0.4, 0.25, 0.3, 0.2]).log()
        expected = torch.tensor([1.5, 4 / 3, 1.0, 9 / 4]).log()
        torch.testing.assert_close(token_discrepancy(train, sampling, "logit_diff"), expected)
        certain = torch.tensor([0.0, 1e-4, -1e-9]), torch.tensor([-1e-9, 0.0, -0.5])
        result = token_discrepancy(*certain, "logit_diff")
        assert result.isfinite().all() and result[0] == result[1] == 0  # no float32 lies between
        assert 15 < result[2] <= LOG_RATIO_BOUND
