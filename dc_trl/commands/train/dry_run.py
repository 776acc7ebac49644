# SPDX-License-Identifier: Apache-2.0
"""The plan of a run, as text: what `dc-trl train --dry_run` prints. Loads configuration, data and tokenizer only."""

from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer

from dc_trl.commands.train.plan import (
    GIB,
    BatchPlan,
    EnginePlan,
    Launch,
    ModelSize,
    activation_bytes,
    gathered_bytes,
    state_bytes,
    weight_bytes_of,
)
from dc_trl.estimators.rejection import resolve_bounds
from dc_trl.records.text import terminal
from dc_trl.rollouts.engines import engine_name, engine_of
from dc_trl.tasks.prompts import prompt_ids

Section = tuple[str, list[tuple[str, str]]]

# Problems whose prompts are tokenized for the length figures.
_SAMPLED_PROMPTS = 256
# Bytes of a parameter in the in-process engine's copy; the other precisions are simulated in the trained one.
_COPY_BYTES = {"bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}


def describe_run(args: Any, model_args: Any, dataset: Dataset, plan: BatchPlan, launch: Launch, gpu_gib: float) -> str:
    """The plan of a run as a table.

    Args:
        args: the `DCGRPOConfig`.
        model_args: TRL's `ModelConfig`.
        dataset: as `load_math_dataset` returns it.
        plan: the batches, for `launch.processes` processes.
        launch: processes and sharding.
        gpu_gib: memory of one GPU, GiB; 0 where training is on the CPU.

    Raises:
        OSError: if the model's configuration or tokenizer cannot be loaded.
    """
    name = model_args.model_name_or_path
    options = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    config = AutoConfig.from_pretrained(name, **options)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    size = ModelSize.from_config(config)
    lengths = _prompt_lengths(tokenizer, dataset)
    weight_bytes = weight_bytes_of(model_args.dtype, bool(args.bf16))
    sections = [
        ("model", _model(name, config, size, tokenizer)),
        ("data", _data(dataset, lengths)),
        ("batches", _batches(args, plan, launch, len(dataset))),
        ("constraint", _constraint(args)),
        ("engine", _engine(args, size, plan, gpu_gib, weight_bytes)),
        ("memory per process", _memory(args, model_args, size, plan, launch, gpu_gib, max(lengths), weight_bytes)),
    ]
    return _table(sections)


def _prompt_lengths(tokenizer: Any, dataset: Dataset) -> list[int]:
    prompts = dataset[:_SAMPLED_PROMPTS]["prompt"]
    return [len(prompt_ids(tokenizer, prompt)) for prompt in prompts]


def _model(name: str, config: Any, size: ModelSize, tokenizer: Any) -> list[tuple[str, str]]:
    return [
        ("name", terminal(name)),
        ("parameters", f"{size.parameters:,} ({config.model_type}, {size.layers} layers)"),
        ("tokenizer", f"{len(tokenizer):,} tokens"),
    ]


def _data(dataset: Dataset, lengths: list[int]) -> list[tuple[str, str]]:
    mean = sum(lengths) / len(lengths)
    return [
        ("problems", f"{len(dataset):,}"),
        ("prompts", "plain text" if isinstance(dataset[0]["prompt"], str) else "messages, by the chat template"),
        ("prompt tokens", f"mean {mean:.0f}, longest {max(lengths)}, of the first {len(lengths)}"),
        ("first answer", terminal(dataset[0]["solution"][:60])),
    ]


def _batches(args: Any, plan: BatchPlan, launch: Launch, problems: int) -> list[tuple[str, str]]:
    longest = args.max_completion_length
    if args.max_steps > 0:
        total = f"{args.max_steps:,} (max_steps)"
    else:
        steps = args.num_train_epochs * problems / plan.prompts_per_generation * plan.updates_per_generation
        total = f"{steps:,.0f} ({args.num_train_epochs:g} epochs)"
    return [
        ("processes", f"{launch.processes}, sharding: {launch.sharding}"),
        (
            "completions per update",
            f"{plan.completions_per_update:,} = {plan.per_device} per device × {plan.processes} × "
            f"{plan.accumulation} accumulated",
        ),
        (
            "completions per generation batch",
            f"{plan.generation_batch:,} = {plan.prompts_per_generation:,} prompts × {plan.generations}",
        ),
        ("updates per generation batch", f"{plan.updates_per_generation:g}"),
        (
            "layout",
            "aligned: π is the loss forward's" if plan.aligned else "misaligned: π is recomputed once, as in TRL",
        ),
        ("tokens per update, at most", f"{plan.completions_per_update * longest:,}"),
        ("tokens per generation batch, at most", f"{plan.generation_batch * longest:,}"),
        ("updates in all", total),
    ]


def _constraint(args: Any) -> list[tuple[str, str]]:
    tolerance = args.discrepancy_tolerance
    if tolerance is None:
        tolerance = f"calibrated: {args.tolerance_calibration_batches} batches, × {args.tolerance_slack:g}"
    period = args.length_decay_period or f"{args.length_decay_factor:g} × surge step, when detected"
    return [
        ("constraint", args.constraint),
        ("tolerance", str(tolerance)),
        (
            "multiplier",
            f"starts at {args.multiplier_init:g}, at most {args.multiplier_max:g}, dual_lr {args.dual_lr:g}",
        ),
        ("extra forwards for it", "0"),
        ("rejection", _rejection(args)),
        ("length-decay", f"period {period}" if args.length_decay else "off"),
    ]


def _rejection(args: Any) -> str:
    rules = resolve_bounds(args.rejection, args.rejection_bounds or {})
    bounds = {name: ", ".join(f"{bound} {value:g}" for bound, value in rule.items()) for name, rule in rules.items()}
    return "; ".join(f"{name} ({words})" for name, words in bounds.items()) or "off"


def _engine(args: Any, size: ModelSize, plan: BatchPlan, gpu_gib: float, weight_bytes: int) -> list[tuple[str, str]]:
    kv = size.kv_bytes_per_token()
    rows = [("sampled by", engine_name(vars(args))), ("KV cache per token (bf16)", f"{kv:,} bytes")]
    if engine_of(vars(args)).sends_weights:
        rows.append(("bytes per weight sync", f"{size.sync_bytes(weight_bytes):,}"))
    engine = _engine_plan(args)
    if engine.utilization:
        tokens = engine.kv_tokens(size, gpu_gib * GIB)
        engines = plan.processes // engine.tensor_parallel or 1
        asked = plan.generation_batch // engines * args.max_completion_length
        rows.append(("KV cache holds, per engine", f"{tokens:,} tokens; a batch asks for {asked:,} at most"))
        if tokens < args.max_completion_length:
            rows.append(("DOES NOT FIT", "raise vllm_gpu_memory_utilization or vllm_tensor_parallel_size"))
    return rows


def _engine_plan(args: Any) -> EnginePlan:
    if args.use_vllm and args.vllm_mode == "colocate":
        return EnginePlan(
            args.vllm_gpu_memory_utilization, args.vllm_tensor_parallel_size, args.vllm_enable_sleep_mode
        )
    return EnginePlan()


def _memory(
    args: Any,
    model_args: Any,
    size: ModelSize,
    plan: BatchPlan,
    launch: Launch,
    gpu_gib: float,
    prompt_tokens: int,
    weight_bytes: int,
) -> list[tuple[str, str]]:
    bf16 = bool(args.bf16)
    state = state_bytes(size, launch, bf16, weight_bytes)
    tokens = prompt_tokens + args.max_completion_length
    activations = activation_bytes(size, plan.per_device, tokens, bf16, args.gradient_checkpointing)
    gathered = gathered_bytes(size, launch, bf16)
    engine = _engine_plan(args)
    sampler = engine.utilization * gpu_gib * GIB
    if engine_of(vars(args)).copies_policy:
        sampler = size.parameters * _COPY_BYTES.get(args.rollout_precision, weight_bytes)
    generating = state["weights"] + state["optimizer"] + sampler
    training = sum(state.values()) + gathered + activations + (0 if engine.sleeps else sampler)
    rows = {**state, "gathered weights": gathered, "activations (rough)": activations, "sampling engine": sampler}
    table = [(name, _bytes(value)) for name, value in rows.items()]
    if model_args.use_peft:
        table.append(("note", "for full fine-tuning; LoRA needs less"))
    for phase, peak in (("peak, sampling", generating), ("peak, training", training)):
        share = f" of {gpu_gib:g} GiB" if gpu_gib else ""
        table.append((phase, _bytes(peak) + share + (" DOES NOT FIT" if share and peak > gpu_gib * GIB else "")))
    return table


def _bytes(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB / 100 else f"{number / 2**20:.2f} MiB"


def _table(sections: list[Section]) -> str:
    width = max(len(name) for _, rows in sections for name, _ in rows)
    lines = ["Dry run: nothing is trained. Memory and tokens are estimates.", ""]
    for title, rows in sections:
        lines.append(title)
        lines += [f"  {name:<{width}}  {value}" for name, value in rows]
    return "\n".join(lines)
