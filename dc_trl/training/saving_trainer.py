# SPDX-License-Identifier: Apache-2.0
"""What a constrained run leaves behind: checkpoints with their state, the model card, the policy as it samples."""

from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers.utils import logging

from dc_trl.constraint import DiscrepancyConstraint
from dc_trl.records.card import model_card
from dc_trl.records.text import visible
from dc_trl.rollouts import deployed
from dc_trl.training.guard_trainer import GuardTrainer
from dc_trl.training.instruments import Instruments
from dc_trl.training.resuming import CheckpointError, break_seals, check_written_to_the_end, newest, seals
from dc_trl.training.state import measured_with, restore, restore_guard, write_state

logger = logging.get_logger(__name__)


class SavingTrainer(GuardTrainer):
    """GRPO that saves the constraint with its checkpoints, and says in the model card what it came to."""

    _constraint: DiscrepancyConstraint
    _instruments: Instruments

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes TRL's model card with the constraint, the tolerance in use and the last measurements."""
        # The model's, by default a directory's, may hold what no text file does.
        name, *others = args or (kwargs.pop("model_name", None),)
        super().create_model_card(name and visible(name), *others, **kwargs)
        if self.is_world_process_zero():
            tolerance, multiplier = self._constraint.tolerance.value, self._constraint.dual.value
            state = (tolerance, multiplier, self._sync_rounding, self.state.log_history)
            chats = bool(getattr(self.processing_class, "chat_template", None))
            model_card.complete(Path(str(self.args.output_dir)), self.args, *state, chats=chats)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as TRL does, from fresh rollouts; a second call goes on with multiplier and tolerance.

        A resumed run goes on from a checkpoint that was written to its end; one of the run's last step trains nothing.

        Args:
            resume_from_checkpoint: a checkpoint's path; or True for the newest in `output_dir` that is whole, where
                newer ones that a killed process left half-written are passed over with a warning.

        Raises:
            CheckpointError: the checkpoint that is named is half-written, or there is none that is whole.
            RuntimeError: another trainer sends its weights over disk from the same `output_dir`.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = self._whole_checkpoint(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _whole_checkpoint(self, asked: str | bool) -> str:
        """The path to resume from, the same on every process."""
        written_last = seals(self.args.use_adaptive_entropy)
        if isinstance(asked, str):
            check_written_to_the_end(Path(asked), written_last)
            return asked
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                found = [newest(Path(str(self.args.output_dir)), written_last)]
            except CheckpointError as error:
                found = [error]
        choice = gather_object(found)[0]
        if isinstance(choice, CheckpointError):
            raise choice
        if self.accelerator.is_main_process:
            for path, wrong in choice.passed_over.items():
                logger.warning("DC-GRPO, resuming: %s is passed over: it was not written to its end, %s.", path, wrong)
        return str(choice.taken)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers asks after each step whether it was the last one, so a finished run would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # what follows seals the checkpoint, of every process

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves as TRL does; a checkpoint also gets λ, tolerance, calibration, and the card."""
        if _internal_call and output_dir is not None and self.args.should_save:
            break_seals(Path(output_dir))
        super().save_model(output_dir, _internal_call)
        # transformers pushes a checkpoint at the end of `_save_checkpoint`, so what it is to hold is written here.
        if _internal_call and output_dir is not None and self.args.should_save:
            state = self._constraint.state_dict() | {"instruments": self._instruments.state_dict()}
            guard = {} if self._guard is None else {"guard": self._guard.state_dict()}
            write_state(Path(output_dir), state | guard | {"measured_with": measured_with(self)})
            deployed.save_sync_state(getattr(self, "vllm_generation", None), Path(output_dir))
            model_card.copy_card(Path(str(self.args.output_dir)), Path(output_dir))

    def save_deployed(self, path: str | Path) -> None:
        """Saves model and tokenizer with the weights as they sample: in the sampler's precision, rounded as at a sync.

        `save_model` keeps the weights in training, in their own precision. Rounding those to nearest, for deployment
        in bf16, would put most weights back where they were before the training; this keeps what was learnt. Quantised
        precisions are saved dequantised, in the dtype in which they are multiplied. A collective: call it on every
        process.

        Args:
            path: a directory, made if it is not there.

        Raises:
            ValueError: no engine with weights of its own samples in this run.
        """
        engine = getattr(self, "vllm_generation", None)
        if not hasattr(engine, "deployed_weights"):
            raise ValueError(
                "save_deployed needs a rollout engine with weights of its own, and here `transformers.generate` or a "
                "`rollout_func` samples. Set `rollout_backend='transformers'` or `use_vllm=True`, or use `save_model`."
            )
        deployed.save_deployed(engine, self.model, self.accelerator, Path(path))
        processing_class: Any = self.processing_class
        if self.is_world_process_zero():
            processing_class.save_pretrained(path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            deployed.load_sync_state(getattr(self, "vllm_generation", None), Path(checkpoint))
            restore_guard(self._guard, Path(checkpoint))
            for notice in restore(self._constraint, self._instruments, Path(checkpoint), measured_with(self)):
                if self.accelerator.is_main_process:
                    logger.warning("DC-GRPO, resuming: %s", notice)
            if self.state.global_step >= self.state.max_steps and self.accelerator.is_main_process:
                logger.warning(
                    "DC-GRPO, resuming: %s is of step %d, and this run ends at step %d: nothing is trained. To go on, "
                    "raise `max_steps` or `num_train_epochs`.",
                    checkpoint,
                    self.state.global_step,
                    self.state.max_steps,
                )
