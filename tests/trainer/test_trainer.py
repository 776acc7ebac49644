# SPDX-License-Identifier: Apache-2.0
"""The trainer: equal to TRL's where it must be, and the constraint where it differs."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import PROMPTS, dc_trainer, logged, replayed_rollouts, trl_trainer, weights
from tiny import tiny_model, tiny_tokenizer
from trl import GRPOConfig

from dc_trl import DCGRPOConfig, DCGRPOTrainer

# (gradient_accumulation_steps, steps_per_generation, num_iterations): aligned, two rollouts a step, two misaligned.
ALIGNED, SPANNING, REUSED, SPLIT = (2, 2, 1), (4, 2, 1), (1, 1, 2), (1, 2, 1)


def batching(layout: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("gradient_accumulation_steps", "steps_per_generation", "num_iterations"), layout, strict=True))


def trained(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A trainer after its run. Constructing one seeds the global generators, so pairs are run one after the other."""
    trainer = make(*args, **options)
    trainer.train()
    return trainer


def trl_log(trainer: Any) -> list[dict[str, float]]:
    """The log without what depends on the clock or on this package."""
    timed = ("time", "runtime", "per_second", "dc/")
    return [{k: v for k, v in e.items() if not any(t in k for t in timed)} for e in trainer.state.log_history]


@pytest.mark.parametrize("layout", [ALIGNED, SPANNING, REUSED, SPLIT])
def test_constraint_none_equals_grpo_to_the_bit(tmp_path: Path, layout: tuple[int, int, int]) -> None:
    theirs = trained(trl_trainer, tmp_path, **batching(layout))
    ours = trained(dc_trainer, tmp_path, constraint="none", **batching(layout))
    assert torch.equal(weights(ours), weights(theirs))
    assert trl_log(ours) == trl_log(theirs)
    assert logged(ours, "dc/discrepancy/mean")[0] > 0  # and it measures
    assert set(logged(ours, "dc/multiplier")) == {0.0}


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("layout", [ALIGNED, SPANNING, REUSED])
def test_a_zero_multiplier_equals_grpo_with_its_second_forward(
    tmp_path: Path, layout: tuple[int, int, int], mode: str
) -> None:
    options = {"vllm_importance_sampling_mode": mode, **batching(layout)}
    theirs = trained(trl_trainer, tmp_path, **options)
    ours = trained(dc_trainer, tmp_path, constraint="fixed", multiplier_init=0.0, **options)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-7)
    if layout == SPANNING:
        return  # TRL averages the two rollouts' means; this package has one global mean
    for key in ("sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/max"):
        assert logged(ours, key)[0] == pytest.approx(logged(theirs, key)[0], rel=1e-5)


