# SPDX-License-Identifier: Apache-2.0
"""Rejection through the trainer: what is rejected leaves loss, normaliser and penalty, and is measured all the same.

The oracle of most tests is TRL's own loss with the rejected tokens masked (`env_mask` 0), which takes them out of its
sums and counts of tokens. Its counts of sequences and micro-batches, which keep empty ones, are put right by the rate.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rejecting import ALIGNED, BOUNDS, REUSED, SPLIT, Marks, assert_close, everything, marked, run, some, whole
from runs import logged, record_losses, replayed_rollouts, weights
from tiny import tiny_model

from dc_trl import DCGRPOTrainer
from dc_trl.estimators.rejection import RULES, RejectionInputs, reject, resolve_bounds

TOKEN_LOSSES, SEQUENCE_LOSSES = ("dapo", "cispo"), ("grpo", "dr_grpo", "luspo", "sapo")
LOSSES = (*TOKEN_LOSSES, *SEQUENCE_LOSSES, "bnpo")

# Bounds at which nothing is rejected.
WIDE: dict[str, dict[str, float]] = {
    "geometric": {"low": 0.0, "high": torch.inf},
    "token_veto": {"low": 0.0},
    "max_tv": {"high": 1.0},
    "kpop": {"high": torch.inf},
    "icepop": {"low": 0.0, "high": torch.inf},
    "dppo_tv": {"high": 1.0},
    "dppo_kl": {"high": torch.inf},
}
assert WIDE.keys() == RULES.keys()


def constraint_for(loss: str) -> dict[str, Any]:
    return {"loss_type": loss} | ({"constraint": "none"} if loss == "sapo" else {})


def sequence_factor(loss: str) -> float:
    """By what `whole` is to scale a loss whose divisor counts what is empty: 16/11 sequences, 4/3 micro-batches."""
    return 16 / 11 if loss in SEQUENCE_LOSSES else 4 / 3 if loss == "bnpo" else 1.0


CASES = [(loss, whole, layout) for loss in LOSSES for layout in (ALIGNED, REUSED)]
CASES += [(loss, some, ALIGNED) for loss in LOSSES] + [("dapo", whole, SPLIT), ("grpo", whole, SPLIT)]


@pytest.mark.parametrize(("loss", "marks", "layout"), CASES)
def test_the_step_is_that_of_the_kept_tokens_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, marks: Marks, layout: tuple[int, int, int]
) -> None:
    factor = sequence_factor(loss) if marks is whole else 1.0
    options = {**constraint_for(loss), "learning_rate": 0.1}
    rejecting = {"rejection": ["icepop"], "rejection_bounds": BOUNDS}
    change, trainer = run(tmp_path, monkeypatch, marked(marks), layout, **options, **rejecting)
    options["learning_rate"] *= factor
    alone, oracle = run(tmp_path, monkeypatch, marked(marks, masked=True), layout, **options)
    assert_close(change, alone)
    losses = [factor * value for value in logged(oracle, "loss")]
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-4, abs=1e-6)
    if marks is some:
        kept, _ = run(tmp_path, monkeypatch, marked(marks), layout, **options)
        assert (kept - alone).norm() > 0.03 * alone.norm()


@pytest.mark.parametrize("layout", [ALIGNED, REUSED], ids=["aligned", "reused"])
@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dapo"])
def test_dropped_groups_and_rejected_tokens_are_both_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, layout: tuple[int, int, int]
) -> None:
    # The third group has no variance. Of the other three `whole` leaves 2 micro-batches, and 7 of 12 sequences.
    def flat(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [0.0 if p[0] == "4" else float(len(c)) for p, c in zip(prompts, completions, strict=True)]

    options = {"reward_funcs": flat, "zero_variance_groups": "drop", "loss_type": loss, "learning_rate": 0.1}
    rejecting = {"rejection": ["icepop"], "rejection_bounds": BOUNDS}
    change, _ = run(tmp_path, monkeypatch, marked(whole), layout, **options, **rejecting)
    if loss != "bnpo":  # whose dropping counts the micro-batches that the mask has emptied too
        options["learning_rate"] *= {"grpo": 12 / 7}.get(loss, 1.0)
    alone, _ = run(tmp_path, monkeypatch, marked(whole, masked=True), layout, **options)
    assert_close(change, alone)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("constraint", "layout"), [("lagrangian", ALIGNED), ("lagrangian", REUSED), ("none", ALIGNED)], ids=str
)
def test_nothing_rejected_equals_off_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, layout: tuple[int, int, int], constraint: str
) -> None:
    options = {"constraint": constraint, "discrepancy_tolerance": 1e-3, "optim": "adamw_torch", "learning_rate": 1e-2}
    off, without = run(tmp_path, monkeypatch, replayed_rollouts(), layout, **options)
    bounds = {rule: WIDE[rule]}
    on, trainer = run(
        tmp_path, monkeypatch, replayed_rollouts(), layout, rejection=[rule], rejection_bounds=bounds, **options
    )
    assert torch.equal(on, off)
    assert logged(trainer, f"dc/rejection/{rule}/tokens") == [0.0]
    log = [{k: v for k, v in e.items() if "rejection" not in k and "time" not in k and "per_second" not in k}
           for e in trainer.state.log_history]  # fmt: skip
    for ours, theirs in zip(log, without.state.log_history, strict=True):
        assert ours == {k: v for k, v in theirs.items() if "time" not in k and "per_second" not in k}


def test_a_sequence_rule_that_rejects_nothing_equals_off_with_one_ratio_a_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"constraint": "none", "importance_sampling_level": "sequence", "loss_type": "grpo"}
    off, _ = run(tmp_path, monkeypatch, replayed_rollouts(), REUSED, **options)
    wide = {"rejection": ["geometric"], "rejection_bounds": {"geometric": WIDE["geometric"]}}
    on, _ = run(tmp_path, monkeypatch, replayed_rollouts(), REUSED, **options, **wide)
    assert torch.equal(on, off)


@pytest.mark.parametrize("layout", [ALIGNED, REUSED], ids=["aligned", "reused"])
@pytest.mark.parametrize("loss", ["grpo", "luspo"])
def test_a_sequence_rule_goes_with_one_ratio_a_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, layout: tuple[int, int, int]
) -> None:
    def two(row: int, length: int) -> list[int]:
        return list(range(length)) if row in (2, 9) else []

    options = {"constraint": "none", "importance_sampling_level": "sequence", "loss_type": loss, "learning_rate": 0.1}
    rejecting = {"rejection": "geometric", "rejection_bounds": {"geometric": {"low": 0.0, "high": 1e4}}}
    change, _ = run(tmp_path, monkeypatch, marked(two), layout, **options, **rejecting)
    options["learning_rate"] *= 16 / 14
    alone, _ = run(tmp_path, monkeypatch, marked(two, masked=True), layout, **options)
    assert_close(change, alone)


# What the rules say of the records of the losses, and what TRL's formula makes of it


def verdicts(rules: list[str], bounds: dict[str, Any], records: list[dict[str, Any]]) -> list[torch.Tensor]:
    """What all rules keep of each recorded micro-batch."""
    found = []
    for record in records:
        mask = record["completion_mask"].bool()
        current = record["train_logps"]
        inputs = RejectionInputs(
            current, record.get("old_per_token_logps", current), record["sampling_per_token_logps"], mask,
            record["raw_advantages"],
        )  # fmt: skip
        found.append(reject(rules, resolve_bounds(rules, bounds), inputs)[0] & mask)
    return found


def expected_loss(loss: str, records: list[dict[str, Any]], kept: list[torch.Tensor], divisor: float) -> float:
    """The loss of an optimizer step over the kept tokens of its micro-batches. `divisor`: tokens, or sequences."""
    total = 0.0
    for record, keep in zip(records, kept, strict=True):
        ratio = (record["train_logps"] - record.get("old_per_token_logps", record["train_logps"])).exp()
        advantages = record["raw_advantages"].unsqueeze(1)
        values = -torch.min(ratio * advantages, ratio.clamp(0.8, 6.0) * advantages)
        if loss == "grpo":
            total += float(((values * keep).sum(1) / keep.sum(1).clamp(min=1)).sum())
        else:
            total += float((values * keep).sum())
    return total / divisor


def keep_raw_advantages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the batch carry its advantages as they were before rejection."""
    compute = DCGRPOTrainer._compute_loss

    def recording(self: DCGRPOTrainer, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        return compute(self, model, inputs | {"raw_advantages": inputs["advantages"]})

    monkeypatch.setattr(DCGRPOTrainer, "_compute_loss", recording)


@pytest.mark.parametrize("loss", ["grpo", "dapo"])
@pytest.mark.parametrize(
    "rules", [["dppo_tv"], ["dppo_kl"], ["dppo_tv", "geometric"], ["icepop", "max_tv", "dppo_kl"]], ids="+".join
)
def test_rules_on_the_current_policy_judge_every_update_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: list[str], loss: str
) -> None:
    bounds: dict[str, Any] = {
        "dppo_tv": {"high": 0.05},
        "dppo_kl": {"high": 0.02},
        "geometric": {"low": 0.05, "high": 2.0},
        "icepop": {"low": 0.004, "high": 2.0},
        "max_tv": {"high": 0.4},
    }
    bounds = {name: bounds[name] for name in rules}
    keep_raw_advantages(monkeypatch)
    records = record_losses(monkeypatch)
    options = {"constraint": "none", "loss_type": loss, "learning_rate": 2.0, "rejection": rules}
    _, trainer = run(tmp_path, monkeypatch, replayed_rollouts(), REUSED, rejection_bounds=bounds, **options)
    steps = [records[:4], records[4:]]
    assert len(records) == 8
    early = [name for name in rules if not name.startswith("dppo")]
    fractions = []
    for step, logged_loss in zip(steps, logged(trainer, "loss"), strict=True):
        kept = verdicts(rules, bounds, step)
        before = [record["completion_mask"].bool() for record in step]
        if early:
            before = verdicts(early, {name: bounds[name] for name in early}, step)
        if loss == "grpo":
            divisor = sum(int(keep.any(1).sum()) for keep in kept)
        else:  # of one generation batch, which each step uses whole
            divisor = sum(int(keep.sum()) for keep in kept)
        assert logged_loss == pytest.approx(expected_loss(loss, step, kept, divisor), rel=1e-4, abs=1e-6)
        fractions.append(sum(int(k.sum()) for k in kept) / sum(int(b.sum()) for b in before))
    assert all(0 < fraction < 1 for fraction in fractions) and fractions[0] != fractions[1]


