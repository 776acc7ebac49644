# SPDX-License-Identifier: Apache-2.0
"""Estimators and data rules of the papers: each does what it says, under both controllers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer
from datasets import Dataset
from runs import dc_trainer, logged, record_losses, replayed_rollouts, weights
from tiny import save_tiny_policy, tiny_model

from dc_trl import DCGRPOConfig, DCGRPOTrainer

CONTROLLERS: dict[str, dict[str, Any]] = {
    "lagrangian": {"discrepancy_tolerance": 1e-3, "dual_lr": 5.0, "multiplier_init": 0.5},
    "length_decay": {"constraint": "none", "length_decay": True, "length_decay_period": 1},
}
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo", "sapo", "vespo")
LOSSES: dict[str, dict[str, Any]] = {name: {} for name in LOSS_TYPES} | {"cispo": {"epsilon_high": 5.0}}
PAIRS = [(c, loss) for c in CONTROLLERS for loss in LOSSES if c != "lagrangian" or loss not in ("sapo", "vespo")]
both_controllers = pytest.mark.parametrize("controller", CONTROLLERS)


def check_control(trainer: DCGRPOTrainer, controller: str) -> None:
    """Asserts that the controller acted: λ moved by what was measured, or the rate was halved."""
    if controller == "lagrangian":
        assert trainer.dual.value != 0.5 and logged(trainer, "dc/penalty_share")[0] > 0
    else:
        assert logged(trainer, "learning_rate")[0] == pytest.approx(0.5 * trainer.args.learning_rate)


@both_controllers
@pytest.mark.parametrize("unscored", [(), (0, 5, 8, 9, 10)], ids=["all scored", "some not"])
def test_rloo_takes_the_mean_of_the_other_rewards(tmp_path: Path, controller: str, unscored: tuple[int, ...]) -> None:
    rewards: list[float | None] = []

    def reward(completions: list[str], **_: Any) -> list[float | None]:
        rewards[:] = [None if i in unscored else float((7 * i) % 11) for i in range(len(completions))]
        return rewards

    trainer = dc_trainer(
        tmp_path, reward_funcs=reward, advantage_estimator="rloo", per_device_train_batch_size=16, max_steps=2,
        **CONTROLLERS[controller],
    )  # fmt: skip
    seen: list[dict[str, torch.Tensor]] = []
    score = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda i: seen.append(b := score(i)) or b  # type: ignore
    trainer.train()
    expected = []
    for i, own in enumerate(rewards):
        group = range(i // 4 * 4, i // 4 * 4 + 4)
        others = [r for j in group if j != i and (r := rewards[j]) is not None]
        expected.append(own - sum(others) / len(others) if own is not None and others else 0.0)
    # Completion 11 is the only one of its group with a reward: nothing to compare it with.
    assert (expected[11] == 0.0) == bool(unscored)
    assert seen[-1]["advantages"].tolist() == pytest.approx(expected, abs=1e-5)
    assert list(trainer._logs["advantages"]) == pytest.approx(expected, abs=1e-5)
    check_control(trainer, controller)


# Groups without signal

KEPT, FLAT = "24", "35"  # first characters of prompts; the rewards of the second kind's groups are all equal


def length_unless_flat(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Replayed completions of a group differ in length, so only a flat group has no variance."""
    return [0.5 if prompt[0] in FLAT else float(len(text)) for prompt, text in zip(prompts, completions, strict=True)]


