# SPDX-License-Identifier: Apache-2.0
"""What a micro-batch adds to the batch metrics: sums, maxima and histograms, each under its name.

They travel and merge as one flat vector, the *summary*: `summarise` makes it, `combine` merges those of micro-batches
and of ranks, and `named` gives its parts back, so that a global metric is never a mean of means.

Shapes: B sequences, T completion tokens, K entries of a summary.
"""

import torch
from torch import Tensor

from dc_trl.discrepancy.tokens import bounded, token_discrepancy, trajectory_mean, valid_tokens

# The histograms over tokens: logarithmic bins from 1e-9 to 1e3. A bin is 0.68 % wide, and a quantile is read at its
# middle, so it is off by at most 0.34 %. What lies below the first edge (an exact 0, mostly) falls into bin 0, what
# lies above the last one into the last.
HISTOGRAM_BINS = 4096
HISTOGRAM_LOW, HISTOGRAM_DECADES = -9.0, 12.0

# An |A| that is no more than what TRL's rounding leaves where all rewards of a group are equal: it divides the error
# of their mean by a standard deviation of about 0 plus 1e-4. Up to 1.8e-3 at rewards of about 1. Our value.
NO_ADVANTAGE = 2e-3

# Every name of a summary, by how it is reduced. A value without a name here, or a name without its value, is an error.
SUMS = (
    # over valid tokens
    "valid",
    "discrepancy",
    "differing",
    "kept",
    "discrepancy_kept",
    "penalty",
    "advantage",
    "pi",
    "mu",
    "pi_sq",
    "mu_sq",
    "pi_mu",
    "log_ratio",
    "abs_log_ratio",
    "ratio",
    "ratio_sq",
    "correction",
    # over sequences with a valid token
    "trajectories",
    "trajectory_discrepancy",
    "seq_ratio_sq",
    "ppl_ratio",
    "abs_seq_log_ratio",
    "abs_mean_log_ratio",
    "penalty_only",
    # over unmasked tokens
    "tokens",
    "unscored_tokens",
)
MAXIMA = (
    "discrepancy_max",
    "abs_log_ratio_max",
    "ratio_max",
    "neg_ratio_min",
    "correction_max",
    "neg_correction_min",
)
HISTOGRAMS = ("discrepancy_histogram", "abs_log_ratio_histogram")

_MAXIMA_AT = len(SUMS)
_HISTOGRAMS_AT = _MAXIMA_AT + len(MAXIMA)


def summarise(
    train_logps: Tensor,
    sampling_logps: Tensor,
    mask: Tensor,
    *,
    metric: str = "prob_diff",
    discrepancy: Tensor | None = None,
    correction: Tensor | None = None,
    kept: Tensor | None = None,
    penalty: Tensor | None = None,
    advantages: Tensor | None = None,
) -> Tensor:
    """Condenses one micro-batch into the flat vector that `combine` merges and `named` takes apart.

    Args:
        train_logps, sampling_logps: log π and log μ, (B, T).
        mask: (B, T); 0 for padding, tool tokens and masked completions. Unmasked tokens that an engine did not score,
            as `valid_tokens` says, are counted and otherwise left out.
        metric: the discrepancy metric.
        discrepancy: (B, T), by that metric, where it is known already.
        correction: importance-sampling ratio as applied, (B, T) or (B, 1); π/μ where omitted.
        kept: (B, T) bool, tokens that the importance-sampling mask keeps; all where omitted.
        penalty, advantages: (B, T) or (B, 1), as applied; 0 where omitted.

    Returns:
        (K,) float64 (float32 on devices without it). Masked positions contribute nothing, whatever they hold.
    """
    valid = valid_tokens(sampling_logps, mask, train_logps)
    dtype = torch.float32 if train_logps.device.type == "mps" else torch.float64
    if discrepancy is None:
        discrepancy = token_discrepancy(train_logps, sampling_logps, metric)
    d = torch.where(valid, discrepancy.to(dtype), 0.0)
    # Selected before any exp: a masked inf times 0 would be NaN.
    log_pi = torch.where(valid, train_logps.float(), 0.0)
    log_mu = torch.where(valid, sampling_logps.float(), 0.0)
    log_ratio = (log_pi - log_mu).to(dtype)
    ratio = bounded(log_ratio).exp()
    pi = log_pi.to(dtype).exp()
    mu = log_mu.to(dtype).exp()
    kept = valid if kept is None else valid & kept
    correction = ratio if correction is None else correction.to(dtype).expand_as(ratio)
    penalty_size, advantage_size = _size(penalty, ratio), _size(advantages, ratio)
    sums = {
        "valid": valid,
        "discrepancy": d,
        "differing": log_ratio != 0,
        "kept": kept,
        "discrepancy_kept": d * kept,
        "penalty": penalty_size,
        "advantage": advantage_size,
        "pi": pi,
        "mu": mu,
        "pi_sq": pi * pi,
        "mu_sq": mu * mu,
        "pi_mu": pi * mu,
        "log_ratio": log_ratio,
        "abs_log_ratio": log_ratio.abs(),
        "ratio": ratio,
        "ratio_sq": ratio * ratio,
        "correction": correction,
    }
    maxima = {
        "discrepancy_max": d,
        "abs_log_ratio_max": log_ratio.abs(),
        "ratio_max": ratio,
        "neg_ratio_min": -ratio,
        "correction_max": correction,
        "neg_correction_min": -correction,
    }
    counted = mask.bool()
    parts = {name: torch.where(valid, x.to(dtype), 0.0).sum() for name, x in sums.items()}
    parts |= _sequence_sums(d, log_ratio, valid)
    parts["penalty_only"] = _penalty_only(penalty_size, advantage_size, valid)
    parts |= {"tokens": counted.sum().to(dtype), "unscored_tokens": (counted & ~valid).sum().to(dtype)}
    parts |= {name: _maximum(x, valid) for name, x in maxima.items()}
    for name, x in zip(HISTOGRAMS, (d, log_ratio.abs()), strict=True):
        parts[name] = _histogram(x, valid)
    return _flat(parts)


