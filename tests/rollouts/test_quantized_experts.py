# SPDX-License-Identifier: Apache-2.0
"""Which weights of a mixture of experts are quantised, and along which dimension."""

import re
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from test_transformers_engine import PROMPTS, worst_error
from tiny import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from dc_trl.rollouts.quantization import fake_quantize, quantizable_parameters
from dc_trl.rollouts.transformers import TransformersGeneration

FEW_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# 192 inputs are a group of 128 and a short one, so that groups along the wrong dimension do not pass for the right.
MODELS: dict[str, dict[str, Any]] = {
    "llama4_text": FEW_EXPERTS | {"intermediate_size": 192, "intermediate_size_mlp": 96, "moe_layers": [1]},
    "gpt_oss": FEW_EXPERTS | {"intermediate_size": 192},
    "mixtral": FEW_EXPERTS,
    "qwen2_moe": {"moe_intermediate_size": 192, "shared_expert_intermediate_size": 96},
    "qwen3_moe": {"moe_intermediate_size": 192},
    "jetmoe": FEW_EXPERTS | {"kv_channels": 32},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
}
TRANSPOSED = {"llama4_text", "gpt_oss", "aria_text"}
ROUTER = r"\.(router|gate|shared_expert_gate)\."


def build(arch: str) -> PreTrainedModel:
    return tiny_model(arch, **MODELS[arch])


def synced_engine(model: PreTrainedModel, precision: str) -> TransformersGeneration:
    engine = TransformersGeneration(
        model, Accelerator(cpu=True), tiny_tokenizer(), precision=precision, max_completion_length=12
    )
    engine.sync_weights()
    return engine


@pytest.mark.parametrize("arch", MODELS)
def test_experts_are_quantised_along_their_inputs_and_routers_not_at_all(arch: str) -> None:
    model = build(arch)
    live = dict(model.named_parameters())
    routers, experts = 0, 0
    for name, weight in synced_engine(model, "int4").policy.named_parameters():
        if re.search(ROUTER, name):
            routers += 1
            assert torch.equal(weight, live[name]), name
        elif weight.ndim == 3:
            experts += 1
            input_dim = -2 if arch in TRANSPOSED else -1
            expected = torch.stack(
                [fake_quantize(w if input_dim == -1 else w.T, "int4") for w in live[name]]
            ).transpose(-1, input_dim)
            assert torch.equal(weight, expected) and not torch.equal(weight, live[name]), name
    assert routers >= 1 and experts >= 2


@pytest.mark.parametrize("arch", MODELS)
def test_biases_norms_embeddings_and_the_head_stay(arch: str) -> None:
    model = build(arch)
    live = dict(model.named_parameters())
    for name, weight in synced_engine(model, "int8").policy.named_parameters():
        if live[name].ndim == 1 or re.search(r"bias|norm|embed_tokens|lm_head|sinks", name):
            assert type(weight.data) is torch.Tensor and torch.equal(weight, live[name]), name


@pytest.mark.parametrize("arch", MODELS)
def test_logprobs_of_quantised_experts_equal_a_forward_of_theirs(arch: str) -> None:
    engine = synced_engine(build(arch), "int4")
    torch.manual_seed(0)
    assert worst_error(engine, engine.policy, PROMPTS) < 1e-4


def test_a_scale_belongs_to_one_output_whatever_the_order() -> None:
    # Two experts, 2 inputs, 3 outputs. Each output has its own largest weight 7, 14, 21 and so the scale 1, 2, 3.
    by_output = torch.tensor([[7.0, 2.4], [14.0, 4.8], [21.0, 7.2]])
    expected = torch.tensor([[7.0, 2.0], [14.0, 4.0], [21.0, 6.0]])
    assert torch.equal(fake_quantize(by_output.expand(2, 3, 2), "int4"), expected.expand(2, 3, 2))
    assert torch.equal(fake_quantize(by_output.T.expand(2, 2, 3), "int4", -2), expected.T.expand(2, 2, 3))


@pytest.mark.parametrize("hidden", [64, 384])
def test_the_order_of_llama4_is_told_by_its_shapes(hidden: int) -> None:
    # 384 is twice the 192 of an expert, so that gate and up together are a square.
    model = tiny_model("llama4_text", **MODELS["llama4_text"] | {"hidden_size": hidden})
    found = quantizable_parameters(model, model.get_output_embeddings())
    assert {d for name, d in found.items() if ".experts." in name} == {-2}
    assert {d for name, d in found.items() if ".experts." not in name} == {-1}


def test_a_mixture_of_recurrent_gates_has_no_experts() -> None:
    # (heads, block, block) matrices that are no experts' stay as they are.
    model = tiny_model("recurrent_gemma", lru_width=64, block_types=["recurrent", "attention"])
    found = quantizable_parameters(model, model.get_output_embeddings())
    three = {name for name, parameter in model.named_parameters() if parameter.ndim == 3}
    assert any("rg_lru" in name for name in three) and not three & set(found)
