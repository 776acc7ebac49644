# SPDX-License-Identifier: Apache-2.0
"""Dropout is no discrepancy: off under a constraint, and said; left alone, and said, without one."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from runs import dc_trainer, logged
from tiny import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from dc_trl.training.dropout import describe_dropout, find_dropout, switch_off_dropout

# No step moves a weight, and the sampler is the trainer's equal: what is left of d is float32's rounding.
EQUAL = {"learning_rate": 0.0, "rollout_precision": None, "max_steps": 2}
ROUNDING = 1e-6


def adapters(**options: Any) -> Any:
    """LoRA whose B is not 0, so that what is dropped before A shows."""
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, **options)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    """What the package warned of."""
    transformers.utils.logging.enable_propagation()
    caplog.set_level(logging.WARNING)
    yield lambda: [r.getMessage() for r in caplog.records if "DC-GRPO: dropout" in r.getMessage()]
    transformers.utils.logging.disable_propagation()


class MultiplicativeDropoutLayer(nn.Module):
    """As PEFT's OFT has it: no `nn.Dropout`."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p


class Places(nn.Module):
    """Everything that is one, and what only looks so."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Dropout(0.25)
        self.second = MultiplicativeDropoutLayer(0.125)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5)
        self.drop_path = 0.75
        self.rank_dropout = {"default": 0.0625, "other": 0.0}
        self.rank_dropout_scale = {"default": True}
        self.none, self.use_dropout, self.p, self.eps = nn.Dropout(0.0), True, 0.5, 0.5


def test_every_place_is_found_and_switched_off() -> None:
    model = Places()
    found = {"first.p": 0.25, "second.p": 0.125, "attention.dropout": 0.5}
    found |= {"drop_path": 0.75, "rank_dropout.default": 0.0625}
    assert find_dropout(model) == found
    assert describe_dropout(found) == "in 5 places of the policy (p up to 0.75, e.g. drop_path)"
    assert switch_off_dropout(model) == found
    assert find_dropout(model) == {} and model.first.p == model.attention.dropout == 0.0
    assert model.rank_dropout == {"default": 0.0, "other": 0.0} and model.rank_dropout_scale == {"default": True}
    assert (model.use_dropout, model.p, model.eps) == (True, 0.5, 0.5)


def test_gpt2_has_nothing_random_left() -> None:
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.arange(8)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    switch_off_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "policy",
    [
        lambda: {"peft_config": adapters(lora_dropout=0.3)},
        lambda: {"model": tiny_model(attention_dropout=0.3)},
        lambda: {"model": tiny_model(attention_dropout=0.3), "disable_dropout": True},  # TRL's: `nn.Dropout` alone
    ],
    ids=["lora_dropout", "attention_dropout", "disable_dropout"],
)
@pytest.mark.parametrize("constraint", ["lagrangian", "fixed", "threshold"])
def test_dropout_is_not_measured_under_a_constraint(tmp_path: Path, policy: Any, constraint: str, said: Any) -> None:
    trainer = dc_trainer(tmp_path, constraint=constraint, discrepancy_tolerance=0.01, **policy(), **EQUAL)
    assert find_dropout(trainer.model) == {}
    (message,) = said()
    assert "switched off in" in message and "p up to 0.3" in message and "constraint='none'" in message
    trainer.train()
    assert trainer.model.training
    assert 0 < max(logged(trainer, "dc/discrepancy/mean")) < ROUNDING
    assert len(said()) == 1


def test_without_constraint_dropout_stays_and_is_said_once(tmp_path: Path, said: Any) -> None:
    trainer = dc_trainer(tmp_path, constraint="none", peft_config=adapters(lora_dropout=0.3), **EQUAL)
    before = find_dropout(trainer.model)
    assert before and set(before.values()) == {0.3} and said() == []
    trainer.train()
    assert find_dropout(trainer.model) == before
    assert min(logged(trainer, "dc/discrepancy/mean")) > 100 * ROUNDING
    (message,) = said()
    assert f"dropout is on in {len(before)} places" in message


def test_a_policy_without_dropout_is_not_spoken_of(tmp_path: Path, said: Any) -> None:
    dc_trainer(tmp_path, discrepancy_tolerance=0.01, **EQUAL).train()
    assert said() == []
