# SPDX-License-Identifier: Apache-2.0
"""Where token logs lie and what their columns are. Apart from their writer, so that a reader needs no torch."""

import pyarrow as pa

FOLDER = "tokens"

SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("completion", pa.int32()),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("token", pa.dictionary(pa.int32(), pa.string())),
        ("train_logp", pa.float32()),
        ("sampling_logp", pa.float32()),
        ("discrepancy", pa.float32()),
        ("penalty", pa.float32()),
        ("advantage", pa.float32()),
        ("valid", pa.bool_()),
        ("rejected", pa.bool_()),
        ("prompt", pa.dictionary(pa.int32(), pa.string())),
        ("reward", pa.float32()),
        ("answer", pa.dictionary(pa.int32(), pa.string())),
        ("gold", pa.dictionary(pa.int32(), pa.string())),
    ]
)
"""A row is a completion token that the sampling engine scored (`dc_trl.discrepancy.is_scored`): step, completion (its
index in the batch) and position; log π and log μ; discrepancy by the run's metric; penalty as it was taken off;
advantage before it; whether the token counts in loss and discrepancy; whether a rule of `rejection` left it out of the
loss, null in a run without rules; the prompt as text; and of its completion the reward, NaN where there is none, the
answer that a reward function extracted and the gold answer, null where they are not known."""

OPTIONAL = ("rejected", "reward", "answer", "gold")
"""Columns that a file need not have, as older ones do not, and whose values may be null."""
