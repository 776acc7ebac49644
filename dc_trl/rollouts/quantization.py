# SPDX-License-Identifier: Apache-2.0
"""The weights of the in-process rollout engine: a copy of the live model's, in a precision of its own.

Only what standard weight-only schemes quantise is quantised: the `nn.Linear` layers inside the blocks and the fused
expert tensors of mixtures of experts. Embeddings, LM head, routers, norms and biases stay in the compute dtype, and so
do all activations and the KV cache. A router is what decides which experts a token sees, and how much of the shared
one.
"""

import copy
import logging
import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from dc_trl.rollouts.decoding import share_keys_within_groups
from dc_trl.rollouts.precisions import CAST_DTYPES, INTEGER_BITS, PRECISIONS, QUANTIZED_PRECISIONS
from dc_trl.rollouts.rounding import Dither, round_to_format
from dc_trl.rollouts.update_seen import UpdateSeen

logger = logging.getLogger(__name__)

# The group size of common 4-bit checkpoints. 8-bit formats have one scale per output channel.
GROUP_SIZE = 128
# By name, as the exclusion lists of quantisation tools have them: the classes differ from model to model, and some
# routers are an `nn.Linear`, or hold several.
_ROUTER = re.compile(r"(^|\.)(\w*router\w*|gate|shared_expert_gate)(\.|$)")


def check_precision(precision: str | None) -> None:
    """Raise `ValueError` unless `precision` is None or one of `PRECISIONS`."""
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(
            f"`rollout_precision` is {precision!r}, which is unknown: use one of {', '.join(PRECISIONS)}, or leave it "
            "unset to sample from the weights as trained."
        )


