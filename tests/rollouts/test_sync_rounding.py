# SPDX-License-Identifier: Apache-2.0
"""Rounding at the weight sync, from the option to the engine: which way is chosen, what arrives, what is measured."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from runs import dc_trainer, logged, settings
from tiny import published_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from dc_trl import DCGRPOConfig
from dc_trl.rollouts.handover import Handover, hand_over, kept_in_float32, served_dtype
from dc_trl.rollouts.quantization import PRECISIONS, PolicyCopy, fake_quantize
from dc_trl.rollouts.rounding import Dither
from dc_trl.rollouts.sync_rounding import choose_dither, rounding_in_force
from dc_trl.rollouts.weights import iter_policy_weights

CPU = torch.device("cpu")


def small_move(model: PreTrainedModel, steps: float = 0.3) -> None:
    """Moves every weight by this many of its bf16 steps, up or down."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            power = torch.exp2(torch.floor(torch.log2(parameter.abs().clamp(min=1e-20))))
            sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.add_(sign * steps / 128 * power)


def train(directory: Path, rounding: str, **options: Any) -> Any:
    defaults = {"rollout_precision": "bf16", "learning_rate": 3e-5, "max_steps": 4, "sync_rounding": rounding}
    trainer = dc_trainer(directory, model=published_model(), **(defaults | options))
    trainer.train()
    return trainer


def test_updates_below_half_a_step_reach_the_sampler_dithered_and_not_to_nearest(tmp_path: Path) -> None:
    seen = {}
    for rounding in ("nearest", "dither", "auto"):
        trainer = train(tmp_path / rounding, rounding)
        seen[rounding] = logged(trainer, "dc/sync/update_seen_since_start")
        # Syncs before steps 2, 3 and 4: the first is the reference.
        assert len(seen[rounding]) == len(logged(trainer, "dc/sync/changed")) == 3
        assert len(logged(trainer, "dc/sync/update_seen")) == 3
    assert all(share < 0.2 for share in seen["nearest"])
    assert all(0.95 < share < 1.05 for share in seen["dither"])
    assert seen["auto"] == seen["dither"]  # a float32 trainer


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_copy_holds_the_dithered_weights(precision: str) -> None:
    model, dither = published_model(), Dither(5)
    small_move(model)
    copy = PolicyCopy(model, precision, CPU, dither)
    copy.load(iter_policy_weights(model, Accelerator(cpu=True)))
    quantised = 0
    for name, trained in model.named_parameters():
        if name in copy._quantized:
            quantised += 1
            expected = fake_quantize(trained.detach(), precision, noise=dither.noise(trained, name))
        else:
            expected = dither.cast(trained.detach(), copy.dtype, name)
        torch.testing.assert_close(copy.deployed(name), expected.to(copy.dtype), rtol=1e-5, atol=0)
    assert (quantised > 0) == (precision not in ("bf16", "fp16"))


def test_at_the_start_the_sampler_has_the_checkpoint_exactly() -> None:
    model = published_model()
    copy = PolicyCopy(model, "bf16", CPU, Dither(0))
    copy.load(iter_policy_weights(model, Accelerator(cpu=True)))
    assert all(torch.equal(copy.deployed(name).float(), p) for name, p in model.named_parameters())


def accelerator(mixed_precision: str = "no", param_dtype: torch.dtype | None = None) -> Any:
    plugin = None
    if param_dtype is not None:
        plugin = SimpleNamespace(mixed_precision_policy=SimpleNamespace(param_dtype=param_dtype))
    return SimpleNamespace(mixed_precision=mixed_precision, state=SimpleNamespace(fsdp_plugin=plugin))


def chosen(tmp_path: Path, rounding: str, where: Any, precision: str = "bf16") -> Dither | None:
    options = {"rollout_backend": "transformers", "rollout_precision": precision, "sync_rounding": rounding, "seed": 7}
    args = DCGRPOConfig(**settings(tmp_path, **options))
    return choose_dither(args, where)


