# SPDX-License-Identifier: Apache-2.0
"""Python processes that are forks of one which has loaded the libraries: to load them takes ten seconds of a core.

A fork has the arguments, variables, folder and path that the process would have, and leads a process group as a shell
command does. What a library reads from the variables as it is imported, it has read before: a process whose variables
differ has to be a fresh one. There are two processes to fork: in one, vLLM is loaded, in the other it is hidden.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest.mock import patch

_OUTSIDE = dict(os.environ)  # before any test changes it


class Parent:
    """A process that loads the libraries once and forks.

    Args:
        module: that loads them.
        variables: of its environment, on top of those that the tests were started with.
    """

    def __init__(self, module: str, variables: Mapping[str, str]) -> None:
        self._server = forkserver.ForkServer()
        self._server.set_forkserver_preload([module])
        self._variables = _OUTSIDE | variables

    def fork(
        self,
        words: Sequence[str],
        variables: Mapping[str, str],
        cwd: Path,
        out: Path,
        err: Path,
        fresh: bool = False,
    ) -> ForkServerProcess:
        """Starts Python on these words.

        Args:
            words: a script, or `-m` and a module, with its arguments.
            variables: of its environment.
            cwd: where it runs.
            out, err: files to which its output is added.
            fresh: whether it is to load the libraries itself, after all.
        """
        arguments = (words, variables, cwd, out, err, fresh)
        fork = multiprocessing.get_context("forkserver").Process(target=_become, args=arguments)
        connect = self._server.connect_to_new_process
        with patch.dict(os.environ, self._variables, clear=True):
            with patch.object(forkserver, "connect_to_new_process", connect):
                fork.start()
        return fork


def end(fork: ForkServerProcess) -> None:
    """Ends a fork and what it started, at once, as a crash would."""
    with suppress(ProcessLookupError):
        os.killpg(fork.pid, signal.SIGKILL)
    fork.kill()  # which may not lead its group yet
    fork.join()


def run_forks(
    parent: Parent, words: Sequence[str], environments: Sequence[Mapping[str, str]], cwd: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Runs Python on these words, in a process for each environment; the first that fails ends the others.

    Args:
        parent: that is forked.
        words: a script, or `-m` and a module, with its arguments.
        environments: the variables of each process.
        cwd: where the processes run.
        timeout: in seconds.

    Raises:
        subprocess.TimeoutExpired: if they take longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("stdout", "stderr"))
        forks = [parent.fork(words, own, cwd, out, err) for own in environments]
        try:
            status = _wait(forks, time.monotonic() + timeout)
        finally:
            for fork in forks:
                end(fork)
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


def _become(words: Sequence[str], variables: Mapping[str, str], cwd: Path, out: Path, err: Path, fresh: bool) -> None:
    """Makes a fork the process that Python would start."""
    import preloaded

    os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    for path, stream in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    if fresh:
        os.execve(sys.executable, [sys.executable, *words], os.environ)
    try:
        if words[0] == "-m":
            sys.argv, sys.path = list(words[1:]), [str(cwd), *preloaded.PATH]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path = list(words), [str(Path(words[0]).parent), *preloaded.PATH]
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing would leave them out
