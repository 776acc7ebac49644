# SPDX-License-Identifier: Apache-2.0
"""What the marks of the tests mean, and what makes all of them quick."""

import gc
import importlib.util

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `vllm` where vLLM is not installed, before a fixture of theirs starts anything."""
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm") is not None:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


def pytest_collection_finish() -> None:
    """Takes what the imports made out of the garbage collector's sight.

    Accelerate collects garbage as each training starts, and would go through a million objects of the libraries, which
    takes as long as a training of three steps does.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Gives the collector everything back, for what libraries check at the end of the process."""
    gc.unfreeze()
