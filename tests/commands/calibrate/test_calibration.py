# SPDX-License-Identifier: Apache-2.0
"""`dc-trl calibrate`: healthy engines get a tolerance, broken ones are told apart, usage errors, what it writes."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from calibrations import statuses, write_recipe
from faults import (
    engine_temperature,
    merge_in_place,
    raw_logprobs,
    stale_prefix_cache,
    stale_sync,
    stale_tensors,
)
from places import ROOT
from tiny import published_model, save_tiny_policy

from dc_trl import DCGRPOTrainer
from dc_trl.commands.calibrate import run as calibrate_run
from dc_trl.commands.cli import main
from dc_trl.rollouts.rounding import Dither

PAGE = (ROOT / "docs/calibration.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for the tiny policy with in-process rollouts as trained, in a folder with what it names."""
    return write_recipe(tmp_path_factory.mktemp("recipe"), gradient_accumulation_steps=4)


class Calibrated:
    """What one run of the command left: `status`, `found` (calibration.json), and `output`, what it printed."""

    def __init__(self, status: int, folder: Path, output: str) -> None:
        self.status, self.folder, self.output = status, folder, output
        self.found = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
        self.statuses = statuses(self.found)
        self.messages = {check["name"]: check["message"] for check in self.found["checks"]}
        self.failed = [name for name, status in self.statuses.items() if status == "fail"]


@pytest.fixture
def calibrate(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Calibrated]:
    """Runs the command on the recipe with further flags, and with a fault of the trainer."""
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(
        *flags: str, precision: str | None = "bf16", fault: Callable[[DCGRPOTrainer], None] | None = None
    ) -> Calibrated:
        if fault is not None:
            build = calibrate_run._build

            def build_broken(*args: Any) -> Any:
                trainer = build(*args)
                fault(trainer)
                return trainer

            monkeypatch.setattr(calibrate_run, "_build", build_broken)
        engine = ["--rollout_precision", precision] if precision else []
        status = main(["calibrate", "--config", str(recipe), "--output_dir", str(tmp_path / "out"), *engine, *flags])
        return Calibrated(status, tmp_path / "out", capsys.readouterr().out)

    return run


# Engines


