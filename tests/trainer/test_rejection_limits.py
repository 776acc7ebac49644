# SPDX-License-Identifier: Apache-2.0
"""What rejection does not go with: whatever would keep a part of a rejected token in the loss or its divisor."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import DistributedType
from rejecting import ALIGNED, BOUNDS, REUSED, SPLIT, assert_close, marked, run, whole
from runs import dc_trainer, replayed_rollouts
from tiny import tiny_model

from dc_trl.estimators.rejection.combinations import is_settled_late
from dc_trl.training import rejection_trainer

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"loss_type": "vespo"}, "`loss_type` is 'vespo'", "'dapo'"),
    ({"beta": 0.1}, "`beta` is 0.1", "Use 0"),
    ({"entropy_coef": 0.1}, "`entropy_coef` is 0.1", "Use 0"),
    ({"top_entropy_quantile": 0.5}, "`top_entropy_quantile` is 0.5", "Use 1.0"),
    ({"importance_sampling_level": "sequence"}, "`importance_sampling_level` is 'sequence'", "`geometric`"),
    ({"off_policy_mask_threshold": 0.5}, "`off_policy_mask_threshold` is 0.5", "`geometric`"),
    ({"gradient_accumulation_steps": 8}, "`gradient_accumulation_steps` is 8", "a divisor of .* = 4"),
    ({"optim": "galore_adamw_layerwise"}, "`optim` is", "adamw_torch_fused"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "named", "remedy"), REFUSED, ids=[next(iter(o)) for o, _, _ in REFUSED])
def test_what_would_keep_a_rejected_token_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], named: str, remedy: str
) -> None:
    with pytest.raises(ValueError, match=rf"{named}.* with `rejection=\['icepop'\]`.*{remedy}.*no `rejection`"):
        run(tmp_path, monkeypatch, replayed_rollouts(), rejection=["icepop"], constraint="none", **options)


def test_a_loss_that_divides_by_sequences_may_span_generation_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"gradient_accumulation_steps": 8, "learning_rate": 0.1, "loss_type": "grpo", "max_steps": 1}
    rejecting = {"rejection": ["icepop"], "rejection_bounds": BOUNDS}
    change, _ = run(tmp_path, monkeypatch, marked(whole), **options, **rejecting)
    options["learning_rate"] *= 16 / 11
    alone, _ = run(tmp_path, monkeypatch, marked(whole, masked=True), **options)
    assert_close(change, alone)


def test_a_routers_own_loss_is_refused_where_gradients_are_scaled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = tiny_model("qwen3_moe", num_experts=4, num_experts_per_tok=2)
    options = {"model": mixture, "rejection": ["icepop"], "rollout_func": replayed_rollouts()}
    with pytest.raises(ValueError, match="`router_aux_loss_coef`.*is 0.001.*`router_aux_loss_coef=0.0`"):
        dc_trainer(tmp_path, **options)
    assert dc_trainer(tmp_path, router_aux_loss_coef=0.0, **options).args.rejection == ["icepop"]


def test_deepspeed_is_refused_where_gradients_are_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its engine needs a GPU's toolchain; what is asked is what Accelerate says of it.
    monkeypatch.setattr(rejection_trainer, "DistributedType", SimpleNamespace(DEEPSPEED=DistributedType.NO))
    with pytest.raises(ValueError, match=r"`rejection` is \['icepop'\] with DeepSpeed.*Use FSDP2"):
        run(tmp_path, monkeypatch, replayed_rollouts(), rejection=["icepop"])
    options = {"rejection": ["icepop"], "train": False}
    assert run(tmp_path, monkeypatch, replayed_rollouts(), REUSED, **options)[1].args.rejection == ["icepop"]


@pytest.mark.parametrize("layout", [ALIGNED, REUSED, SPLIT], ids=["aligned", "reused", "split"])
@pytest.mark.parametrize("rule", ["icepop", "dppo_tv"])
@pytest.mark.parametrize(
    "options", [{"constraint": "fixed"}, {"constraint": "none"}, {"constraint": "none", "in_process": True}], ids=str
)
def test_what_is_said_to_be_settled_late_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], rule: str, layout: tuple[int, int, int]
) -> None:
    in_process = options.get("in_process", False)
    engine = {"rollout_backend": "transformers"} if in_process else {}
    _, trainer = run(
        tmp_path, monkeypatch, None if in_process else replayed_rollouts(), layout, train=False,
        constraint=options["constraint"], rejection=[rule], **engine,
    )  # fmt: skip
    calls = []
    settle = trainer._settle_late
    monkeypatch.setattr(trainer, "_settle_late", lambda *args: calls.append(args) or settle(*args))
    trainer.train()
    assert bool(calls) == is_settled_late(trainer.args)
    assert len(calls) in (0, trainer.state.global_step)


def test_rejection_needs_log_probs_of_the_sampling_distribution(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`rejection=\['icepop'\]` compares the engines, but nothing gives"):
        dc_trainer(tmp_path, rollout_backend="vllm", rollout_precision=None, constraint="none", rejection=["icepop"])
    with pytest.raises(ValueError, match=r"`top_p` is 0.9 with `rejection=\['icepop'\]`.*without `rejection`"):
        dc_trainer(tmp_path, rollout_func=replayed_rollouts(), constraint="none", rejection="icepop", top_p=0.9)
