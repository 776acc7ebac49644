# SPDX-License-Identifier: Apache-2.0
"""Hides vLLM from a process that does not need it; see `processes`."""

import sys

sys.modules["vllm"] = None  # type: ignore[assignment]  # `find_spec` then says that it is not installed
