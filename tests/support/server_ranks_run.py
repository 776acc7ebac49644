# SPDX-License-Identifier: Apache-2.0
"""One rank of a run against a vLLM server with weights over disk; started by test_vllm_fp8.py."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from runs import count_digits, dc_trainer, logged, weights

KEYS = ("dc/discrepancy/mean", "dc/chi2_token", "dc/tolerance", "dc/multiplier", "completions/mean_length", "reward")


def main(url: str, directory: Path) -> None:
    """Trains four steps and writes what this rank saw."""
    seen: list[str] = []

    def reward(completions: list[str], **columns: Any) -> list[float]:
        seen.extend(completions)
        return count_digits(completions, **columns)

    options: dict[str, Any] = {"use_vllm": True, "vllm_mode": "server", "weight_sync": "disk"}
    options |= {"vllm_server_base_url": url, "vllm_server_timeout": 60, "reward_funcs": reward}
    trainer = dc_trainer(directory, tolerance_calibration_batches=1, max_steps=4, **options)
    assert trainer.accelerator.num_processes == int(os.environ["WORLD_SIZE"])
    before = weights(trainer)
    trainer.train()
    report: dict[str, Any] = {key: logged(trainer, key) for key in KEYS}
    report |= {"moved": (weights(trainer) - before).abs().max().item(), "sum": weights(trainer).double().sum().item()}
    report["completions"] = seen
    rank = trainer.accelerator.process_index
    (directory / f"rank{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
