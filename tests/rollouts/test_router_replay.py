# SPDX-License-Identifier: Apache-2.0
"""Router replay on models alone: what is recorded, what is replayed, and what is left as it was."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError
from transformers import PreTrainedModel

from dc_trl.rollouts import router_replay, routers, vllm_routes
from dc_trl.rollouts.router_replay import UNKNOWN, RouterRecorder, RouterReplay, pad_routes, route_dtype
from dc_trl.rollouts.routers import ROUTER_SCORES, find_routers, live_scores

EXPERTS, CHOSEN = 8, 3
NAMED = {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}
FULL = ["full_attention", "full_attention"]
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 32,
}
# The first layer is dense, so that layers and routers are numbered apart.
DEEPSEEK = {
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
HEADS = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2_moe": NAMED | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": NAMED,
    "qwen3_moe-normalised": NAMED | {"norm_topk_prob": True},
    "qwen3_next": NAMED | LINEAR,
    "qwen3_5_moe_text": NAMED | LINEAR,
    "olmoe": NAMED | {"hidden_size": 128},
    "flex_olmo": NAMED,
    "mixtral": LOCAL,
    "minimax": LOCAL | {"layer_types": FULL},
    "gpt_oss": LOCAL | {"layer_types": FULL},
    "deepseek_v3": DEEPSEEK | HEADS | {"head_dim": 16},
    "dots1": DEEPSEEK,
    "glm4_moe": DEEPSEEK,
}
IDS = torch.arange(4, 4 + 3 * 10).reshape(3, 10)


def mixture(name: str = "qwen3_moe", **overrides: Any) -> PreTrainedModel:
    return tiny_model(name.partition("-")[0], **(ARCHITECTURES[name] | overrides)).eval()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


@torch.no_grad()
def record(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    with RouterRecorder(model) as recorder:
        model(input_ids=ids)
        return recorder.take(len(ids))


def foreign_routes(model: PreTrainedModel, seed: int = 0) -> Tensor:
    """Choices that the model did not make: random ones."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(*IDS.shape, len(find_routers(model)), EXPERTS, generator=generator).argsort(-1)
    return order[..., :CHOSEN].to(torch.int8)


def hooks(model: nn.Module) -> int:
    """How many of the hooks on a model are ours; transformers keeps some of its own."""
    every = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(hook.__module__ == router_replay.__name__ for hook in every)


def gradients(model: PreTrainedModel, routes: Tensor | None = None) -> dict[str, Tensor]:
    """Of the language modelling loss, replayed or not."""
    model.zero_grad()
    if routes is None:
        model(input_ids=IDS, labels=IDS).loss.backward()
    else:
        with RouterReplay(model, routes):
            model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Every known router


def test_each_known_router_is_tested_here() -> None:
    kinds = {type(router).__name__ for name in ARCHITECTURES for router in find_routers(mixture(name)).values()}
    assert kinds == set(ROUTER_SCORES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip_is_exact(name: str, dtype: torch.dtype) -> None:
    model = mixture(name).to(dtype)
    plain = logits(model)
    with RouterRecorder(model) as recorder:
        assert torch.equal(logits(model), plain)  # recording leaves the outputs as they are
        routes = recorder.take(len(IDS))
    assert routes.shape == (*IDS.shape, len(find_routers(model)), CHOSEN) and routes.dtype == torch.int8
    assert len(routes.unique()) == EXPERTS  # every expert is chosen somewhere
    with RouterReplay(model, routes):
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), plain) and hooks(model) == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip_is_exact_under_autocast(name: str) -> None:
    model = mixture(name)
    with torch.autocast("cpu", torch.bfloat16):
        plain, routes = logits(model), record(model)
        with RouterReplay(model, routes):
            assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replayed_gradients_are_those_of_the_models_own_choice(name: str) -> None:
    model = mixture(name).train()
    plain = gradients(model)
    replayed = gradients(model, record(model))
    assert plain.keys() == replayed.keys()
    for key in plain:
        torch.testing.assert_close(replayed[key], plain[key], rtol=1e-5, atol=1e-7)
    trained = [key for key in replayed if key.endswith((".gate.weight", ".router.weight"))]
    assert len(trained) == len(find_routers(model))
    assert all(float(replayed[key].abs().max()) > 1e-4 for key in trained)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recorded_experts_replace_the_routers_own(name: str) -> None:
    model = mixture(name)
    routes = foreign_routes(model)
    with RouterReplay(model, routes), RouterRecorder(model) as recorder:
        replayed = logits(model)
        assert torch.equal(recorder.take(len(IDS)), routes)
    assert (replayed - logits(model)).abs().max() > 0.1


