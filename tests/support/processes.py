# SPDX-License-Identifier: Apache-2.0
"""Python processes that tests start: with this checkout's package, one thread each, and without the network."""

import os
import subprocess
import sys
from pathlib import Path

from places import ROOT, SUPPORT


def environment(vllm: bool = False, **more: str) -> dict[str, str]:
    """The variables of such a process.

    Args:
        vllm: whether it needs vLLM. TRL imports it wherever it is installed, which is half of the time that a trainer
            takes to import; it is hidden from the others.
        more: what is set besides.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if not vllm:
        paths.insert(0, str(SUPPORT / "without_vllm"))
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return os.environ | own | more


def run_python(
    *words: str | Path,
    vllm: bool = False,
    cwd: Path | None = None,
    status: int | None = 0,
    timeout: float = 300,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Runs Python on these words and returns what it printed.

    Args:
        words: a script or a module with its arguments.
        vllm: whether it needs vLLM.
        cwd: where it runs.
        status: that it must end with; None for any.
        timeout: in seconds.
        variables: of its environment, beside those of `environment`.
    """
    command = [sys.executable, *map(str, words)]
    own = environment(vllm, **variables)
    done = subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, timeout=timeout)
    assert status in (None, done.returncode), f"status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done


def run_ranks(
    script: Path, *words: str | Path, ranks: int = 2, vllm: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs a script of this folder on several processes of one machine."""
    # Not `accelerate launch --cpu --num_processes 2`, which starts one process and says nothing.
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks))
    return run_python(*launcher, script, *words, vllm=vllm)
