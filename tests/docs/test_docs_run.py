# SPDX-License-Identifier: Apache-2.0
"""The Python blocks of the pages run as they are printed: on a tiny policy and data set, for two short steps.

What is replaced, and nothing else: the names on the Hub are directories of the working directory; configurations are
checked as written and then shortened, with the in-process engine in vLLM's place; nothing is uploaded.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import trl
from pages import DOCS
from tiny import save_tiny_policy
from trl import GRPOTrainer

import dc_trl
from dc_trl import DCGRPOConfig, DCGRPOTrainer
from dc_trl.estimators.rejection import RULES

STEPS = 2
ON_CPU = {"use_cpu": True, "bf16": False}
SHORT = {
    "max_steps": STEPS,
    "save_steps": 1,
    "logging_steps": 1,
    "max_completion_length": 8,
    "disable_tqdm": True,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": None,
    "gradient_checkpointing": False,
}
VLLM_ONLY = ("use_vllm", "vllm_mode", "weight_sync", "vllm_engine_kwargs", "vllm_server_base_url")

# Output directory → log, one entry a call of `train`.
Runs = list[tuple[str, list[dict[str, Any]]]]


def blocks(page: str) -> list[str]:
    """The page's Python blocks, each after as many empty lines as precede it, so that tracebacks name its lines."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.finditer(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


def shortened(config: Callable[..., Any]) -> Callable[..., Any]:
    """A stand-in for a config class."""

    def make(*args: Any, **kwargs: Any) -> Any:
        config(*args, **(kwargs | ON_CPU))  # as the page has it: raises for what the reader could not use
        engine = {"rollout_backend": "transformers"} if kwargs.get("use_vllm") else {}
        kept = {name: value for name, value in kwargs.items() if name not in VLLM_ONLY}
        return config(*args, **(kept | engine | ON_CPU | SHORT))

    return make


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """Sets the replacements up; the runs of the page are collected in it, and its rules go when its test ends."""
    monkeypatch.chdir(tmp_path)
    save_tiny_policy("Qwen/Qwen3-0.6B", dtype="float32")
    data = Path("trl-lib/DeepMath-103K/train.jsonl")
    data.parent.mkdir(parents=True)
    rows = [{"prompt": [{"role": "user", "content": f"{i}+{i}="}], "solution": f"${2 * i}$"} for i in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    collected: Runs = []
    train = GRPOTrainer.train

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("resume_from_checkpoint") or any(
            args
        ):  # as after an interruption: the last step is still to be done
            shutil.rmtree(Path(self.args.output_dir, f"checkpoint-{STEPS}"))
            args, kwargs = (str(Path(self.args.output_dir, f"checkpoint-{STEPS - 1}")),), {}
        result = train(self, *args, **kwargs)
        assert self.state.global_step == STEPS
        collected.append((self.args.output_dir, self.state.log_history))
        return result

    monkeypatch.setattr(GRPOTrainer, "train", recorded)
    monkeypatch.setattr(DCGRPOTrainer, "push_to_hub", lambda *a, **k: None)
    monkeypatch.setattr(dc_trl, "DCGRPOConfig", shortened(DCGRPOConfig))
    monkeypatch.setattr(trl, "GRPOConfig", shortened(trl.GRPOConfig))
    with patch.dict(RULES):
        yield collected


def run_page(page: str) -> dict[str, Any]:
    """Runs the blocks in their order, in one namespace, and returns it."""
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        exec(compile(block, str(DOCS / page), "exec"), namespace)
    return namespace


def series(runs: Runs, directory: str, key: str) -> list[float]:
    return [entry[key] for name, log in runs for entry in log if name == directory and key in entry]


@pytest.mark.parametrize("page", ["index.md", "paper_index.md"])
def test_short_pages_run(page: str, runs: Runs) -> None:
    run_page(page)
    assert len(runs) == "".join(blocks(page)).count("trainer.train(")


def test_the_quick_start_runs(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    run_page("quickstart.md")
    assert [name for name, _ in runs] == [
        "qwen3-dc-grpo",
        "qwen3-in-process",
        "qwen3-lora",
        "qwen3-resume",
        "qwen3-resume",
    ]
    for name, _ in runs:
        assert series(runs, name, "dc/discrepancy/mean"), name
    resumed = [entry["step"] for entry in runs[4][1] if "loss" in entry]
    assert resumed == [1, 2]  # the log goes on from the checkpoint
    assert Path("qwen3-lora/adapter_model.safetensors").exists()
    assert Path("qwen3-dc-grpo-final/model.safetensors").exists()
    assert "Discrepancy constraint" in Path("qwen3-resume/README.md").read_text(encoding="utf-8")
    assert "'dc/discrepancy/mean': " in capsys.readouterr().out.splitlines()[-2]


def test_the_customisations_run(runs: Runs) -> None:
    namespace = run_page("customization.md")
    assert len(runs) == "".join(blocks("customization.md")).count("trainer.train(")
    assert series(runs, "schedule", "dc/tolerance") == pytest.approx([0.004, 0.003])
    assert set(series(runs, "measured", "dc/multiplier")) == {0.0}
    assert series(runs, "length-decay", "length_decay/lr_scale") == [1.0] * STEPS
    assert series(runs, "rewards", "rewards/brevity_reward/mean")[0] > 0.9
    assert max(series(runs, "two-turns", "dc/nan_fraction")) == 0.0
    # The engine of the page samples in bf16 and reports its own log-probs: it agrees with the trainer up to rounding.
    assert 0 < max(series(runs, "engine", "dc/discrepancy/mean")) < 0.02
    assert max(series(runs, "engine", "dc/nan_fraction")) == 0.0
    assert 0 <= namespace["constraint"].multiplier <= 1 and namespace["token_advantages"].shape == (4, 16)
    fixed, threshold = namespace["fixed"], namespace["threshold"]
    assert (fixed.constraint, threshold.discrepancy_tolerance) == ("fixed", 0.02)
    assert stops(namespace["StopWhenEnginesPart"](smallest=0.3, patience=2)) == [False, False, False, True]


def stops(callback: Any) -> list[bool]:
    """Whether the callback has stopped the run, after each of four log entries."""
    control = type("Control", (), {"should_training_stop": False})()
    stopped = []
    for ess in (0.2, 0.9, 0.2, 0.1):
        callback.on_log(None, None, control, logs={"dc/ess": ess})
        stopped.append(control.should_training_stop)
    return stopped
