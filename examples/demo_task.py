# SPDX-License-Identifier: Apache-2.0
"""The quickstart's task: sums from reasoning-gym, a small Qwen3 policy, and its supervised warm-up.

A solution comes in two styles. A worked one writes the running totals before the answer; a bare one only the answer,
which a model this small can rarely find in one step. The warm-up first teaches worked solutions alone, then mixes in a
majority of bare ones. The policy that it leaves mostly guesses, although it could work the sums out: reinforcement
learning has to find that working pays.
"""

import random
import re
from collections.abc import Collection
from itertools import accumulate, islice
from typing import Any

import reasoning_gym
import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tqdm import tqdm
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dc_trl.rollouts.quantization import fake_quantize, quantizable_parameters
from dc_trl.tasks.rewards import MathAccuracyReward

TERMS = 5  # of each sum, every one a digit
LARGEST = 9 * TERMS

WARMUP_BATCH = 64
WARMUP_LR = 1e-2
WORKED_ONLY = 0.75  # share of the warm-up that shows worked solutions alone
WORKED_SHARE = 0.35  # share of worked solutions in the rest

Problem = dict[str, str]

# reasoning-gym draws problem i of a data set from seed + i, so the seeds of different sets must lie far apart.
STREAMS = ("warm-up", "training", "held-out")
STREAM_LENGTH = 10_000_000


def make_problems(stream: str, count: int, seed: int, exclude: Collection[str] = ()) -> list[Problem]:
    """Sums with their answers, as `prompt` and `solution`.

    Args:
        stream: which of `STREAMS`; no two share a problem's seed.
        count: how many.
        seed: of the run.
        exclude: prompts to leave out, though another seed may give them.
    """
    start = (seed * len(STREAMS) + STREAMS.index(stream)) * STREAM_LENGTH
    sums = reasoning_gym.create_dataset(
        "chain_sum", size=STREAM_LENGTH, seed=start, min_terms=TERMS, max_terms=TERMS, min_digits=1, max_digits=1
    )
    fresh = (sums[i] for i in range(STREAM_LENGTH))
    kept = ({"prompt": s["question"], "solution": s["answer"]} for s in fresh if s["question"] not in exclude)
    return list(islice(kept, count))


class SumReward(MathAccuracyReward):
    """math-verify's verdict, for answers that are written as a number in a box.

    math-verify rightly finds `3 + 5` equal to 8, so a policy could box the problem itself and be paid for it.
    """

    def __call__(self, completions: list[Any], solution: list[str], **kwargs: Any) -> list[float | None]:
        """1.0 for a right number in the last box of a completion, else 0.0."""
        verdicts = super().__call__(completions, solution, **kwargs)
        return [
            verdict if boxes_number(completion if isinstance(completion, str) else completion[-1]["content"]) else 0.0
            for completion, verdict in zip(completions, verdicts, strict=True)
        ]


def boxes_number(text: str) -> bool:
    """Whether the last box of a text holds an integer and nothing else."""
    return re.fullmatch(r"\s*-?\d+\s*}.*", text.rpartition("\\boxed{")[2], re.DOTALL) is not None


def render_solution(problem: Problem, worked: bool) -> str:
    """The text that answers a problem: `8, 1, 6, 15 \\boxed{15}` when worked, else `\\boxed{15}`."""
    answer = f"\\boxed{{{problem['solution']}}}"
    return f"{', '.join(map(str, running_totals(problem['prompt'])))} {answer}" if worked else answer


def running_totals(prompt: str) -> list[int]:
    """The totals after each term from the second on: [8, 1] for `…: 3 + 5 - 7 =`."""
    expression = prompt.rpartition(": ")[2].removesuffix(" =")
    signed = expression.replace("- ", "-").replace("+ ", "")
    return list(accumulate(int(term) for term in signed.split()))[1:]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for these sums alone: one token per word of the question, sign, and number."""
    pieces = Split(Regex(r" ?\\boxed\{| [+-] | =|, |-?\d+|[A-Za-z]+:? ?|."), "isolated")
    example = make_problems("warm-up", 1, seed=0)[0]
    texts = [example["prompt"], " + ", " - ", *(render_solution(example, worked) for worked in (True, False))]
    texts += map(str, range(-LARGEST, LARGEST + 1))
    known = dict.fromkeys(piece for text in texts for piece, _ in pieces.pre_tokenize_str(text))
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *known])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pieces
    core.decoder = decoders.Fuse()  # the pieces hold their own spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def build_policy(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A random Qwen3 model of 0.4 million parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        # Five times the usual: at this width the usual 0.02 learns at half the speed.
        initializer_range=0.1,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def warm_up(
    policy: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int, exclude: Collection[str]
) -> None:
    """Trains the policy in place on rendered solutions, a progress bar meanwhile.

    Args:
        policy: a random model.
        tokenizer: its tokenizer.
        steps: batches of `WARMUP_BATCH` problems.
        seed: of the problems and of the styles.
        exclude: prompts that must not be seen.
    """
    problems = iter(make_problems("warm-up", steps * WARMUP_BATCH, seed, exclude))
    draw = random.Random(seed).random
    optimizer = torch.optim.AdamW(policy.parameters(), lr=WARMUP_LR, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min((k + 1) / 30, max(0.05, 1 - k / steps)))
    policy.train()
    for step in (bar := tqdm(range(steps), desc="warm-up", unit="step")):
        share = 1.0 if step < WORKED_ONLY * steps else WORKED_SHARE
        batch = [(p["prompt"], render_solution(p, draw() < share)) for p in islice(problems, WARMUP_BATCH)]
        loss = policy(**supervised_batch(tokenizer, batch).to(policy.device)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.2f}, worked {share:.0%}", refresh=False)


def supervised_batch(tokenizer: PreTrainedTokenizerFast, batch: list[tuple[str, str]]) -> BatchEncoding:
    """Model inputs for pairs of prompt and completion; only completions, each with its end token, carry labels."""
    prompts, completions = (tokenizer(list(texts))["input_ids"] for texts in zip(*batch, strict=True))
    rows = [p + c + [tokenizer.eos_token_id] for p, c in zip(prompts, completions, strict=True)]
    inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for row, prompt in zip(labels, prompts, strict=True):
        row[: len(prompt)] = -100
    inputs["labels"] = labels
    return inputs


@torch.no_grad()
def round_to_grid(policy: PreTrainedModel, grid: str) -> None:
    """Rounds a policy's weights in place, to what a sampler of that precision holds exactly.

    Raises:
        ValueError: for a grid that is not known.
    """
    if grid == "bf16":
        for parameter in policy.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        return
    if grid != "fp8":
        raise ValueError(f"`grid` is {grid!r}, which is unknown: use 'bf16', 'fp8' or None.")
    dims = quantizable_parameters(policy, policy.get_output_embeddings())
    for name, parameter in policy.named_parameters():
        if name in dims:
            parameter.copy_(fake_quantize(parameter, "fp8", dims[name]))
