# SPDX-License-Identifier: Apache-2.0
"""The diagnoses of docs/troubleshooting.md: short runs with one thing broken, and what the metrics say of it.

Run as a program, it prints every number that the page quotes, in about a minute:

    OMP_NUM_THREADS=1 PYTHONPATH=.:tests/support python tests/docs/test_troubleshooting.py
"""

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import (
    Fault,
    engine_temperature,
    merge_in_place,
    raw_logprobs,
    stale_prefix_cache,
    stale_sync,
    stale_tensors,
    top_k,
    top_p,
    trainers_own_log_probs,
)
from places import ROOT
from runs import dc_trainer, logged, replayed_rollouts
from tiny import published_model, tiny_model

from dc_trl import DCGRPOConfig, DCGRPOTrainer

PAGE = ROOT / "docs/troubleshooting.md"
BATCH = {"per_device_train_batch_size": 32, "num_generations": 8, "max_completion_length": 16, "max_steps": 5}
MEAN, CHI2, KL = "dc/discrepancy/mean", "dc/chi2_token", "dc/kl"
SEEN = "dc/sync/update_seen_since_start"
# Updates far below half a step of the bf16 grid, on which a published checkpoint lies.
SMALL_UPDATES = {"learning_rate": 3e-5, "max_steps": 24}


def snippet(name: str) -> Any:
    """The class or function `name` from the page's own code block, so that what readers copy is what is tested."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (source,) = [block for block in blocks if re.search(rf"^(class|def) {name}\b", block, flags=re.MULTILINE)]
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    return namespace[name]


def run(output_dir: Path, fault: Fault | None = None, **options: Any) -> DCGRPOTrainer:
    """A metrics-only run of five steps at learning rate 0, bf16 rollouts unless said otherwise, with one fault.

    Random weights lie on no grid, so rounding to nearest is what a dither is to a published checkpoint.
    """
    defaults = {"constraint": "none", "learning_rate": 0.0, "sync_rounding": "nearest", **BATCH}
    if "rollout_func" not in options:
        defaults["rollout_precision"] = "bf16"
    trainer = dc_trainer(output_dir, **(defaults | options))
    if fault is not None:
        fault(trainer)
    trainer.train()
    return trainer


def adapters(dropout: float = 0.0) -> Any:
    """LoRA on every linear layer."""
    peft = pytest.importorskip("peft")
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": dropout}
    return peft.LoraConfig(r=8, lora_alpha=32, **options)


# Diagnoses


def test_a_stale_sync_grows_with_the_updates(tmp_path: Path) -> None:
    synced = run(tmp_path, learning_rate=1e-3, max_steps=4)
    stale = run(tmp_path, stale_sync, learning_rate=1e-3, max_steps=4)
    assert logged(stale, MEAN)[0] == logged(synced, MEAN)[0]
    assert logged(stale, MEAN)[-1] > 5 * logged(synced, MEAN)[-1]
    assert logged(stale, CHI2)[-1] > 0.05 > max(map(abs, logged(synced, CHI2)))
    assert logged(stale, "dc/ppl_ratio")[-1] > 1.05
    assert logged(stale, "dc/pearson")[-1] < 0.97 < min(logged(synced, "dc/pearson"))


def test_rounding_at_the_sync_looks_like_a_stale_sync_and_the_dither_cures_it(tmp_path: Path) -> None:
    def small_updates(**options: Any) -> DCGRPOTrainer:
        return run(tmp_path, model=published_model(), **(SMALL_UPDATES | options))

    nearest, dithered = small_updates(sync_rounding="nearest"), small_updates(sync_rounding="dither")
    assert logged(nearest, MEAN)[0] == logged(dithered, MEAN)[0]  # step 0 is the checkpoint, either way
    assert sum(logged(nearest, MEAN)[-6:]) > 1.2 * sum(logged(dithered, MEAN)[-6:])
    assert logged(nearest, "dc/pearson")[-1] < logged(nearest, "dc/pearson")[0]
    assert max(logged(nearest, SEEN)[:4]) < 0.2
    assert all(0.95 < share < 1.05 for share in logged(dithered, SEEN))
    assert 0 < max(logged(small_updates(rollout_precision=None), MEAN)) < 1e-6  # float32 rollouts are clean


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Mean discrepancies of a run at learning rate 0 whose sync works, nudged after step 2."""
    trainer = run(tmp_path_factory.mktemp("healthy"), callbacks=[snippet("Nudge")(after=2)], max_steps=4)
    return logged(trainer, MEAN)


