# SPDX-License-Identifier: Apache-2.0
"""How far a calibration is within a pass, and about how long the pass still takes: its clock, and how it is shown.

The work of a pass is batches to sample and batches to score. What one of each takes is known from those before; in the
first of all, from the engine, if it says how far it is.
"""

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import mean

from tqdm import tqdm

SAMPLING = "sampling"
SCORING = "scoring"

# Seconds from one look to the next: in a terminal, where a line is rewritten, and in a file, where lines are added.
TERMINAL_SECONDS = 1.0
FILE_SECONDS = 30.0
# Share of a batch that is done, from which the rest of it can be estimated.
_LEAST_SHARE = 0.05


class PassClock:
    """The work of a pass, and what it has taken so far. Times are seconds. One thread may read while another writes.

    Args:
        now: the clock.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.RLock()
        self._taken: dict[str, list[float]] = {SAMPLING: [], SCORING: []}
        self._left: dict[str, int] | None = None
        self._title = "preparing"
        self._doing: str | None = None
        self._share = 0.0
        self._began = self._since = now()

    def begin(self, title: str, sampled: int | None, scored: int = 0) -> None:
        """A pass begins, of so many batches to sample and score, and further ones to score; None: nobody knows."""
        with self._lock:
            self._title = title
            self._left = None if sampled is None else {SAMPLING: sampled, SCORING: sampled + scored}
            self._doing, self._began = None, self._now()

    def start(self, kind: str) -> None:
        """A batch begins to be sampled or scored."""
        with self._lock:
            self._doing, self._share, self._since = kind, 0.0, self._now()

    def share(self, done: float) -> None:
        """So much of the batch at hand is done, 0 to 1, as its engine says."""
        with self._lock:
            self._share = done

    def end(self) -> None:
        """The batch at hand is done."""
        with self._lock:
            if self._doing is None:
                return
            self._taken[self._doing].append(self._now() - self._since)
            if self._left is not None:
                self._left[self._doing] = max(self._left[self._doing] - 1, 0)
            self._doing = None

    def remaining(self) -> float | None:
        """About how long the pass still takes; None where nothing is known yet.

        What has never been scored counts nothing: scoring is the shorter part.
        """
        with self._lock:
            if self._left is None or not (self._taken[SAMPLING] or self._share >= _LEAST_SHARE):
                return None
            running = self._now() - self._since
            each = {kind: mean(taken) if taken else 0.0 for kind, taken in self._taken.items()}
            if not self._taken[SAMPLING]:
                each[SAMPLING] = running / self._share
            whole = sum(self._left[kind] * each[kind] for kind in self._left)
            return whole - (0.0 if self._doing is None else min(running, each[self._doing]))

    def text(self) -> str:
        """The pass, and how it stands."""
        with self._lock:
            return f"{self._title}; {self.standing()}"

    def standing(self) -> str:
        """What the pass is at, how long it has taken, and about how long it still takes."""
        with self._lock:
            parts = []
            if self._doing is not None:
                share = f" {self._share:.0%}" if self._share else ""
                count = "" if self._left is None else f", batches left: {self._left[self._doing]}"
                parts.append(f"{self._doing}{share}{count}")
            parts.append(f"{_duration(self._now() - self._began)} so far")
            remaining = self.remaining()
        if remaining is not None:
            parts.append(f"about {_duration(remaining)} left")
        return "; ".join(parts)


@contextmanager
def shown(clock: PassClock, every: float | None = None) -> Iterator[None]:
    """Shows the clock on standard error while this is open: a line that is rewritten, or lines in a file.

    Args:
        clock: read from a thread of its own.
        every: seconds from one look to the next; None: as suits a terminal, or a file.
    """
    terminal = sys.stderr.isatty()
    seconds = every or (TERMINAL_SECONDS if terminal else FILE_SECONDS)
    over = threading.Event()
    line = tqdm(bar_format="{desc}", file=sys.stderr, leave=False, disable=not terminal)

    def look() -> None:
        """Writes how it stands, again and again, until the pass is over."""
        while not over.wait(seconds):
            if terminal:  # where the title stands above, and a line that is too long could not be rewritten
                line.set_description_str(f"  {clock.standing()}"[: shutil.get_terminal_size().columns - 1])
            else:
                text = f"dc-trl calibrate: {clock.text()}\n"
                sys.stderr.write(text)  # in one piece, beside what the main thread writes
                sys.stderr.flush()

    watcher = threading.Thread(target=look, name="calibration clock", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        line.close()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
