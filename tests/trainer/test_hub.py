# SPDX-License-Identifier: Apache-2.0
"""Pushing to the Hub with the real client, and what it brings back. The Hub is a local stand-in."""

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hostile
import pytest
from hub_run import REFUSING, REPOSITORY
from hub_stand_in import HubStandIn
from huggingface_hub import ModelCard
from PIL import Image
from places import ROOT, SUPPORT
from processes import run_python
from transformers import AutoModelForCausalLM

from dc_trl.training.pushing_trainer import files_to_send

RUN = SUPPORT / "hub_run.py"

# What a push of the tiny policy consists of.
MODEL = {"README.md", "curves.png", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
MODEL |= {"tokenizer_config.json", "chat_template.jinja"}

# As `dc-trl evaluate` writes them; the figures are made up.
RESULT = hostile.RESULT | {"title": "AIME 2024", "precision": "bf16", "mean": 0.1234, "stderr": 0.0123}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as server:
        server.refuse = {f"{REFUSING}/commit/": (403, "this token has no write access")}
        yield server


def client(hub: HubStandIn, folder: Path, *command: str, status: int = 0) -> str:
    """Runs Python on `command` in `folder`, as a client of the stand-in; returns its standard error."""
    return run_python(*command, cwd=folder, status=status, **hub.environment(folder / "home")).stderr


@pytest.fixture(scope="module")
def pushed(hub: HubStandIn, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that was pushed, and what its process reports; `pulled` in the folder is the repository as loaded back."""
    folder = tmp_path_factory.mktemp("pushed")
    results = folder / "run" / "evaluation" / "results.jsonl"
    results.parent.mkdir(parents=True)
    lines = [json.dumps(RESULT).encode(), *(line for line, _ in hostile.BAD_RESULTS.values())]  # stop no push
    results.write_bytes(b"\n".join(lines) + b"\n")
    client(hub, folder, str(RUN), str(folder))
    return folder, json.loads((folder / "result.json").read_text())


def test_the_weights_come_back(pushed: tuple[Path, dict[str, Any]]) -> None:
    assert pushed[1]["same_weights"]
    assert pushed[1]["text"] == "3+4="


def test_the_card_comes_back(pushed: tuple[Path, dict[str, Any]]) -> None:
    folder, report = pushed
    text = ModelCard.load(folder / "pulled" / "README.md").text
    last = [entry for entry in report["log"] if "dc/discrepancy/mean" in entry][-1]
    scores = [entry for entry in report["log"] if "eval_reward" in entry][-1]
    for expected in (
        *(
            "arXiv:2606.08779",
            "arXiv:2602.01826",
            "| constraint | lagrangian |",
            "| rollout engine | in-process transformers, int4 |",
            "| dual learning",
        ),
        f"| tolerance | {report['tolerance']:.4g} (calibrated: 1.25 × the mean of the first 2 generation batches) |",
        f"0.1, {report['multiplier']:.4g}, 1.0 |",
        f"| `dc/discrepancy/mean` | {last['dc/discrepancy/mean']:.4g} | {last['dc/discrepancy/mean']:.4g} |",
        *(
            f"| `dc/{key}` | {last[f'dc/{key}']:.4g} |"
            for name in ("discrepancy", "abs_log_ratio")
            for key in (f"{name}/p50", f"{name}/p90", f"{name}/p99")
        ),
        "| `dc/differs` | 1 | 1 |",
        f"| `dc/penalty_only` | {last['dc/penalty_only']:.4g} |",
        f"| `eval_reward` | {scores['eval_reward']:.4g} |",
        f"| `eval_dc/discrepancy/mean` | {scores['eval_dc/discrepancy/mean']:.4g} |",
        "| AIME 2024, avg@32 | 12.3 ± 1.2 | 30 | 0.7, 1.0, 32768 | vllm, bf16 | 2026-11-21 |",
        "![Curves](curves.png)",
        f'model="{REPOSITORY}"',
        "fine-tuned version of a model not on the Hub",
    ):
        assert expected in text
    assert "None" not in text


def test_the_header_carries_the_scores(hub: HubStandIn, pushed: tuple[Path, dict[str, Any]]) -> None:
    data = ModelCard.load(pushed[0] / "pulled" / "README.md").data
    assert data.model_name == "tiny-dc" and {"dc-grpo", "grpo", "trl"} <= set(data.tags)
    assert data.eval_results is not None
    found = {(r.dataset_type, r.dataset_name, r.metric_name): r.metric_value for r in data.eval_results}
    assert found["HuggingFaceH4/aime_2024", "AIME 2024", "avg@32"] == 12.34
    assert ("POST", "/api/validate-yaml") in hub.requests  # the header was judged, and accepted


def test_the_curves_come_back(pushed: tuple[Path, dict[str, Any]]) -> None:
    path = pushed[0] / "pulled" / "curves.png"
    with Image.open(path) as image:
        image.load()
        assert image.width > 1000 and len(image.getcolors(maxcolors=256) or []) > 10
    assert path.read_bytes() == (pushed[0] / "run" / "curves.png").read_bytes()


@pytest.mark.parametrize("place", ["run/checkpoint-3", "pulled/last-checkpoint"])
def test_checkpoints_carry_card_curves_and_state(pushed: tuple[Path, dict[str, Any]], place: str) -> None:
    checkpoint = pushed[0] / place
    text = (checkpoint / "README.md").read_text()
    for expected in ("arXiv:2606.08779", "arXiv:2602.01826", "| tolerance | 0.0", "Final values, step 3", "AIME 2024"):
        assert expected in text
    assert "eval_reward" not in text  # evaluated later
    with Image.open(checkpoint / "curves.png") as image:
        image.load()
    state = json.loads((checkpoint / "dc_grpo_state.json").read_text())
    assert state["dual"]["value"] == pushed[1]["multiplier"]


def test_the_commits(hub: HubStandIn, pushed: tuple[Path, dict[str, Any]]) -> None:
    messages = [commit.message for commit in hub.repositories[REPOSITORY].commits]
    assert messages[-1] == "End of training" and "Training in progress, step 3, checkpoint" in messages
    first = next(c for c in hub.repositories[REPOSITORY].commits if c.message == "Training in progress, step 3")
    assert {"README.md", "curves.png", "model.safetensors"} <= set(first.files)


def test_a_push_sends_the_model_and_its_card_and_not_the_run(hub: HubStandIn, pushed: tuple[Path, Any]) -> None:
    run = pushed[0] / "run"
    for name in ("log.jsonl", "training_args.bin", "tokens/tokens_00003.parquet", "evaluation/results.jsonl"):
        assert (run / name).is_file()
    checkpoint = {path.name for path in (run / "checkpoint-3").iterdir()} - {"training_args.bin"}
    sent = MODEL | {f"last-checkpoint/{name}" for name in checkpoint}
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/dc_grpo_state.json"} <= sent
    assert set(hub.repositories[REPOSITORY].files) == sent
    assert all(set(commit.files) <= sent for commit in hub.repositories[REPOSITORY].commits)


def test_what_is_sent_is_chosen_by_a_list(tmp_path: Path) -> None:
    sent = {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"}
    sent |= {
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "own [1].vocab",
    }
    others = {"deployed/model.safetensors", "report.html", "report-1.html", "notes.md", "train.py", "summary.json"}
    others |= {"tokens-1/tokens_00001.parquet", "log-1.jsonl", "calibration.json", "evaluation/samples/a.jsonl"}
    others |= {"_weight_sync/policy-00000001/model-00001.safetensors", "checkpoint-1/model.safetensors", ".env"}
    for name in sent | others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text("{}")
    tokenizer = SimpleNamespace(vocab_files_names={"vocab_file": "own [1].vocab"})
    assert set(files_to_send(tmp_path, SimpleNamespace(tokenizer=tokenizer))) == sent | {"config.json"}
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_own.Own"}}')
    (tmp_path / "modeling_own.py").touch()
    assert {"modeling_own.py", "train.py"} <= set(files_to_send(tmp_path, tokenizer))


def test_a_refusal_is_the_clients_own_and_the_model_stays(pushed: tuple[Path, dict[str, Any]]) -> None:
    folder, said = pushed[0], pushed[1]["refused"]
    assert "401 Unauthorized" in said["early"] and "Invalid credentials" in said["early"]
    assert not (folder / "early").exists()  # before anything was trained
    assert "403 Forbidden" in said["late"] and "this token has no write access" in said["late"]
    assert AutoModelForCausalLM.from_pretrained(folder / "late").config.model_type == "qwen3"
    assert "## Discrepancy constraint" in (folder / "late" / "README.md").read_text()


def test_the_command_pushes(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    runpy.run_path(str(ROOT / "examples" / "make_tiny_policy.py"))["main"](tmp_path / "outputs/tiny")
    recipe = str(ROOT / "examples" / "configs" / "tiny_cpu.yaml")
    flags = ("--max_steps", "2", "--disable_tqdm", "true", "--push_to_hub", "true")
    saves = ("--save_strategy", "steps", "--save_steps", "1", "--logging_steps", "1")
    with HubStandIn() as hub:
        client(hub, tmp_path, "-m", "dc_trl", "train", "--config", recipe, *flags, *saves)
        (repository,) = hub.repositories.values()
    assert set(repository.files) == MODEL
    for name in ("model.safetensors", "curves.png", "README.md"):
        assert repository.files[name] == (tmp_path / "outputs/tiny/run" / name).read_bytes()
    assert b"## Discrepancy constraint" in repository.files["README.md"]
    first = next(commit for commit in repository.commits if commit.message == "Training in progress, step 1")
    assert {"README.md", "curves.png", "model.safetensors"} <= set(first.files)  # `hub_strategy="every_save"`
    with HubStandIn() as hub:
        hub.refuse = {"/commit/": (403, "this token has no write access")}
        said = client(hub, tmp_path, "-m", "dc_trl", "train", "--config", recipe, *flags, status=2)
    assert "the push to the Hub failed: 403" in said and "hf upload tester/" in said
    assert set(re.findall(r"--include (\S+)", said)) == MODEL
    assert "Traceback" not in said
