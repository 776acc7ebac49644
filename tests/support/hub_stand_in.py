# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server that the real `huggingface_hub` client takes for the Hub: model repositories, kept in memory.

It answers what the client asks when it makes a repository, uploads a folder and loads from it. Start the client's
process with `HubStandIn.environment`: `HF_ENDPOINT` is read when `huggingface_hub` is imported. Git LFS carries large
files; Xet, a protocol of the Hub's own, is switched off.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import ModelCard

TOKEN = "hf_of_the_stand_in"
USER = "tester"
LFS_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".parquet"}


@dataclass
class Commit:
    """A commit: message, id, and every file of the repository after it."""

    message: str
    oid: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """A model repository with one branch."""

    commits: list[Commit] = field(default_factory=lambda: [Commit("initial commit", "0" * 40, {})])

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the newest commit."""
        return self.commits[-1].files

    def at(self, revision: str) -> Commit:
        """The commit of a revision: `main` or a commit id."""
        for commit in reversed(self.commits):
            if revision in ("main", commit.oid):
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class Refusal(Exception):
    """Answers a request with an error: status, message, and the code by which the client tells errors apart."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message} | body


class HubStandIn:
    """The server, from `__enter__` to `__exit__`.

    Attributes:
        url: its address.
        repositories: by id.
        requests: (method, path) of each request, in order.
        refuse: path fragment → (status, message) for requests to be refused.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.refuse: dict[str, tuple[int, str]] = {}
        self.lock = threading.Lock()
        self._large: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubStandIn":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str = TOKEN) -> dict[str, str]:
        """Environment variables of a client: address, token, a cache of its own under `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> tuple[bytes, dict[str, str]]:
        """The answer to a request: content and headers. Raises `Refusal`."""
        self.requests.append((method, path))
        for fragment, (status, message) in self.refuse.items():
            if fragment in path:
                raise Refusal(status, message)
        if path.startswith("/lfs/"):  # as signed storage addresses do, without the token
            return self._store(path.removeprefix("/lfs/"), body), {}
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "Invalid credentials in Authorization header")
        if method in ("GET", "HEAD") and "/resolve/" in path:
            return self._file(*path[1:].split("/resolve/"))
        routes: dict[tuple[str, str], Callable[..., Any]] = {
            ("GET", "/api/whoami-v2"): lambda _: {"name": USER, "type": "user", "orgs": []},
            ("POST", "/api/repos/create"): self._create,
            ("POST", "/api/validate-yaml"): _validate_card,
        }
        if (method, path) in routes:
            return _json(routes[method, path](json.loads(body or b"{}"))), {}
        if method == "POST" and path.endswith(".git/info/lfs/objects/batch"):
            return _json(self._batch(json.loads(body))), {}
        if path.startswith("/api/models/"):
            return _json(self._model(method, path.removeprefix("/api/models/").split("/"), body)), {}
        raise Refusal(404, f"the stand-in has no {method} {path}")

    def _repository(self, name: str) -> Repository:
        if name not in self.repositories:
            raise Refusal(404, f"Repository {name} not found", "RepoNotFound")
        return self.repositories[name]

    def _create(self, asked: dict[str, Any]) -> dict[str, str]:
        name = f"{asked['organization'] or USER}/{asked['name']}"
        if name in self.repositories:
            raise Refusal(409, "You already created this model repo", url=f"{self.url}/{name}")
        self.repositories[name] = Repository()
        return {"url": f"{self.url}/{name}"}

    def _model(self, method: str, parts: list[str], body: bytes) -> Any:
        name, action = "/".join(parts[:2]), (parts[2:] or ["revision"])[0]
        repository = self._repository(name)
        commit = repository.at(parts[3] if len(parts) > 3 else "main")
        if (method, action) == ("GET", "revision"):
            siblings = [{"rfilename": path} for path in commit.files]
            return {"id": name, "sha": commit.oid, "private": False, "tags": [], "siblings": siblings}
        if (method, action) == ("GET", "tree"):
            folder = "/".join(parts[4:])
            found = [path for path in commit.files if PurePosixPath(path).is_relative_to(folder or ".") or not folder]
            if not found:
                raise Refusal(404, f"{folder} does not exist on main", "EntryNotFound")
            return [{"type": "file", "path": p, **_blob(commit.files[p])} for p in found]
        if (method, action) == ("POST", "preupload"):
            return {"files": [self._mode(commit, asked["path"]) for asked in json.loads(body)["files"]]}
        if (method, action) == ("POST", "commit"):
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        raise Refusal(404, f"the stand-in has no {method} {action} of a model")

    def _mode(self, commit: Commit, path: str) -> dict[str, Any]:
        mode = "lfs" if PurePosixPath(path).suffix in LFS_SUFFIXES else "regular"
        oid = _blob(commit.files[path])["oid"] if path in commit.files and mode == "regular" else None
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = [{"oid": each["oid"], "size": each["size"]} for each in asked["objects"]]
        for each in objects:
            if each["oid"] not in self._large:
                each["actions"] = {"upload": {"href": f"{self.url}/lfs/{each['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def _store(self, oid: str, content: bytes) -> bytes:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(422, "the content does not have the announced sha256")
        self._large[oid] = content
        return b""

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        repository = self.repositories[name]
        files = dict(repository.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self._large[value["oid"]]
            else:
                raise Refusal(400, f"the stand-in does not know the operation {line['key']}")
        message = lines[0]["value"]["summary"]
        oid = hashlib.sha1(f"{len(repository.commits)} {message}".encode()).hexdigest()
        repository.commits.append(Commit(message, oid, files))
        return {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None}

    def _file(self, name: str, place: str) -> tuple[bytes, dict[str, str]]:
        revision, _, path = place.partition("/")
        commit = self._repository(name).at(revision)
        if path not in commit.files:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        blob = _blob(commit.files[path])
        return commit.files[path], {"ETag": f'"{blob["oid"]}"', "X-Repo-Commit": commit.oid}


def _validate_card(asked: dict[str, Any]) -> dict[str, Any]:
    """The Hub's check of a card's header, as far as this package goes: YAML, and what `model-index` must have."""
    errors: list[str] = []
    try:
        for model in ModelCard(asked["content"]).data.to_dict().get("model-index", []):
            errors += [] if isinstance(model.get("name"), str) else ['"model-index[0].name" must be a string']
            for result in model["results"]:
                parts = [("task", result["task"], {"type"}), ("dataset", result["dataset"], {"name", "type"})]
                parts += [("metrics", metric, {"type", "value"}) for metric in result["metrics"]]
                errors += [
                    f"model-index: {name} lacks {need - set(part)}" for name, part, need in parts if need - set(part)
                ]
    except (yaml.YAMLError, ValueError, KeyError) as error:
        errors.append(repr(error))
    if errors:
        raise Refusal(400, "Invalid metadata", errors=[{"message": error} for error in errors], warnings=[])
    return {"errors": [], "warnings": []}


def _blob(content: bytes) -> dict[str, Any]:
    return {"oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), "size": len(content)}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, extra = 200, {}
        try:
            with self.hub.lock:
                path = unquote(urlsplit(self.path).path)
                content, extra = self.hub.answer(self.command, path, self.headers, body)
        except Refusal as refusal:
            status, content = refusal.status, _json(refusal.body)
            extra = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)} if refusal.code else {}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **extra}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: `HubStandIn.requests` has them."""
