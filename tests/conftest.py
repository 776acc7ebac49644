# SPDX-License-Identifier: Apache-2.0
"""What the marks of the tests mean."""

import importlib.util

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `vllm` where vLLM is not installed, before a fixture of theirs starts anything."""
    if importlib.util.find_spec("vllm") is not None:
        return
    for item in items:
        if item.get_closest_marker("vllm") is not None:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))
