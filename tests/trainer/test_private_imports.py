# SPDX-License-Identifier: Apache-2.0
"""What is imported from within TRL, transformers and Accelerate does what this package needs of it: a test for each.

They stand where they are used; this is the one list. A release that moves one fails here by its name.
"""

import inspect
import logging
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer
import trl.trainer.grpo_trainer
from accelerate import Accelerator
from seams import ELSEWHERE, seams
from tiny import tiny_model
from torch import nn
from transformers import PreTrainedConfig, TrainerCallback, TrainerState
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

Contract = Callable[[], None]
CONTRACTS: dict[str, Contract] = {}


def holds(name: str) -> Callable[[Contract], Contract]:
    """Registers the contract of an import, `package.module.name`."""

    def register(contract: Contract) -> Contract:
        CONTRACTS[name] = contract
        return contract

    return register


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_every_import_from_within_has_a_contract() -> None:
    assert set(CONTRACTS) == {name for name in seams()[ELSEWHERE] if "." in name}


# Accelerate


@holds("accelerate.commands.launch.launch_command")
def launch_command() -> None:
    from accelerate.commands.launch import launch_command

    assert parameters(launch_command) == ["args"]


@holds("accelerate.commands.launch.launch_command_parser")
def launch_command_parser() -> None:
    from accelerate.commands.launch import launch_command_parser

    args = launch_command_parser().parse_args(["--num_processes", "2", "--module", "script", "--flag", "1"])
    assert (args.num_processes, args.module) == (2, True)
    assert args.training_script == "script" and args.training_script_args == ["--flag", "1"]


@holds("accelerate.utils.gather_object")
def gather_object() -> None:
    from accelerate.utils import gather_object

    Accelerator(cpu=True)
    assert gather_object([1, {"a": None}]) == [
        1,
        {"a": None},
    ]  # lists are concatenated; several ranks: test_distributed


@holds("accelerate.utils.is_peft_available")
def is_peft_available() -> None:
    from accelerate.utils import is_peft_available

    assert is_peft_available() == (find_spec("peft") is not None)


@holds("accelerate.utils.is_peft_model")
def is_peft_model() -> None:
    from accelerate.utils import is_peft_model

    assert not is_peft_model(nn.Linear(1, 1))
    if find_spec("peft"):
        from peft import LoraConfig, get_peft_model

        assert is_peft_model(get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])))


# transformers


@holds("transformers.cache_utils.DynamicLayer")
def dynamic_layer() -> None:
    from transformers.cache_utils import DynamicLayer

    layer, states = DynamicLayer(), torch.arange(12.0).reshape(2, 1, 3, 2)
    keys, values = layer.update(states, -states)
    assert torch.equal(keys, states) and torch.equal(values, -states)
    assert layer.keys is keys and layer.values is values and layer.is_initialized
    layer.update(states[:, :, :1], states[:, :, :1])
    assert layer.keys.shape == (2, 1, 4, 2)
    layer.reorder_cache(torch.tensor([1]))
    assert torch.equal(layer.keys[:, :, :3], states[1:])
    cache = tiny_model()(torch.ones(1, 2, dtype=torch.long), use_cache=True).past_key_values
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 2


@holds("transformers.core_model_loading.revert_weight_conversion")
def revert_weight_conversion() -> None:
    from transformers.core_model_loading import revert_weight_conversion

    # One fused tensor of all experts in memory, one for each in a checkpoint.
    model = tiny_model("qwen3_moe")
    name = "model.layers.0.mlp.experts.down_proj"
    fused = model.state_dict()[name]
    apart = revert_weight_conversion(model, {name: fused.clone()})
    assert len(apart) == len(fused)
    assert torch.equal(apart["model.layers.0.mlp.experts.1.down_proj.weight"], fused[1])
    plain = {"lm_head.weight": torch.ones(1)}
    assert revert_weight_conversion(tiny_model(), plain) == plain


@holds("transformers.initialization.no_init_weights")
def no_init_weights() -> None:
    from transformers.initialization import no_init_weights

    model = tiny_model()
    before = torch.random.get_rng_state()
    with no_init_weights():
        type(model)(model.config)
    assert torch.equal(torch.random.get_rng_state(), before)  # nothing was drawn
    type(model)(model.config)
    assert not torch.equal(torch.random.get_rng_state(), before)  # and the initialisation is back


@holds("transformers.integrations.sdpa_attention.sdpa_attention_forward")
def sdpa_attention_forward() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    assert parameters(sdpa_attention_forward)[:5] == ["module", "query", "key", "value", "attention_mask"]
    query, key = torch.randn(2, 2, 3, 4), torch.randn(2, 1, 3, 4)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=False)
    output, weights = sdpa_attention_forward(module, query, key, key, None, scaling=0.5)
    each = key.repeat(1, 2, 1, 1)
    expected = nn.functional.scaled_dot_product_attention(query, each, each, scale=0.5)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    assert weights is None


@holds("transformers.masking_utils.sdpa_mask")
def sdpa_mask() -> None:
    from transformers.masking_utils import sdpa_mask

    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask  # so a mask under a name of ours is what SDPA gets