def one_step(
    output_dir: Path, prompts: str, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[torch.Tensor, DCGRPOTrainer]:
    """The change of the weights by one plain SGD step, so proportional to the gradient, and the trainer.

    Each group is one prompt's; in the order of `prompts`, so that micro-batches of four are groups.
    """
    monkeypatch.setattr(trl.trainer.grpo_trainer, "shuffle_sequence_dict", lambda batch: batch)
    size = options.pop("per_device_train_batch_size", 4 * len(prompts))
    trainer = dc_trainer(
        output_dir, rollout_func=replayed_rollouts(), reward_funcs=options.pop("reward_funcs", length_unless_flat),
        train_dataset=Dataset.from_dict({"prompt": [f"{first}+1=" for first in prompts]}), shuffle_dataset=False,
        per_device_train_batch_size=size, gradient_accumulation_steps=4 * len(prompts) // size,
        max_steps=1, **({"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0} | options),
    )  # fmt: skip
    with torch.no_grad():  # away from the weights on disk, which a reference model would have
        generator = torch.Generator().manual_seed(1)
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    before = weights(trainer)
    trainer.train()
    return weights(trainer) - before, trainer


def assert_close(change: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.norm() > 0.1
    assert (change - expected).norm() < 5e-6 * expected.norm()  # 20 times the rounding of other matrix shapes


@pytest.mark.parametrize(("controller", "loss"), PAIRS)
def test_dropped_groups_have_no_part_in_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, controller: str, loss: str
) -> None:
    # Four micro-batches, of which two are dropped as a whole.
    options = {"loss_type": loss, "per_device_train_batch_size": 4, **LOSSES[loss], **CONTROLLERS[controller]}
    alone, _ = one_step(tmp_path, "24", monkeypatch, **options)
    dropped, trainer = one_step(tmp_path, "2345", monkeypatch, zero_variance_groups="drop", **options)
    assert_close(dropped, alone)
    check_control(trainer, controller)


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dapo"])
def test_dropping_works_within_a_micro_batch_and_makes_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    options = {"loss_type": loss, **CONTROLLERS["lagrangian"]}
    alone, _ = one_step(tmp_path, "24", monkeypatch, **options)
    dropped, _ = one_step(tmp_path, "2345", monkeypatch, zero_variance_groups="drop", **options)
    kept, _ = one_step(tmp_path, "2345", monkeypatch, **options)
    assert_close(dropped, alone)
    assert (kept - alone).norm() > 0.1 * alone.norm()


def share(place: int) -> Any:
    """One of three reward functions whose sum is 1; in a flat group each of them is the same for all completions."""

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        lengths = [0 if prompt[0] in FLAT else len(text) for prompt, text in zip(prompts, completions, strict=True)]
        return [(x / 8, (x % 3) / 8, 1 - x / 8 - (x % 3) / 8)[place] for x in lengths]

    reward.__name__ = f"share_{place}"
    return reward


@both_controllers
def test_rewards_that_are_normalised_one_by_one_have_signal_where_the_advantages_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, controller: str
) -> None:
    options = {"multi_objective_aggregation": "normalize_then_sum", "reward_funcs": [share(0), share(1), share(2)]}
    options |= CONTROLLERS[controller]
    alone, _ = one_step(tmp_path, "24", monkeypatch, **options)
    dropped, trainer = one_step(tmp_path, "2345", monkeypatch, zero_variance_groups="drop", **options)
    kept, _ = one_step(tmp_path, "2345", monkeypatch, **options)
    assert (kept - dropped).norm() > 0.1 * alone.norm()
    check_control(trainer, controller)
    if controller == "length_decay":
        # TRL divides by the standard deviation of the batch, and 8 zeros more among its advantages make that smaller.
        expected = alone * (15 / 7) ** 0.5
        assert (dropped - expected).norm() < 1e-3 * expected.norm()  # TRL adds 1e-4 to the divisor


def test_a_reward_and_its_opposite_cancel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opposite_for_4(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [0.1 - len(c) if p[0] == "4" else float(len(c)) for p, c in zip(prompts, completions, strict=True)]

    masks: list[torch.Tensor] = []
    drop = DCGRPOTrainer._drop_zero_variance_groups

    def recording(self: DCGRPOTrainer, batch: dict[str, Any]) -> None:
        drop(self, batch)
        masks.append(batch["tool_mask"])

    monkeypatch.setattr(DCGRPOTrainer, "_drop_zero_variance_groups", recording)
    options = {
        "multi_objective_aggregation": "normalize_then_sum",
        "reward_funcs": [length_unless_flat, opposite_for_4],
    }
    one_step(tmp_path, "24", monkeypatch, zero_variance_groups="drop", **options)
    assert masks[0][:4].all() and not masks[0][4:].any()


@pytest.mark.parametrize("loss", ["dapo", "cispo"])
def test_dropping_leaves_the_reference_term_of_the_others_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    policy = str(save_tiny_policy(tmp_path / "policy", dtype="float32"))
    options = {"model": policy, "beta": 0.5, "loss_type": loss, "per_device_train_batch_size": 4}
    options |= {**LOSSES[loss], **CONTROLLERS["lagrangian"]}
    alone, _ = one_step(tmp_path, "24", monkeypatch, **options)
    dropped, trainer = one_step(tmp_path, "2345", monkeypatch, zero_variance_groups="drop", **options)
    assert logged(trainer, "kl")[0] > 0.1
    assert_close(dropped, alone)


@pytest.mark.parametrize(
    "options",
    [
        *[{"beta": 0.5, "loss_type": loss} for loss in ("grpo", "dr_grpo", "luspo", "bnpo")],
        {"beta": 0.5, "loss_type": "sapo", "constraint": "none"},
        {"entropy_coef": 0.1},
        {"use_adaptive_entropy": True},
    ],
    ids=str,
)
def test_terms_whose_divisor_counts_dropped_groups_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    # A scale on the advantages cannot take a group out of the divisor of a term that has no advantage.
    with pytest.raises(ValueError, match="zero_variance_groups"):
        DCGRPOConfig(output_dir=str(tmp_path), bf16=False, zero_variance_groups="drop", **options)


def test_dropped_groups_are_measured_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = CONTROLLERS["lagrangian"] | {"dual_lr": 1.0}
    _, dropped = one_step(tmp_path, "2345", monkeypatch, zero_variance_groups="drop", **options)
    _, kept = one_step(tmp_path, "2345", monkeypatch, **options)
    _, alone = one_step(tmp_path, "24", monkeypatch, **options)
    for key in ("dc/discrepancy/mean", "dc/pearson", "dc/chi2_token", "dc/ess"):
        assert logged(dropped, key) == logged(kept, key) != logged(alone, key)
    assert dropped.dual.value == kept.dual.value != alone.dual.value
    # The penalty acts on the others only, and is compared with their advantages only.
    assert logged(dropped, "dc/penalty_share") == pytest.approx(logged(alone, "dc/penalty_share"))


def test_dropped_groups_have_their_own_importance_ratios_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**CONTROLLERS["lagrangian"], "vllm_importance_sampling_mode": "token_mask"}
    options |= {"vllm_importance_sampling_clip_min": 0.5}
    _, dropped = one_step(tmp_path, "2345", monkeypatch, zero_variance_groups="drop", **options)
    _, kept = one_step(tmp_path, "2345", monkeypatch, **options)
    keys = ["dc/discrepancy_kept/mean", "dc/masked_fraction"]
    keys += [f"sampling/importance_sampling_ratio/{k}" for k in ("min", "mean", "max")]
    assert logged(kept, "dc/masked_fraction")[0] > 0
    assert {k: logged(dropped, k) for k in keys} == {k: logged(kept, k) for k in keys}


@pytest.mark.parametrize(("controller", "loss"), PAIRS[:6] + PAIRS[-2:])
def test_a_batch_without_any_signal_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, controller: str, loss: str
) -> None:
    change, trainer = one_step(
        tmp_path, "2345", monkeypatch, zero_variance_groups="drop", loss_type=loss, per_device_train_batch_size=8,
        reward_funcs=lambda completions, **_: [1.0] * len(completions), optim="adamw_torch", weight_decay=0.0,
        **LOSSES[loss], **CONTROLLERS[controller],
    )  # fmt: skip
    assert not change.any()
    assert logged(trainer, "loss") == [0.0] and logged(trainer, "grad_norm") == [0.0]
    assert logged(trainer, "dc/discrepancy/mean")[0] > 0
    if controller == "lagrangian":
        assert trainer.dual.value > 0.5  # a violation counts, whatever the rewards


@both_controllers
def test_clip_higher_bounds_the_ratio_at_1_28_and_0_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, controller: str
) -> None:
    records = record_losses(monkeypatch)
    trainer = dc_trainer(
        tmp_path, epsilon=0.2, epsilon_high=0.28, num_iterations=2, max_steps=4, learning_rate=3e-3,
        **CONTROLLERS[controller],
    )  # fmt: skip
    trainer.train()
    above, between = 0, 0
    for step, inputs in enumerate(records):
        mask = inputs["completion_mask"]
        ratio = (inputs["train_logps"] - inputs["old_per_token_logps"]).exp()
        advantages = inputs["advantages"].reshape(len(mask), -1)
        clipped = torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
        loss = -(clipped * inputs["importance_sampling_ratio"] * mask).sum() / mask.sum()
        high, low = (ratio > 1.28) & (advantages > 0), (ratio < 0.8) & (advantages < 0)
        assert logged(trainer, "loss")[step] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
        assert logged(trainer, "clip_ratio/high_mean")[step] == pytest.approx((high * mask).sum() / mask.sum())
        assert logged(trainer, "clip_ratio/low_mean")[step] == pytest.approx((low * mask).sum() / mask.sum())
        above += int((high * mask).sum())
        between += int(((ratio > 1.2) & (advantages > 0) & ~high & mask.bool()).sum())
    assert above and between  # and the symmetric clip would have cut the latter
    check_control(trainer, controller)


