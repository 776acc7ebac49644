# SPDX-License-Identifier: Apache-2.0
"""Whether the weight sync dithers: what `sync_rounding` means for a trainer and its sampler."""

from typing import Any

import torch
from accelerate import Accelerator

from dc_trl.rollouts.precisions import INTEGER_BITS, QUANTIZED_PRECISIONS
from dc_trl.rollouts.rounding import Dither


def choose_dither(args: Any, accelerator: Accelerator) -> Dither | None:
    """The dither that `args.sync_rounding` asks for, None for rounding to nearest.

    `auto` dithers where the training forward multiplies with finer weights than the sampler's, so that the rounding
    would lose what it has learnt: float32 and TF32 for a sampler in 16 bits, and any for one in fp8. Under autocast,
    or FSDP2's mixed precision, the forward rounds to nearest 16-bit numbers as well, its weights or, with adapters,
    the sum of their output and the base layer's: it and a sampler in 16 bits lag alike, and a dithered one would move
    away. `auto` does not dither integers, where the dither takes away the bias but leaves the discrepancy as large or
    larger.

    Asked for where the forward rounds, `dither` does more than this: the trainer is given the dithered weights too
    (`dc_trl.training.one_rounding`), and the cast of the sync then finds them on its grid.

    Args:
        args: a `DCGRPOConfig`.
        accelerator: the trainer's.
    """
    if args.sync_rounding == "nearest":
        return None
    if args.sync_rounding == "auto" and (
        forward_rounds_alike(args, accelerator) or args.rollout_precision in INTEGER_BITS
    ):
        return None
    return Dither(args.seed)


def rounding_in_force(engine: Any, args: Any, accelerator: Accelerator) -> str | None:
    """How the weights are rounded for the sampler of a trainer: `"dither"` or `"nearest"`, whatever `auto` comes to.

    Args:
        engine: the trainer's `vllm_generation`.
        args: a `DCGRPOConfig`.
        accelerator: the trainer's.

    Returns:
        None where no weight is rounded: no engine has weights of its own, or it has them as trained or in float32.
    """
    if not hasattr(engine, "deployed_weights"):
        return None
    # In process, quantised weights are multiplied in float32 too.
    if getattr(engine, "quantization", "none" if engine.deployed_dtype == torch.float32 else "cast") == "none":
        return None
    return "nearest" if choose_dither(args, accelerator) is None else "dither"


def forward_rounds_alike(args: Any, accelerator: Accelerator) -> bool:
    """Whether the training forward rounds its weights to nearest, and to steps as large as the sampler's."""
    return forward_rounds_weights(accelerator) and args.rollout_precision not in QUANTIZED_PRECISIONS


def forward_rounds_weights(accelerator: Accelerator) -> bool:
    """Whether the training forward multiplies with 16-bit roundings of the weights."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    dtype = getattr(getattr(plugin, "mixed_precision_policy", None), "param_dtype", None)
    return accelerator.mixed_precision != "no" or dtype in (torch.bfloat16, torch.float16)
