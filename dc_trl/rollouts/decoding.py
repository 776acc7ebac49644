# SPDX-License-Identifier: Apache-2.0
"""What makes a decoding step of the in-process engine cheap: a cache with room, and keys that heads share.

transformers' growing cache copies all keys and values for each new token, and its SDPA attention copies them once more
for each head of a group. Neither is needed to decode one token a sequence.

Shapes: n sequences, H query heads, K key heads, P cached tokens, D size of a head.
"""

import inspect
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# With "sdpa" in its name, transformers checks that the model supports SDPA.
SHARED_KEYS_ATTENTION = "dc_trl_sdpa"
# A full layer gets room for half as many tokens again, so that copying costs a constant a token and no more than a
# third of the memory is unused; a short one for some at least.
_GROWTH, _LEAST_ROOM = 1.5, 64


def share_keys_within_groups(model: PreTrainedModel) -> None:
    """Let a model that attends with SDPA decode without a copy of the keys for each head. Others stay as they are."""
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(SHARED_KEYS_ATTENTION)


def shared_keys_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA attention; of one token, the heads of a group are taken for as many tokens that see the same keys.

    Args:
        module: the layer.
        query: (n, H, ., D).
        key, value: (n, K, P, D).
        attention_mask: (n, 1, ., P), or None where all is seen.
        **kwargs: as for transformers' own attention functions.

    Returns:
        (n, ., H, D), and None for the attention weights.
    """
    count, heads, tokens, size = query.shape
    groups = heads // key.shape[1]
    same_for_all_heads = attention_mask is None or attention_mask.shape[1] == 1
    if tokens != 1 or groups == 1 or not same_for_all_heads or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    output = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(count, key.shape[1], groups, size),
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=kwargs.get("dropout", 0.0),
        scale=kwargs.get("scaling"),
    )
    return output.reshape(count, 1, heads, value.shape[-1]), None


AttentionInterface.register(SHARED_KEYS_ATTENTION, shared_keys_attention)
AttentionMaskInterface.register(SHARED_KEYS_ATTENTION, sdpa_mask)


def cache_name(model: torch.nn.Module) -> str:
    """By what name a model's forward takes the cache, and its output returns it.

    Newer transformers call it `cache` and announce that forwards will not take `past_key_values` from 5.40 on.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class RoomyLayer(DynamicLayer):
    """A cache layer of full attention, written in place: new tokens into room kept free, rows into gaps before them.

    Args:
        layer: the filled layer to take over; its tensors are copied on the first update.
        most: most tokens that it will ever hold.
    """

    def __init__(self, layer: Any, most: int) -> None:
        super().__init__()
        self.keys: torch.Tensor = layer.keys
        self.values: torch.Tensor = layer.values
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True
        self._most = most
        # (rows, K, room, D); `keys` and `values` are views of the filled part.
        self._key_room, self._value_room = self.keys, self.values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states (n, K, ., D) of new tokens and return those of all, (n, K, P, D)."""
        rows, _, start, _ = self.keys.shape
        end = start + key_states.shape[-2]
        if end > self._key_room.shape[-2]:
            room = min(max(int(_GROWTH * end), end + _LEAST_ROOM), max(self._most, end))
            self._key_room, self._value_room = _with_room(self.keys, room), _with_room(self.values, room)
        self._key_room[:rows, :, start:end] = key_states
        self._value_room[:rows, :, start:end] = value_states
        self.keys, self.values = self._key_room[:rows, :, :end], self._value_room[:rows, :, :end]
        return self.keys, self.values

    def keep_rows(self, kept: torch.Tensor, unmoved: int) -> None:
        """Keep the sequences at the places `kept`, which rise; the first `unmoved` of them are where they belong."""
        movers, rows = kept[unmoved:], len(kept)
        self.keys[unmoved:rows] = self.keys[movers]
        self.values[unmoved:rows] = self.values[movers]
        self.keys, self.values = self.keys[:rows], self.values[:rows]

    def reorder_cache(self, beam_idx: Any) -> None:
        """Keep the sequences at these places, in that order, repeats included."""
        super().reorder_cache(beam_idx)
        self._key_room, self._value_room = self.keys, self.values


def _with_room(states: torch.Tensor, room: int) -> torch.Tensor:
    rows, heads, filled, size = states.shape
    roomy = states.new_empty(rows, heads, room, size)
    roomy[:, :, :filled] = states
    return roomy


def give_room(cache: Any, most: int) -> None:
    """Make the layers of full attention in a filled cache roomy, for `most` tokens; layers of other kinds stay."""
    # Subclasses keep a window or states beside the keys.
    cache.layers = [RoomyLayer(layer, most) if type(layer) is DynamicLayer else layer for layer in cache.layers]


def keep_rows(cache: Any, kept: torch.Tensor, unmoved: int) -> None:
    """Drop sequences from a cache: in place where it can be written so, else by a copy of what is kept.

    Args:
        cache: of any kind.
        kept: (m,) places of the sequences to keep, rising.
        unmoved: how many of them, from the first, stay where they are.
    """
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.keep_rows(kept, unmoved)
        else:
            layer.reorder_cache(kept)
