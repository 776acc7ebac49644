# SPDX-License-Identifier: Apache-2.0
"""One of two gloo ranks that shard the tiny policy with FSDP2 and read it back; run by test_weight_sync.py."""

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from torch import nn
from torch.distributed.fsdp import fully_shard

from dc_trl.rollouts.weights import iter_policy_weights


def build(adapted: bool) -> nn.Module:
    """The policy, the same on every rank, with tied embeddings; adapted: with random LoRA weights."""
    model = tiny_model(tie_word_embeddings=True)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, config) if adapted else model


def main() -> None:
    """Compares the sharded policy's weights with the whole one's, and checks that reading left the shards alone."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for adapted in (False, True):
        whole = dict(iter_policy_weights(build(adapted), accelerator))
        model = build(adapted)
        for layer in (model.get_base_model() if adapted else model).model.layers:
            fully_shard(layer)
        fully_shard(model)
        before = [parameter.to_local().clone() for parameter in model.parameters()]
        gathered = {name: tensor.clone() for name, tensor in iter_policy_weights(model, accelerator)}
        assert list(gathered) == list(whole)
        for name, tensor in whole.items():
            torch.testing.assert_close(gathered[name], tensor, atol=1e-6, rtol=0)
        assert all(torch.equal(old, now.to_local()) for old, now in zip(before, model.parameters(), strict=True))
    print(f"rank {accelerator.process_index} agrees", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
