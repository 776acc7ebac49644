# SPDX-License-Identifier: Apache-2.0
"""The arguments of `dc-trl calibrate`: those of training, its own, and what a measurement overrides."""

from dataclasses import dataclass, field

from dc_trl.commands.train.arguments import TrainArguments

# What a measurement must not do, or does not need: constrain, report, save, hold a reference model, drop groups (all
# rewards are 0), score twice.
OVERRIDES = {
    "constraint": "none",
    "report_to": "none",
    "save_strategy": "no",
    "push_to_hub": "false",
    "eval_strategy": "no",
    "load_best_model_at_end": "false",
    "disable_tqdm": "true",
    "log_completions": "false",
    "log_tokens": "false",
    "length_decay": "false",
    "beta": "0",
    "zero_variance_groups": "keep",
    "vllm_importance_sampling_correction": "false",
}


@dataclass
class CalibrateArguments(TrainArguments):
    """What `dc-trl calibrate` takes beside what `dc-trl train` does."""

    problems: int = field(
        default=16,
        metadata={"help": "Problems to sample, from the start of the data; `num_generations` completions each."},
    )
    set: str | None = field(
        default=None, metadata={"help": "Recipe in which to set `discrepancy_tolerance`, if the engine is healthy."}
    )
