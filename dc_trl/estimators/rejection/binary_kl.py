# SPDX-License-Identifier: Apache-2.0
"""KL divergence of a distribution over two outcomes: the sampled token, and any other."""

import torch
from torch import Tensor

# The resolution of a float32 next to 1. Of a token that one engine is certain of, the probability of "any other" is
# not known more finely than this, and an exact 0 would make every divergence from it infinite.
COMPLEMENT_FLOOR = torch.finfo(torch.float32).eps

# log 0 as a finite number: 0 · log 0 is then 0, not NaN.
_LOWEST = torch.finfo(torch.float32).min


def binary_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P ‖ Q) = p log(p/q) + (1 − p) log((1 − p)/(1 − q)), the binary KL of DPPO (arXiv 2602.04879).

    A lower bound of the KL divergence over the vocabulary, from the two probabilities of the sampled token alone.

    Args:
        log_p, log_q: log-probabilities of the token under P and Q, any shape, in nats.

    Returns:
        Same shape, float32, ≥ 0, in nats.
    """
    log_p, log_q = (x.float().clamp(min=_LOWEST) for x in (log_p, log_q))
    other_p, other_q = (-torch.expm1(x).clamp(max=-COMPLEMENT_FLOOR) for x in (log_p, log_q))
    token = log_p.exp() * (log_p - log_q)
    return (token + other_p * (other_p.log() - other_q.log())).clamp(min=0.0)