def test_a_learning_rate_of_zero_leaves_the_floor(healthy: list[float]) -> None:
    assert max(healthy) < 1.5 * min(healthy)


@pytest.mark.parametrize(
    ("fault", "factor"), [(stale_sync, 2.0), (stale_prefix_cache, 2.0), (stale_tensors("lm_head"), 1.4)]
)
def test_a_nudge_shows_what_a_learning_rate_of_zero_hides(
    tmp_path: Path, healthy: list[float], fault: Fault, factor: float
) -> None:
    broken = logged(run(tmp_path, fault, callbacks=[snippet("Nudge")(after=2)], max_steps=4), MEAN)
    assert broken[:2] == pytest.approx(healthy[:2])  # hidden
    assert min(broken[2:]) > factor * max(healthy)


def test_a_temperature_of_its_own_is_refused_or_shows(tmp_path: Path, healthy: list[float]) -> None:
    with pytest.raises(ValueError, match="discrepancy would measure the temperature"):
        DCGRPOConfig(str(tmp_path), bf16=False, rollout_backend="transformers", generation_kwargs={"temperature": 0.9})
    hot = run(tmp_path, engine_temperature(0.9), max_steps=3)
    assert min(logged(hot, MEAN)) > 5 * max(healthy)
    assert min(logged(hot, "dc/pearson")) > 0.99  # unlike stale weights: it rescales, it does not reorder


def test_truncated_sampling_is_refused_or_gives_a_floor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="truncates or shifts"):
        DCGRPOConfig(str(tmp_path), bf16=False, rollout_backend="transformers", top_p=0.9)
    trainer = run(tmp_path, top_p(0.9), rollout_precision=None, max_steps=3)  # engines agree
    # ρ = S, the mass that is kept, for every sampled token: 0.9, and a part of the likeliest token that is not needed.
    assert min(logged(trainer, "dc/importance_ratio/min")) > 0.899
    assert 0.899 < max(logged(trainer, "dc/importance_ratio/max")) < 0.97
    assert min(logged(trainer, MEAN)) > 0.005
    assert 0.899**2 - 1 < min(logged(trainer, CHI2)) and max(logged(trainer, CHI2)) < -0.15


def test_unprocessed_log_probs_make_the_kl_negative(tmp_path: Path) -> None:
    options = {"rollout_precision": None, "temperature": 0.7, "max_steps": 2}
    processed = run(tmp_path, **options)
    assert max(map(abs, logged(processed, KL))) < 1e-5
    raw = run(tmp_path, raw_logprobs, **options)
    assert max(logged(raw, KL)) < -0.05  # no KL is negative: the log-probs are not those of what was sampled


def test_merging_in_place_moves_frozen_weights_and_a_copy_does_not(tmp_path: Path) -> None:
    def moved(fault: Fault | None) -> float:
        watch = snippet("FrozenWeights")()
        options = {"model": tiny_model().to(torch.bfloat16), "peft_config": adapters(), "max_steps": 3}
        run(tmp_path, fault, callbacks=[watch], learning_rate=1e-2, **options)
        return watch.moved

    assert moved(None) == 0.0
    assert moved(merge_in_place) > 1e-4


