# SPDX-License-Identifier: Apache-2.0
"""A task that a bf16 sampler learns in so many small steps where the sync dithers, and not where it rounds to nearest.

The policy has learnt sums from demonstrations of which more are wrong by one than are right. Reinforcement learning
has little to do: to make the second likeliest answer the likeliest. The rate is so small that most weights move less
than half a step of bf16 in all of the run.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from runs import dc_trainer, logged
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

SUMS = [(a, b) for a in range(5) for b in range(5)]
PROBLEMS = Dataset.from_list([{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in SUMS])
RIGHT, WRONG_BY_ONE = 0.37, 0.47  # shares of the demonstrations; the rest is any digit
# Deep, and with large weights: many matrices add up to what each of them moves by half a step of its grid.
SHAPE = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 8, "initializer_range": 0.3}


def next_token(model: PreTrainedModel) -> Tensor:
    """(25, vocabulary): log-probabilities of the answer to each sum."""
    ids = tiny_tokenizer()(PROBLEMS["prompt"][:], return_tensors="pt")["input_ids"]
    return torch.log_softmax(model(ids).logits[:, -1].float(), dim=-1)


def digit_ids(shift: int = 0) -> Tensor:
    return torch.tensor(tiny_tokenizer().convert_tokens_to_ids([str((a + b + shift) % 10) for a, b in SUMS]))


def demonstrated() -> PreTrainedModel:
    """A policy that answers as the demonstrations do, its weights on the bf16 grid."""
    model = tiny_model(**SHAPE)
    target = torch.zeros(len(SUMS), model.config.vocab_size)
    target[:, tiny_tokenizer().convert_tokens_to_ids(list("0123456789"))] = (1 - RIGHT - WRONG_BY_ONE) / 10
    rows = torch.arange(len(SUMS))
    target[rows, digit_ids()] += RIGHT
    target[rows, digit_ids(shift=1)] += WRONG_BY_ONE
    steps = 200
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min((k + 1) / 20, max(0.02, 1 - k / steps)))
    for _ in range(steps):
        (-(target * next_token(model)).sum(dim=1).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


@torch.no_grad()
def accuracy(model: PreTrainedModel) -> tuple[float, float]:
    """Of answers drawn and of the likeliest answers."""
    logps = next_token(model)
    drawn = logps.gather(1, digit_ids()[:, None]).exp().mean()
    return float(drawn), float((logps.argmax(dim=1) == digit_ids()).float().mean())


def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(completion == known) for completion, known in zip(completions, answer, strict=True)]


def test_a_dithered_sampler_learns_what_one_rounded_to_nearest_does_not(tmp_path: Path) -> None:
    published = demonstrated()
    before = accuracy(published.bfloat16())
    assert before[1] < 0.2 and abs(before[0] - RIGHT) < 0.05
    after, seen, discrepancy = {}, {}, {}
    for rounding in ("nearest", "dither"):
        model = tiny_model(**SHAPE)
        model.load_state_dict(published.state_dict())
        trainer = dc_trainer(
            tmp_path / rounding,
            model=model,
            reward_funcs=right,
            train_dataset=PROBLEMS,
            rollout_precision="bf16",
            sync_rounding=rounding,
            constraint="none",
            learning_rate=1e-5,
            max_steps=20,
            per_device_train_batch_size=200,
            num_generations=8,
            max_completion_length=1,
        )
        trainer.train()
        trainer.save_deployed(tmp_path / f"{rounding}-deployed")
        deployed = AutoModelForCausalLM.from_pretrained(tmp_path / f"{rounding}-deployed", dtype=torch.bfloat16)
        after[rounding] = accuracy(deployed)
        seen[rounding] = logged(trainer, "dc/sync/update_seen_since_start")[-1]
        discrepancy[rounding] = logged(trainer, "dc/discrepancy/mean")
    assert seen["nearest"] < 0.3 and 0.9 < seen["dither"] < 1.1
    assert after["dither"][1] > 0.6 and after["nearest"][1] < 0.3
    gained = {rounding: drawn - before[0] for rounding, (drawn, _) in after.items()}
    assert gained["dither"] > 0.05 and gained["dither"] > 3 * gained["nearest"]
    # The trainers start alike; the one whose sampler lags moves away from it.
    assert discrepancy["nearest"][0] == discrepancy["dither"][0]
    assert discrepancy["nearest"][-1] > 3 * discrepancy["dither"][-1]
