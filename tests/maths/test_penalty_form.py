# SPDX-License-Identifier: Apache-2.0
"""Forms of the penalty that are ours, on numbers worked by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dc_trl.constraint import DiscrepancyConstraint, DiscrepancyTolerance
from dc_trl.dual import DualVariable
from dc_trl.estimators.penalty_form import PenaltyForm, check_penalty_form, to_go

D = torch.tensor([[0.4, 0.2, 0.6], [0.8, 0.0, 9.0]])
VALID = torch.tensor([[True, True, True], [True, True, False]])


def constraint(form: PenaltyForm | None = None, kind: str = "fixed", tolerance: float | None = 0.2) -> Any:
    return DiscrepancyConstraint(
        kind, DualVariable(0.5, 1.0, 10.0), DiscrepancyTolerance(tolerance, 1.0, 1), form=form
    )


def test_by_default_a_token_pays_for_its_discrepancy() -> None:
    expected = torch.tensor([[0.2, 0.1, 0.3], [0.4, 0.0, 0.0]])
    torch.testing.assert_close(constraint().penalty(D, VALID), expected)
    assert torch.equal(constraint().penalty(D, VALID), constraint(PenaltyForm()).penalty(D, VALID, torch.ones(2, 1)))


def test_what_is_to_go_is_summed_over_what_follows() -> None:
    # (0.4 + 0.2 + 0.6)/3, (0.2 + 0.6)/3, 0.6/3; the masked 9.0 counts nowhere, so T_2 is 2
    expected = torch.tensor([[1.2 / 3, 0.8 / 3, 0.6 / 3], [0.4, 0.0, 0.0]])
    torch.testing.assert_close(to_go(D, VALID), expected)
    penalty = constraint(PenaltyForm(horizon="to_go")).penalty(D, VALID)
    torch.testing.assert_close(penalty, 0.5 * expected)


@pytest.mark.parametrize("poison", [1e4, -1e4, math.nan, math.inf])
def test_masked_positions_change_nothing(poison: float) -> None:
    poisoned = D.clone()
    poisoned[1, 2] = poison
    form = PenaltyForm("relative", "to_go", 0.1)
    before, after = (constraint(form).penalty(d, VALID, torch.ones(2, 1)) for d in (D, poisoned))
    assert torch.equal(before, after)


def test_a_relative_cost_is_in_units_of_the_tolerance() -> None:
    relative = constraint(PenaltyForm(scale="relative"))
    torch.testing.assert_close(relative.penalty(D, VALID), constraint().penalty(D, VALID) / 0.2)
    assert relative.violation(0.5) == pytest.approx(0.5 / 0.2 - 1)
    assert constraint().violation(0.5) == pytest.approx(0.3)


def test_a_relative_threshold_lies_where_the_absolute_one_does() -> None:
    absolute, relative = (constraint(form, "threshold").penalty(D, VALID) for form in (None, PenaltyForm("relative")))
    assert torch.equal(absolute > 0, relative > 0)
    assert (absolute > 0).tolist() == [[True, False, True], [True, False, False]]  # 0.2 is not above 0.2


def test_a_relative_scale_moves_the_multiplier_by_the_relative_violation() -> None:
    relative = constraint(PenaltyForm(scale="relative"), "lagrangian")
    relative.update(0.5)
    assert relative.multiplier == pytest.approx(0.5 + 1.5)


def test_a_relative_scale_waits_for_the_tolerance_whatever_the_kind() -> None:
    waiting = constraint(PenaltyForm(scale="relative"), "fixed", tolerance=None)
    assert waiting.multiplier == 0.0 and not waiting.penalty(D, VALID).any()
    waiting.update(0.4)
    assert waiting.multiplier == 0.5
    torch.testing.assert_close(waiting.penalty(D, VALID)[0], 0.5 * D[0] / 0.4)


def test_a_relative_scale_of_engines_that_agree_is_an_error() -> None:
    with pytest.raises(ValueError, match="constraint_scale"):
        constraint(PenaltyForm(scale="relative"), tolerance=None).update(0.0)


def test_a_cap_is_a_share_of_the_advantage_in_the_mean() -> None:
    advantages = torch.tensor([[1.0], [-0.5]])  # mean |A| over the valid tokens: (3 · 1 + 2 · 0.5)/5 = 0.8
    capped = constraint(PenaltyForm(share_cap=0.1)).penalty(D, VALID, advantages)
    assert capped[VALID].mean() == pytest.approx(0.08)
    free = constraint().penalty(D, VALID)  # its mean is 0.2
    torch.testing.assert_close(capped, free * 0.4)
    loose = constraint(PenaltyForm(share_cap=0.5)).penalty(D, VALID, advantages)
    assert torch.equal(loose, free)


def test_a_capped_penalty_is_nothing_where_the_advantage_is() -> None:
    form = PenaltyForm(share_cap=0.1)
    assert not constraint(form).penalty(D, VALID, torch.zeros(2, 1)).any()
    assert not constraint(form).penalty(torch.zeros_like(D), VALID, torch.zeros(2, 1)).any()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"penalty_share_cap": 0.0}, "penalty_share_cap"),
        ({"penalty_share_cap": math.nan}, "penalty_share_cap"),
        ({"constraint_scale": "relative", "discrepancy_tolerance": 0.0}, "discrepancy_tolerance"),
        ({"penalty_horizon": "to_go", "discrepancy_level": "sequence"}, "discrepancy_level"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], name: str) -> None:
    sound = {
        "penalty_share_cap": None,
        "constraint_scale": "absolute",
        "discrepancy_tolerance": None,
        "penalty_horizon": "token",
        "discrepancy_level": "token",
    }
    check_penalty_form(SimpleNamespace(**sound))
    with pytest.raises(ValueError, match=f"`{name}` is "):
        check_penalty_form(SimpleNamespace(**(sound | options)))
