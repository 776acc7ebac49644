# SPDX-License-Identifier: Apache-2.0
"""The engines of `dc-trl evaluate`, each sampling a real policy whose score is known: it answers 7 to everything."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from processes import run_python
from tiny import OFF_TILE, save_tiny_policy, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoTokenizer
from vllm_process import VLLMServer

from dc_trl.commands.cli import main
from dc_trl.commands.evaluate.engines import Completion, Engine, Request, Sampling, TransformersEngine, precision_label
from dc_trl.commands.evaluate.vllm_engines import ServerEngine, VLLMEngine
from dc_trl.commands.usage import UsageError
from dc_trl.records.results import read_results

PROBLEMS = [("3 + 4", 7), ("2 + 2", 4), ("9 - 2", 7)]  # so two of three are answered rightly
ANSWER = "Answer: 7"
# After this and at this temperature the policy is far from sure of its answer: different seeds, different texts.
STRANGE = "why, zebra, why "
HOT = Sampling(temperature=2.0)  # vLLM's server takes no more


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy taught to answer 7, with a generation config that would make its sampling greedy."""
    tokenizer, model = tiny_tokenizer(), tiny_model(**OFF_TILE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    texts = [f"{a} {sign} {b}? {ANSWER}<eos>" for a in range(0, 10, 2) for sign in "+-" for b in range(0, 10, 3)]
    texts += [f"{problem}? {ANSWER}<eos>" for problem, _ in PROBLEMS]
    ids = torch.tensor([tokenizer(text).input_ids for text in texts])
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.generation_config.update(do_sample=True, top_k=1, eos_token_id=tokenizer.eos_token_id)
    return save_tiny_policy(tmp_path_factory.mktemp("taught") / "policy", model, dtype="float32")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "sevens.jsonl"
    path.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in PROBLEMS))
    return path


