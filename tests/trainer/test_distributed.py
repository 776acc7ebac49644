# SPDX-License-Identifier: Apache-2.0
"""Two gloo ranks on the CPU: they agree with each other to the bit, and with one process up to rounding."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import FAULTS, RUNS
from places import SUPPORT
from processes import run_ranks
from tiny import published_model

from dc_trl.rollouts.rounding import Dither

SCRIPT = SUPPORT / "distributed_run.py"
REPLAYED = (
    "replayed",
    "rejected",
    "rejected_early",
    "rejected_rank",
    "rejected_rank_early",
    "truncated",
    "environment",
)  # rollouts that do not depend on the number of processes


def launch(directory: Path, *runs: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The reports of both ranks."""
    run_ranks(SCRIPT, "2", directory, *runs)
    first, second = (torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    return first, second


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both ranks saw of every run that needs no sharding."""
    return launch(tmp_path_factory.mktemp("ranks"), *REPLAYED, "engine", "resumed", "routed")


def values(report: dict[str, Any], key: str) -> list[float]:
    """The values of a key in the order of the log."""
    return [entry[key] for entry in report["log"] if key in entry]


def updates(report: dict[str, Any]) -> list[dict[str, float]]:
    """The log's entries of the iterations; the metrics of all of them were measured."""
    return [entry for entry in report["log"] if "dc/discrepancy/mean" in entry]


@pytest.mark.parametrize("name", [*REPLAYED, "engine", "resumed"])
def test_ranks_agree_to_the_bit(ranks: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert first["multiplier"] == second["multiplier"] and first["tolerance"] == second["tolerance"]
    assert repr(first["log"]) == repr(second["log"])  # every logged number; repr, for a NaN equals itself there
    assert torch.equal(first["weights"], second["weights"])
    # What they agree on is not nothing: λ moved in every iteration after the one that calibrated.
    applied = values(first, "dc/multiplier")
    assert applied[0] == 0.0 and len({*applied[1:], first["multiplier"]}) == len(applied)


@pytest.mark.parametrize("name", REPLAYED)
def test_two_processes_equal_one(ranks: tuple[dict[str, Any], dict[str, Any]], name: str, tmp_path: Path) -> None:
    two, one = ranks[0][name], RUNS[name](tmp_path, 1)
    # Before the first update: the same float32 log-probs, summed in float64.
    before = [{k: v for k, v in updates(r)[0].items() if k.startswith("dc/d") or k == "reward"} for r in (two, one)]
    assert len(before[0]) >= 4 and before[0] == pytest.approx(before[1], rel=1e-12)
    # After it, the weights differ by the rounding of a gradient summed in two parts.
    torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=5e-6)
    for key in ("dc/multiplier", "dc/tolerance", "dc/discrepancy/mean", "dc/penalty_share", "learning_rate"):
        assert values(two, key) == pytest.approx(values(one, key), rel=1e-6)
    assert two["multiplier"] == pytest.approx(one["multiplier"], rel=1e-6)
    for ours, theirs in zip(updates(two), updates(one), strict=True):
        metrics = {
            key: value for key, value in theirs.items() if key.startswith(("dc/", "sampling/", "length_decay/"))
        }
        # Differences of nearly equal numbers, and exponentials of large ones, have more noise than the means.
        assert {key: ours[key] for key in metrics} == pytest.approx(metrics, rel=2e-5, abs=1e-7, nan_ok=True)


def test_the_token_log_holds_the_tokens_of_both_ranks(
    ranks: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    two, one = ranks[0]["replayed"]["tokens"], RUNS["replayed"](tmp_path, 1)["tokens"]
    assert len({row[-1] for row in two}) == 16  # a row's last entry is its completion
    assert sorted(row[:-1] for row in two) == sorted(row[:-1] for row in one)


def test_length_decay_halves_the_rate_of_both_ranks(ranks: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for rank in ranks:
        assert values(rank["replayed"], "learning_rate") == pytest.approx([1e-3, 5e-4, 5e-4, 2.5e-4])


def test_a_rank_without_tokens_takes_part(ranks: tuple[dict[str, Any], dict[str, Any]]) -> None:
    full = ranks[0]["replayed"]
    for name in ("truncated", "environment"):
        report = ranks[1][name]
        assert all(
            math.isfinite(x) for key in ("loss", "dc/discrepancy/mean", "grad_norm") for x in values(report, key)
        )
        assert values(report, "dc/discrepancy/mean")[0] != values(full, "dc/discrepancy/mean")[0]
        assert values(report, "grad_norm")[0] > 0


@pytest.mark.parametrize("name", ["rejected_rank", "rejected_rank_early"])
def test_a_rank_that_is_rejected_whole_trains_on_nothing_and_says_so_once(
    ranks: tuple[dict[str, Any], dict[str, Any]], name: str, tmp_path: Path
) -> None:
    two, one = ranks[0][name], RUNS[name](tmp_path, 1)
    assert all(0 < share < 1 for share in values(two, "dc/rejection/icepop/tokens"))
    # Rank 0's tokens are divided by what is left of both ranks, so the loss is that of one process with all of them.
    assert values(two, "loss") == pytest.approx(values(one, "loss"), rel=1e-4, abs=1e-6)
    assert any(loss != 0 for loss in values(two, "loss"))
    assert values(two, "grad_norm") == pytest.approx(values(one, "grad_norm"), rel=1e-3)
    said, others = ([m for m in rank[name]["warnings"] if "rejected every token" in m] for rank in ranks)
    assert len(said) == 1 and not others
    assert "every token of process 1 (of 0 to 1)" in said[0] and "icepop 100%" in said[0]
    assert "`rejection_bounds`" in said[0]
    assert not [message for message in one["warnings"] if "rejected every token" in message]


def test_each_rank_replays_the_experts_of_its_own_tokens(ranks: tuple[dict[str, Any], dict[str, Any]]) -> None:
    first, second = (rank["routed"] for rank in ranks)
    assert repr(first["log"]) == repr(second["log"]) and torch.equal(first["weights"], second["weights"])
    # The rollouts are of the weights as trained: given the experts of other tokens, this would be some 0.01.
    assert len(updates(first)) == 4 and 0 < max(values(first, "dc/discrepancy/max")) < 1e-5
    assert min(values(first, "grad_norm")) > 0


def test_a_resumed_run_on_two_ranks_equals_the_uninterrupted_one(
    ranks: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    for rank in ranks:
        assert torch.equal(rank["resumed"]["weights"], rank["engine"]["weights"])
        assert rank["resumed"]["multiplier"] == rank["engine"]["multiplier"]
        for key in ("loss", "grad_norm", "reward", "dc/multiplier", "dc/discrepancy/mean", "dc/grad_norm_smoothed"):
            assert values(rank["resumed"], key) == values(rank["engine"], key)


def test_fsdp2_ranks_agree_and_start_as_unsharded_ones(
    ranks: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    reports = launch(tmp_path, "sharded", "rejected_sharded")
    first, second = (rank["sharded"] for rank in reports)
    unsharded = ranks[0]["engine"]
    assert first["sharded"] and not unsharded["sharded"]
    assert first["multiplier"] == second["multiplier"] != 0.1
    assert repr(first["log"]) == repr(second["log"])
    assert torch.equal(first["weights"], second["weights"])
    # The engine got the gathered weights: the same tokens and, before the first update, the same discrepancy.
    assert updates(first)[0]["dc/discrepancy/mean"] == pytest.approx(
        updates(unsharded)[0]["dc/discrepancy/mean"], rel=1e-6
    )
    assert updates(first)[0]["reward"] == updates(unsharded)[0]["reward"]
    # Of a shard of the gradient too, what is left of the batch is what it is divided by.
    whole = ranks[0]["rejected"]
    assert reports[0]["rejected_sharded"]["sharded"]
    for key in ("loss", "grad_norm", "dc/rejection/icepop/tokens"):
        assert values(reports[0]["rejected_sharded"], key) == pytest.approx(values(whole, key), rel=1e-3)


def test_fsdp2_ranks_that_write_their_own_shards_save_and_resume(tmp_path: Path) -> None:
    # Here nothing has made the checkpoint's directory before the trainer's state is written.
    for rank in launch(tmp_path, "sharded_files", "sharded_resumed"):
        whole, resumed = rank["sharded_files"], rank["sharded_resumed"]
        assert torch.equal(resumed["weights"], whole["weights"])
        assert resumed["multiplier"] == whole["multiplier"] != 0.1
        assert resumed["tolerance"] == whole["tolerance"] is not None
    assert (tmp_path / "sharded_files/checkpoint-2/pytorch_model_fsdp_0/__1_0.distcp").is_file()
    assert not list((tmp_path / "sharded_files").glob("**/.*.tmp"))


@pytest.mark.parametrize("name", ["dithered", "dithered_sharded"])
def test_ranks_sample_the_dithered_cast_of_the_whole_weights(name: str, tmp_path: Path) -> None:
    first, second = (rank[name] for rank in launch(tmp_path, name))
    assert first["sharded"] == name.endswith("sharded")
    assert torch.equal(first["weights"], second["weights"]) and repr(first["log"]) == repr(second["log"])
    dither, flipped, moved = Dither(42), 0, 0
    start = dict(published_model(intermediate_size=57).named_parameters())
    for key, trained in first["trained"].items():
        # This process has no ranks: each of them, sharded or not, has used the noise that one alone uses.
        expected = dither.cast(trained, torch.bfloat16, key)
        assert torch.equal(first["sampler"][key], expected) and torch.equal(second["sampler"][key], expected), key
        flipped += int((expected != start[key].bfloat16()).sum())
        moved += int((trained.bfloat16() != start[key].bfloat16()).sum())
    assert flipped > 1.5 * moved  # the dither shows: rounding to nearest moves fewer weights
    assert all(0.9 < seen < 1.1 for seen in values(first, "dc/sync/update_seen_since_start"))


@pytest.mark.parametrize("name", ["one_rounding", "one_rounding_sharded"])
def test_ranks_share_one_rounding_of_their_masters_and_resume(name: str, tmp_path: Path) -> None:
    ranks = launch(tmp_path, name, f"{name}_resumed")
    for rank in ranks:
        whole, resumed = rank[name], rank[f"{name}_resumed"]
        assert whole["sharded"] == name.endswith("sharded")
        # As a sync would round the whole masters: each shard knows where in its tensor it stands.
        assert whole["cast"].keys() == whole["sampler"].keys()
        for key, tensor in whole["cast"].items():
            assert torch.equal(whole["sampler"][key], tensor), key
        assert torch.equal(torch.cat([t.flatten() for t in whole["cast"].values()]), whole["weights"])
        assert (whole["masters"] != whole["masters"].bfloat16()).float().mean() > 0.5
        assert values(whole, "dc/sync/update_seen") == [1.0] * 3
        assert torch.equal(resumed["masters"], whole["masters"])
        assert torch.equal(resumed["weights"], whole["weights"])
    assert torch.equal(ranks[0][name]["weights"], ranks[1][name]["weights"])
    assert torch.equal(ranks[0][name]["masters"], ranks[1][name]["masters"])


@pytest.mark.parametrize("name", ["guarded", "guarded_sharded"])
def test_ranks_leave_out_the_steps_that_one_of_them_spoils(name: str, tmp_path: Path) -> None:
    ranks = launch(tmp_path, name, f"{name}_resumed")
    last = max(FAULTS) + 1
    for rank in ranks:
        whole, resumed = rank[name], rank[f"{name}_resumed"]
        assert whole["sharded"] == name.endswith("sharded")
        steps, moments = whole["steps"], whole["moments"]
        for step in FAULTS:
            assert torch.equal(steps[step], steps[step - 1]) and torch.equal(moments[step], moments[step - 1])
        assert not torch.equal(steps[last], steps[last - 1]) and not torch.equal(steps[1], steps[min(FAULTS) - 1])
        assert steps[last].isfinite().all() and moments[1].numel() > 0
        assert values(whole, "dc/guard/skipped") == [float(step in FAULTS) for step in range(1, last + 1)]
        assert whole["guard"]["skipped"] == 2 and whole["guard"]["in_a_row"] == 0
        # Both ranks' completions are written, once, in the order of the ranks.
        assert [line["step"] for line in whole["skipped"]] == list(FAULTS)
        for line in whole["skipped"]:
            places = [(row["process"], row["row"]) for row in line["completions"]]
            assert places == [(process, row) for process in range(2) for row in range(8)]
        assert [line["in_a_row"] for line in whole["skipped"]] == [1, 2]
        # The checkpoint lies between the two: the count goes on.
        assert torch.equal(resumed["weights"], whole["weights"]) and resumed["guard"] == whole["guard"]
        assert resumed["skipped"] == whole["skipped"][1:]
    assert torch.equal(ranks[0][name]["weights"], ranks[1][name]["weights"])
    assert ranks[0][name]["guard"] == ranks[1][name]["guard"]


@pytest.mark.parametrize("name", ["sealed", "sealed_sharded"])
def test_a_checkpoint_is_sealed_when_every_rank_has_written_it(name: str, tmp_path: Path) -> None:
    ranks = launch(tmp_path, name)
    first, second = (rank[name] for rank in ranks)
    sharded = name.endswith("sharded")
    assert first["sharded"] == sharded
    written = ["rng_state_0.pth", "rng_state_1.pth", "dc_grpo_state.json", "scheduler.pt"]
    written += ["pytorch_model_fsdp_0/__1_0.distcp", "optimizer_0/__1_0.distcp"] if sharded else ["model.safetensors"]
    assert list(first["there"]) == ["checkpoint-2", "checkpoint-4"] and not second["there"]
    for there in first["there"].values():
        assert set(written) <= set(there) and "trainer_state.json" not in there
    # Without its seal the newest is passed over by both ranks, and said by one.
    for rank in (first, second):
        assert torch.equal(rank["resumed"]["weights"], rank["weights"])
        assert values(rank["resumed"], "dc/multiplier") == values(rank, "dc/multiplier")
        assert "holds no checkpoint to resume from" in rank["refused"]
        assert "checkpoint-4 was not written to its end: it has no trainer_state.json" in rank["refused"]
    said = [[m for m in rank["resumed"]["warnings"] if "is passed over" in m] for rank in (first, second)]
    assert len(said[0]) == 1 and "checkpoint-4 is passed over" in said[0][0] and not said[1]
