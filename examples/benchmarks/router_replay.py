# SPDX-License-Identifier: Apache-2.0
"""What router replay does to the discrepancy of a mixture of experts: |π − μ| with it and without it, per precision.

A small random Qwen3-MoE, built from its configuration (nothing is downloaded), samples in process in each precision.
Its completions are then scored twice by the float32 model, once with its own choice of experts and once with the
sampler's. Random weights route close to ties more often than trained ones do: read the ratio, not the size.

    python examples/benchmarks/router_replay.py
"""

import argparse
import platform
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl.trainer.utils import pad

from dc_trl.rollouts.router_replay import RouterRecorder, RouterReplay, pad_routes
from dc_trl.rollouts.transformers import TransformersGeneration

PAD, BOS, EOS = 0, 1, 2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", default="bf16,int8", help="of the sampling copy, with commas")
    parser.add_argument("--prompts", type=int, default=64, help="sequences, each with a prompt of its own")
    parser.add_argument("--prompt-tokens", type=int, default=24, help="length of the longest prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="most tokens of a completion")
    parser.add_argument("--hidden", type=int, default=64, help="hidden size of the model")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model, all of them with experts")
    parser.add_argument("--experts", type=int, default=16, help="experts of a layer")
    parser.add_argument("--chosen", type=int, default=4, help="experts that a token takes")
    parser.add_argument("--vocabulary", type=int, default=128, help="vocabulary size of the model")
    parser.add_argument("--seeds", type=int, default=3, help="models to measure")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    return parser.parse_args()


def build_model(args: argparse.Namespace, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        moe_intermediate_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 16,
        num_key_value_heads=max(args.hidden // 32, 1),
        head_dim=32,
        num_experts=args.experts,
        num_experts_per_tok=args.chosen,
        norm_topk_prob=True,
        # Ten times the usual: at this width the usual 0.02 makes every next token, and every expert, equally likely.
        initializer_range=0.2,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return Qwen3MoeForCausalLM(config).eval()


def build_prompts(args: argparse.Namespace) -> list[list[int]]:
    lengths = torch.randint(args.prompt_tokens // 2, args.prompt_tokens + 1, (args.prompts,)).tolist()
    return [torch.randint(3, args.vocabulary, (length,)).tolist() for length in lengths]


def padded(sequences: Iterable[list[Any]], side: str, value: float, device: torch.device) -> Tensor:
    return pad([torch.tensor(s) for s in sequences], padding_value=value, padding_side=side).to(device)


class Batch:
    """Sampled sequences as a trainer lays them out: prompts padded on the left, completions (B, T) on the right."""

    def __init__(self, engine: TransformersGeneration, prompts: list[list[int]], device: torch.device) -> None:
        _, completions, logprobs, _ = engine.generate(prompts)
        prompt_ids = padded(prompts, "left", PAD, device)
        prompt_mask = padded(([1] * len(prompt) for prompt in prompts), "left", 0, device)
        self.completion_ids = padded(completions, "right", PAD, device)
        self.valid = padded(([1] * len(c) for c in completions), "right", 0, device)
        self.sampling_logps = padded(([lp[0] for lp in row] for row in logprobs), "right", 0.0, device)
        self.input_ids = torch.cat([prompt_ids, self.completion_ids], dim=1)
        self.attention_mask = torch.cat([prompt_mask, self.valid], dim=1)
        lengths = [len(prompt) for prompt in prompts]
        self.routes = pad_routes(engine.last_routes, lengths, prompt_ids.shape[1], self.input_ids.shape[1])

    @torch.no_grad()
    def train_logps(self, model: PreTrainedModel, context: AbstractContextManager[Any]) -> Tensor:
        """log π (B, T) of the completions by `model`, in `context`."""
        width = self.completion_ids.shape[1]
        with context:
            logits = model(input_ids=self.input_ids, attention_mask=self.attention_mask).logits
        logps = torch.log_softmax(logits[:, -width - 1 : -1].float(), dim=-1)
        return logps.gather(2, self.completion_ids[..., None]).squeeze(2)

    def differences(self, model: PreTrainedModel, context: AbstractContextManager[Any]) -> Tensor:
        """|π − μ| of every token, flat."""
        difference = (self.train_logps(model, context).exp() - self.sampling_logps.exp()).abs()
        return difference[self.valid.bool()]

    @torch.no_grad()
    def rerouted(self, model: PreTrainedModel) -> float:
        """Share of (token, layer) pairs for which `model` would choose other experts than the sampler."""
        with RouterRecorder(model) as recorder:
            model(input_ids=self.input_ids, attention_mask=self.attention_mask)
            live = recorder.take(len(self.input_ids)).cpu()
        known = self.routes[..., 0] >= 0
        return (live.sort(-1).values != self.routes.sort(-1).values).any(-1)[known].float().mean().item()


def measure(args: argparse.Namespace, seed: int, precision: str) -> str:
    accelerator = Accelerator(cpu=args.cpu)
    model = build_model(args, seed).to(accelerator.device)
    tokenizer = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)
    engine = TransformersGeneration(
        model,
        accelerator,
        tokenizer,
        precision=precision,
        max_completion_length=args.new_tokens,
        eos_token_ids=[EOS],
        seed=seed,
        record_routes=True,
    )
    batch = Batch(engine, build_prompts(args), accelerator.device)
    own = batch.differences(model, nullcontext())
    replayed = batch.differences(model, RouterReplay(model, batch.routes))
    means = f"{own.mean():.2e} → {replayed.mean():.2e} ({replayed.mean() / own.mean():.2f})"
    maxima = f"{own.max():.3f} → {replayed.max():.3f}"
    return f"{precision:10s} {seed:4d} {len(own):7d} {batch.rerouted(model):9.2%}  {means}   {maxima}"


def main() -> None:
    args = parse_args()
    size = sum(parameter.numel() for parameter in build_model(args, 0).parameters())
    print(f"{platform.machine()} {platform.system()}, torch {torch.__version__}, {size:,} parameters,", end=" ")
    print(f"{args.layers} layers, {args.chosen} of {args.experts} experts")
    print("precision  seed  tokens  rerouted  mean |π − μ| without → with replay     max")
    for precision in args.precisions.split(","):
        for seed in range(args.seeds):
            print(measure(args, seed, precision), flush=True)


if __name__ == "__main__":
    main()
