# SPDX-License-Identifier: Apache-2.0
"""Bad configurations die at construction, and say what, why and the way out."""

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser
from trl import GRPOConfig

from dc_trl import DCGRPOConfig

BASE = {"report_to": "none", "bf16": False}


def config(tmp_path: Path, **options: Any) -> DCGRPOConfig:
    return DCGRPOConfig(output_dir=str(tmp_path), **BASE, **options)


OURS = [
    ("constraint", "soft", "lagrangian"),
    ("discrepancy_metric", "tv", "prob_diff"),
    ("discrepancy_level", "word", "sequence"),
    ("discrepancy_average", "batch", "trajectory"),
    ("advantage_estimator", "ppo", "rloo"),
    ("zero_variance_groups", "skip", "drop"),
    ("rollout_backend", "sglang", "transformers"),
    ("rollout_precision", "int2", "int3"),
    ("weight_sync", "pickle", "disk"),
    ("discrepancy_tolerance", -0.1, "≥ 0"),
    ("discrepancy_tolerance", math.nan, "≥ 0"),
    ("tolerance_slack", -1.0, "≥ 0"),
    ("tolerance_calibration_batches", 0, "1 or more"),
    ("multiplier_init", -0.1, "≥ 0"),
    ("multiplier_init", 2.0, "multiplier_max"),
    ("multiplier_max", math.inf, "≥ 0"),
    ("dual_lr", math.nan, "≥ 0"),
    ("dual_lr", -1.0, "≥ 0"),
    ("weight_sync", "disk", "use_vllm=True"),
    ("vllm_engine_kwargs", {"quantization": "fp8"}, "vllm_mode='colocate'"),
    ("weight_sync_readers", "everybody", "all"),
    ("length_decay_period", 0, "1 or more"),
    ("length_decay_factor", -1.8, "1.8"),
    ("length_decay_min_lr_ratio", 0.0, "0.1"),
    ("length_surge_ratio", 1.0, "e.g. 3"),
    ("rollout_precision", "fp8", "rollout_backend='transformers'"),
]


