# SPDX-License-Identifier: Apache-2.0
"""TRL's client of a vLLM server, with answers that are looked at and redirects that are refused."""

from typing import Any

import torch
from trl.generation.vllm_client import VLLMClient

from dc_trl.rollouts.server_answers import Answer, answer_error, check_sampled, refuse_redirects, served_models
from dc_trl.rollouts.vllm_server import PatientAdapter, first_answer, server_info


class CheckedClient(VLLMClient):
    """TRL's `VLLMClient`: what it reads of an answer is there, or the error names the address, and what came.

    Seams of TRL 1.16 used: `check_server`, `get_server_info`, `_get` and `_post` (replaced), `session`, `base_url`.

    Args:
        base_url: of the server.
        group_port: TRL's; no communicator is opened here.
        timeout: seconds after which a server that is not there, or is gone, is given up.

    Raises:
        ConnectionError: no vLLM server answers.
    """

    def __init__(self, base_url: str, group_port: int, timeout: float) -> None:
        super().__init__(base_url=base_url, group_port=group_port, connection_timeout=timeout)

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0) -> None:
        """Wait for the server; its session is patient from then on, and follows no redirect."""
        response = first_answer(f"{self.base_url}/health", total_timeout)
        if response.status_code != 200:
            raise answer_error(response, "the server's health was asked for")
        self.session.mount(self.base_url, PatientAdapter(total_timeout))
        refuse_redirects(self.session)

    def get_server_info(self) -> dict[str, Any]:
        """The server's `vllm_config`, with its `model_config`, whose `dtype` is one of torch's.

        Raises:
            ValueError: the server has no development endpoints.
        """
        url = f"{self.base_url}/server_info"
        info = server_info(self.session.get(url, params={"config_format": "json"}))
        dtype = info.field("vllm_config", "model_config", "dtype", kind=str)
        if not isinstance(getattr(torch, dtype.removeprefix("torch."), None), torch.dtype):
            raise info.error(f"has {ascii(dtype)[:80]} for vllm_config.model_config.dtype, no dtype of torch's")
        config: dict[str, Any] = info.value["vllm_config"]
        if "device_config" in config:
            info.field("vllm_config", "device_config", kind=dict)
        return config

    def _get(self, url: str, **kwargs: Any) -> dict[str, Any]:
        answer = Answer.of(self.session.get(url, **kwargs), "the served models were")
        served_models(answer)
        return answer.value

    def _post(self, url: str, **kwargs: Any) -> dict[str, Any]:
        answer = Answer.of(self.session.post(url, **kwargs), "completions were")
        if url.endswith("/v1/completions"):
            asked = kwargs["json"]
            check_sampled(answer, len(asked["prompt"]) * asked["n"])
        return answer.value
