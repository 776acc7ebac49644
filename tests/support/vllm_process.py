# SPDX-License-Identifier: Apache-2.0
"""A real vLLM server as a child process, for tests."""

import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import requests
import torch
from forked import end
from processes import PARENTS, environment, free_port


class VLLMServer:
    """`vllm.entrypoints.openai.api_server` on loopback; `start` waits until it answers, `kill` ends its whole group.

    Args:
        model: directory of the model it starts with.
        log: file that gets its output.
        port: to listen on; None takes a free one.
    """

    def __init__(self, model: Path, log: Path, port: int | None = None) -> None:
        self.model, self.log = model, log
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: ForkServerProcess | None = None

    def start(self, *flags: str, timeout: float = 240.0, fresh: bool = False) -> "VLLMServer":
        """Start with `flags` on top of the ones that tests always want.

        Args:
            flags: of vLLM's command.
            timeout: in seconds.
            fresh: whether it is to load the libraries itself, and start its engine and worker as vLLM does.

        Raises:
            RuntimeError: it died or did not answer within `timeout` seconds; the message has the end of its log.
        """
        words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)]
        words += ["--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", "128", "--max-num-seqs", "32"]
        # Compilation would take longer than the tests, and the model is too small to gain from it.
        words += ["--logprobs-mode", "processed_logprobs", "--enforce-eager", *flags]
        if torch.cuda.is_available():
            words += ["--gpu-memory-utilization", "0.2"]
        variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        own = environment(vllm=True, **variables)
        self._process = PARENTS[True].fork(words, own, Path.cwd(), self.log, self.log, fresh)
        deadline = time.monotonic() + timeout
        while not self._answers():
            if self._process.exitcode is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"no vLLM server at {self.url}:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.5)
        return self

    def kill(self) -> None:
        """End the server and all its workers at once, as a crash would. Does nothing where none runs."""
        if self._process is not None:
            end(self._process)
            self._process = None

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=5).status_code == 200
        except requests.RequestException:
            return False
