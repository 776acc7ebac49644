# SPDX-License-Identifier: Apache-2.0
"""How long the in-process engine takes to generate, against the `transformers.generate` call of TRL's own path.

Both sample the same number of tokens from the same small Qwen3, built from its configuration: nothing is downloaded.
Runs alternate, so that whatever else the machine does falls on both. No sequence ends early, so that both do the same
work.

    python examples/benchmarks/generation.py
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import GenerationConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import pad

from dc_trl.rollouts.transformers import TransformersGeneration

PAD, BOS, EOS = 0, 1, 2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64, help="sequences generated at once")
    parser.add_argument("--group", type=int, default=8, help="completions per distinct prompt; TRL's G")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="length of the longest prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="length of every completion")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size of the model")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument("--vocabulary", type=int, default=2048, help="vocabulary size of the model")
    parser.add_argument("--precision", default=None, help="of the engine; by default as trained, like TRL's path")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each, after one to warm up")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    return parser.parse_args()


def build_model(args: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=max(args.hidden // 64, 1),
        head_dim=32,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = Qwen3ForCausalLM(config).eval()
    # Without end tokens every completion has full length.
    model.generation_config.eos_token_id = None
    return model


def build_prompts(args: argparse.Namespace) -> list[list[int]]:
    lengths = torch.randint(args.prompt_tokens // 2, args.prompt_tokens + 1, (args.prompts // args.group,)).tolist()
    distinct = [torch.randint(3, args.vocabulary, (length,)).tolist() for length in lengths]
    return [prompt for prompt in distinct for _ in range(args.group)]


def trl_generate(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """What `GRPOTrainer._generate_single_turn` does without vLLM: left padding, `generate`, lists of token ids."""
    tensors = [torch.tensor(prompt) for prompt in prompts]
    ids = pad(tensors, padding_value=PAD, padding_side="left").to(model.device)
    mask = pad([torch.ones_like(t) for t in tensors], padding_value=0, padding_side="left").to(model.device)
    # The sampling options that GRPOTrainer sets, at the defaults of GRPOConfig.
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=None,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=None,
        repetition_penalty=1.0,
        cache_implementation=None,
        disable_compile=True,
    )
    with torch.no_grad():
        sequences = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return sequences[:, ids.shape[1] :].cpu().tolist()


def timed(function: Callable[[], list[list[int]]], device: torch.device) -> float:
    started = time.perf_counter()
    completions = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    assert len({len(completion) for completion in completions}) == 1
    return elapsed


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(cpu=args.cpu)
    model = build_model(args).to(accelerator.device)
    prompts = build_prompts(args)
    engine = TransformersGeneration(
        model,
        accelerator,
        SimpleNamespace(pad_token_id=PAD, eos_token_id=None),
        precision=args.precision,
        max_completion_length=args.new_tokens,
        eos_token_ids=[],
    )
    engine.sync_weights()
    contestants = {
        "transformers.generate": lambda: trl_generate(model, prompts, args.new_tokens),
        "dc_trl engine": lambda: engine.generate(prompts, None, args.group)[1],
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in range(args.runs + 1):
        for name, function in contestants.items():
            elapsed = timed(function, accelerator.device)
            if run > 0:
                seconds[name].append(elapsed)

    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{platform.machine()} {platform.system()}, {accelerator.device}, {torch.get_num_threads()} threads")
    print(f"torch {torch.__version__}, engine precision {args.precision or 'as trained'} ({engine.quantization})")
    print(f"{len(prompts)} sequences x {args.new_tokens} tokens, {args.group} per prompt, {size:,} parameters")
    for name, times in seconds.items():
        print(f"{name:22s} median {statistics.median(times):.3f} s   best {min(times):.3f} s")
    theirs, ours = seconds.values()
    print(
        f"ratio engine / transformers.generate: of medians {statistics.median(ours) / statistics.median(theirs):.3f}, "
        f"of best {min(ours) / min(theirs):.3f}"
    )


if __name__ == "__main__":
    main()
