# SPDX-License-Identifier: Apache-2.0
"""Training-phase time and peak memory of DC-GRPO against TRL's GRPO, with and without its correction, as ratios.

All arms train the same model on the same replayed rollouts, so generation costs nothing and only the training phase is
timed: scoring, loss, backward, optimizer. The arms alternate within one process; peak memory is a process's each.

    python examples/benchmarks/step_time.py
    python examples/benchmarks/step_time.py --cpu-time --rejection icepop max_tv   # and what these rules cost; or all
    python examples/benchmarks/step_time.py --cpu-time --rejection all --rounds 0   # the shares alone, no arms
    python examples/benchmarks/step_time.py --hidden 1024 --layers 28 --vocab 151936 --tokens 1024 --bf16   # a GPU
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from dc_trl import DCGRPOConfig, DCGRPOTrainer
from dc_trl.estimators.rejection import RULES

ARMS = ("dc-grpo", "grpo-corrected", "grpo-uncorrected")
REJECTING = "dc-grpo-rejecting"
# Around what a random policy and the replay disagree by, so that each rule has something to reject and to keep.
BOUNDS: dict[str, dict[str, float]] = {
    "geometric": {"low": 0.5, "high": 2.0},
    "token_veto": {"low": 0.01},
    "max_tv": {"high": 0.5},
    "kpop": {"high": 0.001},
    "icepop": {"low": 0.5, "high": 2.0},
    "dppo_tv": {"high": 0.001},
    "dppo_kl": {"high": 0.001},
}


class ReplayEngine:
    """An engine that returns fixed tokens and log-probs at once: `sequences` completions of `tokens` tokens."""

    def __init__(self, tokens: int, vocabulary: int) -> None:
        self.tokens, self.vocabulary = tokens, vocabulary

    def sync_weights(self) -> None:
        """Nothing to synchronise."""

    def generate(self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None) -> tuple:
        """The rollouts of a step, of lengths between a half and the whole of `tokens`."""
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(self.tokens // 2, self.tokens + 1, (len(prompts),), generator=generator).tolist()
        lengths[0] = self.tokens
        ids = [torch.randint(3, self.vocabulary, (n,), generator=generator).tolist() for n in lengths]
        logps = [[[-float(torch.log(torch.tensor(self.vocabulary)))]] * n for n in lengths]
        return prompts, ids, logps, [[[i] for i in row] for row in ids]


class Clock(TrainerCallback):
    """Seconds of each step, from its first forward to its optimizer step: wall clock, or the processor's."""

    def __init__(self, processor: bool) -> None:
        self.seconds: list[float] = []
        self.clock = time.process_time if processor else time.perf_counter

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self.clock()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock. The rollouts are scored within the step."""
        self.start = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops the clock."""
        self.seconds.append(self._now() - self.start)


