# SPDX-License-Identifier: Apache-2.0
"""The arguments of the commands that read recipes: a YAML file, flags over it, their checks, launch by Accelerate."""

import argparse
import difflib
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dc_trl.commands.usage import UsageError, model_directory

# In a wheel the configurations lie in the package, in a checkout beside it.
CONFIG_FOLDERS = (Path(__file__).parents[2] / "accelerate_configs", Path(__file__).parents[3] / "accelerate_configs")

# Options of a dry run, which training alone has.
_DRY_RUN = ("dry_run", "gpu_memory_gib")

# Set in every process that `accelerate launch` starts.
_LAUNCHED = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")


def _option(default: Any, help: str, **metadata: Any) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class TrainArguments:
    """What `dc-trl train` takes beside the fields of `DCGRPOConfig` and TRL's `ModelConfig`."""

    dataset_name: str | None = _option(
        None, "Training problems: a Hub dataset, or a local .jsonl, .json or .parquet file, or a directory of them."
    )
    dataset_config: str | None = _option(None, "Configuration of a Hub dataset.")
    dataset_train_split: str = _option("train", "Split to train on.")
    dataset_deduplicate: bool = _option(False, "Keep the first row of each problem; DAPO-Math-17k needs it.")
    eval_dataset_name: str | None = _option(None, "Problems to evaluate on, needed unless `eval_strategy` is 'no'.")
    dataset_test_split: str = _option("test", "Split of `eval_dataset_name`; a local file's only split is 'train'.")
    problem_column: str | None = _option(None, "Column of the problem; default: prompt, problem or question.")
    answer_column: str | None = _option(None, "Column of the answer; default: reward_model, answer or solution.")
    prompt_template: str | None = _option(
        None, "User message around a problem given as text, with {problem} in it; default: asks for a boxed answer."
    )
    prompt_format: str = _option(
        "auto",
        "`chat`: messages, by the model's chat template; `plain`: the text alone, for a base model; `auto`: chat "
        "where the tokenizer has a template, else plain.",
        choices=["auto", "chat", "plain"],
    )
    reward_funcs: list[str] = _option(["accuracy"], "`accuracy` (math-verify), or dotted paths of your own functions.")
    reward_timeout: float = _option(5.0, "Seconds for math-verify to judge one completion; more is reward 0.")
    reward_workers: int = _option(4, "math-verify processes of each rank.")
    accelerate_config: str | None = _option(
        None, "Launch with Accelerate: a name (single_gpu, fsdp2, …) or a path. Unknown flags then go to the launcher."
    )
    dry_run: bool = _option(False, "Load configuration, data and tokenizer, print the plan, train nothing.")
    gpu_memory_gib: float = _option(80.0, "Memory of one GPU for the dry run's estimate, GiB.")


