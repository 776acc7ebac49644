# SPDX-License-Identifier: Apache-2.0
"""DC-GRPO from start to finish on a laptop: a policy, rollouts in a cheaper precision, a constraint, curves.

    python examples/quickstart.py                          # a minute on 2 CPU cores, nothing is downloaded
    python examples/quickstart.py --precision int3         # a coarser sampler
    python examples/quickstart.py --vllm                   # rollouts by vLLM, in this process
    python examples/quickstart.py --model Qwen/Qwen3-0.6B  # any causal LM, on a GPU

Without `--model` it builds a small Qwen3 policy and warms it up on sums, so that it mostly guesses; then DC-GRPO,
rewarded by math-verify, trains it in float32 while an int4 copy of it samples. Everything lands in `--output_dir`: the
curves, a summary, the policy, and its model card.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import demo_quiet  # noqa: F401 (silences the imports below)
import torch
from datasets import Dataset
from demo_report import (
    DISCREPANCY,
    ENTROPY,
    MULTIPLIER,
    REWARD,
    UPDATE_SEEN,
    Log,
    ProgressCallback,
    conclusion,
    series,
    table,
)
from demo_task import SumReward, build_policy, build_tokenizer, make_problems, warm_up
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase, PrinterCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from dc_trl import DCGRPOConfig, DCGRPOTrainer
from dc_trl.constraint import CONSTRAINTS
from dc_trl.rollouts.precisions import PRECISIONS
from dc_trl.tasks.data import BOXED_TEMPLATE, load_math_dataset
from dc_trl.tasks.rewards import MathAccuracyReward

GROUP = 8  # completions per problem


@dataclass
class DemoArguments:
    """The quickstart's options."""

    model: str | None = field(default=None, metadata={"help": "Any causal LM. Default: a small policy, built here."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "json, jsonl or parquet file, or Hub data set, with problems and answers. Needs --model."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    vllm: bool = field(default=False, metadata={"help": "Sample with vLLM in this process, not with transformers."})
    precision: str = field(
        default="int4", metadata={"help": "Of the in-process sampler.", "choices": list(PRECISIONS)}
    )
    sync_rounding: str = field(
        default="auto", metadata={"help": "Of the weights for the sampler.", "choices": ["auto", "nearest", "dither"]}
    )
    constraint: str = field(default="lagrangian", metadata={"help": "See DCGRPOConfig.", "choices": list(CONSTRAINTS)})
    tolerance: float | None = field(default=None, metadata={"help": "Of the discrepancy. Default: calibrated."})
    steps: int = field(default=150, metadata={"help": "Optimizer steps of DC-GRPO."})
    warmup_steps: int = field(default=400, metadata={"help": "Supervised steps before it, without --model."})
    batch_size: int = field(default=64, metadata={"help": f"Completions per step, a multiple of {GROUP}."})
    learning_rate: float | None = field(default=None, metadata={"help": "Default: 2e-4, or 1e-6 with --model."})
    max_completion_length: int | None = field(default=None, metadata={"help": "Default: 16, or 512 with --model."})
    held_out: int = field(default=256, metadata={"help": "Problems kept apart, to measure accuracy on."})
    seed: int = field(default=0, metadata={"help": "Of problems, weights and draws."})
    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder for curves, summary and policy."})

    def __post_init__(self) -> None:
        if self.dataset is not None and self.model is None:
            raise ValueError("--dataset needs --model: the built-in policy reads nothing but sums. Name a causal LM.")


def main() -> None:
    """Runs the demo."""
    (args,) = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()
    disable_progress_bar()
    start = time.perf_counter()
    set_seed(args.seed)
    training, held_out = load_problems(args)
    model = args.model or make_policy(args, exclude={problem["prompt"] for problem in held_out})
    summary, log = run(args, model, training, held_out)
    summary["wall_seconds"] = round(time.perf_counter() - start, 1)
    save_summary(args, summary)
    print(f"\nOn {len(held_out)} held-out problems, sampled as deployed:\n{table(summary)}\n")
    print(f"{conclusion(summary, log)}\n\nCurves, summary, policy and model card: {args.output_dir}")
    print(f"A page with the curves and the tokens that disagree: dc-trl report {args.output_dir}")


def run(
    args: DemoArguments, model: str, training: list[dict[str, Any]], held_out: list[dict[str, Any]]
) -> tuple[dict[str, Any], Log]:
    """Trains a model, measures it before and after, and saves it with its card; returns the summary and the log."""
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    style = {"pretrained": args.model is not None, "chat": tokenizer.chat_template is not None}
    trainer = build_trainer(args, model, tokenizer, Dataset.from_list(prompts_for(training, **style)))
    problems = prompts_for(held_out, **style)
    before = evaluate(trainer, problems, args.seed)
    print(f"DC-GRPO: float32 trainer, {deployment(trainer)} rollouts, {before['accuracy']:.0%} of them right so far.")
    with logging_redirect_tqdm():
        trainer.train()
    after = evaluate(trainer, problems, args.seed)
    trainer.save_model(args.output_dir)
    trainer.create_model_card(model_name="dc-trl quickstart")
    log = trainer.state.log_history
    return summarise(args, trainer, before, after, log), log


def load_problems(args: DemoArguments) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Problems to train on and problems held out, as `prompt` and `solution`; no prompt is in both."""
    if args.dataset is None:
        held_out = make_problems("held-out", args.held_out, args.seed)
        known = {problem["prompt"] for problem in held_out}
        return make_problems("training", args.steps * args.batch_size // GROUP, args.seed, known), held_out
    rows = load_math_dataset(args.dataset, config=args.dataset_config, deduplicate=True).shuffle(seed=args.seed)
    if len(rows) <= args.held_out:
        raise ValueError(
            f"{args.dataset} has {len(rows)} problems, of which --held_out keeps {args.held_out}: lower it."
        )
    return rows.skip(args.held_out).to_list(), rows.take(args.held_out).to_list()


def prompts_for(problems: list[dict[str, Any]], pretrained: bool, chat: bool) -> list[dict[str, Any]]:
    """The problems as the model needs them: a pretrained one is told to box its answer, in chat form if it chats."""
    if not pretrained:
        return problems
    prompts = [problem["prompt"] for problem in problems]
    texts = [p[-1]["content"] if isinstance(p, list) else BOXED_TEMPLATE.replace("{problem}", p) for p in prompts]
    prompts = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    return [{**problem, "prompt": prompt} for problem, prompt in zip(problems, prompts, strict=True)]


def make_policy(args: DemoArguments, exclude: set[str]) -> str:
    """Builds and warms up the small policy; returns the folder that it is saved in."""
    # At this size a second thread gains little, and on a busy CPU the two would mostly wait for each other.
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    policy = build_policy(tokenizer)
    print("Warm-up, supervised: first worked sums, then mostly bare answers, so that the policy mostly guesses.")
    warm_up(policy, tokenizer, args.warmup_steps, args.seed, exclude)
    folder = str(Path(args.output_dir, "warm-up"))
    if args.vllm:
        policy.config.dtype = "bfloat16"  # vLLM's precision; the trainer loads float32 all the same
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_trainer(
    args: DemoArguments, model: str, tokenizer: PreTrainedTokenizerBase, problems: Dataset
) -> DCGRPOTrainer:
    """The trainer: plain TRL, but for the two names and the rollout engine."""
    pretrained = args.model is not None
    engine = (
        {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}
        if args.vllm
        else {"rollout_backend": "transformers", "rollout_precision": args.precision}
    )
    config = DCGRPOConfig(
        output_dir=args.output_dir,
        sync_rounding=args.sync_rounding,
        constraint=args.constraint,
        # By default the tolerance is calibrated: 1.25 times the mean discrepancy of the first batches.
        discrepancy_tolerance=args.tolerance,
        tolerance_calibration_batches=max(1, min(8, args.steps // 4)),
        max_steps=args.steps,
        learning_rate=args.learning_rate or (1e-6 if pretrained else 2e-4),
        per_device_train_batch_size=args.batch_size,
        num_generations=GROUP,
        max_completion_length=args.max_completion_length or (512 if pretrained else 16),
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        gradient_checkpointing=pretrained,
        seed=args.seed,
        logging_steps=1,
        log_tokens=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        **engine,
    )
    reward = SumReward() if args.dataset is None else MathAccuracyReward()
    trainer = DCGRPOTrainer(model, reward, config, problems, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressCallback)
    return trainer


def deployment(trainer: DCGRPOTrainer) -> str:
    """The precision of the engine that samples, and so of the policy as it would be deployed."""
    return trainer.args.rollout_precision or str(trainer.vllm_generation.llm.model_config.dtype).removeprefix("torch.")


def evaluate(trainer: DCGRPOTrainer, problems: list[dict[str, Any]], seed: int) -> dict[str, float]:
    """Accuracy of the engine that samples, with draws at temperature 1 and greedy, and the draws' mean length."""
    trainer.vllm_generation.sync_weights()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sampled, length = accuracy(trainer, problems, greedy=False)
        return {"accuracy": sampled, "greedy": accuracy(trainer, problems, greedy=True)[0], "length": length}


def accuracy(trainer: DCGRPOTrainer, problems: list[dict[str, Any]], greedy: bool) -> tuple[float, float]:
    """Share of problems that one completion each gets right, and the mean length of these completions in tokens."""
    tokenizer, engine = trainer.processing_class, trainer.vllm_generation
    prompts = [problem["prompt"] for problem in problems]
    chat = isinstance(prompts[0], list)
    if chat:
        prompts = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompts, add_special_tokens=not chat)["input_ids"]
    if trainer.args.use_vllm:
        engine.temperature = 0.0 if greedy else trainer.temperature
        completions = engine.generate(ids, None, 1)[1]
        engine.temperature = trainer.temperature
    else:
        completions = engine.generate(ids, greedy=greedy)[1]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    verdicts = trainer.reward_funcs[0](texts, [problem["solution"] for problem in problems])
    known = [verdict for verdict in verdicts if verdict is not None]  # None: an answer that math-verify cannot read
    return sum(known) / max(len(known), 1), sum(map(len, completions)) / len(completions)


def summarise(
    args: DemoArguments, trainer: DCGRPOTrainer, before: dict[str, float], after: dict[str, float], log: Log
) -> dict[str, Any]:
    """The run in numbers; first and last are means over a tenth of the steps, all over the whole run."""
    run = {f"{key}_{when}": value for when, d in (("before", before), ("after", after)) for key, value in d.items()}
    for name, key in (("discrepancy", DISCREPANCY), ("entropy", ENTROPY)):
        values = series(log, key)
        window = max(1, len(values) // 10)
        run |= {f"{name}_first": mean(values[:window]), f"{name}_last": mean(values[-window:])}
    return run | {
        "accuracy_all": mean(series(log, REWARD)),
        "discrepancy_all": mean(series(log, DISCREPANCY)),
        "update_seen": series(log, UPDATE_SEEN)[-1],
        "steps": trainer.state.global_step,
        "seed": args.seed,
        "model": args.model or "built-in",
        "rollout_backend": trainer.args.rollout_backend,
        "rollout_precision": deployment(trainer),
        "sync_rounding": args.sync_rounding,
        "constraint": args.constraint,
        "tolerance": trainer.discrepancy_tolerance,
        "multiplier_last": series(log, MULTIPLIER)[-1],
        "multiplier_max": max(series(log, MULTIPLIER)),
    }


def save_summary(args: DemoArguments, summary: dict[str, Any]) -> None:
    """Writes the summary beside the policy."""
    Path(args.output_dir, "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