def build_policy(options: argparse.Namespace) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """A random Qwen3 and a tokenizer that knows its prompts."""
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(options.hidden // 64, 1),
        num_key_value_heads=max(options.hidden // 128, 1),
        head_dim=64,
        max_position_embeddings=options.tokens + 64,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    return (model.to(torch.bfloat16) if options.bf16 else model), tokenizer


def build_trainer(arm: str, options: argparse.Namespace, directory: str) -> GRPOTrainer:
    """One arm's trainer, its engine replaced by the replay."""
    model, tokenizer = build_policy(options)
    common: dict[str, Any] = {
        "output_dir": directory,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": options.bf16,
        "gradient_checkpointing": options.checkpointing,
        "per_device_train_batch_size": options.sequences,
        "num_generations": 8,
        "max_completion_length": options.tokens,
        "max_steps": options.steps,
        "logging_steps": options.steps,
        "learning_rate": 1e-6,
    }
    data = Dataset.from_dict({"prompt": ["a b c d"] * 64})
    arguments = {"train_dataset": data, "processing_class": tokenizer}
    if arm in ("dc-grpo", REJECTING):
        if arm == REJECTING:
            common |= {"rejection": options.rejection}
            common |= {"rejection_bounds": {name: BOUNDS[name] for name in options.rejection}}
        args = DCGRPOConfig(**common, rollout_backend="transformers", discrepancy_tolerance=1e-9)
        trainer: GRPOTrainer = DCGRPOTrainer(model, _reward, args, **arguments)
    else:
        trainer = GRPOTrainer(model, _reward, GRPOConfig(**common), **arguments)
        trainer.vllm_importance_sampling_correction = arm == "grpo-corrected"
        trainer.use_vllm, trainer.vllm_mode, trainer._last_loaded_step = True, "replay", -1
    trainer.vllm_generation = ReplayEngine(options.tokens, options.vocab)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _reward(completions: list[str], **_: Any) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


def time_steps(arm: str, options: argparse.Namespace, directory: str) -> list[float]:
    """Seconds of each step of one run, the first left out."""
    trainer, clock = build_trainer(arm, options, directory), Clock(options.cpu_time)
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds[1:]


def time_constraint(arm: str, options: argparse.Namespace, directory: str) -> tuple[float, float]:
    """Share of a step spent on the constraint, its rules and all metrics; and the fraction of tokens rejected."""
    trainer, clock, spent = build_trainer(arm, options, directory), Clock(options.cpu_time), []
    for name in ("_constrain", "_settle_early", "_settle_late", "_finish_iteration"):
        method = getattr(trainer, name)

        def timed(*args: Any, _method: Any = method) -> Any:
            start = clock._now()
            result = _method(*args)
            if trainer.state.global_step:  # the first step is left out
                spent.append(clock._now() - start)
            return result

        setattr(trainer, name, timed)
    trainer.add_callback(clock)
    trainer.train()
    rejected = [entry.get("dc/rejection/any/tokens", 0.0) for entry in trainer.state.log_history]
    return sum(spent) / sum(clock.seconds[1:]), rejected[0]


def peak_memory(arm: str, argv: list[str]) -> float:
    """MiB at the peak of a process that trains one arm: of the GPU where there is one, else resident."""
    command = [sys.executable, __file__, *argv, "--memory-of", arm]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def own_peak() -> float:
    """This process's peak so far, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def parse() -> argparse.Namespace:
    """The command line; defaults suit two CPU cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 128, "layers": 4, "vocab": 1024, "sequences": 64, "tokens": 64, "steps": 4, "rounds": 8}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--bf16", action="store_true", help="weights in bfloat16")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--cpu-time", action="store_true", help="processor's seconds, for a machine with other load")
    parser.add_argument("--rejection", nargs="+", default=[], choices=[*RULES, "all"], help="times these rules too")
    parser.add_argument("--memory-of", choices=[*ARMS, REJECTING], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "all" in options.rejection:
        options.rejection = list(RULES)
    return options


def main() -> None:
    """Runs the arms in turn and prints medians, bests, ratios and peaks."""
    options = parse()
    with tempfile.TemporaryDirectory() as directory:
        if options.memory_of:
            time_steps(options.memory_of, options, directory)
            print(json.dumps(own_peak()))
            return
        arms = (*ARMS, REJECTING) if options.rejection else ARMS
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(options.rounds):
            for arm in arms:
                seconds[arm] += time_steps(arm, options, directory)
        shares = {arm: time_constraint(arm, options, directory) for arm in arms if arm.startswith("dc-grpo")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    print(f"\n{device}, torch {torch.__version__}, {torch.get_num_threads()} threads; {vars(options)}")
    ours = seconds["dc-grpo"]
    for arm in arms if options.rounds else ():
        median, best = statistics.median(seconds[arm]), min(seconds[arm])
        peak = peak_memory(arm, sys.argv[1:])
        print(f"{arm:18} median {median:.4f} s  best {best:.4f} s  peak {peak:7.0f} MiB", end="  ")
        print(f"dc-grpo is {statistics.median(ours) / median:.3f} (medians), {min(ours) / best:.3f} (bests) of it")
    for arm, (share, rejected) in shares.items():
        what = f", with {len(options.rejection)} rules that reject {rejected:.1%} of the tokens" if rejected else ""
        print(f"constraint and all metrics{what}: {share:.2%} of a {arm} step")


if __name__ == "__main__":
    main()
