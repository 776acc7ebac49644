# SPDX-License-Identifier: Apache-2.0
"""Combinations of values of a configuration, in which every two values of two fields meet at least once."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

Case = dict[str, Any]
Pair = tuple[tuple[str, int], tuple[str, int]]

FIELDS: dict[str, Sequence[Any]] = {
    "constraint": ("lagrangian", "fixed", "threshold", "none"),
    "discrepancy_metric": ("prob_diff", "prob_ratio", "logprob_diff"),
    "discrepancy_level": ("token", "sequence"),
    "discrepancy_average": ("trajectory", "token"),
    "discrepancy_tolerance": (None, 0.001, 0.0),
    "multiplier_init": (0.1, 0.0, 2.0),
    "vllm_importance_sampling_mode": (
        "token_truncate",
        "token_mask",
        "sequence_truncate",
        "sequence_mask",
        "drpo",
    ),
    "vllm_importance_sampling_correction": (True, False),
    "rejection": (
        None,
        ["geometric"],
        ["token_veto"],
        ["max_tv"],
        ["icepop"],
        ["kpop", "icepop"],
        ["dppo_tv"],
        ["dppo_kl"],
    ),
    "loss_type": ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "advantage_estimator": ("grpo", "rloo"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "zero_variance_groups": ("keep", "drop"),
    "sync_rounding": ("auto", "nearest", "dither"),
    "rollout_backend": ("transformers", "vllm"),
    "rollout_precision": (None, "bf16", "fp16", "fp8", "int8", "int4", "int3"),
    "num_iterations": (1, 2),
    "steps_per_generation": (None, 1, 2),
    "gradient_accumulation_steps": (1, 2),
    "beta": (0.0, 0.1),
    "entropy_coef": (0.0, 0.01),
    "top_entropy_quantile": (1.0, 0.5),
    "off_policy_mask_threshold": (None, 0.5),
    "mask_truncated_completions": (False, True),
    "length_decay": (False, True),
    "length_decay_period": (None, 2),
    "ess_rate": (False, True),
    "bf16": (False, True),
    "router_replay": (False, True),
    "log_tokens": (False, True),
    "temperature": (1.0, 0.7),
    "top_p": (1.0, 0.9),
    "generation_kwargs": (None, {"top_k": 5}),
    "max_grad_norm": (1.0, 0.0),
    "gradient_guard": (None, 10.0, math.inf),
}
"""By field the values that are combined; the first is the usual one."""

UNUSUAL = 0.3  # the chance that a field not given by a pair has another than its usual value


def covering_cases(seed: int, least: int, fields: Mapping[str, Sequence[Any]] = FIELDS) -> list[Case]:
    """At least so many combinations of values, in which every pair of values meets.

    A case takes up a pair that has not met yet, and draws the other fields, most of them as usual.

    Args:
        seed: of the draws.
        least: number of cases, where the pairs need no more.
        fields: values by field, the usual one first.
    """
    draw = random.Random(seed)
    missing = dict.fromkeys(_pairs(fields))
    cases: dict[str, Case] = {}
    while missing or len(cases) < least:
        wanted = dict(next(iter(missing))) if missing else {}
        indices = {
            name: wanted.get(name, draw.randrange(len(values)) if draw.random() < UNUSUAL else 0)
            for name, values in fields.items()
        }
        for pair in combinations(indices.items(), 2):
            missing.pop(pair, None)
        case = {name: fields[name][index] for name, index in indices.items()}
        cases[repr(case)] = case
    return list(cases.values())


def _pairs(fields: Mapping[str, Sequence[Any]]) -> Iterator[Pair]:
    for (first, ones), (second, others) in combinations(fields.items(), 2):
        for one in range(len(ones)):
            for other in range(len(others)):
                yield (first, one), (second, other)
