# SPDX-License-Identifier: Apache-2.0
"""What may come from outside and must neither act nor stop anything: texts, JSON, benchmark results, log values."""

import json
from typing import Any

DEEP = "[" * 100_000 + "]" * 100_000
"""JSON that takes the stack of parsers: one of them ends the process."""

BAD_LINES: dict[str, tuple[bytes, str]] = {
    "nested": (b'{"step": 1, "a": %s}' % DEEP.encode(), "nested deeper than 100 levels"),
    "nested a little": (b'{"step": 1, "a": %s}' % (b"[" * 100 + b"]" * 100), "nested deeper than 100 levels"),
    "no JSON": (b"not JSON", "Expecting value"),
    "cut off": (b'{"step": 1', "Expecting ',' delimiter"),
    "invalid UTF-8": (b'{"step": 1, "a": "\xff\xfe"}', "can't decode byte 0xff"),
    "Latin-1": (b'{"step": 1, "a": "caf\xe9"}', "can't decode byte 0xe9"),
    "zeros": (b"\x00" * 8, "Expecting value"),
    "a number of 5000 digits": (b'{"step": 1, "a": %s}' % (b"9" * 5000), "Exceeds the limit"),
}
"""Lines that are no JSON to be read, by name, each with the reason that is given."""

LARGE = [1.7976931348623157e308, 1.7e308, -1.7e308, 1e300, 10**308]
"""Finite numbers whose sum, difference or multiple is none."""

RESULT: dict[str, Any] = {
    "benchmark": "aime24",
    "title": "AIME24",
    "dataset": "HuggingFaceH4/aime_2024",
    "config": None,
    "split": "train",
    "metric": "avg@32",
    "limit": None,
    "temperature": 0.7,
    "top_p": 1.0,
    "max_tokens": 32768,
    "engine": "vllm",
    "precision": "fp8",
    "settings": "abc",
    "mean": 0.5,
    "stderr": 0.25,
    "problems": 30,
    "time": "2026-11-21T10:00:00+00:00",
}
"""A benchmark result as it is recorded, as far as it is read again."""

BAD_RESULTS: dict[str, tuple[bytes, str]] = {
    **BAD_LINES,
    "a list": (b"[1]", "it is of type list, not an object"),
    "null": (b"null", "it is of type NoneType, not an object"),
    "another line": (b'{"step": 1}', "it has no 'benchmark'"),
    **{
        f"{name} is {value!r:.20}": (json.dumps(RESULT | {name: value}).encode(), f"its '{name}' is .*, not ")
        for name, value in (
            ("benchmark", ["aime24"]),
            ("settings", {}),
            ("title", "\ud800"),
            ("dataset", "a\udfff"),
            ("config", 3),
            ("metric", None),
            ("time", 20261121),
            ("mean", "0.5"),
            ("mean", float("nan")),
            ("mean", 1e308),
            ("mean", -0.5),
            ("mean", True),
            ("stderr", float("inf")),
            ("stderr", []),
            ("problems", 1.5),
            ("problems", 10**400),
            ("limit", "10"),
            ("temperature", None),
            ("temperature", 10**400),
            ("top_p", "1.0"),
            ("max_tokens", float("inf")),
        )
    },
    **{
        f"without {name}": (
            json.dumps({key: value for key, value in RESULT.items() if key != name}).encode(),
            f"it has no '{name}'",
        )
        for name in RESULT
    },
}
"""Lines that are no benchmark result, by name, each with the reason that is given."""
