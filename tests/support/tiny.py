# SPDX-License-Identifier: Apache-2.0
"""Tiny models and tokenizers, built in memory from a fixed seed: nothing is downloaded."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ +-*/=.,:;?!()[]{}<>'\"_%&#@$\n"
# For bfloat16 on vLLM's CPUs: on virtual machines that report AMX without granting it, the kernels that vLLM 0.31
# picks for shapes in whole tiles can end its worker with an illegal instruction. Nothing here is a multiple of 32.
OFF_TILE = {"hidden_size": 72, "intermediate_size": 136, "head_dim": 48}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, 100 tokens or fewer, with pad, bos, eos and unk."""
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *CHARACTERS])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = Split("", "isolated")
    core.decoder = decoders.Fuse()  # no spaces between tokens
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.padding_side = "left"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(arch: str = "qwen3", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of some 0.1 million parameters in float32; `overrides` go to its config.

    Args:
        arch: a transformers `model_type`; `qwen3_moe` gets four experts, two of them active.
        seed: of the initial weights. The global random state is left as it was.
        **overrides: fields of the config.
    """
    tokenizer = tiny_tokenizer()
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        # Ten times the usual: at this width the usual 0.02 makes every next token equally likely.
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if arch.endswith("_moe"):
        fields |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config = AutoConfig.for_model(arch, **(fields | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def published_model(arch: str = "qwen3", **options: Any) -> PreTrainedModel:
    """A tiny model in float32 whose weights lie on the bf16 grid, as a published checkpoint's do."""
    model = tiny_model(arch, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def save_tiny_policy(directory: Path | str, model: PreTrainedModel | None = None, dtype: str = "bfloat16") -> Path:
    """Save a model (by default `tiny_model()`) and the tokenizer where vLLM can load them; returns the directory.

    The weights are saved as they are; `dtype` goes into config.json only, which is what vLLM follows.
    """
    directory = Path(directory)
    model = tiny_model() if model is None else model
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    config = AutoConfig.from_pretrained(directory)
    config.dtype = dtype
    config.save_pretrained(directory)
    return directory
