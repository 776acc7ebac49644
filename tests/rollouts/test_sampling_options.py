# SPDX-License-Identifier: Apache-2.0
"""Sampling options: what may reach an engine, what is refused before a model loads, and the way out."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import dc_trainer, logged
from test_transformers_engine import build_engine, build_model
from transformers import GenerationConfig

from dc_trl import DCGRPOConfig, DCGRPOTrainer
from dc_trl.rollouts.sampling_options import ANY_ENGINE, IN_PROCESS, OPTIONS, VLLM, objection

SETTINGS = {"temperature": 0.7, "max_completion_length": 32}
NEUTRAL = [(name, value) for name, option in OPTIONS.items() for value in option.neutral]
# Fields of vLLM's SamplingParams that are refused at any value: of streaming, of scoring prompts, or vLLM's own.
NO_VALUE_PASSES = {
    "output_kind",
    "stream_interval",
    "skip_clone",
    "output_text_buffer_length",
    "prompt_logprob_token_ids",
    "prompt_logprob_start",
}
# At some value these move the distribution (the end-of-sequence token is masked, a token is forced, a grammar holds),
# or the log-prob that TRL reads.
HARMFUL = {
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {3: 1.0},
    "bad_words": ["no"],
    "allowed_token_ids": [1, 2],
    "structured_outputs": {"regex": "[0-9]+"},
    "min_tokens": 4,
    "thinking_token_budget": 16,
    "trace_decode_token_ids": [1, 2],
    "watermarking": True,
    "extra_args": {"mirostat": 1},
    "logprobs": 5,
    "logprob_token_ids": [7],
    "flat_logprobs": True,
    "n": 2,
    "temperature": 0.5,
    "mirostat_mode": 2,
}
FREE = {
    "seed": 3,
    "stop": ["\n"],
    "stop_token_ids": [7],
    "ignore_eos": True,
    "max_tokens": 8,
    "prompt_logprobs": 1,
    "skip_reading_prefix_cache": True,
}


def config(tmp_path: Path, **options: Any) -> DCGRPOConfig:
    return DCGRPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False, **(SETTINGS | options))


def test_every_sampling_parameter_of_vllm_is_decided() -> None:
    parameters = pytest.importorskip("vllm.sampling_params").SamplingParams
    public = {name for name in parameters.__struct_fields__ if not name.startswith("_")}
    assert public == {name for name, option in OPTIONS.items() if option.vllm} | NO_VALUE_PASSES
    assert set(HARMFUL) - {"mirostat_mode"} <= public  # the last is no option of vLLM at all


def test_neutral_values_are_values_that_vllm_takes() -> None:
    parameters = pytest.importorskip("vllm.sampling_params").SamplingParams
    unset = parameters(logprobs=0)
    for name, value in NEUTRAL:
        if OPTIONS[name].vllm:
            taken = getattr(parameters(**{"logprobs": 0, name: value}), name)
            assert taken in (value, getattr(unset, name)), f"{name}={value!r} is {taken!r} to vLLM"


def test_none_is_unset_to_transformers_and_an_error_to_vllm(tmp_path: Path) -> None:
    parameters = pytest.importorskip("vllm.sampling_params").SamplingParams
    for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
        with pytest.raises(TypeError):
            parameters(**{name: None})
        with pytest.raises(ValueError, match=f"{name}.*does not take None.*Leave it unset"):
            config(tmp_path, use_vllm=True, generation_kwargs={name: None})
        args = config(tmp_path, rollout_backend="transformers", generation_kwargs={name: None})
        assert build_engine(build_model("qwen3"), generation_kwargs=args.generation_kwargs)


def test_the_other_names_are_transformers_own() -> None:
    others = {name for name, option in OPTIONS.items() if not option.vllm}
    known = vars(GenerationConfig())
    assert others <= set(known)
    GenerationConfig(**{name: OPTIONS[name].neutral[-1] for name in others if OPTIONS[name].neutral}).validate()


def test_trl_reads_the_first_of_several_log_probs_not_the_sampled_ones() -> None:
    generation = pytest.importorskip("trl.generation.vllm_generation")

    def read(*entries: tuple[int, int, float]) -> float:
        position = {token: SimpleNamespace(rank=rank, logprob=logprob) for token, rank, logprob in entries}
        output = SimpleNamespace(outputs=[SimpleNamespace(logprobs=[position])])
        return generation.extract_logprobs([output])[0][0][0][0]  # what `_generate_single_turn` takes

    sampled, likeliest = (11, 40, -3.5), (5, 1, -0.2)
    assert read(sampled) == -3.5  # logprobs=0
    assert read(sampled, likeliest) == -0.2  # logprobs=1: another token's


@pytest.mark.parametrize("engine", [{}, {"use_vllm": True}, {"rollout_backend": "transformers"}], ids=str)
@pytest.mark.parametrize(("name", "value"), HARMFUL.items())
def test_what_moves_distribution_or_log_prob_is_refused_by_name(
    tmp_path: Path, name: str, value: Any, engine: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=rf"`generation_kwargs\['{name}'\]`.*constraint='none'") as error:
        config(tmp_path, generation_kwargs={name: value}, **engine)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(("name", "value"), HARMFUL.items())
def test_without_constraint_they_are_trls_business_but_not_the_in_process_engines(
    tmp_path: Path, name: str, value: Any
) -> None:
    for engine in ({}, {"use_vllm": True}):
        assert config(tmp_path, constraint="none", generation_kwargs={name: value}, **engine)
    with pytest.raises(ValueError, match="leave `rollout_backend` unset.*use_vllm=True"):
        config(tmp_path, constraint="none", rollout_backend="transformers", generation_kwargs={name: value})
    with pytest.raises(ValueError, match=f"{name}=.*leave `rollout_backend` unset.*use_vllm=True"):
        build_engine(build_model("qwen3"), generation_kwargs={name: value})


@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p"])
@pytest.mark.parametrize(
    ("installed", "words"),
    [
        ("1.15.0", "TRL 1.15.0 scores under the whole softmax; it corrects for truncation from 1.17 on"),
        ("1.16.1", "TRL 1.16.1 scores under the whole softmax"),
        ("1.17.0.dev0", "TRL 1.17.0.dev0 corrects its importance sampling for that, but no constraint was tried"),
        ("2.0.0", "TRL 2.0.0 corrects"),
    ],
)
def test_the_reason_against_truncation_is_that_of_the_installed_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, installed: str, words: str
) -> None:
    monkeypatch.setattr("dc_trl.rollouts.versions.version", {"trl": installed}.__getitem__)
    for engine in ({}, {"use_vllm": True}):
        with pytest.raises(ValueError, match=rf"`{name}`.*{words}.*constraint='none'"):
            config(tmp_path, **{name: HARMFUL[name]}, **engine)
        assert config(tmp_path, constraint="none", **{name: HARMFUL[name]}, **engine)
    with pytest.raises(ValueError, match=f"`{name}`") as error:
        config(tmp_path, rollout_backend="transformers", **{name: HARMFUL[name]})
    assert "TRL 1" not in str(error.value) and "TRL 2" not in str(error.value)


@pytest.mark.parametrize(("name", "value"), FREE.items())
def test_what_ends_or_seeds_a_completion_passes_on_vllm_alone(tmp_path: Path, name: str, value: Any) -> None:
    for engine in ({}, {"use_vllm": True}):
        assert config(tmp_path, generation_kwargs={name: value}, **engine)
    with pytest.raises(ValueError, match=f"{name}.*does not follow it.*use_vllm=True"):
        config(tmp_path, rollout_backend="transformers", generation_kwargs={name: value})


@pytest.mark.parametrize(("name", "value"), [*NEUTRAL, ("temperature", 0.7), ("max_tokens", 32)], ids=str)
def test_the_in_process_engine_takes_what_its_config_takes(tmp_path: Path, name: str, value: Any) -> None:
    args = config(tmp_path, rollout_backend="transformers", generation_kwargs={name: value})
    options = {"temperature": args.temperature, "max_completion_length": 32, "generation_kwargs": {name: value}}
    assert build_engine(build_model("qwen3", 0.7), **options).temperature == 0.7
    assert config(tmp_path, generation_kwargs={name: value})  # for a rollout_func
    if OPTIONS[name].vllm:
        assert config(tmp_path, use_vllm=True, generation_kwargs={name: value})
    else:
        with pytest.raises(ValueError, match=f"{name}.*vLLM has no such option"):
            config(tmp_path, use_vllm=True, generation_kwargs={name: value})


def test_neutral_options_train_in_process(tmp_path: Path) -> None:
    neutral = {"temperature": 0.7, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0, "logprobs": 0}
    trainer = dc_trainer(tmp_path, temperature=0.7, rollout_precision=None, max_steps=1, generation_kwargs=neutral)
    trainer.train()
    assert 0 < logged(trainer, "dc/discrepancy/mean")[0] < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"max_completion_length": 0}, "max_completion_length is 0"),
        ({"top_p": 0.9}, "`top_p` is 0.9"),
        ({"vllm_structured_outputs_regex": "[0-9]+"}, "`vllm_structured_outputs_regex`"),
    ],
    ids=str,
)
def test_the_in_process_engine_is_checked_before_a_model_loads(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        args = config(tmp_path, constraint="none", rollout_backend="transformers", **options)
        DCGRPOTrainer("no/such-model", lambda **_: [], args)


def test_a_value_that_would_be_none_is_left_unset() -> None:
    for name in ("logit_bias", "structured_outputs"):
        words = objection(name, 0.1, ANY_ENGINE, SETTINGS)
        assert words is not None and "Leave it unset" in words and "None" not in words
    for engine in (VLLM, IN_PROCESS, ANY_ENGINE):
        assert objection("logit_bias", None, engine, SETTINGS) is None