def compute_dtype(precision: str | None, trained: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which the engine multiplies: activations, KV cache and everything that is not quantised.

    As trained for None, the named dtype for bf16 and fp16. Quantised weights are multiplied in bfloat16 on CUDA, as
    deployments do, and in float32 elsewhere, because many CPUs emulate bfloat16, slowly.
    """
    if precision is None:
        return trained
    if precision in CAST_DTYPES:
        return cast(torch.dtype, getattr(torch, CAST_DTYPES[precision]))
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def fake_quantize(
    weight: torch.Tensor, precision: str, input_dim: int = -1, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """Round a weight to the nearest value that `precision` can represent and return it dequantised, in float32.

    Symmetric round to nearest with scale = max |w| / largest code. int8 and fp8 (e4m3) have one scale per output
    channel; int4 and int3 one per group of 128 inputs.

    Args:
        weight: any shape and floating dtype; each vector along `input_dim` is quantised by itself.
        precision: one of fp8, int8, int4, int3.
        input_dim: the dimension that the multiplication sums over: the last in `nn.Linear`.
        noise: u of a dither (`dc_trl.rollouts.rounding`), of the weight's shape, in steps of the codes: the code is
            round(weight / scale + u). The scale is that of rounding to nearest, so that the largest code is the same.
    """
    if input_dim != -1:
        turned = None if noise is None else noise.transpose(input_dim, -1)
        return fake_quantize(weight.transpose(input_dim, -1), precision, noise=turned).transpose(input_dim, -1)
    weight = weight.float()
    width = weight.shape[-1]
    group = GROUP_SIZE if precision in ("int4", "int3") else width
    groups = _grouped(weight, group)
    peak = groups.abs().amax(dim=-1, keepdim=True)
    largest = _largest_code(precision)
    scale = torch.where(peak > 0, peak / largest, torch.ones_like(peak))  # an all-zero group stays zero
    codes = (groups / scale).clamp(-largest, largest)
    codes = _round_codes(codes, precision, None if noise is None else _grouped(noise, group))
    return (codes * scale).flatten(-2)[..., :width]


def _grouped(values: torch.Tensor, group: int) -> torch.Tensor:
    """(..., input) as (..., groups, group). Zeros in the last, short group change neither its peak nor its scale."""
    return F.pad(values, (0, -values.shape[-1] % group)).unflatten(-1, (-1, group))


def _round_codes(codes: torch.Tensor, precision: str, noise: torch.Tensor | None) -> torch.Tensor:
    if precision == "fp8":
        return _round_to_e4m3(codes) if noise is None else round_to_format(codes, noise, torch.float8_e4m3fn)
    return codes.round() if noise is None else (codes + noise).round()


def _largest_code(precision: str) -> float:
    if precision == "fp8":
        return torch.finfo(torch.float8_e4m3fn).max
    return float(2 ** (INTEGER_BITS[precision] - 1) - 1)


def _round_to_e4m3(values: torch.Tensor) -> torch.Tensor:
    # Metal has no float8 dtype: round on the CPU there.
    device = torch.device("cpu") if values.device.type == "mps" else values.device
    return values.to(device).to(torch.float8_e4m3fn).to(values.device, torch.float32)


def quantizable_parameters(model: nn.Module, output_head: nn.Module | None) -> dict[str, int]:
    """The parameters of `model` to quantise, by name, each with the dimension of its inputs, counted from the end.

    They are the weights of `nn.Linear` layers other than the head and the routers, and the fused experts: the
    (experts, ., .) parameters that transformers keeps outside of `nn.Linear`.

    Raises:
        ValueError: there is none, so the precision would silently do nothing (GPT-2's `Conv1D` layers, for example).
    """
    found = {}
    for prefix, module in model.named_modules():
        if module is output_head or _ROUTER.search(prefix):
            continue
        if isinstance(module, nn.Linear):
            found[f"{prefix}.weight"] = -1
        elif "expert" in f"{prefix}.{type(module).__name__}".lower():
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    found[f"{prefix}.{leaf}"] = _input_dim_of_experts(module)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear layer or fused experts that `rollout_precision` could quantise: "
            f"use one of {', '.join(CAST_DTYPES)}, or leave it unset to sample from the weights as trained."
        )
    return found


def _input_dim_of_experts(module: Any) -> int:
    """-1 for experts (E, output, input), -2 for (E, input, output).

    transformers marks most of the latter by `is_transposed`. The others are told by their shapes; where these do not
    tell, the order is that of `nn.Linear`.
    """
    transposed = getattr(module, "is_transposed", None)
    if transposed is None and hasattr(module, "gate_up_proj"):
        # The gate and the projection up, side by side, are twice as many outputs as the projection down has inputs.
        transposed = module.gate_up_proj.shape[-1] == 2 * module.down_proj.shape[-2]
    elif transposed is None and hasattr(module, "in_features"):
        transposed = tuple(module.weight.shape[-2:]) == (module.in_features, module.out_features)
    return -2 if transposed else -1


def real_weight(weight: torch.Tensor, precision: str) -> nn.Parameter:
    """Quantise an (output, input) weight with torchao: int8 or float8 storage, multiplied by torchao's own kernels.

    Raises:
        ImportError: torchao is not installed.
        KeyError: torchao is not used for this precision (int4, int3).
    """
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[precision]()
    holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(holder, config)
    return nn.Parameter(holder.weight, requires_grad=False)


def _set_int8_codes(parameter: Any, weight: torch.Tensor) -> None:
    """Give torchao's int8 weight the codes and scales of a `weight` (output, input) that `fake_quantize` rounded.

    torchao's own scale has 127.5 codes to the peak, not 127, so that it would round those weights once more. For
    float8 the two agree.
    """
    peak = weight.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(peak > 0, peak / _largest_code("int8"), torch.ones_like(peak))
    parameter.qdata.copy_((weight / scale).round())
    parameter.scale.copy_(scale)


def supports_real_weights(precision: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torchao's weights of this precision multiply correctly on this device; False means fake quantisation.

    Found by trying: which kernels exist depends on the device and on the versions of torch and torchao.
    """
    if precision not in ("int8", "fp8"):
        return False
    weight = torch.linspace(-1, 1, 64 * 64).reshape(64, 64)
    inputs = torch.linspace(-1, 1, 4 * 64).reshape(4, 1, 64)
    expected = inputs @ fake_quantize(weight, precision).T
    try:
        # A copy of each operand: torchao may keep or change what it is given.
        quantized = real_weight(weight.to(device, dtype, copy=True), precision)
        with torch.inference_mode():
            outputs = F.linear(inputs.to(device, dtype), quantized).float().cpu()
    except Exception as error:  # noqa: BLE001 -- a missing kernel surfaces as any of a dozen exception types
        logger.info("torchao cannot run %s weights on %s (%s): quantisation is simulated.", precision, device, error)
        return False
    return bool((outputs - expected).abs().max() < 0.05 * expected.abs().max())


class PolicyCopy:
    """A model of the live model's class and configuration, whose weights are read from it and quantised on `load`.

    It is built afresh: a deep copy would carry along the forward that TRL patches into the live model. Its weights are
    uninitialised until the first `load`.

    Args:
        live: the training model without wrappers around it; adapters may be inside it.
        precision: one of `PRECISIONS`, or None.
        device: where the copy lives.
        dither: rounds what is rounded with a fixed dither, so that the copy follows small updates; None rounds to
            nearest.

    Attributes:
        model: the copy, in eval mode, without gradients.
        quantization: "none" (as trained), "cast", "real" (torchao), "fake" (simulated) or "mixed" (real layers,
            simulated fused experts).
    """

    def __init__(
        self, live: PreTrainedModel, precision: str | None, device: torch.device, dither: Dither | None = None
    ) -> None:
        check_precision(precision)
        self.precision = precision
        self.device = device
        self.dither = dither
        self.dtype, self._float32_head = self._dtypes(live)
        self.model = _build_like(live, self.dtype, device)
        if self._float32_head:
            _keep_head_in_float32(self.model)
        self._names = {name for name, _ in self.model.named_parameters()}
        # Where each weight goes, looked up once: the way down the tree costs as much as copying a small tensor.
        self._targets = self.model.state_dict(keep_vars=True)
        self._quantized: dict[str, int] = {}
        self._real: set[str] = set()
        self.quantization = "none" if precision is None else "cast"
        if precision in QUANTIZED_PRECISIONS:
            self.quantization = self._plan(precision)

    def _dtypes(self, live: PreTrainedModel) -> tuple[torch.dtype, bool]:
        """The dtype to multiply in, and whether the head alone is to stay in float32."""
        trained = _trained_dtype(live)
        dtype = compute_dtype(self.precision, trained, self.device)
        head = live.get_output_embeddings().weight.dtype
        return dtype, head == torch.float32 != trained and dtype != torch.float32

    def fits(self, live: PreTrainedModel) -> bool:
        """Whether the copy still has the dtypes that one built now would have.

        DeepSpeed casts the model in training, and FSDP2's mixed precision casts it up, after the trainer is built.
        """
        return self._dtypes(live) == (self.dtype, self._float32_head)

    def _plan(self, precision: str) -> str:
        self._quantized = quantizable_parameters(self.model, self.model.get_output_embeddings())
        if supports_real_weights(precision, self.device, self.dtype):
            self._real = {name for name in self._quantized if self.model.get_parameter(name).ndim == 2}
        if not self._real:
            return "fake"
        return "real" if self._real == set(self._quantized) else "mixed"

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], meter: UpdateSeen | None = None) -> None:
        """Copy the live weights in, under the names of the plain model, and quantise them, one at a time.

        Args:
            tensors: every parameter, tied ones once, and every persistent buffer; only read.
            meter: is shown the weights as trained and as the copy has them.

        Raises:
            ValueError: a parameter of the copy got no value.
        """
        missing = set(self._names)
        for name, tensor in tensors:
            missing.discard(name)
            self.load_weight(name, tensor)
            if meter is not None and meter.wants(name):
                meter.observe(name, tensor, self.deployed(name))
        if missing:
            raise ValueError(
                f"the live model gave no value for {', '.join(sorted(missing))}. If an adapter sits on one of two "
                "tied matrices, target other layers, or load the model with tie_word_embeddings=False."
            )

    def load_weight(self, name: str, tensor: torch.Tensor) -> None:
        """Copy one live tensor in, rounded to what the copy holds under that name. The tensor is only read."""
        if name in self._quantized:
            self._load_quantized(name, tensor)
        elif self.dither is not None:
            self.dither.cast_into(self._targets[name], tensor, name)
        else:
            self._targets[name].copy_(tensor)

    def _load_quantized(self, name: str, tensor: torch.Tensor) -> None:
        precision = str(self.precision)
        if name not in self._real:
            self._targets[name].copy_(self._fake_quantize(name, tensor))
            return
        if self.dither is None:
            # Cloned, because torchao may keep what it is given, and this may be the live weight itself.
            parameter = real_weight(tensor.to(self.device, self.dtype, copy=True), precision)
        else:
            weight = self._fake_quantize(name, tensor)
            parameter = real_weight(weight.to(self.dtype, copy=True), precision)
            if precision == "int8":
                _set_int8_codes(parameter, weight)
        prefix, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(prefix), leaf, parameter)

    def _fake_quantize(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self.device)
        noise = None if self.dither is None else self.dither.noise(tensor, name)
        return fake_quantize(tensor, str(self.precision), self._quantized[name], noise)

    def deployed(self, name: str) -> torch.Tensor:
        """A tensor as it samples, dequantised where it is quantised; for measurements and for saving."""
        if name in self._real:
            return self.model.get_parameter(name).dequantize()
        return self._targets[name]