def test_dropout_grows_with_the_adapter_and_a_constraint_has_none(tmp_path: Path) -> None:
    options = {"rollout_precision": None, "learning_rate": 1e-2, "max_steps": 4}
    measured = logged(run(tmp_path, peft_config=adapters(0.3), **options), MEAN)
    assert measured[0] < 1e-6 < 1e-3 < measured[-1]  # LoRA's B is 0 at first, so the first batches show none of it
    options |= {"constraint": "lagrangian", "discrepancy_tolerance": 0.01}
    assert 0 < max(logged(run(tmp_path, peft_config=adapters(0.3), **options), MEAN)) < 1e-6


def test_unscored_tokens_are_counted_and_left_out(tmp_path: Path) -> None:
    def edit(logprobs: list[list[Any]]) -> None:
        for sequence in logprobs:
            sequence[1] = None

    trainer = run(tmp_path, rollout_func=replayed_rollouts(edit=edit), max_steps=1)
    (fraction,), (mean,) = logged(trainer, "dc/nan_fraction"), logged(trainer, MEAN)
    assert 0.1 < fraction < 0.5 and 0 < mean < 1


def test_log_probs_of_the_trainers_own_differ_nowhere(tmp_path: Path) -> None:
    sound, own = run(tmp_path, max_steps=2), run(tmp_path, trainers_own_log_probs, max_steps=2)
    assert logged(sound, "dc/differs") == [1.0, 1.0] and logged(own, "dc/differs") == [0.0, 0.0]
    assert logged(own, MEAN) == [0.0, 0.0] and logged(own, "dc/ess") == [1.0, 1.0]  # all looks well
    float32 = run(tmp_path, rollout_precision=None, max_steps=2)
    assert 0.5 < min(logged(float32, "dc/differs")) and max(logged(float32, MEAN)) < 1e-6


def test_a_spread_of_its_own_tells_a_few_tokens_from_all(tmp_path: Path) -> None:
    sound, stale = (
        {key: logged(trainer, f"dc/discrepancy/{key}")[-1] for key in ("mean", "p50", "p90", "p99")}
        for trainer in (
            run(tmp_path, learning_rate=1e-3, max_steps=8),
            run(tmp_path, stale_sync, learning_rate=1e-3, max_steps=8),
        )
    )
    assert all(10 < stale[key] / sound[key] < 60 for key in sound)  # old weights: every token


# The page's numbers

COLUMNS = {
    "discrepancy/mean": "mean",
    "discrepancy/p50": "p50",
    "discrepancy/p90": "p90",
    "discrepancy/p99": "p99",
    "discrepancy/max": "max",
    "abs_log_ratio/p50": "|ℓ| p50",
    "abs_log_ratio/p90": "|ℓ| p90",
    "abs_log_ratio/p99": "|ℓ| p99",
    "differs": "differs",
    "kl": "kl",
    "chi2_token": "chi2_token",
    "ess": "ess",
    "ppl_ratio": "ppl_ratio",
    "pearson": "pearson",
    "importance_ratio/min": "ρ min",
    "importance_ratio/max": "ρ max",
}


