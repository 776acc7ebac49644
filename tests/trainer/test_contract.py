# SPDX-License-Identifier: Apache-2.0
"""The seams of TRL that the trainer hooks: they exist, with these parameters, and behave so."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from packaging.version import Version
from runs import dc_trainer, replayed_rollouts, trl_trainer, weights
from seams import overrides
from transformers import Trainer
from transformers.utils import hf_api
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import add_fused_lm_head

# 5.17 has no `private`, and 5.24 has it; the push hands on what it is given.
PRIVATE = ["private"] if Version(transformers.__version__) >= Version("5.24") else []

PARAMETERS = {
    "_generate": ["prompts"],
    "_generate_and_score_completions": ["inputs"],
    "_compute_loss": ["model", "inputs"],
    "_prepare_inputs": ["generation_batch"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "_get_grad_norm": ["model", "grad_norm"],
    "train": ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "create_optimizer": ["model"],
    "_load_best_model": [],
    "save_model": ["output_dir", "_internal_call"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_run_epoch": [
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ],
    "_save_rng_state": ["output_dir"],
    "_get_per_token_logps_and_entropies": [
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
        "pixel_values",
        "image_grid_thw",
        "num_images",
        "pixel_attention_mask",
        "spatial_shapes",
        "num_tiles",
        "image_sizes",
        "token_type_ids",
        "mm_token_type_ids",
        "image_position_ids",
    ],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "create_model_card": ["model_name", "dataset_name", "tags"],
    "push_to_hub": ["commit_message", "blocking", "token", "revision", *PRIVATE, "kwargs"],
    "_push_from_checkpoint": ["checkpoint_folder"],
    "log": ["logs", "start_time"],
    "evaluation_loop": ["dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"],
}


@pytest.mark.parametrize(("method", "expected"), PARAMETERS.items())
def test_hooked_methods_keep_their_parameters(method: str, expected: list[str]) -> None:
    parameters = list(inspect.signature(inspect.unwrap(getattr(GRPOTrainer, method))).parameters)
    assert parameters == ["self", *expected]


def test_every_overridden_method_is_held() -> None:
    names = {name for name in overrides()["GRPOTrainer"] if inspect.isroutine(getattr(GRPOTrainer, name))}
    assert names == set(PARAMETERS)


@pytest.mark.parametrize(("method", "uploads"), [("push_to_hub", 1), ("_push_from_checkpoint", 2)])
def test_all_that_a_push_sends_goes_through_one_client(method: str, uploads: int) -> None:
    # By which it is held to the list of what is sent; whatever were sent in another way would be sent whole.
    source = inspect.getsource(getattr(Trainer, method))
    assert source.count("hf_api().upload_folder(") == source.count("upload_") == uploads
    assert source.count("folder_path=") == uploads
    assert getattr(Trainer, method).__globals__["hf_api"] is hf_api and hf_api() is hf_api()


def test_version_range() -> None:
    assert trl.__version__.startswith(("1.15.", "1.16."))


def test_the_temperature_of_scoring_is_bound_to_the_head() -> None:
    # `dc-trl calibrate` binds another one for a while.
    parameters = list(inspect.signature(add_fused_lm_head).parameters)
    assert parameters[:2] == ["model", "temperature"]


def test_generation_engine_methods() -> None:
    assert list(inspect.signature(VLLMGeneration.sync_weights).parameters) == ["self"]
    expected = ["self", "prompts", "images", "num_generations", "profiler"]
    assert list(inspect.signature(VLLMGeneration.generate).parameters) == expected


@pytest.mark.vllm
def test_the_colocated_engine_is_built_by_a_name_that_can_be_replaced() -> None:
    from trl.generation import vllm_generation

    assert vllm_generation.LLM.__name__ == "LLM"
    assert "self.llm = LLM(" in inspect.getsource(VLLMGeneration._init_vllm)


def test_what_router_replay_hooks() -> None:
    scoring = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies)
    assert list(scoring.parameters)[:5] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]
    # The outputs of a colocated engine pass through here, one completion each, in the order of the prompts.
    source = inspect.getsource(VLLMGeneration.generate)
    assert "all_outputs = self.llm.generate(" in source and "for output in outputs.outputs" in source


def test_batch_keys_and_shapes(tmp_path: Path) -> None:
    trainer = trl_trainer(tmp_path, max_steps=1)
    batches = []
    score = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(score(inputs)) or batches[-1]
    trainer.train()
    (batch,) = batches
    rows, tokens = batch["completion_mask"].shape
    assert batch["advantages"].shape == (rows,)
    for key in ("sampling_per_token_logps", "old_per_token_logps", "importance_sampling_ratio"):
        assert batch[key].shape == (rows, tokens)
    assert batch["num_items_in_batch"].dim() == 0


def test_scoring_skips_its_forward_without_the_correction(tmp_path: Path) -> None:
    trainer = trl_trainer(tmp_path, max_steps=1, vllm_importance_sampling_correction=False)
    batches = []
    score = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(score(inputs)) or batches[-1]
    trainer.train()
    assert "sampling_per_token_logps" in batches[0] and "old_per_token_logps" not in batches[0]


def test_the_loss_reads_token_advantages_after_its_forward(tmp_path: Path) -> None:
    # The canary for (B, T) advantages: filled in during the forward, they give the same step as (B,) ones.
    def run(expand: bool) -> torch.Tensor:
        trainer = trl_trainer(tmp_path, max_steps=1)
        forward, batches = trainer._get_per_token_logps_and_entropies, []
        loss = trainer._compute_loss

        def compute_loss(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            batches.append(dict(inputs))
            return loss(model, batches[-1])

        def fill(*args: Any, **kwargs: Any) -> Any:
            outputs = forward(*args, **kwargs)
            assert len(outputs) == 3
            if expand and batches:
                advantages = batches[-1]["advantages"]
                batches[-1]["advantages"] = advantages.unsqueeze(1).expand_as(outputs[0]).contiguous()
            return outputs

        trainer._compute_loss, trainer._get_per_token_logps_and_entropies = compute_loss, fill
        trainer.train()
        return weights(trainer)

    assert torch.equal(run(expand=True), run(expand=False))


def test_trainer_takes_every_argument_of_its_parent(tmp_path: Path) -> None:
    trainer = dc_trainer(tmp_path, rollout_func=replayed_rollouts(), callbacks=[], max_steps=1)
    assert trainer.rollout_func is not None
    parameters = list(inspect.signature(GRPOTrainer.__init__).parameters)
    assert parameters[:4] == ["self", "model", "reward_funcs", "args"]
    assert "rollout_func" in parameters


def test_a_rollout_func_is_called_with_prompts_and_trainer_and_its_rows_are_padded_with_zeros(tmp_path: Path) -> None:
    source = inspect.getsource(GRPOTrainer._generate)
    assert "output = self.rollout_func(prompts, self)" in source
    args = {"rollout_func": replayed_rollouts(edit=lambda rows: rows[0].pop()), "constraint": "none", "max_steps": 1}
    trainer = dc_trainer(tmp_path, **args)
    batches = []
    score = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(score(inputs)) or batches[-1]
    trainer.train()
    (batch,) = batches
    last = int(batch["completion_mask"][0].sum()) - 1
    assert batch["sampling_per_token_logps"][0, last] == 0.0  # a probability of 1
    assert batch["measured_logps"][0].isnan().all() and not batch["measured_logps"][1, :1].isnan().any()


def test_a_finished_run_that_is_resumed_takes_one_step_more_in_transformers(tmp_path: Path) -> None:
    # What `_run_epoch` is overridden for: when this fails, transformers has mended it, and the override can go.
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trl_trainer(tmp_path, **options).train()
    again = trl_trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 3
    source = inspect.getsource(Trainer._inner_training_loop)
    assert source.count("self._run_epoch(") == 1
    assert "if self.control.should_training_stop:\n                break" in source
