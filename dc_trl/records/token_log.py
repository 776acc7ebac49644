# SPDX-License-Identifier: Apache-2.0
"""The tokens of a generation batch, one row each, as a parquet file: which tokens do the two engines disagree on?

Shapes: B sequences, P prompt tokens, T completion tokens.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from dc_trl.discrepancy import is_scored
from dc_trl.records.token_schema import FOLDER, OPTIONAL, SCHEMA
from dc_trl.step import Step

Decode = Callable[[list[int]], str]


class TokenLog:
    """Collects the micro-batches of an iteration, and writes the last complete iteration when asked.

    Args:
        folder: the run's output directory; files go to `folder/tokens/`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER
        self._collected: list[dict[str, Any]] = []
        self._complete: list[dict[str, Any]] = []

    def add(self, inputs: dict[str, Tensor], step: Step, texts: dict[str, list[str | None]] | None = None) -> None:
        """Takes in one micro-batch.

        Args:
            inputs: TRL's batch, for `prompt_ids`, `prompt_mask` (B, P), `completion_ids` and `completion_mask` (B, T),
                and `reward` (B,) where it is there.
            step: the record of the same micro-batch.
            texts: `answer` and `gold` of the B completions, where they are known.
        """
        batch: dict[str, Any] = {
            "prompt_ids": inputs["prompt_ids"],
            "prompt_mask": inputs["prompt_mask"],
            # A dropped group is out of the completion mask, and measured all the same.
            "shown": inputs["completion_mask"].bool() | step.masks.scored,
            "token_id": inputs["completion_ids"],
            "train_logp": step.train_logps,
            "sampling_logp": step.sampling_logps,
            "discrepancy": step.discrepancy,
            "penalty": step.penalty,
            "advantage": step.advantages,
            "valid": step.masks.scored,
        }
        if step.rejected_tokens is not None:
            batch["rejected"] = step.rejected_tokens
        if "reward" in inputs:
            batch["reward"] = inputs["reward"].unsqueeze(1)
        batch |= texts or {}
        self._collected.append(batch)

    def end_iteration(self) -> None:
        """What was collected becomes the iteration that `write` writes."""
        self._complete, self._collected = self._collected, []

    def discard(self) -> None:
        """Forgets an iteration that has not ended, of a training that was cut off, and one that was not written."""
        self._collected, self._complete = [], []

    def write(self, step: int, gather: Callable[[list[Any]], list[Any]], decode: Decode | None) -> None:
        """Writes `tokens/tokens_{step:05d}.parquet` in one piece, unless nothing was collected. A collective.

        Args:
            step: optimizer steps done.
            gather: concatenates one list a rank, in the order of the ranks.
            decode: text of a list of token ids, special tokens included; None on the ranks that do not write.

        Raises:
            OSError: the file cannot be written.
        """
        batches, self._complete = self._complete, []
        sequences = gather([sequence for batch in batches for sequence in _sequences(batch)])
        if decode is None or not sequences:
            return
        path = self.folder / f"tokens_{step:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.tmp")
        pq.write_table(_table(step, sequences, decode), partial)
        os.replace(partial, path)


def _table(step: int, sequences: list[dict[str, Any]], decode: Decode) -> pa.Table:
    lengths = [len(sequence["position"]) for sequence in sequences]
    joined = [name for name in sequences[0] if name not in ("prompt", *_COMPLETION_TEXTS)]
    columns: dict[str, Any] = {name: np.concatenate([sequence[name] for sequence in sequences]) for name in joined}
    ids, token_index = np.unique(columns["token_id"], return_inverse=True)
    prompts = [decode(sequence["prompt"].tolist()) for sequence in sequences]
    columns["step"] = np.full(sum(lengths), step)
    columns["completion"] = np.repeat(np.arange(len(sequences)), lengths)
    columns["token"] = _dictionary(token_index, [decode([token]) for token in ids.tolist()])
    columns["prompt"] = _dictionary(columns["completion"], prompts)
    for name in _COMPLETION_TEXTS:
        columns[name] = _dictionary(columns["completion"], [sequence.get(name) for sequence in sequences])
    for name in OPTIONAL:
        columns.setdefault(name, pa.nulls(sum(lengths)))
    arrays = [pa.array(columns[field.name]).cast(field.type) for field in SCHEMA]
    return pa.table(arrays, schema=SCHEMA)


# What a micro-batch itself gives; the rest is known once the sequences of all ranks are together.
_TOKEN_COLUMNS = (
    "token_id",
    "train_logp",
    "sampling_logp",
    "discrepancy",
    "penalty",
    "advantage",
    "valid",
    "rejected",
    "reward",
)
_COMPLETION_TEXTS = ("answer", "gold")


def _sequences(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The sequences of a micro-batch, each as columns of its scored tokens and the ids of its prompt."""
    names = [name for name in _TOKEN_COLUMNS if name in batch]
    columns = {name: _column(batch[name].expand_as(batch["token_id"])) for name in names}
    scored = (batch["shown"] & is_scored(batch["sampling_logp"])).cpu().numpy()
    prompts = _column(batch["prompt_ids"])
    prompt_masks = batch["prompt_mask"].bool().cpu().numpy()
    found = []
    for row, keep in enumerate(scored):
        sequence = {name: column[row][keep] for name, column in columns.items()}
        sequence |= {"position": np.flatnonzero(keep), "prompt": prompts[row][prompt_masks[row]]}
        sequence |= {name: batch[name][row] for name in _COMPLETION_TEXTS if name in batch}
        found.append(sequence)
    return found


def _column(tensor: Tensor) -> np.ndarray:
    # NumPy has no bfloat16.
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()


def _dictionary(indices: np.ndarray, values: Sequence[str | None]) -> pa.Array:
    """Texts by their index; null where the text is None. Parquet takes nulls of indices, not of texts."""
    known = np.array([value is not None for value in values], dtype=bool)
    places = pa.array(indices, pa.int32(), mask=~known[indices])
    return pa.DictionaryArray.from_arrays(places, pa.array([value or "" for value in values], pa.string()))
