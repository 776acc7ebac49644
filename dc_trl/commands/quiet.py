# SPDX-License-Identifier: Apache-2.0
"""What the commands keep off the screen, and out of progress bars. Importing the package does none of it: a script's
own output is its author's."""

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# Loggers of libraries that report, whenever they are imported, what they miss on this machine or are to change: CUDA
# libraries, Triton, types that register twice. None of it is a reader's to act on.
IMPORT_NOTICES = ("torchao", "torch.utils._pytree", "torch.utils.flop_counter", "vllm.triton_utils.importing")


def silence_imports() -> None:
    """Keeps notices of imports below an error quiet, in this process. A level that somebody has set stays."""
    for name in IMPORT_NOTICES:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.ERROR)


@contextmanager
def whole_lines() -> Iterator[None]:
    """While this is open, log messages and warnings stand in lines of their own, above the progress bars."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    with ExitStack() as stack:
        logging.captureWarnings(True)
        stack.callback(logging.captureWarnings, False)
        stack.enter_context(logging_redirect_tqdm(_on_the_console()))
        yield


def _on_the_console() -> list[logging.Logger]:
    """The root logger, and every other that writes to the console by itself."""
    others = [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    streams = (sys.stdout, sys.stderr)
    return [logging.root] + [
        logger for logger in others if any(getattr(handler, "stream", None) in streams for handler in logger.handlers)
    ]
