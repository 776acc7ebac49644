# SPDX-License-Identifier: Apache-2.0
"""vLLM as the engine of an evaluation: in this process, or behind an OpenAI-compatible server.

Sampling is truncated by `top_p` alone: the top_k and the like of a model's generation_config.json, which a vLLM server
applies to requests that are silent about them, are switched off.
"""

import importlib.util
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dc_trl.commands.evaluate.engines import Completion, Request, Sampling, longest_context, precision_label
from dc_trl.commands.usage import UsageError
from dc_trl.rollouts.shown import check_address, mark, shown

if TYPE_CHECKING:
    from dc_trl.rollouts.server_answers import Answer


@dataclass
class VLLMEngine:
    """vLLM in this process (`vllm.LLM`); each request has its own seed.

    Args:
        model: directory or Hub id.
        config: its transformers configuration.
        sampling: temperature and top_p.
        revision: of a Hub model.
        dtype: vLLM's option of that name.
        kwargs: more arguments of `vllm.LLM`, such as {"quantization": "fp8"}.
    """

    model: str
    config: Any
    sampling: Sampling
    revision: str | None = None
    dtype: str = "auto"
    kwargs: dict[str, Any] = field(default_factory=dict)
    name: str = "vllm"
    batch_size: int | None = None
    _llm: Any = None

    def __post_init__(self) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UsageError(
                "--engine vllm needs vLLM, which is not installed: pip install 'dc-trl[vllm]'; or use --engine server "
                "with a vLLM server elsewhere, or --engine transformers."
            )
        self.dtype = self.kwargs.get("dtype", self.dtype)
        if self.dtype == "auto" and str(self.config.dtype) == "torch.float32":
            raise UsageError(
                f"{self.model} is stored in float32, which vLLM would cast to what suits the device. Say what is to "
                "be evaluated: --dtype bfloat16, float16 or float32."
            )
        self.context = int(self.kwargs.get("max_model_len") or longest_context(self.config))
        arguments = shown("vllm_engine_kwargs", self.kwargs)
        self.precision = precision_label(self.config, self.dtype, arguments)
        self.options = {"dtype": self.dtype, "vllm_engine_kwargs": arguments}
        if hidden := mark("vllm_engine_kwargs", self.kwargs):  # or samples drawn otherwise would pass for the same
            self.options["vllm_engine_kwargs_mark"] = hidden

    def complete(self, requests: list[Request], max_tokens: int) -> Iterator[tuple[int, Completion]]:
        """As `Engine.complete`; vLLM starts at the first call."""
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self._llm is None:
            options: dict[str, Any] = {"max_model_len": self.context, "dtype": self.dtype, **self.kwargs}
            self._llm = LLM(self.model, revision=self.revision, **options)
        prompts: Any = [{"prompt_token_ids": request.prompt} for request in requests]
        parameters = [
            SamplingParams(
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                max_tokens=max_tokens,
                seed=request.seed,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for request in requests
        ]
        # `LLM.generate` returns when everything is done; here a sample is handed out when it is done.
        names = self._llm.enqueue(prompts, parameters, use_tqdm=False)
        places = {name.partition("-")[0]: place for place, name in enumerate(names)}  # without vLLM's random suffix
        while self._llm.llm_engine.has_unfinished_requests():
            for output in self._llm.llm_engine.step():
                if output.finished:
                    best = output.outputs[0]
                    truncated = _was_truncated(best.finish_reason)
                    yield places[output.request_id], Completion(best.text, len(best.token_ids), truncated)


@dataclass
class ServerEngine:
    """An OpenAI-compatible vLLM server; each request has its own seed.

    What the server's weights are, only the server knows: its model's id and root are part of the record, no more.

    Args:
        base_url: such as http://127.0.0.1:8000.
        model: to choose among several served models, by id or root; the only one is taken whatever its name.
        sampling: temperature and top_p.
        concurrency: requests under way at once.
        precision: a word for the record.
        timeout: seconds after which a server that is gone is given up; one that was never there is at once.
    """

    base_url: str
    model: str
    sampling: Sampling
    concurrency: int = 256
    precision: str = "as served"
    timeout: float = 60.0
    name: str = "server"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        import requests

        from dc_trl.rollouts.server_answers import refuse_redirects
        from dc_trl.rollouts.vllm_server import PatientAdapter

        try:
            check_address("--server_base_url", self.base_url)
        except ValueError as error:
            raise UsageError(str(error)) from error
        self.base_url = self.base_url.rstrip("/").removesuffix("/v1")
        self._session = requests.Session()
        refuse_redirects(self._session)
        adapter = PatientAdapter(self.timeout)
        adapter.init_poolmanager(1, self.concurrency)  # or connections beyond 64 are closed after each request
        served = self._ask_for_models()
        self._session.mount(self.base_url, adapter)
        named = [card for card in served if self.model in (card["id"], card.get("root"))] or served
        if len(named) != 1:
            names = ", ".join(card["id"] for card in served)
            raise UsageError(f"the server serves {names}: set --model_name_or_path to one of them.")
        self._served = named[0]["id"]
        context = named[0].get("max_model_len")
        if type(context) is not int or context < 1:
            raise UsageError(
                f"the server at {self.base_url} does not say its max_model_len (it says {ascii(context)[:80]}): it "
                "must be vLLM's."
            )
        self.context = context
        self.options = {"served": self._served, "root": named[0].get("root")}

    def _ask_for_models(self) -> list[dict[str, Any]]:
        import requests

        from dc_trl.rollouts.server_answers import Answer, ServerAnswerError, served_models

        try:
            response = self._session.get(f"{self.base_url}/v1/models", timeout=self.timeout)
            return served_models(Answer.of(response, "the served models were"))
        except ServerAnswerError as error:
            raise UsageError(f"{error} The address is --server_base_url.") from error
        except requests.RequestException as error:
            raise UsageError(
                f"no vLLM server answers at {self.base_url} ({error}). Start one with `python -m "
                "vllm.entrypoints.openai.api_server --model MODEL`, and check --server_base_url."
            ) from error

    def complete(self, requests: list[Request], max_tokens: int) -> Iterator[tuple[int, Completion]]:
        """As `Engine.complete`.

        Raises:
            ConnectionError: the server is gone, refused a request, or answered something else.
        """
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Completion | Exception]] = queue.SimpleQueue()
        stopped = threading.Event()

        def work() -> None:
            """Draws what waits, one after the other, until nothing does or the caller has gone."""
            while not stopped.is_set():
                try:
                    place = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((place, self._draw(requests[place], max_tokens)))
                except Exception as error:
                    done.put((place, error))

        for place in range(len(requests)):
            waiting.put(place)
        try:
            for _ in range(min(self.concurrency, len(requests))):
                # Daemons: a pool's threads would keep an interrupted process until every answer under way is there.
                threading.Thread(target=work, daemon=True).start()
            for _ in requests:
                place, outcome = done.get()
                if isinstance(outcome, Exception):
                    raise outcome
                yield place, outcome
        finally:
            stopped.set()

    def _draw(self, request: Request, max_tokens: int) -> Completion:
        import requests

        from dc_trl.rollouts.server_answers import Answer

        body = {
            "model": self._served,
            "prompt": request.prompt,
            "max_tokens": max_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": request.seed,
            # Named, or the server takes the values of the model's generation_config.json.
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        try:
            response = self._session.post(f"{self.base_url}/v1/completions", json=body)
        except requests.RequestException as error:
            raise ConnectionError(f"the vLLM server at {self.base_url} failed: {error}") from error
        return _completion(Answer.of(response, "a completion was"))


def _completion(answer: "Answer") -> Completion:
    """The one completion of a `/v1/completions`.

    Raises:
        ServerAnswerError: it lacks what is read of it, or was not ended by its end or by the token limit.
    """
    count = len(answer.field("choices", kind=list))
    if count != 1:
        raise answer.error(f"has {count} choices instead of 1")
    text = answer.field("choices", 0, "text", kind=str)
    reason = answer.field("choices", 0, "finish_reason", kind=str)
    if reason not in ("stop", "length"):
        raise answer.error(f"ended it with {ascii(reason)[:80]}, not with stop or length")
    return Completion(text, answer.field("usage", "completion_tokens", kind=int), _was_truncated(reason))


def _was_truncated(finish_reason: str | None) -> bool:
    if finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a request with {finish_reason!r}: see its log for the reason.")
    return finish_reason == "length"