def test_the_factor_is_on_the_gradient_before_it_is_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"learning_rate": 0.1, "max_grad_norm": 1e-3, "logging_steps": 1}
    rejecting = {"rejection": ["icepop"], "rejection_bounds": BOUNDS}
    change, trainer = run(tmp_path, monkeypatch, marked(whole), **options, **rejecting)
    _, oracle = run(tmp_path, monkeypatch, marked(whole, masked=True), **options)
    assert logged(trainer, "grad_norm") == pytest.approx(logged(oracle, "grad_norm"), rel=1e-5)
    assert change.norm() == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_a_loss_scaler_takes_its_own_factor_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fp16(rollouts: Any, **options: Any) -> torch.Tensor:
        _, trainer = run(tmp_path, monkeypatch, rollouts, train=False, fp16=True, learning_rate=0.1, **options)
        # Accelerate leaves fp16 off on the CPU, where torch has autocast and loss scaling for it.
        trainer.accelerator.native_amp = True
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256)
        before = weights(trainer)
        trainer.train()
        return weights(trainer) - before

    change = fp16(marked(whole), rejection=["icepop"], rejection_bounds=BOUNDS)
    alone = fp16(marked(whole, masked=True))
    assert alone.norm() > 0.01 and (change - alone).norm() < 1e-2 * alone.norm()


