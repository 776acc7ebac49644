# SPDX-License-Identifier: Apache-2.0
"""The numbers of a calibration by hand: means and their errors, tables, verdicts, the tolerance, the picture."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dc_trl.commands.calibrate import checks, run, scores
from dc_trl.commands.calibrate.checks import Plan
from dc_trl.commands.calibrate.grid import Grid
from dc_trl.commands.calibrate.measure import Measurement
from dc_trl.commands.calibrate.nudge import OffGrid, count_on_grid
from dc_trl.commands.calibrate.output import Calibration, as_json, as_text
from dc_trl.commands.calibrate.picture import save_picture
from dc_trl.commands.calibrate.scores import Mean, Scores
from dc_trl.discrepancy import METRICS, DiscrepancyMetric

PLAN = Plan("prob_diff", "trajectory", 1.25, 8)


# Statistics, by hand


def batch(train: torch.Tensor, sampling: torch.Tensor, mask: Any = None, problems: Any = None) -> Scores:
    """Scores of completions that each have a problem of their own, unless said otherwise."""
    rows = len(train)
    kept = torch.ones_like(train, dtype=torch.bool) if mask is None else torch.tensor(mask).bool()
    numbers = torch.arange(rows) if problems is None else torch.tensor(problems)
    return Scores(train, sampling, kept, numbers, torch.zeros(rows, dtype=torch.bool))


def by_discrepancy(values: list[list[float]], **options: Any) -> Scores:
    """Scores whose |log π − log μ| is as given."""
    d = torch.tensor(values)
    return batch(torch.zeros_like(d), -d, **options)


def test_means_and_their_errors_by_hand() -> None:
    # Problem 0: completions of means 1 and 3 (the second token of one is masked); problem 1: 5 and 7.
    values = [[1.0, 99.0], [3.0, 3.0], [5.0, 5.0], [7.0, 7.0]]
    found = by_discrepancy(values, mask=[[1, 0], [1, 1], [1, 1], [1, 1]], problems=[0, 0, 1, 1])
    mean = scores.mean_discrepancy(found, "logprob_diff", "trajectory")
    # (1 + 3 + 5 + 7) / 4; residuals of the problems: 4 − 2·4 = −4 and 12 − 2·4 = 4; their spread √(32 / 1) / 2.
    assert mean.value == 4.0
    assert mean.spread == pytest.approx(32**0.5 / 2) and mean.stderr == pytest.approx(32**0.5 / 2 / 2**0.5)
    # Over tokens: (1 + 6 + 10 + 14) / 7; residuals 7 − 3·31/7 and 24 − 4·31/7 = ±44/7; mean weight 3.5.
    mean = scores.mean_discrepancy(found, "logprob_diff", "token")
    assert mean.value == pytest.approx(31 / 7)
    assert mean.spread == pytest.approx((2 * (44 / 7) ** 2) ** 0.5 / 3.5)
    alone = scores.mean_discrepancy(by_discrepancy([[1.0]]), "logprob_diff", "token")
    assert alone.value == 1.0 and alone.stderr != alone.stderr


def test_paired_errors_leave_out_what_both_passes_share() -> None:
    first = by_discrepancy([[1.0], [5.0], [9.0]])
    second = by_discrepancy([[2.0], [6.0], [10.0]])
    assert scores.difference_stderr(first, second, "logprob_diff", "trajectory") == pytest.approx(0.0)
    assert scores.mean_discrepancy(first, "logprob_diff", "trajectory").stderr > 2


def test_tables_by_hand() -> None:
    probabilities = torch.tensor([[0.95, 0.6, 0.05], [0.005, 1.0, 0.3]])
    found = batch(probabilities.log(), (probabilities * 0.9).log(), mask=[[1, 1, 1], [1, 1, 0]])
    table = scores.describe(found)
    assert table["tokens"] == 5 and table["completions"] == 2
    assert [row["tokens"] for row in table["by_probability"]] == [0, 1, 1, 0, 1, 2]  # 1 is in the last
    assert table["by_probability"][-1]["prob_diff"] == pytest.approx((0.095 + 0.1) / 2, rel=1e-4)
    assert table["by_probability"][0]["prob_diff"] is None
    assert [(row["from"], row["to"], row["tokens"]) for row in table["by_position"]] == [
        (0, 1, 2),
        (1, 2, 2),
        (2, 3, 1),
    ]
    assert table["metrics"]["prob_diff"]["max"] == pytest.approx(0.1, rel=1e-4)
    assert table["metrics"]["prob_ratio"]["p50"] == pytest.approx(1 / 0.9 - 1, rel=1e-4)
    assert scores.position_edges(12).tolist() == [0, 1, 2, 4, 8, 12]


def test_batches_of_unequal_length_merge() -> None:
    def record(width: int, prompts: list[tuple[int, ...]]) -> dict[str, Any]:
        ones = torch.ones(len(prompts), width)
        return {"train_logps": -ones, "sampling_logps": -2 * ones, "mask": ones.bool(), "prompts": prompts} | {
            "cut": torch.zeros(len(prompts), dtype=torch.bool)
        }

    merged = scores.merge([record(2, [(1,), (1,)]), record(3, [(2,), (1,)])])
    assert merged.problems.tolist() == [0, 0, 1, 0]
    assert merged.mask.sum(1).tolist() == [2, 2, 3, 3]
    assert merged.log_ratios().tolist() == [1.0] * 10
    assert scores.join(merged, merged).problems.tolist() == [0, 0, 1, 0] * 2


# Verdicts and tolerance


def spread_out(mean: float, spread: float) -> Scores:
    """|log π − log μ| of sixteen completions, half above and half below the mean by `spread`."""
    return by_discrepancy([[mean + (spread if i % 2 else -spread)] for i in range(16)])


def test_the_tolerance_stands_above_the_noise() -> None:
    plan = Plan("logprob_diff", "trajectory", 1.25, 4)
    calm = checks.recommend(spread_out(0.04, 0.001), plan)
    assert calm.tolerance == 0.05 and "`tolerance_slack` 1.25" in calm.reason
    noisy = checks.recommend(spread_out(0.04, 0.02), plan)
    # The spread of a problem's mean is 0.02·√(16/15); a batch has 4 problems.
    assert noisy.tolerance == pytest.approx(0.04 + 3 * 0.02 * (16 / 15) ** 0.5 / 2, rel=0.005)
    assert "three standard errors" in noisy.reason
    agreeing = checks.recommend(spread_out(1e-6, 0.0), plan)
    assert agreeing.tolerance is None and "constraint: none" in agreeing.reason
    assert "Not one token differs" not in agreeing.reason
    dead = checks.recommend(spread_out(0.0, 0.0), plan)
    assert dead.tolerance is None and "Not one token differs" in dead.reason and "#nothing-differs" in dead.reason


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, "warn", "updates smaller than half a grid step will not reach the sampler"),
        ({"rounding": "dither"}, "pass", "follows from the first update"),
        ({"forward_rounds": True}, "pass", "both lag behind"),
        ({"integers": True}, "pass", "weights on a tie flip together"),
        ({"share": 0.5}, "pass", "50.0% of the weights lie on the bfloat16 grid: the floor is that of the run"),
        ({"rounding": None}, "pass", "no sync will round them off it"),
    ],
)
def test_a_floor_on_the_grid_is_judged_by_how_the_sync_rounds(
    changes: dict[str, Any], status: str, words: str
) -> None:
    fields = {"share": 1.0, "dtype": "bfloat16", "rounding": "nearest", "forward_rounds": False, "integers": False}
    verdict = checks.check_grid(Grid(**(fields | changes)), Mean(0.004, 0.0001, 0.001), Mean(0.005, 0.0001, 0.001))
    assert (verdict.status, bool(verdict.remedy)) == (status, status == "warn")
    assert words in verdict.message
    assert checks.check_grid(None, Mean(0.0, 0.0, 0.0), None).status == "not run"


def test_the_tolerance_is_that_of_the_floor_that_holds() -> None:
    plan = Plan("logprob_diff", "trajectory", 1.25, 4)
    step_0, off_grid = spread_out(0.04, 0.001), spread_out(0.08, 0.001)
    nearest = Grid(1.0, "bfloat16", "nearest", False, False)
    found = Measurement(step_0, step_0, step_0, grid=nearest, off_grid=off_grid)
    chosen = checks.conclude(found, plan, [])
    assert chosen.tolerance == 0.1 and "The floor off the grid 0.08 times" in chosen.reason
    assert "At step 0 it is 0.04" in chosen.reason and "neither will" in chosen.reason
    # Off the grid it is no larger: the one that was measured twice stands.
    lower = Measurement(off_grid, off_grid, off_grid, grid=nearest, off_grid=step_0)
    assert checks.conclude(lower, plan, []) == checks.recommend(off_grid, plan)
    dithered = dataclasses.replace(nearest, rounding="dither")
    assert "neither" not in checks.conclude(dataclasses.replace(found, grid=dithered), plan, []).reason


def test_weights_leave_the_grid_by_half_a_step_at_most_and_come_back() -> None:
    for dtype, bits in ((torch.bfloat16, 7), (torch.float16, 10)):
        model = torch.nn.Linear(64, 64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
            model.weight[0, 0] = 0.0
            model.weight[0, 1] = 1.0
        model.bias.requires_grad_(False)  # frozen weights leave it too
        before = [p.detach().clone() for p in model.parameters()]
        assert count_on_grid(model, dtype) == (64 * 64 + 64,) * 2
        weights = OffGrid(model, 0, dtype)
        weights.apply()
        for old, now in zip(before, model.parameters(), strict=True):
            step = torch.exp2(torch.floor(torch.log2(old.abs().clamp(min=1e-30)))) * 2.0**-bits
            moves = ((now.detach() - old) / step)[old != 0]
            assert moves.abs().max() <= 0.501 and (len(moves) < 100 or abs(float(moves.std()) - 12**-0.5) < 0.01)
        assert model.weight[0, 0] == 0.0 and count_on_grid(model, dtype)[0] < 20
        weights.undo()
        assert all(torch.equal(old, now) for old, now in zip(before, model.parameters(), strict=True))


def test_few_problems_are_warned_about() -> None:
    def verdict(found: Scores, problems: int) -> str:
        return checks.check_precision(scores.mean_discrepancy(found, "logprob_diff", "trajectory"), problems).status

    assert verdict(spread_out(0.04, 0.01), 16) == "pass"  # 0.01 / √15 is 6 % of the mean
    assert verdict(spread_out(0.04, 0.03), 16) == "warn"  # 19 %
    assert verdict(by_discrepancy([[0.04]]), 1) == "warn"
    assert verdict(by_discrepancy([[0.0], [0.0]]), 2) == "pass"


def sampled(change: list[list[float]], missed: list[list[float]]) -> tuple[Scores, Scores]:
    """Samples scored by the new and the old weights, by log π_new − log π_old and by log π_new − log μ."""
    new = batch(torch.zeros(len(change), len(change[0])), -torch.tensor(missed))
    return new, batch(-torch.tensor(change), -torch.tensor(missed))


def test_staleness_by_hand() -> None:
    # Slope Σ change·missed / Σ change²: (0.2·0.1 + 0.4·0.3) / (0.04 + 0.16) = 0.7; the residuals of the two problems,
    # 0.2·(0.1 − 0.14) = −0.008 and 0.4·(0.3 − 0.28) = 0.008, have the norm 0.008·√2.
    found = scores.staleness(*sampled([[0.2], [0.4]], [[0.1], [0.3]]))
    assert found.value == pytest.approx(0.7) and found.stderr == pytest.approx(0.008 * 2**0.5 / 0.2)
    # Both are cut at 1: a token that is 9 off decides no more than one that is 1 off.
    assert scores.staleness(*sampled([[9.0], [0.5]], [[9.0], [0.0]])).value == pytest.approx(1 / 1.25)
    unmoved = scores.staleness(*sampled([[0.0]], [[0.1]]))
    assert unmoved.value != unmoved.value


@pytest.mark.parametrize(
    ("now", "stale", "missed", "status"),
    [
        (0.02, 0.3, 0.0, "pass"),
        (0.03, 0.3, 0.0, "pass"),
        (0.06, 0.3, 0.2, "fail"),  # a part of the move was missed
        (0.06, 0.3, 0.0, "warn"),  # higher, but not by what the move would do
        (0.3, 0.3, 1.0, "fail"),
        (0.02, 0.03, 0.0, "not run"),  # a part would not stand out,
        (0.03, 0.03, 1.0, "fail"),  # but a dead sync does
    ],
)
def test_a_nudge_is_judged_by_its_size_and_by_what_the_sampler_missed(
    now: float, stale: float, missed: float, status: str
) -> None:
    floor, dead = (by_discrepancy([[x], [x]]) for x in (0.02, stale))
    # Signs of the change alternate over four tokens of each completion; the rest of `now` has nothing to do with it.
    signs = torch.tensor([[1.0, -1.0, 1.0, -1.0]] * 2)
    others = torch.tensor([[1.0, 1.0, -1.0, -1.0]] * 2)
    change = now * signs
    rest = now * (1 - missed) * others
    pair = sampled(change.tolist(), (missed * change + rest).tolist())
    found = checks.check_sync(floor, dead, *pair, 0.04)
    assert found.status == status, found.message


def test_a_repeat_must_be_higher_by_more_than_chance_and_slack() -> None:
    def verdict(means: list[float]) -> str:
        first, second = (by_discrepancy([[x] for x in row]) for row in ([0.02, 0.03, 0.04, 0.05], means))
        return checks.check_repeat(first, second, Plan("logprob_diff", "trajectory", 1.25, 8)).status

    assert verdict([0.02, 0.03, 0.04, 0.05]) == "pass"
    assert verdict([0.021, 0.031, 0.041, 0.051]) == "pass"  # certain, and too little to matter
    assert verdict([0.02, 0.03, 0.04, 0.15]) == "pass"  # much, by one problem
    assert verdict([0.05, 0.06, 0.07, 0.08]) == "fail"
    alone = by_discrepancy([[0.02]])
    assert checks.check_repeat(alone, by_discrepancy([[0.2]]), PLAN).status == "not run"


def test_nothing_is_concluded_from_nothing() -> None:
    nothing = by_discrepancy([[1.0]], mask=[[0]])
    assert checks.check_scored(nothing).status == "fail"
    assert checks.check_sync(nothing, None, None, None, None).status == "not run"
    assert checks.check_tail(nothing, None).status == "not run"


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf, 0.7, -9999.0])
def test_a_calibration_scores_what_training_scores(value: float) -> None:
    sampling = -torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    sampling[1, 1] = value
    found, without = (
        batch(torch.zeros(2, 2), sampling),
        by_discrepancy([[0.1, 0.2], [0.3, 9.0]], mask=[[1, 1], [1, 0]]),
    )
    verdict = checks.check_scored(found)
    assert verdict.status == "fail" and verdict.message.startswith("1 of 4 tokens have no sampling log-prob")
    for metric in ("prob_diff", "prob_ratio", "logprob_diff"):
        assert scores.mean_discrepancy(found, metric, "token") == scores.mean_discrepancy(without, metric, "token")
    assert torch.equal(found.log_ratios(), without.log_ratios())
    assert scores.describe(found)["metrics"] == scores.describe(without)["metrics"]
    old = batch(torch.full((2, 2), -0.5), sampling)
    assert scores.staleness(found, old).value == pytest.approx(2 * (0.1 + 0.2 + 0.3) / 3)  # Σ 0.5·missed / Σ 0.25
    assert scores.staleness(old, found) == scores.staleness(old, batch(torch.zeros(2, 2), sampling))


def test_a_log_prob_of_the_trainer_that_is_not_finite_fails() -> None:
    train = torch.tensor([[0.0, torch.nan], [0.0, 0.0]])
    found = batch(train, -torch.tensor([[0.1, 0.2], [0.3, 0.4]]))
    verdict = checks.check_scored(found)
    assert verdict.status == "fail" and "1 of 4 tokens have no finite log-prob of the trainer" in verdict.message
    assert scores.mean_discrepancy(found, "logprob_diff", "token").value == pytest.approx((0.1 + 0.3 + 0.4) / 3)
    moved = batch(torch.full((2, 2), -0.5), -torch.tensor([[0.1, 0.2], [0.3, 0.4]]))
    assert scores.staleness(moved, found).value == pytest.approx(2 * (0.4 + 0.2 + 0.1) / 3)  # the NaN is left out


def test_tails_and_moved_weights() -> None:
    calm = by_discrepancy([[0.1] * 1000])
    assert checks.check_tail(calm, 0.99).status == "pass"
    assert checks.check_tail(calm, 0.2).status == "warn"
    assert checks.check_tail(by_discrepancy([[0.1] * 999 + [6.0]]), 0.99).status == "warn"
    assert checks.check_tail(by_discrepancy([[0.1] * 90 + [6.0] * 10]), 0.99).status == "fail"
    assert checks.check_weights(1e-7).status == "pass" and checks.check_weights(1e-3).status == "warn"


def test_a_temperature_is_named_if_another_fits_better() -> None:
    fits = {0.9: 0.12, 1.0: 0.02, 1.1: 0.1}
    assert checks.check_temperature(1.0, fits, 0.7, {0.7: 0.02, 1.0: 0.4}).status == "pass"
    wrong = checks.check_temperature(0.9, fits, 0.7, {0.7: 0.02, 1.0: 0.4})
    assert wrong.status == "fail" and wrong.message.startswith("Asked for 0.9, the engine's log-probs fit 1 better")
    deaf = checks.check_temperature(1.0, fits, 0.7, {0.7: 0.4, 1.0: 0.02})
    assert deaf.status == "fail" and deaf.remedy.endswith("#raw-log-probs-from-the-server")
    assert checks.check_temperature(1.0, fits, None, None).status == "warn"
    assert checks.check_temperature(1.0, {1.0: 1e-8, 0.9: 1e-9}, 0.7, {0.7: 0.0, 1.0: 0.1}).status == "pass"


@pytest.mark.parametrize(
    ("asked", "available", "generations", "batch_size", "processes", "expected"),
    [
        (16, 1000, 8, 512, 1, (16, 128)),  # less than a generation batch
        (16, 1000, 8, 512, 8, (16, 16)),
        (16, 1000, 8, 64, 1, (16, 64)),  # two generation batches
        (16, 1000, 8, 96, 1, (12, 96)),  # 16 is no multiple of the 12 problems of a generation batch
        (16, 5, 8, 64, 1, (5, 40)),
        (3, 1000, 4, 64, 8, (2, 1)),  # 3 × 4 completions do not divide among 8 processes
    ],
)
def test_batches_are_whole(
    asked: int, available: int, generations: int, batch_size: int, processes: int, expected: tuple[int, int]
) -> None:
    assert run.plan_batches(asked, available, generations, batch_size, processes) == expected


def test_no_whole_batch() -> None:
    with pytest.raises(ValueError, match="at least 3 problems"):
        run.plan_batches(2, 1000, 4, 60, 3)


def test_a_new_discrepancy_metric_is_one_entry_of_one_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def squared(train_logps: torch.Tensor, sampling_logps: torch.Tensor) -> torch.Tensor:
        return (train_logps.exp() - sampling_logps.exp()) ** 2

    monkeypatch.setitem(METRICS, "prob_square", DiscrepancyMetric(squared, "(π − μ)²", 1e-9))
    plan = Plan("prob_square", "token", 1.25, 8)
    found = batch(torch.tensor([[0.5], [0.5]]).log(), torch.tensor([[0.4], [0.3]]).log())
    # (0.1² + 0.2²) / 2
    assert scores.describe(found)["metrics"]["prob_square"]["mean"] == pytest.approx(0.025, rel=1e-4)
    assert checks.recommend(found, plan).tolerance is not None
    alike = batch(torch.tensor([[0.5], [0.5]]).log(), torch.tensor([[0.50001], [0.5]]).log())
    assert checks.recommend(alike, plan).tolerance is None  # (1e-5)² / 2 < 1e-9
    verdicts = [checks.check_scored(found)]
    work = {"model": "tiny", "engine": "none", "hardware": "none", "seconds": 1.0, "settings": {"temperature": 1.0}}
    calibration = Calibration(work, plan, Measurement(found, found, found), verdicts, checks.recommend(found, plan))
    text = as_text(calibration)
    assert "floor: mean (π − μ)² by token 0.025" in text and "prob_square   (π − μ)²" in text
    assert '"prob_square"' in as_json(calibration)
    save_picture(found, plan, None, "a title", tmp_path / "new.png")


# The picture


def test_the_picture_decodes(tmp_path: Path) -> None:
    for name, tolerance in (("some", 0.02), ("none", None)):
        train = torch.full((4, 5), -1.0)
        sampling = train + (0.1 * torch.randn(4, 5) if name == "some" else 0.0)
        save_picture(batch(train, sampling), PLAN, tolerance, "a title", tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as picture:
            picture.load()
            assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 24) or []) > 10
