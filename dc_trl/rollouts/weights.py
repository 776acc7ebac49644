# SPDX-License-Identifier: Apache-2.0
"""The policy's weights, full and merged, one tensor at a time: what every sampling engine is fed with.

Training shards parameters (FSDP2, ZeRO-3), wraps modules (checkpointing, compilation) and adds adapters (PEFT). An
engine wants the plain model's tensors under the plain model's names. This module undoes the three without touching the
weights in training.
"""

import copy
import re
from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_available, is_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.distributed import DistributedBackend

_WRAPPERS = re.compile(r"(_checkpoint_wrapped_module|_fsdp_wrapped_module|_orig_mod)\.")


def iter_policy_weights(model: nn.Module, accelerator: Accelerator) -> Iterator[tuple[str, Tensor]]:
    """Yield `(name, tensor)` for each parameter and persistent buffer of the plain model, in the order of its modules.

    Names are those of `state_dict()` of a model freshly built from the config, without adapters; tied parameters come
    once, under their first name. Tensors are detached and whole, on the device of training. A layer with adapters
    comes merged and in float32, so that whoever casts it rounds once; the others keep their dtype and may share memory
    with the live weights: copy what you keep, and write to none of them.

    Gathering a shard is a collective: every process must run the iterator to its end, whatever it does with the
    tensors. A tensor may be freed when the iterator moves on.

    Args:
        model: the policy as given to the trainer, prepared by Accelerate or not, with PEFT adapters or without.
        accelerator: the trainer's.

    Raises:
        NotImplementedError: for FSDP version 1, adapters that cannot be merged, and adapters on a quantized base.
    """
    backend = DistributedBackend(accelerator)
    if backend.fsdp_version == 1:
        raise NotImplementedError(
            "fsdp_version=1 keeps parameters flattened, so they cannot be gathered one at a time. Set "
            "`fsdp_version: 2` in the Accelerate config."
        )
    seen: set[int] = set()
    for prefix, module in _owners(plain_model(model, accelerator)):
        adapted = _is_adapter(module)
        # Parameters seen under another name are tied, and come once. An adapter ends the tie: its layer is always due.
        due = {id(p): p for p in module.parameters(recurse=adapted) if adapted or id(p) not in seen}
        seen.update(due)
        with backend.gather_params(list(due.values())):
            full = {key: _full(parameter, accelerator) for key, parameter in due.items()}
            yield from _merged(prefix, module, full) if adapted else _plain(prefix, module, full)


def plain_model(model: nn.Module, accelerator: Accelerator) -> PreTrainedModel:
    """The model under Accelerate's and PEFT's envelopes. Its layers may still be sharded and carry adapters.

    Raises:
        NotImplementedError: for adapters that cannot be merged into weights.
    """
    policy = accelerator.unwrap_model(model, keep_torch_compile=False)
    if not is_peft_model(policy):
        return cast(PreTrainedModel, policy)
    for name, config in policy.peft_config.items():
        if config.is_prompt_learning:
            raise NotImplementedError(
                f"The adapter {name!r} is {config.peft_type}: it adds inputs, not weights, so it cannot be merged for "
                "sampling. Use an adapter that changes weights, such as LoRA, or train all weights."
            )
    return cast(PreTrainedModel, policy.get_base_model())


def _owners(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield `(dotted prefix, module)` for each module that owns tensors; an adapted layer counts as one module."""
    module = _in_use(module)
    yield prefix, module
    if not _is_adapter(module):
        for name, child in module.named_children():
            yield from _owners(child, _WRAPPERS.sub("", f"{prefix}{name}."))


def _in_use(module: nn.Module) -> nn.Module:
    """Of a module that PEFT trains as a copy, the copy that the forward uses; any other module itself."""
    if is_peft_available():
        from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

        if isinstance(module, ModulesToSaveWrapper):
            return module.modules_to_save[module.active_adapters[0]]
        if isinstance(module, AuxiliaryTrainingWrapper):
            return module.token_adapter
    return module


def _is_adapter(module: nn.Module) -> bool:
    """Whether the module is a layer that PEFT replaced."""
    if not is_peft_available():
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _full(parameter: nn.Parameter, accelerator: Accelerator) -> Tensor:
    """The whole of a parameter. Under FSDP2 a collective, on the training device, where its process group works."""
    if isinstance(parameter, DTensor):
        return cast(DTensor, parameter.detach().to(accelerator.device)).full_tensor()
    return parameter.detach()


def _plain(prefix: str, module: nn.Module, full: dict[int, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a module itself owns; `full` maps the id of each parameter due to its value."""
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) in full:
            yield prefix + name, full[id(parameter)]
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer.detach()


def _merged(prefix: str, layer: Any, full: dict[int, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The base layer's tensors with the active adapters merged in, in float32, computed on a copy of the layer.

    Merging in place and undoing it leaves rounding errors in the weights in training at every sync, which is why
    PEFT's own pair `merge_adapter` and `unmerge_adapter` is not used on them.
    """
    if not all(tensor.is_floating_point() for tensor in full.values()):
        raise NotImplementedError(
            f"The adapters on {prefix.rstrip('.')!r} sit on quantized weights, which cannot hold the merged values. "
            "Load the model without `quantization_config`, or train all weights."
        )
    # deepcopy takes a memo's value for an object instead of copying it: here the full float32 tensor for each shard.
    memo = {
        key: nn.Parameter(tensor.to(torch.float32, copy=True), requires_grad=False) for key, tensor in full.items()
    }
    merged = copy.deepcopy(layer, memo)
    for part in merged.modules():
        if _is_adapter(part):
            part.merge()
    for name, tensor in merged.get_base_layer().state_dict().items():
        yield prefix + name, tensor
