# SPDX-License-Identifier: Apache-2.0
"""Decoding: cache and attention equal those of transformers, and what is dropped changes nothing."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_transformers_engine import ARCHITECTURES, build_engine, build_model, flat, worst_error
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dc_trl.rollouts import transformers as engine_module
from dc_trl.rollouts.decoding import (
    SHARED_KEYS_ATTENTION,
    RoomyLayer,
    cache_name,
    give_room,
    keep_rows,
    shared_keys_attention,
)
from dc_trl.rollouts.transformers import is_drop_due

PROMPTS = [[5 + i % 3] * (1 + i % 5) for i in range(48)]
ENDS = list(range(2, 20))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["alone", "groups", "one"])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_over_shared_keys_is_that_of_transformers(heads: tuple[int, int], tokens: int, masked: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(5, heads[0], tokens, 16)
    key, value = torch.randn(2, 5, heads[1], 9, 16).unbind()
    mask = (torch.arange(9) >= torch.arange(5)[:, None])[:, None, None].expand(5, 1, tokens, 9) if masked else None
    layer: Any = SimpleNamespace(num_key_value_groups=heads[0] // heads[1], is_causal=True)
    expected, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.3)
    ours, weights = shared_keys_attention(layer, query, key, value, mask, scaling=0.3)
    assert weights is None and ours.shape == expected.shape == (5, tokens, heads[0], 16)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_only_the_copy_attends_so_and_only_where_the_model_uses_sdpa() -> None:
    model = build_model("qwen3")
    assert build_engine(model).policy.config._attn_implementation == SHARED_KEYS_ATTENTION
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    engine = build_engine(model)
    assert engine.policy.config._attn_implementation == "eager"
    torch.manual_seed(0)
    assert worst_error(engine, model, [[5, 6, 7], [12]]) < 1e-4


def filled_layer() -> DynamicLayer:
    layer = DynamicLayer()
    layer.update(*torch.randn(2, 6, 2, 5, 4).unbind())
    return layer


def test_a_roomy_layer_holds_what_a_growing_one_holds() -> None:
    torch.manual_seed(0)
    growing = filled_layer()
    roomy = RoomyLayer(growing, most=300)
    # Row 2 ends, then rows 0 and 3 of those left.
    for kept, unmoved in (([0, 1, 3, 4, 5], 2), ([1, 2, 4], 0)):
        for _ in range(90):
            new = torch.randn(2, growing.keys.shape[0], 2, 1, 4).unbind()
            for ours, theirs in zip(roomy.update(*new), growing.update(*new), strict=True):
                assert torch.equal(ours, theirs)
        assert roomy.get_seq_length() == growing.get_seq_length()
        assert roomy.get_mask_sizes(1) == growing.get_mask_sizes(1)
        cache = DynamicCache()
        cache.layers = [roomy, growing]
        keep_rows(cache, torch.tensor(kept), unmoved)
        assert torch.equal(roomy.keys, growing.keys) and torch.equal(roomy.values, growing.values)
    assert 185 <= roomy._key_room.shape[-2] <= 1.5 * 185 and len(roomy.keys) == 3


def test_room_is_made_seldom_and_never_beyond_the_most() -> None:
    layer = RoomyLayer(filled_layer(), most=100)
    rooms = []
    for _ in range(95):
        layer.update(*torch.randn(2, 6, 2, 1, 4).unbind())
        rooms.append(layer._key_room.shape[-2])
    assert sorted(set(rooms)) == [70, 100]
    layer.update(*torch.randn(2, 6, 2, 1, 4).unbind())  # whoever goes on all the same is not refused
    assert layer.keys.shape[-2] == 101


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_goes_by_the_name_that_the_forward_has(name: str) -> None:
    class Model(torch.nn.Module):
        exec(f"def forward(self, input_ids, {name}=None, **kwargs): ...")

    model = Model()
    assert cache_name(model) == name
    # TRL wraps the forward, and keeps its signature.
    model.forward = functools.wraps(model.forward)(lambda *args, **kwargs: None)
    assert cache_name(model) == name


def test_layers_of_other_kinds_stay() -> None:
    model = build_model("gemma3_text")
    with torch.no_grad():
        cache = getattr(model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True), cache_name(model))
    kinds = [type(layer) for layer in cache.layers]
    give_room(cache, 50)
    assert [type(layer) for layer in cache.layers] == [
        RoomyLayer if kind is DynamicLayer else kind for kind in kinds
    ] and len(set(kinds)) == 2


@pytest.mark.parametrize(
    ("rows", "running", "due"),
    [(64, 61, False), (64, 60, True), (256, 241, False), (256, 240, True), (8, 5, False), (8, 4, True), (3, 2, False)]
    + [(2, 1, True), (5, 5, False)],
)
def test_a_drop_is_due_when_it_pays(rows: int, running: int, due: bool) -> None:
    assert is_drop_due(rows, running) == due


DROPS: dict[str, Callable[[int, int], bool]] = {
    "at-once": lambda rows, running: running < rows,
    "as-it-is": is_drop_due,
    "never": lambda rows, running: False,
}


@pytest.mark.parametrize("drop", ["at-once", "never"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_sequence_keeps_its_own_cache_whenever_others_are_dropped(
    name: str, drop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "is_drop_due", DROPS[drop])
    model = build_model(name)
    engine = build_engine(model, eos_token_ids=ENDS, max_completion_length=40)
    widths: list[int] = []
    engine.policy.register_forward_pre_hook(
        lambda module, arguments, named: widths.append(len(named["input_ids"])), with_kwargs=True
    )
    torch.manual_seed(0)
    assert worst_error(engine, model, PROMPTS) < 1e-4
    decoded = widths[1:]  # after the prompts
    assert decoded == sorted(decoded, reverse=True)
    assert (len(set(decoded)) > 10) == (drop == "at-once")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_completions_are_the_same_whenever_sequences_are_dropped(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(build_model(name), eos_token_ids=ENDS, max_completion_length=40)
    results = []
    for due in DROPS.values():
        monkeypatch.setattr(engine_module, "is_drop_due", due)
        results.append(engine.generate(PROMPTS, None, 1, greedy=True))
    assert results[0][1] == results[1][1] == results[2][1]
    for some in results[:2]:
        torch.testing.assert_close(flat(some[2]), flat(results[2][2]), atol=1e-4, rtol=0)
