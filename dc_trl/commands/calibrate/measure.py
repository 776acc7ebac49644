# SPDX-License-Identifier: Apache-2.0
"""The passes of a calibration: evaluations of the recipe's own trainer, and what is done to it between them.

Training is started, so that Accelerate prepares precision and sharding as it will for the run (it prepares FSDP2 and
ZeRO-2 with an optimizer only), and ended before its first step. In between, evaluations take the way of training:
weight sync, sampling, scoring. Dropout is off in them.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import TrainerCallback
from trl.trainer.utils import add_fused_lm_head

from dc_trl.commands.calibrate.grid import ON_GRID, Grid
from dc_trl.commands.calibrate.nudge import Nudge, OffGrid, count_on_grid, fingerprint, moved, trained_finer
from dc_trl.commands.calibrate.progress import SAMPLING, SCORING, PassClock, shown
from dc_trl.commands.calibrate.scores import Scores, join, mean_discrepancy, merge
from dc_trl.rollouts.precisions import INTEGER_BITS
from dc_trl.rollouts.sync_rounding import forward_rounds_alike, rounding_in_force
from dc_trl.rollouts.weights import plain_model
from dc_trl.step import Step
from dc_trl.training.attributes import temporary_attributes

# Temperatures, as multiples of the one asked for, at which the first pass is scored again. Any engine that is more
# than 5 % and less than a factor of two off is nearer to one of them than to 1.
TEMPERATURE_FACTORS = (0.6, 0.9, 1.1, 1.6)
# The other temperature at which one pass samples, as a multiple of the recipe's.
OTHER_TEMPERATURE = 0.7


class Recording:
    """Mixed into `DCGRPOTrainer`: keeps what each evaluation samples and scores, and scores old samples again.

    It observes the trainer's steps. Seams: `_generate_and_score_completions`, and the `batch_size` of
    `_get_per_token_logps_and_entropies`, which bounds a forward to a training micro-batch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._rollouts: list[dict[str, Any]] = []
        self._replayed: Iterator[dict[str, Any]] | None = None
        self._records: list[dict[str, Any]] = []
        self.clock = PassClock()
        super().__init__(*args, **kwargs)
        self.step_observers.append(self._record)  # type: ignore[attr-defined]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._replayed is not None:
            self.clock.start(SCORING)
            return dict(next(self._replayed))
        self.clock.start(SAMPLING)
        batch = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        self.clock.end()
        self.clock.start(SCORING)
        # Old log-probs are those of the weights and the temperature that sampled: they must not stand in for new ones.
        self._rollouts.append({key: value for key, value in batch.items() if key != "old_per_token_logps"})
        return batch

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        most = self.args.per_device_train_batch_size  # type: ignore[attr-defined]
        kwargs["batch_size"] = min(kwargs.get("batch_size") or most, most)
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]

    def _record(self, inputs: dict[str, Any], step: Step) -> None:
        self.clock.end()
        lengths = inputs["completion_mask"].sum(1)
        last = inputs["completion_ids"].gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        ends = torch.tensor(self.eos_token_ids, device=last.device)  # type: ignore[attr-defined]
        ids = inputs["prompt_ids"].cpu()
        shown = inputs["prompt_mask"].bool().cpu()
        self._records.append(
            {
                "train_logps": step.train_logps.float().cpu(),
                "sampling_logps": step.sampling_logps.float().cpu(),
                "mask": step.masks.measured.cpu(),
                "cut": ~torch.isin(last, ends).cpu(),
                "prompts": [tuple(row[keep].tolist()) for row, keep in zip(ids, shown, strict=True)],
            }
        )

    def sample(self, dataset: Any, sync: bool = True) -> Scores:
        """Samples and scores completions of the problems; `sync` sends the weights to the engine first."""
        self._rollouts = []
        if sync:
            self._last_loaded_step = -1
        return self._scored(dataset)

    def rescore(self, dataset: Any) -> Scores:
        """Scores the last samples with the weights and the temperature as they are now."""
        self._replayed = iter(self._rollouts)
        try:
            return self._scored(dataset)
        finally:
            self._replayed = None

    def _scored(self, dataset: Any) -> Scores:
        self._records = []
        self.evaluate(dataset)  # type: ignore[attr-defined]
        return merge(gather_object(self._records))