def test_auto_dithers_where_the_forward_is_finer_than_the_sampler(tmp_path: Path) -> None:
    assert chosen(tmp_path, "auto", accelerator()) == Dither(7)
    assert chosen(tmp_path, "auto", accelerator(), precision="fp8") == Dither(7)
    assert chosen(tmp_path, "auto", accelerator("bf16")) is None
    # Coarser than what autocast makes of the weights.
    assert chosen(tmp_path, "auto", accelerator("bf16"), precision="fp8") == Dither(7)
    assert chosen(tmp_path, "auto", accelerator("bf16"), precision="int8") is None
    assert chosen(tmp_path, "auto", accelerator("fp16")) is None
    assert chosen(tmp_path, "auto", accelerator(param_dtype=torch.bfloat16)) is None
    assert chosen(tmp_path, "auto", accelerator(param_dtype=torch.float32)) == Dither(7)
    # Dither takes the bias of integers away, but leaves the discrepancy as it is or larger.
    for precision in ("int8", "int4", "int3"):
        assert chosen(tmp_path, "auto", accelerator(), precision=precision) is None
        assert chosen(tmp_path, "dither", accelerator(), precision=precision) == Dither(7)
    assert chosen(tmp_path, "dither", accelerator("bf16")) == Dither(7)
    assert chosen(tmp_path, "nearest", accelerator()) is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rollout_precision": "bf16"}, "dither"),
        ({"rollout_precision": "bf16", "sync_rounding": "nearest"}, "nearest"),
        ({"rollout_precision": "bf16", "bf16": True}, "nearest"),
        ({"rollout_precision": None}, None),  # as trained
        ({"rollout_func": lambda prompts, trainer: {}, "constraint": "none"}, None),
    ],
)
def test_the_rounding_in_force_is_what_auto_came_to(
    tmp_path: Path, options: dict[str, Any], expected: str | None
) -> None:
    trainer = dc_trainer(tmp_path, **options)
    engine = getattr(trainer, "vllm_generation", None)
    assert rounding_in_force(engine, trainer.args, trainer.accelerator) == expected
    trainer.create_model_card()
    row = {"dither": "dithered, with seed 42 (auto)", "nearest": "to nearest (", None: "none: no engine"}[expected]
    assert f"| rounding at the weight sync | {row}" in (tmp_path / "README.md").read_text()


def test_nothing_is_rounded_for_an_engine_that_serves_in_float32(tmp_path: Path) -> None:
    args = DCGRPOConfig(**settings(tmp_path, use_vllm=True))
    for dtype, expected in ((torch.bfloat16, "dither"), (torch.float32, None)):
        engine = SimpleNamespace(deployed_weights=None, deployed_dtype=dtype)
        assert rounding_in_force(engine, args, accelerator()) == expected
    # In process, fp8 weights are multiplied in float32, and are rounded all the same.
    engine = SimpleNamespace(deployed_weights=None, deployed_dtype=torch.float32, quantization="fake")
    assert rounding_in_force(engine, args, accelerator()) == "dither"


def test_a_dither_with_nothing_to_round_is_refused(tmp_path: Path) -> None:
    options = {"constraint": "none", "sync_rounding": "dither"}
    with pytest.raises(ValueError, match="transformers.generate.*use_vllm=True.*rollout_backend='transformers'"):
        DCGRPOConfig(**settings(tmp_path, **options))
    with pytest.raises(ValueError, match="rollout_precision=None.*nothing is rounded.*'bf16'.*bf16=True"):
        dc_trainer(tmp_path, rollout_precision=None, **options)
    # Adapters are trained in float32 under autocast too.
    adapters = {"bf16": True, "peft_config": LoraConfig(r=4, target_modules=["q_proj"])}
    with pytest.raises(ValueError, match="rollout_precision=None.*nothing is rounded"):
        dc_trainer(tmp_path, rollout_precision=None, **options, **adapters)
    dc_trainer(tmp_path, rollout_precision=None, **(options | {"sync_rounding": "auto"}))


def test_a_rounding_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`sync_rounding` is 'stochastic'"):
        DCGRPOConfig(**settings(tmp_path, sync_rounding="stochastic"))


class Server:
    """What TRL's engine says to a server, over NCCL elsewhere."""

    def __init__(self) -> None:
        self.received: list[dict[str, Tensor]] = []

    def update_named_params(self, metadata: list[Any], named: Any) -> None:
        tensors = dict(named)
        assert [(n, str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in tensors.items()] == metadata
        self.received.append(tensors)

    def reset_prefix_cache(self) -> None:
        pass


def trl_engine(model: Any, mode: str, receiver: Any) -> Any:
    """TRL's engine without a vLLM behind it."""
    engine: Any = VLLMGeneration.__new__(VLLMGeneration)
    engine.model, engine.mode, engine.accelerator = model, mode, Accelerator(cpu=True)
    engine.enable_sleep_mode, engine._weight_metadata = False, None
    engine._dist = DistributedBackend(engine.accelerator)
    if mode == "server":
        engine.vllm_client = receiver
    else:
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=receiver))
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        llm = SimpleNamespace(llm_engine=SimpleNamespace(model_executor=executor), reset_prefix_cache=lambda: True)
        engine.llm = llm
    return engine