# Scores: logits of 1, 2, 3 and 4 in the exponent, experts 0 and 1 chosen where the router's own would be 3 and 2.

LOGITS = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log()
FIRST_TWO = torch.tensor([[0, 1]])


def scores(kind: str, **attributes: Any) -> list[float]:
    router = type(kind, (nn.Module,), {})()
    for name, value in attributes.items():
        setattr(router, name, value)
    return live_scores(router, LOGITS, FIRST_TWO)[0].tolist()


def test_scores_by_hand() -> None:
    # softmax over all: 1/10, 2/10; over the chosen: 1/3, 2/3
    assert scores("Qwen3MoeTopKRouter", norm_topk_prob=False) == pytest.approx([0.1, 0.2])
    assert scores("Qwen3MoeTopKRouter", norm_topk_prob=True) == pytest.approx([1 / 3, 2 / 3])
    assert scores("MixtralTopKRouter") == pytest.approx([1 / 3, 2 / 3])
    assert scores("GptOssTopKRouter") == pytest.approx([1 / 3, 2 / 3])
    # sigmoid(log 1) = 1/2, sigmoid(log 2) = 2/3; their sum 7/6
    options = {"norm_topk_prob": False, "routed_scaling_factor": 3.0}
    assert scores("DeepseekV3TopkRouter", **options) == pytest.approx([1.5, 2.0])
    options["norm_topk_prob"] = True
    assert scores("DeepseekV3TopkRouter", **options) == pytest.approx([9 / 7, 12 / 7])


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_replayed_scores_are_live(name: str) -> None:
    model = mixture(name)
    routes = foreign_routes(model)
    router = list(find_routers(model).values())[-1]
    seen: list[Tensor] = []
    with RouterReplay(model, routes):
        before = logits(model)
    with torch.no_grad():
        router.weight.mul_(0.5)
    with RouterReplay(model, routes):
        handle = router.register_forward_hook(lambda module, inputs, output: seen.extend(output))
        after = logits(model)
        handle.remove()
    assert (before - after).abs().max() > 1e-3  # the same experts, weighted anew
    assert torch.equal(seen[1], live_scores(router, seen[0], seen[2]).to(seen[1].dtype))


def test_the_gradient_of_the_router_is_the_slope_of_the_loss() -> None:
    # Replayed, the loss is smooth in the router's weights: no top-k can jump under the finite difference.
    model = mixture()
    routes = foreign_routes(model)
    name, router = next(iter(find_routers(model).items()))
    gradient = gradients(model, routes)[f"{name}.weight"]
    direction = torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(1))
    losses = []
    for step in (5e-3, -1e-2):
        with torch.no_grad(), RouterReplay(model, routes):
            router.weight.add_(direction, alpha=step)
            losses.append(model(input_ids=IDS, labels=IDS).loss.item())
    slope = (losses[0] - losses[1]) / 1e-2
    assert abs(slope) > 1e-2
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-2)


def test_an_unknown_choice_is_left_to_the_router() -> None:
    model = mixture()
    routes, plain = record(model), logits(model)
    with RouterReplay(model, torch.full_like(routes, UNKNOWN)):
        assert torch.equal(logits(model), plain)
    mixed = foreign_routes(model)
    mixed[:, :6] = UNKNOWN  # attention is causal: what is replayed later does not reach back
    with RouterReplay(model, mixed):
        replayed = logits(model)
    assert torch.allclose(replayed[:, :6], plain[:, :6], atol=1e-5)
    assert (replayed[:, 6:] - plain[:, 6:]).abs().amax(dim=(1, 2)).min() > 0.1


