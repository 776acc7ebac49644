# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of `dc-trl evaluate`."""

from pathlib import Path

import pytest
from known_engine import SUMS, KnownEngine, write
from tiny import save_tiny_policy

from dc_trl.commands.evaluate.benchmarks import Benchmark
from dc_trl.commands.evaluate.run import load_judge
from dc_trl.commands.evaluate.sampling import Judge


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny policy's directory, and the current directory with sums.jsonl in it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "sums.jsonl", SUMS)
    return save_tiny_policy(tmp_path / "policy")


@pytest.fixture(scope="module")
def judge() -> Judge:
    """math-verify, its workers started once."""
    return load_judge()


@pytest.fixture
def engine(policy: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> KnownEngine:
    engine = KnownEngine()
    engine.learn(Benchmark("sums", "sums", "sums.jsonl", 4, "train"))
    monkeypatch.setattr("dc_trl.commands.evaluate.run.make_engine", lambda *args: engine)
    monkeypatch.setattr("dc_trl.commands.evaluate.run.load_judge", lambda: judge)
    return engine
