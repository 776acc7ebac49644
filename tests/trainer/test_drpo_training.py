# SPDX-License-Identifier: Apache-2.0
"""DRPO's weight through the trainer: every update is the gradient of the paper's objective, and nothing is clipped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import dc_trainer, logged, record_losses, replayed_rollouts
from tiny import tiny_model

from dc_trl import DCGRPOConfig

DRPO: dict[str, Any] = {"vllm_importance_sampling_mode": "drpo", "drpo_limit": 0.5}


def copy_of(model: Any) -> Any:
    """A model of its own with the same weights; TRL has replaced the forward of the one that it trains."""
    copied = tiny_model()
    copied.load_state_dict(model.state_dict())
    return copied


REUSED = {"gradient_accumulation_steps": 1, "steps_per_generation": 1, "num_iterations": 2}


def objective_gradient(model: Any, inputs: dict[str, Any], advantages: torch.Tensor, limit: float) -> torch.Tensor:
    """∇ of −(1/n) Σ ρ A − |A| μ (ρ − 1)² / 2δ, eq. 8, by autograd through the model."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    width, mask = inputs["completion_ids"].size(1), inputs["completion_mask"]
    logits = model(input_ids=ids, attention_mask=attention).logits[:, -width - 1 : -1].float()
    logps = logits.log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
    log_mu = inputs["sampling_per_token_logps"]
    ratio = (logps - log_mu).exp()
    values = ratio * advantages - advantages.abs() * log_mu.exp() * (ratio - 1) ** 2 / (2 * limit)
    loss = -(values * mask).sum() / mask.sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("constraint", ["none", "fixed"])
def test_every_update_follows_the_papers_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constraint: str
) -> None:
    records = record_losses(monkeypatch)
    options = {"constraint": constraint, "multiplier_init": 1.0, "optim": "sgd", "max_grad_norm": 0.0, "max_steps": 2}
    model = tiny_model()
    trainer = dc_trainer(
        tmp_path, model=model, rollout_func=replayed_rollouts(), learning_rate=3.0, **options, **DRPO, **REUSED
    )
    before = []
    step = trainer.training_step
    monkeypatch.setattr(trainer, "training_step", lambda *a, **k: before.append(copy_of(model)) or step(*a, **k))
    trainer.train()
    after = [*before[1:], copy_of(model)]
    for inputs, old, new in zip(records, before, after, strict=True):
        change = torch.cat([(b - a).flatten() for a, b in zip(old.parameters(), new.parameters(), strict=True)])
        advantages = inputs["advantages"].reshape(len(inputs["prompt_ids"]), -1)
        expected = -3.0 * objective_gradient(old, inputs, advantages, 0.5)
        assert expected.norm() > 0.01 and (change - expected).norm() < 1e-4 * expected.norm()
    # With ratio clipping at 0.2 the second update would have lost tokens.
    drift = (records[1]["train_logps"] - records[0]["train_logps"])[records[0]["completion_mask"].bool()].exp()
    assert ((drift > 1.2) | (drift < 0.8)).any()
    assert logged(trainer, "clip_ratio/region_mean") == [0.0, 0.0]
    applied = torch.cat([r["importance_sampling_ratio"][r["completion_mask"].bool()] for r in records])
    assert logged(trainer, "sampling/importance_sampling_ratio/mean")[0] == pytest.approx(float(applied.mean()))


def test_the_penalty_comes_before_the_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # All rewards are equal, so the penalty is the whole advantage, and negative: w = 1 + (π − μ)/δ.
    records = record_losses(monkeypatch)
    options = {"constraint": "fixed", "multiplier_init": 1.0, "reward_funcs": lambda completions, **_: [0.0] * 8}
    dc_trainer(tmp_path, rollout_func=replayed_rollouts(), max_steps=1, **options, **DRPO).train()
    (inputs,) = records
    mask, pi, mu = inputs["completion_mask"].bool(), inputs["train_logps"], inputs["sampling_per_token_logps"]
    weight = 1 + (pi.exp() - mu.exp()) / 0.5
    torch.testing.assert_close(inputs["importance_sampling_ratio"][mask], ((pi - mu).exp() * weight)[mask])
    assert ((weight < 1) & mask).any() and (inputs["advantages"][mask] < 0).all()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"vllm_importance_sampling_correction": False}, "`vllm_importance_sampling_correction` is False"),
    ({"loss_type": "sapo"}, "`loss_type` is 'sapo'"),
    ({"importance_sampling_level": "sequence"}, "`importance_sampling_level` is 'sequence'"),
    ({"beta": 0.1, "use_bias_correction_kl": True}, "`use_bias_correction_kl` is True"),
]


@pytest.mark.parametrize(("options", "named"), REFUSED, ids=[next(iter(o)) for o, _ in REFUSED])
def test_what_would_undo_the_weight_is_refused(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} with `vllm_importance_sampling_mode='drpo'`.*another mode"):
        DCGRPOConfig(str(tmp_path), bf16=False, constraint="none", **options, **DRPO)


def test_an_unknown_mode_and_a_bad_limit_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`vllm_importance_sampling_mode` is 'tokens', which is unknown.*'drpo'"):
        DCGRPOConfig(str(tmp_path), bf16=False, vllm_importance_sampling_mode="tokens")
    with pytest.raises(ValueError, match="`drpo_limit` is 0.*12.5"):
        DCGRPOConfig(str(tmp_path), bf16=False, drpo_limit=0.0)
    with pytest.raises(ValueError, match="`vllm_importance_sampling_mode='drpo'` compares the engines, but nothing"):
        dc_trainer(tmp_path, rollout_backend="vllm", rollout_precision=None, constraint="none", **DRPO)
