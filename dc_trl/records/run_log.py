# SPDX-License-Identifier: Apache-2.0
"""The log of a run as it goes on, `log.jsonl` in the output directory: its writer. `run_reader` has its reader.

transformers writes its log history with a checkpoint only, so a run between two checkpoints could not be looked at.
Here each entry is one line, written when it is logged. A start of training is a line too, with the settings, so that
the reader knows which entries a resumed run repeats.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from inspect import get_annotations
from itertools import count
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from dc_trl.records.json_lines import append_lines, mend_end
from dc_trl.records.run_reader import LOG_FILE
from dc_trl.records.text import terminal
from dc_trl.records.token_schema import FOLDER as TOKENS
from dc_trl.records.whole_files import write_whole
from dc_trl.rollouts.shown import shown

logger = logging.get_logger(__name__)

SKIPPED_FILE = "skipped.jsonl"
"""The optimizer steps that the gradient guard left out."""

# What a person needs to tell two runs apart, of TRL's and transformers' fields. This package's own come on top.
_INHERITED_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "loss_type",
    "beta",
    "max_completion_length",
    "num_generations",
    "num_iterations",
    "generation_batch_size",
    "temperature",
    "use_vllm",
    "vllm_mode",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_clip_max",
    "bf16",
    "fp16",
    "seed",
)


def settings_of(args: Any) -> dict[str, Any]:
    """The settings of a run by name: every field that a configuration of this package adds, and those listed above.

    As they may be shown, see `dc_trl.rollouts.shown`. Fields that say their choices hold one of them.
    """
    own = [
        name for kind in type(args).__mro__ if kind.__module__.startswith("dc_trl.") for name in get_annotations(kind)
    ]
    return shown_settings(args, dict.fromkeys([*own, *_INHERITED_SETTINGS]))


def shown_settings(args: Any, names: Iterable[str]) -> dict[str, Any]:
    """Fields of a configuration by name, as they may be shown; those that it does not have are left out."""
    options = getattr(args, "__dataclass_fields__", {})
    found = {}
    for name in names:
        if hasattr(args, name):
            value = getattr(args, name)
            closed = name in options and value in options[name].metadata.get("choices", ())
            found[name] = value if closed else shown(name, value)
    return found


class RunLogCallback(TrainerCallback):
    """Appends every log entry to `output_dir/log.jsonl`, from the main process, with any transformers trainer.

    A run that starts from step 0 has the log to itself: what an earlier run left in the directory, `log.jsonl`, and
    `tokens` and `skipped.jsonl` beside it, is set aside under the first free names, such as `log-1.jsonl`. A resumed
    run goes on with them. What this trainer evaluated before it starts to train belongs to its run.

    Args:
        facts: of the run, beyond its settings, for the line of each start; values of JSON's types.
    """

    def __init__(self, facts: Mapping[str, Any] | None = None) -> None:
        self._facts = dict(facts or {})
        self._started = False
        self._own_from: int | None = None  # bytes of the log that were there before this trainer's first line

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the start: its step (above 0 after a resume), time, model and settings."""
        settings = settings_of(args)
        model = getattr(getattr(kwargs.get("model"), "config", None), "_name_or_path", "")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        start = {"step": state.global_step, "time": now, "max_steps": state.max_steps, "model": model}
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir))
            if state.global_step == 0:
                _set_aside(folder, self._own_from)
            mend_end(folder / LOG_FILE)
        # From now on all that is logged is of this run; a second run of this trainer sets it aside like any other.
        self._started, self._own_from = True, None
        self._append(args, state, {"start": start | self._facts | {"settings": settings}})

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the entry that was just added to the log history."""
        self._append(args, state, state.log_history[-1])

    def _append(self, args: TrainingArguments, state: TrainerState, line: dict[str, Any]) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(str(args.output_dir), LOG_FILE)
        if not self._started and self._own_from is None:
            mend_end(path)
            self._own_from = path.stat().st_size if path.is_file() else 0
        append_lines(path, [line])


def _set_aside(folder: Path, own_from: int | None) -> None:
    """Gives what an earlier run left in the folder names of its own.

    Args:
        folder: the output directory.
        own_from: bytes of the log that are the earlier run's; None: all of them.
    """
    log, tokens, skipped = (folder / name for name in (LOG_FILE, TOKENS, SKIPPED_FILE))
    content = log.read_bytes() if log.is_file() else b""
    earlier, own = (content, b"") if own_from is None else (content[:own_from], content[own_from:])
    moved = []
    number = next(n for n in count(1) if not any(path.exists() for path in _numbered(folder, n)))
    log_aside, tokens_aside, skipped_aside = _numbered(folder, number)
    if earlier:
        write_whole(log_aside, earlier)
        write_whole(log, own)
        moved.append(log_aside.name)
    if any(tokens.glob("*.parquet")):
        tokens.rename(tokens_aside)
        moved.append(tokens_aside.name)
    if skipped.is_file():
        skipped.rename(skipped_aside)
        moved.append(skipped_aside.name)
    if moved:
        logger.warning("%s holds the log of an earlier run, which is now %s.", terminal(folder), " and ".join(moved))


def _numbered(folder: Path, number: int) -> tuple[Path, Path, Path]:
    """The names of a log, of token logs and of skipped steps that were set aside."""
    log, tokens, skipped = (Path(name) for name in (LOG_FILE, TOKENS, SKIPPED_FILE))
    names = (f"{path.stem}-{number}{path.suffix}" for path in (log, tokens, skipped))
    first, second, third = (folder / name for name in names)
    return first, second, third