def cases() -> dict[str, tuple[Fault | None, dict[str, Any]]]:
    """Every run that the page quotes: its fault and its options."""
    as_trained, learning = {"rollout_precision": None}, {"learning_rate": 1e-3, "max_steps": 8}
    nudged = {"callbacks": [snippet("Nudge")(after=2)]}
    table: dict[str, tuple[Fault | None, dict[str, Any]]] = {
        "synced, lr 1e-3": (None, learning),
        "stale sync, lr 1e-3": (stale_sync, learning),
        "stale prefix cache, lr 1e-3": (stale_prefix_cache, learning),
        **{
            f"published, lr 3e-5, {name}": (None, SMALL_UPDATES | {"model": published_model()} | options)
            for name, options in (
                ("nearest", {"sync_rounding": "nearest"}),
                ("dithered", {"sync_rounding": "dither"}),
                ("as trained", as_trained),
            )
        },
        "synced, lr 0": (None, {}),
        "stale sync, lr 0": (stale_sync, {}),
        "synced, lr 0, nudge": (None, nudged),
        "stale sync, lr 0, nudge": (stale_sync, nudged),
        "stale lm_head, lr 0, nudge": (stale_tensors("lm_head"), nudged),
        "stale prefix cache, lr 0, nudge": (stale_prefix_cache, nudged),
        "the trainer's own log-probs": (trainers_own_log_probs, {}),
        "engine at T 0.9": (engine_temperature(0.9), {}),
        "engine at T 1.1": (engine_temperature(1.1), {}),
        "top_p 0.95, as trained": (top_p(0.95), as_trained),
        "top_p 0.9, as trained": (top_p(0.9), as_trained),
        "top_k 20, as trained": (top_k(20), as_trained),
        "T 0.7, processed, as trained": (None, as_trained | {"temperature": 0.7}),
        "T 0.7, raw, as trained": (raw_logprobs, as_trained | {"temperature": 0.7}),
        "lora_dropout 0, as trained": (None, as_trained | learning | {"peft_config": adapters()}),
        "lora_dropout 0.05, as trained": (None, as_trained | learning | {"peft_config": adapters(0.05)}),
        "lora_dropout 0.3, as trained": (None, as_trained | learning | {"peft_config": adapters(0.3)}),
        "lora_dropout 0, bf16": (None, learning | {"peft_config": adapters()}),
        "lora_dropout 0.05, bf16": (None, learning | {"peft_config": adapters(0.05)}),
        "mixture of experts, bf16": (None, {"model": tiny_model("qwen3_moe")}),
        "4 updates a rollout, as trained": (
            None,
            as_trained
            | {"per_device_train_batch_size": 8, "steps_per_generation": 4}
            | {"learning_rate": 1e-3, "max_steps": 20},
        ),
    }
    for trained, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for precision in (None, "bf16", "fp16", "fp8", "int8", "int4", "int3"):
            options = {"model": tiny_model().to(dtype), "rollout_precision": precision}
            table[f"trained in {trained}, rollouts {precision}"] = (None, options)
    return table


def main() -> None:
    """Prints each case's metrics, mean of the first two and of the last three steps, and two longer stories."""
    with tempfile.TemporaryDirectory() as directory:
        for name, (fault, options) in cases().items():
            trainer = run(Path(directory), fault, **options)
            print(f"\n{name}")
            for key, label in COLUMNS.items():
                values = logged(trainer, f"dc/{key}")
                first, last = torch.tensor(values[:2]).mean(), torch.tensor(values[-3:]).mean()
                print(f"    {label:12} {first:10.3g} -> {last:10.3g}")
            if "published" in name:
                print("    seen        ", *(f"{share:.3g}" for share in logged(trainer, SEEN)))
        for fault in (None, merge_in_place):
            watch = snippet("FrozenWeights")()
            options = {"model": tiny_model().to(torch.bfloat16), "peft_config": adapters(), "max_steps": 40}
            trainer = run(Path(directory), fault, callbacks=[watch], learning_rate=1e-3, **options)
            means = logged(trainer, MEAN)
            print(f"\nLoRA, bf16 base, {'in place' if fault else 'on a copy'}: frozen weights moved {watch.moved:.2e}")
            print(f"    mean {sum(means[:5]) / 5:.3g} -> {sum(means[-5:]) / 5:.3g}")
        options = {"learning_rate": 3e-3, "max_steps": 24, "logging_steps": 4, "rollout_precision": "int4"}
        trainer = run(Path(directory), **options)
        for key in ("entropy", MEAN, "dc/discrepancy/p50", "dc/discrepancy/p99", CHI2, "reward"):
            print(f"entropy collapse: {key:20}", *(f"{value:9.3g}" for value in logged(trainer, key)))


if __name__ == "__main__":
    main()
