# SPDX-License-Identifier: Apache-2.0
"""A ragged batch scored in parts gives what it gives as a whole, for less."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import dc_trainer, logged, replayed_rollouts, weights
from tiny import tiny_model

from dc_trl.training import ragged
from dc_trl.training.ragged import partition, score_in_parts, tokens_of_a_part

LENGTHS = [40, 1, 39, 2, 0, 10, 11, 9]
PROMPT, COMPLETION = 3, 40


def test_parts_are_rows_of_like_length_where_it_pays() -> None:
    lengths = [40, 1, 39, 2, 1, 10, 11, 9]
    # Whole: 8 x 43 + 10 = 354. In two: 4 x (43 + 13) + 20 = 244, in three: 3 x 43 + 3 x 13 + 2 x 4 + 30 = 206 and in
    # four: 2 x (43 + 14 + 12 + 4) + 40 = 186.
    assert partition(lengths, PROMPT, cost=10) == [[0, 2], [6, 5], [7, 3], [1, 4]]
    # 375, 286, 269, 270 and then 1344, 2224, 3176, 4146.
    assert partition(lengths, PROMPT, cost=31) == [[0, 2, 6], [5, 7, 3], [1, 4]]
    assert len(partition(lengths, PROMPT, cost=1000)) == 1


@pytest.mark.parametrize(("lengths", "prompt"), [([64] * 64, 32), ([7], 5), ([9, 8, 7, 6], 3), ([96] * 63 + [1], 8)])
def test_even_and_small_batches_stay_whole(lengths: list[int], prompt: int) -> None:
    assert len(partition(lengths, prompt, tokens_of_a_part(torch.device("cpu")))) == 1


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 90, (len(LENGTHS), PROMPT + COMPLETION), generator=generator)
    mask = torch.ones_like(ids)
    mask[3, :2] = 0  # a prompt shorter than the others
    for row, length in enumerate(LENGTHS):
        mask[row, PROMPT + length :] = 0
    return ids, mask


@pytest.mark.parametrize("arch", ["qwen3", "gemma3_text"])
def test_parts_give_the_log_probs_entropies_and_gradients_of_the_whole(
    tmp_path: Path, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = dc_trainer(tmp_path, model=tiny_model(arch, initializer_range=0.05))
    ids, mask = batch()
    widths: list[int] = []

    def score(model: Any, ids: torch.Tensor, mask: torch.Tensor, keep: int, **options: Any) -> Any:
        widths.append(ids.shape[1])
        return super(type(trainer), trainer)._get_per_token_logps_and_entropies(model, ids, mask, keep, **options)

    def run(cost: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(ragged, "tokens_of_a_part", lambda device: cost)
        trainer.model.zero_grad()
        options = {"compute_entropy": True, "compute_aux_loss": False}
        logps, entropies, auxiliary = score_in_parts(score, trainer.model, ids, mask, COMPLETION, **options)
        assert auxiliary is None
        seen = mask[:, PROMPT:].bool()
        ((logps * torch.linspace(-1, 1, COMPLETION) + 0.1 * entropies)[seen]).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        return logps[seen], entropies[seen], gradients

    whole, parts = run(10**6), run(0)
    assert widths == [PROMPT + width for width in (40, 40, 11, 9, 1)]
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_a_run_in_parts_trains_and_measures_as_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = ragged.partition

    def recording(*args: Any) -> list[list[int]]:
        parts = original(*args)
        calls.append(len(parts))
        return parts

    monkeypatch.setattr(ragged, "partition", recording)

    def run(cost: int) -> Any:
        monkeypatch.setattr(ragged, "tokens_of_a_part", lambda device: cost)
        options = {"constraint": "fixed", "multiplier_init": 1.0, "optim": "sgd", "learning_rate": 0.1}
        trainer = dc_trainer(
            tmp_path, rollout_func=replayed_rollouts(length=8), gradient_accumulation_steps=2, **options
        )
        trainer.train()
        return trainer

    whole, parts = run(10**6), run(0)
    assert set(calls[: len(calls) // 2]) == {1} and min(calls[len(calls) // 2 :]) > 1
    torch.testing.assert_close(weights(parts), weights(whole), atol=1e-6, rtol=0)
    for key in ("loss", "entropy", "dc/discrepancy/mean", "dc/discrepancy/max", "dc/penalty_share"):
        assert logged(parts, key) == pytest.approx(logged(whole, key), rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ({}, {"constraint": "none"}),
        ({"arch": "qwen3_moe", "output_router_logits": True}, {"router_aux_loss_coef": 0.1}),
        ({"arch": "qwen3_moe"}, {"router_replay": True}),
    ],
    ids=["none", "router-loss", "router-replay"],
)
def test_what_belongs_together_stays_whole(
    tmp_path: Path, model: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ragged, "partition", lambda *_: pytest.fail("the batch was split"))
    trainer = dc_trainer(tmp_path, model=tiny_model(**model), max_steps=1, **options)
    trainer.train()
    assert trainer.state.global_step == 1
