# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a run goes on from: the newest that was written to its end.

A process may be killed while it saves. transformers takes the checkpoint of the highest number all the same, and stops
at a file that is missing, or goes on without it. It writes `trainer_state.json` last, so that file is the seal:
removed before a checkpoint of that name is written again, and asked for, whole, before one is taken.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dc_trl.records.json_lines import parse_json
from dc_trl.records.run_reader import STATE_FILE

ENTROPY_FILE = "entropy_ctrl_state.json"
"""TRL's, with `use_adaptive_entropy`; written after everything else."""


class CheckpointError(ValueError):
    """There is no checkpoint to resume from, or the one that was named is half-written."""


class Choice(NamedTuple):
    """The checkpoint to resume from, and the newer ones that were passed over, each with what is wrong with it."""

    taken: Path
    passed_over: dict[Path, str]


def seals(adaptive_entropy: bool) -> tuple[str, ...]:
    """The files of a checkpoint that are written last."""
    return (STATE_FILE, ENTROPY_FILE) if adaptive_entropy else (STATE_FILE,)


def break_seals(checkpoint: Path) -> None:
    """Makes a checkpoint count as half-written, which it is while it is written again."""
    for name in seals(adaptive_entropy=True):
        (checkpoint / name).unlink(missing_ok=True)


def fault(checkpoint: Path, names: Iterable[str]) -> str | None:
    """What shows that a checkpoint was not written to its end; None if it was.

    Args:
        checkpoint: the directory.
        names: of `seals`.
    """
    for name in names:
        path = checkpoint / name
        if not path.is_file():
            return f"it has no {name}"
        try:
            parse_json(path.read_bytes())
        except ValueError:
            return f"its {name} is cut off"
    return None


def newest(folder: Path, names: Iterable[str]) -> Choice:
    """The newest checkpoint in an output directory that was written to its end.

    Raises:
        CheckpointError: there is none.
    """
    names = tuple(names)
    passed_over: dict[Path, str] = {}
    for checkpoint in _checkpoints(folder):
        wrong = fault(checkpoint, names)
        if wrong is None:
            return Choice(checkpoint, passed_over)
        passed_over[checkpoint] = wrong
    half = "".join(f" {path.name} was not written to its end: {wrong}." for path, wrong in passed_over.items())
    raise CheckpointError(
        f"{folder} holds no checkpoint to resume from.{half} Train without `resume_from_checkpoint`, or set "
        "`output_dir` to that of the run."
    )


def check_written_to_the_end(checkpoint: Path, names: Iterable[str]) -> None:
    """Raises CheckpointError for a checkpoint that was named and is half-written, with the one to take instead."""
    names = tuple(names)
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"`resume_from_checkpoint` is {str(checkpoint)!r}, which is no directory (looked from {Path.cwd()})."
        )
    wrong = fault(checkpoint, names)
    if wrong is None:
        return
    whole = [other for other in _checkpoints(checkpoint.resolve().parent) if fault(other, names) is None]
    instead = f"Resume from {whole[0].name} beside it" if whole else "No checkpoint beside it is whole: train anew"
    raise CheckpointError(
        f"{checkpoint} cannot be resumed from, as it was not written to its end: {wrong}. {instead}."
    )


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name, re.ASCII), path) for path in folder.glob("checkpoint-*"))
    numbered = [(int(match[1]), path) for match, path in found if match and path.is_dir()]
    return [path for _, path in sorted(numbered, reverse=True)]