# Gradient checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_replays_the_same(reentrant: bool) -> None:
    model = mixture().train()
    routes = foreign_routes(model)
    plain = gradients(model, routes)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    runs: list[int] = []
    router = next(iter(find_routers(model).values()))
    router.register_forward_hook(lambda *_: runs.append(1))
    again = gradients(model, routes)
    assert len(runs) == 2  # once in the forward, once in the backward
    assert all(torch.equal(plain[key], again[key]) for key in plain)


def test_leaving_the_context_before_the_backward_does_not_pass_in_silence() -> None:
    model = mixture().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with RouterReplay(model, foreign_routes(model)):
        loss = model(input_ids=IDS, labels=IDS).loss
    with pytest.raises(CheckpointError):
        loss.backward()


# The context


def test_context_cleans_up() -> None:
    model = mixture()
    routes, plain = record(model), logits(model)
    replay = RouterReplay(model, foreign_routes(model))
    assert hooks(model) == 0 and torch.equal(logits(model), plain)  # off until it is entered
    with replay:
        assert hooks(model) == 2 * 1 + 2
        with pytest.raises(RuntimeError, match="open already"):
            replay.__enter__()
    assert hooks(model) == 0 and torch.equal(logits(model), plain)
    with pytest.raises(KeyError), RouterReplay(model, routes):
        raise KeyError
    assert hooks(model) == 0
    with replay:  # and may be entered again, from the first sequence on
        logits(model)
    with pytest.raises(KeyError), RouterRecorder(model):
        raise KeyError
    assert hooks(model) == 0


def test_chunks_without_gradients_equal_the_whole() -> None:
    model = mixture()
    routes = foreign_routes(model)
    with RouterReplay(model, routes):
        whole = logits(model)
    with RouterReplay(model, routes):
        chunks = torch.cat([logits(model, IDS[:2]), logits(model, IDS[2:])])
        torch.testing.assert_close(chunks, whole, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="3 of them used"):
            logits(model, IDS[2:])
    with RouterReplay(model, routes), pytest.raises(ValueError, match="2 of the 3 sequences.*Replay the routes of"):
        model(input_ids=IDS[:2])


# What is refused


def test_routes_of_another_shape_are_refused() -> None:
    model = mixture()
    routes = record(model)
    for wrong in (routes[:, :, :1], routes[..., :2], torch.cat([routes, routes], dim=2)):
        with pytest.raises(ValueError, match="2 routers of 3 experts a token: they come from another model"):
            RouterReplay(model, wrong)
    for wrong in (routes.float(), routes[0]):
        with pytest.raises(ValueError, match="needs integers of shape"):
            RouterReplay(model, wrong)
    with pytest.raises(ValueError, match=f"and {EXPERTS}, but experts are numbered from 0 to {EXPERTS - 1}"):
        RouterReplay(model, torch.full_like(routes, EXPERTS))
    with pytest.raises(ValueError, match="between -2"):
        RouterReplay(model, torch.full_like(routes, -2))
    for batch in (IDS[:, :-1], torch.cat([IDS, IDS])):
        with RouterReplay(model, routes), pytest.raises(ValueError, match="Pad and split both alike"):
            logits(model, batch)


def test_dense_and_unknown_models_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no experts to choose from.*`router_replay=False`"):
        find_routers(tiny_model())
    with pytest.raises(ValueError, match="GraniteMoeForCausalLM chooses experts in GraniteMoeTopKRouter.*Qwen3Moe"):
        RouterRecorder(tiny_model("granitemoe", **LOCAL))
    with pytest.raises(ValueError, match="PhimoeForCausalLM chooses experts in PhimoeTopKRouter"):
        RouterRecorder(tiny_model("phimoe", **LOCAL))


def test_a_bypassed_router_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture()
    routes = record(model)
    block = model.model.layers[1].mlp
    monkeypatch.setattr(block, "forward", lambda hidden_states: hidden_states)
    with RouterReplay(model, routes), pytest.raises(RuntimeError, match="layers.1.mlp.gate did not run"):
        logits(model)
    with pytest.raises(RuntimeError, match="layers.1.mlp.gate ran 0 times"):
        record(model)
    with RouterRecorder(model) as recorder:
        logits(model)
        logits(model)
        with pytest.raises(RuntimeError, match="layers.0.mlp.gate ran 2 times"):
            recorder.take(len(IDS))


