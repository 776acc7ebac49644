# SPDX-License-Identifier: Apache-2.0
"""What a rejection rule is, what it sees, and the two ways to spread a verdict over tokens.

Shapes: B sequences, T completion tokens. π (`train_logps`) is the training engine's probability of a token before the
first update on its rollout, μ (`sampling_logps`) the sampling engine's; both arrive as natural logarithms, and
`log_ratio = log π − log μ`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class RejectionInputs(NamedTuple):
    """What a rule sees of one micro-batch.

    Attributes:
        current_logps: log π of the policy as it is in this update, (B, T), in nats, detached: the loss forward's.
        train_logps: log π before the first update on this rollout, (B, T). The same tensor as `current_logps` where
            each rollout serves one update.
        sampling_logps: log μ, (B, T).
        valid: (B, T) bool; tokens of the loss that both engines scored. Whatever stands elsewhere is not read.
        advantages: A before the penalty, (B,) or (B, 1) per sequence, or (B, T).
    """

    current_logps: Tensor
    train_logps: Tensor
    sampling_logps: Tensor
    valid: Tensor
    advantages: Tensor

    @property
    def token_advantages(self) -> Tensor:
        """The advantages as (B, 1) or (B, T)."""
        return self.advantages.unsqueeze(1) if self.advantages.dim() == 1 else self.advantages


class Bound(NamedTuple):
    """A threshold of a rule.

    Attributes:
        default: its value unless the user gives one.
        minimum, maximum: the range that makes sense; in it, a token about which the engines agree is kept.
        source: where the default comes from.
    """

    default: float
    minimum: float
    maximum: float
    source: str


class RejectionRule(NamedTuple):
    """A way to tell tokens, or sequences, that must not be trained on.

    Attributes:
        kept: function of the inputs and, by keyword, of every bound. Returns (B, T) bool: False for what is rejected,
            True for everything else, tokens that are not valid included. Made with `tokens` or `sequences`.
        bounds: thresholds by name. A lower one is called `low`, an upper one `high`.
        level: `"token"`, or `"sequence"` where a sequence is kept or rejected as a whole.
        keeps: the condition under which it keeps, in symbols.
        needs: fields of the inputs that it reads, beside `valid`.
        source: paper or project that the formula comes from.
    """

    kept: Callable[..., Tensor]
    bounds: Mapping[str, Bound]
    level: str
    keeps: str
    needs: tuple[str, ...]
    source: str


def tokens(passes: Tensor, valid: Tensor) -> Tensor:
    """Rejects each valid token that does not pass.

    Args:
        passes: (B, T) bool. Write it as a comparison that holds for what is kept: NaN then fails.
        valid: (B, T) bool.

    Returns:
        (B, T) bool; True where a token is not valid.
    """
    return passes | ~valid


def sequences(passes: Tensor, valid: Tensor) -> Tensor:
    """Rejects every token, valid or not, of each sequence that does not pass.

    Args:
        passes: (B, 1) bool.
        valid: (B, T) bool; a sequence without a valid token is kept, as nothing is known against it.

    Returns:
        (B, T) bool.
    """
    return (passes | ~valid.any(-1, keepdim=True)).expand_as(valid)


def log_ratio(logps: Tensor, sampling_logps: Tensor, valid: Tensor) -> Tensor:
    """log π − log μ of valid tokens, (B, T) float32, in nats; 0 elsewhere."""
    return torch.where(valid, logps.float() - sampling_logps.float(), 0.0)


def probability_shift(logps: Tensor, sampling_logps: Tensor, valid: Tensor) -> Tensor:
    """π − μ of valid tokens, (B, T) float32, in [−1, 1]; 0 elsewhere."""
    return torch.where(valid, logps.float().exp() - sampling_logps.float().exp(), 0.0)


def drifts_away(shift: Tensor, advantages: Tensor) -> Tensor:
    """Tokens that the update would move further from μ: A > 0 and π > μ, or A < 0 and π < μ.

    Args:
        shift: any quantity with the sign of π − μ, (B, T); NaN counts as drifting.
        advantages: A, (B, 1) or (B, T); where it is 0 there is no update, so no drift.

    Returns:
        (B, T) bool.
    """
    return ((advantages > 0) & ~(shift <= 0)) | ((advantages < 0) & ~(shift >= 0))
