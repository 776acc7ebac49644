# SPDX-License-Identifier: Apache-2.0
"""What a weight sync loses, in two runs that differ in nothing else. Two minutes on 2 CPU cores.

    python examples/demo.py
    python examples/demo.py --seed 1

A small Qwen3 policy is warmed up on sums until it mostly guesses, and rounded to the fp8 grid, as a published fp8
checkpoint is. From there DC-GRPO trains it twice in float32, rewarded by math-verify, while an fp8 copy of it samples:
once the copy gets the weights rounded to nearest, once dithered. An update that is smaller than half a step of fp8
never reaches the first copy, or all at once; the second follows.

Everything lands in `--output_dir`: both runs, a table, a picture, and `report.html`, which lays the two side by side.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import demo_quiet  # noqa: F401 (silences the imports below)
from demo_report import Log, side_by_side
from demo_task import round_to_grid
from quickstart import DemoArguments, load_problems, make_policy, run, save_summary
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from transformers.utils.logging import disable_progress_bar

from dc_trl.commands.report.command import report_command

PRECISION = "fp8"
LEARNING_RATE = 1e-4
ARMS = {"nearest": "to nearest", "dither": "dithered"}
"""Value of `sync_rounding` → what it is called in the table."""


@dataclass
class SyncDemoArguments:
    """The demo's options."""

    steps: int = field(default=60, metadata={"help": "Optimizer steps of each run."})
    warmup_steps: int = field(default=400, metadata={"help": "Supervised steps before them."})
    batch_size: int = field(default=64, metadata={"help": "Completions per step."})
    held_out: int = field(default=256, metadata={"help": "Problems kept apart, to measure accuracy on."})
    seed: int = field(default=0, metadata={"help": "Of problems, weights and draws."})
    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder for the runs, the table and the page."})


def main() -> None:
    """Runs the demo."""
    (args,) = HfArgumentParser(SyncDemoArguments).parse_args_into_dataclasses()
    disable_progress_bar()
    start = time.perf_counter()
    folder = Path(args.output_dir)
    arms = {rounding: arm_of(args, rounding) for rounding in ARMS}
    first = next(iter(arms.values()))
    set_seed(args.seed)
    training, held_out = load_problems(first)
    start_policy = make_start(first, folder / "start", {problem["prompt"] for problem in held_out})
    summaries: dict[str, dict[str, Any]] = {}
    logs: dict[str, Log] = {}
    for rounding, arm in arms.items():
        print(f"\nThe weight sync rounds {ARMS[rounding]}.")
        set_seed(args.seed)
        summaries[rounding], logs[rounding] = run(arm, start_policy, training, held_out)
        save_summary(arm, summaries[rounding])
    seconds = round(time.perf_counter() - start, 1)
    (folder / "summary.json").write_text(json.dumps({"wall_seconds": seconds, **summaries}, indent=2) + "\n")
    show(
        folder, {ARMS[name]: summary for name, summary in summaries.items()}, {ARMS[name]: logs[name] for name in logs}
    )


def arm_of(args: SyncDemoArguments, rounding: str) -> DemoArguments:
    """The quickstart's options for one of the two runs."""
    own = {"precision": PRECISION, "learning_rate": LEARNING_RATE, "sync_rounding": rounding}
    return DemoArguments(**vars(args) | own | {"output_dir": str(Path(args.output_dir, rounding))})


def make_start(args: DemoArguments, folder: Path, exclude: set[str]) -> str:
    """The policy that both runs start from, in the folder that is returned."""
    warmed_up = make_policy(args, exclude)
    policy = AutoModelForCausalLM.from_pretrained(warmed_up, dtype="float32")
    round_to_grid(policy, PRECISION)
    policy.save_pretrained(folder)
    AutoTokenizer.from_pretrained(warmed_up).save_pretrained(folder)
    return str(folder)


def show(folder: Path, summaries: dict[str, dict[str, Any]], logs: dict[str, Log]) -> None:
    """Draws, prints and writes the two runs side by side, by their names in the table."""
    from demo_picture import draw  # matplotlib is slow to load

    draw(logs, folder / "two_syncs.png")
    print(f"\n{side_by_side(summaries)}\n")
    report_command([*(str(folder / rounding) for rounding in ARMS), "--output", str(folder / "report.html")])
    print(f"Curves: {folder / 'two_syncs.png'}. Each run's policy and model card: {folder}/{{{','.join(ARMS)}}}.")


if __name__ == "__main__":
    main()