def test_a_router_that_scores_in_another_way_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture(norm_topk_prob=True)
    routes = record(model)
    monkeypatch.setattr(router_replay, "_checked", set())
    monkeypatch.setitem(routers.ROUTER_SCORES, "Qwen3MoeTopKRouter", routers.sigmoid_scores)
    for router in find_routers(model).values():
        router.routed_scaling_factor = 1.0
    with RouterReplay(model, routes), pytest.raises(RuntimeError, match="layers.0.mlp.gate .Qwen3MoeTopKRouter. of"):
        logits(model)


# Layout


def test_the_type_is_the_smallest_that_holds_the_experts() -> None:
    assert route_dtype(8) == route_dtype(128) == torch.int8  # 0 … 127, and -1
    assert route_dtype(129) == route_dtype(512) == torch.int16


def test_routes_are_padded_like_the_batch() -> None:
    # Two prompts, of 2 and 1 tokens, and completions of 1 and 2, in 3 + 3 columns; one layer, one expert a token.
    first, second = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    padded = pad_routes([first.view(3, 1, 1), second.view(3, 1, 1)], [2, 1], prompt_width=3, width=6)
    assert padded.view(2, 6).tolist() == [[-1, 1, 2, 3, -1, -1], [-1, -1, 4, 5, 6, -1]]
    with pytest.raises(ValueError, match="has 1 sequences, but the engine recorded the experts of 2"):
        pad_routes([first.view(3, 1, 1), second.view(3, 1, 1)], [2], 3, 6)
    for length, prompt_width, width in ((4, 3, 6), (1, 3, 4), (4, 5, 9)):
        with pytest.raises(ValueError, match="the tokens changed after they were sampled"):
            pad_routes([first.view(3, 1, 1)], [length], prompt_width, width)


# vLLM's routed experts. No engine returns them on a CPU: a stand-in gives them as vLLM 0.31 does.


class StandInLLM:
    """`vllm.LLM` as far as TRL calls it: each completion with (tokens - 1, decoder layers, k) unsigned experts."""

    def __init__(self, routed_experts: list[np.ndarray | None]) -> None:
        self._routed_experts = routed_experts

    def generate(self, prompts: list[Any], **_: Any) -> list[Any]:
        completions = [SimpleNamespace(routed_experts=experts) for experts in self._routed_experts]
        return [SimpleNamespace(outputs=[completion]) for completion in completions]


def test_vllm_routes_are_those_of_the_layers_with_a_router() -> None:
    model = mixture("glm4_moe")  # layer 0 is dense
    routed = np.arange(4 * 2 * CHOSEN, dtype=np.uint8).reshape(4, 2, CHOSEN) % EXPERTS
    engine = SimpleNamespace(llm=StandInLLM([routed, routed[:1].astype(np.uint16)]))
    vllm_routes.keep_routes(engine, model)
    outputs = engine.llm.generate(["a", "b"], sampling_params=None)
    assert len(outputs) == 2
    first, second = engine.last_routes
    assert first.dtype == torch.int8 and first.shape == (5, 1, CHOSEN) and second.shape == (2, 1, CHOSEN)
    assert first[:4, 0].tolist() == routed[:, 1].tolist() and first[4, 0].tolist() == [UNKNOWN] * CHOSEN
    with pytest.raises(RuntimeError, match="vLLM returned no routed experts"):
        vllm_routes.routes_of(None, [1], torch.int8)
    with pytest.raises(ValueError, match="the router gate is in no numbered layer"):
        vllm_routes.layer_number("gate")


@pytest.mark.vllm
def test_vllm_on_a_cpu_is_refused_before_it_starts() -> None:
    platforms = pytest.importorskip("vllm.platforms")
    if not platforms.current_platform.is_cpu():
        pytest.skip("vLLM runs on a GPU here")
    with pytest.raises(ValueError, match="with vLLM on a CPU.*`rollout_backend='transformers'`"):
        vllm_routes.check_engine_offers_routes()


def test_a_vllm_without_the_option_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setattr(vllm_routes, "ENGINE_OPTION", "return_experts_of_the_future")
    with pytest.raises(ValueError, match="no option.*return_experts_of_the_future.*vLLM 0.31"):
        vllm_routes.check_engine_offers_routes()
