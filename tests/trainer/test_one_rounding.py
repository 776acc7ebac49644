# SPDX-License-Identifier: Apache-2.0
"""One rounding for trainer and sampler: when it is on, what the sampler gets, what a resumed run goes on from."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from peft import LoraConfig
from runs import dc_trainer, logged
from tiny import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dc_trl.rollouts.rounding import Dither
from dc_trl.training.master_weights import MASTER, MasterWeights
from dc_trl.training.one_rounding import one_rounding

SEED = 11
FP32, BF16 = torch.float32, torch.bfloat16


def published(dtype: torch.dtype = FP32, **options: Any) -> PreTrainedModel:
    """A tiny model whose weights lie on the bf16 grid, as a checkpoint's do. Its buffers are in float32, as loaded."""
    model = tiny_model(**options)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().to(dtype)
    return model


def trainer_of(directory: Path, model: Any = None, **options: Any) -> Any:
    defaults = {"rollout_precision": "bf16", "learning_rate": 3e-5, "max_steps": 4, "seed": SEED, "bf16": True}
    defaults["sync_rounding"] = "dither"
    return dc_trainer(directory, model=published() if model is None else model, **(defaults | options))


def train(directory: Path, model: Any = None, **options: Any) -> Any:
    trainer = trainer_of(directory, model, **options)
    trainer.train()
    return trainer


def masters(trainer: Any) -> dict[str, Tensor]:
    return {name: trainer.optimizer.state[p][MASTER] for name, p in trainer.model.named_parameters()}


def share(moved: dict[str, Tensor], trained: dict[str, Tensor]) -> float:
    """⟨Δmoved, Δtrained⟩ / ⟨Δtrained, Δtrained⟩ since the published weights."""
    start = dict(published().named_parameters())
    change = [torch.cat([(w[n].float() - start[n].detach()).flatten() for n in start]) for w in (moved, trained)]
    return float(change[0] @ change[1] / (change[1] @ change[1]))


@pytest.mark.parametrize("loaded", [FP32, BF16], ids=["autocast", "loaded in bf16"])
def test_the_sampler_has_the_weights_of_the_trainer_which_follow_the_masters(tmp_path: Path, loaded: Any) -> None:
    trainer = train(tmp_path, published(loaded, tie_word_embeddings=True), bf16=loaded == FP32)
    held = masters(trainer)
    assert {p.dtype for p in trainer.model.parameters()} == {BF16}
    assert {master.dtype for master in held.values()} == {FP32}
    trainer.vllm_generation.sync_weights()
    dither = Dither(SEED)
    for name, parameter in trainer.model.named_parameters():
        # By name and place of the weight sync's cast: the copy of the masters would be the same.
        assert torch.equal(parameter, dither.cast(held[name], BF16, name)), name
        assert torch.equal(parameter, trainer.vllm_generation.policy.get_parameter(name)), name
    assert logged(trainer, "dc/sync/update_seen") == logged(trainer, "dc/sync/update_seen_since_start") == [1.0] * 3
    assert min(logged(trainer, "dc/sync/changed")) > 0


@pytest.mark.parametrize("loaded", [FP32, BF16], ids=["autocast", "loaded in bf16"])
def test_a_sampler_of_the_weights_as_trained_has_them_too(tmp_path: Path, loaded: Any) -> None:
    trainer = train(tmp_path, published(loaded), bf16=loaded == FP32, rollout_precision=None, max_steps=2)
    held = masters(trainer)
    trainer.vllm_generation.sync_weights()
    for name, parameter in trainer.vllm_generation.policy.named_parameters():
        assert torch.equal(parameter, Dither(SEED).cast(held[name], BF16, name)), name
    assert any((master != master.bfloat16()).any() for master in held.values())


def test_the_weights_learn_what_rounding_to_nearest_would_lose(tmp_path: Path) -> None:
    trainer = train(tmp_path / "one")
    live = {name: p.detach() for name, p in trainer.model.named_parameters()}
    assert 0.95 < share(live, masters(trainer)) < 1.05
    assert share({name: master.bfloat16() for name, master in masters(trainer).items()}, masters(trainer)) < 0.4


def test_the_discrepancy_stays_what_it_is_without_updates(tmp_path: Path) -> None:
    still = logged(train(tmp_path / "still", learning_rate=0.0), "dc/discrepancy/mean")
    trained = logged(train(tmp_path / "trained", max_steps=8), "dc/discrepancy/mean")
    # Of kernels alone: decoding token by token, and scoring whole sequences.
    assert 0.5 * max(still) < max(trained) < 2 * max(still) and 1e-5 < max(still) < 1e-3


def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1}
    whole = train(tmp_path / "whole", **options)
    resumed = trainer_of(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    before, after = masters(whole), masters(resumed)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
        assert torch.equal(before[name], after[name]), name
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert any((master != master.bfloat16()).any() for master in before.values())


def test_clipped_gradients_move_the_masters_less(tmp_path: Path) -> None:
    start = published()
    moved = []
    for norm in (0.0, 0.1):  # 0 is transformers' word for none
        trainer = train(tmp_path / str(norm), max_grad_norm=norm, optim="sgd", learning_rate=1e-3, max_steps=1)
        deltas = [master - start.get_parameter(name).detach() for name, master in masters(trainer).items()]
        moved.append(float(torch.cat([delta.flatten() for delta in deltas]).norm()))
        (norm_before_clipping,) = logged(trainer, "grad_norm")
    assert moved[0] == pytest.approx(1e-3 * norm_before_clipping, rel=1e-2)
    assert moved[1] == pytest.approx(1e-3 * 0.1, rel=1e-2)


def test_what_is_saved_is_what_samples(tmp_path: Path) -> None:
    trainer = train(tmp_path / "run", max_steps=2)
    trainer.save_model(str(tmp_path / "saved"))
    trainer.save_deployed(tmp_path / "deployed")
    for directory in ("saved", "deployed"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / directory)
        assert model.dtype == BF16
        state = model.state_dict()
        assert all(torch.equal(state[name], p) for name, p in trainer.model.named_parameters())


def test_a_second_run_of_a_trainer_has_its_masters_still(tmp_path: Path) -> None:
    trainer = train(tmp_path, max_steps=2)
    first = {name: master.clone() for name, master in masters(trainer).items()}
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, MasterWeights)
    assert not isinstance(trainer.optimizer.optimizer.optimizer, MasterWeights)
    assert all(not torch.equal(first[name], master) for name, master in masters(trainer).items())