@holds("transformers.trainer_callback.ExportableState")
def exportable_state() -> None:
    from transformers.trainer_callback import ExportableState

    class Counting(TrainerCallback, ExportableState):
        def __init__(self, start: int) -> None:
            self.count = start

        def state(self) -> dict[str, Any]:
            return {"args": {"start": 1}, "attributes": {"count": self.count}}

    counting = Counting(1)
    counting.count = 5
    kept = TrainerState(stateful_callbacks=[counting]).stateful_callbacks
    assert kept == {"Counting": {"args": {"start": 1}, "attributes": {"count": 5}}}
    assert Counting.from_state(kept["Counting"]).count == 5


@holds("transformers.trainer_callback.ProgressCallback")
def progress_callback() -> None:
    from transformers.trainer_callback import ProgressCallback

    assert transformers.trainer.DEFAULT_PROGRESS_CALLBACK is ProgressCallback  # in a terminal: what is to be removed


@holds("transformers.utils.hf_api")
def hf_api() -> None:
    from transformers.utils import hf_api

    assert hf_api() is hf_api()  # one client, whose `upload_folder` every push goes through: test_contract
    assert {"folder_path", "allow_patterns", "ignore_patterns"} <= set(parameters(hf_api().upload_folder))


@holds("transformers.utils.logging")
def transformers_logging() -> None:
    from transformers.utils import logging as theirs

    logger = theirs.get_logger("dc_trl.anything")
    assert isinstance(logger, logging.Logger) and logger.name == "dc_trl.anything"


# TRL


@holds("trl.distributed.DistributedBackend")
def distributed_backend() -> None:
    from trl.distributed import DistributedBackend

    backend, weight = DistributedBackend(Accelerator(cpu=True)), nn.Parameter(torch.ones(1))
    assert backend.fsdp_version is None and not backend.is_zero3
    with backend.gather_params([weight]):
        assert weight.shape == (1,)


@holds("trl.generation.vllm_client.VLLMClient")
def vllm_client() -> None:
    from trl.generation.vllm_client import VLLMClient

    assert {"base_url", "group_port", "connection_timeout"} <= set(parameters(VLLMClient.__init__))
    assert parameters(VLLMClient.check_server) == ["self", "total_timeout", "retry_interval"]
    for method in (VLLMClient._get, VLLMClient._post):
        assert parameters(method)[:2] == ["self", "url"]


@holds("trl.generation.vllm_generation")
def vllm_generation() -> None:
    from trl.generation import vllm_generation

    assert trl.trainer.grpo_trainer.VLLMGeneration is vllm_generation.VLLMGeneration


@holds("trl.generation.vllm_generation.LLM")
def vllm_generation_llm() -> None:
    from trl.generation import vllm_generation

    # Read from the module when the engine is built, so that another can stand there for a while.
    assert "self.llm = LLM(" in inspect.getsource(vllm_generation.VLLMGeneration._init_vllm)
    if find_spec("vllm"):
        assert vllm_generation.LLM.__name__ == "LLM"


@holds("trl.generation.vllm_generation.VLLMGeneration")
def vllm_generation_class() -> None:
    from trl.generation.vllm_generation import VLLMGeneration

    assert parameters(VLLMGeneration.sync_weights) == ["self"]
    assert parameters(VLLMGeneration.generate) == ["self", "prompts", "images", "num_generations", "profiler"]
    assert parameters(VLLMGeneration._init_vllm) == ["self"]
    assert parameters(VLLMGeneration._iter_named_params)[0] == "self"


@holds("trl.trainer.utils.add_fused_lm_head")
def add_fused_lm_head() -> None:
    from trl.trainer.utils import add_fused_lm_head

    model, ids = tiny_model(), torch.tensor([[5, 6, 7]])
    expected = (model(ids).logits / 2.0).log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
    add_fused_lm_head(model, 2.0, cast_lm_head_to_fp32=False, outputs=("log_probs", "entropy"))
    found = model(ids, labels=ids, use_cache=False, fused_lm_head=True)
    torch.testing.assert_close(found.log_probs[0, -2:], expected, rtol=1e-4, atol=1e-5)
    assert found.entropy.shape == found.log_probs.shape


@holds("trl.trainer.utils.get_config_model_id")
def get_config_model_id() -> None:
    from trl.trainer.utils import get_config_model_id

    config = PreTrainedConfig()
    config._name_or_path = "owner/name"
    assert get_config_model_id(config) == "owner/name"


@holds("trl.trainer.utils.is_async_callable")
def is_async_callable() -> None:
    from trl.trainer.utils import is_async_callable

    async def later() -> None: ...

    class Later:
        async def __call__(self) -> None: ...

    assert is_async_callable(later) and is_async_callable(Later()) and not is_async_callable(parameters)


@pytest.mark.parametrize("name", CONTRACTS)
def test_what_is_imported_from_within_does_what_is_needed(name: str) -> None:
    CONTRACTS[name]()
