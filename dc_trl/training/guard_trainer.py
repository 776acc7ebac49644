# SPDX-License-Identifier: Apache-2.0
"""The gradient guard on TRL's GRPO trainer: steps that are left out, what is written of them, and when it stops.

Shapes: B sequences, T completion tokens.
"""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.utils import logging

from dc_trl.estimators.gradient_guard import GradientGuard, SkippedStep
from dc_trl.records.json_lines import append_lines
from dc_trl.records.run_log import SKIPPED_FILE
from dc_trl.training.rejection_trainer import RejectionTrainer

logger = logging.get_logger(__name__)


class GuardTrainer(RejectionTrainer):
    """GRPO with `gradient_guard` of [`DCGRPOConfig`].

    A step is left out by dropping its gradients before the optimizer steps. Optimizers pass over weights that have
    none, so weights, moments and the optimizer's own count of steps stay as they are: no decay, no weight decay. The
    step is counted and the schedule of the rate goes on; λ, the calibration of the tolerance and length-decay take in
    its rollouts, which were measured all the same.

    With fp16 a gradient that is not finite is the loss scaler's business: it leaves the step out and lowers its scale.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._guard: GradientGuard | None = None
        self._guarded: list[dict[str, Any]] = []  # the micro-batches of the optimizer step at hand
        super().__init__(*args, **kwargs)
        factor = self.args.gradient_guard
        if factor is None:
            return
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                f"`gradient_guard` is {factor} with DeepSpeed, which steps within the last backward, before the "
                "gradient norm is known. Use FSDP2, or leave it unset."
            )
        self._guard = GradientGuard(factor, self.args.gradient_guard_patience)

    def _forget_rollouts(self) -> None:
        super()._forget_rollouts()
        self._guarded = []

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        if self._guard is not None and self.model.training:
            self._guarded.append(inputs | {"loss": loss.detach()})
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self._guard is not None:
            self._judge(self._guard, model, self._largest(norm))
        return norm

    def _largest(self, norm: Any) -> float:
        """The gradient norm by which every process decides: the largest, or NaN. A collective."""
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        own = torch.as_tensor(whole, dtype=torch.float32, device=self.accelerator.device).detach().reshape(1)
        return float(self.accelerator.gather(own).max())

    def _judge(self, guard: GradientGuard, model: nn.Module, norm: float) -> None:
        guarded, self._guarded = self._guarded, []
        if self.args.fp16 and not math.isfinite(norm):
            return
        usual = guard.median
        skipped = guard.judge(norm)
        metrics = self._metrics["train"]
        metrics["dc/guard/skipped"].append(float(skipped is not None))
        if usual and math.isfinite(norm):
            metrics["dc/guard/norm_ratio"].append(norm / usual)
        if skipped is None:
            return
        model.zero_grad()
        step = self.state.global_step + 1
        self._write(step, skipped, guarded)
        if guard.is_exhausted:
            raise FloatingPointError(_diagnosis(step, skipped, self.args.gradient_guard))
        if self.accelerator.is_main_process:
            logger.warning("DC-GRPO: step %d is left out: %s.", step, skipped.reason)

    def _write(self, step: int, skipped: SkippedStep, guarded: list[dict[str, Any]]) -> None:
        """Appends the record of a step that is left out to `output_dir/skipped.jsonl`. A collective."""
        rows = gather_object([row for number, batch in enumerate(guarded) for row in self._rows(number, batch)])
        if self.accelerator.is_main_process:
            line = {"step": step, "reason": skipped.reason, "in_a_row": skipped.in_a_row, "completions": rows}
            append_lines(Path(str(self.args.output_dir), SKIPPED_FILE), [line])

    def _rows(self, micro_batch: int, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """What is written of each completion of a micro-batch: numbers and its place; texts with `log_tokens`."""
        size = len(batch["completion_mask"])
        columns = {
            "tokens": batch["completion_mask"].sum(1),
            "advantage": batch["advantages"].reshape(size, -1).float().mean(1),
            "loss": batch["loss"].float().expand(size),
        }
        ratio = batch.get("importance_sampling_ratio")
        if ratio is not None:
            columns["importance_ratio_max"] = ratio.float().reshape(size, -1).amax(1)
        values = {name: column.tolist() for name, column in columns.items()}
        if self.args.log_tokens:
            for name in ("prompt", "completion"):
                kept = batch[f"{name}_mask"].bool()
                pairs = zip(batch[f"{name}_ids"], kept, strict=True)
                values[name] = [self._tokenizer.decode(ids[mask]) for ids, mask in pairs]
        place = {"process": self.accelerator.process_index, "micro_batch": micro_batch}
        return [place | {"row": row} | {name: column[row] for name, column in values.items()} for row in range(size)]


def _diagnosis(step: int, skipped: SkippedStep, factor: float | None) -> str:
    if math.isfinite(skipped.norm):
        cause = (
            "So many in a row are no spike: the policy has changed, or the data have. Look at `dc/ess`, "
            "`dc/discrepancy/p99` and the reward from where they began, go back to a checkpoint before it and lower "
            f"`learning_rate`; or raise `gradient_guard` = {factor} where gradients of this size are sound"
        )
    else:
        cause = (
            "Weights or activations overflow for every batch: go back to an earlier checkpoint and lower "
            "`learning_rate`, or train in bf16 or float32"
        )
    return (
        f"{skipped.in_a_row} optimizer steps in a row were left out, up to step {step}, where {skipped.reason}. "
        f"{cause}. `{SKIPPED_FILE}` in the output directory has their completions; `gradient_guard_patience` is how "
        "many in a row end a run."
    )
