# SPDX-License-Identifier: Apache-2.0
"""The constraint on other models and set-ups; an unquantised engine agrees with the trainer, a quantised one less."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from runs import dc_trainer, logged, record_losses, weights
from tiny import tiny_model, tiny_tokenizer

from dc_trl import DCGRPOTrainer

CONTROL = {"discrepancy_tolerance": 1e-3, "dual_lr": 3.0, "multiplier_init": 0.5, "max_steps": 2}
# Float32 rounding through two layers is some 1e-6; a wrong mask, position or weight is some 1e-2.
ROUNDING = 1e-5
ARCHITECTURES = {
    "qwen3": {},
    "qwen3_moe": {},
    "llama": {},
    "gemma3_text": {"initializer_range": 0.05},  # it scales embeddings up: at 0.2 a tied head knows every next token
}


def check_engine(trainer: DCGRPOTrainer) -> None:
    """Trains in float32 with an unquantised engine and asserts that the two agree before and after an update."""
    before = weights(trainer)
    trainer.train()
    assert len(logged(trainer, "dc/discrepancy/max")) == trainer.args.max_steps >= 2
    assert 0 < max(logged(trainer, "dc/discrepancy/max")) < ROUNDING
    assert logged(trainer, "dc/nan_fraction") == [0.0] * trainer.args.max_steps
    assert (weights(trainer) - before).abs().max() > 5e-3  # so the second agreement is one of synchronised weights


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_engine_and_trainer_agree_for_the_architecture(tmp_path: Path, arch: str, tied: bool) -> None:
    model = tiny_model(arch, tie_word_embeddings=tied, **ARCHITECTURES[arch])
    trainer = dc_trainer(tmp_path, model=model, rollout_precision=None, **CONTROL)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    check_engine(trainer)
    assert trainer.dual.value == pytest.approx(0.5 - 2 * 3e-3, abs=1e-4)  # below the tolerance: λ falls


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_constraint_acts_on_the_architecture(tmp_path: Path, arch: str) -> None:
    trainer = dc_trainer(tmp_path, model=tiny_model(arch, **ARCHITECTURES[arch]), rollout_precision="int3", **CONTROL)
    trainer.train()
    assert logged(trainer, "dc/discrepancy/mean")[0] > 1e-3
    assert logged(trainer, "dc/penalty_share")[0] > 0 and trainer.dual.value > 0.5


def test_sliding_windows_shorter_than_the_sequence_agree(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text", sliding_window=4, **ARCHITECTURES["gemma3_text"])
    assert "sliding_attention" in model.config.layer_types
    check_engine(dc_trainer(tmp_path, model=model, rollout_precision=None, **CONTROL))


@pytest.mark.parametrize("router_logits", [False, True])
def test_the_router_loss_is_logged_and_part_of_the_loss(tmp_path: Path, router_logits: bool) -> None:
    def loss(coefficient: float) -> DCGRPOTrainer:
        model = tiny_model("qwen3_moe", output_router_logits=router_logits)
        trainer = dc_trainer(tmp_path, model=model, router_aux_loss_coef=coefficient, **CONTROL)
        trainer.train()
        return trainer

    with_it, without = loss(0.5), loss(0.0)
    auxiliary = logged(with_it, "aux_loss")[0]
    assert 1.0 < auxiliary < 4.0  # 2 of 4 experts: balanced routing gives 2
    # In the first step everything else is the same.
    assert logged(with_it, "loss")[0] - logged(without, "loss")[0] == pytest.approx(0.5 * auxiliary, rel=1e-4)
    assert logged(with_it, "dc/discrepancy/mean")[0] == logged(without, "dc/discrepancy/mean")[0] > 0


@pytest.mark.parametrize(
    ("arch", "options"),
    [("qwen3", {}), ("qwen3", {"gradient_checkpointing": True}), ("qwen3_moe", {}), ("gemma3_text", {})],
    ids=str,
)
def test_lora_trains_the_adapter_alone(tmp_path: Path, arch: str, options: dict[str, Any]) -> None:
    adapter = LoraConfig(r=4, target_modules=["q_proj", "o_proj"])
    model = tiny_model(arch, **ARCHITECTURES[arch])
    trainer = dc_trainer(tmp_path, model=model, peft_config=adapter, rollout_precision=None, **CONTROL, **options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    check_engine(trainer)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name)


def test_lora_under_a_quantised_engine(tmp_path: Path) -> None:
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    trainer = dc_trainer(tmp_path, peft_config=adapter, **CONTROL)
    before = weights(trainer)
    trainer.train()
    changed = (weights(trainer) != before).sum()
    assert 0 < changed <= sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert trainer.dual.value > 0.5


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_float32_head_on_half_precision_weights(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied).to(torch.bfloat16)
    options = {"cast_lm_head_to_fp32": True, "rollout_precision": None, "adam_epsilon": 1e-3}
    trainer = dc_trainer(tmp_path, model=model, **CONTROL, **options)
    trainer.train()
    assert model.lm_head.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert 0 < logged(trainer, "dc/discrepancy/mean")[0] < 5e-3
    # As trained: each weight of the engine in the dtype of the trainer's.
    engine = trainer.vllm_generation.policy
    assert {n: p.dtype for n, p in engine.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_float32_head_on_float32_weights_changes_nothing(tmp_path: Path, tied: bool) -> None:
    def run(cast: bool) -> torch.Tensor:
        model = tiny_model(tie_word_embeddings=tied)
        trainer = dc_trainer(tmp_path, model=model, cast_lm_head_to_fp32=cast, rollout_precision=None, **CONTROL)
        check_engine(trainer)
        return weights(trainer)

    assert torch.equal(run(True), run(False))


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    def run(checkpointing: bool) -> tuple[torch.Tensor, list[float]]:
        trainer = dc_trainer(tmp_path, gradient_checkpointing=checkpointing, **CONTROL)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == checkpointing
        return weights(trainer), logged(trainer, "dc/multiplier") + logged(trainer, "dc/penalty_share")

    (checkpointed, log), (plain, expected) = run(True), run(False)
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-6)
    assert log == pytest.approx(expected, rel=1e-6)


# Conversations

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool>{{ call.function | tojson }}</tool>{% endfor %}"
    "{% if m.role == 'assistant' %}<eos>{% endif %};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
CONVERSATIONS = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"{i}+1="}] for i in range(8)]})
# How transformers finds the call in the text; that of real tokenizers comes with them or from TRL.
RESPONSES = {
    "defaults": {"role": "assistant"},
    "start_anchor": "a:",
    "fields": {
        "tool_calls": {
            "open": "<tool>", "close_pattern": "</tool>", "repeats": True, "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": "<eos>", "content": "text"},
    },
}  # fmt: skip


def chat_tokenizer() -> Any:
    """The tiny tokenizer with a template that marks roles and renders tool calls."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def answer_length(completions: list[list[dict[str, Any]]], **_: Any) -> list[float]:
    """The reward of a conversation: characters of its last answer."""
    return [float(len(messages[-1].get("content") or "")) for messages in completions]


