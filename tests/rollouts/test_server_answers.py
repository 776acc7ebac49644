# SPDX-License-Identifier: Apache-2.0
"""What a server may answer to each question: the error says the address, what was asked, what came and the way out."""

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from accelerate import Accelerator
from hostile import DEEP
from stub_server import Stub, vllm_stub
from tiny import tiny_model, tiny_tokenizer

from dc_trl.commands.evaluate.engines import Completion, Request, Sampling
from dc_trl.commands.evaluate.vllm_engines import ServerEngine
from dc_trl.commands.usage import UsageError
from dc_trl.rollouts.engines.vllm_server_nccl import ENGINE
from dc_trl.rollouts.server_answers import ServerAnswerError, refuse_redirects
from dc_trl.rollouts.vllm_disk import VLLMDiskGeneration
from dc_trl.rollouts.vllm_server import PatientAdapter, check_logprobs_mode, reload_weights

TOKENS = ["token_id:5", "token_id:6"]
LOGPROBS = {"tokens": TOKENS, "token_logprobs": [-0.5, -0.25], "top_logprobs": [{TOKENS[0]: -0.5}, None]}
CHOICE = {"text": "7", "finish_reason": "stop", "token_ids": [5, 6], "prompt_token_ids": [1, 2], "logprobs": LOGPROBS}
CONFIG = {"model_config": {"logprobs_mode": "processed_logprobs", "dtype": "torch.float32"}}
MODEL = {"id": "m", "root": "/m", "max_model_len": 400}
SOUND: dict[str, Any] = {
    "/health": b"",
    "/server_info": {"vllm_config": CONFIG | {"device_config": {"device_type": "cpu"}}},
    "/v1/models": {"data": [MODEL]},
    "/v1/completions": {"choices": [CHOICE], "usage": {"completion_tokens": 2}},
    "/collective_rpc": {"results": [None]},
    "/reset_prefix_cache": {"success": True},
}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    with vllm_stub(monkeypatch, SOUND) as server:
        yield server


def mode(url: str, folder: Path) -> None:
    check_logprobs_mode(url, timeout=2)


def reload(url: str, folder: Path) -> None:
    session = requests.Session()
    session.mount("http://", PatientAdapter(1.0))
    refuse_redirects(session)
    reload_weights(session, url, Path("/checkpoint"))


def train(url: str, folder: Path) -> Any:
    return VLLMDiskGeneration(
        tiny_model(),
        Accelerator(cpu=True),
        tiny_tokenizer(),
        mode="server",
        server_base_url=url,
        server_timeout=1.0,
        max_completion_length=4,
        sync_dir=folder,
    )


def sample(url: str, folder: Path) -> Any:
    return train(url, folder).generate([[1, 2]], None, num_generations=1)


def sync(url: str, folder: Path) -> None:
    train(url, folder).sync_weights()


def evaluate(url: str, folder: Path) -> list[Any]:
    engine = ServerEngine(url, "m", Sampling(), timeout=1.0)
    return list(engine.complete([Request([1, 2], 0)], max_tokens=4))


# Who asks, and which path.
QUESTIONS: dict[str, tuple[Callable[[str, Path], Any], str]] = {
    "log-probs' mode": (mode, "/server_info"),
    "reload": (reload, "/collective_rpc"),
    "reset": (reload, "/reset_prefix_cache"),
    "health, to train": (train, "/health"),
    "models, to train": (train, "/v1/models"),
    "configuration, to train": (train, "/server_info"),
    "completions, to train": (sample, "/v1/completions"),
    "sync, to train": (sync, "/collective_rpc"),
    "models, to evaluate": (evaluate, "/v1/models"),
    "completions, to evaluate": (evaluate, "/v1/completions"),
}

# Answers that are wrong whatever was asked, each with what the message says of it.
NEVER: dict[str, tuple[tuple[Any, ...], str]] = {
    "a page": ((200, b"<!doctype html><title>Welcome", {"Content-Type": "text/html"}), r"\(text/html\).*is not JSON"),
    "half an object": ((200, b'{"choices": ['), "is not JSON"),
    "nested": ((200, DEEP.encode()), "is not JSON"),
    "no UTF-8": ((200, b'{"a": "\xff"}'), "is not JSON"),
    "escape codes": ((200, b"\x1b[2J\x07"), r"'\\x1b\[2J\\x07'.*is not JSON"),
    "a list": ((200, []), r"'\[\]'.*no JSON object"),
    "a text": ((200, "ok"), "no JSON object"),
    "a number": ((200, 3), "no JSON object"),
    "null": ((200, None), "no JSON object"),
    "an empty object": ((200, {}), "has no "),
    "an error": ((200, {"error": "busy", "data": None, "choices": None, "results": None, "success": None}), "has "),
    "refused": ((400, {"error": "no"}), "400"),
    "needs a password": ((401, b"<html>log in", {"Content-Type": "text/html"}), "401"),
    "nothing": ((204, b""), "204"),
}


