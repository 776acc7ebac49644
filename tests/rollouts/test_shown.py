# SPDX-License-Identifier: Apache-2.0
"""The rules of what may be shown of a configuration: what is allowed, and what is forbidden."""

from pathlib import Path
from typing import Any

import pytest
import requests
from transformers import IntervalStrategy

from dc_trl.rollouts.shown import HIDDEN, check_address, mark, shown, shown_address, without_secrets

TOKEN = "hf_" + "q" * 34


def test_numbers_switches_and_known_words_are_shown() -> None:
    given = {
        "quantization": "fp8",
        "kv_cache_dtype": "fp8",
        "enforce_eager": True,
        "max_model_len": 4096,
        "seed": None,
    }
    assert shown("vllm_engine_kwargs", given) == given
    assert mark("vllm_engine_kwargs", given) is None
    assert shown("lr_scheduler_type", IntervalStrategy.STEPS) == "steps"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hf_token", TOKEN),
        ("download_dir", "/home/someone/models"),
        ("anything", "word"),
        ("quantization", TOKEN),  # too long for a word
        ("quantization", "two words"),
        ("quantization", "a\nb"),
        ("anything", b"bytes"),
        ("anything", object()),
    ],
)
def test_all_else_is_hidden(name: str, value: Any) -> None:
    assert shown(name, value) == HIDDEN
    nested = {"hf_overrides": {"list": [{name: value}, 0.5], "quant_method": "awq"}}
    assert shown("vllm_engine_kwargs", nested) == {
        "hf_overrides": {"list": [{name: HIDDEN}, 0.5], "quant_method": "awq"}
    }


def test_hidden_settings_are_told_apart_but_for_their_secrets() -> None:
    first = mark("kwargs", {"download_dir": "/one", "hf_token": TOKEN})
    assert first == mark("kwargs", {"download_dir": "/one", "hf_token": "another"})
    assert first is not None and first != mark("kwargs", {"download_dir": "/two", "hf_token": TOKEN})


@pytest.mark.parametrize(
    "name",
    ["token", "hub_token", "HF-TOKEN", "use_auth_token", "api_key", "openai_apikey", "aws_secret_access_key"]
    + ["password", "db_password", "client_secret", "credentials", "Authorization", "cookie"],
)
def test_texts_under_the_name_of_a_secret_are_no_part_of_the_whole(name: str) -> None:
    assert without_secrets(name, TOKEN) == HIDDEN
    assert without_secrets("any", {"a": [{name: TOKEN}]}) == {"a": [{name: HIDDEN}]}
    assert (
        without_secrets(name, None) is None and without_secrets(name, "") == "" and without_secrets(name, True) is True
    )


@pytest.mark.parametrize("name", ["log_tokens", "include_num_input_tokens_seen", "tokenizer", "monkey", "author"])
def test_other_names_stay(name: str) -> None:
    assert without_secrets(name, "no") == "no"


def test_the_whole_keeps_its_types_and_loses_credentials_of_addresses() -> None:
    kept = object()
    assert without_secrets("any", (kept, 1, "text")) == (kept, 1, "text")
    assert (
        without_secrets("proxy", f"http://me:{TOKEN}@host:1/x, https://{TOKEN}@other")
        == "http://host:1/x, https://other"
    )


@pytest.mark.parametrize(
    ("address", "seen"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        (f"http://me:{TOKEN}@host:1/path?key={TOKEN}#{TOKEN}", "http://host:1"),
        (f"me:{TOKEN}@host:1", "host:1"),
        (f"http://me:p@{TOKEN}@[::1]:8000/", "http://[::1]:8000"),
        (f"http://host/?to=x://{TOKEN}@y", "http://host"),
    ],
)
def test_of_an_address_host_and_port_are_shown(address: str, seen: str) -> None:
    assert shown_address(address) == seen


def test_an_address_with_credentials_is_refused_without_saying_them() -> None:
    for address in (f"http://me:{TOKEN}@host:1", f"{TOKEN}@host", f"https://me:x@{TOKEN}@host/path"):
        with pytest.raises(ValueError, match="`name` has a user or password.*~/.netrc") as raised:
            check_address("name", address)
        assert TOKEN not in str(raised.value)
    for address in ("http://host:1/a@b", "host", "", "0.0.0.0", "http://[::1]:1"):
        check_address("name", address)


def test_what_it_advises_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine host login me password word")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    request = requests.Session().prepare_request(requests.Request("GET", "http://host:8000/health"))
    assert request.headers["Authorization"] == requests.auth._basic_auth_str("me", "word")
