# SPDX-License-Identifier: Apache-2.0
"""`dc-trl export`: the same weights as `save_deployed`, from what a run has left on the disk."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import dc_trainer
from safetensors.torch import load_file, save_file
from tiny import published_model, save_tiny_policy, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from dc_trl.commands.cli import main
from dc_trl.rollouts.rounding import Dither


def trained(directory: Path, **options: Any) -> Any:
    """A short run whose weights moved by far less than a step of the bf16 grid, saved with a checkpoint."""
    defaults = {"learning_rate": 3e-5, "max_steps": 2, "save_strategy": "steps", "save_steps": 2, "seed": 7}
    trainer = dc_trainer(directory, **(defaults | {"model": published_model()} | options))
    trainer.train()
    trainer.save_model()
    return trainer


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_equal(found: Path, expected: Path) -> None:
    ours, theirs = contents(found), contents(expected)
    assert ours.keys() == theirs.keys() != set()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)
    assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}
    assert json.loads((found / "config.json").read_text()) == json.loads((expected / "config.json").read_text())


@pytest.mark.parametrize(
    ("precision", "rounding"),
    [("bf16", "auto"), ("fp16", "dither"), ("fp8", "auto"), ("int8", "dither"), ("int4", "auto"), ("bf16", "nearest")],
)
def test_an_export_equals_save_deployed_to_the_bit(
    tmp_path: Path, precision: str, rounding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    trainer = trained(run, rollout_precision=precision, sync_rounding=rounding)
    trainer.save_deployed(tmp_path / "deployed")
    for source in (run, run / "checkpoint-2"):
        assert main(["export", str(source), "--output_dir", str(tmp_path / source.name / "exported")]) == 0
        assert_equal(tmp_path / source.name / "exported", tmp_path / "deployed")
    dithered = rounding == "dither" or (rounding == "auto" and precision != "int4")
    assert ("dithered with seed 7" if dithered else "rounded to nearest") in capsys.readouterr().out


def test_the_update_is_kept_where_rounding_to_nearest_loses_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = trained(run, rollout_precision="bf16")
    for rounding in ("dither", "nearest"):
        assert main(["export", str(run), "--output_dir", str(tmp_path / rounding), "--rounding", rounding]) == 0
    before = dict(published_model().named_parameters())
    shares = {}
    for rounding in ("dither", "nearest"):
        deployed = AutoModelForCausalLM.from_pretrained(tmp_path / rounding)
        assert deployed.dtype == torch.bfloat16
        with torch.no_grad():
            pairs = [(q.float() - before[n], p - before[n]) for (n, p), (_, q) in named_pairs(trainer.model, deployed)]
            shares[rounding] = float(sum((q * p).sum() for q, p in pairs) / sum((p * p).sum() for _, p in pairs))
    assert shares["nearest"] < 0.2 and 0.9 < shares["dither"] < 1.1


def named_pairs(first: Any, second: Any) -> Any:
    return zip(first.named_parameters(), second.named_parameters(), strict=True)


def test_without_a_log_everything_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    policy = save_tiny_policy(tmp_path / "policy", model, dtype="float32")
    flags = ["--precision", "bf16", "--rounding", "dither", "--seed", "5"]
    assert main(["export", str(policy), "--output_dir", str(tmp_path / "out"), *flags]) == 0
    state = contents(tmp_path / "out")
    for name, parameter in model.named_parameters():
        assert torch.equal(state[name], Dither(5).cast(parameter.detach(), torch.bfloat16, name))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tiny_tokenizer().get_vocab()
    assert "note" not in capsys.readouterr().out
    # What is exported once more has been rounded before, and says so.
    assert main(["export", str(tmp_path / "out"), "--output_dir", str(tmp_path / "again"), *flags]) == 0
    assert "holds BF16 and no float32" in capsys.readouterr().out
    assert_equal(tmp_path / "again", tmp_path / "out")


def test_adapters_are_merged_in_float32_and_rounded_once(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = save_tiny_policy(tmp_path / "base", published_model(), dtype="float32")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0)
    trainer = trained(
        tmp_path / "run", model=str(base), peft_config=lora, rollout_precision="bf16", learning_rate=1e-2
    )
    trainer.save_deployed(tmp_path / "deployed")
    assert main(["export", str(tmp_path / "run"), "--output_dir", str(tmp_path / "out")]) == 0
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "deployed")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    merged = trainer.vllm_generation.policy
    assert all(torch.equal(p, q) for (_, p), (_, q) in named_pairs(merged, exported))


def test_a_directory_that_is_not_empty_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = save_tiny_policy(tmp_path / "policy", tiny_model(), dtype="float32")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    command = ["export", str(policy), "--precision", "bf16", "--rounding", "nearest", "--output_dir"]
    assert main([*command, str(tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err and len(list((tmp_path / "out").iterdir())) == 1
    assert main([*command, str(tmp_path / "out"), "--overwrite"]) == 0
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine" and contents(tmp_path / "out")
    before = contents(policy)
    assert main([*command, str(policy), "--overwrite"]) == 2
    assert "would be lost" in capsys.readouterr().err
    assert all(torch.equal(before[name], tensor) for name, tensor in contents(policy).items())


def write_log(folder: Path, settings: dict[str, Any], **start: Any) -> None:
    line = {"start": {"step": 0, "max_steps": 1, "settings": settings} | start}
    (folder / "log.jsonl").write_text(json.dumps(line) + "\n")


IN_PROCESS = {"rollout_backend": "transformers", "rollout_precision": "int4", "seed": 3, "sync_rounding": "auto"}


@pytest.mark.parametrize(
    ("settings", "start", "flags", "message"),
    [
        (None, {}, [], "precision is not known.*no log.jsonl.*--precision bf16|fp16"),
        (None, {}, ["--precision", "bf16"], "rounding is not known.*--rounding dither"),
        (None, {}, ["--precision", "bf16", "--rounding", "dither"], "seed of the dither is not known.*--seed"),
        ({"use_vllm": True}, {}, [], "vLLM serves in a dtype of its own.*--precision"),
        (IN_PROCESS, {}, [], "rounded nothing to int4, or its log does not say.*--rounding"),
        # int4 to nearest was the run's, and bf16 to nearest would lose what it has learnt: so it is asked for.
        (IN_PROCESS, {"rounding_in_force": "nearest"}, ["--precision", "bf16"], "nothing to bf16.*--rounding"),
    ],
)
def test_what_is_not_known_is_asked_for(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any] | None,
    start: dict[str, Any],
    flags: list[str],
    message: str,
) -> None:
    policy = save_tiny_policy(tmp_path / "policy", dtype="float32")
    if settings is not None:
        write_log(policy, settings, **start)
    assert main(["export", str(policy), "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_vllm_run_says_how_it_rounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = save_tiny_policy(tmp_path / "policy", dtype="float32")
    write_log(policy, {"use_vllm": True, "seed": 11}, rounding_in_force="dither")
    assert main(["export", str(policy), "--output_dir", str(tmp_path / "out"), "--precision", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "dithered with seed 11" in out and "log.jsonl" in out
    for name, parameter in tiny_model().named_parameters():
        expected = Dither(11).cast(parameter.detach(), torch.bfloat16, name)
        assert torch.equal(contents(tmp_path / "out")[name], expected)


def test_what_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--output_dir", str(tmp_path / "out"), "--precision", "bf16", "--rounding", "nearest"]
    assert main(["export", str(tmp_path / "nowhere"), *flags]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "run" / "checkpoint-4").mkdir(parents=True)
    assert main(["export", str(tmp_path / "run"), *flags]) == 2
    assert "holds no model" in (said := capsys.readouterr().err) and "checkpoint-4" in said
    policy = save_tiny_policy(tmp_path / "policy")
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    assert main(["export", str(policy), *flags]) == 2
    assert "NoSuchModel" in capsys.readouterr().err
    (policy / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, policy / "model.safetensors")
    assert main(["export", str(policy), *flags]) == 2
    assert "tensors are missing" in capsys.readouterr().err
    (policy / "model.safetensors").write_bytes(b"not weights")
    assert main(["export", str(policy), *flags]) == 2
    assert "cannot be exported" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