def test_engines_that_agree_need_no_constraint(calibrate: Any, recipe: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.yaml"
    copy.write_bytes(recipe.read_bytes())
    run = calibrate("--set", str(copy), precision=None)
    assert run.status == 0 and set(run.statuses.values()) == {"pass"}
    assert 0 < run.found["floor"]["value"] < 1e-6 and run.found["discrepancy_tolerance"] is None
    assert "engines agree" in run.found["reason"] and "left as it was" in run.output
    assert copy.read_bytes() == recipe.read_bytes()


def test_a_healthy_engine_gets_a_tolerance(calibrate: Any, recipe: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.yaml"
    copy.write_bytes(recipe.read_bytes())
    before = sorted(path.name for path in recipe.parent.rglob("*"))
    run = calibrate("--set", str(copy), precision="int4")
    assert run.status == 0 and not run.failed
    floor, tolerance = run.found["floor"], run.found["discrepancy_tolerance"]
    assert 0.02 < floor["value"] < 0.04  # docs/troubleshooting.md: int4 0.028
    assert tolerance == pytest.approx(max(1.25 * floor["value"], floor["value"] + 3 * floor["spread"] / 4), rel=0.005)
    assert yaml.safe_load(copy.read_text()) == yaml.safe_load(recipe.read_text()) | {
        "discrepancy_tolerance": tolerance
    }
    assert f"discrepancy_tolerance: {tolerance:g}" in run.output and "int4" in copy.read_text().splitlines()[-1]
    # It leaves its two files, and nothing else anywhere.
    assert sorted(path.name for path in run.folder.iterdir()) == ["calibration.json", "calibration.png"]
    assert sorted(path.name for path in recipe.parent.rglob("*")) == before


def test_secrets_of_a_recipe_are_written_nowhere(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "hf_" + "q" * 34
    monkeypatch.setenv("WANDB_API_KEY", "")  # `env:` sets it
    copy = tmp_path / "copy.yaml"
    values = yaml.safe_load(recipe.read_text()) | {"env": {"WANDB_API_KEY": secret}, "hub_token": secret}
    values |= {"run_name": secret, "vllm_server_host": secret, "chat_template_kwargs": {"api_key": secret}}
    copy.write_text(yaml.safe_dump(values))
    before = copy.read_text()
    options = ["--problems", "4", "--rollout_precision", "int4", "--output_dir", str(tmp_path / "out")]
    assert main(["calibrate", "--config", str(copy), "--set", str(copy), *options]) == 0
    assert os.environ["WANDB_API_KEY"] == secret
    assert secret not in "".join(capfd.readouterr())
    files = list((tmp_path / "out").iterdir())
    assert len(files) == 2 and not [path for path in files if secret.encode() in path.read_bytes()]
    assert copy.read_text().startswith(
        f"{before}discrepancy_tolerance: "
    ) and secret not in copy.read_text().removeprefix(before)


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8", "int3"])
def test_every_precision_is_healthy(calibrate: Any, precision: str) -> None:
    run = calibrate(precision=precision)
    assert run.status == 0 and run.found["discrepancy_tolerance"] > run.found["floor"]["value"]
    # docs/calibration.md and calibration/checks.py quote them: pytest -rP
    print(f"{precision}: {run.messages['sync']} {run.messages['temperature']}")


def test_the_weights_are_put_back_to_the_bit(calibrate: Any) -> None:
    kept: dict[str, Any] = {}

    def keep(trainer: DCGRPOTrainer) -> None:
        kept["trainer"] = trainer
        kept["before"] = [p.detach().clone() for p in trainer.model.parameters()]

    assert calibrate(fault=keep).status == 0
    trainer = kept["trainer"]
    assert all(torch.equal(old, now) for old, now in zip(kept["before"], trainer.model.parameters(), strict=True))
    served = trainer.vllm_generation.policy.state_dict()  # and the engine has them again
    dither = Dither(trainer.args.seed)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(served[name], dither.cast(parameter.detach(), torch.bfloat16, name))
    assert trainer.state.global_step == 0 and trainer.temperature == 1.0 == trainer.vllm_generation.temperature


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy whose weights lie on the bf16 grid."""
    return str(save_tiny_policy(tmp_path_factory.mktemp("published"), published_model()))


@pytest.mark.parametrize("rounding", ["nearest", "dither"])
def test_a_checkpoint_on_the_grid_gets_the_floor_that_holds(calibrate: Any, published: str, rounding: str) -> None:
    kept: dict[str, Any] = {}

    def keep(trainer: DCGRPOTrainer) -> None:
        kept["trainer"] = trainer
        kept["before"] = [p.detach().clone() for p in trainer.model.parameters()]

    run = calibrate("--model_name_or_path", published, "--sync_rounding", rounding, "--problems", "32", fault=keep)
    assert run.status == 0
    grid, floor = run.found["grid"], run.found["floor"]
    assert (grid["share"], grid["dtype"], grid["rounding"], grid["forward_rounds"]) == (
        1.0,
        "bfloat16",
        rounding,
        False,
    )
    assert grid["value"] == pytest.approx(run.found["passes"]["off_grid"]["metrics"]["prob_diff"]["mean"], rel=0.2)
    assert 1.05 * floor["value"] < grid["value"] < 2 * floor["value"]
    assert run.found["discrepancy_tolerance"] > 1.24 * grid["value"]
    assert (
        "floor off the grid" in run.found["reason"] and f"At step 0 it is {floor['value']:.3g}" in run.found["reason"]
    )
    assert "floor at step 0:" in run.output and "floor off the grid:" in run.output
    print(f"{rounding}: {run.messages['rounding']}")  # docs/calibration.md quotes it: pytest -rP
    assert run.statuses["rounding"] == {"nearest": "warn", "dither": "pass"}[rounding]
    if rounding == "nearest":
        assert "updates smaller than half a grid step will not reach the sampler" in run.messages["rounding"]
        assert "sync_rounding='dither'" in run.output
    # Put back to the bit, in the engine too.
    trainer = kept["trainer"]
    assert all(torch.equal(old, now) for old, now in zip(kept["before"], trainer.model.parameters(), strict=True))
    served = trainer.vllm_generation.policy.state_dict()
    assert all(torch.equal(served[n].float(), p) for n, p in trainer.model.named_parameters())


@pytest.mark.parametrize(
    ("flags", "precision", "share"),
    [
        ([], "bf16", 0.01),  # trained in float32: off the grid already
        (["published"], None, 1.0),  # samples as trained
        (["published", "--dtype", "bfloat16"], "bf16", 1.0),  # stays on the grid in training
    ],
)
def test_where_the_floor_at_step_0_holds_no_other_is_measured(
    calibrate: Any, published: str, flags: list[str], precision: str | None, share: float
) -> None:
    if flags[:1] == ["published"]:
        flags = ["--model_name_or_path", published, *flags[1:]]
    run = calibrate(*flags, "--problems", "8", precision=precision)
    assert run.statuses["rounding"] == "pass" and run.found["grid"]["share"] == pytest.approx(share, abs=0.01)
    assert run.found["grid"]["value"] is None and "off_grid" not in run.found["passes"]
    assert "off the grid" not in run.found["reason"] and "floor:" in run.output


def twice_quantised(trainer: DCGRPOTrainer) -> None:
    """Every sync after the first adds a rounding of its own to the engine's weights."""
    engine, calls = trainer.vllm_generation, []
    sync = engine.sync_weights

    @torch.no_grad()
    def corrupt() -> None:
        sync()
        calls.append(1)
        for parameter in engine.policy.parameters() if len(calls) == 2 else []:
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))

    engine.sync_weights = corrupt


def unscored(trainer: DCGRPOTrainer) -> None:
    """The engine gives no log-prob for the first token of each completion."""
    generate = trainer.vllm_generation.generate

    def without_first(*args: Any, **kwargs: Any) -> Any:
        prompts, completions, logprobs, ids = generate(*args, **kwargs)
        for sequence in logprobs:
            sequence[0] = [None]
        return prompts, completions, logprobs, ids

    trainer.vllm_generation.generate = without_first


FAULTS: dict[str, tuple[Callable[[DCGRPOTrainer], None], list[str], str]] = {
    "dead sync": (stale_sync, [], "sync"),
    "head not synced": (stale_tensors("lm_head"), [], "sync"),
    "stale prefix cache": (stale_prefix_cache, [], "sync"),
    "corrupting sync": (twice_quantised, [], "repeat"),
    "raw log-probs at temperature 0.7": (raw_logprobs, ["--temperature", "0.7"], "temperature"),
    "raw log-probs at temperature 1": (raw_logprobs, [], "temperature"),
    "raw log-probs at int4": (raw_logprobs, ["--rollout_precision", "int4"], "temperature"),
    "another temperature": (engine_temperature(0.9), [], "temperature"),
    "NaN": (unscored, [], "scored tokens"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_unhealthy_and_named(calibrate: Any, recipe: Path, name: str) -> None:
    fault, flags, check = FAULTS[name]
    before = recipe.read_bytes()
    run = calibrate(*flags, "--set", str(recipe), fault=fault)
    assert run.status == 1 and run.failed == [check]
    assert run.found["discrepancy_tolerance"] is None and not run.found["healthy"]
    assert recipe.read_bytes() == before
    (verdict,) = [verdict for verdict in run.found["checks"] if verdict["name"] == check]
    assert f"FAIL {check}: {run.messages[check]}" in " ".join(run.output.split())
    print(f"{name}: {run.messages[check]}")
    page, _, anchor = verdict["remedy"].rpartition(": ")[2].split(",")[0].partition("#")
    headings = [line.lstrip("# ").lower() for line in (ROOT / page).read_text().splitlines() if line.startswith("#")]
    assert anchor in [heading.replace(" ", "-").replace(":", "") for heading in headings]


def test_adapters_merged_in_place_are_warned_about(calibrate: Any) -> None:
    pytest.importorskip("peft")
    flags = ["--use_peft", "true", "--lora_target_modules", "all-linear", "--dtype", "bfloat16", "--lora_alpha", "64"]
    copied = calibrate(*flags)
    assert copied.status == 0 and copied.found["weights_moved"] == 0.0
    assert copied.statuses["sync"] == "pass"  # adapters that are still 0 are nudged too

    def merge_random_adapters(trainer: DCGRPOTrainer) -> None:
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        merge_in_place(trainer)

    merged = calibrate(*flags, fault=merge_random_adapters)
    assert merged.statuses["weights untouched"] == "warn" and merged.found["weights_moved"] > 1e-4
    assert merged.status == 0


def test_another_metric_and_average(calibrate: Any) -> None:
    flags = ["--discrepancy_metric", "logprob_diff", "--discrepancy_average", "token", "--tolerance_slack", "2"]
    run = calibrate(*flags, "--problems", "8")
    assert run.status == 0
    floor = run.found["floor"]
    assert floor["value"] == pytest.approx(run.found["distribution"]["metrics"]["logprob_diff"]["mean"])
    assert run.found["discrepancy_tolerance"] == pytest.approx(2 * floor["value"], rel=0.005)
    assert run.found["distribution"]["problems"] == 8 and "secondary source" not in run.output


# Outputs


def keys(value: Any, prefix: str = "") -> set[str]:
    """Dotted names of all keys of a JSON object; elements of a list are their list's."""
    if isinstance(value, list):
        return set().union(*(keys(x, prefix) for x in value)) if value else set()
    if not isinstance(value, dict):
        return set()
    return {prefix + k for k in value}.union(*(keys(x, f"{prefix}{k}.") for k, x in value.items()))


def test_the_json_is_what_the_page_says(calibrate: Any) -> None:
    found = calibrate("--problems", "8").found
    rows = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("| `")]
    documented = {name.strip().strip("`") for cells in rows for name in cells[0].split(",") if "`--" not in name}
    parents = {key for key in found if any(name.startswith(f"{key}.") for name in keys(found))}
    written = {key for key in keys(found) if key.count(".") <= 1} - parents
    assert written == documented
    assert set(found["passes"]) == {"first", "second", "stale", "nudged", "undone"}
    assert sum(row["tokens"] for row in found["distribution"]["by_position"]) == found["distribution"]["tokens"]
    assert sum(row["tokens"] for row in found["distribution"]["by_probability"]) == found["distribution"]["tokens"]


# Usage


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--problems", "0"], "at least 1"),
        (["--dry_run"], "option of dc-trl train"),
        (["--set", "nowhere.yaml"], "does not exist"),
        (["--no_such_option", "1"], "unknown option"),
        (["--dataset_name", "nowhere.jsonl"], "does not exist"),
        (["--rollout_backend", "vllm"], "nothing gives the log-probs"),
        (["--rollout_backend", "vllm", "--constraint", "none"], "no engine"),
        (["--use_vllm", "true", "--rollout_backend", "vllm", "--top_p", "0.9"], "truncates or shifts"),
        (
            ["--rollout_backend", "vllm", "--use_vllm", "true", "--vllm_mode", "server"]
            + ["--vllm_server_base_url", "http://127.0.0.1:9", "--vllm_server_timeout", "1"],
            "No vLLM server answered",
        ),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    argv = ["calibrate", "--config", str(recipe), "--output_dir", str(tmp_path / "out"), *flags]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_it_launches_itself_and_passes_the_status_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    argv = ["calibrate", "--config", str(recipe), "--accelerate_config", "single_gpu", "--num_machines", "1"]
    calls: list[Any] = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", calls.append)
    assert main(argv) == 0
    assert calls[0].training_script_args == argv[:-2]

    def fail(_: Any) -> None:
        raise subprocess.CalledProcessError(1, "python")

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    assert main(argv) == 1
