# SPDX-License-Identifier: Apache-2.0
"""Runs what is not done yet, in the protocol's order: a process for each run, a line for each that finished.

The processes are forks of one that has loaded the libraries, which would take longer than many a run does.
"""

import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from papers import results_file
from papers.blocks import BLOCKS, Block, planned
from papers.results_file import Run
from papers.setups import Arm, Regime
from papers.stack import Stack
from papers.start import WARMUP_STEPS

FAILED = 3  # failures after which the runner gives up


class Todo(NamedTuple):
    """A run that has no line yet."""

    block: Block
    regime: Regime
    arm: Arm
    seed: int

    @property
    def run(self) -> Run:
        """As the results name it."""
        return self.regime.name, self.arm.name, self.seed


def run_all(
    results: Path,
    starts: Path,
    only: Sequence[str],
    seeds: Sequence[int],
    jobs: int,
    until: float | None,
    stack: Stack | None = None,
) -> None:
    """Does what has no line yet; arguments as for `do`, of the blocks in `only`, or of all."""
    known = {results_file.run_of(line) for line in lines(results)}
    todo = [run for run in map(Todo._make, planned(only, seeds)) if run.run not in known]
    do(todo, results, starts, jobs, until, stack=stack)


def do(
    todo: Sequence[Todo],
    results: Path,
    starts: Path,
    jobs: int = 1,
    until: float | None = None,
    warmup_steps: int = WARMUP_STEPS,
    stack: Stack | None = None,
) -> None:
    """Does runs in their order.

    Args:
        todo: the runs.
        results: folder of the result files, one for each block.
        starts: folder of the warmed-up policies.
        jobs: runs at a time. Several may not share a seed whose warm-up is still to be done.
        until: time after which no run is started, as of `time.time`; None for none.
        warmup_steps: of the warm-up.
        stack: another model or engine than the demo's.

    Raises:
        RuntimeError: if several runs failed, or one that was the last.
    """
    todo = [run for run in todo if not _lacks_model(run, stack)]
    print(f"{len(todo)} runs to do, {jobs} at a time", flush=True)
    waiting, going, failures, commit = list(todo), [], 0, _commit()
    context = multiprocessing.get_context("fork")
    while waiting or going:
        failures += sum(_report(*entry) for entry in going if not entry[0].is_alive())
        going = [entry for entry in going if entry[0].is_alive()]
        if failures >= FAILED:
            raise RuntimeError(f"{failures} runs failed; their errors are above. Repair the cause and start again.")
        if waiting and until is not None and time.time() > until:
            print(f"time is up, {len(waiting)} runs left", flush=True)
            waiting = []
        while waiting and len(going) < jobs:
            run = waiting.pop(0)
            process = context.Process(target=_do, args=(run, results, starts, commit, warmup_steps, stack))
            process.start()
            going.append((process, run, time.time()))
        time.sleep(0.1)
    if failures:
        raise RuntimeError(f"{failures} runs failed; their errors are above. Repair the cause and start again.")


def _lacks_model(run: Todo, stack: Stack | None) -> bool:
    """Whether a run needs a published model that is not installed; says so."""
    from papers import published

    lacks = (stack or Stack()).takes_published(run.regime) and not published.is_there()
    if lacks:
        print(f"{run.run}: left out, it needs a published model: {published.INSTALL}", flush=True)
    return lacks


def _report(process: BaseProcess, run: Todo, began: float) -> bool:
    """Says that a run ended; whether it failed."""
    process.join()
    print(f"{run.run}: {time.time() - began:.0f} s, exit {process.exitcode}", flush=True)
    return process.exitcode != 0


def _do(run: Todo, results: Path, starts: Path, commit: str, warmup_steps: int, stack: Stack | None) -> None:
    from papers.training import train

    try:
        line = train(run.regime, run.arm, run.seed, starts, warmup_steps, stack)
        results_file.add(_file(results, run.block.name), line | {"block": run.block.name, "commit": commit})
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # what the libraries do at the end of a process is the parent's


def lines(results: Path) -> list[dict[str, Any]]:
    """The lines of every block."""
    return [line for name in BLOCKS for line in results_file.read(_file(results, name))]


def _file(results: Path, block: str) -> Path:
    return results / f"{block}.jsonl"


def _commit() -> str:
    """The commit of this checkout, or "unknown" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
