# SPDX-License-Identifier: Apache-2.0
"""Trains the tiny policy with real, colocated vLLM and prints what happened as JSON; run by test_vllm_colocate.py.

python tests/support/vllm_colocate_run.py DIRECTORY [vllm_engine_kwargs as JSON]
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from runs import PROMPTS, dc_trainer, logged, weights
from tiny import OFF_TILE, save_tiny_policy, tiny_model

from dc_trl.rollouts.rounding import Dither


def probe(trainer: Any) -> float:
    """Mean |π − μ| of a fresh batch in evaluation, with whatever weights the engine holds now."""
    return trainer.evaluate()["eval_dc/discrepancy/mean"]


def main(directory: Path, engine: dict[str, Any]) -> None:
    """Trains, takes the engine elsewhere, moves the policy back behind its back, then synchronises it."""
    policy = str(save_tiny_policy(directory / "policy", tiny_model(**({} if engine else OFF_TILE))))
    options: dict[str, Any] = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 64, "max_steps": 5}
    options |= {
        "vllm_engine_kwargs": engine,
        "tolerance_calibration_batches": 2,
        "eval_dataset": PROMPTS.select(range(8)),
    }
    trainer = dc_trainer(directory / "run", model=policy, **options)
    before = weights(trainer)
    trainer.train()
    result: dict[str, Any] = {"moved": (weights(trainer) - before).abs().max().item()}
    result["kv_cache"] = trainer.vllm_generation.llm.llm_engine.vllm_config.cache_config.cache_dtype
    for key in ("dc/discrepancy/mean", "dc/multiplier", "dc/tolerance", "dc/nan_fraction", "dc/chi2_token"):
        result[key] = logged(trainer, key)
    result["dc/sync/update_seen"] = logged(trainer, "dc/sync/update_seen")
    result["served"] = str(trainer.vllm_generation.deployed_dtype)
    handed = dict(trainer.vllm_generation.deployed_weights())
    result["dithered"] = all(
        torch.equal(handed[name], Dither(trainer.args.seed).cast(parameter.detach(), handed[name].dtype, name))
        for name, parameter in trainer.model.named_parameters()
    )
    trainer._last_loaded_step = -1
    result["synchronised"] = probe(trainer)
    trained = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    trainer._last_loaded_step = -1
    probe(trainer)  # the engine follows
    # Back again, so that one and the same policy is compared: another one has another floor.
    with torch.no_grad():
        for parameter, value in zip(trainer.model.parameters(), trained, strict=True):
            parameter.copy_(value)
    result["stale"] = probe(trainer)  # the step has not changed, so TRL does not synchronise
    trainer._last_loaded_step = -1
    result["resynchronised"] = probe(trainer)
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads((sys.argv[2:] or ["{}"])[0]))