def _size(values: Tensor | None, like: Tensor) -> Tensor:
    """|values| in the shape and dtype of `like`; 0 where there are none."""
    return torch.zeros_like(like) if values is None else values.to(like.dtype).abs().expand_as(like)


def _sequence_sums(discrepancy: Tensor, log_ratio: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Sums over the sequences that have a valid token."""
    real = valid.any(-1, keepdim=True)
    total = torch.where(valid, log_ratio, 0.0).sum(-1, keepdim=True)
    mean = trajectory_mean(log_ratio, valid)
    values = {
        "trajectories": torch.ones_like(total),
        "trajectory_discrepancy": trajectory_mean(discrepancy, valid),
        "seq_ratio_sq": (2 * bounded(total)).exp(),
        "ppl_ratio": (-bounded(mean)).exp(),
        "abs_seq_log_ratio": total.abs(),
        "abs_mean_log_ratio": mean.abs(),
    }
    return {name: torch.where(real, x, torch.zeros_like(x)).sum() for name, x in values.items()}


def _penalty_only(penalty: Tensor, advantage: Tensor, valid: Tensor) -> Tensor:
    """Number of sequences with a penalty and no advantage (up to `NO_ADVANTAGE`), of their sizes at valid tokens."""
    punished = ((penalty > 0) & valid).any(-1)
    advantaged = ((advantage > NO_ADVANTAGE) & valid).any(-1)
    return (punished & ~advantaged).sum().to(penalty.dtype)


def _maximum(values: Tensor, valid: Tensor) -> Tensor:
    # -inf is the identity of max, so an all-masked micro-batch or rank does not shift the result.
    lowest = torch.full((1,), -torch.inf, dtype=values.dtype, device=values.device)
    return torch.cat([torch.where(valid, values, lowest).flatten(), lowest]).max()


def _histogram(values: Tensor, valid: Tensor) -> Tensor:
    """How many valid tokens have a value in each bin, (HISTOGRAM_BINS,); `values` (B, T) ≥ 0."""
    position = (values.clamp(min=1e-30).log10() - HISTOGRAM_LOW) * (HISTOGRAM_BINS / HISTOGRAM_DECADES)
    index = position.nan_to_num(nan=0.0).clamp(0, HISTOGRAM_BINS - 1).long().flatten()
    histogram = torch.zeros(HISTOGRAM_BINS, dtype=values.dtype, device=values.device)
    return histogram.scatter_add_(0, index, valid.flatten().to(values.dtype))


def _flat(parts: dict[str, Tensor]) -> Tensor:
    """The parts, scalars and histograms, as the flat vector (K,).

    Raises:
        KeyError: a declared name has no value, or a value no declared name.
    """
    declared = {*SUMS, *MAXIMA, *HISTOGRAMS}
    if parts.keys() != declared:
        missing, unknown = sorted(declared - parts.keys()), sorted(parts.keys() - declared)
        raise KeyError(f"a summary lacks {missing} and has {unknown}, which no reduction is declared for.")
    scalars = torch.stack([parts[name] for name in (*SUMS, *MAXIMA)])
    return torch.cat([scalars, *(parts[name] for name in HISTOGRAMS)])


def combine(summaries: Tensor) -> Tensor:
    """Merges summaries of micro-batches or of ranks: sums add, maxima are maximised.

    Args:
        summaries: (n, K).

    Returns:
        (K,).
    """
    summary = summaries.sum(0)
    summary[_MAXIMA_AT:_HISTOGRAMS_AT] = summaries[:, _MAXIMA_AT:_HISTOGRAMS_AT].amax(0)
    return summary


def named(summary: Tensor) -> dict[str, Tensor]:
    """The parts of a summary (K,) by name: scalars, and histograms (HISTOGRAM_BINS,)."""
    scalars = dict(zip((*SUMS, *MAXIMA), summary[:_HISTOGRAMS_AT], strict=True))
    histograms = summary[_HISTOGRAMS_AT:].reshape(len(HISTOGRAMS), HISTOGRAM_BINS)
    return scalars | dict(zip(HISTOGRAMS, histograms, strict=True))