# Of a server's health the status is all there is to read.
@pytest.mark.parametrize(
    ("question", "name"),
    [(q, name) for name, (reply, _) in NEVER.items() for q in QUESTIONS if reply[0] != 200 or "health" not in q],
)
def test_what_is_never_an_answer(
    stub: Stub, tmp_path: Path, question: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    ask, path = QUESTIONS[question]
    stub.answers[path], said = NEVER[name]
    with pytest.raises((ConnectionError, RuntimeError, UsageError), match=f"(?s){stub.url}.*{said}") as caught:
        ask(stub.url, tmp_path)
    message = str(caught.value)
    assert len(message) < 1500 and message.isprintable()
    assert re.search("Check that the address is|Start the server with|Keep the server to this run", message)
    if not isinstance(caught.value, RuntimeError):  # which name the endpoint that refused
        assert f"{stub.url}{path}" in message and re.search("(was|were) asked for", message)


def changed(answer: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """A copy with another value at the path; `...` removes it."""
    answer = copy.deepcopy(answer)
    *way, last = path
    holder = answer
    for key in way:
        holder = holder[key]
    if value is ...:
        del holder[last]
    else:
        holder[last] = value
    return answer


_CHOICE: tuple[str | int, ...] = ("choices", 0)
_LOGPROBS = (*_CHOICE, "logprobs")
# What is changed in the sound answer to each question and to what, and what the message says; `...` is nothing.
WRONG: dict[str, list[tuple[tuple[str | int, ...], Any, str]]] = {
    "log-probs' mode": [
        (("vllm_config",), ..., "has no vllm_config.model_config"),
        (("vllm_config",), "VllmConfig(…)", "has no vllm_config.model_config"),
        (("vllm_config", "model_config", "logprobs_mode"), ..., "has no vllm_config.*logprobs_mode"),
        (("vllm_config", "model_config", "logprobs_mode"), 3, "has 3 for .*logprobs_mode, not text"),
    ],
    "reload": [
        (("results",), [], "has the results of no worker"),
        (("results",), "ok", "has 'ok' for results, not a list"),
    ],
    "reset": [
        (("success",), "yes", "has 'yes' for success, not true or false"),
    ],
    "models, to train": [
        (("data",), [], "names no model"),
        (("data", 0), "m", "has no data.0.id"),
        (("data", 0, "id"), None, "has None for data.0.id, not text"),
        (("data", 0, "parent"), "base", "names no model"),
    ],
    "configuration, to train": [
        (("vllm_config", "model_config", "dtype"), ..., "has no vllm_config.model_config.dtype"),
        (("vllm_config", "model_config", "dtype"), "ops", "no dtype of torch's"),
        (("vllm_config", "device_config"), [], "for vllm_config.device_config, not an object"),
    ],
    "completions, to train": [
        (("choices",), [], "has 0 choices instead of 1"),
        (("choices",), [CHOICE] * 2, "has 2 choices instead of 1"),
        (_CHOICE, "7", "has '7' for choices.0, not an object"),
        ((*_CHOICE, "token_ids"), ..., "has no choices.0.token_ids"),
        ((*_CHOICE, "token_ids"), None, "has None for choices.0.token_ids, not a list"),
        ((*_CHOICE, "token_ids"), ["5", "6"], "other values than token ids in choices.0.token_ids"),
        ((*_CHOICE, "prompt_token_ids"), ..., "has no choices.0.prompt_token_ids"),
        (_LOGPROBS, [], "has no choices.0.logprobs.tokens"),
        ((*_LOGPROBS, "token_logprobs"), ..., "has no choices.0.logprobs.token_logprobs"),
        ((*_LOGPROBS, "token_logprobs"), [-0.5], "as many entries in choices.0.logprobs"),
        ((*_LOGPROBS, "token_logprobs", 1), None, "other values than numbers in choices.0.logprobs"),
        ((*_LOGPROBS, "tokens", 0), "seven", "tokens in choices.0.logprobs that are no `token_id:N`"),
        ((*_LOGPROBS, "tokens", 0), f"token_id:{'9' * 5000}", "that are no `token_id:N`"),
        ((*_LOGPROBS, "top_logprobs", 0), [1], "other values than objects in .*top_logprobs"),
        ((*_LOGPROBS, "top_logprobs", 0), {"x": -1}, "tokens in choices.0.logprobs that are no"),
        ((*_LOGPROBS, "top_logprobs", 0), {TOKENS[0]: "x"}, "other values than numbers"),
    ],
    "models, to evaluate": [
        (("data",), {}, "has {} for data, not a list"),
        (("data", 0, "id"), ..., "has no data.0.id"),
        (("data", 0, "max_model_len"), ..., "does not say its max_model_len .it says None"),
        (("data", 0, "max_model_len"), "400", "does not say its max_model_len .it says '400'"),
        (("data", 0, "max_model_len"), 0, "does not say its max_model_len .it says 0"),
    ],
    "completions, to evaluate": [
        (("choices",), [], "has 0 choices instead of 1"),
        ((*_CHOICE, "text"), ..., "has no choices.0.text"),
        ((*_CHOICE, "text"), None, "has None for choices.0.text, not text"),
        ((*_CHOICE, "finish_reason"), None, "has None for choices.0.finish_reason, not text"),
        ((*_CHOICE, "finish_reason"), "abort", "ended it with 'abort', not with stop or length"),
        (("usage",), ..., "has no usage.completion_tokens"),
        (("usage",), None, "has no usage.completion_tokens"),
        (("usage", "completion_tokens"), 1.5, "has 1.5 for usage.completion_tokens, not a whole number"),
    ],
}
_WRONG = [(question, *case) for question, cases in WRONG.items() for case in cases]


@pytest.mark.parametrize(
    ("question", "path", "value", "said"), _WRONG, ids=[f"{case[0]}: {case[3]}" for case in _WRONG]
)
def test_what_an_answer_may_lack(
    stub: Stub, tmp_path: Path, question: str, path: tuple[str | int, ...], value: Any, said: str
) -> None:
    ask, place = QUESTIONS[question]
    stub.answers[place] = (200, changed(SOUND[place], path, value))
    with pytest.raises((ConnectionError, UsageError), match=f"(?s){stub.url}.*{said}") as caught:
        ask(stub.url, tmp_path)
    assert len(str(caught.value)) < 1500


def test_sound_answers_pass(stub: Stub, tmp_path: Path) -> None:
    for ask, _ in QUESTIONS.values():
        ask(stub.url, tmp_path)
    assert evaluate(stub.url, tmp_path) == [(0, Completion("7", 2, False))]
    assert sample(stub.url, tmp_path) == ([[1, 2]], [[5, 6]], [[[-0.5], [-0.25]]], [[[5], [6]]])
    stub.answers["/reset_prefix_cache"] = (200, b"")  # vLLM before 0.26
    reload(stub.url, tmp_path)


def test_completions_without_log_probs_are_left_to_the_caller(stub: Stub, tmp_path: Path) -> None:
    stub.answers["/v1/completions"] = (200, changed(SOUND["/v1/completions"], _LOGPROBS, None))
    assert sample(stub.url, tmp_path)[2] is None


# Redirects


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308, 399])
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_redirect_is_not_followed(stub: Stub, tmp_path: Path, question: str, status: int) -> None:
    ask, path = QUESTIONS[question]
    with Stub({path: (200, body) for path, body in SOUND.items()}) as other:
        stub.answers[path] = (status, b"moved", {"Location": f"{other.url}{path}"})
        with pytest.raises((ConnectionError, UsageError)) as caught:
            ask(stub.url, tmp_path)
        assert other.asked == []
    message = str(caught.value)
    assert f"{stub.url}{path}" in message and f"status {status}" in message
    assert f"it points to '{other.url}{path}', and redirects are not followed" in message


def test_a_redirect_to_nowhere_is_an_error(stub: Stub, tmp_path: Path) -> None:
    stub.answers["/server_info"] = (304, b"")
    with pytest.raises(ServerAnswerError, match="status 304 .*it says not where to"):
        mode(stub.url, tmp_path)


def test_trls_own_client_follows_no_redirect_either(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    # Over NCCL, whose other end no machine without a GPU has.
    monkeypatch.setattr("dc_trl.rollouts.handover.handover_for", lambda *_: None)
    monkeypatch.setattr("dc_trl.rollouts.handover.hand_over", lambda *_: None)
    client = SimpleNamespace(session=requests.Session())
    trainer = SimpleNamespace(
        vllm_generation=SimpleNamespace(vllm_client=client), accelerator=Accelerator(cpu=True), model=tiny_model()
    )
    ENGINE.build(trainer, SimpleNamespace(sync_rounding="nearest"))
    with Stub({"/v1/completions": (200, {})}) as other:
        stub.answers["/v1/completions"] = (307, b"", {"Location": f"{other.url}/v1/completions"})
        with pytest.raises(ServerAnswerError, match="redirects are not followed"):
            client.session.post(f"{stub.url}/v1/completions", json={"prompt": "secret"})
        assert other.asked == []
