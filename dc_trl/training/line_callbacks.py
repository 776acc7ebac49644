# SPDX-License-Identifier: Apache-2.0
"""One line a log entry, in place of the dict that transformers prints: how the run stands. `log.jsonl` keeps all.

step 12/150: reward 0.531, length 9.1, discrepancy 0.0041 of 0.0052, λ 0.104, 3.2 s
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

EVALUATION = "eval_"


def standing(logs: Mapping[str, Any], prefix: str = "") -> str:
    """Reward, completion length in tokens, discrepancy of its tolerance, λ, seconds: what of it an entry has.

    Args:
        logs: an entry as it is logged.
        prefix: of its keys; `EVALUATION` of an evaluation.

    Returns:
        Parts with commas, such as `reward 0.531, λ 0.104, 3.2 s`; "" of an entry that has none of them.
    """
    found = {key.removeprefix(prefix): value for key, value in logs.items() if key.startswith(prefix)}
    tolerance = found.get("dc/tolerance")
    limit = "" if tolerance is None else f" of {_small(tolerance)}"
    seconds = found.get("runtime" if prefix else "step_time")
    parts = (
        ("reward", lambda value: f"reward {value:.3f}"),
        ("completions/mean_length", lambda value: f"length {value:.1f}"),
        ("dc/discrepancy/mean", lambda value: f"discrepancy {_small(value)}{limit}"),
        ("dc/multiplier", lambda value: f"λ {value:.3f}"),
    )
    shown = [write(found[key]) for key, write in parts if found.get(key) is not None]
    return ", ".join([*shown, *([] if seconds is None else [_seconds(seconds)])])


def line_of(logs: Mapping[str, Any], state: TrainerState) -> str | None:
    """The line of a log entry of training, of an evaluation, or of the end; None of any other entry."""
    step = f"step {state.global_step}" + (f"/{state.max_steps}" if state.max_steps > 0 else "")
    if "train_runtime" in logs:
        return f"{step}: the end, after {_seconds(logs['train_runtime'])}"
    if "loss" in logs:
        return f"{step}: {standing(logs)}"
    if any(key.startswith(EVALUATION) for key in logs):
        return f"{step}, evaluation: {standing(logs, EVALUATION)}"
    return None


def in_lines(callbacks: Sequence[TrainerCallback]) -> list[TrainerCallback]:
    """The callbacks with those of transformers that show the log in a terminal printing lines; others stay as they
    are, a notebook's among them."""
    kinds: dict[type, type[TrainerCallback]] = {
        PrinterCallback: LinePrinterCallback,
        ProgressCallback: LineProgressCallback,
    }
    return [kinds[type(callback)]() if type(callback) in kinds else callback for callback in callbacks]


class _Lines:
    """Mixed into a callback of transformers that prints log entries: prints lines, and leaves other entries to it."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Prints the line of the entry from the main process, above any progress bar."""
        line = line_of(logs or {}, state)
        if line is None:
            super().on_log(args, state, control, logs=logs, **kwargs)  # type: ignore[misc]
        elif state.is_world_process_zero:
            tqdm.write(_encodable(line))
            sys.stdout.flush()  # a file is to grow by whole lines


class LinePrinterCallback(_Lines, PrinterCallback):
    """Lines where progress bars are off."""


class LineProgressCallback(_Lines, ProgressCallback):
    """Lines above the progress bar."""


def _small(value: float) -> str:
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def _encodable(text: str) -> str:
    """The text with what standard output cannot encode, λ in an old terminal, as a question mark."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