@contextmanager
def scoring_temperature(trainer: Any, temperature: float) -> Iterator[None]:
    """While this is open, the trainer's forward scores at this temperature.

    Seam of TRL: `add_fused_lm_head` binds the temperature to the model's `forward`, so that is replaced.
    """
    model: Any = plain_model(trainer.model, trainer.accelerator)
    before = model.forward
    head = trainer.args.cast_lm_head_to_fp32
    add_fused_lm_head(model, temperature, cast_lm_head_to_fp32=head, outputs=("log_probs", "entropy"))
    try:
        yield
    finally:
        model.forward = before


@dataclass
class Measurement:
    """What the passes gave; None where one was not run.

    Attributes:
        first, second: two passes with the same weights, and `floor`, both in one.
        weights_moved: relative change of the trainer's weights over two syncs, which should only read them.
        misfits: of the first pass, mean |log π − log μ| by the temperature that the trainer scored at.
        other_misfits: the same of the pass at `other_temperature`; None where it was not run.
        stale: the second pass's samples scored by the nudged weights: what a dead sync would look like.
        nudged: sampled and scored after the nudge and a sync. `nudge_size` is its relative size.
        undone: the nudged pass's samples, scored by the weights before the nudge.
        grid: where the weights lie, and how they are rounded.
        off_grid: sampled and scored with the weights moved off the sampler's grid; only where they lie on it.
    """

    first: Scores
    second: Scores
    floor: Scores
    weights_moved: float = 0.0
    misfits: dict[float, float] = field(default_factory=dict)
    other_temperature: float | None = None
    other_misfits: dict[float, float] | None = None
    stale: Scores | None = None
    nudged: Scores | None = None
    undone: Scores | None = None
    nudge_size: float | None = None
    grid: Grid | None = None
    off_grid: Scores | None = None


class _Measured(Exception):
    """Ends training before its first step."""


class _Measuring(TrainerCallback):
    """Measures once everything is prepared for training."""

    def __init__(self, trainer: Any, dataset: Any) -> None:
        self.trainer, self.dataset = trainer, dataset

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.result = _passes(self.trainer, self.dataset)
        raise _Measured


def measure(trainer: Any, dataset: Any) -> Measurement:
    """Runs every pass, and leaves the trainer's weights, and the engine's, as they were.

    Args:
        trainer: a `Recording` trainer that has not trained.
        dataset: the problems.
    """
    measuring = _Measuring(trainer, dataset)
    trainer.add_callback(measuring)
    if trainer.args.rollout_backend == "transformers":
        trainer.vllm_generation.on_progress = trainer.clock.share
    try:
        with shown(trainer.clock) if trainer.accelerator.is_main_process else nullcontext():
            trainer.train()
    except _Measured:
        pass
    finally:
        trainer.remove_callback(measuring)
    return measuring.result


def _passes(trainer: Any, dataset: Any) -> Measurement:
    others = {f * trainer.temperature for f in TEMPERATURE_FACTORS} | {1.0}  # 1: raw log-probs
    others -= {trainer.temperature}
    _begin(trainer, dataset, "pass 1: as loaded", scorings=len(others))
    before = fingerprint(trainer.model)
    first = trainer.sample(dataset)
    misfits = _misfits(trainer, dataset, first, sorted(others))
    _begin(trainer, dataset, "pass 2: the same weights, synced again")
    second = trainer.sample(dataset)
    change = max(gather_object([moved(before, fingerprint(trainer.model))]))
    result = Measurement(first, second, join(first, second), change, misfits)
    if not bool(result.floor.valid.any()):
        return result
    _nudge(trainer, dataset, result)
    _other_temperature(trainer, dataset, result)
    _off_the_grid(trainer, dataset, result)
    return result


