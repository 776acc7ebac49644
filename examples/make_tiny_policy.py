# SPDX-License-Identifier: Apache-2.0
"""Write a tiny random policy and a file of sums for it, with which configs/tiny_cpu.yaml runs offline on any machine.

    python examples/make_tiny_policy.py [DIRECTORY]      # default: outputs/tiny

The policy is a random Qwen3 of about 0.1 million parameters. Its vocabulary has one token for each boxed answer from 0
to 8, so that even a random policy is right now and then: the run shows the machinery at work, not mathematics learnt.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
ANSWERS = [f"\\boxed{{{n}}}" for n in range(9)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The digits to 4, `+`, `=` and the boxed answers, one token each."""
    words = [*SPECIALS, *"01234+=", *ANSWERS]
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = Split(Regex(r"\\boxed\{\d+\}|."), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.padding_side = "left"
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def make_policy(directory: Path) -> None:
    """Saves a random Qwen3 and its tokenizer, the same weights each time."""
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_sums(path: Path) -> None:
    """Writes the sums of two digits from 0 to 4 as JSON Lines with the columns `problem` and `answer`."""
    rows = [{"problem": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(directory: Path) -> None:
    """Writes `policy/` and `sums.jsonl` into the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    make_policy(directory / "policy")
    make_sums(directory / "sums.jsonl")
    print(f"Wrote {directory / 'policy'} and {directory / 'sums.jsonl'}.")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/tiny"))
