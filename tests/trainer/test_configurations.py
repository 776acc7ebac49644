# SPDX-License-Identifier: Apache-2.0
"""Hundreds of combinations of values: each trains a step or is refused at construction, by a message that helps.

A refusal names a field of the case that has an unusual value, and says what to do instead. With that field as usual
the case is tried again, until it trains; so every case ends in a run, and no message leads round in a circle.
"""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from configurations import FIELDS, Case, covering_cases
from runs import PROMPTS, count_digits, logged, quiet, settings
from tiny import save_tiny_policy, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from dc_trl import DCGRPOConfig, DCGRPOTrainer

CASES = covering_cases(seed=0, least=300)
SHARES = 6
USUAL = {name: values[0] for name, values in FIELDS.items()}
WAY_OUT = re.compile(r"\b([Uu]se|[Ss]et|[Ll]eave|[Ll]ower|[Rr]aise|[Tt]rain|[Pp]ass|needs?)\b")
STEP = {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 4, "max_steps": 1}


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, PreTrainedModel]:
    """A dense model, and a mixture of experts for router replay, saved where TRL finds the reference model."""
    found = {}
    for mixture in (False, True):
        model = tiny_model("qwen3_moe" if mixture else "qwen3", num_hidden_layers=1, hidden_size=32)
        model.config._name_or_path = str(save_tiny_policy(tmp_path_factory.mktemp("policy"), model, "float32"))
        found[mixture] = model
    return found


def trained(case: Case, model: PreTrainedModel, folder: Path) -> DCGRPOTrainer:
    args = DCGRPOConfig(**settings(folder, **STEP, **case))
    policy = copy.deepcopy(model)
    made = DCGRPOTrainer(policy, count_digits, args, train_dataset=PROMPTS, processing_class=tiny_tokenizer())
    quiet(made).train()
    return made


def unusual(case: Case) -> Case:
    return {name: value for name, value in case.items() if value != USUAL[name]}


def to_blame(message: str, case: Case) -> str:
    """The field that a message names first of those with an unusual value."""
    named = [name for name in re.findall(r"`(\w+)", message) if name in unusual(case)]
    assert named, f"names none of {unusual(case)}: {message}"
    assert WAY_OUT.search(message), f"has no way out: {message}"
    return named[0]


def test_every_two_values_meet() -> None:
    names = list(FIELDS)
    assert len(CASES) >= 300
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            met = {(repr(case[first]), repr(case[second])) for case in CASES}
            assert len(met) == len(FIELDS[first]) * len(FIELDS[second])


@pytest.mark.parametrize("share", range(SHARES))
def test_a_configuration_trains_or_is_refused_with_a_way_out(
    tmp_path: Path, policies: dict[bool, PreTrainedModel], share: int
) -> None:
    for number, drawn in list(enumerate(CASES))[share::SHARES]:
        case = dict(drawn)
        while True:
            try:
                trainer = trained(case, policies[case["router_replay"]], tmp_path / str(number))
            except (ValueError, TypeError) as error:  # anything else fails
                name = to_blame(str(error), case)
                case[name] = USUAL[name]
            else:
                break
        assert trainer.state.global_step == 1, unusual(case)
        assert math.isfinite(logged(trainer, "grad_norm")[0]), unusual(case)
        assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters()), unusual(case)
