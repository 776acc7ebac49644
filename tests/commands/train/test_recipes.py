# SPDX-License-Identifier: Apache-2.0
"""Recipes and Accelerate configurations: cited, and right in their batches; plans made offline; the planning maths."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from example_scripts import load_example
from places import ROOT
from problems import dapo_rows, write
from transformers import AutoConfig

from dc_trl.commands.cli import main
from dc_trl.commands.train.arguments import find_accelerate_config, make_parser
from dc_trl.commands.train.plan import (
    GIB,
    BatchPlan,
    EnginePlan,
    Launch,
    ModelSize,
    activation_bytes,
    gathered_bytes,
    read_accelerate_config,
    state_bytes,
    weight_bytes_of,
)
from dc_trl.config import DCGRPOConfig

RECIPES = ROOT / "examples" / "configs"
ACCELERATE = ROOT / "accelerate_configs"

# The public architectures, from the models' config.json; parameters as their model cards count them.
ARCHITECTURES: dict[str, tuple[int, dict[str, Any]]] = {
    "Qwen/Qwen3-0.6B": (
        596_049_920,
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
        | {"num_key_value_heads": 8, "tie_word_embeddings": True},
    ),
    "Qwen/Qwen3-4B-Base": (
        4_022_468_096,
        {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "tie_word_embeddings": True},
    ),
    "Qwen/Qwen3-8B": (
        8_190_735_360,
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "tie_word_embeddings": False},
    ),
    "Qwen/Qwen3-30B-A3B": (
        30_532_122_624,
        {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32}
        | {"num_key_value_heads": 4, "tie_word_embeddings": False, "num_experts": 128, "num_experts_per_tok": 8}
        | {"moe_intermediate_size": 768},
    ),
}

# Recipe → Accelerate configuration and launcher flags, processes, completions an update, a generation batch, prompts.
PLANS: dict[str, tuple[str, list[str], int, int, int, int]] = {
    "qwen3_8b_bf16": ("fsdp2", [], 8, 128, 512, 64),
    "qwen3_8b_fp8_rollout": ("fsdp2", ["--num_processes", "4"], 4, 128, 512, 64),
    "qwen3_30b_a3b": ("multi_node", [], 16, 128, 512, 64),
    "qwen3_4b_length_decay": ("multi_node", [], 16, 1024, 1024, 64),
    "qwen3_0.6b_single_gpu": ("single_gpu", [], 1, 128, 128, 16),
    "tiny_cpu": ("single_gpu", [], 1, 32, 64, 8),
}


def architecture(name: str) -> Any:
    fields = ARCHITECTURES[name][1]
    kind = "qwen3_moe" if "num_experts" in fields else "qwen3"
    return AutoConfig.for_model(kind, **({"vocab_size": 151_936, "head_dim": 128} | fields))


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def size_8b() -> ModelSize:
    return ModelSize.from_config(architecture("Qwen/Qwen3-8B"))


# Recipes


def test_every_recipe_is_here_and_tested() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(PLANS)


@pytest.mark.parametrize("name", PLANS)
def test_every_value_cites_its_source(name: str) -> None:
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# Hardware: ")
    assert ("Run by us" in lines[0]) == (name == "tiny_cpu") and ("ot run by us" in lines[0]) == (name != "tiny_cpu")
    for line in lines:
        if line and not line.startswith("#"):
            assert re.search(r"^[\w]+: .+ # \[(paper|secondary source|ours)\]", line), line


@pytest.mark.parametrize("name", PLANS)
def test_the_commands_of_a_recipe_exist(name: str) -> None:
    head = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").partition("\nmodel_name_or_path")[0]
    assert f"dc-trl train --config examples/configs/{name}.yaml" in head
    assert f"examples/train_math.py --config examples/configs/{name}.yaml" in head
    for path in re.findall(r"(?:accelerate_configs|examples)/[\w./]+\.(?:yaml|py)", head):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("qwen3_8b_bf16", {"multiplier_init": 0.1}),
        ("qwen3_8b_fp8_rollout", {"multiplier_init": 0.1, "vllm_mode": "server"}),
        ("qwen3_30b_a3b", {"multiplier_init": 0.05, "vllm_tensor_parallel_size": 4}),
    ],
)
def test_dc_grpo_recipes_have_the_papers_values(name: str, values: dict[str, Any]) -> None:
    # Section 1 of the method, "Values": arXiv 2606.08779 and the secondary source.
    shared = {
        "constraint": "lagrangian",
        "discrepancy_metric": "prob_diff",
        "discrepancy_level": "token",
        "dual_lr": 1.0,
    }
    shared |= {"learning_rate": 1e-6, "adam_beta1": 0.9, "adam_beta2": 0.95, "beta": 0.0, "num_generations": 8}
    shared |= {"max_completion_length": 8192, "temperature": 1.0, "top_p": 1.0, "discrepancy_tolerance": None}
    assert shared | values == {key: recipe(name)[key] for key in shared | values}


def test_length_decay_recipe_has_the_papers_values() -> None:
    # Appendix C of arXiv 2602.01826.
    values = {"learning_rate": 1e-6, "weight_decay": 0.01, "max_grad_norm": 1.0, "num_generations": 16, "beta": 0.0}
    values |= {"epsilon": 0.2, "epsilon_high": 0.28, "vllm_importance_sampling_clip_max": 2.0, "num_iterations": 1}
    values |= {"advantage_estimator": "rloo", "zero_variance_groups": "drop", "max_completion_length": 8192}
    values |= {"length_decay": True, "length_decay_min_lr_ratio": 0.1, "temperature": 1.0}
    assert values == {key: recipe("qwen3_4b_length_decay")[key] for key in values}


@pytest.mark.parametrize("name", PLANS)
def test_trl_makes_the_batches_that_the_plan_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, processes, update, generation, prompts = PLANS[name]
    monkeypatch.setattr(DCGRPOConfig, "world_size", property(lambda self: processes))
    flags = ["--config", str(RECIPES / f"{name}.yaml"), "--use_cpu", "true", "--output_dir", "x"]
    _, args, _ = make_parser().parse_args_and_config(flags)
    plan = BatchPlan.from_args(args, processes)
    assert plan.completions_per_update == update
    assert plan.generation_batch == args.generation_batch_size == generation
    assert plan.prompts_per_generation == prompts
    assert plan.updates_per_generation == generation / update
    assert plan.aligned == (generation == update)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Invented problems in DAPO's columns, and directories with the true configurations and a tiny tokenizer."""
    folder = tmp_path_factory.mktemp("stand_ins")
    write(folder / "dapo.parquet", dapo_rows(problems=40, repeats=3))
    example = load_example("make_tiny_policy")
    example.main(folder / "tiny")
    for name in ARCHITECTURES:
        architecture(name).save_pretrained(folder / name)
        example.make_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", PLANS)
