# SPDX-License-Identifier: Apache-2.0
"""A real vLLM server as a child process, for tests and examples."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import requests
import torch
from processes import free_port


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
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *flags: str, timeout: float = 240.0) -> "VLLMServer":
        """Start with `flags` on top of the ones that tests always want.

        Raises:
            RuntimeError: it died or did not answer within `timeout` seconds; the message has the end of its log.
        """
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", "128", "--max-num-seqs", "32"]
        # Compilation would take longer than the tests, and the model is too small to gain from it.
        command += ["--logprobs-mode", "processed_logprobs", "--enforce-eager", *flags]
        if torch.cuda.is_available():
            command += ["--gpu-memory-utilization", "0.2"]
        environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1"}
        with open(self.log, "ab") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=os.environ | environment, start_new_session=True
            )
        deadline = time.monotonic() + timeout
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"no vLLM server at {self.url}:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.5)
        return self

    def kill(self) -> None:
        """End the server and all its workers at once, as a crash would. Does nothing where none runs."""
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=5).status_code == 200
        except requests.RequestException:
            return False
