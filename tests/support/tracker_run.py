# SPDX-License-Identifier: Apache-2.0
"""A short run reported to a tracker, in a process of its own: `tracker_run.py TRACKER FOLDER`."""

import json
import sys
from pathlib import Path

from runs import PROMPTS, dc_trainer


def train(tracker: str, folder: Path) -> None:
    """Three steps and an evaluation, reported to a tracker; leaves the log history in `folder`."""
    trainer = dc_trainer(
        folder / "run",
        report_to=[tracker],
        run_name="tiny",
        log_completions=True,
        eval_dataset=PROMPTS.select(range(8)),
        eval_strategy="steps",
        eval_steps=3,
        discrepancy_tolerance=0.01,
        length_decay=True,
        length_decay_period=2,
    )
    trainer.train()
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    tracker, place = sys.argv[1], Path(sys.argv[2])
    train(tracker, place)
    if tracker == "trackio":
        from trackio.sqlite_storage import SQLiteStorage

        rows = SQLiteStorage.get_logs("huggingface", "tiny")
        (place / "rows.json").write_text(json.dumps(rows, default=str))
