# SPDX-License-Identifier: Apache-2.0
"""Numbers that no run should meet: from the engine, from reward functions, in whole batches. Weights stay finite."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import dc_trainer, logged, replayed_rollouts, weights
from tiny import tiny_model

from dc_trl import DCGRPOTrainer

NOT_SCORED = [None, math.nan, math.inf, -math.inf, 0.5, -9999.0]
WHERE: dict[str, Callable[[int, int], bool]] = {
    "token": lambda row, place: (row, place) == (2, 1),
    "sequence": lambda row, place: row == 2,
    "group": lambda row, place: row < 4,
    "batch": lambda row, place: True,
}


def rollouts_with(value: float | None, where: str) -> Callable[..., dict[str, Any]]:
    def edit(logprobs: list[list[Any]]) -> None:
        for row, values in enumerate(logprobs):
            values[:] = [value if WHERE[where](row, place) else old for place, old in enumerate(values)]

    return replayed_rollouts(edit=edit)


def is_sound(trainer: DCGRPOTrainer) -> bool:
    """Finite weights and state, and a log that is JSON to the letter."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (Path(trainer.args.output_dir) / "log.jsonl").read_text().splitlines()
    assert all(json.loads(line, parse_constant=refuse) for line in lines)
    tolerance = trainer.discrepancy_tolerance
    return bool(weights(trainer).isfinite().all()) and math.isfinite(trainer.dual.value) and (
        tolerance is None or math.isfinite(tolerance)
    )  # fmt: skip


@pytest.mark.parametrize("value", NOT_SCORED, ids=str)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("constraint", ["lagrangian", "none"])
def test_log_probs_that_are_none_leave_the_run_sound(
    tmp_path: Path, constraint: str, where: str, value: float | None
) -> None:
    options = {"constraint": constraint, "tolerance_calibration_batches": 1, "max_steps": 2, "ess_rate": True}
    trainer = dc_trainer(tmp_path, rollout_func=rollouts_with(value, where), **options)
    trainer.train()
    assert is_sound(trainer)
    unscored, mean = logged(trainer, "dc/nan_fraction")[0], logged(trainer, "dc/discrepancy/mean")[0]
    if where == "batch":
        assert unscored == 1.0 and mean is None
        assert trainer.dual.value == 0.1 and trainer.discrepancy_tolerance is None
    else:
        assert 0 < unscored < 1 and 0 < mean < 1


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "drpo"])
@pytest.mark.parametrize("where", ["sequence", "batch"])
@pytest.mark.parametrize("rejection", [None, ["geometric", "icepop", "dppo_tv"]], ids=str)
def test_they_do_so_with_every_correction(tmp_path: Path, mode: str, where: str, rejection: list[str] | None) -> None:
    options = {"constraint": "fixed", "vllm_importance_sampling_mode": mode, "rejection": rejection, "max_steps": 1}
    trainer = dc_trainer(tmp_path, rollout_func=rollouts_with(-math.inf, where), **options)
    trainer.train()
    assert is_sound(trainer)


def emptied(rows: Callable[[int], bool]) -> Callable[..., dict[str, Any]]:
    """A `rollout_func` some of whose completions have no token."""
    base = replayed_rollouts()

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        output = base(prompts, trainer)
        for name in ("completion_ids", "logprobs"):
            output[name] = [[] if rows(row) else values for row, values in enumerate(output[name])]
        return output

    return rollout


@pytest.mark.parametrize("constraint", ["lagrangian", "none"])
def test_completions_without_a_token_are_refused_by_row(tmp_path: Path, constraint: str) -> None:
    trainer = dc_trainer(tmp_path, rollout_func=emptied(lambda row: row in (2, 5)), constraint=constraint)
    with pytest.raises(ValueError, match=r"row 2 of `completion_ids` has no token \(2 of 8.*end-of-sequence token"):
        trainer.train()
    assert torch.equal(weights(trainer), at_start())


@pytest.mark.parametrize("constraint", ["lagrangian", "none"])
def test_completions_of_the_end_alone(tmp_path: Path, constraint: str) -> None:
    base = replayed_rollouts()

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        output = base(prompts, trainer)
        end, count = trainer.processing_class.eos_token_id, len(output["completion_ids"])
        return output | {"completion_ids": [[end]] * count, "logprobs": [[-2.0]] * count}

    trainer = dc_trainer(tmp_path, rollout_func=rollout, constraint=constraint, max_steps=2)
    trainer.train()
    assert is_sound(trainer) and logged(trainer, "dc/nan_fraction") == [0.0, 0.0]


@pytest.mark.parametrize("constraint", ["lagrangian", "none"])
@pytest.mark.parametrize("options", [{}, {"zero_variance_groups": "drop"}, {"rejection": ["icepop"]}], ids=str)
def test_batches_of_which_nothing_counts(tmp_path: Path, constraint: str, options: dict[str, Any]) -> None:
    base = replayed_rollouts()

    def masked(prompts: list[str], trainer: Any) -> dict[str, Any]:
        output = base(prompts, trainer)
        return output | {"env_mask": [[0] * len(ids) for ids in output["completion_ids"]]}

    trainer = dc_trainer(tmp_path, rollout_func=masked, constraint=constraint, max_steps=2, **options)
    trainer.train()
    assert is_sound(trainer) and logged(trainer, "dc/discrepancy/mean") == [None, None]
    assert torch.equal(weights(trainer), at_start())


