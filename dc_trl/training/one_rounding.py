# SPDX-License-Identifier: Apache-2.0
"""One rounding for trainer and sampler: what `sync_rounding="dither"` means where the trainer computes in 16 bits.

Under autocast the forward rounds float32 weights to nearest, and loses updates as a sync to nearest does; beside it, a
dithered sampler moves away. So the model itself gets the dithered weights, the optimizer keeps float32 masters of them
(`dc_trl.training.master_weights`), and neither autocast nor the sync has anything left to round.
"""

from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from dc_trl.rollouts.handover import kept_in_float32
from dc_trl.rollouts.rounding import Dither
from dc_trl.rollouts.sync_rounding import forward_rounds_weights
from dc_trl.rollouts.weights import plain_model, plain_parameters
from dc_trl.training.master_weights import ROUNDED, MasterWeights

_OTHERWISE = "Or use `sync_rounding='nearest'`."


class OneRounding:
    """Gives an optimizer its masters.

    Args:
        dither: the one of the weight sync.
        masters: the float32 values of the weights that were cast, by the plain model's names.
    """

    def __init__(self, dither: Dither, masters: dict[str, Tensor]) -> None:
        self.dither = dither
        self.masters = masters
        self._wrapped: MasterWeights | None = None

    def wrap(self, optimizer: Any, model: nn.Module, accelerator: Accelerator) -> Any:
        """The optimizer with masters; itself if it has them, as in a second run of a trainer, prepared or not."""
        if self._wrapped is not None and self._wrapped in (optimizer, getattr(optimizer, "optimizer", None)):
            return optimizer
        # The names of the sync; adapters that are trained in 16 bits have none there, and keep their own.
        names = {id(parameter): name for name, parameter in plain_parameters(plain_model(model, accelerator))}
        weights = [(names.get(id(p), own), p) for own, p in model.named_parameters()]
        self._wrapped = MasterWeights(optimizer, weights, self.dither, self.masters)
        return self._wrapped


def one_rounding(args: Any, model: nn.Module, accelerator: Accelerator) -> OneRounding | None:
    """Casts the model for one rounding, if `args` ask for it; None where nothing is to be done.

    Asked for by `sync_rounding="dither"` with a forward that multiplies with 16-bit weights: under autocast, or of a
    model that was loaded in 16 bits. Under autocast the float32 weights are cast to bf16, and their values become the
    masters; a model in 16 bits stays, and masters begin as its weights. Adapters are trained in float32, so a model
    with adapters has nothing to cast.

    Args:
        args: a `DCGRPOConfig`.
        model: the policy as the trainer has it when it is built.
        accelerator: the trainer's.

    Raises:
        ValueError: with DeepSpeed, FSDP's mixed precision, or autocast to anything but bf16.
    """
    if args.sync_rounding != "dither":
        return None
    rounds = forward_rounds_weights(accelerator) and not is_peft_model(model)
    if not rounds and not any(p.requires_grad and p.dtype in ROUNDED for p in model.parameters()):
        return None
    _refuse_what_does_not_work(accelerator)
    dither = Dither(args.seed)
    masters = _cast(plain_model(model, accelerator), dither, args.cast_lm_head_to_fp32) if rounds else {}
    return OneRounding(dither, masters)


def _refuse_what_does_not_work(accelerator: Accelerator) -> None:
    asked = "`sync_rounding` is 'dither' with a trainer that computes in 16 bits"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            f"{asked}, and DeepSpeed keeps float32 masters of its own, which it rounds to nearest. Use FSDP2 with a "
            "model in bf16 (`accelerate_configs/fsdp2.yaml` with `mixed_precision: 'no'`, and "
            f"`model_init_kwargs={{'dtype': 'bfloat16'}}`). {_OTHERWISE}"
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and forward_rounds_weights(accelerator):
        raise ValueError(
            f"{asked}, and FSDP's mixed precision keeps the weights in float32 and rounds them to nearest whenever it "
            "gathers them. Train a model in bf16 without it: `bf16=False`, `mixed_precision: 'no'` in the Accelerate "
            f"config, and `model_init_kwargs={{'dtype': 'bfloat16'}}`. {_OTHERWISE}"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"{asked}, and mixed precision is {accelerator.mixed_precision!r}, whose loss scaler needs gradients in "
            f"float32. Use `bf16=True`, or float32. {_OTHERWISE}"
        )


@torch.no_grad()
def _cast(model: PreTrainedModel, dither: Dither, float32_head: bool) -> dict[str, Tensor]:
    """Casts the float32 weights to bf16, in the parameters that there are, and returns those in training as they were.

    What the model's class keeps in float32 stays, and so does a head that TRL has cast to it.
    """
    kept, masters = kept_in_float32(model), {}
    head = model.get_output_embeddings().weight if float32_head else None
    for name, parameter in plain_parameters(model):
        if parameter.dtype != torch.float32 or parameter is head or kept(name):
            continue
        if parameter.requires_grad:
            masters[name] = parameter.data
        parameter.data = dither.cast(parameter.data, torch.bfloat16, name)
    return masters
