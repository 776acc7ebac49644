# SPDX-License-Identifier: Apache-2.0
"""What a run would do and need, worked out on paper: batches, memory per GPU, bytes per weight sync.

Pure arithmetic on configurations; no weights are loaded. The memory figures are estimates: parameters, gradients and
optimizer state are exact for the scheme named; activations are rough (a factor of two either way); fragmentation,
CUDA contexts (about 1 GiB) and NCCL buffers are left out.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

GIB = 1024**3
SHARDINGS = ("none", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class Launch:
    """How many processes train, and how they share the state of training."""

    processes: int = 1
    sharding: str = "none"

    @classmethod
    def from_accelerate(cls, config: Mapping[str, Any], processes: int | None = None) -> "Launch":
        """From the contents of an Accelerate configuration file; `processes` overrides its number."""
        kind = str(config.get("distributed_type", "NO"))
        sharding = "none"
        if kind == "FSDP":
            sharding = "fsdp2"
        elif kind == "DEEPSPEED":
            stage = int(config.get("deepspeed_config", {}).get("zero_stage", 2))
            sharding = f"zero{stage}" if stage >= 2 else "none"
        return cls(int(processes or config.get("num_processes", 1)), sharding)

    @classmethod
    def from_environment(cls) -> "Launch":
        """From what `accelerate launch` sets; one process where it was not used."""
        sharding = "none"
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            sharding = "fsdp2"
        elif os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
            sharding = f"zero{stage}" if stage in ("2", "3") else "none"
        return cls(int(os.environ.get("WORLD_SIZE", "1")), sharding)


@dataclass(frozen=True)
class BatchPlan:
    """TRL's batch arithmetic. A *completion* is one sequence; a *prompt* has `generations` of them.

    completions per update = per_device × processes × accumulation
    completions per generation batch = per_device × processes × steps_per_generation
    """

    per_device: int
    processes: int
    accumulation: int
    steps_per_generation: int
    generations: int
    iterations: int = 1

    @classmethod
    def from_args(cls, args: Any, processes: int, generation_batch_size: int | None = None) -> "BatchPlan":
        """From a GRPO config, for another number of processes than it was made with.

        Args:
            args: a `GRPOConfig`.
            processes: number of training processes.
            generation_batch_size: the one asked for, which then fixes `steps_per_generation`, as in TRL.

        Raises:
            ValueError: where TRL would refuse the numbers.
        """
        steps = args.steps_per_generation
        if generation_batch_size is not None:
            steps, rest = divmod(generation_batch_size, args.per_device_train_batch_size * processes)
            if rest or not steps:
                raise ValueError(
                    f"`generation_batch_size` is {generation_batch_size}, not a multiple of "
                    f"per_device_train_batch_size × processes = {args.per_device_train_batch_size} × {processes}. "
                    "Change one of the three."
                )
        plan = cls(
            args.per_device_train_batch_size,
            processes,
            args.gradient_accumulation_steps,
            steps,
            args.num_generations,
            args.num_iterations,
        )
        if plan.generation_batch % plan.generations:
            raise ValueError(
                f"A generation batch of {plan.generation_batch} completions does not divide into groups of "
                f"`num_generations` = {plan.generations}. Change the number of processes, "
                "`per_device_train_batch_size` or `steps_per_generation`."
            )
        return plan

    @property
    def completions_per_update(self) -> int:
        """Completions in one optimizer step."""
        return self.per_device * self.processes * self.accumulation

    @property
    def generation_batch(self) -> int:
        """Completions sampled with one state of the weights."""
        return self.per_device * self.processes * self.steps_per_generation

    @property
    def prompts_per_generation(self) -> int:
        """Different prompts in a generation batch."""
        return self.generation_batch // self.generations

    @property
    def updates_per_generation(self) -> float:
        """Optimizer steps from one generation batch to the next."""
        return self.steps_per_generation * self.iterations / self.accumulation

    @property
    def aligned(self) -> bool:
        """Whether each generation batch serves one optimizer step only: TRL's test, in which case π is the loss
        forward's own; otherwise TRL computes `old_per_token_logps` in one further forward, constraint or not."""
        return self.accumulation % (self.steps_per_generation * self.iterations) == 0


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a causal language model, in parameters or elements."""

    parameters: int
    largest_layer: int
    layers: int
    hidden: int
    # Elements that one token's recomputed layer holds: projections, attention and the active experts' MLP.
    working_set: int
    kv_elements: int

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "ModelSize":
        """Counts the parameters of the architecture on the meta device: no memory, no weights."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layers = [sum(p.numel() for p in layer.parameters()) for layer in model.get_decoder().layers]
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        experts = getattr(config, "num_experts_per_tok", None)
        mlp = config.moe_intermediate_size * experts if experts else config.intermediate_size
        return cls(
            parameters=model.num_parameters(),
            largest_layer=max(layers),
            layers=len(layers),
            hidden=config.hidden_size,
            working_set=8 * config.hidden_size + 3 * mlp + 2 * head * (config.num_attention_heads + kv_heads),
            kv_elements=2 * len(layers) * kv_heads * head,
        )

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes of keys and values that an engine caches for one token; 2 bytes an element in bf16, 1 in fp8."""
        return self.kv_elements * bytes_per_element

    def sync_bytes(self, bytes_per_parameter: int = 4) -> int:
        """Bytes of one weight sync: TRL sends each parameter in the dtype it is trained in (float32 by default)."""
        return self.parameters * bytes_per_parameter


def state_bytes(model: ModelSize, launch: Launch, bf16: bool = True, weight_bytes: int = 4) -> dict[str, float]:
    """Bytes per GPU of weights, gradients and AdamW's state, full fine-tuning.

    - none: weights and gradients in the loaded dtype, two moments of the same, on every GPU; a float32 model under
      bf16 autocast adds bf16 copies, and data parallelism adds buckets the size of the gradients.
    - fsdp2: float32 weights, gradients and moments over the GPUs (Accelerate upcasts under mixed precision).
    - zero2, zero3: bf16 weights (whole, or over the GPUs); bf16 gradients, float32 master weights and moments over the
      GPUs.

    Raises:
        ValueError: for an unknown sharding.
    """
    p, n = model.parameters, launch.processes
    compute = 2 if bf16 else 4
    if launch.sharding == "none":
        copies = 2 * p if bf16 and weight_bytes == 4 else 0
        gradients = weight_bytes * p * (2 if n > 1 else 1)
        return {"weights": weight_bytes * p + copies, "gradients": gradients, "optimizer": 2 * weight_bytes * p}
    if launch.sharding == "fsdp2":
        full = 4 if bf16 else weight_bytes
        return {"weights": full * p / n, "gradients": full * p / n, "optimizer": 2 * full * p / n}
    if launch.sharding in ("zero2", "zero3"):
        weights = compute * p / (n if launch.sharding == "zero3" else 1)
        return {"weights": weights, "gradients": compute * p / n, "optimizer": (12 if bf16 else 8) * p / n}
    raise ValueError(f"`sharding` is {launch.sharding!r}: use one of {SHARDINGS}.")


def activation_bytes(model: ModelSize, sequences: int, tokens: int, bf16: bool = True, checkpoint: bool = True) -> int:
    """Rough bytes of activations of a micro-batch of `sequences` of `tokens` tokens, prompt and completion.

    With gradient checkpointing: the inputs of all layers, and one layer recomputed. TRL's fused LM head never holds
    the logits of a whole sequence, so they are not counted.
    """
    width = (2 if bf16 else 4) * sequences * tokens
    recomputed = width * model.working_set
    return width * model.hidden * model.layers + recomputed if checkpoint else recomputed * model.layers


def gathered_bytes(model: ModelSize, launch: Launch, bf16: bool = True) -> int:
    """Bytes of whole weights that a sharded forward holds at once: embeddings and head, a layer, and the next one."""
    if launch.sharding not in ("zero3", "fsdp2"):
        return 0
    outside = max(model.parameters - model.layers * model.largest_layer, 0)
    return (2 if bf16 else 4) * (outside + 2 * model.largest_layer)


@dataclass(frozen=True)
class EnginePlan:
    """A vLLM engine that shares the training GPUs (`utilization` > 0), or none there (0)."""

    utilization: float = 0.0
    tensor_parallel: int = 1
    sleeps: bool = False

    def kv_tokens(self, model: ModelSize, gpu_bytes: float) -> int:
        """Tokens whose keys and values fit in one engine's cache, all its GPUs together; its own activations not
        counted. Negative where the bf16 weights alone exceed its share."""
        room = self.tensor_parallel * self.utilization * gpu_bytes - 2 * model.parameters
        return int(room // model.kv_bytes_per_token())


def weight_bytes_of(dtype: str | None, bf16: bool = True) -> int:
    """Bytes of a parameter loaded as `dtype`; TRL's default is float32."""
    return 2 if dtype in ("bfloat16", "float16") or (dtype == "auto" and bf16) else 4


def read_accelerate_config(path: Path) -> dict[str, Any]:
    """The contents of an Accelerate YAML file.

    Raises:
        ValueError: if it is not a mapping.
    """
    import yaml

    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no Accelerate configuration: it must be a YAML mapping. See `accelerate config`.")
    return config
