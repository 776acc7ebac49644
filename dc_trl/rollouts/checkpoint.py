# SPDX-License-Identifier: Apache-2.0
"""The policy on disk, as safetensors that another process may read at any moment.

A checkpoint is a directory of shards. It is filled under a temporary name and then renamed, which a file system does
in one step: a reader finds all of it or none. Safetensors hold numbers only; nothing here is ever pickled.
"""

import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

SHARD_BYTES = 4 * 2**30
"""Tensors are collected in CPU memory up to this size before they are written."""

SYNC_FOLDER = "_weight_sync"
"""Where a trainer's checkpoints go in its output directory. transformers pushes nothing that starts with `_`."""

READERS = {"owner": 0o600, "group": 0o640, "all": 0o644}
"""Who may read the files of a checkpoint, and their mode. A directory of them may be entered by the same."""

_NAME = re.compile(r"policy-(\d{8})")
_BLOCK = re.compile(r".*?\.\d+\.")


def next_checkpoint(root: Path) -> Path:
    """The path for the next checkpoint under `root`, which counts on from those there, a previous run's included."""
    numbers = [int(match[1]) for path in root.glob("policy-*") if (match := _NAME.fullmatch(path.name))]
    return root / f"policy-{max(numbers, default=0) + 1:08d}"


def write_checkpoint(
    directory: Path,
    model: PreTrainedModel,
    weights: Iterable[tuple[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
    readers: str = "owner",
) -> None:
    """Write `weights` as `directory/model-*.safetensors`, all at once as far as readers can tell.

    Names and shapes are those of `save_pretrained`: where transformers fuses tensors in memory (the experts of a
    mixture), they are written apart, as the model's published checkpoints and vLLM have them. Dtypes stay.

    Args:
        directory: where to; must not exist.
        model: the plain model, which knows how its checkpoints differ from its memory.
        weights: from `iter_policy_weights`, consumed whole.
        shard_bytes: size from which a file is closed and the next one begun.
        readers: one of `READERS`, whatever the process's umask is. The directory above is theirs too if it is made
            here; one that is there stays as it is.

    Raises:
        OSError: the directory exists, or cannot be written. At most a hidden `.tmp` directory is left behind, which
            the next call of `remove_old_checkpoints` clears.
    """
    partial = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    if not directory.parent.exists():
        directory.parent.mkdir(parents=True)
        _open_to(directory.parent, readers)
    partial.mkdir()
    for number, shard in enumerate(_shards(_blocks(model, weights), shard_bytes), start=1):
        path = partial / f"model-{number:05d}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(READERS[readers])
    _open_to(partial, readers)
    os.rename(partial, directory)


def _open_to(directory: Path, readers: str) -> None:
    """Lets those who may read its files enter a directory. Its group stays inherited where it is (setgid)."""
    mode = READERS[readers]
    directory.chmod((directory.stat().st_mode & stat.S_ISGID) | 0o700 | mode | (mode & 0o044) >> 2)


def remove_old_checkpoints(root: Path, keep: int = 2) -> None:
    """Delete all but the `keep` newest checkpoints under `root`, and what interrupted writes left there."""
    complete = sorted(path for path in root.glob("policy-*") if _NAME.fullmatch(path.name))
    for path in [*complete[: len(complete) - keep], *root.glob(".policy-*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


def remove_checkpoints(root: Path) -> None:
    """Delete all checkpoints under `root`, and `root` itself unless it holds anything else."""
    remove_old_checkpoints(root, keep=0)
    with suppress(OSError):
        root.rmdir()


def lock_beside(root: Path) -> FileLock:
    """The lock of a directory of checkpoints, which one process at a time may write and clear. Not acquired.

    The file lies beside the directory, not in it, since the directory goes and comes. The operating system gives the
    lock back when its process dies, however it dies.
    """
    return FileLock(root.with_name(f"{root.name}.lock"), timeout=0, thread_local=False)


@contextmanager
def holding(lock: FileLock, root: Path) -> Iterator[None]:
    """Holds the lock of `root`; one that is held already is held on.

    Raises:
        RuntimeError: another trainer holds it.
        OSError: the lock's file cannot be written.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise RuntimeError(
            f"Another trainer is writing its weights to {root}, and each would delete the other's. Give this one an "
            "`output_dir` of its own, or wait for the end of the other, or stop it."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _blocks(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of one numbered layer at a time, copied to the CPU, under the names that checkpoints use.

    A layer is the unit because some conversions need several of its tensors at once, and none spans two.
    """
    for _, block in groupby(weights, key=lambda item: match[0] if (match := _BLOCK.match(item[0])) else ""):
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in block}
        yield revert_weight_conversion(model, copies)


def _shards(blocks: Iterable[dict[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Regroup blocks into files of at least `shard_bytes`, the last one excepted."""
    shard: dict[str, Tensor] = {}
    size = 0
    for block in blocks:
        for name, tensor in block.items():
            # Pieces of one tensor share its storage, which safetensors refuses; a clone of a piece owns its own.
            whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
            shard[name] = tensor.contiguous() if whole else tensor.contiguous().clone()
            size += shard[name].nbytes
            if size >= shard_bytes:
                yield shard
                shard, size = {}, 0
    if shard:
        yield shard