def at_start() -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in tiny_model().parameters()])


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
@pytest.mark.parametrize("groups", ["keep", "drop"])
@pytest.mark.parametrize("reward", [0.0, 1.0, -3.5, 1e6])
def test_identical_rewards_teach_nothing(tmp_path: Path, estimator: str, groups: str, reward: float) -> None:
    options = {"advantage_estimator": estimator, "zero_variance_groups": groups, "constraint": "none", "max_steps": 2}
    trainer = dc_trainer(tmp_path, reward_funcs=lambda completions, **_: [reward] * len(completions), **options)
    trainer.train()
    assert is_sound(trainer)
    assert logged(trainer, "grad_norm") == pytest.approx([0.0, 0.0], abs=1e-4)
    if reward == 0.0:
        assert torch.equal(weights(trainer), at_start())


def judge(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def returning(edit: Callable[[list[Any]], Any]) -> Callable[..., Any]:
    def reward(completions: list[str], **_: Any) -> Any:
        return edit([float(len(text) + place % 3) for place, text in enumerate(completions)])

    reward.__name__ = "odd_reward"
    return reward


BAD_REWARDS: list[tuple[str, Callable[[list[Any]], Any], type[Exception], str]] = [
    ("nothing", lambda r: None, TypeError, "`odd_reward` returned None.*one number for each completion"),
    ("a number", lambda r: 1.0, TypeError, "`odd_reward` returned a float"),
    ("text", lambda r: "1" * len(r), TypeError, "`odd_reward` returned a str"),
    ("a dict", lambda r: dict(enumerate(r)), TypeError, "`odd_reward` returned a dict"),
    ("texts", lambda r: [str(x) for x in r], TypeError, "`odd_reward` returned a str for completion 0"),
    ("lists", lambda r: [r[0], *([x] for x in r[1:])], TypeError, "`odd_reward` returned a list for completion 1"),
    ("one too few", lambda r: r[1:], ValueError, "'odd_reward' returned 7 rewards, but 8 were expected"),
    ("none", lambda r: [], ValueError, "'odd_reward' returned 0 rewards"),
    ("infinity", lambda r: [*r[:3], math.inf, *r[4:]], ValueError, "`odd_reward` returned inf .* for completion 3"),
    ("-infinity", lambda r: [-math.inf, *r[1:]], ValueError, "`odd_reward` returned -inf .* for completion 0"),
    ("beyond float32", lambda r: [*r[:7], 1e300], ValueError, r"returned inf \(in float32\) for completion 7"),
    (
        "beyond a deviation",
        lambda r: [3e38, *r[1:]],
        ValueError,
        "returned 3e.38 .*0.*deviation of its group",
    ),
]


@pytest.mark.parametrize(
    ("edit", "error", "words"), [bad[1:] for bad in BAD_REWARDS], ids=[bad[0] for bad in BAD_REWARDS]
)
@pytest.mark.parametrize("constraint", ["lagrangian", "none"])
def test_rewards_that_cannot_be_trained_on_name_their_function(
    tmp_path: Path, constraint: str, edit: Callable[[list[Any]], Any], error: type[Exception], words: str
) -> None:
    trainer = dc_trainer(tmp_path, reward_funcs=[judge, returning(edit)], constraint=constraint)
    with pytest.raises(error, match=words):
        trainer.train()
    assert torch.equal(weights(trainer), at_start())


def test_an_asynchronous_function_is_named_too(tmp_path: Path) -> None:
    async def later(completions: list[str], **_: Any) -> Any:
        return None

    trainer = dc_trainer(tmp_path, reward_funcs=[judge, later])
    with pytest.raises(TypeError, match="`later` returned None"):
        trainer.train()


def test_a_function_that_raises_ends_the_run_with_its_own_error(tmp_path: Path) -> None:
    def reward(completions: list[str], **_: Any) -> list[float]:
        raise ZeroDivisionError("of the function's own")

    trainer = dc_trainer(tmp_path, reward_funcs=reward)
    with pytest.raises(ZeroDivisionError, match="of the function's own"):
        trainer.train()
    assert trainer.reward_funcs == [reward]


@pytest.mark.parametrize(
    "edit",
    [
        lambda r: [None, *r[1:]],
        lambda r: [math.nan] * 4 + r[4:],
        lambda r: [None] * len(r),
        lambda r: tuple(r),
        lambda r: torch.tensor(r),
        lambda r: [torch.tensor(x) for x in r],
        lambda r: [x > 4 for x in r],
        lambda r: [int(x) for x in r],
    ],
    ids=["one missing", "a group missing", "all missing", "tuple", "tensor", "tensors", "bools", "ints"],
)
@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_rewards_that_can_be_trained_on(tmp_path: Path, estimator: str, edit: Callable[[list[Any]], Any]) -> None:
    options = {"advantage_estimator": estimator, "constraint": "none", "max_steps": 1}
    trainer = dc_trainer(tmp_path, reward_funcs=returning(edit), **options)
    trainer.train()
    assert is_sound(trainer)
