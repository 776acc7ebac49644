# SPDX-License-Identifier: Apache-2.0
"""What the server of `forked` loads, once, for the processes that it becomes."""

import gc
import sys

PATH = list(sys.path)

import datasets  # noqa: E402, F401
import peft  # noqa: E402, F401
import torch.distributed.fsdp  # noqa: E402, F401
import transformers.models.qwen3.modeling_qwen3  # noqa: E402, F401
from asked_once import ask_once  # noqa: E402

import dc_trl.commands.cli  # noqa: E402, F401
import dc_trl.trainer  # noqa: E402, F401

ask_once()
gc.freeze()  # as in conftest.py
