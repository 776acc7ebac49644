# SPDX-License-Identifier: Apache-2.0
"""A user's `rollout_func`: one log-prob a token, row by row, and found wherever it is passed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import PROMPTS, count_digits, dc_trainer, logged, quiet, replayed_rollouts, settings, weights
from tiny import tiny_model, tiny_tokenizer
from trl import GRPOConfig, GRPOTrainer

from dc_trl import DCGRPOConfig, DCGRPOTrainer
from dc_trl.rollouts.rollout_func import describe_faults, faulty_rows

Edit = Callable[[list[Any]], Any]
IDS = [[1, 2, 3], [4, 5], [6]]
SOUND: list[list[Any]] = [[-0.1, -0.2, -0.3], [-1.0, None], [math.nan]]


def output(logprobs: Any) -> dict[str, Any]:
    return {"prompt_ids": [[0]] * 3, "completion_ids": IDS, "logprobs": logprobs}


@pytest.mark.parametrize(
    "logprobs", [SOUND, [torch.tensor(row, dtype=torch.float) for row in ([1, 2, 3], [4, 5], [6])], None], ids=str
)
def test_sound_rows_pass(logprobs: Any) -> None:
    assert faulty_rows(output(logprobs)) == {}


@pytest.mark.parametrize(
    ("row", "wrong", "words"),
    [
        (1, [-1.0], "has 1 log-probs for 2 completion tokens"),
        (2, [-1.0, -2.0], "has 2 log-probs for 1 completion tokens"),
        (0, [], "has 0 log-probs for 3 completion tokens"),
        (1, None, "is None, for 2 completion tokens"),
        (2, -1.0, "is -1.0, for 1 completion tokens"),
        (0, [-0.1, [-0.2], -0.3], r"has \[-0.2\] at token 1, which is not a number"),
        (0, torch.zeros(3, 1), r"has tensor\(\[0.\]\) at token 0, which is not a number"),
    ],
    ids=str,
)
def test_a_faulty_row_is_named(row: int, wrong: Any, words: str) -> None:
    faults = faulty_rows(output([wrong if place == row else sound for place, sound in enumerate(SOUND)]))
    assert list(faults) == [row]
    with pytest.raises(ValueError, match=f"row {row} of `logprobs` {words}"):
        raise ValueError(describe_faults(faults))


def test_a_missing_row_is_named_by_the_counts() -> None:
    with pytest.raises(ValueError, match="2 rows of `logprobs` for 3 rows of `completion_ids`"):
        faulty_rows(output(SOUND[:2]))


def cut(logprobs: list[list[Any]]) -> None:
    """One log-prob is missing in rows 2 and 5, at their ends."""
    del logprobs[2][-1], logprobs[5][-1]


def cut_all(logprobs: list[list[Any]]) -> None:
    for row in logprobs:
        del row[-1]


@pytest.mark.parametrize("constraint", ["lagrangian", "fixed", "threshold"])
def test_short_log_probs_end_a_constrained_run(tmp_path: Path, constraint: str) -> None:
    options = {"constraint": constraint, "discrepancy_tolerance": 0.01, "rollout_func": replayed_rollouts(edit=cut)}
    trainer = dc_trainer(tmp_path, **options)
    with pytest.raises(ValueError, match=r"row 2 of `logprobs` has \d log-probs for \d.*2 rows.*constraint='none'"):
        trainer.train()


def run(kind: Any, config: Any, folder: Path, rollout_func: Any, **options: Any) -> Any:
    args = config(**settings(folder, lr_scheduler_type="constant", max_steps=2, **options))
    data = {"train_dataset": PROMPTS, "processing_class": tiny_tokenizer()}
    trainer = quiet(kind(tiny_model(), count_digits, args, rollout_func=rollout_func, **data))
    trainer.train()
    return trainer


@pytest.mark.parametrize("edit", [cut, cut_all])
def test_without_constraint_they_train_as_with_trl_and_are_not_measured(tmp_path: Path, edit: Edit) -> None:
    theirs = run(GRPOTrainer, GRPOConfig, tmp_path, replayed_rollouts(edit=edit))
    ours = run(DCGRPOTrainer, DCGRPOConfig, tmp_path, replayed_rollouts(edit=edit), constraint="none")
    assert torch.equal(weights(ours), weights(theirs))
    means, unscored = logged(ours, "dc/discrepancy/mean"), logged(ours, "dc/nan_fraction")
    if edit is cut_all:
        assert unscored == [1.0, 1.0] and means == [None, None]
    else:
        whole = run(DCGRPOTrainer, DCGRPOConfig, tmp_path, replayed_rollouts(), constraint="none")
        assert 0 < unscored[0] < 0.6 and logged(whole, "dc/nan_fraction") == [0.0, 0.0]
        assert 0 < logged(ours, "dc/discrepancy/max")[0] <= logged(whole, "dc/discrepancy/max")[0]


def test_it_is_found_among_the_positional_arguments(tmp_path: Path) -> None:
    args = DCGRPOConfig(**settings(tmp_path, constraint="fixed", max_steps=1))
    callbacks, optimizers = None, (None, None)
    rest = (PROMPTS, None, tiny_tokenizer(), None, callbacks, optimizers, None, None, None, replayed_rollouts())
    trainer = quiet(DCGRPOTrainer(tiny_model(), count_digits, args, *rest))
    trainer.train()
    assert logged(trainer, "dc/penalty_share")[0] > 0


def test_one_that_is_set_later_is_checked_too(tmp_path: Path) -> None:
    trainer = dc_trainer(tmp_path, rollout_func=replayed_rollouts(), constraint="fixed")
    trainer.rollout_func = replayed_rollouts(edit=cut_all)
    with pytest.raises(ValueError, match="row 0 of `logprobs`.*8 rows are faulty"):
        trainer.train()