def make_parser(arguments: type[TrainArguments] = TrainArguments, command: str = "train") -> Any:
    """The parser of a command that reads recipes: a `TrlParser` of `arguments`, `DCGRPOConfig` and `ModelConfig`."""
    from trl import ModelConfig, TrlParser

    from dc_trl.config import DCGRPOConfig

    types: Any = (arguments, DCGRPOConfig, ModelConfig)
    return TrlParser(types, prog=f"dc-trl {command}")


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether the arguments are a request for the short help, which is answered before torch or TRL load."""
    return any(item in ("-h", "--help") for item in argv)


def asks_for_all_help(argv: Sequence[str]) -> bool:
    """Whether the arguments are a request for the help on every option."""
    return "--help-all" in argv


def print_help(arguments: type[TrainArguments], command: str, description: str) -> None:
    """Prints the options of a command that are its own or those of `dc-trl train`, which know nothing of TRL.

    The fields of `DCGRPOConfig` and `ModelConfig`, some hundreds, need TRL to be listed: see `print_all_help`.
    """
    parser = argparse.ArgumentParser(
        prog=f"dc-trl {command}",
        usage=_usage(command),
        description=description,
        epilog="Every option of training is taken too, in the YAML file or here: dc-trl train --help names the usual "
        f"ones, and dc-trl {command} --help-all lists every one.",
    )
    parser.add_argument("--config", metavar="RECIPE.yaml", help="YAML file of options; those given here go over it.")
    inherited = {option.name for option in fields(TrainArguments)}
    shared = parser.add_argument_group("options of every command that reads recipes")
    for option in fields(arguments):
        if option.name in _DRY_RUN:
            continue
        group = shared if option.name in inherited else parser
        group.add_argument(f"--{option.name}", metavar="VALUE", help=option.metadata["help"].replace("%", "%%"))
    parser.print_help()


def print_all_help(arguments: type[TrainArguments], command: str) -> None:
    """Prints every option that a command which reads recipes takes, as its parser knows it. Loads TRL."""
    parser = make_parser(arguments, command)
    parser.usage = _usage(command)
    parser.description = "--config RECIPE.yaml is a YAML file of the options below; those given here go over it."
    parser.print_help()


def _usage(command: str) -> str:
    return f"dc-trl {command} --config RECIPE.yaml [--OPTION VALUE]…"


@dataclass(frozen=True)
class CommandLine:
    """The arguments of a command that reads recipes.

    Attributes:
        argv: as given, with `--config=PATH` in two parts.
        options: the same with the recipe's, as plain values; what needs a device or the network is not checked yet.
        launcher: those of them that only Accelerate's launcher may know.
    """

    argv: list[str]
    options: argparse.Namespace
    launcher: list[str]

    @classmethod
    def read(cls, argv: Sequence[str], parser: Any) -> "CommandLine":
        """Reads and checks them; raises `UsageError` before any model or data loads."""
        parts = [part for item in argv for part in (item.split("=", 1) if item.startswith("--config=") else [item])]
        rest = list(parts)
        if "--config" in rest:
            at = rest.index("--config")
            if at + 1 == len(rest):
                raise UsageError("--config needs the path of a YAML file.")
            _set_defaults(parser, rest[at + 1])
            del rest[at : at + 2]
        options, launcher = parser.parse_known_args(rest)
        if launcher and not options.accelerate_config:
            raise UsageError(f"unknown option {launcher[0]}{_suggestion(launcher[0].lstrip('-'), parser)}")
        _check(options)
        return cls(parts, options, launcher)

    @property
    def arguments(self) -> list[str]:
        """`argv` without the launcher's."""
        return _without(self.argv, self.launcher)

    @property
    def must_launch(self) -> bool:
        """Whether Accelerate is asked for and has not started this process."""
        return bool(self.options.accelerate_config) and not any(name in os.environ for name in _LAUNCHED)

    def launch(self, command: str) -> int:
        """Runs `accelerate launch --config_file … -m dc_trl COMMAND …`; its exit status, when it has ended.

        Its processes have said why they failed. The launcher's own error would print the whole command line, with
        whatever token stands in it.
        """
        from accelerate.commands.launch import launch_command, launch_command_parser
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        config = str(find_accelerate_config(self.options.accelerate_config))
        flags = ["--config_file", config, *self.launcher, "--module", "dc_trl", command, *self.arguments]
        try:
            launch_command(launch_command_parser().parse_args(flags))
        except subprocess.CalledProcessError as error:  # one process
            return error.returncode
        except ChildFailedError as error:  # several
            return error.get_first_failure()[1].exitcode
        return 0


def _set_defaults(parser: Any, path: str) -> None:
    import yaml

    if not Path(path).is_file():
        raise UsageError(f"the configuration {path} does not exist (looked from {Path.cwd()}). Check --config.")
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} must be a YAML mapping of options to values, but holds a {type(config).__name__}.")
    config.pop("env", None)  # TRL's key for environment variables; set when the arguments are parsed for good
    unknown = [key for key in config if key not in _names(parser)]
    if unknown:
        raise UsageError(f"{path} has the unknown option {unknown[0]}{_suggestion(unknown[0], parser)}")
    parser.set_defaults_with_config(**config)


def _names(parser: Any) -> list[str]:
    return [action.dest for action in parser._actions if action.dest != "help"]


def _suggestion(name: str, parser: Any) -> str:
    close = difflib.get_close_matches(name, _names(parser), n=1)
    return f". Did you mean {close[0]}?" if close else f". See {parser.prog} --help-all."


def _check(options: argparse.Namespace) -> None:
    if not options.model_name_or_path:
        raise UsageError("no model: set model_name_or_path in the YAML file or by --model_name_or_path.")
    if not options.dataset_name:
        raise UsageError("no data: set dataset_name in the YAML file or by --dataset_name.")
    if str(options.eval_strategy) not in ("no", "IntervalStrategy.NO") and not options.eval_dataset_name:
        raise UsageError("eval_strategy is on, but eval_dataset_name is not set: name it, or use eval_strategy: no.")
    model_directory(options.model_name_or_path)
    from dc_trl.tasks.data import DatasetError, local_path

    try:
        for name in filter(None, (options.dataset_name, options.eval_dataset_name)):
            local_path(name)
    except DatasetError as error:
        raise UsageError(str(error)) from error
    if options.accelerate_config:
        find_accelerate_config(options.accelerate_config)


def find_accelerate_config(name: str) -> Path:
    """The Accelerate configuration of this name, or at this path.

    Raises:
        UsageError: if there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    for folder in CONFIG_FOLDERS:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    names = sorted({path.stem for folder in CONFIG_FOLDERS for path in folder.glob("*.yaml")})
    raise UsageError(f"accelerate_config {name} is neither a file nor one of {', '.join(names)}.")


def _without(items: list[str], removed: list[str]) -> list[str]:
    """`items` less the subsequence `removed`."""
    left = iter([*removed, None])
    following = next(left)
    kept = []
    for item in items:
        if item == following:
            following = next(left)
        else:
            kept.append(item)
    return kept