@pytest.fixture(scope="module")
def server(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    server = VLLMServer(policy, tmp_path_factory.mktemp("server") / "server.log")
    try:
        yield server.start("--dtype", "float32", "--block-size", "32")
    finally:
        server.kill()


def arguments(policy: Path, data: Path, output: Path, *flags: str) -> list[str]:
    command = ["evaluate", "--model_name_or_path", str(policy), "--dataset", str(data), "--output_dir", str(output)]
    card = ["--model_card", str(output / "README.md")]
    return [*command, *card, "--prompt_template", "{problem}? ", "--max_tokens", "16", "--save_completions", *flags]


def check_result(output: Path, engine: str, precision: str) -> None:
    """Mean 2/3 and standard error √((1/9 + 4/9 + 1/9) / 2) / √3 = 1/3, and every text what the policy learnt."""
    (result,) = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert (result["engine"], result["precision"], result["truncated"]) == (engine, precision, 0.0)
    assert result["mean"] == pytest.approx(2 / 3) and result["stderr"] == pytest.approx(1 / 3)
    assert result["mean_tokens"] == len(ANSWER) + 1  # the end-of-sequence token
    (file,) = (output / "samples").glob("*.jsonl")
    texts = {json.loads(line)["completion"] for line in file.read_text().splitlines()[1:]}
    assert texts == {ANSWER}


def requests_of(policy: Path, seeds: list[int], prompt: str = "3 + 4? ") -> list[Request]:
    ids = AutoTokenizer.from_pretrained(policy)(prompt).input_ids
    return [Request(ids, seed) for seed in seeds]


def drawn(engine: Engine, requests: list[Request], max_tokens: int = 16) -> list[Completion]:
    return [completion for _, completion in sorted(engine.complete(requests, max_tokens), key=lambda pair: pair[0])]


def in_process(policy: Path, sampling: Sampling = HOT, **options: Any) -> TransformersEngine:
    config, tokenizer = AutoConfig.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    return TransformersEngine(str(policy), config, tokenizer, sampling, **options)


@pytest.mark.parametrize(("flags", "precision"), [([], "float32"), (["--precision", "int8"], "int8")])
def test_in_process(policy: Path, data: Path, tmp_path: Path, flags: list[str], precision: str) -> None:
    assert main(arguments(policy, data, tmp_path / "out", "--engine", "transformers", *flags)) == 0
    check_result(tmp_path / "out", "transformers", precision)


def test_a_killed_run_in_process_goes_on_to_the_same_result(
    policy: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--engine", "transformers", "--temperature", "2.0", "--batch_size", "3", "--samples", "5"]
    assert main(arguments(policy, data, tmp_path / "whole", *flags)) == 0
    complete, calls = TransformersEngine.complete, []

    def dying(self: TransformersEngine, requests: list[Request], max_tokens: int) -> Iterator[tuple[int, Completion]]:
        calls.append(len(requests))
        for index, completion in complete(self, requests, max_tokens):
            if len(calls) == 3 and index == 1:
                raise KeyboardInterrupt  # in the middle of a batch, one of it recorded
            yield index, completion

    monkeypatch.setattr(TransformersEngine, "complete", dying)
    monkeypatch.setattr("dc_trl.commands.evaluate.sampling._JUDGED_TOGETHER", 1)
    assert main(arguments(policy, data, tmp_path / "killed", *flags)) == 130
    torch.manual_seed(12345)  # another process would not continue this one's random state
    assert main(arguments(policy, data, tmp_path / "killed", *flags)) == 0
    assert calls == [3, 3, 3, 3, 3, 3]  # 15 samples in five batches; the third is drawn twice
    files = [next((tmp_path / name / "samples").glob("*.jsonl")).read_text() for name in ("whole", "killed")]
    assert len({json.loads(line)["completion"] for line in files[0].splitlines()[1:]}) > 5
    assert sorted(files[0].splitlines()) == sorted(files[1].splitlines())


def test_a_completion_that_does_not_end_is_truncated(policy: Path) -> None:
    (short,) = drawn(in_process(policy, Sampling()), requests_of(policy, [1]), max_tokens=4)
    assert short == Completion(ANSWER[:4], 4, True)
    (whole,) = drawn(in_process(policy, Sampling()), requests_of(policy, [1]), max_tokens=len(ANSWER) + 1)
    assert whole == Completion(ANSWER, len(ANSWER) + 1, False)


def test_the_batch_and_its_seed_decide(policy: Path) -> None:
    engine = in_process(policy)
    first = drawn(engine, requests_of(policy, [1, 2, 3], STRANGE))
    assert first == drawn(engine, requests_of(policy, [1, 2, 3], STRANGE))
    assert first != drawn(engine, requests_of(policy, [4, 2, 3], STRANGE))
    assert engine.context == 512


@pytest.mark.parametrize(
    ("stored", "dtype", "kwargs", "label"),
    [
        ("bfloat16", "auto", {}, "bfloat16"),
        ("bfloat16", "float16", {}, "float16"),
        ("bfloat16", "auto", {"quantization": "fp8"}, "fp8"),
        ("bfloat16", "auto", {"quantization": "fp8", "kv_cache_dtype": "fp8"}, "fp8, KV cache fp8"),
    ],
)
def test_precision_labels(policy: Path, stored: str, dtype: str, kwargs: dict[str, Any], label: str) -> None:
    config = AutoConfig.from_pretrained(policy)
    config.dtype = getattr(torch, stored)
    assert precision_label(config, dtype, kwargs) == label
    config.quantization_config = {"quant_method": "compressed-tensors"}
    expected = label if "quantization" in kwargs else "compressed-tensors"
    assert precision_label(config, dtype, kwargs) == expected


class Stalling(BaseHTTPRequestHandler):
    """A server that answers its first request, and the others when `released` is set."""

    protocol_version = "HTTP/1.1"
    released, posts = threading.Event(), 0

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "m", "max_model_len": 400}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        Stalling.posts += 1
        if Stalling.posts > 1:
            Stalling.released.wait(30)
        choice = {"text": "7", "finish_reason": "stop"}
        self.answer({"choices": [choice], "usage": {"completion_tokens": 1}})

    def answer(self, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def test_an_interrupted_process_does_not_wait_for_the_server() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Stalling) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        engine = ServerEngine(f"http://127.0.0.1:{server.server_port}", "m", HOT, concurrency=2)
        before = set(threading.enumerate())
        drawing = engine.complete([Request([1], seed) for seed in range(9)], 4)
        assert next(drawing)[1] == Completion("7", 1, False)
        drawers = [thread for thread in set(threading.enumerate()) - before if "work" in thread.name]
        assert drawers and all(thread.daemon for thread in drawers)  # Python joins the others before it ends
        drawing.close()  # type: ignore[attr-defined]
        Stalling.released.set()
        for thread in drawers:
            thread.join(30)
        assert Stalling.posts <= 1 + 2  # those under way; no new one
        server.shutdown()


class TestServer:
    """Against one real vLLM server on loopback."""

    pytestmark = pytest.mark.vllm

    def test_score(self, server: VLLMServer, policy: Path, data: Path, tmp_path: Path) -> None:
        flags = ["--engine", "server", "--server_base_url", f"{server.url}/v1", "--precision", "fp32"]
        assert main(arguments(policy, data, tmp_path / "out", *flags)) == 0
        check_result(tmp_path / "out", "server", "fp32")

    def test_each_seed_has_its_own_stream(self, server: VLLMServer, policy: Path) -> None:
        engine = ServerEngine(server.url, str(policy), HOT, concurrency=4)
        assert engine.context == 128  # the server's limit, not the model's
        first = drawn(engine, requests_of(policy, list(range(8)), STRANGE))
        assert len({completion.text for completion in first}) > 4  # so the generation config's top_k=1 is not in force
        body = {"model": str(policy), "prompt": STRANGE, "max_tokens": 16, "temperature": HOT.temperature}
        silent = [requests.post(f"{server.url}/v1/completions", json=body | {"seed": seed}) for seed in range(4)]
        assert len({answer.json()["choices"][0]["text"] for answer in silent}) == 1  # where it would be
        again = drawn(engine, requests_of(policy, [5, 3], STRANGE))
        assert again == [first[5], first[3]]

    def test_refusals_and_a_server_that_dies(
        self, server: VLLMServer, policy: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        engine = ServerEngine(server.url, str(policy), HOT, timeout=4)
        with pytest.raises(ConnectionError, match="status 400.*a completion was asked for"):
            drawn(engine, requests_of(policy, [1]), max_tokens=1000)
        server.kill()
        with pytest.raises(ConnectionError, match=f"{server.url} failed"):
            drawn(engine, requests_of(policy, [1]))
        with pytest.raises(UsageError, match="no vLLM server answers"):
            ServerEngine(server.url, str(policy), HOT)


@pytest.mark.vllm
def test_vllm_in_this_process(policy: Path, data: Path, tmp_path: Path) -> None:
    # A process of its own: vLLM initialises torch.distributed and does not give it back.
    kwargs = {"enforce_eager": True, "block_size": 32, "max_model_len": 64}
    kwargs |= {"gpu_memory_utilization": 0.2} if torch.cuda.is_available() else {}
    flags = ["--dtype", "float32", "--vllm_engine_kwargs", json.dumps(kwargs)]
    words = arguments(policy, data, tmp_path / "evaluation", *flags)
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = run_python("-m", "dc_trl", *words, vllm=True, timeout=400, **variables)
    assert "| sevens, avg@4 | 3 | 66.7 ± 33.3 | 0.0 | 10 |" in done.stdout
    check_result(tmp_path / "evaluation", "vllm", "float32")
    assert len(read_results(tmp_path)) == 1


def test_what_is_recorded_of_vllms_arguments_holds_no_secret() -> None:
    pytest.importorskip("vllm")
    config = AutoConfig.for_model("qwen3", max_position_embeddings=64, dtype="bfloat16")

    def options(**kwargs: Any) -> dict[str, Any]:
        return VLLMEngine("owner/model", config, HOT, kwargs=kwargs).options

    plain = {"dtype": "auto", "vllm_engine_kwargs": {"quantization": "fp8", "seed": 1}}
    assert options(quantization="fp8", seed=1) == plain
    hidden = options(quantization="fp8", seed=1, hf_token="hf_secret", download_dir="/home/someone")
    assert "hf_secret" not in str(hidden) and "someone" not in str(hidden)
    # Samples that were drawn otherwise are others; a new token draws the same.
    assert hidden == options(quantization="fp8", seed=1, hf_token="hf_newer", download_dir="/home/someone")
    assert hidden != options(quantization="fp8", seed=1, hf_token="hf_secret", download_dir="/home/other")


def test_an_address_with_credentials_is_refused_before_it_is_asked() -> None:
    with pytest.raises(UsageError, match="--server_base_url.*netrc") as raised:
        ServerEngine("http://me:hf_secret@127.0.0.1:9/v1", "m", HOT, timeout=0.1)
    assert "hf_secret" not in str(raised.value)
