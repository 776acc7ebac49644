# SPDX-License-Identifier: Apache-2.0
"""Weight sync over disk with a real vLLM server on loopback: one server for the module, killed and restarted once."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import dc_trainer, logged
from safetensors.torch import load_file
from served_policy import BFLOAT16, FLOAT32, PROMPT, differences, engine, gap, scored
from tiny import OFF_TILE, published_model, save_tiny_policy, tiny_model, tiny_tokenizer
from transformers import TrainerCallback
from vllm_process import VLLMServer

from dc_trl.rollouts.rounding import Dither
from dc_trl.rollouts.vllm_server import check_logprobs_mode

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    directory = tmp_path_factory.mktemp("server")
    server = VLLMServer(save_tiny_policy(directory / "policy", tiny_model(**OFF_TILE)), directory / "server.log")
    try:
        yield server.start("--dtype", "float32", "--block-size", "32", fresh=True)
    finally:
        server.kill()


def perturbed(seed: int, scale: float = 0.05) -> Any:
    """The served model after what a few large optimizer steps might do to it."""
    model = tiny_model(**OFF_TILE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_the_server_follows_the_trainer(server: VLLMServer, tmp_path: Path) -> None:
    check_logprobs_mode(server.url, timeout=5)
    model = perturbed(seed=1)
    rollouts = engine(server, model, tmp_path)
    assert gap(rollouts, model) > 100 * FLOAT32, "the server starts from other weights"
    # The prompt's blocks are in the prefix cache now, computed with the old weights: only a reset gets rid of them.
    rollouts.sync_weights()
    assert 0 < gap(rollouts, model) < FLOAT32
    for seed in (2, 3):
        model.load_state_dict(perturbed(seed).state_dict())
        rollouts.sync_weights()
        assert 0 < gap(rollouts, model) < FLOAT32
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["policy-00000002", "policy-00000003"]


def test_a_stale_prefix_cache_would_show(server: VLLMServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = perturbed(seed=4)
    rollouts = engine(server, model, tmp_path)
    rollouts.sync_weights()
    assert 0 < gap(rollouts, model) < FLOAT32
    model.load_state_dict(perturbed(seed=5).state_dict())
    post = rollouts.vllm_client.session.post

    def without_reset(url: str, **kwargs: Any) -> Any:
        return post(url.replace("reset_prefix_cache", "reset_mm_cache"), **kwargs)

    monkeypatch.setattr(rollouts.vllm_client.session, "post", without_reset)
    rollouts.sync_weights()
    monkeypatch.undo()
    assert gap(rollouts, model) > 10 * FLOAT32


def test_adapters_are_served_merged(server: VLLMServer, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    )
    model = get_peft_model(perturbed(seed=6), config).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rollouts = engine(server, model, tmp_path)
    rollouts.sync_weights()
    assert 0 < gap(rollouts, model) < FLOAT32
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def trained_a_little(model: Any, steps: float) -> Any:
    """The model after its weights moved by so many of their bf16 steps, to make `a` follow the prompt."""
    (-next_logps(model)[tiny_tokenizer().convert_tokens_to_ids("a")]).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            step = torch.exp2(parameter.abs().clamp(min=1e-20).log2().floor()) / 128
            parameter.sub_(steps * step * parameter.grad.sign())
    return model.eval()


def next_logps(model: Any) -> torch.Tensor:
    return model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)


def test_a_server_in_bf16_gets_the_dithered_weights_to_the_bit(tmp_path: Path) -> None:
    """A server of its own, in the dtype of its config.json: a trainer in float32 from the same checkpoint."""
    published, dither = published_model(**OFF_TILE), Dither(5)
    model = trained_a_little(published_model(**OFF_TILE), steps=0.4)
    deployed = {"dithered": published_model(**OFF_TILE), "nearest": published_model(**OFF_TILE)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            deployed["dithered"].get_parameter(name).copy_(dither.cast(parameter, torch.bfloat16, name))
            deployed["nearest"].get_parameter(name).copy_(parameter.bfloat16())
    server = VLLMServer(save_tiny_policy(tmp_path / "policy", published), tmp_path / "server.log")
    try:
        server.start("--block-size", "32")
        rollouts = engine(server, model, tmp_path / "sync", dither=dither)
        assert rollouts.deployed_dtype == torch.bfloat16
        rollouts.sync_weights()
        served = scored(rollouts)
    finally:
        server.kill()
    (folder,) = (tmp_path / "sync").iterdir()
    sent = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, parameter in deployed["dithered"].named_parameters():
        assert sent[name].dtype == torch.bfloat16 and torch.equal(sent[name].float(), parameter), name
    # It computes with them, and follows the trainer; of this update, rounding to nearest loses nearly everything.
    gaps = {way: float(differences(served, policy).mean()) for way, policy in deployed.items()}
    assert gaps["dithered"] < BFLOAT16 / 5 and gaps["dithered"] < gaps["nearest"] / 3, gaps
    assert float(differences(served, model).mean()) < gaps["nearest"] / 3


class KillServer(TrainerCallback):
    """Kills the server at the end of a step."""

    def __init__(self, server: VLLMServer, step: int) -> None:
        self.server, self.step = server, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.server.kill()


def test_a_run_survives_its_server(server: VLLMServer, tmp_path: Path) -> None:
    options = {"use_vllm": True, "vllm_mode": "server", "weight_sync": "disk", "vllm_server_base_url": server.url}
    options |= {"vllm_server_timeout": 5, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = dc_trainer(tmp_path, model=tiny_model(**OFF_TILE), callbacks=[KillServer(server, step=3)], **options)
    with pytest.raises(ConnectionError, match=f"{server.url}.*resume_from_checkpoint"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert 0 < max(logged(trainer, "dc/discrepancy/mean")) < FLOAT32
    for action in (trainer.vllm_generation.sync_weights, lambda: gap(trainer.vllm_generation, trainer.model)):
        start = time.monotonic()
        with pytest.raises(ConnectionError, match=f"{server.url}.*resume_from_checkpoint"):
            action()
        assert time.monotonic() - start < 3 * 5
    with pytest.raises(ConnectionError, match=f"{server.url}.*vllm_server_timeout"):
        dc_trainer(tmp_path, **options)

    server.start()  # from its own old checkpoint, and now in bfloat16, as its config.json says
    resumed = dc_trainer(tmp_path, model=tiny_model(**OFF_TILE), **options)
    assert gap(resumed.vllm_generation, trainer.model) > BFLOAT16
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert 2e-4 < max(logged(resumed, "dc/discrepancy/mean")[2:]) < 0.02  # bfloat16 now
    resumed.vllm_generation.sync_weights()
    assert FLOAT32 < gap(resumed.vllm_generation, resumed.model) < BFLOAT16