@both_controllers
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_sampling_bounds_the_engines_ratio_at_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, controller: str, mode: str
) -> None:
    records = record_losses(monkeypatch)
    trainer = dc_trainer(tmp_path, vllm_importance_sampling_mode=mode, max_steps=2, **CONTROLLERS[controller])
    generate = trainer.vllm_generation.generate

    def disagreeing(*args: Any, **kwargs: Any) -> Any:
        """The engine's rollouts with log-probs that put token and sequence ratios on both sides of C."""
        prompts, completions, logprobs, ids = generate(*args, **kwargs)
        shifted = [[[x - (1.0 if t % 3 == 0 else -0.3)] for t, (x,) in enumerate(seq)] for seq in logprobs]
        return prompts, completions, shifted, ids

    monkeypatch.setattr(trainer.vllm_generation, "generate", disagreeing)
    trainer.train()
    inputs = records[0]
    log_ratio = (inputs["train_logps"] - inputs["sampling_per_token_logps"]) * inputs["completion_mask"]
    ratio = (log_ratio.sum(1, keepdim=True) if mode.startswith("sequence") else log_ratio).exp()
    expected = ratio.clamp(max=2.0) if mode.endswith("truncate") else ratio * (ratio <= 2.0)
    assert (ratio > 2.0).any() and ((ratio < 2.0) & (ratio != 1.0)).any()
    torch.testing.assert_close(inputs["importance_sampling_ratio"], expected, rtol=1e-4, atol=1e-6)
    check_control(trainer, controller)


