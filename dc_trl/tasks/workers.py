# SPDX-License-Identifier: Apache-2.0
"""Processes that judge answers, one line of JSON against one line of text, and are killed when they take too long."""

import contextlib
import json
import queue
import subprocess
import sys
import threading

START_TIMEOUT = 120.0
"""Seconds for a worker to load Python and sympy; generous, because a starting training run keeps every core busy."""


class Workers:
    """A pool of `count` workers that are asked at once, and one to spare.

    All start at construction, and one that was killed is followed by the next at once: it loads while others judge.
    So a question waits for a start only where two workers or more are starting, and then for one start at most.

    Args:
        program: file of the worker's program. It gets `seconds` as its argument, prints `ready` or why it is not, and
            then a line for each line.
        count: questions under way at once; no more threads than that may ask.
        seconds: for an answer.
    """

    def __init__(self, program: str, count: int, seconds: float) -> None:
        self._program, self._seconds = program, seconds
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(count + 1):
            self._idle.put(self._new())

    def _new(self) -> "_Worker":
        return _Worker([sys.executable, "-P", self._program, str(self._seconds)])

    def wait(self) -> None:
        """Waits until a worker is ready.

        Raises:
            RuntimeError: it did not start.
        """
        worker = self._idle.get()
        try:
            worker.make_ready()
        finally:
            self._idle.put(worker)

    def ask(self, question: list[str]) -> tuple[str, bool]:
        """The answer, and whether the worker was killed for its time; "" if there is no answer.

        Raises:
            RuntimeError: a worker did not start.
        """
        worker = self._idle.get()
        try:
            return worker.ask(json.dumps(question), self._seconds)
        finally:
            self._idle.put(worker if worker.is_alive else self._new())

    def close(self) -> None:
        """Ends the workers that are not asked right now."""
        while not self._idle.empty():
            self._idle.get().stop()


class _Worker:
    """One process, which loads from its construction on. It answers until it is killed or dies."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._is_ready = False
        self._process: subprocess.Popen[str] | None = None
        with contextlib.suppress(OSError):  # tried again, and reported, when the worker is asked
            self._start()

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ask(self, line: str, seconds: float) -> tuple[str, bool]:
        """See `Workers.ask`. A process that died while it was idle is started again."""
        self.make_ready()
        answer, late = self._exchange(line, seconds)
        if late or not answer:
            self.stop()
        return answer, late

    def _start(self) -> None:
        self._is_ready = False
        self._process = subprocess.Popen(
            # -P, in the command: or the package's directory were importable, and its modules hid others of their name.
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    def make_ready(self) -> None:
        """See `Workers.wait`."""
        if self._is_ready and self.is_alive:
            return
        try:
            if self._is_ready or self._process is None:
                self.stop()
                self._start()
            answer, late = self._exchange(None, START_TIMEOUT)
        except OSError as error:
            answer, late = str(error), False
        self._is_ready = answer == "ready"
        if not self._is_ready:
            self.stop()
            ended = "it ended while it loaded (its messages are above)"
            reason = f"it was not ready within {START_TIMEOUT:.0f} s" if late else answer or ended
            raise RuntimeError(f"A math-verify worker did not start: {reason}.")

    def _exchange(self, line: str | None, seconds: float) -> tuple[str, bool]:
        """Sends `line`, waits for one line; returns it ("" if the process ended) and whether it had to be killed."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            if line is not None:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            answer = process.stdout.readline().strip()
        except OSError:  # a broken pipe: it died
            answer = ""
        finally:
            timer.cancel()
            timer.join()  # it may be killing this very moment
        return answer, late.is_set()

    def stop(self) -> None:
        """Kills the process and waits for its end."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()
