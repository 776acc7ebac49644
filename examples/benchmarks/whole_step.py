# SPDX-License-Identifier: Apache-2.0
"""Time of a whole GRPO step with the in-process engine, against TRL's own generation, as ratios.

A step is everything: weight sync, generation, scoring, loss, backward, optimizer. The rivals are `GRPOTrainer` as it
comes (`transformers.generate`) and with `use_transformers_continuous_batching=True`. All train the same random Qwen3,
built from its configuration: nothing is downloaded. Short runs of the arms alternate within one process, so that
whatever else the machine does falls on all of them, and the ratios are of their medians and of their bests.

Completions end at random where the shape is ragged: one token in `--ragged` ends one, so that lengths spread from 1 to
the limit. In the other shape all have full length.

    python examples/benchmarks/whole_step.py
    python examples/benchmarks/whole_step.py --shapes small --rounds 12
"""

import argparse
import dataclasses
import platform
import statistics
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from dc_trl import DCGRPOConfig, DCGRPOTrainer

OURS, DEFAULT, CONTINUOUS = "dc-trl in process", "TRL default", "TRL continuous"
ARMS = (OURS, DEFAULT, CONTINUOUS)
PAD, EOS = 0, 1


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and its rollouts."""

    hidden: int
    layers: int
    vocabulary: int
    tokens: int  # most tokens of a completion
    ragged: bool
    sequences: int = 64
    group: int = 8


SHAPES = {
    "small": Shape(hidden=192, layers=5, vocabulary=64, tokens=96, ragged=True),
    "large": Shape(hidden=512, layers=8, vocabulary=8192, tokens=96, ragged=True),
    "even": Shape(hidden=128, layers=4, vocabulary=2048, tokens=64, ragged=False),
}


class Clock(TrainerCallback):
    """Seconds of each step, from before its rollouts to after its optimizer step."""

    def __init__(self, processor: bool) -> None:
        self.seconds: list[float] = []
        self.clock = time.process_time if processor else time.perf_counter

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self.clock()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock; the rollouts are made within the step."""
        self.start = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops the clock."""
        self.seconds.append(self._now() - self.start)


def build_policy(shape: Shape, spread: int) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """A random Qwen3, one in `spread` of whose tokens ends a completion, and a tokenizer of numbered words."""
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, shape.vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=max(shape.hidden // 128, 1),
        head_dim=64,
        max_position_embeddings=512,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = Qwen3ForCausalLM(config)
    ends = list(range(EOS, EOS + max(shape.vocabulary // spread, 1)))
    model.generation_config.eos_token_id = ends if shape.ragged else EOS
    if not shape.ragged:
        with torch.no_grad():  # a row that no hidden state of this size makes likely
            model.lm_head.weight[EOS] = 0.0
            model.lm_head.weight[PAD] = 0.0
    return model, tokenizer


def build_data(shape: Shape) -> Dataset:
    """Prompts of 8 to 32 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 33, (64,), generator=generator).tolist()
    rows = [torch.randint(2, shape.vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in rows]})


def reward(completions: list[str], **_: Any) -> list[float]:
    """Alternates within a group, so that every completion has an advantage."""
    return [float(i % 2) for i in range(len(completions))]


def build_trainer(arm: str, shape: Shape, options: argparse.Namespace, directory: str) -> GRPOTrainer:
    """The trainer of one arm."""
    model, tokenizer = build_policy(shape, options.ragged)
    common: dict[str, Any] = {
        "output_dir": directory,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": options.bf16,
        "per_device_train_batch_size": shape.sequences,
        "num_generations": shape.group,
        "max_completion_length": shape.tokens,
        "max_steps": options.steps + 1,
        "logging_steps": options.steps + 1,
        "learning_rate": 1e-6,
        "seed": options.seed,
    }
    arguments = {"train_dataset": build_data(shape), "processing_class": tokenizer}
    if arm == OURS:
        args = DCGRPOConfig(
            **common,
            rollout_backend="transformers",
            rollout_precision=options.precision,
            discrepancy_tolerance=1e-9,
        )
        trainer: GRPOTrainer = DCGRPOTrainer(model, reward, args, **arguments)
    else:
        args = GRPOConfig(**common, use_transformers_continuous_batching=arm == CONTINUOUS)
        trainer = GRPOTrainer(model, reward, args, **arguments)
    trainer.remove_callback(PrinterCallback)
    return trainer


