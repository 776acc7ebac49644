# SPDX-License-Identifier: Apache-2.0
"""Router replay for mixtures of experts: the training forward takes the experts that the sampling forward took.

R3, arXiv 2510.11370. Where sampler and trainer round differently, near ties between experts fall differently, and
the token's hidden state jumps: half of the discrepancy that examples/benchmarks/router_replay.py measures. So the
sampler's choice of experts is recorded, for every token and layer, and replayed in training in place of the router's
own top-k. Their weights are computed from the live logits, with the model's own normalisation, so that the router is
trained all the same.

Everything is done by forward hooks on the router modules, installed by a context manager and removed by it: without
one, a model is as it was.

Shapes: B sequences, S tokens of a padded sequence (prompt and completion), L layers with a router, in the model's
order, k experts a token, E experts to choose from. A choice is an integer tensor (B, S, L, k), -1 where none is known:
at padding, and at the last token of a completion, which the sampler never fed. There the router chooses live.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dc_trl.rollouts.routers import check_scores, expert_counts, find_routers, live_scores

UNKNOWN = -1
_INPUTS = ("input_ids", "inputs_embeds")

_checked: set[type[nn.Module]] = set()  # router classes whose scores were seen to be what `live_scores` gives


def route_dtype(num_experts: int) -> torch.dtype:
    """The smallest integer type that holds `UNKNOWN` and the numbers of this many experts: int8 up to 128."""
    return torch.int8 if num_experts <= torch.iinfo(torch.int8).max + 1 else torch.int16


class _RouterHooks(ABC):
    """Hooks on the routers of a model, there while the context is open."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.routers = find_routers(model)
        self.num_experts, self.top_k = expert_counts(self.routers)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError(f"this {type(self).__name__} is open already; leave its context first.")
        self._install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _install(self) -> None:
        for layer, (name, router) in enumerate(self.routers.items()):
            hook = self._hook(layer, name)
            self._handles.append(router.register_forward_hook(hook))

    @abstractmethod
    def _hook(self, layer: int, name: str) -> Any:
        """The forward hook of one router."""


class RouterRecorder(_RouterHooks):
    """Records which experts a model chooses while the context is open. Outputs are as without it.

    Args:
        model: a transformers mixture of experts.

    Raises:
        ValueError: the model is dense, or its routers are not known.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._chosen: list[list[Tensor]] = [[] for _ in self.routers]

    def __enter__(self) -> Self:
        self._clear()
        return super().__enter__()

    def take(self, batch_size: int) -> Tensor:
        """The choices (batch_size, S, L, k) of the one forward since the last `take`.

        Raises:
            RuntimeError: a router ran more than once, or not at all (in a fused kernel that bypasses it).
        """
        for name, chosen in zip(self.routers, self._chosen, strict=True):
            if len(chosen) != 1:
                raise RuntimeError(
                    f"the router {name} ran {len(chosen)} times since the last recording, but each forward is to be "
                    "taken by itself. A router that never runs is bypassed by a fused kernel: load the model without."
                )
        routes = torch.stack([chosen for (chosen,) in self._chosen], dim=1)
        self._clear()
        return routes.unflatten(0, (batch_size, -1))

    def _clear(self) -> None:
        for chosen in self._chosen:
            chosen.clear()

    def _hook(self, layer: int, name: str) -> Any:
        def record(router: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> None:
            self._chosen[layer].append(output[2].to(route_dtype(self.num_experts)))

        return record


class RouterReplay(_RouterHooks):
    """Makes a model take recorded experts while the context is open, weighted by its live router.

    With gradients, keep the context open until the backward pass is over: gradient checkpointing runs the layers again
    there, and they must choose the same. A forward without gradients may take the sequences in chunks, one after the
    other; one with gradients takes all of them.

    Args:
        model: the transformers model inside all wrappers; adapters may be inside it.
        routes: (B, S, L, k) integers, on any device: the choices for the sequences in the order in which they come.

    Raises:
        ValueError: the model is dense, its routers are not known, or `routes` is not of their shape and range; in the
            forward, if the batch is not that of the routes.
        RuntimeError: in the forward, if a router is bypassed by a fused kernel, or scores in another way than known.
    """

    def __init__(self, model: nn.Module, routes: Tensor) -> None:
        super().__init__(model)
        self._check(routes)
        self.routes = routes
        self._next = 0  # the first sequence that no forward has had yet
        self._current = routes[:0]  # the routes of the forward at hand; a recomputation in the backward uses them too
        self._ran: set[int] = set()

    def _check(self, routes: Tensor) -> None:
        if routes.is_floating_point() or routes.ndim != 4:
            raise ValueError(
                f"routes are {routes.dtype} of shape {tuple(routes.shape)}: router replay needs integers of shape "
                "(sequences, tokens, layers, experts a token), as `RouterRecorder` gives them."
            )
        if routes.shape[2:] != (len(self.routers), self.top_k):
            raise ValueError(
                f"routes are of shape {tuple(routes.shape)}, but the model has {len(self.routers)} routers of "
                f"{self.top_k} experts a token: they come from another model. Record them with this one's copy."
            )
        if routes.numel() and (int(routes.max()) >= self.num_experts or int(routes.min()) < UNKNOWN):
            raise ValueError(
                f"routes lie between {int(routes.min())} and {int(routes.max())}, but experts are numbered from 0 to "
                f"{self.num_experts - 1}, and {UNKNOWN} stands for an unknown choice. Record them with this model's "
                "copy."
            )

    def __enter__(self) -> Self:
        self._next = 0
        return super().__enter__()

    def _install(self) -> None:
        super()._install()
        self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._end))

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else next(kwargs[key] for key in _INPUTS if kwargs.get(key) is not None)
        rows, width = ids.shape[:2]
        total = len(self.routes)
        if width != self.routes.shape[1] or self._next + rows > total:
            raise ValueError(
                f"the forward has {rows} sequences of {width} tokens, but the routes are of {total} sequences, "
                f"{self._next} of them used, of {self.routes.shape[1]} tokens. Pad and split both alike."
            )
        if torch.is_grad_enabled() and rows != total:
            raise ValueError(
                f"a forward with gradients has {rows} of the {total} sequences of the routes, but a recomputation in "
                "the backward pass could not tell them apart. Replay the routes of each micro-batch by themselves."
            )
        self._current = self.routes[self._next : self._next + rows].to(ids.device)
        self._next += rows
        self._ran.clear()

    def _end(self, model: nn.Module, inputs: Any, output: Any) -> None:
        for layer, name in enumerate(self.routers):
            if layer not in self._ran:
                raise RuntimeError(
                    f"the router {name} did not run, so its choice was not replayed: a fused kernel bypasses it. Load "
                    "the model without `use_kernels`, or set `router_replay=False`."
                )

    def _hook(self, layer: int, name: str) -> Any:
        def replay(router: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            """Puts the recorded experts in place of the router's, with the scores that it gives them now."""
            if type(router) not in _checked:
                check_scores(name, router, output)
                _checked.add(type(router))
            logits, scores, experts = output
            self._ran.add(layer)
            recorded = self._current[:, :, layer].flatten(0, 1).to(experts.dtype)
            if recorded.shape != experts.shape:
                raise ValueError(
                    f"the router {name} chose for {tuple(experts.shape)} tokens and experts, but the routes are for "
                    f"{tuple(recorded.shape)}. Padding-free batches cannot be replayed: pad to one width."
                )
            chosen = torch.where(recorded == UNKNOWN, experts, recorded)
            return logits, live_scores(router, logits, chosen).to(scores.dtype), chosen

        return replay