def _build_like(live: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """An uninitialised model of the class and configuration of `live`."""
    config = copy.deepcopy(live.config)
    config._attn_implementation = live.config._attn_implementation
    if hasattr(text_config := config.get_text_config(), "output_router_logits"):
        text_config.output_router_logits = False  # its load-balancing loss does not understand a KV cache
    if _is_adapted(live.get_input_embeddings()) or _is_adapted(live.get_output_embeddings()):
        # An adapter on one of two tied matrices unties them: each needs room of its own.
        config.tie_word_embeddings = False
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # Constructed directly: `from_config` would shard the copy under ZeRO-3. Without initialisation, which would be
        # slow and would draw from the global generator. In its dtype, because a later `.to` also rounds the buffers.
        with no_init_weights():
            model: Any = type(live)(config)
    finally:
        torch.set_default_dtype(default)
    model.tie_weights()
    share_keys_within_groups(model)
    return model.to(device).eval().requires_grad_(False)


def _trained_dtype(live: PreTrainedModel) -> torch.dtype:
    """The dtype of the layers. `live.dtype` is the embedding's, which `cast_lm_head_to_fp32` changes if it is tied."""
    ends = (live.get_input_embeddings(), live.get_output_embeddings())
    apart = {id(p) for module in ends if module is not None for p in module.parameters()}
    layers = (p.dtype for p in live.parameters() if p.is_floating_point() and id(p) not in apart)
    return next(layers, live.dtype)


def _keep_head_in_float32(model: PreTrainedModel) -> None:
    """Does to the copy what TRL's `cast_lm_head_to_fp32` does; embeddings keep their output dtype."""
    dtype = _trained_dtype(model)
    head = model.get_output_embeddings().float()
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.to(dtype))


def _is_adapted(module: nn.Module | None) -> bool:
    # By attribute, because PEFT is optional: its layers keep the original as `base_layer`, its wrappers of whole
    # modules as `original_module`.
    return hasattr(module, "base_layer") or hasattr(module, "original_module")
