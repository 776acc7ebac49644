# SPDX-License-Identifier: Apache-2.0
"""A long run of a tiny model: does its memory grow, do its steps slow down, do its files stay bounded?

Completions of one token and two layers make the model's own work small, so that what this package and TRL do around it
is most of a step. Every step is logged, tokens too, and checkpoints are rotated. Resident memory is sampled every 50
steps; a step's time is the processor's, which other programs disturb less than the clock's.

    python examples/benchmarks/long_run.py                          # 1,000 steps
    python examples/benchmarks/long_run.py --steps 300 --leak 512   # loses 512 KiB a step: is it found?
"""

import argparse
import ctypes
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from step_time import build_policy
from transformers import PrinterCallback, TrainerCallback

from dc_trl import DCGRPOConfig, DCGRPOTrainer

SAMPLED_EVERY = 50
FLAT = 0.05
"""Growth of memory after warm-up that counts as flat: a share of what it was then."""
CHECKPOINTS = 2
# Student's t, 97.5 %, by degrees of freedom; the normal's beyond.
_T = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086}


def resident() -> float:
    """MiB of memory that this process holds; what it has freed is given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 2**20


class Sampler(TrainerCallback):
    """Samples memory, and takes the time of each step; loses `leak` KiB of memory a step, if asked to."""

    def __init__(self, leak: int = 0) -> None:
        self.leak = leak
        self.lost: list[bytearray] = []
        self.memory: list[float] = []
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops it."""
        self.seconds.append(time.process_time() - self.began)
        if self.leak:
            self.lost.append(bytearray(b"x" * (self.leak * 1024)))
        if state.global_step % SAMPLED_EVERY == 0:
            self.memory.append(resident())


def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of even tokens."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def run(steps: int, folder: str, leak: int) -> Sampler:
    """Trains, with everything on that writes or collects."""
    model, tokenizer = build_policy(argparse.Namespace(vocab=64, hidden=64, layers=2, tokens=8, bf16=False))
    args = DCGRPOConfig(
        folder,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        rollout_backend="transformers",
        rollout_precision="int4",
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=1,
        learning_rate=1e-4,
        max_steps=steps,
        logging_steps=1,
        save_steps=SAMPLED_EVERY,
        save_total_limit=CHECKPOINTS,
        disable_tqdm=True,
        length_decay=True,
        log_tokens=True,
    )
    data = Dataset.from_dict({"prompt": [" ".join("a" * (1 + i % 4)) for i in range(32)]})
    trainer = DCGRPOTrainer(model, reward, args, train_dataset=data, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    sampler = Sampler(leak)
    trainer.add_callback(sampler)
    trainer.train()
    return sampler


def slope(values: list[float]) -> tuple[float, float, float]:
    """The slope of values over their number, least squares, and the ends of its 95 % interval."""
    x = np.arange(len(values))
    estimate, intercept = np.polyfit(x, values, 1)
    freedom = len(values) - 2
    rest = np.asarray(values) - (intercept + estimate * x)
    error = math.sqrt((rest**2).sum() / freedom / ((x - x.mean()) ** 2).sum())
    t = _T[max(n for n in _T if n <= freedom)]  # of no more degrees, so the interval is no narrower
    return float(estimate), float(estimate - t * error), float(estimate + t * error)


def judge(sampler: Sampler, folder: Path) -> dict[str, Any]:
    """The figures. The first tenth of the run is warm-up, and at least one sample."""
    warm = max(len(sampler.memory) // 10, 1)
    memory = sampler.memory[warm:]
    spread = (max(memory) - memory[0]) / memory[0]
    steps = [sampler.seconds[i : i + SAMPLED_EVERY] for i in range(0, len(sampler.seconds), SAMPLED_EVERY)]
    medians = [1e3 * statistics.median(part) for part in steps][warm:]
    trend, low, high = slope(medians)
    size = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    log = folder / "log.jsonl"
    return {
        "steps": len(sampler.seconds),
        "memory_mib": [round(value, 1) for value in sampler.memory],
        "memory_growth": round(spread, 4),
        "memory_flat": spread <= FLAT,
        "step_ms": [round(value, 2) for value in medians],
        "step_ms_per_1000_steps": [round(value * 1000 / SAMPLED_EVERY, 2) for value in (trend, low, high)],
        "step_time_without_trend": low <= 0 <= high,
        "log_bytes_a_step": round(size[log] / len(sampler.seconds)),
        "token_bytes_a_step": round(sum(n for p, n in size.items() if p.suffix == ".parquet") / len(sampler.seconds)),
        "checkpoints": len(list(folder.glob("checkpoint-*"))),
        "leftovers": sorted(path.name for path in size if path.suffix == ".tmp"),
    }


def main() -> int:
    """Prints the figures; the status is 1 if memory grew, or files were left over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="default 1000; at least 250")
    parser.add_argument("--leak", type=int, default=0, help="KiB to lose at each step, to see that it is found")
    options = parser.parse_args()
    if options.steps < 5 * SAMPLED_EVERY:
        parser.error(f"--steps {options.steps}: a trend needs at least {5 * SAMPLED_EVERY}.")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = judge(run(options.steps, folder, options.leak), Path(folder))
    print(json.dumps(figures, indent=1))
    return 0 if figures["memory_flat"] and figures["checkpoints"] <= CHECKPOINTS and not figures["leftovers"] else 1


if __name__ == "__main__":
    sys.exit(main())
