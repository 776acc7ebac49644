# SPDX-License-Identifier: Apache-2.0
"""Run directories written by hand, a hostile one among them, and the report's page taken apart."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hostile_text import HOSTILE

from dc_trl.commands.report.run import build_report
from dc_trl.records.token_log import SCHEMA


def write_log(folder: Path, entries: list[dict[str, Any]], **start: Any) -> Path:
    """A run directory whose log holds a start and these entries."""
    folder.mkdir(parents=True, exist_ok=True)
    first = {"step": 0, "time": "2026-11-21T10:00:00+00:00", "max_steps": 100, "model": "m", "settings": {}} | start
    lines = [json.dumps(line) for line in ({"start": first}, *entries)]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_tokens(folder: Path, step: int, rows: list[dict[str, Any]]) -> Path:
    """A token log; each row needs completion, position and token, and has a default for everything else."""
    default = {"step": step, "token_id": 7, "train_logp": -0.1, "sampling_logp": -0.1, "discrepancy": 0.0}
    default |= {"penalty": 0.0, "advantage": 0.5, "valid": True, "rejected": None, "prompt": "p"}
    default |= {"reward": 1.0, "answer": None, "gold": None}
    table = pa.Table.from_pylist([default | row for row in rows])
    path = folder / "tokens" / f"tokens_{step:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = [table[field.name].cast(_plain(field.type)).cast(field.type) for field in SCHEMA]
    pq.write_table(pa.table(arrays, schema=SCHEMA), path)
    return path


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def sentence(completion: int, words: list[str], **columns: Any) -> list[dict[str, Any]]:
    """Rows of one completion."""
    return [{"completion": completion, "position": i, "token": word} | columns for i, word in enumerate(words)]


def surge_entries(steps: int = 60, surge: int = 20, period: int = 36) -> list[dict[str, Any]]:
    """A log with calibration up to step 3, a surge and one halving."""
    entries = []
    for step in range(1, steps + 1):
        entry: dict[str, Any] = {"step": step, "reward": step / 100, "reward_std": 0.1, "learning_rate": 1e-6}
        entry |= {"completions/mean_length": 100.0 if step < surge else 300.0, "dc/discrepancy/mean": 0.004}
        entry["length_decay/lr_scale"] = 1.0 if step < period else 0.5
        if step > 3:
            entry["dc/tolerance"] = 0.005
        if step >= surge:
            entry["length_decay/surge_step"] = float(surge)
        entries.append(entry)
    return entries


class Page(HTMLParser):
    """The elements of a page, the contents of its scripts, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.cdata_elem is None:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def data(self) -> dict[str, Any]:
        """What the page's scripts draw."""
        return json.loads(self.scripts[0])


def report(*folders: Path, step: int | None = None) -> Page:
    return Page(build_report(folders, step))


def traces(page: Page, panel: str) -> dict[str, dict[str, Any]]:
    return {trace.get("name", "band"): trace for trace in page.data["figures"][panel]["data"]}


def hostile_run(folder: Path) -> Path:
    """A run whose every text is hostile."""
    text = " ".join(HOSTILE)
    settings = {"constraint": text, "discrepancy_metric": text, "rollout_precision": text, text: text}
    write_log(folder, surge_entries(5), settings=settings, model=text)
    rows = [row for text in HOSTILE for row in sentence(0, [text.encode("utf-8", "replace").decode()])]
    for position, row in enumerate(rows):
        row |= {"position": position, "prompt": rows[0]["token"] + rows[1]["token"], "discrepancy": 0.1}
    write_tokens(folder, 5, rows)
    return folder
