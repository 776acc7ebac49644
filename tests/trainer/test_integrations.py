# SPDX-License-Identifier: Apache-2.0
"""Trackers get what the trainer logs, through the Trainer's own integrations. Nothing leaves the machine."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from places import SUPPORT
from processes import run_python

OURS = ("dc/", "sampling/", "length_decay/")


def reported(tracker: str, folder: Path, **environment: str) -> list[dict[str, Any]]:
    """Trains in a process of its own. Returns each entry of the log under the names that trackers get, ours only."""
    pytest.importorskip(tracker)
    run_python(SUPPORT / "tracker_run.py", tracker, folder, cwd=folder, **environment)
    log = json.loads((folder / "log.json").read_text())
    found = []
    for entry in log:
        ours = {_name(key): value for key, value in entry.items() if key.removeprefix("eval_").startswith(OURS)}
        found += [ours | {"train/global_step": entry["step"]}] if ours else []
    assert len(found) == 4 and len(found[0]) > 20  # three steps and an evaluation
    assert any("length_decay/lr_scale" in key for entry in found for key in entry)
    return found


def _name(key: str) -> str:
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"


def assert_holds(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Each expected entry is, whole, in one of the rows."""
    for entry in expected:
        matching = [row for row in rows if entry.keys() <= row.keys()]
        assert any(all(row[k] == pytest.approx(v, rel=1e-6) for k, v in entry.items()) for row in matching), entry


def wandb_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The history of an offline run: records of a LevelDB log, which comes in blocks of 32 KiB, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header: the rest of the block is padding
            at += 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            items = Record.FromString(record).history.item
            record = b""
            if items:
                yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_wandb_gets_every_metric(tmp_path: Path) -> None:
    expected = reported("wandb", tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = list(wandb_rows(path))
    assert_holds(rows, expected)
    assert any(key.partition("/")[0] == "completions" for row in rows for key in row)  # TRL's table


def test_trackio_gets_every_metric(tmp_path: Path) -> None:
    pytest.importorskip("trackio")  # asks for a newer huggingface_hub than the package does
    expected = reported("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    assert_holds(json.loads((tmp_path / "rows.json").read_text()), expected)
