# SPDX-License-Identifier: Apache-2.0
"""The list of seams is complete: what the source uses of others without their word for it, page and docstring agree.

`test_contract.py` holds how the trainer's seams behave, `test_private_imports.py` what is imported from within. A name
that turns up here as missing from the list wants a look at whether its owner documents something else that would do;
if not, it goes into the list, into docs/seams.md and, if it is the trainer's, into the docstring of `DCGRPOTrainer`.
"""

import inspect
import re
from pathlib import Path

import torch
from places import ROOT
from runs import dc_trainer
from seams import ELSEWHERE, OWNERS, seams
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from trl import TrlParser

from dc_trl import DCGRPOTrainer

SEAMS = {
    "GRPOTrainer": {
        # Overridden.
        "_calculate_rewards",
        "_compute_loss",
        "_generate",
        "_generate_and_score_completions",
        "_get_grad_norm",
        "_get_per_token_logps_and_entropies",
        "_load_best_model",
        "_load_optimizer_and_scheduler",
        "_name",
        "_paper",
        "_prepare_inputs",
        "_push_from_checkpoint",
        "_run_epoch",
        "_save_rng_state",
        "_tag_names",
        "create_model_card",
        "create_optimizer",
        "evaluation_loop",
        "log",
        "push_to_hub",
        "save_model",
        "train",
        "training_step",
        # Set, or swapped for a while.
        "_last_loaded_step",
        "optimizer",
        "temperature",
        "use_vllm",
        "vllm_generation",
        "vllm_importance_sampling_correction",
        "vllm_mode",
        # Read; what `_logs` and `_metrics` hold is written to.
        "_buffered_inputs",
        "_logs",
        "_metrics",
        "_step",
        "_tokenizer",
        "accelerator",
        "aux_loss_enabled",
        "callback_handler",
        "control",
        "eos_token_ids",
        "hub_model_id",
        "loss_type",
        "multi_objective_aggregation",
        "num_generations",
        "num_generations_eval",
        "num_iterations",
        "ref_model",
        "reward_func_names",
        "reward_weights",
        "router_aux_loss_coef",
        "state",
    },
    "VLLMGeneration": {
        "_init_vllm",
        "_iter_named_params",
        "accelerator",
        "generate",
        "generation_kwargs",
        "group_port",
        "llm",
        "mode",
        "model",
        "server_base_url",
        "server_host",
        "server_port",
        "server_timeout",
        "sync_weights",
        "temperature",
        "vllm_client",
    },
    "VLLMClient": {"_get", "_post", "base_url", "check_server", "session"},
    "DistributedBackend": {"fsdp_version", "gather_params", "is_zero3"},
    "TrlParser": {"_actions"},
    ELSEWHERE: {
        "_buffers",
        "_can_set_attn_implementation",
        "_modules",
        "_name_or_path",
        "_non_persistent_buffers_set",
        "_schedulers",
        "_version",
        "accelerate.commands.launch.launch_command",
        "accelerate.commands.launch.launch_command_parser",
        "accelerate.utils.gather_object",
        "accelerate.utils.is_peft_available",
        "accelerate.utils.is_peft_model",
        "transformers.cache_utils.DynamicLayer",
        "transformers.core_model_loading.revert_weight_conversion",
        "transformers.initialization.no_init_weights",
        "transformers.integrations.sdpa_attention.sdpa_attention_forward",
        "transformers.masking_utils.sdpa_mask",
        "transformers.trainer_callback.ExportableState",
        "transformers.trainer_callback.ProgressCallback",
        "transformers.utils.hf_api",
        "transformers.utils.logging",
        "trl.distributed.DistributedBackend",
        "trl.generation.vllm_client.VLLMClient",
        "trl.generation.vllm_generation",
        "trl.generation.vllm_generation.LLM",
        "trl.generation.vllm_generation.VLLMGeneration",
        "trl.trainer.utils.add_fused_lm_head",
        "trl.trainer.utils.get_config_model_id",
        "trl.trainer.utils.is_async_callable",
    },
}


def test_the_list_is_what_the_source_uses() -> None:
    found = seams()
    assert set(found) == set(SEAMS)
    for owner, names in SEAMS.items():
        assert found[owner] - names == set(), f"of {owner}, used and not in the list"
        assert names - found[owner] == set(), f"of {owner}, in the list and used no more"


def test_a_trainer_has_every_attribute_of_the_list(tmp_path: Path) -> None:
    trainer = dc_trainer(tmp_path)
    assert {name for name in SEAMS["GRPOTrainer"] if not hasattr(trainer, name)} == set()


def test_what_lies_elsewhere_is_there() -> None:
    config = PreTrainedConfig()
    module = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters())
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer)
    chained = torch.optim.lr_scheduler.ChainedScheduler([constant])
    assert config._name_or_path == ""
    assert module._non_persistent_buffers_set == set()
    assert module._buffers == {} and nn.Sequential(module)._modules == {"0": module}
    assert callable(PreTrainedModel._can_set_attn_implementation)
    assert chained._schedulers == [constant]
    assert all(hasattr(action, "dest") for action in TrlParser([])._actions)


def listed(text: str) -> set[str]:
    """The names in backquotes; calls without their parentheses."""
    return {name.removesuffix("()") for name in re.findall(r"`([\w.]+(?:\(\))?)`", text)}


def test_the_docstring_lists_the_trainers_seams() -> None:
    text = inspect.getdoc(DCGRPOTrainer) or ""
    items = text.partition("each held by a contract test:")[2].partition("\n\n")[2].partition("\n\n")[0]
    heads = re.findall(r"^- (.*?)(?::|$)", items, flags=re.MULTILINE)
    assert listed("\n".join(heads)) == SEAMS["GRPOTrainer"]


def test_the_page_lists_every_seam() -> None:
    section = (ROOT / "docs" / "seams.md").read_text(encoding="utf-8").partition("## TRL's trainer")[2]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    names = {name for owner, held in SEAMS.items() for name in held}
    assert listed("\n".join(rows)) - set(OWNERS) == names - set(OWNERS)
