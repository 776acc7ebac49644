# SPDX-License-Identifier: Apache-2.0
"""Training runs for one process or several, by name; on several, one of the ranks that test_distributed.py starts.

    python -m torch.distributed.run --nproc_per_node 2 tests/support/distributed_run.py WORLD_SIZE DIRECTORY RUN...

Each rank leaves what it has seen in DIRECTORY/rank{N}.pt: a `report` for each run.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from datasets import Dataset
from runs import dc_trainer, replayed_rollouts
from tiny import published_model, tiny_model
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState

from dc_trl import DCGRPOTrainer
from dc_trl.rollouts.rounding import Dither
from dc_trl.training.master_weights import MASTER
from dc_trl.training.resuming import CheckpointError

GLOBAL_BATCH = 16  # four groups of four: two prompts a rank where there are two
PROMPTS = Dataset.from_dict({"prompt": [f"{first}+{i}=" for i in range(1, 7) for first in "2431"]})
EOS = 2


def ends_if_even(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Replayed rollouts; those of even prompts, rank 0's where there are two, end. The others are cut off."""
    output = replayed_rollouts()(prompts, trainer)
    for prompt, ids, logprobs in zip(prompts, output["completion_ids"], output["logprobs"], strict=True):
        if prompt[0] in "24":
            ids.append(EOS)
            logprobs.append(-1.0)
    return output


