# SPDX-License-Identifier: Apache-2.0
"""Secrets in a configuration: planted in every field that takes a text, looked for in everything that is written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hub_stand_in import TOKEN, HubStandIn
from places import SUPPORT
from processes import run_python
from runs import dc_trainer

from dc_trl import DCGRPOConfig
from dc_trl.commands.calibrate.run import SETTINGS
from dc_trl.records.card.model_card import complete
from dc_trl.records.run_log import settings_of, shown_settings
from dc_trl.rollouts.engines import engine_name
from dc_trl.rollouts.shown import WORDS
from dc_trl.training.pushing_trainer import arguments_without_secrets
from dc_trl.training.state import measured_with

RUN = SUPPORT / "secrets_run.py"
SECRET = "hf_" + "q" * 34

# What is shown by its purpose: the directory's name is the model's, and the repository is where it is published.
NAMES = {"output_dir", "hub_model_id"}

PLANTED: dict[str, Any] = {
    "text": SECRET,
    "word": SECRET[:12],
    "path": f"/home/{SECRET}/models",
    "list": [SECRET],
    "mapping": {"hf_token": SECRET, "download_dir": f"/{SECRET}", "quantization": SECRET, "a": {"b": [{"c": SECRET}]}},
    "json": json.dumps({"token": SECRET, "other": [SECRET]}),
}


def accepted() -> dict[tuple[str, str], DCGRPOConfig]:
    """The configurations that hold one planted value, by field and kind; those that are refused are left out."""
    base: dict[str, Any] = {"output_dir": "out", "bf16": False, "use_cpu": True, "report_to": "none"}
    colocated = {"use_vllm": True, "vllm_mode": "colocate", "constraint": "none"}
    found = {}
    for field in dataclasses.fields(DCGRPOConfig):
        for kind, value in PLANTED.items():
            if field.init and field.name not in NAMES and _takes(field, value):
                try:
                    found[field.name, kind] = DCGRPOConfig(**(base | colocated | {field.name: value}))
                except Exception:  # as many kinds as there are checks: it is not accepted
                    continue
    return found


def _takes(field: dataclasses.Field[Any], value: Any) -> bool:
    """Whether a field may hold a value like this. A short word under a name of `WORDS` is shown by the rule."""
    word = value == PLANTED["word"] and field.name in WORDS
    return not word and any(kind in str(field.type) for kind in ("str", type(value).__name__))


ACCEPTED = accepted()


def test_secrets_were_planted_where_they_occur() -> None:
    planted = {name for name, _ in ACCEPTED}
    expected = {"hub_token", "run_name", "vllm_engine_kwargs", "model_init_kwargs", "generation_kwargs", "optim_args"}
    expected |= {"vllm_server_base_url", "vllm_server_host", "vllm_structured_outputs_regex", "chat_template_kwargs"}
    assert expected <= planted and len(planted) > 40


@pytest.mark.parametrize(("name", "kind"), ACCEPTED)
def test_nothing_that_is_written_of_a_configuration_holds_it(name: str, kind: str, tmp_path: Path) -> None:
    args = ACCEPTED[name, kind]
    secret = SECRET[:12]
    written = {
        "log": settings_of(args),
        "calibration": shown_settings(args, SETTINGS),
        "engine": engine_name(vars(args)),
    }
    assert secret not in json.dumps(written, default=str)
    (tmp_path / "README.md").write_text("# Card\n")
    complete(tmp_path, args, None, 0.1, None, [])
    assert secret not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", ["hub_token", "vllm_engine_kwargs", "model_init_kwargs", "generation_kwargs"])
def test_the_whole_configuration_is_given_without_it(name: str) -> None:
    value: Any = SECRET if name == "hub_token" else {"hf_token": SECRET, "x": {"api_key": [SECRET]}, "seed": 3}
    colocated = {"use_vllm": True, "vllm_mode": "colocate", "constraint": "none"}
    args = DCGRPOConfig(output_dir="out", bf16=False, use_cpu=True, report_to="none", **colocated, **{name: value})
    kept = arguments_without_secrets(args)
    for text in (repr(args), str(args), args.to_json_string(), json.dumps(args.to_dict()), repr(vars(kept))):
        assert SECRET not in text
    assert str(args.to_sanitized_dict()).count(SECRET) == 0  # what TensorBoard gets
    assert getattr(args, name) == value and args.hub_token in (None, SECRET)  # which a run still has
    assert kept.learning_rate == args.learning_rate and kept.vllm_mode == "colocate"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"vllm_engine_kwargs": {"hf_token": SECRET}}, "vllm_engine_kwargs"),
        ({"vllm_engine_kwargs": f"hf_token={SECRET}"}, "vllm_engine_kwargs.*must be a dict"),
        ({"generation_kwargs": {"api_key": SECRET}, "rollout_backend": "transformers"}, "generation_kwargs"),
        ({"vllm_server_base_url": f"http://me:{SECRET}@host:8000"}, "vllm_server_base_url"),
        ({"vllm_server_host": f"me:{SECRET}@host"}, "vllm_server_host"),
    ],
)
def test_a_refusal_does_not_say_it(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field) as raised:
        DCGRPOConfig(output_dir="out", bf16=False, use_cpu=True, report_to="none", **settings)
    assert SECRET not in str(raised.value)


def test_a_directory_whose_name_is_no_text_gets_its_card(tmp_path: Path) -> None:
    folder = Path(str(tmp_path), "run\udcff\n<b>")  # as Python has a file name of other bytes than UTF-8
    (folder / "evaluation").mkdir(parents=True)
    trainer = dc_trainer(folder)
    trainer.create_model_card(model_name=folder.name)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "# Model Card for run⟨U+DCFF⟩↵&lt;b&gt;\n" in text


def test_a_state_is_compared_by_what_it_hides(tmp_path: Path) -> None:
    trainer = dc_trainer(tmp_path)
    found = []
    for regex in ("a+", "b+", "a+"):
        trainer.args.vllm_structured_outputs_regex = regex
        found.append(measured_with(trainer))
    assert found[0] == found[2] != found[1]
    assert "a+" not in json.dumps(found[0])


# A whole run, in a process of its own


def written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def strings_of(path: Path) -> bytes:
    """A file's bytes; a parquet file's columns as text."""
    return str(pq.read_table(path).to_pydict()).encode() if path.suffix == ".parquet" else path.read_bytes()


def test_a_run_writes_pushes_and_prints_none(tmp_path: Path) -> None:
    text = "private-" + "t" * 30  # under names that call nothing a secret; the saved arguments keep it
    with HubStandIn() as hub:
        done = run_python(RUN, tmp_path, SECRET, text, cwd=tmp_path, **hub.environment(tmp_path / "home", ""))
        commits = hub.repositories["tester/x"].commits
    pushed = {name: content for commit in commits for name, content in commit.files.items()}
    local = {path.relative_to(tmp_path).as_posix(): strings_of(path) for path in written(tmp_path / "run")}
    expected = {"README.md", "log.jsonl", "report.html", "training_args.bin", "tokens/tokens_00001.parquet"}
    expected |= {"checkpoint-2/training_args.bin", "checkpoint-2/dc_grpo_state.json", "deployed/config.json"}
    assert {f"run/{name}" for name in expected} <= set(local)
    assert {"README.md", "model.safetensors", "last-checkpoint/dc_grpo_state.json"} <= set(pushed)
    for secret in (SECRET, TOKEN, text):  # TOKEN is the run's hub_token, without which it could not push
        assert secret not in done.stdout and secret not in done.stderr
        assert not [name for name, content in pushed.items() if secret.encode() in content]
        found = {Path(name).name for name, content in local.items() if secret.encode() in content}
        assert found == ({"training_args.bin"} if secret == text else set())
    saved = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    assert saved.max_steps == 3 and saved.model_init_kwargs["token"] == "(not shown)" and saved.run_name == text
