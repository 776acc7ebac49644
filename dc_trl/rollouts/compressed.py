# SPDX-License-Identifier: Apache-2.0
"""The policy as a W8A8 int8 checkpoint in the compressed-tensors format, which vLLM serves on GPUs and CPUs.

    python -m dc_trl.rollouts.compressed MODEL DIRECTORY    # what the server is started with

Weights: symmetric int8, one scale per output channel, rounded to nearest. Activations: int8, one scale per token,
computed by the server. Embeddings, norms and the language-model head keep their precision.
"""

import argparse
import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dc_trl.rollouts.checkpoint import write_checkpoint


def compressed_weights(weights: Iterable[tuple[str, Tensor]], model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Replaces the weight of each linear layer by its int8 values and `weight_scale`; passes the rest through.

    Args:
        weights: names and tensors of the plain model, of `iter_policy_weights`.
        model: the plain model, which knows its linear layers.

    Raises:
        NotImplementedError: for a mixture of experts, whose experts are not linear layers in transformers.
    """
    if any(name.endswith(".experts") for name, _ in model.named_modules()):
        raise NotImplementedError(
            f"{type(model).__name__} is a mixture of experts, which is not written in int8. Use a dense model, or "
            "start the server with `--quantization fp8` and leave `rollout_precision` at None."
        )
    head = model.get_output_embeddings()
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    for name, tensor in weights:
        if name not in linear:
            yield name, tensor
            continue
        values, scale = quantize_channels(tensor)
        yield name, values
        yield f"{name}_scale", scale


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale per output channel.

    Args:
        weight: (outputs, inputs).

    Returns:
        int8 values in [−127, 127], same shape, and float32 scales, (outputs, 1); their product approximates `weight`.
    """
    weight = weight.float()
    # An all-zero channel has no scale of its own; any positive one stores it exactly.
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale


def quantization_config() -> dict[str, Any]:
    """The entry of config.json by which vLLM recognises the format."""
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**common, "strategy": "channel", "dynamic": False},
        "input_activations": {**common, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def save_int8_policy(model: PreTrainedModel, directory: Path) -> None:
    """Writes the checkpoint with which a server of int8 rollouts is started.

    Raises:
        OSError: `directory` exists, or cannot be written.
    """
    write_checkpoint(directory, model, compressed_weights(model.state_dict().items(), model))
    config = copy.deepcopy(model.config)
    config.quantization_config = quantization_config()
    config.architectures = [type(model).__name__]  # vLLM picks its implementation by it
    config.save_pretrained(directory)


def main() -> None:
    """Converts a model, from the Hub or a directory, with its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub name or directory of a dense causal language model")
    parser.add_argument("directory", type=Path, help="where to write; must not exist")
    options = parser.parse_args()
    save_int8_policy(AutoModelForCausalLM.from_pretrained(options.model, dtype="auto"), options.directory)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.directory)


if __name__ == "__main__":
    main()