def test_a_conversational_data_set_goes_through_the_chat_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = record_losses(monkeypatch)
    tokenizer = chat_tokenizer()
    trainer = dc_trainer(
        tmp_path, processing_class=tokenizer, train_dataset=CONVERSATIONS, reward_funcs=answer_length,
        rollout_precision=None, **CONTROL,
    )  # fmt: skip
    check_engine(trainer)
    rendered = {tokenizer.decode(row, skip_special_tokens=True) for row in records[0]["prompt_ids"]}
    assert rendered <= {f"u:{i}+1=;a:" for i in range(8)} and len(rendered) == 2


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: one number.
        b: another.
    """
    return a + b


def test_tool_tokens_carry_no_penalty_and_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = record_losses(monkeypatch)
    tokenizer = chat_tokenizer()
    tokenizer.response_template = RESPONSES
    options = CONTROL | {"constraint": "fixed", "max_steps": 1}
    trainer = dc_trainer(
        tmp_path, processing_class=tokenizer, train_dataset=CONVERSATIONS, reward_funcs=answer_length, tools=[add],
        rollout_precision="int3", max_completion_length=96, **options,
    )  # fmt: skip
    call = f"<tool>{json.dumps({'name': 'add', 'arguments': {'a': 2, 'b': 3}})}</tool>"
    call_ids = [*tokenizer(text=call)["input_ids"], tokenizer.eos_token_id]
    generate, turns = trainer.vllm_generation.generate, []

    def calling(prompts: list[list[int]], **kwargs: Any) -> Any:
        """The first turn of every completion is the call, which no random policy would write; then the engine's."""
        turns.append(prompts)
        if len(turns) > 1:
            return generate(prompts, **kwargs)
        return prompts, [list(call_ids) for _ in prompts], [[[-1.0]] * len(call_ids) for _ in prompts], None

    monkeypatch.setattr(trainer.vllm_generation, "generate", calling)
    trainer.train()
    assert logged(trainer, "tools/call_frequency") == [1.0] and logged(trainer, "tools/failure_frequency") == [0.0]
    assert tokenizer.decode(turns[1][0]).endswith(f"{call}<eos>;t:5;a:")
    (inputs,) = records
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    result = len(tokenizer(text=";t:5;a:")["input_ids"])
    assert (inputs["tool_mask"] == 0).sum(1).tolist() == [result] * 8
    # The penalty is what tells a sequence's advantages apart from each other.
    d = (inputs["train_logps"].exp() - inputs["sampling_per_token_logps"].exp()).abs() * mask
    spread = inputs["advantages"][~mask & inputs["completion_mask"].bool()].view(8, result)
    assert (spread == spread[:, :1]).all()
    torch.testing.assert_close(spread[:, :1] - inputs["advantages"], 0.5 * d, rtol=1e-4, atol=1e-6)
    assert d[:, : len(call_ids)].max() > 0.1 and d[:, len(call_ids) + result :].max() > 1e-3
    expected = (d.sum(1) / mask.sum(1)).mean().item()
    assert logged(trainer, "dc/discrepancy/mean") == pytest.approx([expected], rel=1e-5)
