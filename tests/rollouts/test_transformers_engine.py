# SPDX-License-Identifier: Apache-2.0
"""The in-process engine: its log-probs against a forward of the same weights, its weights against the live ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from dc_trl.rollouts.precisions import PRECISIONS
from dc_trl.rollouts.quantization import fake_quantize
from dc_trl.rollouts.transformers import TransformersGeneration

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [13, 14, 15]]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3_tied": {"tie_word_embeddings": True},
    "llama": {},
    # A window shorter than prompt and completion together, so that the cache forgets.
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_moe": {},
}


def build_model(name: str, temperature: float = 1.0) -> PreTrainedModel:
    model = tiny_model(name.removesuffix("_tied"), **ARCHITECTURES[name])
    add_fused_lm_head(model, temperature=temperature)  # the trainer hands over a patched model
    return model


def build_engine(model: torch.nn.Module, **options: Any) -> TransformersGeneration:
    options = {"max_completion_length": 16, "eos_token_ids": [2]} | options
    return TransformersGeneration(model, Accelerator(cpu=True), tiny_tokenizer(), **options)


@torch.no_grad()
def teacher_forced(
    model: torch.nn.Module, prompt: list[int], completion: list[int], temperature: float
) -> list[float]:
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    logps = torch.log_softmax(logits / temperature, dim=-1)
    return logps.gather(1, torch.tensor(completion)[:, None]).squeeze(1).tolist()


def flat(nested: list[list[list[float]]]) -> list[float]:
    return [token[0] for sequence in nested for token in sequence]


def worst_error(engine: TransformersGeneration, model: torch.nn.Module, prompts: list[list[int]]) -> float:
    prompt_ids, completions, logprobs, _ = engine.generate(prompts, None, 1)
    pairs = zip(prompt_ids, completions, strict=True)
    expected = [x for p, c in pairs for x in teacher_forced(model, p, c, engine.temperature)]
    return max(abs(a - b) for a, b in zip(flat(logprobs), expected, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_equal_a_forward_of_the_live_model(name: str, temperature: float) -> None:
    model = build_model(name, temperature)
    torch.manual_seed(0)
    assert worst_error(build_engine(model, temperature=temperature), model, PROMPTS * 3) < 1e-4


def test_logprobs_equal_the_fused_head_of_the_trainer() -> None:
    model = build_model("qwen3", temperature=0.7)
    engine = build_engine(model, temperature=0.7, eos_token_ids=[])
    prompts = [[5, 6, 7], [8, 9, 10]]
    _, completions, logprobs, _ = engine.generate(prompts, None, 1)
    ids = torch.tensor([p + c for p, c in zip(prompts, completions, strict=True)])
    labels = torch.cat([torch.full((2, 3), -100), ids[:, 3:]], dim=1)
    with torch.no_grad():
        trained = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs[:, -16:]
    torch.testing.assert_close(torch.tensor(logprobs).squeeze(-1), trained, atol=1e-5, rtol=0)


@pytest.mark.parametrize("precision", ["int8", "fp8", "int4", "int3"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_logprobs_equal_a_forward_of_the_quantised_weights(name: str, precision: str) -> None:
    engine = build_engine(build_model(name), precision=precision, temperature=0.8)
    torch.manual_seed(0)
    assert worst_error(engine, engine.policy, PROMPTS) < 1e-4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_cast_precisions_stay_near_their_own_forward(precision: str) -> None:
    engine = build_engine(build_model("qwen3"), precision=precision)
    assert engine.quantization == "cast" and engine.policy.dtype == {"bf16": torch.bfloat16}.get(
        precision, torch.float16
    )
    torch.manual_seed(0)
    # One bfloat16 rounding of a logit of 10 is 0.03; a decode step and a whole forward round differently.
    assert worst_error(engine, engine.policy, PROMPTS) < 0.3


@pytest.mark.parametrize(("precision", "kind"), [(None, "none"), ("int8", "real"), ("fp8", "real"), ("int4", "fake")])
def test_the_way_of_quantising_is_told(precision: str | None, kind: str) -> None:
    if kind == "real":
        pytest.importorskip("torchao")
    assert build_engine(build_model("qwen3"), precision=precision).quantization == kind


def test_without_torchao_quantisation_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    engine = build_engine(build_model("qwen3"), precision="int8")
    assert engine.quantization == "fake"
    assert worst_error(engine, engine.policy, PROMPTS) < 1e-4


def test_real_and_simulated_quantisation_agree() -> None:
    pytest.importorskip("torchao")
    from dc_trl.rollouts.quantization import real_weight

    weight = torch.randn(64, 128)
    for precision in ("int8", "fp8"):
        real = (real_weight(weight.clone(), precision).dequantize() - weight).abs().mean()
        simulated = (fake_quantize(weight, precision) - weight).abs().mean()
        # torchao spreads int8 over 127.5 codes where the simulation uses 127: equal errors, not equal values.
        assert abs(real / simulated - 1) < 0.05


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantisation_moves_the_layers_and_the_experts_only(precision: str) -> None:
    model = build_model("qwen3_moe")
    live = dict(model.named_parameters())
    engine = build_engine(model, precision=precision)
    engine.sync_weights()
    for name, parameter in engine.policy.named_parameters():
        value = parameter.dequantize() if type(parameter.data) is not torch.Tensor else parameter
        assert torch.equal(value, live[name]) != ("_proj" in name), name


def test_fake_quantize_by_hand() -> None:
    # Largest int4 code 7, so the scale is 7 / 7 = 1: 2.4 -> 2, -3.6 -> -4. The zero row has no scale and stays zero.
    weight = torch.tensor([[7.0, 2.4, -3.6], [0.0, 0.0, 0.0]])
    assert fake_quantize(weight, "int4").tolist() == [[7.0, 2.0, -4.0], [0.0, 0.0, 0.0]]
    # Largest int3 code 3: the scale is 7 / 3, 2.4 -> 1.03 -> 1, -3.6 -> -1.54 -> -2.
    torch.testing.assert_close(fake_quantize(weight[0], "int3"), torch.tensor([3.0, 1.0, -2.0]) * 7 / 3)
    # e4m3 has 3 fraction bits: at scale 448 / 448 = 1, 17 lies halfway between 16 and 18 and goes to the even 16.
    assert fake_quantize(torch.tensor([448.0, 17.0, 0.4]), "fp8").tolist() == [448.0, 16.0, 0.40625]


def test_fake_quantize_groups_are_separate() -> None:
    weight = torch.full((1, 130), 0.01)
    weight[0, 0] = 7.0
    rounded = fake_quantize(weight, "int4")
    assert rounded[0, 1:128].abs().max() == 0  # in the group of the outlier
    torch.testing.assert_close(rounded[0, 128:], weight[0, 128:])  # in the next, short one


@pytest.mark.parametrize("precision", [None, "int8", "int4"])
def test_sync_follows_the_live_weights_and_leaves_them(precision: str | None) -> None:
    model = build_model("qwen3_tied")
    engine = build_engine(model, precision=precision, eos_token_ids=[])
    before = engine.generate([[5, 6, 7]], None, 1, greedy=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert engine.generate([[5, 6, 7]], None, 1, greedy=True) == before
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.sync_weights()
    assert engine.generate([[5, 6, 7]], None, 1, greedy=True)[2] != before[2]
    fresh = build_engine(model, precision=precision, eos_token_ids=[])
    assert flat(engine.generate([[5, 6, 7]], None, 1, greedy=True)[2]) == flat(
        fresh.generate([[5, 6, 7]], None, 1, greedy=True)[2]
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, frozen[name]) and parameter.requires_grad


def lora_model(**options: Any) -> tuple[Any, Any]:
    peft = pytest.importorskip("peft")
    options = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]} | options
    name = options.pop("name", "qwen3")
    model = peft.get_peft_model(build_model(name), peft.LoraConfig(**options))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(std=0.1)
    return model.eval(), peft


@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["lm_head"], "name": "qwen3_tied"}, {"target_modules": ["embed_tokens", "v_proj"]}],
    ids=["plain", "saved_head", "embedding"],
)
def test_lora_is_merged_without_a_trace(options: dict[str, Any]) -> None:
    model, _ = lora_model(**options)
    if "modules_to_save" in options:
        with torch.no_grad():
            model.base_model.model.lm_head.weight.mul_(1.1)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = build_engine(model)
    for _ in range(3):
        engine.sync_weights()
    assert worst_error(engine, model, PROMPTS) < 1e-4
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters())
    assert not any("lora" in name for name, _ in engine.policy.named_parameters())


def test_lora_that_is_not_applied_is_noticed() -> None:
    model, _ = lora_model()
    engine = build_engine(model)
    engine.sync_weights()
    with model.disable_adapter():
        assert worst_error(engine, model, PROMPTS) > 1e-2


def test_lora_on_fused_experts_is_merged() -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model, _ = lora_model(name="qwen3_moe", target_modules=["q_proj"], target_parameters=parameters)
    assert worst_error(build_engine(model), model, PROMPTS) < 1e-4


def test_a_compiled_model_is_unwrapped() -> None:
    model = build_model("qwen3")
    engine = build_engine(torch.compile(model))
    assert type(engine.policy) is type(model)
    assert worst_error(engine, model, PROMPTS) < 1e-4


def test_completions_end_with_the_first_end_token() -> None:
    model = build_model("qwen3")
    engine = build_engine(model, eos_token_ids=list(range(2, 30)), max_completion_length=40)
    torch.manual_seed(0)
    _, completions, logprobs, ids = engine.generate([[5 + i % 3] * (1 + i % 5) for i in range(48)], None, 1)
    ends = set(range(2, 30))
    for completion, values, tokens in zip(completions, logprobs, ids, strict=True):
        assert not ends.intersection(completion[:-1])
        assert completion[-1] in ends or len(completion) == 40
        assert len(values) == len(completion) and [t[0] for t in tokens] == completion
    assert len({len(c) for c in completions}) > 4  # so rows were dropped on the way
    torch.manual_seed(0)
    assert worst_error(engine, model, [[5 + i % 3] * (1 + i % 5) for i in range(48)]) < 1e-4


def test_draws_follow_the_distribution() -> None:
    model = build_model("qwen3", temperature=0.5)
    engine = build_engine(model, temperature=0.5, max_completion_length=1)
    torch.manual_seed(0)
    _, completions, _, _ = engine.generate([[5, 6, 7]] * 4000, None, 4000)
    counts = torch.bincount(torch.tensor(completions).squeeze(1), minlength=model.config.vocab_size)
    with torch.no_grad():
        expected = torch.softmax(model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.5, dim=-1)
    # A mean of 4000 draws is off by at most sqrt(1/4 / 4000) = 0.008 in one standard deviation.
    assert (counts / 4000 - expected).abs().max() < 0.035


def test_chunks_cover_all_prompts_in_order() -> None:
    model = build_model("llama")
    whole = build_engine(model).generate(PROMPTS, None, 1, greedy=True)
    parts = build_engine(model, generation_batch_size=3).generate(PROMPTS, None, 1, greedy=True)
    assert whole[:2] == parts[:2]
    torch.testing.assert_close(flat(whole[2]), flat(parts[2]), atol=1e-4, rtol=0)


def test_the_global_generator_decides() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    engine = build_engine(build_model("qwen3"), precision="int8")
    assert torch.equal(torch.get_rng_state(), state)  # building and probing draw nothing
    first = engine.generate(PROMPTS, None, 1)
    second = engine.generate(PROMPTS, None, 1)
    torch.set_rng_state(state)
    assert engine.generate(PROMPTS, None, 1) == first != second


def test_a_seed_makes_a_private_generator() -> None:
    model = build_model("qwen3")
    state = torch.get_rng_state()
    runs = [build_engine(model, seed=5).generate(PROMPTS, None, 1) for _ in range(2)]
    assert runs[0] == runs[1] and torch.equal(torch.get_rng_state(), state)


def test_greedy_takes_the_most_likely_token() -> None:
    model = build_model("qwen3")
    _, completions, _, _ = build_engine(model).generate([[5, 6, 7]], None, 1, greedy=True)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7, *completions[0]]])).logits[0, 2:-1]
    assert completions[0] == logits.argmax(dim=-1).tolist()


def test_lower_precision_is_further_from_the_live_model() -> None:
    model = build_model("qwen3")
    errors = {}
    for precision in ("int8", "int4", "int3"):
        torch.manual_seed(0)
        errors[precision] = worst_error(build_engine(model, precision=precision), model, PROMPTS)
    assert 0 < errors["int8"] < errors["int4"] < errors["int3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int5"}, "'int5'.*int4"),
        ({"temperature": 0.0}, "temperature is 0.0.*greedy"),
        ({"max_completion_length": 0}, "max_completion_length is 0"),
        ({"generation_kwargs": {"top_p": 0.9}}, "top_p=0.9"),
        ({"generation_kwargs": {"top_k": 20}}, "top_k=20"),
        ({"generation_kwargs": {"stop": "x"}}, "stop='x'"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_engine(build_model("qwen3"), **options)


def test_neutral_options_are_accepted() -> None:
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    engine = build_engine(build_model("qwen3"), generation_kwargs=neutral)
    assert len(engine.generate([[5, 6]], None, 1)[1]) == 1


def test_images_and_empty_prompts_are_refused() -> None:
    engine = build_engine(build_model("qwen3"))
    with pytest.raises(ValueError, match="text-only"):
        engine.generate([[5]], [[object()]], 1)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        engine.generate([[5], []], None, 1)
    assert engine.generate([], None, 1) == ([], [], [], [])


def test_diverged_weights_are_an_error() -> None:
    model = build_model("qwen3")
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        build_engine(model).generate(PROMPTS, None, 1)


def test_it_slots_into_grpo_trainer(tmp_path: Path) -> None:
    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=12,
        max_steps=2,
        learning_rate=1e-3,
        temperature=0.9,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
    )
    trainer = GRPOTrainer(
        model=tiny_model(),
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["1+2=", "33+4=", "5="] * 4}),
        processing_class=tiny_tokenizer(),
    )
    options = {"temperature": 0.9, "max_completion_length": 12, "eos_token_ids": trainer.eos_token_ids}
    engine = TransformersGeneration(trainer.model, trainer.accelerator, trainer.processing_class, **options)
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, engine, -1
    trainer.train()
    # The second step samples from weights that the first one moved: without a sync they would differ by far more.
    worst = [h["sampling/sampling_logp_difference/max"] for h in trainer.state.log_history if "loss" in h]
    assert len(worst) == 2 and 0 < max(worst) < 1e-4


def test_a_model_without_linear_layers_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no nn.Linear") as unusable:
        build_engine(model, precision="int4")
    with pytest.raises(ValueError, match="`rollout_precision` is 'int2', which is unknown") as unknown:
        build_engine(model, precision="int2")
    # Words that a recipe or a command line can hold: None is none of them.
    for error in (unusable, unknown):
        assert "leave it unset" in str(error.value) and "None" not in str(error.value)
    assert "bf16, fp16, fp8" in str(unknown.value) and "one of bf16, fp16, or" in str(unusable.value)
    assert worst_error(build_engine(model), model.eval(), PROMPTS) < 1e-4


def test_precisions_are_the_documented_ones() -> None:
    assert PRECISIONS == ("bf16", "fp16", "fp8", "int8", "int4", "int3")
