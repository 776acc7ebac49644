# SPDX-License-Identifier: Apache-2.0
"""`dc-trl train`: arguments, their checks, and which of launch, dry run and training is asked for."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from dc_trl.commands.quiet import whole_lines
from dc_trl.commands.train.arguments import (
    CommandLine,
    TrainArguments,
    asks_for_all_help,
    asks_for_help,
    find_accelerate_config,
    make_parser,
    print_all_help,
)
from dc_trl.commands.train.help import short_help
from dc_trl.commands.usage import UsageError


def train_command(argv: Sequence[str]) -> int:
    """`dc-trl train`: checks the arguments, then launches, plans or trains. Returns the exit status.

    Raises:
        UsageError: for unknown options, and for files that do not exist, before any model or data loads; during
            training, for data without usable gold answers, and where there is no checkpoint to resume from.
    """
    if asks_for_help(argv):
        print(short_help())
        return 0
    if asks_for_all_help(argv):
        print_all_help(TrainArguments, "train")
        return 0
    line = CommandLine.read(argv, make_parser())
    if line.must_launch and not line.options.dry_run:
        return line.launch("train")
    import torch

    from dc_trl.commands.train import run
    from dc_trl.tasks.rewards import GoldAnswerError, load_rewards
    from dc_trl.training.resuming import CheckpointError

    arguments = line.arguments
    if line.options.dry_run and not torch.accelerator.is_available():
        arguments += ["--use_cpu", "true"]  # or transformers refuses bf16, which the plan is to say
    try:
        script, training, model = make_parser().parse_args_and_config(arguments)
        if script.dry_run:
            _print_plan(script, training, model, line)
            return 0
        plain = run.has_plain_prompts(script, training, model)
        rewards = load_rewards(script.reward_funcs, script.reward_timeout, script.reward_workers)
        with training.main_process_first(desc="loading the data"):
            data, eval_data = run.load_data(script, plain, training.eval_strategy != "no")
    except (ValueError, ImportError, OSError) as error:  # wrong values, missing packages, files that do not load
        raise UsageError(str(error)) from error
    try:
        with whole_lines():
            run.train(training, model, rewards, data, eval_data)
    except (GoldAnswerError, CheckpointError) as error:
        raise UsageError(str(error)) from error
    return 0


def _print_plan(script: TrainArguments, training: Any, model: Any, line: CommandLine) -> None:
    from dc_trl.commands.train.dry_run import describe_run
    from dc_trl.commands.train.plan import BatchPlan, Launch, read_accelerate_config
    from dc_trl.commands.train.run import has_plain_prompts, load_data

    if script.accelerate_config:
        asked = argparse.ArgumentParser()
        asked.add_argument("--num_processes", type=int)
        config = read_accelerate_config(find_accelerate_config(script.accelerate_config))
        launch = Launch.from_accelerate(config, asked.parse_known_args(line.launcher)[0].num_processes)
    else:
        launch = Launch.from_environment()
    if int(os.environ.get("RANK", "0")) == 0:
        plan = BatchPlan.from_args(training, launch.processes, line.options.generation_batch_size)
        dataset, _ = load_data(script, has_plain_prompts(script, training, model))
        gpu_gib = 0.0 if line.options.use_cpu else script.gpu_memory_gib
        print(describe_run(training, model, dataset, plan, launch, gpu_gib))
