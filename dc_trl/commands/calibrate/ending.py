# SPDX-License-Identifier: Apache-2.0
"""A calibration that is told to end cleans up behind itself."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def cleans_up_when_terminated() -> Iterator[None]:
    """While this is open, SIGTERM raises `SystemExit`, so that `finally` blocks run; a second one is passed over.

    Only in the main thread, the only one that may handle signals; elsewhere it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)
