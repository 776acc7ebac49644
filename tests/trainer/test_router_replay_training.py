# SPDX-License-Identifier: Apache-2.0
"""Router replay in the trainer: each token is trained through the experts that sampled it."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import PROMPTS, dc_trainer, logged, record_losses, replayed_rollouts, weights
from tiny import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.generation import vllm_generation

from dc_trl import DCGRPOConfig
from dc_trl.rollouts import router_replay
from dc_trl.rollouts.engines import engine_of
from dc_trl.rollouts.router_replay import UNKNOWN, RouterReplay
from dc_trl.rollouts.transformers import TransformersGeneration
from dc_trl.training import replay_trainer as trainer_module

EXPERTS, CHOSEN, LAYERS = 8, 3, 2
# The trainer's first micro-batches come before any update; four of them a generation batch, two updates on it.
MISALIGNED = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2}


def mixture(**overrides: Any) -> PreTrainedModel:
    return tiny_model("qwen3_moe", **({"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN} | overrides))


def routed_trainer(output_dir: Path, **options: Any) -> Any:
    defaults = {"model": mixture(), "router_replay": True, "rollout_precision": "int8", "learning_rate": 1e-3}
    return dc_trainer(output_dir, **(defaults | options))


def hooks(model: nn.Module) -> int:
    """How many of the hooks on a model are ours; transformers keeps some of its own."""
    every = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(hook.__module__ == router_replay.__name__ for hook in every)


class Replays:
    """Every replay of a run: its routes, its tokens, and whether gradients were on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sampled: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        self.seen: list[tuple[PreTrainedModel, Tensor, bool]] = []
        generate, forward = TransformersGeneration.generate, RouterReplay._begin

        def keep(engine: TransformersGeneration, prompts: list[list[int]], *args: Any, **kwargs: Any) -> Any:
            outputs = generate(engine, prompts, *args, **kwargs)
            for prompt, completion, routes in zip(prompts, outputs[1], engine.last_routes, strict=True):
                self.sampled[(*prompt, *completion)].append(routes)
            return outputs

        def begin(replay: RouterReplay, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
            forward(replay, model, args, kwargs)
            rows = zip(kwargs["input_ids"], kwargs["attention_mask"], replay._current, strict=True)
            for ids, mask, routes in rows:
                self.check(tuple(ids[mask.bool()].tolist()), routes[mask.bool()])
                assert (routes[~mask.bool()] == UNKNOWN).all()
            self.seen.append((model, replay._current, torch.is_grad_enabled()))

        monkeypatch.setattr(TransformersGeneration, "generate", keep)
        monkeypatch.setattr(RouterReplay, "_begin", begin)

    def check(self, tokens: tuple[int, ...], routes: Tensor) -> None:
        """What is replayed on these tokens is what was recorded as they were sampled."""
        assert any(torch.equal(routes, recorded) for recorded in self.sampled[tokens])


LAYOUTS: dict[str, dict[str, Any]] = {
    "aligned": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "misaligned": MISALIGNED,
    "two iterations": {"num_iterations": 2, "per_device_train_batch_size": 8},
    "checkpointing": {"gradient_checkpointing": True},
    "padded": {"pad_to_multiple_of": 16},
    "dropped groups": {"zero_variance_groups": "drop"},
    "plain GRPO": {"constraint": "none"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_token_is_trained_through_the_experts_that_sampled_it(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replays = Replays(monkeypatch)
    trainer = routed_trainer(tmp_path, **LAYOUTS[layout])
    trainer.train()
    args = trainer.args
    trained = [routes for _, routes, gradients in replays.seen if gradients]
    assert len(trained) == args.max_steps * args.gradient_accumulation_steps
    scored = [routes for _, routes, gradients in replays.seen if not gradients]
    assert bool(scored) == (layout in ("misaligned", "two iterations", "plain GRPO"))
    assert {routes.dtype for routes in trained} == {torch.int8} and len(trained[0].unique()) == EXPERTS + 1
    assert {len(routes) for routes in trained} == {args.per_device_train_batch_size}
    assert hooks(trainer.accelerator.unwrap_model(trainer.model)) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_rollouts_leave_no_discrepancy(layout: str, tmp_path: Path) -> None:
    # Were a sequence given the experts of another, this would be of the order of 0.01.
    trainer = routed_trainer(tmp_path, rollout_precision=None, max_steps=4, **LAYOUTS[layout])
    trainer.train()
    largest = logged(trainer, "dc/discrepancy/max")
    assert 0 < max(largest) < 1e-5


def test_replay_lowers_the_discrepancy(tmp_path: Path) -> None:
    means = {}
    for replay in (False, True):
        model = mixture(num_hidden_layers=3, num_experts=16, num_experts_per_tok=4)
        options = {"max_completion_length": 16, "per_device_train_batch_size": 32, "max_steps": 1}
        trainer = routed_trainer(tmp_path / str(replay), model=model, router_replay=replay, **options)
        trainer.train()
        (means[replay],) = logged(trainer, "dc/discrepancy/mean")
    # The same completions; measured 0.0033 and 0.0017.
    assert 5e-4 < means[True] < 0.75 * means[False]


def test_one_step_of_float32_rollouts_equals_one_without_replay(tmp_path: Path) -> None:
    runs = {}
    for replay in (False, True):
        trainer = routed_trainer(tmp_path / str(replay), router_replay=replay, rollout_precision=None, max_steps=1)
        trainer.train()
        runs[replay] = trainer.state.log_history[0]
    for key in ("loss", "grad_norm", "reward", "entropy", "dc/discrepancy/max"):
        assert runs[True][key] == pytest.approx(runs[False][key], rel=1e-4, abs=1e-6)
    assert min(run["dc/discrepancy/max"] for run in runs.values()) > 0


def test_recomputed_log_probs_are_replayed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = record_losses(monkeypatch)
    routed_trainer(tmp_path, **MISALIGNED).train()
    # Before the first update both forwards see the same weights, so they differ only if their experts do.
    for record in records[:2]:
        valid = record["completion_mask"].bool()
        assert torch.allclose(record["train_logps"][valid], record["old_per_token_logps"][valid], atol=1e-5)
        difference = (record["train_logps"] - record["sampling_per_token_logps"])[valid].abs()
        assert difference.max() > 1e-3  # int8


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    ends = []
    for checkpointing in (False, True):
        options = {"gradient_checkpointing": checkpointing, "per_device_train_batch_size": 4}
        trainer = routed_trainer(tmp_path / str(checkpointing), gradient_accumulation_steps=2, **options)
        trainer.train()
        ends.append(weights(trainer))
    assert torch.equal(*ends)


def test_the_router_is_trained(tmp_path: Path) -> None:
    trainer = routed_trainer(tmp_path, max_steps=1)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if n.endswith("gate.weight")}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert len(before) == LAYERS and all((after[n] - p).abs().max() > 1e-4 for n, p in before.items())


def test_evaluation_replays_without_leaving_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replays = Replays(monkeypatch)
    trainer = routed_trainer(tmp_path, eval_dataset=PROMPTS.select(range(4)), rollout_precision=None)
    values = trainer.evaluate()
    assert replays.seen and not any(gradients for *_, gradients in replays.seen)
    assert 0 < values["eval_dc/discrepancy/max"] < 1e-5
    assert hooks(trainer.model) == 0


def test_off_replays_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "RouterReplay", None)
    records = record_losses(monkeypatch)
    trainer = routed_trainer(tmp_path, router_replay=False, max_steps=1)
    trainer.train()
    assert records and not any("routed_experts" in record for record in records)
    assert trainer.vllm_generation.last_routes == []


def test_the_reference_model_takes_its_own_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replays = Replays(monkeypatch)
    path = tmp_path / "policy"
    mixture().save_pretrained(path)
    trainer = routed_trainer(tmp_path / "run", model=str(path), beta=0.1, model_init_kwargs={"dtype": "float32"})
    assert trainer.ref_model is not None
    trainer.train()
    assert {id(model) for model, *_ in replays.seen} == {id(trainer.accelerator.unwrap_model(trainer.model))}


def test_an_adapter_is_trained_through_the_same_experts(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    options = {"rollout_precision": None, "peft_config": adapter, "learning_rate": 1e-2}
    trainer = routed_trainer(tmp_path / "run", **options)
    trainer.train()
    largest = logged(trainer, "dc/discrepancy/max")
    assert 0 < max(largest) < 1e-5
    with pytest.raises(ValueError, match="`beta` is 0.1 with `router_replay=True` and an adapter.*`beta=0`"):
        routed_trainer(tmp_path / "beta", beta=0.1, **(options | {"model": mixture()}))


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_backend": "vllm"}, "`use_vllm` is False.*records no experts.*`rollout_backend='transformers'`"),
        ({"rollout_backend": "vllm", "use_vllm": True, "vllm_mode": "server"}, "`vllm_mode` is 'server'.*'colocate'"),
        (
            {"rollout_backend": "vllm", "use_vllm": True, "vllm_mode": "colocate", "vllm_tensor_parallel_size": 2},
            "`vllm_tensor_parallel_size` is 2.*Use 1",
        ),
        ({"torch_compile": True}, "`torch_compile` is True.*Use False"),
    ],
)
def test_configurations_that_cannot_replay_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "rollout_backend": "transformers"}
    with pytest.raises(ValueError, match=message):
        DCGRPOConfig(**(settings | {"router_replay": True} | options))