def test_masters_of_16_bit_weights_get_the_scaled_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_rounding(rollouts: Any, **options: Any) -> torch.Tensor:
        monkeypatch.setattr("runs.tiny_model", lambda: tiny_model().to(torch.bfloat16))
        options |= {"rollout_backend": "transformers", "rollout_precision": "bf16", "sync_rounding": "dither"}
        trainer = run(tmp_path, monkeypatch, rollouts, train=False, learning_rate=0.1, bf16=False, **options)[1]
        before = weights(trainer).float()
        trainer.train()
        return weights(trainer).float() - before

    change = one_rounding(marked(whole), rejection=["icepop"], rejection_bounds=BOUNDS)
    alone = one_rounding(marked(whole, masked=True))
    assert alone.norm() > 0.01 and (change - alone).norm() < 3e-2 * alone.norm()


# What is measured, logged and said


def test_numbers_by_hand_and_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Any] = []

    def train(**options: Any) -> DCGRPOTrainer:
        _, trainer = run(tmp_path, monkeypatch, marked(whole), train=False, **options)
        trainer.step_observers.append(lambda inputs, step: steps.append((dict(inputs), step)))
        trainer.train()
        return trainer

    rules = ["icepop", "token_veto"]
    trainer = train(rejection=rules, rejection_bounds=BOUNDS | {"token_veto": {"low": 0.0}})
    lengths = [int(n) for _, step in steps for n in step.masks.valid.sum(1)]
    # `whole` marks all of sequences 2 and 4 to 7, and one token of each other odd one: 1, 3, 9, 11, 13, 15.
    rejected = sum(lengths[row] for row in (2, 4, 5, 6, 7)) + 6
    assert len(lengths) == 16
    assert logged(trainer, "dc/rejection/icepop/tokens") == [pytest.approx(rejected / sum(lengths))]
    assert logged(trainer, "dc/rejection/icepop/sequences") == [pytest.approx(11 / 16)]
    assert logged(trainer, "dc/rejection/token_veto/tokens") == [0.0]
    assert logged(trainer, "dc/rejection/any/tokens") == logged(trainer, "dc/rejection/icepop/tokens")
    for inputs, step in steps:
        out = step.masks.valid & ~step.verdict.kept
        assert (step.penalty[out] == 0).all() and (inputs["advantages"][out] == 0).all()
        assert (step.penalty[step.masks.valid & ~out] > 0).all()
    measured = {k: v for k, v in trainer.state.log_history[0].items() if k.startswith("dc/") and "rejection" not in k}
    off = train().state.log_history[0]
    assert measured.pop("dc/penalty_share") < off["dc/penalty_share"]
    assert measured == {key: off[key] for key in measured if key != "dc/grad_norm_smoothed"} | {
        "dc/grad_norm_smoothed": measured["dc/grad_norm_smoothed"]
    }


