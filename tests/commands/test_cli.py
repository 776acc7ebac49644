# SPDX-License-Identifier: Apache-2.0
"""The console script: a training run from a recipe, the launcher's command line, errors before anything loads."""

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from example_scripts import TINY, enter_tiny_recipe
from places import ROOT
from processes import run_python
from safetensors.torch import load_file

import dc_trl.commands.train.arguments
import dc_trl.commands.train.run
from dc_trl.commands.cli import COMMANDS, main
from dc_trl.commands.train.arguments import find_accelerate_config


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which configs/tiny_cpu.yaml runs as it is."""
    enter_tiny_recipe(tmp_path, monkeypatch)
    return tmp_path


def test_trains_the_tiny_recipe(tiny: Path) -> None:
    pytest.importorskip("math_verify")
    flags = ["--max_steps", "6", "--logging_steps", "1", "--save_strategy", "steps", "--save_steps", "6"]
    assert main(["train", "--config", str(TINY), "--disable_tqdm", "true", *flags]) == 0
    run = tiny / "outputs/tiny/run"
    log = json.loads((run / "checkpoint-6/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert all(0 < entry["rewards/accuracy/mean"] < 1 for entry in log[::2])  # a random policy is sometimes right
    assert any("dc/discrepancy/mean" in entry for entry in log)
    assert log[0]["math_verify/timeout"] == 0
    before, after = (load_file(path / "model.safetensors") for path in (tiny / "outputs/tiny/policy", run))
    assert any((before[name] != after[name]).any() for name in before)


def test_plans_in_a_process_of_its_own(tiny: Path) -> None:
    result = run_python("-m", "dc_trl", "train", f"--config={TINY}", "--dry_run")
    assert "updates per generation batch" in result.stdout and not (tiny / "outputs/tiny/run").exists()


def test_a_step_is_one_line_and_nothing_else_is_said(tiny: Path) -> None:
    pytest.importorskip("math_verify")
    options = ["--max_steps", "3", "--logging_steps", "1", "--steps_per_generation", "1", "--report_to", "none"]
    result = run_python("-m", "dc_trl", "train", "--config", TINY, *options, fresh=True)
    steps = [f"step {step}/3: reward " for step in (1, 2, 3)] + ["step 3/3: the end, after "]
    lines = result.stdout.splitlines()
    assert [line.startswith(step) for line, step in zip(lines, steps, strict=True)] == [True] * 4
    assert not any(name in result.stderr for name in ("torchao", "pytree", "riton"))
    # The bars of training and of what loads rewrite their line; a message has one of its own.
    (message,) = [line for line in re.split("[\r\n]", result.stderr) if "no penalty yet" in line]
    assert message.startswith("DC-GRPO: no penalty yet: calibrating the tolerance")


def test_a_script_keeps_the_notices_of_its_imports() -> None:
    # Loading the package, its commands included, sets no level; a level that was set stays.
    code = (
        "import logging\nimport dc_trl.commands.cli, dc_trl.commands.train.command, dc_trl.trainer\n"
        "from dc_trl.commands.quiet import IMPORT_NOTICES, silence_imports\n"
        "levels = lambda: [logging.getLogger(name).level for name in IMPORT_NOTICES]\n"
        "before = levels()\nlogging.getLogger('torchao').setLevel(logging.DEBUG)\nsilence_imports()\n"
        "print(before, levels())"
    )
    done = run_python("-c", code, fresh=True)
    assert done.stdout.strip() == "[0, 0, 0, 0] [10, 40, 40, 40]"


def test_rules_come_from_the_command_line(tiny: Path) -> None:
    pytest.importorskip("math_verify")
    rules = ["--rejection", "geometric", "icepop", "--rejection_bounds", '{"icepop": {"high": 2.0}}']
    flags = ["--max_steps", "4", "--logging_steps", "4", "--disable_tqdm", "true", "--save_strategy", "steps"]
    assert main(["train", "--config", str(TINY), *rules, *flags, "--save_steps", "4", "--ess_rate", "true"]) == 0
    state = json.loads((tiny / "outputs/tiny/run/checkpoint-4/trainer_state.json").read_text())
    entry = state["log_history"][0]
    assert {"dc/rejection/geometric/tokens", "dc/rejection/icepop/tokens", "ess_rate/lr_scale"} <= entry.keys()


def test_rules_and_their_bounds_come_from_a_recipe(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    # YAML takes 1e-5 for a text.
    text = "rejection: [token_veto, icepop]\nrejection_bounds:\n  token_veto: {low: 1e-5}\n"
    (tiny / "rules.yaml").write_text(yaml.safe_dump(recipe) + text, encoding="utf-8")
    assert main(["train", "--config", str(tiny / "rules.yaml"), "--dry_run"]) == 0
    assert "token_veto (low 1e-05); icepop (low 0.5, high 5)" in capsys.readouterr().out


def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for Accelerate's launcher; returns the list of what it was given."""
    calls: list[Any] = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", calls.append)
    return calls


