# SPDX-License-Identifier: Apache-2.0
"""An in-process rollout engine: a copy of the policy, in a precision of its own, sampled with transformers.

It has the two methods of TRL's `VLLMGeneration` that `GRPOTrainer` calls, so it slots into `trainer.vllm_generation`
where vLLM cannot run: no GPU, macOS, Windows, or a precision that vLLM lacks on the machine at hand.

Shapes: n unfinished sequences, P tokens of the longest prompt, T completion tokens, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from dc_trl.rollouts.decoding import cache_name, give_room, keep_rows
from dc_trl.rollouts.quantization import PolicyCopy
from dc_trl.rollouts.rounding import Dither
from dc_trl.rollouts.router_replay import RolloutRoutes, RouterRecorder
from dc_trl.rollouts.sampling_options import IN_PROCESS, check_decoding, objection
from dc_trl.rollouts.update_seen import UpdateSeen
from dc_trl.rollouts.weights import iter_plain_weights, parameter_sizes, plain_model

logger = logging.getLogger(__name__)

# Sequences that have ended are dropped once there are this many, or this share of a large batch, or a half of a small
# one: a drop costs about as much as a few rows in one step.
DROP_ROWS, DROP_SHARE = 4, 1 / 16


class TransformersGeneration:
    """Samples completions from a copy of the policy held in this process, in any of several precisions.

    The log-probability of a token is that of the distribution it was drawn from, log_softmax(logits / temperature) in
    float32, so it equals a forward of `policy` over the same tokens up to rounding.

    Precisions: None samples from the weights as trained, under the accelerator's autocast; bf16 and fp16 from a cast
    copy; fp8 (e4m3) and int8 from torchao's real low-precision weights where they run, otherwise from simulated ones
    (rounded, then dequantised); int4 and int3 always from simulated ones. `dc_trl.rollouts.quantization` says which
    weights are quantised and in which dtype they are multiplied. Adapters are merged in float32 into the copy only:
    the training weights are never written.

    Draws come from torch's global generator, whose state TRL seeds and checkpoints, so runs repeat and resume. A
    `seed` gives the engine a generator of its own, which no checkpoint holds: for measurements, not for training.

    Args:
        model: the live policy, bare or wrapped by PEFT, DDP, FSDP2 or DeepSpeed; read at each `sync_weights`.
        accelerator: the trainer's.
        processing_class: tokenizer; its padding token fills the left of short prompts.
        precision: bf16, fp16, fp8, int8, int4, int3 or None.
        temperature: divides the logits; above 0.
        max_completion_length: most tokens of a completion, its end-of-sequence token included.
        eos_token_ids: the tokens that end a completion; by default the generation config's and the tokenizer's.
        generation_batch_size: most sequences decoded at once, to bound the KV cache; by default all of them.
        generation_kwargs: sampling options; only those that `dc_trl.rollouts.sampling_options` calls neutral pass.
        seed: seed of a private generator; None draws from torch's global one.
        record_routes: keep which experts a mixture of experts chose, for router replay.
        dither: rounds the copy's weights with a fixed dither; None rounds to nearest.

    Attributes:
        policy: the engine's own model, in eval mode, with the weights that sample.
        quantization: "none" (as trained), "cast", "real" (torchao), "fake" (simulated) or "mixed" (real layers,
            simulated fused experts); for logs.
        update_seen: measures how much of the training the syncs bring.
        sync_metrics: of the last sync, see `UpdateSeen.finish`.
        last_routes: with `record_routes`, the experts chosen in the last `generate`, one tensor (prompt and
            completion, layers, experts a token) a sequence: see `dc_trl.rollouts.router_replay`.
        on_progress: called before each token with the share that is sampled, counted in the longest completions
            that there may be, 0 to 1; None by default.

    Raises:
        ValueError: unknown precision, temperature not above 0, unsupported option, nothing to quantise, or routes of
            a model that is dense or whose routers are not known.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        processing_class: Any,
        *,
        precision: str | None = None,
        temperature: float = 1.0,
        max_completion_length: int = 256,
        eos_token_ids: list[int] | None = None,
        generation_batch_size: int | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        seed: int | None = None,
        record_routes: bool = False,
        dither: Dither | None = None,
    ) -> None:
        check_sampling(temperature, max_completion_length, generation_kwargs or {})
        self.model = model
        self.accelerator = accelerator
        self.precision = precision
        self.temperature = temperature
        self.max_completion_length = max_completion_length
        self.generation_batch_size = generation_batch_size
        self._device = accelerator.device
        self._live = plain_model(model, accelerator)  # once: unwrapping walks the tree, twice
        self.dither = dither
        self._record_routes = record_routes
        self._build_copy()
        self.update_seen = UpdateSeen(parameter_sizes(self._copy.model))
        self.sync_metrics: dict[str, float] = {}
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        eos = _default_eos(self._live, tokenizer) if eos_token_ids is None else eos_token_ids
        self._eos = torch.tensor(eos, dtype=torch.long, device=self._device)
        self._pad = getattr(tokenizer, "pad_token_id", None) or 0  # masked, so any id will do
        self._generator = None if seed is None else torch.Generator(self._device).manual_seed(seed)
        self.last_routes: list[torch.Tensor] = []
        self.on_progress: Callable[[float], None] | None = None
        self._synced = False
        logger.info("rollout precision %s, quantisation %s", precision or "as trained", self.quantization)

    def _build_copy(self) -> None:
        self._copy = PolicyCopy(self._live, self.precision, self._device, self.dither)
        self.policy = self._copy.model
        self.quantization = self._copy.quantization
        self._recorder = RouterRecorder(self.policy) if self._record_routes else None

    def sync_weights(self) -> None:
        """Copy the live weights into `policy` and quantise them again; the live model is only read.

        Collective under FSDP2 and ZeRO-3: every process must call it. `policy` is built anew where the live model has
        been cast since, as DeepSpeed does: as trained means as it trains, not as it was loaded.

        Raises:
            NotImplementedError: FSDP version 1, or an adapter that cannot be merged into the weights.
            ValueError: an adapter on tied embeddings.
        """
        if not self._copy.fits(self._live):
            del self._copy, self.policy, self._recorder  # before the next one takes its room
            self._build_copy()
        self._copy.load(iter_plain_weights(self._live, self.accelerator), self.update_seen)
        self.sync_metrics = self.update_seen.finish()
        self._synced = True

    @property
    def deployed_dtype(self) -> torch.dtype:
        """The dtype in which the copy multiplies."""
        return self._copy.dtype

    def deployed_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Synchronise, and yield every parameter as it samples, dequantised; collective as `sync_weights` is."""
        self.sync_weights()
        for name, _ in self.policy.named_parameters():
            yield name, self._copy.deployed(name)

    def generate(
        self,
        prompts: list[list[int]],
        images: list[Any] | None = None,
        num_generations: int = 1,
        profiler: AbstractContextManager[Any] | None = None,
        greedy: bool = False,
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], list[list[list[int]]]]:
        """Sample one completion for each entry of `prompts`.

        Args:
            prompts: token ids, one list per completion: a prompt with G completions stands there G times.
            images: must be None.
            num_generations: not used, since `prompts` already holds the duplicates; TRL passes it.
            profiler: context manager entered around the decoding.
            greedy: take the most likely token instead of drawing; for evaluation. The log-probabilities are those of
                the sampling distribution all the same.

        Returns:
            prompt ids, completion ids, log-probabilities and their token ids, the last two with one single-element
            list per token, as `VLLMGeneration` has them. A completion ends with its first end-of-sequence token.

        Raises:
            ValueError: images are given, or a prompt is empty.
        """
        if images is not None:
            raise ValueError(
                "the transformers rollout engine is text-only; for images leave `rollout_backend` unset and set "
                "`use_vllm=True`."
            )
        if not all(prompts):
            raise ValueError(f"prompt {[bool(p) for p in prompts].index(False)} has no tokens; remove it.")
        if not self._synced:
            self.sync_weights()  # until then, the copy's weights are uninitialised memory
        completions: list[list[int]] = []
        logprobs: list[list[float]] = []
        self.last_routes = []
        size = self.generation_batch_size or max(len(prompts), 1)
        autocast = self.accelerator.autocast() if self.precision is None else nullcontext()
        with profiler or nullcontext(), autocast, self._recorder or nullcontext():
            for start in range(0, len(prompts), size):
                rows = prompts[start : start + size]
                chunk = self._decode(rows, greedy, start / len(prompts), len(rows) / len(prompts))
                completions += chunk[0]
                logprobs += chunk[1]
        nested_logprobs = [[[value] for value in sequence] for sequence in logprobs]
        nested_ids = [[[token] for token in sequence] for sequence in completions]
        return prompts, completions, nested_logprobs, nested_ids

    @torch.inference_mode()
    def _decode(
        self, prompts: list[list[int]], greedy: bool, before: float, share: float
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Samples a part, `share`, of what is asked for, of which `before` is done: both for `on_progress` alone."""
        count, horizon = len(prompts), self.max_completion_length
        tokens = torch.zeros(count, horizon, dtype=torch.long, device=self._device)
        logprobs = torch.zeros(count, horizon, device=self._device)
        lengths = torch.full((count,), horizon, device=self._device)
        batch = self._prefill(prompts)
        routes = RolloutRoutes(self._recorder, prompts, horizon) if self._recorder else None
        for step in range(horizon):
            if self.on_progress is not None:
                self.on_progress(before + share * step / horizon)
            drawn, drawn_logprobs = self._draw(batch.logits, greedy)
            tokens[batch.rows, step] = drawn
            logprobs[batch.rows, step] = drawn_logprobs
            ended = batch.alive & torch.isin(drawn, self._eos)
            lengths[batch.rows] = torch.where(ended, step + 1, lengths[batch.rows])
            batch.alive &= ~ended
            running = int(batch.alive.sum())
            if running == 0 or step + 1 == horizon:
                break
            if is_drop_due(len(drawn), running):
                drawn = drawn[batch.alive]
                batch.keep_alive()
            self._advance(batch, drawn)
            if routes is not None:
                routes.add(batch.rows, step)
        cut = lengths.tolist()
        if routes is not None:
            self.last_routes += routes.sequences(cut)
        completions = [row[:length] for row, length in zip(tokens.tolist(), cut, strict=True)]
        return completions, [row[:length] for row, length in zip(logprobs.tolist(), cut, strict=True)]

    def _draw(self, logits: torch.Tensor, greedy: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (n,) and their log-probabilities (n,) from logits (n, V)."""
        logprobs = torch.log_softmax(logits.float() / self.temperature, dim=-1)
        tokens = logprobs.argmax(dim=-1, keepdim=True) if greedy else _sample(logprobs.exp(), self._generator)
        return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)

    def _prefill(self, prompts: list[list[int]]) -> "_Batch":
        """Run each distinct prompt once, then give every sequence its copy of the cache and of the logits."""
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        width = max(map(len, distinct))
        ids = torch.tensor([[self._pad] * (width - len(p)) + list(p) for p in distinct], device=self._device)
        lengths = torch.tensor([len(p) for p in distinct], device=self._device)
        # Room for the completion, all of it attended to: each step takes one more column.
        mask = torch.arange(width + self.max_completion_length, device=self._device) >= width - lengths[:, None]
        positions = (torch.arange(width, device=self._device) - (width - lengths[:, None])).clamp(min=0)
        # The model makes its own cache: sliding windows and hybrid layers need other kinds than plain attention.
        outputs = self.policy(
            input_ids=ids,
            attention_mask=mask[:, :width].long(),
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
        )
        batch = _Batch(
            rows=torch.arange(len(distinct), device=self._device),
            alive=torch.ones(len(distinct), dtype=torch.bool, device=self._device),
            lengths=lengths,
            mask=mask.long(),
            width=width,
            cache=getattr(outputs, cache_name(self.policy)),
            logits=outputs.logits[:, -1],
        )
        if len(distinct) < len(prompts):
            place = {prompt: index for index, prompt in enumerate(distinct)}
            batch.select(torch.tensor([place[tuple(prompt)] for prompt in prompts], device=self._device))
            batch.rows = torch.arange(len(prompts), device=self._device)
        give_room(batch.cache, width + self.max_completion_length)
        return batch

    def _advance(self, batch: "_Batch", tokens: torch.Tensor) -> None:
        """Feed the tokens (n,) just drawn and leave the logits (n, V) that follow them in `batch`."""
        batch.width += 1
        outputs = self.policy(
            input_ids=tokens[:, None],
            attention_mask=batch.mask[:, : batch.width],
            position_ids=batch.lengths[:, None],
            use_cache=True,
            **{cache_name(self.policy): batch.cache},
        )
        batch.lengths += 1
        batch.logits = outputs.logits[:, -1]


@dataclass
class _Batch:
    """The sequences being decoded; a finished one stays, ignored, until `select` drops it."""

    rows: torch.Tensor  # (n,) place of each sequence among the prompts
    alive: torch.Tensor  # (n,) whether it still runs
    lengths: torch.Tensor  # (n,) tokens seen, which is also the position of the next one
    mask: torch.Tensor  # (n, P + T) 0 on the padding at the left of a short prompt, 1 elsewhere
    width: int  # columns of the mask that are filled
    cache: Any  # transformers' Cache, of the model's own kinds of layers
    logits: torch.Tensor  # (n, V) of the next token

    def select(self, indices: torch.Tensor) -> None:
        """Keep the sequences at `indices`, in that order, repeats included."""
        self._pick(indices)
        self.cache.reorder_cache(indices)  # an index_select of every layer's state

    def keep_alive(self) -> None:
        """Drop the sequences that have ended; the others keep their order."""
        kept = self.alive.nonzero().squeeze(1)
        unmoved = int((kept == torch.arange(len(kept), device=kept.device)).sum())
        self._pick(kept)
        keep_rows(self.cache, kept, unmoved)

    def _pick(self, indices: torch.Tensor) -> None:
        for name in ("rows", "alive", "lengths", "mask", "logits"):
            setattr(self, name, getattr(self, name)[indices])


def is_drop_due(rows: int, running: int) -> bool:
    """Whether the ended sequences of a batch are worth dropping: `running` of its `rows` go on."""
    return rows - running >= min(rows / 2, max(DROP_ROWS, DROP_SHARE * rows))


def _sample(probabilities: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """One token (n, 1) from each distribution (n, V)."""
    if probabilities.device.type != "cpu":
        return torch.multinomial(probabilities, 1, generator=generator)
    # multinomial draws V exponentials a row, a quarter of the whole time on a CPU; inverting the cumulative
    # distribution takes one uniform. In float64, so that rounding over a large vocabulary does not move its tail.
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    if not bool(total.isfinite().all()):
        raise RuntimeError("the policy's logits are not finite, so no token can be drawn; lower the learning rate.")
    uniform = torch.rand(total.shape, dtype=torch.float64, generator=generator)
    return torch.searchsorted(cumulative, uniform * total, right=True).clamp(max=probabilities.shape[-1] - 1)


def check_sampling(temperature: float, max_completion_length: int, options: dict[str, Any]) -> None:
    """Raise `ValueError` for sampling settings under which the log-probabilities would not be the trainer's kind."""
    check_decoding(temperature, max_completion_length)
    settings = {"temperature": temperature, "max_completion_length": max_completion_length}
    for name, value in options.items():
        refused = objection(name, value, IN_PROCESS, settings)
        if refused is not None:
            raise ValueError(f"the transformers rollout engine cannot sample with {name}={value!r}: {refused}")


def _default_eos(live: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The tokens that end a completion, gathered as TRL does: the generation config's, and the tokenizer's."""
    ids = live.generation_config.eos_token_id if live.generation_config is not None else None
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    own = getattr(tokenizer, "eos_token_id", None)
    return ids if own is None or own in ids else [own, *ids]
