# SPDX-License-Identifier: Apache-2.0
"""The run of tests/trainer/test_secrets.py: `secrets_run.py FOLDER SECRET TEXT`, as a client of the Hub stand-in."""

import sys
from pathlib import Path
from typing import Any

from hub_stand_in import TOKEN
from runs import PROMPTS, dc_trainer
from tiny import save_tiny_policy

from dc_trl.commands.cli import main


def trainer_with(folder: Path, secret: str, text: str) -> Any:
    """A trainer whose configuration holds the secret under names of secrets, and the text under others."""
    return dc_trainer(
        folder / "run",
        model=str(folder / "policy"),
        model_init_kwargs={"token": secret, "dtype": "float32"},
        chat_template_kwargs={"api_key": secret, "note": text},
        hub_token=TOKEN,
        run_name=text,
        project=text,
        vllm_server_host=text,
        constraint="none",
        push_to_hub=True,
        hub_model_id="tester/x",
        hub_strategy="checkpoint",
        hub_always_push=True,
        save_strategy="steps",
        save_steps=2,
        log_tokens=True,
        eval_dataset=PROMPTS.select(range(4)),
        disable_tqdm=False,
    )


def run(folder: Path, secret: str, text: str) -> None:
    """Trains, evaluates, pushes, resumes, and has every command write that reads a run."""
    save_tiny_policy(folder / "policy", dtype="float32")
    trainer = trainer_with(folder, secret, text)
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()
    trainer_with(folder, secret, text).train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    assert main(["report", str(folder / "run")]) == 0
    assert main(["export", str(folder / "run"), "--output_dir", str(folder / "run" / "deployed")]) == 0


if __name__ == "__main__":
    run(Path(sys.argv[1]), *sys.argv[2:])
