# SPDX-License-Identifier: Apache-2.0
"""An HTTP server on loopback that answers what a test tells it to."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import pytest


class Stub(ThreadingHTTPServer):
    """Answers each path with `(status, body)` or `(status, body, headers)` from `answers`, or 404; keeps what came.

    A body that is not bytes is sent as JSON. Used in a `with` statement.
    """

    daemon_threads = True

    def __init__(self, answers: dict[str, tuple[Any, ...]] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = answers or {}
        self.asked: list[str] = []
        self.posted: list[tuple[str, bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        status, body, *headers = self.server.answers.get(path, (404, {}))
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers[0] if headers else {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        self.server.posted.append((self.path, self.rfile.read(int(self.headers.get("Content-Length", 0)))))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def vllm_stub(monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any]) -> Iterator[Stub]:
    """A server that gives these answers with status 200, for TRL's client, also where vLLM is not installed."""
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda: True)
    with Stub({path: (200, body) for path, body in answers.items()}) as stub:
        yield stub