@pytest.mark.parametrize("layout", [ALIGNED, REUSED], ids=["aligned", "reused"])
@pytest.mark.parametrize("loss", ["dapo", "grpo", "bnpo"])
def test_a_batch_that_is_rejected_whole_trains_on_nothing_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, loss: str, layout: Any
) -> None:
    options = {"constraint": "lagrangian", "discrepancy_tolerance": 1e-3, "loss_type": loss, "max_steps": 4}
    rejecting = {"rejection": ["icepop"], "rejection_bounds": BOUNDS}
    change, trainer = run(tmp_path, monkeypatch, marked(everything), layout, **options, **rejecting)
    assert (change == 0).all() and logged(trainer, "loss") == [0.0] * 4
    assert set(logged(trainer, "dc/rejection/icepop/tokens")) == {1.0}
    assert trainer.dual.value > 0.3  # what is rejected still drives it
    said = [record for record in caplog.records if "rejected every token of a batch" in record.message]
    assert len(said) == 1


def test_evaluation_is_over_the_kept_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluated(loss: str, masked: bool, **options: Any) -> dict[str, float]:
        data = Dataset.from_dict({"prompt": [f"{first}+1=" for first in "2345"]})
        _, trainer = run(
            tmp_path, monkeypatch, marked(some, masked), train=False, loss_type=loss, eval_dataset=data,
            per_device_eval_batch_size=16, **options,
        )  # fmt: skip
        return trainer.evaluate()

    for loss in ("dapo", "grpo"):
        kept = evaluated(loss, False, rejection=["icepop"], rejection_bounds=BOUNDS)
        alone = evaluated(loss, True)
        assert kept["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)
        assert kept["eval_loss"] != pytest.approx(evaluated(loss, False)["eval_loss"], rel=1e-2)
        assert 0 < kept["eval_dc/rejection/icepop/tokens"] < 1


def test_an_interrupted_step_leaves_nothing_to_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rejecting = {"rejection": ["icepop"], "rejection_bounds": BOUNDS, "learning_rate": 0.1}
    expected, _ = run(tmp_path, monkeypatch, marked(some), **rejecting)
    _, trainer = run(tmp_path, monkeypatch, marked(some), train=False, **rejecting)
    before = weights(trainer)
    step, calls = trainer._take_verdict, []

    def interrupted(verdict: Any) -> None:
        step(verdict)
        calls.append(verdict)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_take_verdict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    monkeypatch.setattr(trainer, "_take_verdict", step)
    trainer.model.zero_grad()
    trainer.train()
    assert torch.equal(weights(trainer) - before, expected)
