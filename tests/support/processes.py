# SPDX-License-Identifier: Apache-2.0
"""Python processes that tests start: with this checkout's package, one thread each, and without the network."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from forked import Parent, run_forks
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


def _parent(vllm: bool) -> Parent:
    own = environment(vllm)
    variables = {name: own[name] for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE")}
    variables["PYTHONPATH"] = os.pathsep.join([own["PYTHONPATH"], str(SUPPORT)])
    return Parent("preloaded_vllm" if vllm else "preloaded", variables)


PARENTS = {vllm: _parent(vllm) for vllm in (False, True)}
"""What tests' processes are forks of, by whether vLLM is loaded."""

READ_LATE = ("VLLM_", "MASTER_")
"""How variables begin that libraries read after they are imported, each time."""


def run_python(
    *words: str | Path,
    vllm: bool = False,
    cwd: Path | None = None,
    status: int | None = 0,
    timeout: float = 300,
    fresh: bool = False,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Runs Python on these words and returns what it printed.

    Args:
        words: a script or a module with its arguments; code, behind `-c`, in a fresh process only.
        vllm: whether it needs vLLM.
        cwd: where it runs.
        status: that it must end with; None for any.
        timeout: in seconds.
        fresh: whether the process must load the libraries itself; with variables that are not `READ_LATE`, it does.
        variables: of its environment, beside those of `environment`.
    """
    texts, own = [str(word) for word in words], environment(vllm, **variables)
    if fresh or not all(name.startswith(READ_LATE) for name in variables):
        command = [sys.executable, *texts]
        done = subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, timeout=timeout)
    else:
        done = run_forks(PARENTS[vllm], texts, [own], cwd or Path.cwd(), timeout)
    return _checked(done, status)


def run_ranks(
    script: Path, *words: str | Path, ranks: int = 2, vllm: bool = False, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs a script of this folder on several processes of one machine; torch starts those that are fresh."""
    if fresh or vllm:
        # Not `accelerate launch --cpu --num_processes 2`, which starts one process and says nothing.
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks))
        return run_python(*launcher, script, *words, vllm=vllm, fresh=True)
    texts, port = [str(word) for word in (script, *words)], free_port()
    environments = [environment() | _rank(rank, ranks, port) for rank in range(ranks)]
    return _checked(run_forks(PARENTS[False], texts, environments, Path.cwd(), timeout=300), status=0)


def free_port() -> int:
    """A TCP port on loopback that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _checked(done: subprocess.CompletedProcess[str], status: int | None) -> subprocess.CompletedProcess[str]:
    assert status in (None, done.returncode), f"status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done


def _rank(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torch's launcher tells a rank."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return where | {name: str(number) for name, number in numbers.items()}
