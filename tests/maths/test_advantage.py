# SPDX-License-Identifier: Apache-2.0
"""Penalised and leave-one-out advantages, and the importance ratio, against numbers worked by hand."""

from typing import Any

import pytest
import torch

from dc_trl.constraint import discrepancy_penalty, penalised_advantages
from dc_trl.discrepancy import DISCREPANCY_METRICS, token_discrepancy, valid_tokens
from dc_trl.estimators.advantage import rloo_advantages, zero_variance_groups
from dc_trl.estimators.importance import importance_sampling_ratio

D = torch.tensor([[0.01, 0.03], [0.02, 0.0]])
VALID = torch.tensor([[True, True], [True, False]])


def penalty(**options: Any) -> torch.Tensor:
    return discrepancy_penalty(D, VALID, **({"multiplier": 0.5, "tolerance": 0.015} | options))


def test_penalties_by_hand() -> None:
    assert (penalty(constraint="none") == 0).all()
    torch.testing.assert_close(penalty(constraint="fixed"), torch.tensor([[0.005, 0.015], [0.01, 0.0]]))
    torch.testing.assert_close(penalty(constraint="lagrangian"), penalty(constraint="fixed"))
    torch.testing.assert_close(penalty(constraint="threshold"), torch.tensor([[0.0, 0.015], [0.01, 0.0]]))


def test_sequence_level_uses_the_mean_of_valid_tokens() -> None:
    torch.testing.assert_close(
        penalty(constraint="fixed", level="sequence"), torch.tensor([[0.01, 0.01], [0.01, 0.0]])
    )


def test_calibrating_applies_fixed_only() -> None:
    assert penalty(constraint="fixed", tolerance=None).sum() > 0
    for constraint in ("threshold", "lagrangian"):
        assert (penalty(constraint=constraint, tolerance=None) == 0).all()


@pytest.mark.parametrize("options", [{"constraint": "soft"}, {"constraint": "fixed", "level": "word"}])
def test_unknown_choices_are_named(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="soft|word"):
        penalty(**options)


def test_penalty_is_detached() -> None:
    d = D.clone().requires_grad_()
    assert not discrepancy_penalty(d, VALID, constraint="fixed", multiplier=1.0, tolerance=None).requires_grad


@pytest.mark.parametrize("advantages", [torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 1.0], [-1.0, -1.0]])])
def test_both_signs_are_lowered(advantages: torch.Tensor) -> None:
    result = penalised_advantages(advantages, penalty(constraint="fixed"))
    torch.testing.assert_close(result, torch.tensor([[0.995, 0.985], [-1.01, -1.0]]))


def test_rloo_by_hand() -> None:
    # Group 1: 1 − (0+2)/2 = 0, 0 − 1.5, 2 − 0.5. Group 2: the NaN has no reward, the others compare with each other.
    rewards = torch.tensor([1.0, 0.0, 2.0, 1.0, torch.nan, 0.5])
    torch.testing.assert_close(rloo_advantages(rewards, 3), torch.tensor([0.0, -1.5, 1.5, 0.5, 0.0, -0.5]))


def test_rloo_without_others_is_zero() -> None:
    assert (rloo_advantages(torch.tensor([3.0, torch.nan]), 2) == 0).all()


def test_zero_variance_groups() -> None:
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, torch.nan, torch.nan, torch.nan, 2.0])
    expected = torch.tensor([True, True, False, False, True, True, True, True])
    assert torch.equal(zero_variance_groups(rewards, 2), expected)


def test_differences_within_the_tolerance_are_none() -> None:
    advantages = torch.tensor([0.1, 0.1001, 0.1, 0.2, torch.nan, 0.3, torch.inf, torch.inf])
    expected = torch.tensor([True, True, False, False, True, True, True, True])
    assert torch.equal(zero_variance_groups(advantages, 2, tolerance=1e-3), expected)


TRAIN = torch.tensor([[0.9, 0.1], [0.3, 0.5]]).log()
SAMPLING = torch.tensor([[0.3, 0.2], [0.3, 0.5]]).log()  # ratios 3, 0.5 | 1, 1; sequence ratios 1.5, 1


@pytest.mark.parametrize(
    ("mode", "expected", "kept"),
    [
        ("token_truncate", [[2.0, 0.5], [1.0, 1.0]], [[True, True], [True, True]]),
        ("token_mask", [[0.0, 0.5], [1.0, 1.0]], [[False, True], [True, True]]),
        ("sequence_truncate", [[1.5], [1.0]], [[True], [True]]),
        ("sequence_mask", [[1.5], [1.0]], [[True], [True]]),
    ],
)
def test_importance_ratio_by_hand(mode: str, expected: list[list[float]], kept: list[list[bool]]) -> None:
    valid = torch.ones(2, 2, dtype=torch.bool)
    ratio, keeps = importance_sampling_ratio(TRAIN, SAMPLING, valid, mode=mode, clip_min=None, clip_max=2.0)
    torch.testing.assert_close(ratio, torch.tensor(expected))
    assert torch.equal(keeps, torch.tensor(kept))


def test_sequence_mask_drops_the_whole_sequence() -> None:
    valid = torch.ones(2, 2, dtype=torch.bool)
    ratio, kept = importance_sampling_ratio(TRAIN, SAMPLING, valid, mode="sequence_mask", clip_min=None, clip_max=1.2)
    assert ratio.flatten().tolist() == pytest.approx([0.0, 1.0]) and kept.flatten().tolist() == [False, True]


@pytest.mark.parametrize("poison", [1e4, -1e4, torch.nan, torch.inf, -torch.inf])
def test_invalid_tokens_have_ratio_one(poison: float) -> None:
    sampling = SAMPLING.clone()
    sampling[1, 1] = poison
    valid = torch.tensor([[True, True], [True, False]])
    ratio, _ = importance_sampling_ratio(TRAIN, sampling, valid, mode="token_truncate", clip_min=0.5, clip_max=2.0)
    assert ratio[1, 1] == 1


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_truncate", "token_mask", "sequence_mask"])
def test_a_ratio_without_an_upper_bound_is_finite(mode: str) -> None:
    sampling = torch.full((2, 2), -100.0)  # e^100, which float32 does not hold
    valid = torch.ones(2, 2, dtype=torch.bool)
    ratio, _ = importance_sampling_ratio(TRAIN, sampling, valid, mode=mode, clip_min=None, clip_max=None)
    assert ratio.isfinite().all() and ratio.min() > 1e8


@pytest.mark.parametrize("constraint", ["fixed", "lagrangian", "threshold"])
@pytest.mark.parametrize("multiplier", [0.0, 1.0])
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan, -9999.0])
def test_an_unscored_token_has_no_penalty(constraint: str, multiplier: float, value: float) -> None:
    sampling = SAMPLING.clone()
    sampling[0, 0] = value
    for level in ("token", "sequence"):
        for metric in DISCREPANCY_METRICS:
            penalty = discrepancy_penalty(
                token_discrepancy(TRAIN, sampling, metric), valid_tokens(sampling, torch.ones(2, 2)),
                constraint=constraint, multiplier=multiplier, tolerance=1e-3, level=level,
            )  # fmt: skip
            assert penalty[0, 0] == 0 and penalty.isfinite().all()
            assert (penalty[0, 1] > 0) == (multiplier > 0)


def test_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match="'both'"):
        importance_sampling_ratio(TRAIN, SAMPLING, VALID, mode="both", clip_min=None, clip_max=2.0)
