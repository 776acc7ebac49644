# SPDX-License-Identifier: Apache-2.0
"""Router replay's recording: the in-process engine keeps which experts each token was sampled through."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from dc_trl.rollouts.router_replay import UNKNOWN, RouterRecorder
from dc_trl.rollouts.transformers import TransformersGeneration

EXPERTS, CHOSEN, LAYERS = 8, 3, 2


def mixture() -> PreTrainedModel:
    return tiny_model("qwen3_moe", num_experts=EXPERTS, num_experts_per_tok=CHOSEN)


def build_engine(model: PreTrainedModel, **options: Any) -> TransformersGeneration:
    options = {"max_completion_length": 12, "eos_token_ids": [2, *range(40, 60)]} | options
    return TransformersGeneration(model, Accelerator(cpu=True), tiny_tokenizer(), **options)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_the_engine_records_what_a_forward_over_the_tokens_chooses(batch_size: int | None) -> None:
    model = mixture().eval()
    engine = build_engine(model, seed=0, record_routes=True, generation_batch_size=batch_size)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [13, 14, 15], [12], [12], [16, 17], [13, 14, 15], [18]]
    _, completions, _, _ = engine.generate(prompts)
    # Half of them end before the longest does, so that rows are dropped from the batch while others go on.
    lengths = sorted(len(completion) for completion in completions)
    assert lengths[len(lengths) // 2] < lengths[-1] and len(engine.last_routes) == len(prompts)
    for prompt, completion, routes in zip(prompts, completions, engine.last_routes, strict=True):
        with torch.no_grad(), RouterRecorder(model) as recorder:
            model(input_ids=torch.tensor([prompt + completion]))
            expected = recorder.take(1)[0]
        assert routes.shape == (len(prompt) + len(completion), LAYERS, CHOSEN) and routes.dtype == torch.int8
        assert torch.equal(routes[:-1], expected[:-1])
        assert (routes[-1] == UNKNOWN).all()  # the last token was drawn and never fed
    # The recording is over with the call: a forward of the policy leaves nothing behind.
    engine.policy(input_ids=torch.tensor([[5]]))
    assert not any(engine._recorder._chosen)


@pytest.mark.parametrize("precision", [None, "bf16", "int8"])
def test_recording_leaves_the_samples_as_they_are(precision: str | None) -> None:
    model, prompts = mixture(), [[5, 6, 7], [8, 9]] * 3
    plain = build_engine(model, precision=precision, seed=0).generate(prompts)
    engine = build_engine(model, precision=precision, seed=0, record_routes=True)
    assert engine.generate(prompts) == plain
    silent = build_engine(model, precision=precision, seed=0)
    silent.generate(prompts)
    assert silent.last_routes == []


def test_an_engine_refuses_to_record_a_dense_model() -> None:
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no experts"):
        build_engine(tiny_model(), record_routes=True)