@pytest.mark.parametrize(("name", "value", "remedy"), OURS, ids=str)
def test_own_fields(tmp_path: Path, name: str, value: Any, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}`") as error:
        config(tmp_path, **{name: value})
    assert str(value) in str(error.value) and remedy in str(error.value)


TRLS = [
    {"top_p": 0.9},
    {"top_k": 50},
    {"min_p": 0.1},
    {"repetition_penalty": 1.1},
    {"generation_kwargs": {"top_p": 0.9}},
    {"generation_kwargs": {"presence_penalty": 0.5}},
    {"generation_kwargs": {"temperature": 0.5}},
    {"vllm_structured_outputs_regex": "[0-9]+"},
    {"loss_type": "sapo"},
    {"loss_type": "vespo"},
    {"importance_sampling_level": "sequence"},
    {"off_policy_mask_threshold": 0.5},
]


@pytest.mark.parametrize("options", TRLS, ids=str)
def test_trl_fields_that_break_the_constraint(tmp_path: Path, options: dict[str, Any]) -> None:
    (name, value) = next(iter(options.items()))
    shown = str(next(iter(value.values()))) if isinstance(value, dict) else str(value)
    with pytest.raises(ValueError, match=name) as error:
        config(tmp_path, **options)
    assert shown in str(error.value) and "lagrangian" in str(error.value) or "temperature" in str(error.value)
    assert config(tmp_path, constraint="none", **options).constraint == "none"  # TRL's business


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": -1, "min_p": 0.0, "generation_kwargs": {"top_p": 1.0, "seed": 3}},
        {"importance_sampling_level": "sequence", "discrepancy_level": "sequence"},
        {"multiplier_init": 1.0, "multiplier_max": 1.0},
        {"discrepancy_tolerance": 0.0},
        {"use_vllm": True, "vllm_mode": "server", "weight_sync": "disk"},
        {"use_vllm": True, "vllm_mode": "colocate", "vllm_engine_kwargs": {"kv_cache_dtype": "fp8"}},
    ],
    ids=str,
)
def test_sound_combinations_pass(tmp_path: Path, options: dict[str, Any]) -> None:
    made = config(tmp_path, **options)
    assert all(getattr(made, name) == value for name, value in options.items())


def test_two_engines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two engines.*use_vllm=False"):
        config(tmp_path, rollout_backend="transformers", use_vllm=True)


def test_a_quantised_engine_does_not_sleep(tmp_path: Path) -> None:
    options = {"use_vllm": True, "vllm_mode": "colocate", "vllm_engine_kwargs": '{"quantization": "fp8"}'}
    assert config(tmp_path, **options).vllm_engine_kwargs == {"quantization": "fp8"}
    with pytest.raises(ValueError, match="vllm_enable_sleep_mode"):
        config(tmp_path, vllm_enable_sleep_mode=True, **options)


def test_vespo_needs_token_ratios(tmp_path: Path) -> None:
    options = {"loss_type": "vespo", "constraint": "none", "rollout_backend": "transformers"}
    with pytest.raises(ValueError, match="vllm_importance_sampling_mode.*token_mask"):
        config(tmp_path, vllm_importance_sampling_mode="sequence_mask", **options)


@pytest.mark.parametrize(
    "options",
    [
        {},  # TRL samples, and applies no correction
        {"use_vllm": True},  # TRL has its own check
        {"rollout_backend": "transformers", "vllm_importance_sampling_correction": False},
    ],
    ids=str,
)
def test_vespo_passes_where_its_mode_is_trls_business(tmp_path: Path, options: dict[str, Any]) -> None:
    mode = GRPOConfig.__dataclass_fields__["vllm_importance_sampling_mode"].default
    assert isinstance(mode, str) and mode.startswith("sequence")
    made = config(tmp_path, constraint="none", loss_type="vespo", vllm_importance_sampling_mode=mode, **options)
    assert made.vllm_importance_sampling_mode == mode


@pytest.mark.parametrize(
    ("loss", "first", "second"),
    [
        ("luspo", "`discrepancy_level='sequence'`", "`importance_sampling_level='token'`"),
        ("grpo", "`importance_sampling_level='token'`", "`discrepancy_level='sequence'`"),
    ],
)
def test_the_first_way_out_is_the_one_that_keeps_the_loss(tmp_path: Path, loss: str, first: str, second: str) -> None:
    with pytest.raises(ValueError, match=f"Use {first}, or {second}, or `constraint='none'`"):
        config(tmp_path, loss_type=loss, importance_sampling_level="sequence")


@pytest.mark.parametrize(
    "options",
    [
        {"off_policy_mask_threshold": 0.5},
        {"vllm_structured_outputs_regex": "[0-9]+"},
        {"rollout_precision": "int8"},
        {"rollout_precision": "int2"},
        {"min_p": 0.1},
    ],
    ids=str,
)
def test_what_is_none_by_default_is_to_be_left_unset(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="[lL]eave it unset") as error:
        config(tmp_path, **options)
    assert "None" not in str(error.value)


def test_rloo_needs_one_unscaled_reward(tmp_path: Path) -> None:
    assert config(tmp_path, advantage_estimator="rloo").scale_rewards == "none"
    with pytest.raises(ValueError, match="scale_rewards"):
        config(tmp_path, advantage_estimator="rloo", scale_rewards="batch")
    with pytest.raises(ValueError, match="multi_objective_aggregation"):
        config(tmp_path, advantage_estimator="rloo", multi_objective_aggregation="normalize_then_sum")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"beta": 0.1, "loss_type": "grpo"}, "beta"),
        ({"beta": 0.1, "loss_type": "bnpo"}, "beta"),
        ({"entropy_coef": 0.1}, "entropy_coef"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy"),
    ],
    ids=str,
)
def test_dropping_refuses_terms_that_it_cannot_rescale(tmp_path: Path, options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}`.*drop"):
        config(tmp_path, zero_variance_groups="drop", **options)
    config(tmp_path, zero_variance_groups="drop", beta=0.1, loss_type="dapo")


def test_inherited_defaults_that_differ(tmp_path: Path) -> None:
    ours = config(tmp_path)
    assert ours.lr_scheduler_type == "constant"
    assert ours.vllm_importance_sampling_mode == "token_truncate" and ours.vllm_importance_sampling_clip_max == 2.0
    theirs = {f for f in GRPOConfig.__dataclass_fields__}
    changed = {
        name
        for name in theirs
        if DCGRPOConfig.__dataclass_fields__[name].default != GRPOConfig.__dataclass_fields__[name].default
    }
    assert changed == {
        "lr_scheduler_type",
        "vllm_importance_sampling_mode",
        "vllm_importance_sampling_clip_max",
    }


def test_command_line_round_trip(tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path), "--bf16", "False", "--report_to", "none", "--constraint", "threshold"]
    flags += ["--discrepancy_tolerance", "0.004", "--rollout_backend", "transformers", "--rollout_precision", "int8"]
    (args,) = HfArgumentParser(DCGRPOConfig).parse_args_into_dataclasses(flags)
    assert (args.constraint, args.discrepancy_tolerance, args.rollout_precision) == ("threshold", 0.004, "int8")