@pytest.mark.parametrize(("layout", "forwards"), [(ALIGNED, 2), (SPANNING, 4)])
def test_the_aligned_path_has_no_extra_forward(
    tmp_path: Path, layout: tuple[int, int, int], forwards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = dc_trainer(tmp_path, max_steps=1, **batching(layout))
    calls = []
    forward = trainer.model.forward
    monkeypatch.setattr(trainer.model, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    trainer.train()
    assert len(calls) == forwards


@pytest.mark.parametrize("layout", [ALIGNED, SPANNING, REUSED, SPLIT])
def test_the_multiplier_follows_its_update(tmp_path: Path, layout: tuple[int, int, int]) -> None:
    options = {"discrepancy_tolerance": 0.02, "dual_lr": 3.0, "max_steps": 6, **batching(layout)}
    trainer = dc_trainer(tmp_path, **options)
    trainer.train()
    applied, violations = logged(trainer, "dc/multiplier"), logged(trainer, "dc/violation")
    iterations = {ALIGNED: 6, SPANNING: 6, REUSED: 3, SPLIT: 3}[layout]  # 6 steps; one or two steps an iteration
    assert len(applied) == iterations
    for now, violation, after in zip(applied, violations, [*applied[1:], trainer.dual.value], strict=True):
        assert after == pytest.approx(min(max(now + 3.0 * violation, 0.0), 1.0))
    assert len(set(applied)) > 1


def test_micro_batches_do_not_change_the_result(tmp_path: Path) -> None:
    options = {"rollout_func": replayed_rollouts(), "discrepancy_tolerance": 0.01, "max_steps": 2, "dual_lr": 5.0}
    whole = trained(dc_trainer, tmp_path, per_device_train_batch_size=16, **options)
    parts = trained(dc_trainer, tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=2, **options)
    for key in ("dc/discrepancy/mean", "dc/discrepancy/p99", "dc/multiplier", "dc/chi2_seq"):
        assert logged(parts, key) == pytest.approx(logged(whole, key), rel=1e-5)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=2e-5)


def test_calibration_then_constraint(tmp_path: Path) -> None:
    trainer = dc_trainer(tmp_path, tolerance_calibration_batches=2, tolerance_slack=2.0, max_steps=4)
    assert trainer.discrepancy_tolerance is None
    trainer.train()
    floor = sum(logged(trainer, "dc/discrepancy/mean")[:2]) / 2
    assert trainer.discrepancy_tolerance == pytest.approx(2 * floor)
    assert logged(trainer, "dc/multiplier")[:3] == [0.0, 0.0, 0.1]
    assert logged(trainer, "dc/penalty_share")[:2] == [0.0, 0.0] and logged(trainer, "dc/penalty_share")[2] > 0
    assert len(logged(trainer, "dc/tolerance")) == 2


def test_resume_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "tolerance_calibration_batches": 2}
    options |= {"dual_lr": 5.0, "length_decay": True, "length_decay_period": 2, "lr_scheduler_type": "cosine"}
    whole = dc_trainer(tmp_path / "run", **options)
    whole.train()
    state = json.loads((tmp_path / "run/checkpoint-3/dc_grpo_state.json").read_text())
    assert state["tolerance"]["count"] == 2
    resumed = dc_trainer(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert resumed.dual.value == whole.dual.value
    assert resumed.discrepancy_tolerance == whole.discrepancy_tolerance
    for key in ("dc/multiplier", "learning_rate", "length_decay/lr_scale", "dc/grad_norm_smoothed"):
        assert logged(resumed, key) == logged(whole, key)
    assert logged(whole, "length_decay/lr_scale") == [1.0, 0.5, 0.5, 0.25, 0.25, 0.125]
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def growing_rollouts() -> Callable[..., dict[str, Any]]:
    """A `rollout_func` whose n-th rollout has n tokens a completion, on average and exactly, give or take one."""
    calls: list[int] = []

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        calls.append(1)
        lengths = [len(calls) + (1, -1)[i % 2] * (len(calls) > 1) for i in range(len(prompts))]
        ids = [[6 + (i + t) % 30 for t in range(length)] for i, length in enumerate(lengths)]
        logprobs = [[-2.0] * length for length in lengths]
        return {"prompt_ids": [[5, 6]] * len(prompts), "completion_ids": ids, "logprobs": logprobs}

    return rollout


@pytest.mark.parametrize("layout", [ALIGNED, SPANNING, REUSED, SPLIT])
@pytest.mark.parametrize("constraint", ["none", "lagrangian"])
def test_length_decay_sees_every_rollout_of_a_step(
    tmp_path: Path, layout: tuple[int, int, int], constraint: str
) -> None:
    options = {"constraint": constraint, "length_decay": True, "max_steps": 4, **batching(layout)}
    trainer = dc_trainer(tmp_path, rollout_func=growing_rollouts(), max_completion_length=32, **options)
    trainer.train()
    lengths = trainer._length_decay.detector.state_dict()["lengths"]
    # SPANNING: rollouts 1 and 2 in step 1, 3 and 4 in step 2, and so on. REUSED and SPLIT: one for two steps.
    expected = {ALIGNED: [1, 2, 3, 4], SPANNING: [1.5, 3.5, 5.5, 7.5], REUSED: [1, 2], SPLIT: [1, 2]}[layout]
    assert lengths == pytest.approx(expected)
    assert lengths == logged(trainer, "completions/mean_length")


def test_length_decay_resumes_between_steps_of_several_rollouts(tmp_path: Path) -> None:
    options = {"length_decay": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, **batching(SPANNING)}
    whole = dc_trainer(tmp_path / "run", **options)
    whole.train()
    resumed = dc_trainer(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    state = whole._length_decay.detector.state_dict()
    assert state["steps"] == [1, 2, 3, 4] and state["lengths"] == logged(whole, "completions/mean_length")
    assert resumed._length_decay.detector.state_dict() == state


def test_resume_inside_the_calibration(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "tolerance_calibration_batches": 3}
    whole = dc_trainer(tmp_path / "run", **options)
    whole.train()
    resumed = dc_trainer(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    assert resumed.discrepancy_tolerance == whole.discrepancy_tolerance


def test_a_rollout_func_drives_the_same_constraint(tmp_path: Path) -> None:
    trainer = dc_trainer(tmp_path, rollout_func=replayed_rollouts(), constraint="fixed", multiplier_init=0.5)
    trainer.train()
    assert logged(trainer, "dc/penalty_share")[0] > 0
    assert 1.0 < logged(trainer, "sampling/importance_sampling_ratio/max")[0] <= 2.0


def test_a_rollout_func_is_measured_without_constraint(tmp_path: Path) -> None:
    trainer = dc_trainer(tmp_path, rollout_func=replayed_rollouts(), constraint="none")
    trainer.train()
    assert logged(trainer, "dc/discrepancy/mean")[0] > 0 and logged(trainer, "dc/chi2_token")


def test_the_penalty_lowers_discrepant_tokens_and_nothing_else(tmp_path: Path) -> None:
    # All rewards are equal, so the penalty is the whole signal. The engine claims probability 1 for position 0.
    def claim(logprobs: list[list[Any]]) -> None:
        for sequence in logprobs:
            sequence[0] = 0.0
            sequence[1] = None  # not scored by the engine: no penalty

    def change(**options: Any) -> torch.Tensor:
        trainer = dc_trainer(
            tmp_path, rollout_func=replayed_rollouts(edit=claim), reward_funcs=lambda completions, **_: [0.0] * 8,
            max_steps=1, learning_rate=1e-3, vllm_importance_sampling_correction=False, **options,
        )  # fmt: skip
        penalties = []
        trainer.step_observers.append(lambda inputs, step: penalties.append(-inputs["advantages"]))
        trainer.train()
        return penalties[0]

    penalty = change(constraint="fixed", multiplier_init=1.0)
    assert (penalty[:, 0] > 0.5).all()  # |π − 1| of a policy that spreads over 100 tokens
    assert (penalty[:, 1] == 0).all()
    none = change(constraint="none")
    assert (none == 0).all()


def test_masked_tokens_carry_no_penalty_and_do_not_count(tmp_path: Path) -> None:
    def run(poison: float) -> DCGRPOTrainer:
        base = replayed_rollouts(edit=lambda logprobs: [s.__setitem__(1, poison) for s in logprobs])

        def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
            output = base(prompts, trainer)
            return output | {"env_mask": [[int(t != 1) for t in range(len(c))] for c in output["completion_ids"]]}

        trainer = dc_trainer(tmp_path, rollout_func=rollout, constraint="fixed", multiplier_init=1.0, max_steps=1)
        trainer.train()
        return trainer

    clean, poisoned = run(-2.0), run(0.0)
    assert logged(clean, "dc/discrepancy/mean") == logged(poisoned, "dc/discrepancy/mean")
    assert torch.equal(weights(clean), weights(poisoned))


def test_masked_truncated_completions_do_not_count(tmp_path: Path) -> None:
    trainer = dc_trainer(tmp_path, rollout_func=replayed_rollouts(), mask_truncated_completions=True, max_steps=1)
    trainer.train()  # no replayed completion ends, so all are masked
    assert logged(trainer, "dc/discrepancy/mean") == [None]
    assert trainer.dual.value == 0.1 and trainer.discrepancy_tolerance is None


def strict_log(folder: Path) -> list[dict[str, Any]]:
    """The entries of log.jsonl, which must be JSON to the letter."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (folder / "log.jsonl").read_text().splitlines()
    return [entry for line in lines if "start" not in (entry := json.loads(line, parse_constant=refuse))]


@pytest.mark.parametrize("options", [{}, {"constraint": "none"}, {"discrepancy_tolerance": 0.01}], ids=str)
def test_a_batch_without_a_valid_token_logs_null(tmp_path: Path, options: dict[str, Any]) -> None:
    options = options | {"mask_truncated_completions": True, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    evaluation = PROMPTS.select(range(4))
    trainer = dc_trainer(tmp_path, rollout_func=replayed_rollouts(), eval_dataset=evaluation, **options)
    trainer.train()
    entries = strict_log(tmp_path)
    train, evaluated = entries[0], next(e for e in entries if "eval_reward" in e)
    for entry, prefix in ((train, ""), (evaluated, "eval_")):
        measured = {k: v for k, v in entry.items() if k.startswith((f"{prefix}dc/", f"{prefix}sampling/"))}
        applied = {f"{prefix}dc/multiplier"}
        applied |= {f"{prefix}dc/tolerance"} if options.get("discrepancy_tolerance") else set()
        applied |= {"dc/grad_norm_smoothed"} if not prefix else set()
        assert {key for key, value in measured.items() if value is not None} == applied
        assert len(measured) - len(applied) >= 19
        assert any("sampling/" in key for key in measured) == (options.get("constraint") != "none")
    assert weights(trainer).isfinite().all()


# What an engine may return where it has no log-prob, beside None; −9999 is vLLM's word for −inf.
NO_LOG_PROB = [math.nan, -math.inf, math.inf, -9999.0, 0.7, 3.0]


@pytest.mark.parametrize("value", NO_LOG_PROB)
@pytest.mark.parametrize("multiplier", [0.0, 0.5])
def test_a_sampling_log_prob_that_is_none_trains_like_a_missing_one(
    tmp_path: Path, value: float, multiplier: float
) -> None:
    def run(value: float | None) -> DCGRPOTrainer:
        def edit(logprobs: list[list[Any]]) -> None:
            logprobs[0][1] = logprobs[5][0] = value

        trainer = dc_trainer(
            tmp_path, rollout_func=replayed_rollouts(edit=edit), discrepancy_metric="logprob_diff", max_steps=2,
            constraint="fixed", multiplier_init=multiplier, discrepancy_tolerance=0.1,
        )  # fmt: skip
        trainer.train()
        return trainer

    missing, other = run(None), run(value)
    assert torch.equal(weights(other), weights(missing)) and weights(other).isfinite().all()
    assert not torch.equal(weights(other), weights_at_start())
    ours, theirs = (
        [{k: v for k, v in e.items() if k.startswith(("dc/", "sampling/", "loss"))} for e in t.state.log_history]
        for t in (other, missing)
    )
    assert ours == theirs
    assert logged(other, "dc/nan_fraction")[0] > 0 and all(map(math.isfinite, logged(other, "dc/discrepancy/mean")))


@pytest.mark.parametrize("metric", ["prob_diff", "prob_ratio", "logprob_diff"])
def test_one_infinite_log_prob_leaves_weights_multiplier_and_tolerance_finite(tmp_path: Path, metric: str) -> None:
    def edit(logprobs: list[list[Any]]) -> None:
        logprobs[0][1] = -math.inf

    trainer = dc_trainer(
        tmp_path, rollout_func=replayed_rollouts(edit=edit), discrepancy_metric=metric, tolerance_calibration_batches=1
    )
    trainer.train()
    assert weights(trainer).isfinite().all() and all(logged(trainer, "grad_norm"))
    assert math.isfinite(trainer.dual.value) and math.isfinite(trainer.discrepancy_tolerance or math.nan)


def weights_at_start() -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in tiny_model().parameters()])


def break_forward(trainer: DCGRPOTrainer, value: float, after: int) -> None:
    """After `after` calls, the trainer's forward gives `value` for the last log-prob of the longest completions."""
    calls: list[int] = []
    forward = trainer.model.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        calls.append(1)
        if len(calls) > after:
            outputs.log_probs[:, -1] = outputs.log_probs[:, -1] * value  # a graph that NaN flows back through
        return outputs

    trainer.model.forward = broken  # type: ignore[method-assign]


@pytest.mark.parametrize("layout", [ALIGNED, SPANNING, REUSED])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_log_prob_of_the_trainer_that_is_not_finite_stops_before_the_weights(
    tmp_path: Path, layout: tuple[int, int, int], value: float
) -> None:
    trainer = dc_trainer(tmp_path, rollout_func=replayed_rollouts(), **batching(layout))
    break_forward(trainer, value, after=1)
    with pytest.raises(FloatingPointError, match=r"\d log-probs of the training engine.*learning_rate.*constraint"):
        trainer.train()
    assert weights(trainer).isfinite().all()


def test_without_a_constraint_a_nan_is_trls_business_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import transformers

    transformers.utils.logging.enable_propagation()
    trainer = dc_trainer(tmp_path, rollout_func=replayed_rollouts(), constraint="none", max_steps=1)
    break_forward(trainer, math.nan, after=0)
    trainer.train()
    transformers.utils.logging.disable_propagation()
    assert weights(trainer).isnan().any() and logged(trainer, "dc/nan_fraction")[0] > 0
    assert all(math.isfinite(x) for x in logged(trainer, "dc/discrepancy/mean"))
    assert sum("training engine are NaN" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("mode", ["token_mask", "sequence_mask", "token_truncate"])
def test_without_a_constraint_a_rollout_func_shows_what_the_mask_would_take(tmp_path: Path, mode: str) -> None:
    options = {"rollout_func": replayed_rollouts(), "vllm_importance_sampling_mode": mode, "max_steps": 1}
    options |= {"vllm_importance_sampling_clip_max": {"sequence_mask": 1e-6}.get(mode, 0.1)}
    measured = dc_trainer(tmp_path, constraint="none", **options)
    measured.train()
    applied = dc_trainer(tmp_path, constraint="fixed", multiplier_init=0.0, **options)
    applied.train()
    for key in ("dc/masked_fraction", "dc/discrepancy_kept/mean"):
        assert logged(measured, key) == logged(applied, key)
    assert (logged(measured, "dc/masked_fraction")[0] > 0) == mode.endswith("mask")
    assert not logged(measured, "sampling/importance_sampling_ratio/max")  # nothing is applied
    off = dc_trainer(tmp_path, constraint="none", vllm_importance_sampling_correction=False, **options)
    off.train()
    assert logged(off, "dc/masked_fraction") == [0.0]
    assert torch.equal(weights(off), weights(measured))


def test_evaluation_measures_and_leaves_the_multiplier_alone(tmp_path: Path) -> None:
    trainer = dc_trainer(tmp_path, eval_dataset=PROMPTS.select(range(4)), discrepancy_tolerance=1e-6, dual_lr=10.0)
    trainer.evaluate()
    assert trainer.dual.value == 0.1
    entry = trainer.state.log_history[-1]
    assert entry["eval_dc/discrepancy/mean"] > 0 and entry["eval_dc/violation"] > 0
    trainer.train()
    assert trainer.dual.value > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "grpo"},
        {"loss_type": "bnpo"},
        {"loss_type": "dr_grpo"},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "luspo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "discrepancy_level": "sequence"},
        {"beta": 0.04},
        {"delta": 2.0},
        {"top_entropy_quantile": 0.5},
        {"entropy_coef": 0.01},
        {"epsilon": 0.2, "epsilon_high": 0.28},
        {"discrepancy_metric": "prob_ratio"},
        {"discrepancy_metric": "logprob_diff", "discrepancy_average": "token"},
        {"constraint": "threshold", "discrepancy_tolerance": 0.02},
        {"temperature": 0.7},
        {"gradient_checkpointing": True},
        {"bf16": True},
    ],
    ids=str,
)
def test_supported_options_train_under_the_constraint(tmp_path: Path, options: dict[str, Any]) -> None:
    model = tiny_model()
    if "beta" in options:  # TRL reloads the reference from disk
        model.save_pretrained(tmp_path / "policy")
        tiny_tokenizer().save_pretrained(tmp_path / "policy")
        model = str(tmp_path / "policy")
    trainer = dc_trainer(
        tmp_path, model=model, **({"discrepancy_tolerance": 0.001, "multiplier_init": 0.5, "max_steps": 2} | options)
    )
    before = weights(trainer)
    trainer.train()
    assert all(math.isfinite(x) for x in logged(trainer, "loss"))
    assert not torch.equal(weights(trainer), before)
    assert logged(trainer, "dc/penalty_share")[0] > 0


def test_notable_states_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import transformers

    transformers.utils.logging.enable_propagation()
    trainer = dc_trainer(tmp_path, discrepancy_tolerance=0.0, dual_lr=1e6, multiplier_max=100.0)
    trainer.train()
    transformers.utils.logging.disable_propagation()
    said = [r.getMessage() for r in caplog.records if "DC-GRPO" in r.getMessage()]
    assert sum("multiplier_max" in m for m in said) == 1
    assert sum("the penalty is" in m for m in said) == 1


def test_the_model_card_says_what_was_constrained(tmp_path: Path) -> None:
    trainer = dc_trainer(tmp_path, discrepancy_tolerance=0.0123)
    trainer.train()
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    last = logged(trainer, "dc/discrepancy/mean")[-1]
    for expected in ("| tolerance | 0.0123 (given) |", f"{last:.4g}", "2606.08779", "2602.01826", "int4"):
        assert expected in card
    assert card.index("## Discrepancy constraint") < card.index("## Citations")
    calibrating = dc_trainer(tmp_path, constraint="lagrangian")
    calibrating.create_model_card(model_name="tiny")
    assert "| tolerance | still being calibrated |" in (tmp_path / "README.md").read_text()


def test_no_source_of_log_probs_is_refused_before_the_model_loads(tmp_path: Path) -> None:
    args = DCGRPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False)
    with pytest.raises(
        ValueError, match="rollout_backend='transformers'.*use_vllm=True.*rollout_func.*constraint='none'"
    ):
        DCGRPOTrainer("no/such-model", lambda **_: [], args, train_dataset=PROMPTS)


def test_missing_args_are_named_and_given_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a GPU the defaults need these two, or TRL's config refuses bf16.
    on_cpu = {"use_cpu": True, "bf16": False, "report_to": "none"}
    monkeypatch.setattr("dc_trl.trainer.DCGRPOConfig", lambda name: DCGRPOConfig(str(tmp_path / name), **on_cpu))
    with pytest.raises(ValueError, match=r"No `args` were given.*args=DCGRPOConfig\(rollout_backend='transformers'\)"):
        DCGRPOTrainer("no/such-model", lambda **_: [], train_dataset=PROMPTS)


def test_a_rollout_func_without_log_probs_is_refused(tmp_path: Path) -> None:
    base = replayed_rollouts()
    trainer = dc_trainer(tmp_path, rollout_func=lambda p, t: base(p, t) | {"logprobs": None})
    with pytest.raises(ValueError, match="no log-probs.*logprobs"):
        trainer.train()


def test_a_grpo_config_is_refused_with_the_remedy(tmp_path: Path) -> None:
    args = GRPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False)
    with pytest.raises(TypeError, match="Rename GRPOConfig to DCGRPOConfig"):
        DCGRPOTrainer("no/such-model", lambda **_: [], args, train_dataset=PROMPTS)
