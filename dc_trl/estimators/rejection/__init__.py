# SPDX-License-Identifier: Apache-2.0
"""Rejection: what of a batch is too far from the sampling engine's policy to be trained on.

A rule decides which tokens are kept, and says nothing of the weight of those that are: that is the importance-sampling
correction (`dc_trl.estimators.importance`). One rule a file; `RULES` is the only list of them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dc_trl.estimators.rejection import dppo_kl, dppo_tv, geometric, icepop, kpop, max_tv, token_veto
from dc_trl.estimators.rejection.rule import Bound, RejectionInputs, RejectionRule

__all__ = ["RULES", "Bound", "RejectionInputs", "RejectionRule", "reject", "resolve_bounds"]

RULES: dict[str, RejectionRule] = {
    "geometric": geometric.RULE,
    "token_veto": token_veto.RULE,
    "max_tv": max_tv.RULE,
    "kpop": kpop.RULE,
    "icepop": icepop.RULE,
    "dppo_tv": dppo_tv.RULE,
    "dppo_kl": dppo_kl.RULE,
}
"""Every rule by its name in `rejection`. A rule of one's own is one more entry."""


def resolve_bounds(rejection: Sequence[str], rejection_bounds: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Every bound of every rule in use: the given one, or the rule's default.

    Args:
        rejection: names of rules.
        rejection_bounds: bounds by rule and name, such as `{"icepop": {"high": 2.0}}`; what is left out keeps its
            default.

    Returns:
        Rule → bound → value, in the order of `rejection`.

    Raises:
        ValueError: for a rule or a bound that does not exist, a rule named twice, bounds of a rule that is not in use,
            or a value that is no number in the bound's range.
    """
    for index, name in enumerate(rejection):
        if name not in RULES:
            raise ValueError(f"`rejection` has {name!r}, which is no rule: use any of {tuple(RULES)}.")
        if name in rejection[:index]:
            raise ValueError(f"`rejection` has {name!r} twice, where once does the same. Name it once.")
    unused = [name for name in rejection_bounds if name not in rejection]
    if unused:
        raise ValueError(
            f"`rejection_bounds` has bounds of {unused[0]!r}, which is not in `rejection` = {list(rejection)}: they "
            "would do nothing. Add the rule, or leave its bounds out."
        )
    return {name: _bounds_of(name, rejection_bounds.get(name, {})) for name in rejection}


def _bounds_of(name: str, given: Any) -> dict[str, float]:
    bounds = RULES[name].bounds
    defaults = {bound: spec.default for bound, spec in bounds.items()}
    if not isinstance(given, Mapping):
        raise ValueError(
            f"`rejection_bounds[{name!r}]` is {given!r}, which does not name its bounds. Use e.g. {defaults}."
        )
    for bound in given:
        if bound not in bounds:
            raise ValueError(
                f"`rejection_bounds[{name!r}]` has {bound!r}, which the rule does not know. Use {tuple(bounds)}."
            )
    checked = {b: _checked(f"`rejection_bounds[{name!r}][{b!r}]`", value, bounds[b]) for b, value in given.items()}
    return defaults | checked


def _checked(what: str, value: Any, bound: Bound) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # also of "1e-4", which YAML takes for a text
    except (TypeError, ValueError):
        number = math.nan
    if not bound.minimum <= number <= bound.maximum:
        raise ValueError(
            f"{what} is {value!r}, which is no number from {bound.minimum:g} to {bound.maximum:g}: outside, the rule "
            f"would reject tokens on which the engines agree, or none at all. Use e.g. {bound.default:g}."
        )
    return number


@torch.no_grad()
def reject(
    rejection: Sequence[str], bounds: Mapping[str, Mapping[str, float]], inputs: RejectionInputs
) -> tuple[Tensor, dict[str, Tensor]]:
    """Which tokens all rules keep, and which each of them keeps.

    Every rule judges the whole batch, so neither their order nor what another one rejected matters.

    Args:
        rejection: names of rules, in `RULES`.
        bounds: of `resolve_bounds`.
        inputs: the micro-batch.

    Returns:
        `kept`, (B, T) bool: False for what at least one rule rejects. All tokens of a rejected sequence are False;
        tokens that are not valid are True otherwise, so that `mask & kept` is the mask of the loss. And the same by
        rule.
    """
    by_rule = {name: RULES[name].kept(inputs, **bounds[name]) for name in rejection}
    kept = torch.ones_like(inputs.valid)
    for verdict in by_rule.values():
        kept = kept & verdict
    return kept, by_rule