VLLM = {"rollout_backend": "vllm", "use_vllm": True, "vllm_mode": "colocate", "rollout_precision": None}


def test_a_colocated_engine_is_asked_for_its_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(vllm_generation, "LLM", lambda **options: given.append(options), raising=False)
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "router_replay": True}
    args = DCGRPOConfig(**(settings | VLLM | {"vllm_engine_kwargs": {"kv_cache_dtype": "fp8"}}))
    with engine_of(vars(args)).construction(args):
        vllm_generation.LLM(model="policy")
    assert given == [{"model": "policy", "kv_cache_dtype": "fp8", "enable_return_routed_experts": True}]


@pytest.mark.vllm
def test_vllm_on_a_cpu_is_refused_at_construction(tmp_path: Path) -> None:
    platforms = pytest.importorskip("vllm.platforms")
    if not platforms.current_platform.is_cpu():
        pytest.skip("vLLM runs on a GPU here")
    with pytest.raises(ValueError, match="`router_replay` is True with vLLM on a CPU"):
        routed_trainer(tmp_path, **VLLM)


def test_trainers_that_cannot_replay_are_refused(tmp_path: Path) -> None:
    def tool(text: str) -> str:
        """Echoes.

        Args:
            text: what to echo.
        """
        return text

    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no experts.*`router_replay=False`"):
        routed_trainer(tmp_path, model=tiny_model())
    for name, value in (("rollout_func", replayed_rollouts()), ("tools", [tool])):
        options = {"rollout_backend": "transformers", name: value}
        with pytest.raises(ValueError, match=f"`router_replay` is True with `{name}`"):
            routed_trainer(tmp_path, **options)
