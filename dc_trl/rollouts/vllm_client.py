# SPDX-License-Identifier: Apache-2.0
"""TRL's client of a vLLM server, with answers that are looked at and redirects that are refused."""

from typing import Any

from trl.generation.vllm_client import VLLMClient

from dc_trl.rollouts.server_answers import Answer, answer_error, check_sampled, refuse_redirects, served_models
from dc_trl.rollouts.vllm_server import PatientAdapter, first_answer


class CheckedClient(VLLMClient):
    """TRL's `VLLMClient`: what it reads of an answer is there, or the error names the address, and what came.

    Seams of TRL 1.16 used: `check_server`, `_get` and `_post` (replaced), `session`, `base_url`.

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
