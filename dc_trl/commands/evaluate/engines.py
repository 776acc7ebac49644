# SPDX-License-Identifier: Apache-2.0
"""What an engine of an evaluation is, and the one that samples a copy of the policy in this process.

An engine says what it is before it loads a model, so that a run whose samples are all recorded loads none. The vLLM
engines are in `vllm_engines`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from dc_trl.commands.usage import UsageError


@dataclass(frozen=True)
class Request:
    """One completion to draw: token ids of the prompt, and the seed of its random stream."""

    prompt: list[int]
    seed: int


@dataclass(frozen=True)
class Completion:
    """A completion: its text without special tokens, its number of tokens, and whether it was cut at the limit."""

    text: str
    tokens: int
    truncated: bool


@dataclass(frozen=True)
class Sampling:
    """Temperature, and the probability mass that nucleus sampling keeps."""

    temperature: float = 0.7
    top_p: float = 1.0


class Engine(Protocol):
    """What the loop needs of an engine.

    Attributes:
        name: as on the command line.
        precision: of the weights that sample, for the record.
        context: most tokens of prompt and completion together.
        batch_size: requests whose draws come from one random stream, and so are only reproducible together; None
            where every request has a stream of its own.
        options: whatever else decides what is drawn.
    """

    name: str
    precision: str
    context: int
    batch_size: int | None
    options: dict[str, Any]

    def complete(self, requests: list[Request], max_tokens: int) -> Iterator[tuple[int, Completion]]:
        """Draws; yields each completion with its request's index, as soon as it is there, in any order."""
        ...


@dataclass
class TransformersEngine:
    """A copy of the policy in this process, in any precision of `TransformersGeneration`.

    The draws of a batch come from one stream, seeded by the batch's first request: the same batch gives the same
    completions.

    Args:
        model: directory or Hub id.
        config: its transformers configuration.
        tokenizer: the model's.
        sampling: temperature and top_p, which must be 1.0.
        weights_precision: of the copy; None samples from the weights as loaded.
        batch_size: sequences decoded at once.
        revision: of a Hub model.
        dtype: in which the weights are loaded; "auto" is the checkpoint's.
    """

    model: str
    config: Any
    tokenizer: Any
    sampling: Sampling
    weights_precision: str | None = None
    batch_size: int | None = 32
    revision: str | None = None
    dtype: str = "auto"
    name: str = "transformers"
    _generation: Any = None

    def __post_init__(self) -> None:
        if self.sampling.top_p != 1.0:
            raise UsageError(
                f"--top_p is {self.sampling.top_p}: the in-process engine samples from the whole distribution (1.0, "
                "as the paper does). Use --engine vllm or server."
            )
        self.context = longest_context(self.config)
        self.precision = self.weights_precision or precision_label(self.config, self.dtype, {})
        self.options = {"dtype": self.dtype, "batch_size": self.batch_size}

    def complete(self, requests: list[Request], max_tokens: int) -> Iterator[tuple[int, Completion]]:
        """As `Engine.complete`, for one batch; the model loads at the first call."""
        import torch

        if self._generation is None:
            self._start()
        self._generation.max_completion_length = max_tokens
        torch.manual_seed(requests[0].seed)
        _, drawn, _, _ = self._generation.generate([request.prompt for request in requests])
        for index, ids in enumerate(drawn):
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            yield index, Completion(text, len(ids), ids[-1] not in self._ends)

    def _start(self) -> None:
        from accelerate import Accelerator
        from transformers import AutoModelForCausalLM

        from dc_trl.rollouts.transformers import TransformersGeneration

        model = AutoModelForCausalLM.from_pretrained(self.model, revision=self.revision, dtype=self.dtype)
        accelerator = Accelerator()
        configured = model.generation_config.eos_token_id if model.generation_config is not None else None
        ends = [configured] if isinstance(configured, int) else list(configured or [])
        self._ends = {*ends, *([self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else [])}
        self._generation = TransformersGeneration(
            model.to(accelerator.device).eval(),
            accelerator,
            self.tokenizer,
            precision=self.weights_precision,
            temperature=self.sampling.temperature,
            eos_token_ids=sorted(self._ends),
        )


def longest_context(config: Any) -> int:
    """Most tokens that a model's configuration says it handles.

    Raises:
        UsageError: it does not say.
    """
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not length:
        raise UsageError(
            f"the configuration of this {config.model_type} model has no max_position_embeddings, so the room for an "
            "answer is unknown: use --engine vllm with --vllm_engine_kwargs '{\"max_model_len\": N}'."
        )
    return int(length)


def precision_label(config: Any, dtype: str, kwargs: dict[str, Any]) -> str:
    """A word for the precision in which vLLM or transformers will hold the weights, and the KV cache if it differs."""
    quantized = getattr(config, "quantization_config", None) or {}
    method = kwargs.get("quantization") or (quantized if isinstance(quantized, dict) else {}).get("quant_method")
    stored = str(config.dtype or "").removeprefix("torch.")
    label = method or (stored if dtype == "auto" and stored else dtype)
    cache = kwargs.get("kv_cache_dtype", "auto")
    return label if cache == "auto" else f"{label}, KV cache {cache}"
