# SPDX-License-Identifier: Apache-2.0
"""What the marks of the tests mean, and what makes all of them quick."""

import gc
import importlib.util

import pytest
from asked_once import ask_once
from slow_list import LIST, SECONDS, Clock, function_of, slow_functions


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-slow", action="store_true", help=f"write which tests took {SECONDS} s to {LIST.name}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the slow tests, and skips those marked `vllm` where it is not installed, before a fixture starts it."""
    slow = slow_functions()
    for item in items:
        if function_of(item.nodeid) in slow:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("vllm") is not None and importlib.util.find_spec("vllm") is None:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--write-slow") and not hasattr(config, "workerinput"):  # the workers' reports come here
        config.pluginmanager.register(Clock())


def pytest_collection_finish() -> None:
    """Takes what the imports made out of the garbage collector's sight, and has what they imported ask once.

    Accelerate collects garbage as each training starts, and would go through a million objects of the libraries, which
    takes as long as a training of three steps does.
    """
    ask_once()
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Gives the collector everything back, for what libraries check at the end of the process."""
    gc.unfreeze()