def masked_if_odd(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Replayed rollouts whose tokens are all the environment's for odd prompts, rank 1's where there are two."""
    output = replayed_rollouts()(prompts, trainer)
    pairs = zip(prompts, output["completion_ids"], strict=True)
    return output | {"env_mask": [[int(prompt[0] in "24")] * len(ids) for prompt, ids in pairs]}


REJECTING: dict[str, Any] = {"rejection": ["icepop"], "rejection_bounds": {"icepop": {"low": 0.0, "high": 1e4}}}


def far_in_places(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Replayed rollouts with a far token in every one, and with nothing else in those of the prompts "3+"."""
    output = replayed_rollouts()(prompts, trainer)
    for prompt, logprobs in zip(prompts, output["logprobs"], strict=True):
        logprobs[1] = -30.0
        if prompt[0] == "3":
            logprobs[:] = [-30.0] * len(logprobs)
    return output


def far_if_odd(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Replayed rollouts whose tokens are all far for odd prompts, rank 1's where there are two."""
    output = replayed_rollouts()(prompts, trainer)
    for prompt, logprobs in zip(prompts, output["logprobs"], strict=True):
        if prompt[0] not in "24":
            logprobs[:] = [-30.0] * len(logprobs)
    return output


def train(
    output_dir: Path,
    world_size: int,
    resume: str | bool | None = None,
    trainers: list[DCGRPOTrainer] | None = None,
    prepare: Callable[[DCGRPOTrainer], None] = lambda trainer: None,
    **options: Any,
) -> dict[str, Any]:
    """Runs a trainer on the same global batch whatever the number of processes, and reports; adds it to `trainers`.

    `prepare` may change it before it trains.
    """
    defaults = {
        "train_dataset": PROMPTS,
        "shuffle_dataset": False,
        "per_device_train_batch_size": GLOBAL_BATCH // world_size,
        "tolerance_calibration_batches": 1,
        "tolerance_slack": 0.9,
        "dual_lr": 3.0,
        "max_steps": 4,
        "learning_rate": 1e-3,
    }
    warnings = Warnings()
    logging.getLogger("dc_trl").addHandler(warnings)
    trainer = dc_trainer(output_dir, **(defaults | options))
    assert trainer.accelerator.num_processes == world_size
    prepare(trainer)
    trainer.train(resume_from_checkpoint=resume)
    logging.getLogger("dc_trl").removeHandler(warnings)
    if trainers is not None:
        trainers.append(trainer)
    return report(trainer) | {"warnings": warnings.messages}


class Warnings(logging.Handler):
    """Keeps what the package warns of on this rank."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def report(trainer: DCGRPOTrainer) -> dict[str, Any]:
    """What all ranks must agree on: λ, tolerance, every logged number, and the weights, whole."""
    clock = ("time", "runtime", "per_second")
    history = [{k: v for k, v in e.items() if not any(c in k for c in clock)} for e in trainer.state.log_history]
    whole = [_whole(p) for p in trainer.model.parameters()]
    return {
        "multiplier": trainer.dual.value,
        "tolerance": trainer.discrepancy_tolerance,
        "log": history,
        "weights": torch.cat([p.detach().flatten() for p in whole]),
        "sharded": any(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "tokens": first_tokens(Path(trainer.args.output_dir)),
    }


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def first_tokens(output_dir: Path) -> list[tuple[Any, ...]]:
    """The rows of the first step's token log, sorted; none where there is no log."""
    path = output_dir / "tokens/tokens_00001.parquet"
    columns = ["prompt", "position", "token_id", "sampling_logp", "valid", "completion"]
    return (
        sorted(zip(*pq.read_table(path, columns=columns).to_pydict().values(), strict=True)) if path.exists() else []
    )


def flat_for_3(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward that gives one of the groups of rank 1 no variance."""
    return [0.0 if prompt[0] == "3" else float(len(text)) for prompt, text in zip(prompts, completions, strict=True)]


def replayed(directory: Path, world_size: int) -> dict[str, Any]:
    """Ragged rollouts that depend on their prompt alone; both controllers, leave-one-out, dropped groups."""
    options = {"length_decay": True, "length_decay_period": 2, "reward_funcs": flat_for_3}
    options |= {"advantage_estimator": "rloo", "zero_variance_groups": "drop", "log_tokens": True}
    return train(directory, world_size, rollout_func=replayed_rollouts(), **options)


def rejected(directory: Path, world_size: int) -> dict[str, Any]:
    """Far tokens here and there, and everywhere in prompts of rank 1 alone: settled on the gradient. Both rates."""
    rates = {"ess_rate": True, "length_decay": True, "length_decay_period": 2}
    return train(directory, world_size, rollout_func=far_in_places, **REJECTING, **rates)


def rejected_early(directory: Path, world_size: int) -> dict[str, Any]:
    """The same in four micro-batches that serve two updates: settled on the advantages, over sequences."""
    layout = {"per_device_train_batch_size": GLOBAL_BATCH // world_size // 4, "gradient_accumulation_steps": 4}
    layout |= {"num_iterations": 2, "loss_type": "grpo"}
    return train(directory, world_size, rollout_func=far_in_places, **REJECTING, **layout)


def rejected_rank(directory: Path, world_size: int) -> dict[str, Any]:
    """Every token of rank 1 is rejected, and none of rank 0: settled on the gradient."""
    return train(directory, world_size, rollout_func=far_if_odd, **REJECTING)


def rejected_rank_early(directory: Path, world_size: int) -> dict[str, Any]:
    """The same, where rollouts serve two updates: settled on the advantages."""
    return train(directory, world_size, rollout_func=far_if_odd, num_iterations=2, **REJECTING)


def truncated(directory: Path, world_size: int) -> dict[str, Any]:
    """Every completion of rank 1 is cut off and masked."""
    return train(directory, world_size, rollout_func=ends_if_even, mask_truncated_completions=True, max_steps=2)


def environment(directory: Path, world_size: int) -> dict[str, Any]:
    """Every token of rank 1 is the environment's."""
    return train(directory, world_size, rollout_func=masked_if_odd, max_steps=2)


def engine(directory: Path, world_size: int) -> dict[str, Any]:
    """In-process int4 rollouts, each rank its own; leaves a checkpoint after step 2."""
    return train(directory, world_size, save_strategy="steps", save_steps=2, constraint="lagrangian")


def resumed(directory: Path, world_size: int) -> dict[str, Any]:
    """`engine` again from its checkpoint."""
    checkpoint = directory.with_name("engine") / "checkpoint-2"
    return train(directory, world_size, resume=str(checkpoint), constraint="lagrangian")


def routed(directory: Path, world_size: int) -> dict[str, Any]:
    """Float32 rollouts of a mixture of experts, replayed: checkpointed layers, shuffled micro-batches."""
    options = {"rollout_precision": None, "router_replay": True, "gradient_checkpointing": True}
    layout = {"per_device_train_batch_size": GLOBAL_BATCH // world_size // 4, "gradient_accumulation_steps": 4}
    mixture = tiny_model("qwen3_moe", num_experts=8, num_experts_per_tok=3)
    return train(directory, world_size, model=mixture, **(options | layout))


def sharded(directory: Path, world_size: int) -> dict[str, Any]:
    """In-process int4 rollouts from weights that FSDP2 shards."""
    shard_with_fsdp2()
    result = train(directory, world_size, constraint="lagrangian", max_steps=3)
    assert result["sharded"]
    return result


def rejected_sharded(directory: Path, world_size: int) -> dict[str, Any]:
    """`rejected` with weights that FSDP2 shards: each rank scales its part of the gradient."""
    shard_with_fsdp2()
    return rejected(directory, world_size)


def sharded_files(directory: Path, world_size: int) -> dict[str, Any]:
    """`sharded` with each rank writing its own shards; leaves a checkpoint after step 2."""
    shard_with_fsdp2("SHARDED_STATE_DICT")
    save_model = DCGRPOTrainer.save_model

    def save_in_step(self: DCGRPOTrainer, *args: Any, **kwargs: Any) -> None:
        save_model(self, *args, **kwargs)
        torch.distributed.barrier()  # or a fast rank 1, which makes the directory for its shards, would help rank 0

    DCGRPOTrainer.save_model = save_in_step
    result = train(directory, world_size, save_strategy="steps", save_steps=2, constraint="lagrangian")
    DCGRPOTrainer.save_model = save_model
    assert result["sharded"]
    return result


def sharded_resumed(directory: Path, world_size: int) -> dict[str, Any]:
    """`sharded_files` again from its checkpoint."""
    shard_with_fsdp2("SHARDED_STATE_DICT")
    checkpoint = directory.with_name("sharded_files") / "checkpoint-2"
    result = train(directory, world_size, resume=str(checkpoint), constraint="lagrangian")
    assert result["sharded"]
    return result


def bf16_policy() -> PreTrainedModel:
    """The tiny policy as a checkpoint in bf16 is loaded. Tensors of 57 rows: the last rank has fewer."""
    model = tiny_model(intermediate_size=57)
    for parameter in model.parameters():  # buffers stay in float32
        parameter.data = parameter.data.bfloat16()
    return model


def one_rounding(directory: Path, world_size: int, resume: str | None = None) -> dict[str, Any]:
    """Float32 masters of a policy in bf16, sampled in bf16; leaves a checkpoint after step 2."""
    options = {"sync_rounding": "dither", "rollout_precision": "bf16", "learning_rate": 3e-5, "weight_decay": 0.1}
    options |= {"save_strategy": "steps", "save_steps": 2, "model": bf16_policy()}
    trainers: list[DCGRPOTrainer] = []
    result = train(directory, world_size, resume, trainers=trainers, **options)
    (trainer,) = trainers
    trainer.vllm_generation.sync_weights()
    result["cast"] = {name: _cast_of_master(trainer, p, name) for name, p in trainer.model.named_parameters()}
    result["sampler"] = dict(trainer.vllm_generation.policy.named_parameters())
    result["masters"] = torch.cat([_whole(_master(trainer, p)).flatten() for p in trainer.model.parameters()])
    return result


def _master(trainer: DCGRPOTrainer, parameter: torch.Tensor) -> torch.Tensor:
    return trainer.optimizer.state[parameter][MASTER]


def _cast_of_master(trainer: DCGRPOTrainer, parameter: torch.Tensor, name: str) -> torch.Tensor:
    """What a sync of the whole master would give a sampler in bf16."""
    return Dither(trainer.args.seed).cast(_whole(_master(trainer, parameter)), torch.bfloat16, name)


def one_rounding_resumed(directory: Path, world_size: int) -> dict[str, Any]:
    """`one_rounding` again from its checkpoint."""
    return one_rounding(directory, world_size, str(directory.with_name("one_rounding") / "checkpoint-2"))


def one_rounding_sharded(directory: Path, world_size: int) -> dict[str, Any]:
    """`one_rounding` from weights that FSDP2 shards."""
    shard_with_fsdp2()
    return one_rounding(directory, world_size)


def one_rounding_sharded_resumed(directory: Path, world_size: int) -> dict[str, Any]:
    """`one_rounding_sharded` again from its checkpoint."""
    shard_with_fsdp2()
    return one_rounding(directory, world_size, str(directory.with_name("one_rounding_sharded") / "checkpoint-2"))


def dithered(directory: Path, world_size: int) -> dict[str, Any]:
    """A float32 policy on the bf16 grid, sampled in bf16 by a dithered sync, at a rate below half a step of it."""
    options = {"sync_rounding": "dither", "rollout_precision": "bf16", "learning_rate": 3e-5}
    trainers: list[DCGRPOTrainer] = []
    # Tensors of 57 rows: the last rank has fewer.
    model = published_model(intermediate_size=57)
    result = train(directory, world_size, trainers=trainers, model=model, **options)
    engine = trainers[0].vllm_generation
    engine.sync_weights()
    result["sampler"] = dict(engine.policy.named_parameters())
    result["trained"] = {name: _whole(p.detach()) for name, p in trainers[0].model.named_parameters()}
    return result


def dithered_sharded(directory: Path, world_size: int) -> dict[str, Any]:
    """`dithered` from weights that FSDP2 shards."""
    shard_with_fsdp2()
    return dithered(directory, world_size)


# The guard knows what is usual after eight steps; then the loss of rank 1 alone is far off, and next it is NaN.
FAULTS = {9: 1e4, 10: float("nan")}


class Snapshots(TrainerCallback):
    """Weights, whole, and this rank's moments as each step leaves them."""

    def __init__(self) -> None:
        self.weights: dict[int, torch.Tensor] = {}
        self.moments: dict[int, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        self.weights[step] = torch.cat([_whole(p.detach()).flatten() for p in kwargs["model"].parameters()])
        kept = kwargs["optimizer"].state_dict()["state"].values()
        numbers = [v for state in kept for v in state.values() if isinstance(v, torch.Tensor)]
        local = [v.to_local() if isinstance(v, DTensor) else v for v in numbers]
        self.moments[step] = torch.cat([v.detach().double().flatten() for v in local])


def guarded(directory: Path, world_size: int, resume: str | None = None) -> dict[str, Any]:
    """Two faulty losses on the last rank under a guard; leaves a checkpoint between them."""

    def break_losses(trainer: DCGRPOTrainer) -> None:
        compute_loss = trainer._compute_loss

        def faulty(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            is_last = trainer.accelerator.process_index == world_size - 1
            return compute_loss(model, inputs) * (FAULTS.get(trainer.state.global_step + 1, 1.0) if is_last else 1.0)

        trainer._compute_loss = faulty

    snapshots, trainers = Snapshots(), []
    options = {"gradient_guard": 50.0, "learning_rate": 1e-4, "max_steps": 11, "save_strategy": "steps"}
    result = train(
        directory, world_size, resume, trainers, break_losses, callbacks=[snapshots], save_steps=9,
        rollout_func=replayed_rollouts(), **options,
    )  # fmt: skip
    lines = (directory / "skipped.jsonl").read_text().splitlines()
    return result | {
        "steps": snapshots.weights,
        "moments": snapshots.moments,
        "skipped": [json.loads(line) for line in lines],
        "guard": trainers[0]._guard.state_dict(),
    }


def guarded_resumed(directory: Path, world_size: int) -> dict[str, Any]:
    """`guarded` again from its checkpoint, between the two steps that are left out."""
    return guarded(directory, world_size, str(directory.with_name("guarded") / "checkpoint-9"))


def guarded_sharded(directory: Path, world_size: int) -> dict[str, Any]:
    """`guarded` with weights that FSDP2 shards."""
    shard_with_fsdp2()
    return guarded(directory, world_size)


def guarded_sharded_resumed(directory: Path, world_size: int) -> dict[str, Any]:
    """`guarded_sharded` again from its checkpoint."""
    shard_with_fsdp2()
    return guarded(directory, world_size, str(directory.with_name("guarded_sharded") / "checkpoint-9"))


def sealed(directory: Path, world_size: int) -> dict[str, Any]:
    """Checkpoints that the last rank is late to write; and what is resumed when one or both lack the seal."""
    save_rng_state, save_to_json = Trainer._save_rng_state, TrainerState.save_to_json
    there: dict[str, list[str]] = {}

    def late(self: Trainer, output_dir: str) -> None:
        if self.accelerator.process_index == world_size - 1:
            time.sleep(1)
        save_rng_state(self, output_dir)

    def listing(self: TrainerState, json_path: str) -> None:
        folder = Path(json_path).parent
        there[folder.name] = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        save_to_json(self, json_path)

    options = {"save_strategy": "steps", "save_steps": 2, "rollout_func": replayed_rollouts()}
    Trainer._save_rng_state, TrainerState.save_to_json = late, listing
    try:
        result = train(directory, world_size, **options)
    finally:
        Trainer._save_rng_state, TrainerState.save_to_json = save_rng_state, save_to_json

    _remove_seal(directory / "checkpoint-4")
    resumed = train(directory, world_size, True, **options)
    _remove_seal(directory / "checkpoint-2")
    _remove_seal(directory / "checkpoint-4")
    try:
        train(directory, world_size, True, **options)
    except CheckpointError as error:
        return result | {"there": there, "resumed": resumed, "refused": str(error)}
    raise AssertionError("a half-written checkpoint was resumed from")


def _remove_seal(checkpoint: Path) -> None:
    """Has a checkpoint look as if the run had been killed before it was whole."""
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (checkpoint / "trainer_state.json").unlink()
    torch.distributed.barrier()


def sealed_sharded(directory: Path, world_size: int) -> dict[str, Any]:
    """`sealed` with each rank writing its own shards."""
    shard_with_fsdp2("SHARDED_STATE_DICT")
    return sealed(directory, world_size)


def shard_with_fsdp2(state_dict: str = "FULL_STATE_DICT") -> None:
    """Has Accelerate use FSDP2 for gloo ranks on the CPU, where torch has it but Accelerate 1.15 insists on DDP."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": state_dict}
    os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
    init = AcceleratorState.__init__

    def with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


RUNS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    run.__name__: run
    for run in (
        replayed,
        rejected,
        rejected_early,
        rejected_rank,
        rejected_rank_early,
        truncated,
        environment,
        engine,
        resumed,
        routed,
        sharded,
        rejected_sharded,
        sharded_files,
        sharded_resumed,
        dithered,
        dithered_sharded,
        one_rounding,
        one_rounding_resumed,
        one_rounding_sharded,
        one_rounding_sharded_resumed,
        guarded,
        guarded_resumed,
        guarded_sharded,
        guarded_sharded_resumed,
        sealed,
        sealed_sharded,
    )
}


def main() -> None:
    """Runs what the command line names and saves this rank's reports."""
    # Transformers 5.17 maps the optimizer's state to the device "cpu:0", which torch.load does not know.
    torch.serialization.register_package(
        0, lambda _: None, lambda storage, place: storage if place == "cpu:0" else None
    )
    world_size, directory, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    reports = {name: RUNS[name](directory / name, world_size) for name in names}
    rank = torch.distributed.get_rank()
    torch.save(reports, directory / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
