# SPDX-License-Identifier: Apache-2.0
"""The routers of transformers' mixtures of experts: which are known, and the weight each gives an expert.

A known router is a module whose forward returns `(logits, scores, experts)`: logits (N, E) over all experts, and for
the k chosen ones their weights (N, k) and their numbers (N, k). The functions here give the weights that the same
router gives to experts chosen by somebody else, from its live logits: the model's own normalisation, differentiable.

Shapes: N tokens, E experts, k experts a token.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import __version__ as transformers_version

# Of a router, whose attributes differ by class.
ScoreFunction = Callable[[Any, Tensor, Tensor], Tensor]

# What modules of a mixture of experts are called in transformers: to tell an unknown mixture from a dense model.
_MIXTURE_NAMES = re.compile(r"Router|TopK|Topk|Gating|Experts|SparseMoe|MoE|MoeBlock")
_ROUTER_NAMES = re.compile(r"Router|TopKGating")

# Far above the rounding of bfloat16 weights between two ways of computing them, far below another normalisation.
_RELATIVE, _ABSOLUTE = 2e-2, 1e-4


def softmax_scores(router: Any, logits: Tensor, experts: Tensor) -> Tensor:
    """Softmax over all experts, then the chosen ones' share; summing to 1 unless `norm_topk_prob` is False."""
    scores = torch.softmax(logits, dim=-1, dtype=torch.float).gather(-1, experts)
    if getattr(router, "norm_topk_prob", True):  # the routers without the option always normalise
        scores = scores / scores.sum(dim=-1, keepdim=True)
    return scores


def chosen_softmax_scores(router: Any, logits: Tensor, experts: Tensor) -> Tensor:
    """Softmax over the logits of the chosen experts alone."""
    chosen = logits.gather(-1, experts)
    return torch.softmax(chosen, dim=-1, dtype=chosen.dtype)


def sigmoid_scores(router: Any, logits: Tensor, experts: Tensor) -> Tensor:
    """Sigmoid of the chosen logits, normalised over them and scaled; the bias that helps to choose has no part."""
    scores = logits.sigmoid().gather(-1, experts)
    if router.norm_topk_prob:
        scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    return scores * router.routed_scaling_factor


# By the class of the router. Each is tested on a model of its own; read its forward before adding one.
ROUTER_SCORES: dict[str, ScoreFunction] = {
    "FlexOlmoTopKRouter": softmax_scores,
    "MiniMaxTopKRouter": softmax_scores,
    "MixtralTopKRouter": softmax_scores,
    "OlmoeTopKRouter": softmax_scores,
    "Qwen2MoeTopKRouter": softmax_scores,
    "Qwen3MoeTopKRouter": softmax_scores,
    "Qwen3NextTopKRouter": softmax_scores,
    "Qwen3_5MoeTopKRouter": softmax_scores,
    "GptOssTopKRouter": chosen_softmax_scores,
    "DeepseekV3TopkRouter": sigmoid_scores,
    "Dots1TopkRouter": sigmoid_scores,
    "Glm4MoeTopkRouter": sigmoid_scores,
}


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a mixture of experts by name, in the order of its layers.

    Args:
        model: a transformers model, adapters inside it or not.

    Raises:
        ValueError: the model is dense, or has a router that is not in `ROUTER_SCORES`.
    """
    routers: dict[str, nn.Module] = {}
    mixture, unknown = set(), set()
    for name, module in model.named_modules():
        kind = type(module).__name__
        if _score_function(module) is not None:
            routers[name] = module
        elif _ROUTER_NAMES.search(kind):
            unknown.add(kind)
        elif _MIXTURE_NAMES.search(kind):
            mixture.add(kind)
    if routers and not unknown:
        return routers
    if unknown or mixture:
        raise ValueError(
            f"{type(model).__name__} chooses experts in {', '.join(sorted(unknown or mixture))}, whose scores router "
            f"replay does not know. Known are {', '.join(sorted(ROUTER_SCORES))}. Set `router_replay=False`, or add "
            "the router to `dc_trl.rollouts.routers.ROUTER_SCORES`."
        )
    raise ValueError(
        f"{type(model).__name__} has no experts to choose from, so router replay would do nothing. Set "
        "`router_replay=False`, or use a mixture of experts."
    )


def expert_counts(routers: Mapping[str, Any]) -> tuple[int, int]:
    """How many experts there are, E, and how many a token takes, k.

    Raises:
        ValueError: they differ from layer to layer.
    """
    counts = {(int(router.num_experts), int(router.top_k)) for router in routers.values()}
    if len(counts) > 1:
        raise ValueError(
            f"the layers have (experts, experts a token) of {sorted(counts)}, but router replay keeps one tensor for "
            "all layers, which needs one shape. Set `router_replay=False`."
        )
    return counts.pop()


def live_scores(router: nn.Module, logits: Tensor, experts: Tensor) -> Tensor:
    """The weights (N, k) that `router`, at its live `logits` (N, E), gives to these `experts` (N, k).

    Differentiable in the logits, so that the gradient reaches the router although it did not choose.
    """
    function = _score_function(router)
    assert function is not None  # `find_routers` returns no other
    return function(router, logits, experts)


@torch.no_grad()
def check_scores(name: str, router: nn.Module, output: tuple[Tensor, ...]) -> None:
    """Raise unless the scores that a router gives to its own choice are those of `live_scores`.

    The forwards of transformers change between versions, and a changed one would be replayed wrongly in silence.

    Args:
        name: of the router in the model, for the error.
        router: one of `find_routers`.
        output: what its forward returned.

    Raises:
        RuntimeError: they differ, or the forward does not return `(logits, scores, experts)`.
    """
    fits = isinstance(output, tuple) and len(output) == 3 and not output[2].is_floating_point()
    if fits:
        logits, scores, experts = output
        again = live_scores(router, logits, experts)
        fits = torch.allclose(again.float(), scores.float(), rtol=_RELATIVE, atol=_ABSOLUTE)
    if not fits:
        raise RuntimeError(
            f"the router {name} ({type(router).__name__}) of transformers {transformers_version} scores experts in "
            "another way than router replay knows. Set `router_replay=False`, or install the version of transformers "
            "that docs/seams.md names."
        )


def _score_function(module: nn.Module) -> ScoreFunction | None:
    # By the names of all base classes: sharding makes a class of its own on top of the model's.
    names = (kind.__name__ for kind in type(module).__mro__)
    return next((ROUTER_SCORES[name] for name in names if name in ROUTER_SCORES), None)
