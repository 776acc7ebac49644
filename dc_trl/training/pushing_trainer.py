# SPDX-License-Identifier: Apache-2.0
"""What leaves the machine with a push to the Hub: the model and its card, by a list of what is sent.

transformers sends the whole output directory but its checkpoints, and in `training_args.bin` the configuration with
the Hub's token.
"""

import copy
import glob
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import hf_api, logging
from trl import GRPOTrainer

from dc_trl.config import DCGRPOConfig
from dc_trl.records.card.model_card import CARD, CURVES
from dc_trl.rollouts.shown import without_secrets
from dc_trl.training.attributes import temporary_attributes

logger = logging.get_logger(__name__)

ARGUMENTS_FILE = "training_args.bin"

SENT = (
    CARD,
    CURVES,
    # Model and adapter.
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "adapter_config.json",
    "adapter_model.bin",
    # Tokenizer and processor.
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""What a push sends of the output directory, as patterns; `*` does not cross a `/`. On top come what the tokenizer's
class calls its vocabulary files, and the code of a model that brings its own."""


class PushingTrainer(GRPOTrainer):
    """GRPO that pushes the model and its card, not the run, and whose saved arguments hold no secret."""

    args: DCGRPOConfig

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves as TRL does; the saved arguments are without secrets."""
        super().save_model(output_dir, _internal_call)
        self._rewrite_arguments(output_dir)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Pushes as TRL does, of the output directory the model and its card: [`SENT`]."""
        with self._sending():
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with self._sending():
            super()._push_from_checkpoint(checkpoint_folder)
        self._rewrite_arguments(None)  # which transformers has just saved again

    def _rewrite_arguments(self, folder: str | None) -> None:
        path = Path(folder or str(self.args.output_dir), ARGUMENTS_FILE)
        if self.args.should_save and path.is_file():
            torch.save(arguments_without_secrets(self.args), path)

    @contextmanager
    def _sending(self) -> Iterator[None]:
        """While this is open, transformers' client sends what is to be sent of the folders that it is given."""
        api = hf_api()
        upload = partial(_upload, api.upload_folder, Path(str(self.args.output_dir)), self.processing_class)
        with temporary_attributes(api, upload_folder=upload):
            yield


def _upload(upload_folder: Any, output_dir: Path, processing_class: Any, **asked: Any) -> Any:
    """`upload_folder` of the Hub's client, of less.

    A checkpoint that the user asked to be pushed (`hub_strategy="checkpoint"`) is there to resume from, and goes
    whole, except for the saved arguments, which nothing reads.
    """
    folder = Path(asked["folder_path"])
    if folder.resolve() != output_dir.resolve():
        return upload_folder(**asked, ignore_patterns=[ARGUMENTS_FILE])
    sent = files_to_send(folder, processing_class)
    logger.info("Of %s, a push sends %s.", folder, ", ".join(sent))
    return upload_folder(**asked | {"allow_patterns": [glob.escape(name) for name in sent]})


def files_to_send(folder: Path, processing_class: Any = None) -> list[str]:
    """The files of an output directory that a push sends, by their path in it.

    Args:
        folder: the output directory.
        processing_class: tokenizer or processor, whose vocabulary files may have names of their own.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    vocabulary = [glob.escape(name) for name in (getattr(tokenizer, "vocab_files_names", None) or {}).values()]
    code = ["*.py"] if _brings_code(folder) else []
    found = {path for pattern in (*SENT, *vocabulary, *code) for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _brings_code(folder: Path) -> bool:
    """Whether the saved model or tokenizer names classes of its own (`trust_remote_code`), saved beside it."""
    files = (folder / name for name in ("config.json", "tokenizer_config.json"))
    return any("auto_map" in json.loads(path.read_text(encoding="utf-8")) for path in files if path.is_file())


def arguments_without_secrets(args: Any) -> Any:
    """A copy of a configuration without the texts that its names call secrets, such as `hub_token`."""
    own = copy.copy(args)
    for name, value in vars(args).items():
        setattr(own, name, without_secrets(name, value))
    return own
