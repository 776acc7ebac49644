# SPDX-License-Identifier: Apache-2.0
"""Silences the start-up notices of libraries that the quickstart needs; import it before them."""

import logging
import os
import warnings

# Without a GPU, torchao and vLLM report the CUDA libraries that they miss.
for name in ("torchao", "torch.utils._pytree", "vllm"):
    logging.getLogger(name).setLevel(logging.ERROR)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
warnings.filterwarnings("ignore", message="IProgress not found")  # in a notebook without ipywidgets