def _misfits(trainer: Any, dataset: Any, own: Scores, temperatures: list[float]) -> dict[float, float]:
    """Mean |log π − log μ| of the last samples, scored at the trainer's temperature (`own`) and at others."""
    misfits = {trainer.temperature: _misfit(own)}
    for temperature in temperatures:
        with scoring_temperature(trainer, temperature):
            misfits[temperature] = _misfit(trainer.rescore(dataset))
    return misfits


def _misfit(scores: Scores) -> float:
    return scores.log_ratios().abs().mean().item()


def _other_temperature(trainer: Any, dataset: Any, result: Measurement) -> None:
    engine, asked = trainer.vllm_generation, trainer.temperature
    if "temperature" in (getattr(engine, "generation_kwargs", None) or {}):
        return  # it would override what is asked for here
    other = OTHER_TEMPERATURE * asked
    scored_at = sorted({asked, 1.0} - {other})
    _begin(trainer, dataset, f"pass 4: temperature {other:g}", scorings=len(scored_at))
    with temporary_attributes(engine, temperature=other), temporary_attributes(trainer, temperature=other):
        with scoring_temperature(trainer, other):
            own = trainer.sample(dataset, sync=False)
        result.other_temperature = other
        result.other_misfits = _misfits(trainer, dataset, own, scored_at)


def _nudge(trainer: Any, dataset: Any, result: Measurement) -> None:
    floor = mean_discrepancy(result.floor, "logprob_diff", "token").value
    nudge = Nudge(trainer.model, trainer.args.seed)
    _say(trainer, title := "looking for a nudge of the weights that a dead sync would show")
    trainer.clock.begin(title, sampled=None)
    try:
        while True:
            nudge.grow()
            result.stale = trainer.rescore(dataset)
            stale = mean_discrepancy(result.stale, "logprob_diff", "token").value
            if nudge.is_enough(stale, floor):
                break
        result.nudge_size = nudge.size
        _begin(trainer, dataset, f"pass 3: weights nudged by {nudge.size:.1%}", scorings=1)
        result.nudged = trainer.sample(dataset)
        nudge.undo()
        result.undone = trainer.rescore(dataset)
    finally:
        nudge.undo()
        trainer.vllm_generation.sync_weights()


def _off_the_grid(trainer: Any, dataset: Any, result: Measurement) -> None:
    dtype = getattr(trainer.vllm_generation, "deployed_dtype", torch.bfloat16)
    if dtype not in (torch.bfloat16, torch.float16):
        dtype = torch.bfloat16  # quantised weights, multiplied in float32: the grid is the checkpoint's
    on, size = (sum(counts) for counts in zip(*gather_object([count_on_grid(trainer.model, dtype)]), strict=True))
    result.grid = grid = Grid(
        share=on / max(size, 1),
        dtype=str(dtype).removeprefix("torch."),
        rounding=_rounding(trainer),
        forward_rounds=forward_rounds_alike(trainer.args, trainer.accelerator),
        integers=trainer.args.rollout_precision in INTEGER_BITS,
    )
    if grid.share < ON_GRID or grid.rounding is None:
        return
    _begin(trainer, dataset, "pass 5: weights off the sampler's grid")
    weights = OffGrid(trainer.model, trainer.args.seed, dtype)
    try:
        weights.apply()
        result.off_grid = trainer.sample(dataset)
    finally:
        weights.undo()
        trainer.vllm_generation.sync_weights()


def _rounding(trainer: Any) -> str | None:
    if not trained_finer(trainer.model):
        return None
    return rounding_in_force(trainer.vllm_generation, trainer.args, trainer.accelerator)


def _begin(trainer: Any, dataset: Any, title: str, scorings: int = 0) -> None:
    """A pass begins, which samples the problems once, and scores the samples so many times more."""
    batches = len(trainer.get_eval_dataloader(dataset))
    _say(trainer, title)
    trainer.clock.begin(title, batches, scorings * batches)


def _say(trainer: Any, message: str) -> None:
    if trainer.accelerator.is_main_process:
        tqdm.write(f"dc-trl calibrate: {message}", file=sys.stderr)
        sys.stderr.flush()
