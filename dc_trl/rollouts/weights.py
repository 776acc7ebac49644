# SPDX-License-Identifier: Apache-2.0
"""The policy's weights, full and merged, one tensor at a time: what every sampling engine is fed with.

Training shards parameters (FSDP2, ZeRO-3), wraps modules (checkpointing, compilation) and adds adapters (PEFT). An
engine wants the plain model's tensors under the plain model's names. This module undoes the three without touching the
weights in training.
"""

import copy
import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_available, is_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.distributed import DistributedBackend

# The names under which checkpointing, FSDP and compilation hold the module that they wrap.
_WRAPPED = frozenset({"_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"})


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
    return iter_plain_weights(plain_model(model, accelerator), accelerator)


def iter_plain_weights(model: PreTrainedModel, accelerator: Accelerator) -> Iterator[tuple[str, Tensor]]:
    """As `iter_policy_weights`, for a model whose envelopes `plain_model` has taken off already."""
    backend = DistributedBackend(accelerator)
    if backend.fsdp_version == 1:
        raise NotImplementedError(
            "fsdp_version=1 keeps parameters flattened, so they cannot be gathered one at a time. Set "
            "`fsdp_version: 2` in the Accelerate config."
        )
    for name, source in _sources(model):
        if isinstance(source, nn.Module):
            layer = {id(p): p for p in source.parameters()}
            with backend.gather_params(list(layer.values())):
                yield from _merged(name, source, {key: _full(p, accelerator) for key, p in layer.items()})
        elif backend.is_zero3:
            with backend.gather_params([source]):
                yield name, source.detach()
        else:
            yield name, _full(source, accelerator)


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


def parameter_sizes(model: nn.Module) -> dict[str, int]:
    """Elements of each parameter of a plain model, which may be sharded, by name."""
    # Under ZeRO-3 a parameter is empty until it is gathered; DeepSpeed keeps its size.
    return {name: int(getattr(p, "ds_numel", p.numel())) for name, p in model.named_parameters()}


def plain_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a model whose envelopes `plain_model` has taken off, by the names of `iter_policy_weights`.

    As they are, sharded or not. Tied parameters come once; those of layers with adapters, which a sync merges, do not.
    """
    return [(name, source) for name, source in _sources(model) if isinstance(source, nn.Parameter)]


def _sources(root: nn.Module) -> list[tuple[str, Tensor | nn.Module]]:
    """`(name, tensor)` of each parameter and persistent buffer, and `(dotted prefix, layer)` of each adapted layer.

    Tied parameters come once. An adapter ends the tie: its layer always comes.
    """
    found: list[tuple[str, Tensor | nn.Module]] = []
    seen: set[int] = set()
    adapters, wrappers = _peft_classes()

    def visit(module: nn.Module, prefix: str) -> None:
        """Adds what a module holds itself, and then what its children hold."""
        if isinstance(module, wrappers):
            visit(_in_use(module), prefix)
            return
        if isinstance(module, adapters):
            seen.update(map(id, module.parameters()))
            found.append((prefix, module))
            return
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append((prefix + name, parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found.append((prefix + name, buffer))
        for name, child in module._modules.items():
            if child is not None:
                visit(child, prefix if name in _WRAPPED else f"{prefix}{name}.")

    visit(root, "")
    return found


@functools.cache
def _peft_classes() -> tuple[Any, Any]:
    """The classes of layers with adapters, and of wrappers that train a copy, for `isinstance`; none without PEFT.

    Looked up once, because asking whether PEFT is installed parses the metadata of packages: asked of every module, it
    took longer than the copying.
    """
    if not is_peft_available():
        return (), ()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return (BaseTunerLayer,), (AuxiliaryTrainingWrapper,)


def _in_use(module: Any) -> nn.Module:
    """Of a module that PEFT trains as a copy, the copy that the forward uses."""
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        return module.modules_to_save[module.active_adapters[0]]
    return module.token_adapter


def _full(parameter: Tensor, accelerator: Accelerator) -> Tensor:
    """The whole of a tensor. Under FSDP2 a collective, on the training device, where its process group works."""
    if isinstance(parameter, DTensor):
        return cast(DTensor, parameter.detach().to(accelerator.device)).full_tensor()
    return parameter.detach()


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
        if isinstance(part, _peft_classes()[0]):
            part.merge()
    for name, tensor in merged.get_base_layer().state_dict().items():
        yield prefix + name, tensor
