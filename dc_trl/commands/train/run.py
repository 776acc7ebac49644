# SPDX-License-Identifier: Apache-2.0
"""What a recipe stands for: its problems, its trainer, and the training."""

import glob
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from dc_trl.commands.train.arguments import TrainArguments
from dc_trl.commands.usage import UsageError
from dc_trl.records.text import terminal
from dc_trl.tasks.data import BOXED_TEMPLATE, load_math_dataset
from dc_trl.tasks.prompts import resolve_prompt_format


def has_plain_prompts(script: TrainArguments, training: Any, model: Any) -> bool:
    """Whether prompts are plain text, by the recipe and the model's tokenizer, which is all that loads for it.

    Where nobody asked for it, the main process says so.

    Raises:
        PromptFormatError: the recipe asks for what the tokenizer cannot do.
        OSError: there is no tokenizer of this name.
    """
    from transformers import AutoTokenizer

    name = str(model.model_name_or_path)
    options = {"revision": model.model_revision, "trust_remote_code": training.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    plain = resolve_prompt_format(script.prompt_format, tokenizer, name) == "plain"
    if plain and script.prompt_format == "auto" and int(os.environ.get("RANK", "0")) == 0:
        notice = f"the tokenizer of {name} has no chat template, so prompts are plain text (prompt_format: auto)."
        print(f"dc-trl: {terminal(notice)}", file=sys.stderr, flush=True)
    return plain


def load_data(script: TrainArguments, plain: bool, evaluation: bool = False) -> tuple[Any, Any]:
    """The problems to train on, and those to evaluate on or None.

    Args:
        script: which.
        plain: see `has_plain_prompts`.
        evaluation: whether to load those to evaluate on.

    Raises:
        DatasetError: for data that cannot be loaded or used.
    """
    wanted = [(script.dataset_name, script.dataset_config, script.dataset_train_split)]
    if evaluation:
        wanted.append((script.eval_dataset_name, None, script.dataset_test_split))
    loaded = [
        load_math_dataset(
            str(name),
            config=config,
            split=split,
            problem_column=script.problem_column,
            answer_column=script.answer_column,
            prompt_template=script.prompt_template or BOXED_TEMPLATE,
            deduplicate=script.dataset_deduplicate,
            plain=plain,
        )
        for name, config, split in wanted
    ]
    return loaded[0], loaded[1] if len(loaded) > 1 else None


def train(training: Any, model: Any, rewards: list[Any], data: Any, eval_data: Any = None) -> Any:
    """Trains, saves the model to `output_dir`, and returns the trainer. Arguments as for `build_trainer`.

    Raises:
        UsageError: the Hub refused the push; the model is on disk.
    """
    from huggingface_hub.errors import HfHubHTTPError

    from dc_trl.trainer import DCGRPOTrainer

    trainer = build_trainer(DCGRPOTrainer, training, model, rewards, data, eval_data)
    trainer.train(resume_from_checkpoint=_asked_checkpoint(training.resume_from_checkpoint))
    trainer.create_model_card(model_name=(training.hub_model_id or Path(training.output_dir).name).split("/")[-1])
    if not training.push_to_hub:
        trainer.save_model(training.output_dir)
        return trainer
    try:
        trainer.push_to_hub()  # saves first
    except HfHubHTTPError as error:
        raise UsageError(
            f"the push to the Hub failed: {error}\nThe model is in {training.output_dir}. With a token that may "
            f"write, send it by: {_upload_command(trainer)}"
        ) from error
    return trainer


def _asked_checkpoint(value: str | bool | None) -> str | bool | None:
    """A checkpoint's path as it is; what a command line or a recipe says for yes and no, as such."""
    return {"true": True, "false": None}.get(str(value).lower(), value)


def _upload_command(trainer: Any) -> str:
    """What sends the files that a push sends, and no others."""
    from dc_trl.training.pushing_trainer import files_to_send

    folder = Path(str(trainer.args.output_dir))
    parts = ["hf", "upload", str(trainer.hub_model_id), str(folder), "."]
    for name in files_to_send(folder, trainer.processing_class):
        parts += ["--include", glob.escape(name)]
    return shlex.join(parts)


def build_trainer(kind: Any, training: Any, model: Any, rewards: list[Any], data: Any, eval_data: Any = None) -> Any:
    """A trainer, with the model that the options describe.

    Args:
        kind: `DCGRPOTrainer` or a subclass.
        training: a `DCGRPOConfig`.
        model: TRL's `ModelConfig`.
        rewards: reward functions.
        data, eval_data: problems to train and to evaluate on, as `load_math_dataset` returns them.
    """
    from trl import get_peft_config, get_quantization_config

    training.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    return kind(
        model.model_name_or_path,
        rewards,
        training,
        train_dataset=data,
        eval_dataset=eval_data,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