def half_precision(output_dir: Path, precision: str, **options: Any) -> tuple[DCGRPOTrainer, set[torch.dtype]]:
    """A trained run in mixed precision, and the dtypes that its MLP gave in the trainer's forwards."""
    trainer = dc_trainer(output_dir, **{precision: True}, **options)
    if precision == "fp16":  # Accelerate leaves fp16 off on the CPU, where torch has autocast and loss scaling for it
        trainer.accelerator.native_amp, trainer.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=256)
    dtypes: set[torch.dtype] = set()
    trainer.model.model.layers[0].mlp.register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))
    trainer.train()
    return trainer, dtypes


@both_controllers
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_trains_float32_weights(
    tmp_path: Path, controller: str, precision: str, dtype: torch.dtype
) -> None:
    trainer, dtypes = half_precision(tmp_path, precision, **CONTROLLERS[controller])
    assert dtypes == {dtype}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert weights(trainer).isfinite().all() and (weights(trainer) - weights_at_start()).abs().max() > 1e-3
    assert all(map(math.isfinite, logged(trainer, "loss")))
    check_control(trainer, controller)


def weights_at_start() -> torch.Tensor:
    """Those of every run's policy before its first step."""
    return torch.cat([p.detach().flatten() for p in tiny_model().parameters()])


def test_half_precisions_agree_with_themselves_best(tmp_path: Path) -> None:
    # fp16 has three bits more than bf16. The first batch is scored before any update.
    def floor(training: str, rollouts: str | None) -> float:
        trainer, _ = half_precision(tmp_path, training, rollout_precision=rollouts, max_steps=1)
        return logged(trainer, "dc/discrepancy/mean")[0]

    same, cast, other = floor("fp16", None), floor("fp16", "fp16"), floor("fp16", "bf16")
    assert 0 < same < cast < other / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_train(tmp_path: Path, dtype: torch.dtype) -> None:
    # Adam's default epsilon of 1e-8 is 0 in fp16.
    model = tiny_model().to(dtype)
    trainer = dc_trainer(tmp_path, model=model, rollout_precision=None, adam_epsilon=1e-3, **CONTROLLERS["lagrangian"])
    trainer.train()
    assert weights(trainer).isfinite().all()
    assert (weights(trainer).float() - weights_at_start()).abs().max() > 1e-3
    assert 0 < logged(trainer, "dc/discrepancy/mean")[0] < 1e-2
