# SPDX-License-Identifier: Apache-2.0
"""The short help of `dc-trl train`: the options that most runs need, one line each. Nothing has to load for it.

`--help-all` lists all, from the real parser; a test holds this table against it.
"""

from dataclasses import dataclass

WIDTH = 120
# Where the help of an option starts, unless the option itself is longer.
_COLUMN = 40


@dataclass(frozen=True)
class Flag:
    """An option in the short help.

    Attributes:
        name: without dashes.
        values: what it takes: a word in capitals, or its closed list of words, as `a|b`. "" for a switch.
        help: what it does.
        default: as shown; "" where it has none to name.
    """

    name: str
    values: str
    help: str
    default: str = ""

    @property
    def line(self) -> str:
        """The option's line."""
        option = f"  --{self.name} {self.values}".rstrip()
        default = f" [{self.default}]" if self.default else ""
        return f"{option:<{_COLUMN - 2}}  {self.help}{default}"


GROUPS: dict[str, tuple[Flag, ...]] = {
    "recipe and data": (
        Flag("config", "RECIPE.yaml", "YAML file of options by name; a flag goes over it"),
        Flag("model_name_or_path", "MODEL", "model of the Hub, or a directory; needed"),
        Flag("dataset_name", "DATA", "problems: Hub dataset, .jsonl, .json or .parquet file, or a directory; needed"),
        Flag("dataset_config", "NAME", "configuration of a Hub dataset"),
        Flag("dataset_train_split", "SPLIT", "split to train on", "train"),
        Flag("dataset_deduplicate", "", "keep the first row of each problem; DAPO-Math-17k needs it", "False"),
        Flag("eval_dataset_name", "DATA", "problems to evaluate on; needed with --eval_strategy steps or epoch"),
        Flag("dataset_test_split", "SPLIT", "their split", "test"),
        Flag("problem_column", "NAME", "column of the problem; else prompt, problem or question"),
        Flag("answer_column", "NAME", "column of the answer; else reward_model, answer or solution"),
        Flag("prompt_template", "TEXT", "prompt around a problem, with {problem} in it; else asks for a boxed answer"),
        Flag("prompt_format", "auto|chat|plain", "by the chat template, or as text; auto: what the model has", "auto"),
        Flag("reward_funcs", "NAME …", "accuracy (math-verify), or dotted paths of your own functions", "accuracy"),
        Flag("reward_timeout", "SECONDS", "for math-verify to judge one completion; more is reward 0", "5.0"),
        Flag("reward_workers", "N", "math-verify processes of each rank", "4"),
        Flag(
            "accelerate_config", "NAME", "launch with Accelerate: single_gpu, fsdp2, … or a path; its flags may follow"
        ),
        Flag("dry_run", "", "load configuration, data and tokenizer, print the plan, train nothing"),
        Flag("gpu_memory_gib", "GIB", "memory of one GPU, for the plan", "80.0"),
    ),
    "the constraint (docs/method.md)": (
        Flag("constraint", "none|fixed|threshold|lagrangian", "penalty on a token's advantage", "lagrangian"),
        Flag("discrepancy_tolerance", "ε", "of the mean discrepancy; unset: calibrated from the first batches"),
        Flag("tolerance_slack", "FACTOR", "calibrated tolerance over the measured floor", "1.25"),
        Flag("tolerance_calibration_batches", "N", "generation batches that calibrate", "8"),
        Flag("multiplier_init", "λ", "the multiplier at the start", "0.1"),
        Flag("multiplier_max", "λ", "the most that it may become", "1.0"),
        Flag("dual_lr", "STEP", "how fast it follows a violation", "1.0"),
        Flag("discrepancy_metric", "prob_diff|prob_ratio|logprob_diff", "of a token", "prob_diff"),
        Flag("discrepancy_level", "token|sequence", "each token's own, or its trajectory's mean", "token"),
        Flag("discrepancy_average", "trajectory|token", "the mean that drives the multiplier", "trajectory"),
        Flag("rejection", "RULE …", "leave out tokens or sequences: geometric, icepop, … (docs/method.md)"),
        Flag("rejection_bounds", "JSON", 'bounds of the rules, as {"icepop": {"high": 2.0}}'),
        Flag("drpo_limit", "δ", "of --vllm_importance_sampling_mode drpo", "12.5"),
        Flag("length_decay", "", "halve the learning rate after a surge of the response length", "False"),
        Flag("length_decay_period", "STEPS", "between halvings; unset: from the surge, once it is detected"),
        Flag("length_decay_factor", "FACTOR", "period over the step of the surge", "1.8"),
        Flag("length_decay_min_lr_ratio", "SHARE", "floor of the decay", "0.1"),
        Flag("length_surge_ratio", "FACTOR", "growth of the mean length that is a surge", "3.0"),
        Flag("ess_rate", "", "scale each update's learning rate by the root of its rollouts' ESS", "False"),
        Flag("ess_rate_reference", "ESS", "at which the rate is whole", "1.0"),
        Flag("ess_rate_min_scale", "SHARE", "floor of that scale", "0.1"),
        Flag("gradient_guard", "FACTOR", "leave out steps whose gradient norm is above this multiple of the usual"),
        Flag("gradient_guard_patience", "N", "steps left out in a row that end the run", "5"),
    ),
    "engine and sync (docs/engines.md)": (
        Flag("rollout_backend", "vllm|transformers", "what samples: TRL's engine, or a copy in this process", "vllm"),
        Flag("rollout_precision", "bf16|fp16|fp8|int8|int4|int3", "of that copy; unset: as trained"),
        Flag("use_vllm", "", "sample with vLLM", "False"),
        Flag("vllm_mode", "colocate|server", "in this process, or on a server", "colocate"),
        Flag("vllm_server_base_url", "URL", "of the server"),
        Flag("vllm_gpu_memory_utilization", "SHARE", "of a GPU's memory for vLLM, colocated", "0.3"),
        Flag("vllm_tensor_parallel_size", "N", "GPUs of one colocated engine", "1"),
        Flag("vllm_max_model_length", "TOKENS", "context of the colocated engine"),
        Flag("vllm_engine_kwargs", "JSON", 'for the colocated vllm.LLM, as {"quantization": "fp8"}'),
        Flag("vllm_importance_sampling_mode", "MODE", "token_truncate, sequence_mask, …, drpo", "token_truncate"),
        Flag("vllm_importance_sampling_clip_max", "C", "most that an importance ratio may be", "2.0"),
        Flag("weight_sync", "nccl|disk", "how a vLLM server gets the weights", "nccl"),
        Flag("weight_sync_readers", "owner|group|all", "who may read weights on disk", "owner"),
        Flag("sync_rounding", "auto|nearest|dither", "how weights are rounded for the sampler", "auto"),
        Flag("router_replay", "", "mixtures of experts: train through the experts that sampled", "False"),
    ),
    "training, of TRL and transformers": (
        Flag("output_dir", "DIR", "for the model, its card, checkpoints and log.jsonl"),
        Flag("max_steps", "N", "optimizer steps; else by --num_train_epochs", "-1"),
        Flag("num_train_epochs", "N", "passes over the data", "3.0"),
        Flag("learning_rate", "RATE", "of AdamW", "1e-06"),
        Flag("lr_scheduler_type", "NAME", "base schedule", "constant"),
        Flag("warmup_steps", "N", "steps of rising rate, or a share of all below 1", "0"),
        Flag("max_grad_norm", "NORM", "gradients are clipped to it", "1.0"),
        Flag("per_device_train_batch_size", "N", "completions of a micro-batch", "8"),
        Flag("gradient_accumulation_steps", "N", "micro-batches of an update", "1"),
        Flag("steps_per_generation", "N", "micro-batches of a generation batch; unset: those of an update"),
        Flag("num_generations", "N", "completions of a problem, its group", "8"),
        Flag("num_iterations", "N", "times that a generation batch is trained on", "1"),
        Flag("max_completion_length", "TOKENS", "at which a completion is cut", "512"),
        Flag("temperature", "T", "of sampling", "1.0"),
        Flag("loss_type", "NAME", "grpo, dapo, dr_grpo, bnpo, …", "dapo"),
        Flag("beta", "β", "of the KL to a reference model; 0: there is none", "0.0"),
        Flag("advantage_estimator", "grpo|rloo", "TRL's normalisation, or leave-one-out", "grpo"),
        Flag("zero_variance_groups", "keep|drop", "groups whose rewards are all equal", "keep"),
        Flag("dtype", "NAME", "in which the model is loaded", "float32"),
        Flag("bf16", "true|false", "train under bf16 autocast; unset: true, unless --fp16 is"),
        Flag("gradient_checkpointing", "true|false", "recompute activations: less memory, more time", "True"),
        Flag("use_peft", "", "train a LoRA adapter; --lora_r, --lora_alpha, …", "False"),
        Flag("logging_steps", "N", "steps from one log entry to the next", "10"),
        Flag("log_format", "line|full", "what a log entry prints; OUTPUT_DIR/log.jsonl has all of it", "line"),
        Flag("log_completions", "", "print completions with each log entry", "False"),
        Flag("log_tokens", "", "write every token's log-probs to OUTPUT_DIR/tokens, for dc-trl report", "False"),
        Flag("report_to", "NAME …", "wandb, trackio, … or none"),
        Flag("eval_strategy", "no|steps|epoch", "when to evaluate", "no"),
        Flag("eval_steps", "N", "steps between evaluations"),
        Flag("save_strategy", "no|steps|epoch|best", "when to save a checkpoint", "steps"),
        Flag("save_steps", "N", "steps between checkpoints", "500"),
        Flag("resume_from_checkpoint", "true|PATH", "go on from the newest checkpoint, or from this one"),
        Flag("push_to_hub", "", "send the model and its card to the Hub", "False"),
        Flag("hub_model_id", "OWNER/NAME", "repository on the Hub"),
        Flag("seed", "N", "of everything that is drawn", "42"),
    ),
}


def short_help() -> str:
    """The short help, at most 120 lines of at most `WIDTH` columns."""
    lines = [
        "usage: dc-trl train --config RECIPE.yaml [--OPTION VALUE]…",
        "",
        "Train a policy by GRPO under a discrepancy constraint. Every option may stand in the recipe; [defaults].",
    ]
    for title, flags in GROUPS.items():
        lines += ["", f"{title}:", *(flag.line for flag in flags)]
    return "\n".join([*lines, "", "  --help-all lists every option of TRL, transformers and PEFT too, at length."])