def test_an_optimizer_of_ones_own_gets_masters(tmp_path: Path) -> None:
    model = published()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = train(tmp_path, model, optimizers=(optimizer, scheduler))
    assert trainer.optimizer.optimizer.optimizer is optimizer
    assert len(masters(trainer)) == len(list(model.parameters()))


def test_adapters_stay_in_float32_and_have_no_masters(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    trainer = train(tmp_path, peft_config=config, max_steps=2)
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    assert {p.dtype for p in trainer.model.parameters()} == {FP32}


@pytest.mark.parametrize(
    "options",
    [
        {"sync_rounding": "nearest"},
        {"sync_rounding": "auto"},
        {"sync_rounding": "nearest", "constraint": "none"},
        {"sync_rounding": "dither", "bf16": False},
    ],
    ids=str,
)
def test_nothing_changes_where_it_is_not_asked_for(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = train(tmp_path, max_steps=1, **options)
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    assert {p.dtype for p in trainer.model.parameters()} == {FP32}


def asked(model: Any, **options: Any) -> Any:
    """`one_rounding` for a trainer that computes somewhere else."""
    mixed, plugin = options.pop("mixed_precision", "bf16"), options.pop("fsdp_plugin", None)
    where = SimpleNamespace(
        mixed_precision=mixed,
        state=SimpleNamespace(fsdp_plugin=plugin),
        distributed_type=options.pop("distributed_type", DistributedType.NO),
        unwrap_model=lambda model, **_: model,
    )
    fields = {"sync_rounding": "dither", "seed": SEED, "cast_lm_head_to_fp32": False} | options
    return one_rounding(SimpleNamespace(**fields), model, where)  # type: ignore[arg-type]


FSDP = SimpleNamespace(mixed_precision_policy=SimpleNamespace(param_dtype=BF16))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"distributed_type": DistributedType.DEEPSPEED}, "DeepSpeed keeps float32 masters of its own.*FSDP2"),
        ({"fsdp_plugin": FSDP}, "FSDP's mixed precision.*bf16=False.*'dtype': 'bfloat16'"),
        ({"mixed_precision": "fp16"}, "mixed precision is 'fp16', whose loss scaler.*bf16=True"),
    ],
    ids=["deepspeed", "fsdp", "fp16"],
)
def test_what_does_not_work_is_refused_with_the_way_out(where: dict[str, Any], message: str) -> None:
    model = published()
    with pytest.raises(ValueError, match=f"`sync_rounding` is 'dither'.*{message}.*sync_rounding='nearest'"):
        asked(model, **where)
    assert {p.dtype for p in model.parameters()} == {FP32}
    assert asked(model, **where, sync_rounding="auto") is None


def test_fsdp2_shards_a_model_in_bf16_and_masters_begin_as_its_weights() -> None:
    model = published(BF16)
    rounding = asked(model, mixed_precision="no", fsdp_plugin=SimpleNamespace(mixed_precision_policy=None))
    assert rounding is not None and rounding.masters == {}


def test_what_stays_in_float32_is_not_cast() -> None:
    model = published()
    model._keep_in_fp32_modules_strict = {"q_norm"}
    rounding = asked(model, cast_lm_head_to_fp32=True)
    kept = {name for name, p in model.named_parameters() if p.dtype == FP32}
    assert kept == {name for name in kept if ".q_norm." in name or name == "lm_head.weight"}
    assert len(kept) == 1 + model.config.num_hidden_layers
    assert set(rounding.masters) == {name for name, _ in model.named_parameters()} - kept


def test_weights_off_the_grid_are_cast_with_the_dither_and_frozen_ones_have_no_master() -> None:
    model = tiny_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    exact = {name: p.detach().clone() for name, p in model.named_parameters()}
    rounding = asked(model)
    assert all(torch.equal(p, Dither(SEED).cast(exact[n], BF16, n)) for n, p in model.named_parameters())
    assert set(rounding.masters) == set(exact) - {"model.embed_tokens.weight"}
    assert all(torch.equal(master, exact[name]) for name, master in rounding.masters.items())


def test_stochastic_rounding_without_masters_is_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    optim = pytest.importorskip("torchao.optim")
    model = published(BF16)
    optimizer = optim._AdamW(model.parameters(), lr=3e-5, bf16_stochastic_round=True)
    with torch.compiler.set_stance("force_eager"):  # compiling its step takes longer than the run
        trainer = train(tmp_path, model, optimizers=(optimizer, None), sync_rounding="auto")
    assert trainer.optimizer.optimizer is optimizer
    assert logged(trainer, "dc/sync/update_seen") == [1.0] * 3
    assert min(logged(trainer, "dc/sync/changed")) > 0
