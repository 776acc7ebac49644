# SPDX-License-Identifier: Apache-2.0
"""Python processes that are forks of one which has loaded the libraries: to load them takes ten seconds of a core.

A fork has the arguments, variables, folder and path that the process would have. What a library reads from the
variables as it is imported, it has read before: a process whose variables differ has to be a fresh one.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest.mock import patch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["preloaded"])


def run_forks(
    words: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    server: Mapping[str, str],
    cwd: Path,
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    """Runs Python on these words, in a process for each environment; the first that fails ends the others.

    Args:
        words: a script, or `-m` and a module, with its arguments.
        environments: the variables of each process.
        server: the variables of the server, if it has to be started.
        cwd: where the processes run.
        timeout: in seconds.

    Raises:
        subprocess.TimeoutExpired: if they take longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("stdout", "stderr"))
        out.touch(), err.touch()
        forks = [CONTEXT.Process(target=_become, args=(words, own, cwd, out, err)) for own in environments]
        with patch.dict(os.environ, server, clear=True):
            for fork in forks:
                fork.start()
        try:
            status = _wait(forks, time.monotonic() + timeout)
        finally:
            for fork in forks:
                fork.kill()
                fork.join()
        if status is None:
            raise subprocess.TimeoutExpired(words, timeout, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(words, status, out.read_text(), err.read_text())


def _wait(forks: Sequence[ForkServerProcess], until: float) -> int | None:
    """The status of the first that fails, or 0 once all have ended; None if the time is up before."""
    while time.monotonic() < until:
        statuses = [fork.exitcode for fork in forks]
        failed = [status for status in statuses if status]
        if failed or None not in statuses:
            return failed[0] if failed else 0
        time.sleep(0.05)
    return None


def _become(words: Sequence[str], variables: Mapping[str, str], cwd: Path, out: Path, err: Path) -> None:
    """Makes a fork the process that Python would start."""
    import preloaded

    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    for path, stream in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    try:
        if words[0] == "-m":
            sys.argv, sys.path = list(words[1:]), [str(cwd), *preloaded.PATH]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path = list(words), [str(Path(words[0]).parent), *preloaded.PATH]
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing would leave them out