def test_launches_through_accelerate(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = launched(monkeypatch)
    ours = ["--config", str(TINY), "--accelerate_config", "multi_node", "--seed", "1"]
    assert main(["train", *ours, "--machine_rank", "1", "--main_process_ip", "10.0.0.1"]) == 0
    (call,) = calls
    assert call.config_file == str(ROOT / "accelerate_configs" / "multi_node.yaml")
    assert (call.machine_rank, call.main_process_ip) == (1, "10.0.0.1")
    assert (call.module, call.training_script, call.training_script_args) == (True, "dc_trl", ["train", *ours])


def test_a_launched_process_trains(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, trained = launched(monkeypatch), []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(dc_trl.commands.train.run, "train", lambda *args: trained.append(args))
    assert main(["train", "--config", str(TINY), "--accelerate_config", "single_gpu"]) == 0
    assert not calls and len(trained) == 1


def test_accelerate_config_may_stand_in_the_recipe(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = launched(monkeypatch)
    recipe = tiny / "recipe.yaml"
    recipe.write_text(TINY.read_text() + "accelerate_config: fsdp2\n")
    assert main(["train", "--config", str(recipe), "--num_processes", "4"]) == 0
    assert (calls[0].config_file, calls[0].num_processes) == (str(find_accelerate_config("fsdp2")), 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "missing.yaml"], "missing.yaml does not exist"),
        (["--config"], "--config needs the path"),
        (["--config", "list.yaml"], "must be a YAML mapping"),
        (["--config", "broken.yaml"], "not valid YAML"),
        (["--config", "unknown.yaml"], "unknown option multiplier_start. Did you mean multiplier_"),
        ([*(tiny_flags := ["--config", str(TINY)]), "--dual_learning", "1"], "unknown option --dual_learning"),
        ([*tiny_flags, "--dataset_name", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        ([*tiny_flags, "--model_name_or_path", "./nowhere"], "model directory ./nowhere does not exist"),
        ([*tiny_flags, "--accelerate_config", "fsdp3"], "fsdp3 is neither a file nor one of deepspeed_zero2, "),
        ([*tiny_flags, "--eval_strategy", "steps", "--eval_steps", "1"], "eval_dataset_name is not set"),
        ([*tiny_flags, "--answer_column", "gold"], "no answer column: looked for gold"),
        ([*tiny_flags, "--reward_funcs", "accurate"], "'accurate' was not found"),
        ([*tiny_flags, "--constraint", "lagrange"], "lagrange"),
        ([*tiny_flags, "--multiplier_init", "-1"], "`multiplier_init` is -1"),
        (["--dataset_name", "a/b"], "no model"),
        (["--model_name_or_path", "a/b"], "no data"),
    ],
)
def test_errors_name_the_value_and_the_way_out(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    (tiny / "list.yaml").write_text("- 1\n")
    (tiny / "broken.yaml").write_text("a: [1\n")
    (tiny / "unknown.yaml").write_text("multiplier_start: 1\n")
    monkeypatch.setattr(dc_trl.commands.train.run, "train", lambda *args: pytest.fail("it trains"))
    try:
        status = main(["train", *flags])
    except SystemExit as error:  # argparse's own
        status = int(error.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err


def test_every_command_has_a_function() -> None:
    for help, target in COMMANDS.values():
        module, _, function = target.partition(":")
        assert help and callable(getattr(importlib.import_module(module), function))


def test_version_and_help_load_no_torch() -> None:
    code = (
        "import sys\nfrom dc_trl.commands.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    )
    assert "train" in run_python("-c", code, fresh=True).stdout


def test_the_wheel_takes_the_configurations_along() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["dc-trl"] == "dc_trl.commands.cli:main"
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"accelerate_configs": "dc_trl/accelerate_configs"}


def test_script_is_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr("dc_trl.commands.cli.main", given.append)
    monkeypatch.setattr(sys, "argv", ["train_math.py", "--config", "x.yaml"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "examples" / "train_math.py"), run_name="__main__")
    assert given == [["train", "--config", "x.yaml"]]


def test_yaml_and_options_agree() -> None:
    names = dc_trl.commands.train.arguments._names(dc_trl.commands.train.arguments.make_parser())
    recipes = (ROOT / "examples" / "configs").glob("*.yaml")
    assert all(set(yaml.safe_load(path.read_text(encoding="utf-8"))) <= set(names) for path in recipes)


def test_launcher_options_are_taken_out_in_order() -> None:
    without = dc_trl.commands.train.arguments._without
    assert without(["--seed", "1", "--machine_rank", "1", "--x"], ["--machine_rank", "1"]) == ["--seed", "1", "--x"]
    assert without(["a"], []) == ["a"]