def test_trls_own_sync_sends_dithered_weights_to_a_server() -> None:
    model, server, dither = published_model(), Server(), Dither(3)
    engine = trl_engine(model, "server", server)
    hand_over(engine, Handover(model, torch.bfloat16, dither))
    engine.sync_weights()
    assert engine.sync_metrics.get("update_seen") is None
    small_move(model)
    engine.sync_weights()
    expected = {name: dither.cast(p.detach(), torch.bfloat16, name) for name, p in model.named_parameters()}
    assert server.received[-1].keys() == expected.keys()
    assert all(torch.equal(server.received[-1][name], expected[name]) for name in expected)
    assert 0.9 < engine.sync_metrics["update_seen"] < 1.1
    deployed = dict(engine.deployed_weights())
    assert all(torch.equal(deployed[name], expected[name]) for name in expected)


def test_trls_own_sync_loads_dithered_weights_in_place() -> None:
    model, received, dither = published_model(), {}, Dither(3)
    engine = trl_engine(model, "colocate", lambda pairs: received.update(pairs))
    hand_over(engine, Handover(model, torch.bfloat16, dither))
    small_move(model)
    engine.sync_weights()
    assert all(
        torch.equal(received[name], dither.cast(p.detach(), torch.bfloat16, name))
        for name, p in model.named_parameters()
    )


def test_to_nearest_the_live_tensors_are_handed_over_as_they_are() -> None:
    model, server = published_model(), Server()
    engine = trl_engine(model, "server", server)
    hand_over(engine, Handover(model, torch.bfloat16, None))
    engine.sync_weights()
    small_move(model)
    engine.sync_weights()
    live = dict(model.named_parameters())
    assert all(tensor.data_ptr() == live[name].data_ptr() for name, tensor in server.received[-1].items())
    assert engine.sync_metrics["update_seen"] < 0.2 and engine.sync_metrics["changed"] > 0
    assert {tensor.dtype for _, tensor in engine.deployed_weights()} == {torch.bfloat16}


def test_what_engines_keep_in_float32_is_not_rounded() -> None:
    model = published_model()
    model._keep_in_fp32_modules_strict = {"q_norm"}
    small_move(model)
    kept = kept_in_float32(model)
    handed = dict(Handover(model, torch.bfloat16, Dither(0)).round(model.named_parameters()))
    assert {name for name in handed if kept(name)} == {name for name in handed if ".q_norm." in name} != set()
    assert all((tensor.dtype == torch.float32) == kept(name) for name, tensor in handed.items())


def test_the_dtype_of_an_engine_is_read_in_process_and_from_a_server() -> None:
    assert served_dtype(SimpleNamespace(dtype=torch.float16)) == torch.float16
    assert served_dtype({"dtype": "torch.bfloat16"}) == served_dtype({"dtype": "bfloat16"}) == torch.bfloat16


def test_deployed_weights_are_saved_as_they_sample(tmp_path: Path) -> None:
    trainer = train(tmp_path / "run", "dither", max_steps=2)
    trainer.save_deployed(tmp_path / "deployed")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "deployed")
    assert saved.dtype == torch.bfloat16
    live = dict(trainer.model.named_parameters())
    state = saved.state_dict()
    for name, parameter in live.items():
        assert torch.equal(state[name], Dither(trainer.args.seed).cast(parameter.detach(), torch.bfloat16, name))
    assert any((state[name] != p.bfloat16()).any() for name, p in live.items())
    assert (tmp_path / "deployed" / "tokenizer.json").exists()


def test_nothing_is_deployed_where_no_engine_has_weights(tmp_path: Path) -> None:
    trainer = dc_trainer(tmp_path, rollout_func=lambda prompts, trainer: {}, constraint="none")
    with pytest.raises(ValueError, match="save_deployed.*rollout_backend='transformers'.*save_model"):
        trainer.save_deployed(tmp_path / "deployed")


def test_a_resumed_run_counts_from_the_start_of_the_first_and_keeps_its_noise(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path / "whole", "dither", **options)
    resumed = dc_trainer(
        tmp_path / "resumed",
        model=published_model(),
        **({"rollout_precision": "bf16", "learning_rate": 3e-5, "max_steps": 4, "sync_rounding": "dither"} | options),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    shares = logged(whole, "dc/sync/update_seen_since_start")
    # The checkpoint's log holds step 2; the sync before step 3 is the first of this process, so it has no share since
    # the last; that before step 4 counts from the very first of all.
    assert logged(resumed, "dc/sync/update_seen_since_start")[-1] == shares[-1]
    for name, parameter in whole.vllm_generation.policy.named_parameters():
        assert torch.equal(parameter, resumed.vllm_generation.policy.get_parameter(name))
