# SPDX-License-Identifier: Apache-2.0
"""Accuracy of mathematical answers by math-verify, judged in worker processes that can be killed.

math-verify limits its time with `signal.alarm`, which works in the main thread of POSIX systems only and does not
interrupt a long C call. Here each worker is a Python process of its own that imports neither torch nor the training
script: an answer that makes sympy hang costs its time limit and nothing else.

This file is also the program that the workers run, hence the standard library alone at its top.
"""

import contextlib
import faulthandler
import importlib
import importlib.util
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# None excludes a completion from its group's baseline and from the gradient (TRL's convention).
REWARDS: dict[str, float | None] = {
    "right": 1.0,
    "wrong": 0.0,
    "error": 0.0,
    "timeout": 0.0,
    "unparsable_gold": None,
}
COUNTED = ("error", "timeout", "unparsable_gold")

# Seconds for Python and sympy to load; generous, because a starting training run keeps every core busy.
_START_TIMEOUT = 120.0
# Bytes a worker may map: 9^(9^9) would take the machine's memory before its time is up. POSIX only.
_MEMORY_LIMIT = 4 << 30


class MathAccuracyReward:
    r"""Reward 1.0 where the completion's final answer equals the gold answer, else 0.0; None without a usable gold.

    The answer must be in `\boxed{}` or announced ("Answer: 42", "the final answer is 42"); a box counts before an
    announcement, two different boxes are a wrong answer, and text up to the last `</think>` is not read. An answer
    that takes too long or breaks the parser earns 0.0. A gold answer that cannot be parsed gives None.

    The training thread waits for the verdicts but computes none of them: at most
    `timeout * ceil(completions / workers)` seconds, plus the start of the workers at the first call. `counts` holds
    totals per verdict; the shares of errors, timeouts and unparsable golds are logged at each call.

    Args:
        timeout: seconds for one completion, gold included.
        workers: processes; each rank of a distributed run has its own.

    Raises:
        ImportError: if math-verify is not installed.
    """

    __name__ = "accuracy"

    def __init__(self, timeout: float = 5.0, workers: int = 4) -> None:
        if timeout <= 0 or workers < 1:
            raise ValueError(f"`timeout` is {timeout} and `workers` {workers}: use a positive time and 1 or more.")
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("The accuracy reward needs math-verify: pip install 'dc-trl[math]'.")
        self.timeout = timeout
        self.workers = workers
        self.counts: Counter[str] = Counter()
        self._idle: queue.SimpleQueue[_Worker] | None = None

    def __call__(
        self,
        completions: list[Any],
        solution: list[str],
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Rewards of `completions` (texts, or message lists) against the gold answers in `solution`.

        Raises:
            RuntimeError: if the workers cannot start.
        """
        if self._idle is None:
            self._idle = queue.SimpleQueue()
            for _number in range(self.workers):
                self._idle.put(_Worker(self.timeout))
        with ThreadPoolExecutor(self.workers) as threads:
            verdicts = list(threads.map(self._verdict, solution, map(_text, completions)))
        found = Counter(verdicts)
        self.counts += found
        for name in COUNTED:
            if log_metric is not None:  # each name at each call on each rank, because TRL gathers the values
                log_metric(f"math_verify/{name}", found[name] / len(verdicts))
        return [REWARDS[verdict] for verdict in verdicts]

    def _verdict(self, gold: str, text: str) -> str:
        assert self._idle is not None
        worker = self._idle.get()
        try:
            return worker.ask(gold, text)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends the workers; the next call starts new ones."""
        idle, self._idle = self._idle, None
        while idle is not None and not idle.empty():
            idle.get().stop()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_idle": None}

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be half gone
            self.close()


class _Worker:
    """One judging process, started when first asked and again after it was killed."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._process: subprocess.Popen[str] | None = None

    def ask(self, gold: str, text: str) -> str:
        """The verdict, a key of `REWARDS`."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        answer, late = self._exchange(json.dumps([gold, text]), self.timeout)
        if late or not answer:
            self.stop()
        return answer or ("timeout" if late else "error")

    def _start(self) -> None:
        self._process = subprocess.Popen(
            # -P: without it the package's directory would be importable, and its modules hide others of their name.
            [sys.executable, "-P", __file__, str(self.timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        answer, _ = self._exchange(None, _START_TIMEOUT)
        if answer != "ready":
            self.stop()
            raise RuntimeError(
                f"A math-verify worker did not start within {_START_TIMEOUT:.0f} s (its messages are above). Check "
                f"that `{sys.executable} -c 'import math_verify'` works."
            )

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


def load_rewards(names: list[str], timeout: float, workers: int) -> list[Callable[..., Any]]:
    """Reward functions by name: `accuracy`, or the dotted path of a function or class instance of your own.

    Raises:
        ValueError: for a name that is neither, naming what was looked for.
    """
    return [MathAccuracyReward(timeout, workers) if name == "accuracy" else _imported(name) for name in names]


def _imported(path: str) -> Callable[..., Any]:
    module, _, attribute = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a module beside the recipe, as TRL's scripts allow
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(
            f"Reward function {path!r} was not found ({error}). Use 'accuracy', or the dotted path of a function, "
            "such as 'my_rewards.brevity' for `brevity` in my_rewards.py in the current directory."
        ) from error


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


# The worker's side


def judge(gold: str, text: str) -> str:
    """The verdict on one completion, in this process and without a time limit: a key of `REWARDS`."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    announced = [
        LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False),
        ExprExtractionConfig(try_extract_without_anchor=False),
    ]
    options: dict[str, Any] = {"parsing_timeout": None, "fallback_mode": "no_fallback"}
    expected = parse(_boxed(gold), **options)
    if not expected:
        return "unparsable_gold"
    try:
        answer = parse(
            text.rpartition("</think>")[2], announced, extraction_mode="first_match", raise_on_error=True, **options
        )
        return "right" if verify(expected, answer, timeout_seconds=None, raise_on_error=True) else "wrong"
    except Exception:  # sympy and antlr raise most of what Python has
        return "error"


def _boxed(gold: str) -> str:
    """A bare answer, such as `34` or `\\frac{1}{3}`, put in a box: unmarked LaTeX is not recognised as such."""
    marked = any(mark in gold for mark in ("\\boxed", "$", "\\(", "\\["))
    return gold if marked or not gold.strip() else f"\\boxed{{{gold}}}"


def _serve(timeout: float) -> None:
    """Answers one line of JSON, [gold, text], by one line, the verdict, until standard input ends."""
    # Ctrl-C and a notebook's interrupt reach the whole process group: the parent decides, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing that a library prints may pass for a verdict
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    importlib.import_module("math_verify")
    logging.disable(logging.ERROR)  # its warnings that the timeout is off, and of each failed parse
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        # A parent that was killed kills no workers: a hanging one ends itself.
        faulthandler.dump_traceback_later(2 * timeout + 60, exit=True)
        print(judge(*json.loads(line)), file=answers, flush=True)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
