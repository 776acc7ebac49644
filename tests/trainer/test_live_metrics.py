# SPDX-License-Identifier: Apache-2.0
"""Every metric of a run is bounded from below too, so that one that went dead fails; and what is said of a penalty."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from runs import dc_trainer, logged

# The mean over the steps of the run below. Of eight seeds, all lay well inside.
BOUNDS = {
    "dc/discrepancy/mean": (0.02, 0.04),
    "dc/discrepancy/p50": (0.008, 0.015),
    "dc/discrepancy/p90": (0.05, 0.11),
    "dc/discrepancy/p99": (0.15, 0.3),
    "dc/discrepancy/max": (0.25, 0.5),
    "dc/abs_log_ratio/p50": (0.3, 0.5),
    "dc/abs_log_ratio/p90": (0.8, 1.4),
    "dc/abs_log_ratio/p99": (1.4, 2.6),
    "dc/differs": (0.99, 1.0),
    "dc/discrepancy_kept/mean": (0.018, 0.038),
    "dc/penalty_share": (0.02, 0.06),
    "dc/penalty_only": (0.001, 0.3),
    "dc/pearson": (0.75, 0.95),
    "dc/kl": (0.12, 0.25),
    "dc/k3_kl": (0.12, 0.25),
    "dc/chi2_token": (0.2, 1.2),
    "dc/chi2_seq": (0.1, 2_000.0),
    "dc/ess": (0.5, 0.85),
    "dc/ppl_ratio": (1.1, 1.35),
    "dc/log_ppl_abs_diff": (2.0, 5.0),
    "dc/log_ppl_abs_diff_per_token": (0.12, 0.3),
    "dc/importance_ratio/min": (0.02, 0.2),
    "dc/importance_ratio/mean": (0.9, 1.1),
    "dc/importance_ratio/max": (3.0, 20.0),
    "dc/masked_fraction": (0.02, 0.15),
    "dc/multiplier": (0.999, 1.001),
    "dc/tolerance": (0.02, 0.05),
    "dc/sync/update_seen": (0.9, 1.1),
    "dc/sync/update_seen_since_start": (0.9, 1.1),
    "dc/sync/changed": (0.7, 0.95),
    "dc/grad_norm_smoothed": (0.3, 5.0),
    "sampling/sampling_logp_difference/mean": (0.35, 0.65),
    "sampling/sampling_logp_difference/max": (1.8, 5.0),
    "sampling/importance_sampling_ratio/mean": (0.7, 0.95),
    "sampling/importance_sampling_ratio/max": (1.8, 2.0),
}
# Held elsewhere, by a number: 0 in this run, or of either sign.
ELSEWHERE = {"dc/nan_fraction", "dc/violation", "sampling/importance_sampling_ratio/min"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Five steps under a penalty, a sampler in int4, and a mask that takes some tokens out."""
    options = {"per_device_train_batch_size": 32, "max_completion_length": 16, "max_steps": 5, "learning_rate": 1e-3}
    options |= {"constraint": "fixed", "multiplier_init": 1.0, "tolerance_calibration_batches": 1}
    trainer = dc_trainer(
        tmp_path_factory.mktemp("live"), vllm_importance_sampling_mode="token_mask", seed=0, **options
    )
    trainer.train()
    return trainer


def test_no_metric_is_without_bounds(run: Any) -> None:
    keys = {key for entry in run.state.log_history for key in entry if key.startswith(("dc/", "sampling/"))}
    assert keys == BOUNDS.keys() | ELSEWHERE
    assert all(low > 0 for low, _ in BOUNDS.values())  # or a metric that went dead would pass


@pytest.mark.parametrize("key", BOUNDS)
def test_a_metric_lies_within_its_bounds(run: Any, key: str) -> None:
    values = logged(run, key)
    low, high = BOUNDS[key]
    assert len(values) >= 4 and low <= sum(values) / len(values) <= high, values


def test_a_metric_of_the_tokens_is_not_constant(run: Any) -> None:
    for key in BOUNDS.keys() - {"dc/differs", "dc/multiplier", "dc/tolerance"}:
        assert len(set(logged(run, key))) > 1, key


def test_quantiles_of_a_run_are_in_order(run: Any) -> None:
    columns = [logged(run, f"dc/discrepancy/{name}") for name in ("p50", "p90", "p99", "max")]
    assert all(list(row) == sorted(row) and row[0] < row[-1] for row in zip(*columns, strict=True))


# A penalty alone


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], list[str]]]:
    """The package's warnings in which some words are."""
    transformers.utils.logging.enable_propagation()
    caplog.set_level(logging.WARNING)
    yield lambda words: [
        message for r in caplog.records if "DC-GRPO" in (message := r.getMessage()) and words in message
    ]
    transformers.utils.logging.disable_propagation()


def equal_rewards(groups: int) -> Callable[..., list[float]]:
    """A reward that is one and the same, and no binary fraction, within this many of a batch's first groups of 4."""
    return lambda completions, **_: [0.3 if i < 4 * groups else 0.1 * i for i in range(len(completions))]


PENALISED = {"constraint": "fixed", "multiplier_init": 0.5, "per_device_train_batch_size": 16}


@pytest.mark.parametrize(("groups", "fraction", "warnings"), [(4, 1.0, 1), (3, 0.75, 1), (2, 0.5, 0), (0, 0.0, 0)])
def test_sequences_with_a_penalty_alone_are_logged_and_said_once(
    tmp_path: Path, said: Any, groups: int, fraction: float, warnings: int
) -> None:
    trainer = dc_trainer(tmp_path, reward_funcs=equal_rewards(groups), **PENALISED)
    trainer.train()
    assert logged(trainer, "dc/penalty_only") == [fraction] * 3
    messages = said("dc/penalty_only")
    assert len(messages) == warnings
    assert all(f"{fraction:.0%} of a batch's sequences" in message for message in messages)


@pytest.mark.parametrize(
    "options", [{"zero_variance_groups": "drop"}, {"constraint": "none"}, {"multiplier_init": 0.0}], ids=str
)
def test_without_a_penalty_nothing_is_moved_by_it_alone(tmp_path: Path, said: Any, options: dict[str, Any]) -> None:
    trainer = dc_trainer(tmp_path, reward_funcs=equal_rewards(3), **(PENALISED | options))
    trainer.train()
    assert logged(trainer, "dc/penalty_only") == [0.0] * 3 and said("dc/penalty_only") == []


def test_it_counts_over_micro_batches(tmp_path: Path) -> None:
    layout = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    trainer = dc_trainer(tmp_path, reward_funcs=equal_rewards(1), **(PENALISED | layout))
    trainer.train()
    assert logged(trainer, "dc/penalty_only") == [0.25] * 3


def test_a_fixed_penalty_does_not_wait_and_does_not_say_so(tmp_path: Path, said: Any) -> None:
    fixed = dc_trainer(tmp_path / "fixed", tolerance_calibration_batches=2, **PENALISED)
    fixed.train()
    assert said("calibrating") == [] and len(said("`constraint='fixed'` does not use")) == 1
    assert logged(fixed, "dc/penalty_share")[0] > 0 and len(logged(fixed, "dc/violation")) == 1
    dc_trainer(tmp_path / "lagrangian", tolerance_calibration_batches=2).train()
    assert len(said("no penalty yet: calibrating the tolerance on 2 generation batches")) == 1