def test_dry_run_offline(name: str, stand_ins: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("dc_trl.commands.train.run.train", lambda *args: pytest.fail("it trains"))
    accelerate, launcher, processes, update, generation, prompts = PLANS[name]
    model = stand_ins / "tiny" / "policy" if name == "tiny_cpu" else stand_ins / recipe(name)["model_name_or_path"]
    flags = ["--model_name_or_path", str(model), "--dataset_name", str(stand_ins / "dapo.parquet"), *launcher]
    command = ["train", "--config", str(RECIPES / f"{name}.yaml"), "--accelerate_config", accelerate, "--dry_run"]
    assert main([*command, *flags]) == 0
    plan = capsys.readouterr().out
    count = 103_232 if name == "tiny_cpu" else ARCHITECTURES[recipe(name)["model_name_or_path"]][0]
    rows = dict(re.findall(r"^  (\S.*?)  +(.*)$", plan, flags=re.MULTILINE))
    assert rows["processes"].startswith(f"{processes}, ")
    assert rows["completions per update"].startswith(f"{update:,} = ")
    assert rows["completions per generation batch"].startswith(f"{generation:,} = {prompts} prompts × ")
    assert name == "tiny_cpu" or rows["parameters"].startswith(f"{count:,} ")
    assert rows["problems"] == ("120" if name == "tiny_cpu" else "40")  # the others drop repeated rows
    assert rows["extra forwards for it"] == "0"
    assert "DOES NOT FIT" not in plan
    assert not list(tmp_path.iterdir())


# Accelerate configurations


@pytest.mark.parametrize(
    ("name", "kind", "launch"),
    [
        ("single_gpu", "NO", Launch(1, "none")),
        ("multi_gpu", "MULTI_GPU", Launch(8, "none")),
        ("fsdp2", "FSDP", Launch(8, "fsdp2")),
        ("deepspeed_zero2", "DEEPSPEED", Launch(8, "zero2")),
        ("deepspeed_zero3", "DEEPSPEED", Launch(8, "zero3")),
        ("multi_node", "FSDP", Launch(16, "fsdp2")),
    ],
)
def test_accelerate_loads_its_configurations(name: str, kind: str, launch: Launch) -> None:
    path = find_accelerate_config(name)
    assert path == ACCELERATE / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert (config.distributed_type, config.mixed_precision, config.use_cpu) == (kind, "bf16", False)
    assert config.num_machines == (2 if name == "multi_node" else 1)
    assert config.num_processes == launch.processes and config.num_processes % config.num_machines == 0
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert not config.fsdp_config["fsdp_activation_checkpointing"]  # TRL's gradient checkpointing is on
    assert Launch.from_accelerate(read_accelerate_config(path)) == launch
    assert Launch.from_accelerate(read_accelerate_config(path), processes=4).processes == 4


def test_there_are_no_others() -> None:
    names = {"single_gpu", "multi_gpu", "fsdp2", "deepspeed_zero2", "deepspeed_zero3", "multi_node"}
    assert {path.stem for path in ACCELERATE.iterdir()} == names


# Planning


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts_parameters_without_weights(name: str) -> None:
    assert ModelSize.from_config(architecture(name)).parameters == ARCHITECTURES[name][0]


def test_state_of_eight_billion_parameters(size_8b: ModelSize) -> None:
    p = 8_190_735_360
    # FSDP2 on 8 GPUs: 4 + 4 + 8 bytes a parameter over 8.
    assert state_bytes(size_8b, Launch(8, "fsdp2")) == {"weights": p / 2, "gradients": p / 2, "optimizer": p}
    # ZeRO-2: bf16 weights whole; bf16 gradients and float32 master weights with two moments over 8.
    assert state_bytes(size_8b, Launch(8, "zero2")) == {"weights": 2 * p, "gradients": p / 4, "optimizer": 1.5 * p}
    assert state_bytes(size_8b, Launch(8, "zero3")) == {"weights": p / 4, "gradients": p / 4, "optimizer": 1.5 * p}
    # Data parallel: float32 weights and their bf16 copies, gradients and their buckets, two moments.
    assert state_bytes(size_8b, Launch(8)) == {"weights": 6 * p, "gradients": 8 * p, "optimizer": 8 * p}
    # One process, float32 throughout: 16 bytes a parameter.
    assert sum(state_bytes(size_8b, Launch(), bf16=False).values()) == 16 * p
    with pytest.raises(ValueError, match="`sharding` is 'zero1'"):
        state_bytes(size_8b, Launch(8, "zero1"))


def test_caches_and_syncs_of_eight_billion_parameters(size_8b: ModelSize) -> None:
    # Keys and values × 36 layers × 8 heads × 128 × 2 bytes.
    assert size_8b.kv_bytes_per_token() == 2 * 36 * 8 * 128 * 2 == 147_456
    assert size_8b.kv_bytes_per_token(bytes_per_element=1) == 73_728
    assert size_8b.sync_bytes() == 4 * 8_190_735_360
    # Half of 80 GiB less 2 bytes a parameter, over 147,456 bytes a token.
    assert EnginePlan(0.5).kv_tokens(size_8b, 80 * GIB) == (40 * GIB - 2 * 8_190_735_360) // 147_456
    assert EnginePlan(0.1).kv_tokens(size_8b, 80 * GIB) < 0


def test_activations_and_gathered_weights(size_8b: ModelSize) -> None:
    # Layer inputs: 2 bytes × 2 sequences × 100 tokens × 4,096 × 36; one layer recomputed:
    # 8 × 4,096 + 3 × 12,288 + 2 × 128 × (32 + 8) = 79,872 elements a token.
    assert size_8b.working_set == 79_872
    assert activation_bytes(size_8b, 2, 100) == 2 * 200 * 4096 * 36 + 2 * 200 * 79_872
    assert activation_bytes(size_8b, 2, 100, checkpoint=False) == 2 * 200 * 79_872 * 36
    # Embeddings, head and final norm, and two layers of 192,946,432, in bf16.
    outside = 8_190_735_360 - 36 * 192_946_432
    assert gathered_bytes(size_8b, Launch(8, "fsdp2")) == 2 * (outside + 2 * 192_946_432)
    assert gathered_bytes(size_8b, Launch(8, "zero2")) == 0


def test_batch_arithmetic() -> None:
    # 2 × 8 GPUs × 8 = 128 completions an update; 2 × 8 × 32 = 512 a generation batch, 64 prompts, 4 updates.
    plan = BatchPlan(2, 8, accumulation=8, steps_per_generation=32, generations=8)
    assert (plan.completions_per_update, plan.generation_batch) == (128, 512)
    assert (plan.prompts_per_generation, plan.updates_per_generation, plan.aligned) == (64, 4.0, False)
    # Every batch twice: twice the updates. One batch in half an update: aligned.
    assert BatchPlan(2, 8, 8, 32, 8, iterations=2).updates_per_generation == 8
    assert BatchPlan(2, 8, 8, 4, 8).aligned and BatchPlan(2, 8, 8, 4, 8).updates_per_generation == 0.5


def test_a_generation_batch_fixes_the_steps(tmp_path: Path) -> None:
    args = DCGRPOConfig(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=4, steps_per_generation=8, num_generations=8
    )
    assert BatchPlan.from_args(args, 8, generation_batch_size=512).steps_per_generation == 16
    with pytest.raises(ValueError, match="`generation_batch_size` is 500, not a multiple .* 4 × 8"):
        BatchPlan.from_args(args, 8, generation_batch_size=500)
    args.num_generations = 7
    with pytest.raises(ValueError, match="256 completions does not divide into groups of `num_generations` = 7"):
        BatchPlan.from_args(args, 8)


def test_launch_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    assert Launch.from_environment() == Launch(1, "none")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert Launch.from_environment() == Launch(8, "zero3")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert Launch.from_environment() == Launch(8, "fsdp2")


def test_bytes_of_a_loaded_parameter() -> None:
    assert [weight_bytes_of(dtype) for dtype in ("float32", "bfloat16", "float16", "auto", None)] == [4, 2, 2, 2, 4]


def test_scaling_guide_has_the_plans_numbers(size_8b: ModelSize) -> None:
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    moe = ModelSize.from_config(architecture("Qwen/Qwen3-30B-A3B"))
    for model in (size_8b, moe):
        for number in (model.parameters, model.kv_bytes_per_token(), model.sync_bytes(), model.sync_bytes(2)):
            assert f"{number:,}" in text, number
    for processes, sharding in ((8, "fsdp2"), (8, "zero2"), (8, "zero3"), (64, "fsdp2")):
        for model in (size_8b, moe):
            total = sum(state_bytes(model, Launch(processes, sharding)).values())
            assert f"{total / GIB:.1f}" in text, (processes, sharding, total / GIB)
