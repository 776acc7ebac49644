# SPDX-License-Identifier: Apache-2.0
"""`dc-trl train`: launch, dry run, data, training."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dc_trl.arguments import CommandLine, TrainArguments, find_accelerate_config, make_parser
from dc_trl.cli import UsageError
from dc_trl.data import BOXED_TEMPLATE, load_math_dataset
from dc_trl.dry_run import describe_run
from dc_trl.planning import BatchPlan, Launch, read_accelerate_config
from dc_trl.rewards import load_rewards


def train_command(argv: Sequence[str]) -> int:
    """`dc-trl train`: checks the arguments, then launches, plans or trains. Returns the exit status.

    Raises:
        UsageError: for unknown options, and for files that do not exist, before any model or data loads.
    """
    import torch

    line = CommandLine.read(argv, make_parser())
    if line.must_launch and not line.options.dry_run:
        line.launch("train")
        return 0
    arguments = line.arguments
    if line.options.dry_run and not torch.accelerator.is_available():
        arguments += ["--use_cpu", "true"]  # or transformers refuses bf16, which the plan is to say
    try:
        script, training, model = make_parser().parse_args_and_config(arguments)
        if script.dry_run:
            _print_plan(script, training, model, line)
            return 0
        rewards = load_rewards(script.reward_funcs, script.reward_timeout, script.reward_workers)
        with training.main_process_first(desc="loading the data"):
            data, eval_data = load_data(script, training.eval_strategy != "no")
    except (ValueError, ImportError, OSError) as error:  # wrong values, missing packages, files that do not load
        raise UsageError(str(error)) from error
    train(training, model, rewards, data, eval_data)
    return 0


def load_data(script: TrainArguments, evaluation: bool = False) -> tuple[Any, Any]:
    """The problems to train on, and those to evaluate on or None.

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
        )
        for name, config, split in wanted
    ]
    return loaded[0], loaded[1] if len(loaded) > 1 else None


def _print_plan(script: TrainArguments, training: Any, model: Any, line: CommandLine) -> None:
    if script.accelerate_config:
        asked = argparse.ArgumentParser()
        asked.add_argument("--num_processes", type=int)
        config = read_accelerate_config(find_accelerate_config(script.accelerate_config))
        launch = Launch.from_accelerate(config, asked.parse_known_args(line.launcher)[0].num_processes)
    else:
        launch = Launch.from_environment()
    if int(os.environ.get("RANK", "0")) == 0:
        plan = BatchPlan.from_args(training, launch.processes, line.options.generation_batch_size)
        dataset, _ = load_data(script)
        gpu_gib = 0.0 if line.options.use_cpu else script.gpu_memory_gib
        print(describe_run(training, model, dataset, plan, launch, gpu_gib))


def train(training: Any, model: Any, rewards: list[Any], data: Any, eval_data: Any = None) -> Any:
    """Trains, saves the model to `output_dir`, and returns the trainer. Arguments as for `build_trainer`.

    Raises:
        UsageError: the Hub refused the push; the model is on disk.
    """
    from huggingface_hub.errors import HfHubHTTPError

    from dc_trl.trainer import DCGRPOTrainer

    trainer = build_trainer(DCGRPOTrainer, training, model, rewards, data, eval_data)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.create_model_card(model_name=(training.hub_model_id or Path(training.output_dir).name).split("/")[-1])
    if not training.push_to_hub:
        trainer.save_model(training.output_dir)
        return trainer
    try:
        trainer.push_to_hub()  # saves first
    except HfHubHTTPError as error:
        raise UsageError(
            f"the push to the Hub failed: {error}\nThe model is in {training.output_dir}. With a token that may "
            f"write, send it by: hf upload {trainer.hub_model_id} {training.output_dir} --exclude 'checkpoint-*' "
            "--exclude '_*'"
        ) from error
    return trainer


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
