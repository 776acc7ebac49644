# SPDX-License-Identifier: Apache-2.0
"""The policy's weights as engines get them: names, merging, files, and what is asked of a server (here a stub)."""

import importlib.metadata
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from accelerate import Accelerator
from accelerate.utils import imports
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from places import SUPPORT
from processes import free_port, run_ranks
from safetensors.torch import load_file
from stub_server import Stub
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor, nn

from dc_trl.rollouts.checkpoint import next_checkpoint, remove_old_checkpoints, write_checkpoint
from dc_trl.rollouts.transformers import TransformersGeneration
from dc_trl.rollouts.vllm_server import (
    PatientAdapter,
    check_logprobs_mode,
    check_reloadable,
    explain_failure,
    reload_weights,
    server_configuration,
)
from dc_trl.rollouts.weights import iter_policy_weights

MOE = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return dict(iter_policy_weights(model, Accelerator(cpu=True)))


def load(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("arch", ["qwen3", "qwen3_moe"])
def test_a_plain_model_comes_as_it_is(arch: str) -> None:
    model = tiny_model(arch)
    ours, state = weights(model), model.state_dict()
    assert list(ours) == list(state)
    assert all(torch.equal(ours[name], state[name]) for name in state)


def test_tied_weights_come_once_and_wrappers_leave_no_trace() -> None:
    model = tiny_model(tie_word_embeddings=True)
    names = list(weights(model))
    assert "lm_head.weight" not in names
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert list(weights(model)) == names


@pytest.mark.parametrize(
    ("arch", "adapter"),
    [
        ("qwen3", {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}),
        ("qwen3", {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}),
        ("qwen3", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 8]}),
        ("qwen3_moe", {"target_modules": ["q_proj"], **MOE}),
    ],
    ids=["lora", "dora-and-saved-module", "trainable-tokens", "experts"],
)
def test_adapters_are_merged_into_a_copy(arch: str, adapter: dict[str, Any]) -> None:
    model = get_peft_model(tiny_model(arch), LoraConfig(r=4, **adapter)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = tiny_model(arch, seed=1).eval()
    plain.load_state_dict(weights(model))
    ids = torch.arange(4, 20).unsqueeze(0)
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_merged_weights_are_rounded_by_nobody() -> None:
    model = get_peft_model(
        tiny_model().bfloat16(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    merged = weights(model)["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(merged, expected, atol=1e-6, rtol=0)


def test_two_processes_gather_their_shards() -> None:
    # Started as users start theirs: the other tests of several ranks only tell them what the launcher would.
    said = run_ranks(SUPPORT / "sharded_weights_run.py", fresh=True).stdout
    assert "rank 0 agrees" in said and "rank 1 agrees" in said


def test_adapters_that_are_no_weights_are_refused() -> None:
    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(NotImplementedError, match="PROMPT_TUNING.*LoRA"):
        weights(model)


@pytest.mark.parametrize("arch", ["qwen3", "qwen3_moe"])
def test_files_hold_what_save_pretrained_would_write(arch: str, tmp_path: Path) -> None:
    model = tiny_model(arch)
    model.save_pretrained(tmp_path / "theirs")
    write_checkpoint(tmp_path / "ours", model, weights(model).items(), shard_bytes=50_000)
    ours, theirs = load(tmp_path / "ours"), load(tmp_path / "theirs")
    assert len(list((tmp_path / "ours").iterdir())) > 3
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_readers_never_see_half_a_checkpoint(tmp_path: Path) -> None:
    model = tiny_model()

    def failing() -> Iterator[tuple[str, Tensor]]:
        yield from list(weights(model).items())[:3]
        assert not list(tmp_path.glob("policy-*"))
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(next_checkpoint(tmp_path), model, failing(), shard_bytes=1)
    assert not list(tmp_path.glob("policy-*"))
    for _ in range(4):
        write_checkpoint(next_checkpoint(tmp_path), model, weights(model).items())
        remove_old_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy-00000003", "policy-00000004"]


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub() as server:
        yield server


def session() -> requests.Session:
    session = requests.Session()
    session.mount("http://", PatientAdapter(3.0))
    return session


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logits"])
def test_a_server_with_other_log_probs_is_refused(stub: Stub, mode: str) -> None:
    stub.answers["/server_info"] = (200, {"vllm_config": {"model_config": {"logprobs_mode": mode}}})
    with pytest.raises(ValueError, match=f"{mode}.*--logprobs-mode processed_logprobs"):
        check_logprobs_mode(stub.url, timeout=2)
    model_config = {"logprobs_mode": "processed_logprobs", "dtype": "torch.bfloat16"}
    stub.answers["/server_info"] = (200, {"vllm_config": {"model_config": model_config}})
    check_logprobs_mode(stub.url + "/", timeout=2)
    assert server_configuration(session(), stub.url)["model_config"] == model_config


def test_a_server_without_development_endpoints_is_refused(stub: Stub) -> None:
    with pytest.raises(ValueError, match="404.*VLLM_SERVER_DEV_MODE=1"):
        check_logprobs_mode(stub.url, timeout=2)
    with pytest.raises(ValueError, match="404.*VLLM_SERVER_DEV_MODE=1"):
        server_configuration(session(), stub.url)
    with pytest.raises(RuntimeError, match="404.*VLLM_SERVER_DEV_MODE=1"):
        reload_weights(session(), stub.url, Path("/checkpoint"))


def test_no_server_is_an_error_in_time() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=f"{url}.*vllm_server_timeout"):
        check_logprobs_mode(url, timeout=2)
    with pytest.raises(ConnectionError, match=f"{url}.*generating.*resume_from_checkpoint"):
        with explain_failure(url, "generating"):
            session().post(url)
    assert time.monotonic() - start < 3 * (2 + 3)


def test_a_reload_names_the_directory_and_empties_the_cache(stub: Stub) -> None:
    stub.answers = {"/collective_rpc": (200, {"results": [None]}), "/reset_prefix_cache": (200, {"success": True})}
    reload_weights(session(), stub.url, Path("/checkpoint"))
    assert [path for path, _ in stub.posted] == ["/collective_rpc", "/reset_prefix_cache"]
    assert json.loads(stub.posted[0][1]) == {"method": "reload_weights", "kwargs": {"weights_path": "/checkpoint"}}


def test_a_cache_that_stays_is_an_error(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    stub.answers = {"/collective_rpc": (200, {"results": [None]}), "/reset_prefix_cache": (200, {"success": False})}
    with pytest.raises(RuntimeError, match="prefix cache.*--no-enable-prefix-caching"):
        reload_weights(session(), stub.url, Path("/checkpoint"))


def test_experts_on_a_cpu_server_are_refused() -> None:
    cpu, gpu = ({"device_config": {"device_type": kind}} for kind in ("cpu", "cuda"))
    with pytest.raises(NotImplementedError, match="Qwen3Moe.*cpu.*rollout_backend='transformers'"):
        check_reloadable(cpu, tiny_model("qwen3_moe"))
    check_reloadable(gpu, tiny_model("qwen3_moe"))
    check_reloadable(cpu, tiny_model())


def test_the_servers_own_words_reach_the_user(stub: Stub) -> None:
    stub.answers["/collective_rpc"] = (500, {"error": "cannot find /checkpoint"})
    with pytest.raises(ConnectionError, match="cannot find /checkpoint.*log"):
        with explain_failure(stub.url, "loading"):
            reload_weights(session(), stub.url, Path("/checkpoint"))


def test_the_copy_takes_the_dtype_in_which_the_model_trains() -> None:
    # DeepSpeed casts the model in place when training begins, which is after the engine is built.
    model = tiny_model().eval()
    engine = TransformersGeneration(model, Accelerator(cpu=True), tiny_tokenizer(), max_completion_length=8)
    assert engine.policy.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        engine.sync_weights()
        assert {parameter.dtype for parameter in engine.policy.parameters()} == {dtype}
        live = dict(model.named_parameters())
        assert all(torch.equal(parameter, live[name]) for name, parameter in engine.policy.named_parameters())
    policy = engine.policy
    engine.sync_weights()
    assert engine.policy is policy


def test_a_quantised_copy_stays_when_the_live_model_is_cast() -> None:
    model = tiny_model().eval()
    engine = TransformersGeneration(
        model, Accelerator(cpu=True), tiny_tokenizer(), precision="int4", max_completion_length=8
    )
    policy = engine.policy
    model.bfloat16()
    engine.sync_weights()
    assert engine.policy is policy and policy.dtype == torch.float32


def deep_engine() -> tuple[Any, TransformersGeneration]:
    model = tiny_model(num_hidden_layers=48).eval()
    return model, TransformersGeneration(model, Accelerator(cpu=True), tiny_tokenizer(), max_completion_length=8)


def test_a_sync_reads_no_package_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    _, engine = deep_engine()
    engine.sync_weights()
    read: list[str] = []
    # As it is outside of the tests, which ask once; see `asked_once`.
    monkeypatch.setattr(imports, "_is_package_available", imports._is_package_available.__wrapped__)
    original = importlib.metadata.PathDistribution.read_text
    monkeypatch.setattr(
        importlib.metadata.PathDistribution,
        "read_text",
        lambda self, filename: read.append(filename) or original(self, filename),
    )
    engine.sync_weights()
    assert read == []
