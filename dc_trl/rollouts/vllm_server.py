# SPDX-License-Identifier: Apache-2.0
"""Talking to a vLLM server: what must be true of it, what it is told, and what is said when it is gone.

Security: the reload and RPC endpoints exist only under `VLLM_SERVER_DEV_MODE=1`, have no authentication, and let
whoever reaches them run any method of the server's workers. Bind the server to loopback or to a private network.
"""

import math
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import torch
from requests.adapters import HTTPAdapter
from torch import nn
from urllib3.connection import HTTPConnection
from urllib3.util.retry import Retry

from dc_trl.rollouts.server_answers import Answer, refuse_redirects

START_COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL --host 127.0.0.1 "
    "--logprobs-mode processed_logprobs"
)
_RESET_ATTEMPTS = 5
_ANSWER_SECONDS = 60.0
"""Least time that a server which took the connection gets to answer: the first `/server_info` surveys its machine."""
_AS_JSON = {"config_format": "json"}


class PatientAdapter(HTTPAdapter):
    """Retries what passes, notices a dead peer within `server_timeout` seconds, and never limits a slow answer.

    Generation and reloading may rightly take longer than any timeout, so answers have none. Instead the kernel probes
    the connection, which also notices a machine that vanished without closing it. An answer with a 5xx status raises
    `requests.HTTPError` with the server's own words.
    """

    def __init__(self, server_timeout: float) -> None:
        self.server_timeout = server_timeout
        # Waits of 0, 1, 2, 4, … seconds: as many as fit into the timeout.
        attempts = 1 + int(math.log2(server_timeout + 1))
        retry = Retry(attempts, backoff_factor=0.5, status_forcelist=[502, 503], allowed_methods=["GET", "POST"])
        super().__init__(max_retries=retry, pool_maxsize=64)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Open every connection with the probing switched on."""
        super().init_poolmanager(*args, socket_options=_probing(self.server_timeout), **kwargs)

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        """Send with a limit on connecting only, unless the caller set limits."""
        kwargs["timeout"] = kwargs.get("timeout") or (self.server_timeout, None)
        response = super().send(request, *args, **kwargs)
        if response.status_code >= 500:
            raise requests.HTTPError(f"status {response.status_code}: {response.text[:1000]}", response=response)
        return response


def _probing(timeout: float) -> list[tuple[int, int, int]]:
    """Socket options under which the kernel gives a silent peer up after `timeout` seconds, as far as it can."""
    seconds = max(int(timeout), 4)
    values = {"TCP_KEEPIDLE": seconds // 2, "TCP_KEEPINTVL": seconds // 8 or 1, "TCP_KEEPCNT": 4}
    values["TCP_USER_TIMEOUT"] = seconds * 1000
    known = [
        (socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in values.items() if hasattr(socket, name)
    ]
    return [*HTTPConnection.default_socket_options, (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *known]


@contextmanager
def explain_failure(base_url: str, activity: str) -> Iterator[None]:
    """Turn a failure to talk to the server into a `ConnectionError` that says what to do; `activity` ends in -ing."""
    try:
        yield
    except requests.RequestException as error:
        raise ConnectionError(
            f"The vLLM server at {base_url} failed while {activity}: {error}. Read its log, start it again "
            f"({START_COMMAND}) and resume the run from its last checkpoint with "
            "`trainer.train(resume_from_checkpoint=True)`: the first weight sync brings a fresh server up to date."
        ) from error


def check_logprobs_mode(base_url: str, timeout: float) -> None:
    """Make sure that the server's log-probabilities are those of the distribution it samples from.

    Args:
        base_url: of the server, such as `http://127.0.0.1:8000`.
        timeout: seconds to wait for a server that takes no connection (yet); one that does gets a minute or more.

    Raises:
        ConnectionError: nothing answered in time, or something else than a vLLM server.
        ValueError: the server reports another `logprobs_mode`, or has no development endpoints.
    """
    response = first_answer(f"{base_url.rstrip('/')}/server_info", timeout)
    mode = server_info(response).field("vllm_config", "model_config", "logprobs_mode", kind=str)
    if mode != "processed_logprobs":
        raise ValueError(
            f"The vLLM server at {base_url} runs with logprobs_mode={mode!r}: what it reports is not the distribution "
            "that it samples from, so the discrepancy would measure that and not the engines. Start it with "
            "`--logprobs-mode processed_logprobs`, or set constraint='none'."
        )


def server_info(response: requests.Response) -> Answer:
    """What a server says of itself, from the response to a `/server_info` in JSON: `vllm_config` and in it
    `model_config`.

    Raises:
        ValueError: the server has no development endpoints.
        ServerAnswerError: it answered something else.
    """
    if response.status_code == 404:
        raise ValueError(
            f"{response.url} answered 404, so neither the server's logprobs_mode nor its dtype is known. The endpoint "
            f"needs VLLM_SERVER_DEV_MODE=1. Start the server with: {START_COMMAND}"
        )
    answer = Answer.of(response, "the server's configuration was")
    answer.field("vllm_config", "model_config", kind=dict)
    return answer


def server_configuration(session: requests.Session, base_url: str) -> dict[str, Any]:
    """The server's `vllm_config`, with its `model_config`, whose `dtype` is one of torch's.

    TRL's own client has a method for it from 1.16 on.

    Raises:
        ValueError: the server has no development endpoints.
        ServerAnswerError: it answered something else.
    """
    info = server_info(session.get(f"{base_url}/server_info", params=_AS_JSON))
    dtype = info.field("vllm_config", "model_config", "dtype", kind=str)
    if not isinstance(getattr(torch, dtype.removeprefix("torch."), None), torch.dtype):
        raise info.error(f"has {ascii(dtype)[:80]} for vllm_config.model_config.dtype, no dtype of torch's")
    config: dict[str, Any] = info.value["vllm_config"]
    if "device_config" in config:
        info.field("vllm_config", "device_config", kind=dict)
    return config


def check_reloadable(vllm_config: dict[str, Any], model: nn.Module) -> None:
    """Refuse what the server would reload wrongly without a word.

    vLLM on CPUs packs the experts of a mixture when it starts and never again: after a reload it goes on with weights
    in the wrong layout (0.31: log-probs off by 6 after reloading the very same file). Its GPU kernels do pack again.

    Args:
        vllm_config: the server's, from its `/server_info`.
        model: the plain policy.

    Raises:
        NotImplementedError: for a mixture of experts on a CPU server.
    """
    device = vllm_config.get("device_config", {}).get("device_type")
    if device == "cpu" and any(name.endswith(".experts") for name, _ in model.named_modules()):
        raise NotImplementedError(
            f"{type(model).__name__} is a mixture of experts and vLLM runs on {device!r}, where it corrupts experts "
            "when it reloads them. Run vLLM on GPUs, train a dense model, or set rollout_backend='transformers'."
        )


def first_answer(url: str, timeout: float) -> requests.Response:
    """The first response to a GET, whatever its status, trying once a second for `timeout` seconds.

    Raises:
        ConnectionError: nothing answered.
        ServerAnswerError: the answer is a redirect.
    """
    session = requests.Session()
    refuse_redirects(session)
    deadline = time.monotonic() + timeout
    while True:
        try:
            return session.get(url, params=_AS_JSON, timeout=(timeout, max(timeout, _ANSWER_SECONDS)))
        except requests.RequestException as error:
            if time.monotonic() + 1 >= deadline:
                raise ConnectionError(
                    f"No vLLM server answered at {url} within {timeout:g} s: {error}. Start it with: {START_COMMAND}; "
                    "or, if it is slow to start, raise vllm_server_timeout; or correct vllm_server_base_url."
                ) from error
        time.sleep(1)


def reload_weights(session: requests.Session, base_url: str, directory: Path) -> None:
    """Have every worker of the server load the safetensors in `directory`, and empty the server's prefix cache.

    A prefix cache that outlives the weights would mix two policies within one completion: it looks like a discrepancy
    that grows even at a learning rate of 0. So a reset that the server declines is an error.

    Args:
        session: whose redirects are refused.
        base_url: of the server.
        directory: as the server finds it.

    Raises:
        requests.RequestException: the server is gone, or answered 5xx.
        RuntimeError: the server refused to reload or to reset.
        ServerAnswerError: whoever answered did neither.
    """
    body: dict[str, Any] = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
    reloaded = session.post(f"{base_url}/collective_rpc", json=body)
    if reloaded.status_code != 200:
        raise RuntimeError(
            f"{reloaded.url} answered {reloaded.status_code}: {reloaded.text[:500]}. Weight sync over disk needs the "
            f"development endpoints. Start the server with: {START_COMMAND}"
        )
    answer = Answer.of(reloaded, "a reload of the weights was")
    if not answer.field("results", kind=list):
        raise answer.error("has the results of no worker")
    for _ in range(_RESET_ATTEMPTS):
        reset = session.post(f"{base_url}/reset_prefix_cache")
        if reset.status_code == 200 and _was_reset(reset):
            return
        time.sleep(1)
    raise RuntimeError(
        f"The vLLM server at {base_url} did not reset its prefix cache ({reset.status_code}: {reset.text[:200]}): "
        "some other client holds blocks of it. Keep the server to this run, or pass it --no-enable-prefix-caching."
    )


def _was_reset(response: requests.Response) -> bool:
    """vLLM before 0.26 answers with an empty body."""
    if not response.content:
        return True
    return bool(Answer.of(response, "a reset of the prefix cache was").field("success", kind=bool))
