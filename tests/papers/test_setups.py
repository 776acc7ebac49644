# SPDX-License-Identifier: Apache-2.0
"""The study's plan: every arm is a valid configuration, and no run is planned twice."""

from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from dc_trl import DCGRPOConfig
from dc_trl.discrepancy import METRICS


def test_every_arm_is_a_configuration(tmp_path: Path) -> None:
    from papers.blocks import BLOCKS
    from papers.penalty_forms import add_logit_diff

    with patch.dict(METRICS):
        add_logit_diff()
        for block in BLOCKS.values():
            for regime, arm in block.runs:
                config = DCGRPOConfig(output_dir=str(tmp_path), **(regime.options | arm.options_in(regime)))
                assert config.generation_batch_size == regime.batch, (regime.name, arm.name)
                assert config.max_steps == regime.rollouts * regime.updates


def test_repeated_problems_are_those_of_the_share_and_fill_a_rollout_in_the_smoke_too() -> None:
    from papers.arms import CLAIM_ARMS, STRESSED
    from papers.blocks import BLOCKS
    from papers.quick import shortened

    shares = {arm.name: arm.problems_in(STRESSED) for arm in CLAIM_ARMS}
    assert (shares["dual"], shares["data-quarter"], shares["data-fortieth"]) == (320, 80, 8)
    for block in map(shortened, BLOCKS.values()):
        assert all(arm.problems_in(regime) >= regime.batch // 8 for regime, arm in block.runs)


def test_no_run_is_planned_twice_and_arms_come_seed_by_seed() -> None:
    from papers.blocks import BLOCKS, SEEDS, STAGES, planned

    runs = [(regime.name, arm.name, seed) for _, regime, arm, seed in planned()]
    assert max(Counter(runs).values()) == 1
    assert {name for name, _, _ in STAGES} == set(BLOCKS)
    assert not set(SEEDS) & set(range(900, 1000))  # the pilots'
    first = [seed for _, _, _, seed in planned(["rounding"])][: 2 * len(BLOCKS["rounding"].runs)]
    assert first == [SEEDS[0]] * len(BLOCKS["rounding"].runs) + [SEEDS[1]] * len(BLOCKS["rounding"].runs)


def test_every_comparison_is_of_planned_arms_with_the_same_seeds() -> None:
    from papers.blocks import planned
    from papers.comparisons import ALL

    seeds: dict[tuple[str, str], set[int]] = {}
    for _, regime, arm, seed in planned():
        seeds.setdefault((regime.name, arm.name), set()).add(seed)
    for claim in ALL:
        left, right = ((side.regime, side.arm) for side in (claim.comparison.left, claim.comparison.right))
        assert len(seeds[left] & seeds[right]) >= 5, claim.text


def test_the_placebo_deals_out_the_same_penalties() -> None:
    from papers.controls import shuffle

    penalty = torch.arange(12.0).reshape(3, 4)
    valid = torch.ones(3, 4, dtype=torch.bool)
    valid[1, 2:] = False
    dealt = shuffle(penalty, valid, torch.Generator().manual_seed(0))
    assert sorted(dealt[valid].tolist()) == sorted(penalty[valid].tolist())
    assert not torch.equal(dealt[valid], penalty[valid])
    assert torch.equal(dealt[~valid], penalty[~valid])


@pytest.mark.parametrize("grid", ["bf16", "fp8"])
def test_a_start_on_the_grid_is_what_the_sampler_holds(grid: str) -> None:
    from demo_task import build_policy, build_tokenizer
    from papers.start import round_to_grid

    from dc_trl.rollouts.quantization import fake_quantize, quantizable_parameters

    torch.manual_seed(0)
    policy = build_policy(build_tokenizer())
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    round_to_grid(policy, grid)
    dims = quantizable_parameters(policy, policy.get_output_embeddings())
    for name, weight in policy.named_parameters():
        if grid == "bf16":
            assert torch.equal(weight, weight.to(torch.bfloat16).float())
        elif name in dims:
            torch.testing.assert_close(fake_quantize(weight, "fp8", dims[name]), weight, rtol=1e-6, atol=0)
            assert not torch.equal(weight, before[name])
        else:
            assert torch.equal(weight, before[name])


def test_an_unknown_grid_is_an_error() -> None:
    from demo_task import build_policy, build_tokenizer
    from papers.start import round_to_grid

    with pytest.raises(ValueError, match="int5"):
        round_to_grid(build_policy(build_tokenizer()), "int5")
