# SPDX-License-Identifier: Apache-2.0
"""What a server answers, looked at before anything counts on it.

At the address there may be a proxy, a login page, another program, or another version of vLLM. And a redirect would
send prompts to a host that nobody named, or count as a weight sync that never was: none is followed.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import requests

WAY_OUT = (
    "Check that the address is that of a vLLM server itself, not of a proxy, a login page or another program, and "
    "read the server's log."
)
_TOKEN = re.compile(r"token_id:\d{1,10}", re.ASCII)
_KINDS = {str: "text", int: "a whole number", bool: "true or false", list: "a list", dict: "an object"}


class ServerAnswerError(ConnectionError):
    """A server answered something else than was asked for. Names the address, what was asked, what came, a way out."""


def refuse_redirects(session: requests.Session) -> None:
    """Makes every request of a session that is answered with a redirect a `ServerAnswerError`."""
    session.hooks["response"].append(_refuse_redirect)


def _refuse_redirect(response: requests.Response, *_: Any, **__: Any) -> None:
    if 300 <= response.status_code < 400:
        target = response.headers.get("Location")
        where = f"it points to {ascii(target)[:200]}" if target else "it says not where to"
        raise answer_error(response, f"{where}, and redirects are not followed. Give the address of the server itself")


def answer_error(response: requests.Response, why: str) -> ServerAnswerError:
    """The error that an answer is; `why` ends in no full stop."""
    method, kind = response.request.method, response.headers.get("Content-Type", "no content type")
    body = ascii(response.text[:500]) if response.content else "nothing"
    return ServerAnswerError(
        f"{method} {response.url} was answered with status {response.status_code} ({ascii(kind)[1:-1][:80]}) and "
        f"{body}: {why}. {WAY_OUT}"
    )


@dataclass(frozen=True)
class Answer:
    """A JSON object that a server answered.

    Attributes:
        response: as it came.
        asked: what was asked for, with its verb: "the served models were".
        value: the object.
    """

    response: requests.Response
    asked: str
    value: dict[str, Any]

    @classmethod
    def of(cls, response: requests.Response, asked: str) -> Self:
        """The object in a response.

        Raises:
            ServerAnswerError: the status is not 200, or the body is no JSON object.
        """
        if response.status_code != 200:
            raise answer_error(response, f"{asked} asked for")
        try:
            value = json.loads(response.content)
        except (ValueError, RecursionError) as error:
            raise answer_error(response, f"{asked} asked for, and this is not JSON ({error})") from error
        if not isinstance(value, dict):
            raise answer_error(response, f"{asked} asked for, and this is no JSON object")
        return cls(response, asked, value)

    def field(self, *path: str | int, kind: type) -> Any:
        """A member of the object, of a kind that JSON has.

        Args:
            *path: names, and places in lists.
            kind: `str`, `int`, `bool`, `list` or `dict`.

        Raises:
            ServerAnswerError: it is not there, or of another kind.
        """
        value: Any = self.value
        name = ".".join(map(str, path))
        for key in path:
            if isinstance(value, dict) and key in value:
                value = value[key]
            elif isinstance(value, list) and isinstance(key, int) and key < len(value):
                value = value[key]
            else:
                raise self.error(f"has no {name}")
        if type(value) is not kind:
            raise self.error(f"has {ascii(value)[:80]} for {name}, not {_KINDS[kind]}")
        return value

    def error(self, why: str) -> ServerAnswerError:
        """What is wrong with the answer, in words that go on from "the answer"."""
        return answer_error(self.response, f"{self.asked} asked for, and the answer {why}")


def served_models(answer: Answer) -> list[dict[str, Any]]:
    """The models of a `/v1/models`, without adapters: one or more, each with its `id`.

    Raises:
        ServerAnswerError: it is none.
    """
    for place in range(len(answer.field("data", kind=list))):
        answer.field("data", place, "id", kind=str)
    served = [card for card in answer.value["data"] if not card.get("parent")]
    if not served:
        raise answer.error("names no model")
    return served


def check_sampled(answer: Answer, count: int) -> None:
    """Checks the completions that TRL reads from a `/v1/completions` with token ids and log-probs.

    Args:
        answer: the server's.
        count: completions that were asked for.

    Raises:
        ServerAnswerError: there are more or fewer, or one lacks what is read of it.
    """
    choices = answer.field("choices", kind=list)
    if len(choices) != count:
        raise answer.error(f"has {len(choices)} choices instead of {count}")
    for place in range(count):
        choice = answer.field("choices", place, kind=dict)
        answer.field("choices", place, "prompt_token_ids", kind=list)
        tokens = answer.field("choices", place, "token_ids", kind=list)
        if not _kinds(tokens) <= {int}:
            raise answer.error(f"has other values than token ids in choices.{place}.token_ids")
        # None of all of them: the caller knows whether it can do without.
        if choice.get("logprobs") is not None or choices[0].get("logprobs") is not None:
            _check_logprobs(answer, place, len(tokens))


def _check_logprobs(answer: Answer, place: int, length: int) -> None:
    path = ("choices", place, "logprobs")
    columns = [answer.field(*path, name, kind=list) for name in ("tokens", "token_logprobs", "top_logprobs")]
    name = f"choices.{place}.logprobs"
    if {len(column) for column in columns} != {length}:
        raise answer.error(f"has not as many entries in {name} as the completion has tokens, {length}")
    # By the kinds and the different tokens that there are: a batch has hundreds of thousands of entries.
    tokens, logps, tops = columns
    if not _kinds(tops) <= {dict, type(None)}:
        raise answer.error(f"has other values than objects in {name}.top_logprobs")
    others = [top for top in tops if top is not None]
    if not (_kinds(tokens) <= {str} and all(map(_TOKEN.fullmatch, set(tokens).union(*others)))):
        raise answer.error(f"has tokens in {name} that are no `token_id:N`")
    if not _kinds(chain(logps, *(top.values() for top in others))) <= {int, float}:
        raise answer.error(f"has other values than numbers in {name}")


def _kinds(values: Iterable[Any]) -> set[type]:
    return set(map(type, values))