def time_steps(arm: str, shape: Shape, options: argparse.Namespace, directory: str) -> tuple[list[float], float]:
    """Seconds of each step of one run, the first left out, and the mean length of its completions."""
    trainer, clock = build_trainer(arm, shape, options, directory), Clock(options.cpu_time)
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds[1:], trainer.state.log_history[0]["completions/mean_length"]


def compare(name: str, options: argparse.Namespace, directory: str) -> dict[str, tuple[float, float]]:
    """Runs one shape and prints it; returns for each rival the ratios of our step to its: medians and bests."""
    shape = SHAPES[name]
    arms = [arm for arm in ARMS if arm != CONTINUOUS or not options.no_continuous]
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    lengths: dict[str, list[float]] = {arm: [] for arm in arms}
    broken: dict[str, str] = {}
    for round_number in range(options.rounds):
        options.seed = round_number
        for arm in arms:
            if arm in broken:
                continue
            try:
                times, length = time_steps(arm, shape, options, directory)
            except Exception as error:  # noqa: BLE001 -- a rival that does not run here is reported, not hidden
                if arm != CONTINUOUS:
                    raise
                broken[arm] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            seconds[arm] += times
            lengths[arm].append(length)
    size = sum(parameter.numel() for parameter in build_policy(shape, options.ragged)[0].parameters())
    print(f"\n{name}: {size:,} parameters, {dataclasses.asdict(shape)}")
    ratios = {}
    for arm in arms:
        if not seconds[arm]:
            print(f"  {arm:18} does not run here: {broken[arm]}")
            continue
        middle, best = statistics.median(seconds[arm]), min(seconds[arm])
        length = statistics.mean(lengths[arm])
        print(f"  {arm:18} median {middle:.3f} s  best {best:.3f} s  mean length {length:.1f}", end="")
        if arm != OURS:
            ratios[arm] = statistics.median(seconds[OURS]) / middle, min(seconds[OURS]) / best
            print(f"  ours / this: {ratios[arm][0]:.3f} (medians), {ratios[arm][1]:.3f} (bests)", end="")
        print(flush=True)
    return ratios


def parse() -> argparse.Namespace:
    """The command line; defaults suit two CPU cores and take some minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all")
    parser.add_argument("--rounds", type=int, default=4, help="runs of each arm; default 4")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run, after one to warm up; default 3")
    parser.add_argument("--ragged", type=int, default=48, help="one in so many tokens ends a completion; default 48")
    parser.add_argument("--precision", default=None, help="of our engine; default as trained, like TRL's generation")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast in training")
    parser.add_argument("--cpu-time", action="store_true", help="processor's seconds, for a machine with other load")
    parser.add_argument("--no-continuous", action="store_true", help="leave TRL's continuous batching out")
    return parser.parse_args()


def main() -> None:
    """Compares every shape and prints the worst and the best ratio to each rival."""
    options = parse()
    ratios: dict[str, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in options.shapes:
            ratios[name] = compare(name, options, directory)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    print(f"\n{device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for rival in (DEFAULT, CONTINUOUS):
        found = {name: ratio[rival] for name, ratio in ratios.items() if rival in ratio}
        if not found:
            continue
        worst, best = (choose(found, key=lambda name: found[name][0]) for choose in (max, min))
        print(
            f"whole step / {rival}, of medians: worst {found[worst][0]:.2f} ({worst}), best {found[best][0]:.2f} "
            f"({best})"
        )


if __name__ == "__main__":
    main()
