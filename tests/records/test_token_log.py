# SPDX-License-Identifier: Apache-2.0
"""tokens/*.parquet: every scored token once, with the numbers that the loss used."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from rejecting import ALIGNED, BOUNDS, FAR, REUSED, marked, run, some
from runs import PROMPTS, dc_trainer, logged, record_losses, replayed_rollouts

from dc_trl.records.token_log import SCHEMA, TokenLog
from dc_trl.step import Masks, Step


def tokens(folder: Path, step: int) -> pd.DataFrame:
    table = pq.read_table(folder / f"tokens/tokens_{step:05d}.parquet")
    assert table.schema.equals(SCHEMA)
    return table.to_pandas()


def test_the_rows_are_what_the_loss_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = record_losses(monkeypatch)
    trainer = dc_trainer(tmp_path, log_tokens=True, max_steps=2, tolerance_calibration_batches=1)
    trainer.train()
    frame, loss = tokens(tmp_path, 2), losses[1]
    valid = loss["completion_mask"].bool()
    assert len(frame) == int(valid.sum()) and frame["valid"].all()
    seen = {
        "token_id": loss["completion_ids"],
        "train_logp": loss["train_logps"],
        "sampling_logp": loss["sampling_per_token_logps"],
    }
    for column, expected in seen.items():
        np.testing.assert_allclose(frame[column], expected[valid].numpy(), rtol=1e-6)
    difference = np.abs(np.exp(frame["train_logp"]) - np.exp(frame["sampling_logp"]))
    np.testing.assert_allclose(frame["discrepancy"], difference, atol=1e-6)
    np.testing.assert_allclose(frame["advantage"] - frame["penalty"], loss["advantages"][valid], atol=1e-6)
    np.testing.assert_allclose(frame["penalty"], logged(trainer, "dc/multiplier")[1] * difference, atol=1e-6)
    text = frame.groupby("completion")["token"].agg("".join)
    ids = frame.groupby("completion")["token_id"].agg(list)
    assert list(text) == [trainer.processing_class.decode(row) for row in ids]
    assert set(frame["prompt"]) <= {row["prompt"] for row in trainer.train_dataset}
    mean = frame.groupby("completion")["discrepancy"].mean().mean()
    assert mean == pytest.approx(logged(trainer, "dc/discrepancy/mean")[1], rel=1e-4)


def test_files_are_written_with_the_log_and_only_then(tmp_path: Path) -> None:
    dc_trainer(tmp_path / "on", log_tokens=True, max_steps=5, logging_steps=2).train()
    names = sorted(path.name for path in (tmp_path / "on/tokens").iterdir())
    # At steps 2 and 4, and with the entry that closes the training.
    assert names == ["tokens_00002.parquet", "tokens_00004.parquet", "tokens_00005.parquet"]
    dc_trainer(tmp_path / "off", max_steps=1).train()
    assert not (tmp_path / "off/tokens").exists()


@pytest.mark.parametrize(
    ("layout", "completions"),
    [
        ({"num_iterations": 2, "max_steps": 2}, 8),  # one generation batch, two updates
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}, 8),  # two micro-batches
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": 1}, 16),  # two generation batches
    ],
)
def test_each_completion_of_an_iteration_stands_there_once(
    tmp_path: Path, layout: dict[str, Any], completions: int
) -> None:
    dc_trainer(tmp_path, log_tokens=True, **layout).train()
    frame = tokens(tmp_path, layout["max_steps"])
    assert frame["completion"].nunique() == completions
    assert not frame.duplicated(["completion", "position"]).any()


@pytest.mark.parametrize("value", [None, float("-inf"), float("inf"), -9999.0, 0.5])
def test_tokens_without_a_log_prob_are_left_out(tmp_path: Path, value: float | None) -> None:
    def lose_first(logprobs: list[list[Any]]) -> None:
        for row in logprobs:
            row[0] = value

    trainer = dc_trainer(
        tmp_path, log_tokens=True, constraint="none", max_steps=1, rollout_func=replayed_rollouts(edit=lose_first)
    )
    trainer.train()
    frame = tokens(tmp_path, 1)
    assert frame["position"].min() == 1 and (frame["penalty"] == 0).all()
    assert np.isfinite(frame["discrepancy"]).all() and frame["valid"].all()


def test_tokens_that_do_not_count_are_marked(tmp_path: Path) -> None:
    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        output = replayed_rollouts()(prompts, trainer)
        return output | {"env_mask": [[0] + [1] * (len(ids) - 1) for ids in output["completion_ids"]]}

    dc_trainer(tmp_path, log_tokens=True, max_steps=1, rollout_func=rollout).train()
    frame = tokens(tmp_path, 1)
    assert set(frame.loc[~frame["valid"], "position"]) == {0} and (frame.loc[~frame["valid"], "penalty"] == 0).all()


@pytest.mark.parametrize("layout", [ALIGNED, REUSED], ids=["aligned", "reused"])
def test_what_rejection_left_out_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Any) -> None:
    options = {"rejection": ["icepop"], "rejection_bounds": BOUNDS, "log_tokens": True}
    _, trainer = run(tmp_path, monkeypatch, marked(some), layout, **options)
    frame = tokens(tmp_path, trainer.state.global_step)
    far = frame["sampling_logp"] == FAR
    assert frame["rejected"].dtype == bool and 0 < far.sum() < len(frame)
    assert (frame["rejected"] == far).all()
    assert frame["rejected"].mean() == pytest.approx(logged(trainer, "dc/rejection/any/tokens")[0])
    assert frame["valid"].all() and (frame["discrepancy"] > 0).all()  # it is measured all the same
    assert ((frame["penalty"] > 0) == ~far).all()


def test_without_rules_nothing_is_said_of_rejection(tmp_path: Path) -> None:
    dc_trainer(tmp_path, log_tokens=True, max_steps=1).train()
    assert tokens(tmp_path, 1)["rejected"].isna().all()


def test_only_the_writing_rank_decodes(tmp_path: Path) -> None:
    ones = torch.ones(1, 2)
    log = TokenLog(tmp_path)
    valid = ones.bool()
    step = Step(
        train_logps=-ones,
        sampling_logps=-ones,
        masks=Masks(measured=valid, scored=valid, valid=valid),
        discrepancy=ones,
        penalty=ones,
        advantages=ones,
        penalised_advantages=ones,
        importance_ratio=None,
        kept=None,
    )
    ids = {name: ones.long() for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    log.add(ids, step)
    log.end_iteration()
    log.write(1, lambda sequences: sequences * 2, None)
    assert not list(tmp_path.iterdir())
    log.add(ids, step)
    log.end_iteration()
    log.write(1, lambda sequences: sequences * 2, lambda ids: "é" * len(ids))
    assert list(tokens(tmp_path, 1)["completion"]) == [0, 0, 1, 1]
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["tokens_00001.parquet"]


def last_digit(completions: list[str], log_extra: Any, **_: Any) -> list[float | None]:
    """Rewards each completion by its length, and finds its first character, where it has one."""
    log_extra("answer", [text[:1] or None for text in completions])
    return [float(len(text)) if text else None for text in completions]


@pytest.mark.parametrize("layout", [{}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}])
def test_each_completion_has_its_own_reward_answer_and_gold(tmp_path: Path, layout: dict[str, Any]) -> None:
    problems = PROMPTS.add_column("solution", [f"gold of {prompt}" for prompt in PROMPTS["prompt"]])
    dc_trainer(
        tmp_path, log_tokens=True, max_steps=2, reward_funcs=last_digit, train_dataset=problems, **layout
    ).train()
    frame = tokens(tmp_path, 2)
    assert frame["completion"].nunique() == 8
    for _, rows in frame.groupby("completion"):
        assert len(set(rows["reward"])) == len(set(rows["answer"])) == len(set(rows["gold"])) == 1
        text = re.sub("<[a-z]{3}>", "", "".join(rows["token"]))
        assert rows["answer"].iloc[0] == text[0] and rows["reward"].iloc[0] == len(text)
        assert rows["gold"].iloc[0] == f"gold of {rows['prompt'].iloc[0]}"


def test_what_is_not_known_of_a_completion_is_null(tmp_path: Path) -> None:
    dc_trainer(tmp_path, log_tokens=True, max_steps=1).train()
    frame = tokens(tmp_path, 1)
    assert frame["answer"].isna().all() and frame["gold"].isna().all() and frame["reward"].notna().all()