class RolloutRoutes:
    """Collects the choices of a batch of sequences as an engine with a key-value cache decodes them.

    Args:
        recorder: open, on the engine's model; the engine's prefill of the distinct prompts has just run.
        prompts: token ids, one list a sequence, n of them.
        horizon: most tokens of a completion, T.
    """

    def __init__(self, recorder: RouterRecorder, prompts: list[list[int]], horizon: int) -> None:
        self._recorder = recorder
        place = {prompt: index for index, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        recorded = recorder.take(len(place)).cpu()  # left-padded
        self._prompts = [recorded[place[tuple(prompt)], recorded.shape[1] - len(prompt) :] for prompt in prompts]
        layers_and_experts = recorded.shape[2:]
        self._completions = torch.full((len(prompts), horizon, *layers_and_experts), UNKNOWN, dtype=recorded.dtype)

    def add(self, rows: Tensor, step: int) -> None:
        """Take the choices of the forward that has just run, over token `step` of the sequences `rows` (m,)."""
        self._completions[rows.cpu(), step] = self._recorder.take(len(rows))[:, 0].cpu()

    def sequences(self, lengths: Sequence[int]) -> list[Tensor]:
        """The choices (prompt and completion, L, k) of each sequence, on the CPU; `lengths` are the completions'."""
        self._completions[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = UNKNOWN  # fed by chance, or never
        pairs = zip(self._prompts, self._completions, lengths, strict=True)
        return [torch.cat([prompt, completion[:length]]) for prompt, completion, length in pairs]


def pad_routes(routes: Sequence[Tensor], prompt_lengths: Sequence[int], prompt_width: int, width: int) -> Tensor:
    """Lay the choices of single sequences out as the trainer's batch: prompts end where completions begin.

    Args:
        routes: B tensors (prompt and completion, L, k).
        prompt_lengths: tokens of each prompt, B.
        prompt_width: tokens of the prompt part of the batch, P, in which prompts are padded on the left.
        width: tokens of the whole, S; completions are padded on the right.

    Returns:
        (B, S, L, k), on the CPU, `UNKNOWN` at padding.

    Raises:
        ValueError: the numbers of sequences differ, or a sequence does not fit.
    """
    if len(routes) != len(prompt_lengths):
        raise ValueError(
            f"the batch has {len(prompt_lengths)} sequences, but the engine recorded the experts of {len(routes)}: it "
            "sampled others since. Router replay needs one call of the engine for each batch."
        )
    padded = torch.full((len(routes), width, *routes[0].shape[1:]), UNKNOWN, dtype=routes[0].dtype)
    for row, recorded, length in zip(padded, routes, prompt_lengths, strict=True):
        start = prompt_width - int(length)
        if start < 0 or start + len(recorded) > width or len(recorded) < length:
            raise ValueError(
                f"the experts of {len(recorded)} tokens were recorded, but the batch has {length} prompt tokens in "
                f"{prompt_width} columns and {width} columns in all: the tokens changed after they were sampled."
            )
        row[start : start + len(recorded)] = recorded
    return padded
