# SPDX-License-Identifier: Apache-2.0
"""The report as text: what it takes from the logs, and what it leaves out and says so."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile import BAD_LINES, LARGE
from plotly import graph_objects
from report_pages import Page, report, surge_entries, traces, write_log
from runs import dc_trainer, trl_trainer
from transformers import TrainerCallback

from dc_trl.commands.cli import main
from dc_trl.commands.report.charts import COLORS, MAX_POINTS, points
from dc_trl.commands.report.command import report_command
from dc_trl.commands.report.panels import MAIN_PANELS, TAIL_PANELS
from dc_trl.commands.report.run import build_report
from dc_trl.commands.usage import UsageError
from dc_trl.records.run_columns import columns_of
from dc_trl.records.run_reader import LARGEST_DRAWN, Run

# Charts


def test_every_figure_is_plotlys_and_holds_the_logged_values(tmp_path: Path) -> None:
    keys = {s.key for panel in (*MAIN_PANELS, *TAIL_PANELS) for row in panel.rows for s in row.series}
    keys |= {f"dc/rejection/{rule}/{what}" for rule in ("any", "icepop") for what in ("tokens", "sequences")}
    entries = [{"step": step} | {key: step + 0.25 for key in keys} for step in (1, 2, 3)]
    page = report(write_log(tmp_path, entries))
    assert set(page.data["figures"]) == {panel.name for panel in (*MAIN_PANELS, *TAIL_PANELS)} | {"rejection"}
    for figure in page.data["figures"].values():
        graph_objects.Figure(figure)  # raises for anything that plotly does not know
        for trace in figure["data"]:
            if trace.get("fill") != "toself":
                assert (trace["x"], trace["y"]) == ([1, 2, 3], [1.25, 2.25, 3.25])
    assert "Never logged" not in page.text
    quantiles = {f"dc/{name}/p{percent}" for name in ("discrepancy", "abs_log_ratio") for percent in (50, 90, 99)}
    assert keys >= quantiles | {"dc/differs", "dc/penalty_only"}


def test_the_band_is_one_standard_deviation_around_the_reward(tmp_path: Path) -> None:
    entries = [{"step": 1, "reward": 0.5, "reward_std": 0.2}, {"step": 2, "reward": 0.75, "reward_std": None}]
    band = traces(report(write_log(tmp_path, entries)), "reward")["band"]
    assert (band["x"], band["y"]) == ([1, 1], [0.7, 0.3])  # step 2 has no deviation


def test_values_that_are_no_number_are_gaps(tmp_path: Path) -> None:
    entries = [{"step": s, "reward": v} for s, v in enumerate([1.0, math.nan, None, math.inf, "x", 2.0])]
    assert traces(report(write_log(tmp_path, entries)), "reward")["training"]["y"] == [1, None, None, None, None, 2]


@pytest.mark.parametrize("count", [MAX_POINTS + 1, 2 * MAX_POINTS, 50_000])
def test_long_series_keep_their_spikes_and_both_ends(tmp_path: Path, count: int) -> None:
    entries = [{"step": step, "k": float(step % 7)} for step in range(count)]
    entries[1_234]["k"], entries[count - 900]["k"], entries[7]["k"] = 9.0, -9.0, math.nan
    entries[0]["k"], entries[-1]["k"] = 3.5, 2.5  # neither is the smallest or the largest of anything
    steps, values = points(columns_of(Run("r", tmp_path, entries=entries)), "k")
    assert len(steps) <= MAX_POINTS
    assert steps == sorted(set(steps))
    assert {(0, 3.5), (1_234, 9.0), (count - 900, -9.0), (count - 1, 2.5)} <= set(zip(steps, values, strict=True))


def test_a_stretch_without_numbers_is_a_gap_in_a_long_series(tmp_path: Path) -> None:
    entries = [{"step": step, "k": 1.0 if step < 20_000 else None} for step in range(50_000)]
    steps, values = points(columns_of(Run("r", tmp_path, entries=entries)), "k")
    assert {value for step, value in zip(steps, values, strict=True) if step > 20_100} == {None}


def test_the_band_of_a_long_series_is_as_wide_as_its_line_is_long(tmp_path: Path) -> None:
    entries = [{"step": s, "reward": float(s * 37 % 101), "reward_std": float(s * 53 % 89)} for s in range(9_000)]
    drawn = traces(report(write_log(tmp_path, entries)), "reward")
    assert len(drawn["band"]["x"]) == 2 * len(drawn["training"]["x"]) > MAX_POINTS


def test_a_page_is_no_larger_for_a_longer_run(tmp_path: Path) -> None:
    keys = [s.key for panel in (*MAIN_PANELS, *TAIL_PANELS) for row in panel.rows for s in row.series]
    sizes = []
    for count in (4_000, 16_000):
        entries = [{"step": step} | {key: step * 17 % 23 / 7 for key in keys} for step in range(count)]
        for entry in entries:
            entry["length_decay/lr_scale"] = entry["step"] % 2  # lowered at every second step
        sizes.append(len(build_report([write_log(tmp_path / str(count), entries)])))
    assert sizes[1] < 1.05 * sizes[0] < 7_000_000


def test_a_report_loads_no_torch() -> None:
    code = "import sys, dc_trl.commands.report.run; print(sorted({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_integers_beyond_floats_are_gaps(tmp_path: Path) -> None:
    entries = [{"step": 1, "reward": 10**400}, {"step": 2, "reward": 0.5}]
    assert traces(report(write_log(tmp_path, entries)), "reward")["training"]["y"] == [None, 0.5]


@pytest.mark.parametrize("value", LARGE)
def test_values_near_what_a_float_can_hold_are_gaps(tmp_path: Path, value: float) -> None:
    keys = {s.key for panel in (*MAIN_PANELS, *TAIL_PANELS) for row in panel.rows for s in row.series}
    entries = [{"step": 1} | dict.fromkeys([*keys, "reward_std"], value), {"step": 2, "reward": 0.5, "reward_std": 1}]
    write_log(tmp_path, entries)
    page = report(tmp_path)
    assert traces(page, "reward")["training"]["y"] == [None, 0.5]
    for figure in page.data["figures"].values():
        graph_objects.Figure(figure)


def test_the_largest_values_that_are_drawn_do_not_overflow(tmp_path: Path) -> None:
    entries = [{"step": step, "reward": LARGEST_DRAWN, "reward_std": LARGEST_DRAWN} for step in (1, 2)]
    entries[1]["dc/discrepancy/mean"], entries[1]["dc/tolerance"] = LARGEST_DRAWN, 5e-324
    page = report(write_log(tmp_path, entries))
    assert traces(page, "reward")["band"]["y"] == [2e100, 2e100, 0.0, 0.0]
    assert page.data["figures"]["reward"]["layout"]["yaxis"] == {"domain": [0.0, 1.0]}


@pytest.mark.parametrize(
    "settings",
    [
        {"rollout_backend": [], "use_vllm": {}, "constraint": {"a": [1]}, "discrepancy_metric": ["x"]},
        {"rollout_backend": "vllm", "use_vllm": True, "vllm_mode": "colocate", "vllm_engine_kwargs": [1]},
        {"rollout_backend": "vllm", "use_vllm": True, "vllm_mode": "server", "weight_sync": {}},
    ],
)
def test_settings_that_no_configuration_would_have_are_shown(tmp_path: Path, settings: dict[str, Any]) -> None:
    page = report(write_log(tmp_path, [{"step": 1, "reward": 0.5}], settings=settings))
    assert "engine not known" in re.sub(r"\s+", " ", page.text)
    assert str(settings["use_vllm"]) in page.words


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_log_with_a_bad_line_is_refused_with_file_and_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_log(tmp_path, [{"step": 1, "reward": 0.5}])
    with (folder / "log.jsonl").open("ab") as file:
        file.write(BAD_LINES[name][0] + b"\n")
    assert main(["report", str(folder)]) == 2
    assert f"line 3 of {folder / 'log.jsonl'} is not JSON" in capsys.readouterr().err


def test_a_run_with_evaluations_only_is_drawn(tmp_path: Path) -> None:
    page = report(write_log(tmp_path, [{"step": s, "eval_reward": s / 4, "dc/tolerance": 1.0} for s in (1, 2)]))
    assert set(page.data["figures"]) == {"reward"}  # and no chart for a tolerance alone
    assert traces(page, "reward")["evaluation"]["y"] == [0.25, 0.5]
    assert re.search(r"Never logged:\s+reward\s+\.", page.text)


def test_lines_are_explained_where_the_last_value_is_zero(tmp_path: Path) -> None:
    entry = {"step": 1, "dc/importance_ratio/max": 1.5, "dc/importance_ratio/min": 0.0}
    assert "Solid: largest; dotted: smallest." in report(write_log(tmp_path, [entry])).text


def test_a_surge_that_is_no_number_is_not_marked(tmp_path: Path) -> None:
    entries = surge_entries(60)
    entries[-1] |= {"length_decay/surge_step": "<b>", "length_decay/lr_scale": "x"}
    figures = report(write_log(tmp_path, entries)).data["figures"]
    assert not any("surge" in note["text"] for note in figures["length"]["layout"]["annotations"])


def test_a_constant_is_drawn_on_an_axis_from_zero(tmp_path: Path) -> None:
    entries = [{"step": step, "learning_rate": 2e-4, "entropy": 0.0} for step in (1, 2)]
    figures = report(write_log(tmp_path, entries)).data["figures"]
    assert figures["learning_rate"]["layout"]["yaxis"]["range"] == pytest.approx([0, 2.4e-4])
    assert figures["entropy"]["layout"]["yaxis"]["range"] == [0, 1]


def test_calibration_surge_and_halving_are_marked(tmp_path: Path) -> None:
    page = report(write_log(tmp_path, surge_entries()))
    (shade,) = page.data["figures"]["discrepancy"]["layout"]["shapes"]
    assert (shade["x0"], shade["x1"]) == (0, 3)
    for panel in ("length", "learning_rate"):
        shapes = page.data["figures"][panel]["layout"]["shapes"]
        assert [(shape["x0"], shape["line"]["dash"]) for shape in shapes] == [(20.0, "solid"), (36, "dot")]
    assert page.text.count("Surge at step 20; rate lowered at step 36.") == 2
    assert "the tolerance was not known yet, up to step 3." in page.text


def test_a_panel_without_values_says_so_and_draws_nothing(tmp_path: Path) -> None:
    page = report(write_log(tmp_path, [{"step": 1, "reward": 1.0, "entropy": None}]))
    assert set(page.data["figures"]) == {"reward"}
    assert [attrs["data-figure"] for _, attrs in page.elements if "data-figure" in attrs] == ["reward"]
    for key in ("entropy", "dc/discrepancy/mean", "dc/tolerance", "dc/ess"):
        assert key in page.text
    assert "an engine that gives log-probs" in page.text
    assert "an engine with weights of its own, and two weight syncs" in page.text


def test_each_rejection_rule_has_a_row_of_its_own_after_all_of_them(tmp_path: Path) -> None:
    rules = {"geometric": 0.25, "any": 0.5, "icepop": 0.125}
    names = {f"dc/rejection/{rule}/{what}": value for rule, value in rules.items() for what in ("tokens", "sequences")}
    page = report(write_log(tmp_path, [{"step": step} | names for step in (1, 2)]))
    figure = page.data["figures"]["rejection"]
    titles = [note["text"] for note in figure["layout"]["annotations"]]
    assert titles == ["by any rule, fraction", "by geometric, fraction", "by icepop, fraction"]
    drawn = [(trace["yaxis"], trace["y"], trace["line"]["dash"]) for trace in figure["data"]]
    values = (("y", 0.5), ("y2", 0.25), ("y3", 0.125))
    assert drawn == [(axis, [value] * 2, dash) for axis, value in values for dash in ("solid", "dot")]
    assert (
        "Rejected tokens and sequences" in page.text and "Solid: of the tokens; dotted: of the sequences" in page.text
    )


@pytest.mark.parametrize("name", ["<b>x</b>", "a/b", "", "x" * 41, "é"])
def test_a_key_that_is_no_rules_is_not_drawn(tmp_path: Path, name: str) -> None:
    entries = [{"step": step, "reward": 1.0, f"dc/rejection/{name}/tokens": 0.5} for step in (1, 2)]
    page = report(write_log(tmp_path, entries))
    assert set(page.data["figures"]) == {"reward"} and "Rejected tokens" not in page.text


def test_many_rules_make_a_taller_panel_and_no_end_of_rows(tmp_path: Path) -> None:
    entry = {"step": 1, "dc/rejection/any/tokens": 0.5} | {f"dc/rejection/r{i}/tokens": 0.1 for i in range(30)}
    page = report(write_log(tmp_path, [entry]))
    layout = page.data["figures"]["rejection"]["layout"]
    domains = [layout[axis]["domain"] for axis in layout if axis.startswith("yaxis")]
    assert len(domains) == 12 and all(low + 0.02 < high for low, high in domains)
    (chart,) = [a for _, a in page.elements if a.get("id") == "chart-rejection"]
    assert chart["style"] == "--rows:12"


def test_what_the_sampler_sees_is_drawn_with_its_healthy_range(tmp_path: Path) -> None:
    run = dc_trainer(tmp_path, rollout_precision="bf16", learning_rate=1e-4)
    run.train()
    page = report(tmp_path)
    shares, last, changed = traces(page, "sync").values()
    for trace, key in ((shares, "update_seen_since_start"), (last, "update_seen"), (changed, "changed")):
        values = [entry[f"dc/sync/{key}"] for entry in run.state.log_history if f"dc/sync/{key}" in entry]
        assert trace["x"] == [2, 3] and trace["y"] == pytest.approx(values, rel=1e-5)
    assert shares["yaxis"] == last["yaxis"] != changed["yaxis"]
    assert "Share of the update that the sampler sees" in page.text and "Healthy: around 1." in page.text


# Runs


def test_the_summary_has_the_last_values(tmp_path: Path) -> None:
    page = report(write_log(tmp_path / "alpha", surge_entries()))
    assert "60 of 100" in page.text
    for value in ("0.6", "0.004", "0.005", "80% of tolerance"):
        assert value in page.words
    assert re.search(r"\d+ s before this page was made", page.text)


def test_several_runs_share_the_charts_and_differing_settings_are_listed(tmp_path: Path) -> None:
    settings = {"seed": 1, "constraint": "lagrangian"}
    one = write_log(tmp_path / "one", surge_entries(), settings=settings)
    two = write_log(tmp_path / "two", surge_entries(30), settings=settings | {"constraint": "none"})
    page = report(one, two)
    named = traces(page, "reward")
    assert [len(named[name]["x"]) for name in ("one", "two")] == [60, 30]
    assert named["one"]["line"]["color"] != named["two"]["line"]["color"]
    assert page.data["figures"]["reward"]["layout"]["showlegend"]
    differing = page.text.partition("Settings that differ")[2].partition("All settings")[0]
    assert "constraint" in differing and "seed" not in differing


def test_more_runs_than_colours_are_dashed(tmp_path: Path) -> None:
    runs = [write_log(tmp_path / f"run{i}", surge_entries(20)) for i in range(COLORS + 1)]
    named = traces(report(*runs), "reward")
    first, ninth = named["run0"]["line"], named[f"run{COLORS}"]["line"]
    assert first["color"] == ninth["color"] and first["dash"] != ninth["dash"]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    one = write_log(tmp_path / "a" / "out", surge_entries())
    two = write_log(tmp_path / "b" / "out", surge_entries())
    assert report(one, two).data["runs"] == [str(one), str(two)]


def test_a_run_of_trls_own_trainer(tmp_path: Path) -> None:
    trl_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    page = report(tmp_path)
    assert len(traces(page, "reward")["training"]["x"]) == 2
    assert "Never logged: dc/discrepancy/mean" in re.sub(r"\s+", " ", page.text)
    assert "log_tokens=True" in page.text


class ReportCallback(TrainerCallback):
    """Makes the report in the middle of training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pages: list[str] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            assert report_command([str(self.folder)]) == 0
            self.pages.append((self.folder / "report.html").read_text(encoding="utf-8"))


def test_a_run_still_going_on(tmp_path: Path) -> None:
    callback = ReportCallback(tmp_path)
    trainer = dc_trainer(tmp_path, log_tokens=True, tolerance_calibration_batches=1, callbacks=[callback])
    trainer.train()
    for done, text in enumerate(callback.pages, start=1):
        page = Page(text)
        assert f"{done} of 3" in page.text
        assert traces(page, "reward")["training"]["x"] == list(range(1, done + 1))
        assert page.data["steps"][0]["step"] == done
    assert len(callback.pages) == 2
    last = report(tmp_path).data["steps"][0]
    logged = trainer.state.log_history[-2]["dc/discrepancy/mean"]
    means = [c["mean"] for c in last["completions"] for _ in range(c["times"])]
    assert sum(means) / len(means) == pytest.approx(logged, rel=1e-3)  # 8 completions: all are shown


def test_a_half_written_line_is_left_for_later(tmp_path: Path) -> None:
    folder = write_log(tmp_path, surge_entries(10))
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 11, "rew')
    assert len(traces(report(folder), "reward")["training"]["x"]) == 10


def test_a_run_that_has_logged_nothing_yet(tmp_path: Path) -> None:
    page = report(write_log(tmp_path, []))
    assert page.data["figures"] == {}
    assert "0 of 100" in page.text


# The command


def test_the_page_is_written_beside_the_log_or_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_log(tmp_path / "run", surge_entries(5))
    assert report_command([str(folder)]) == 0
    assert str(folder / "report.html") in capsys.readouterr().out
    report_command([str(folder), "--output", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in folder.iterdir()) == ["log.jsonl", "report.html"]


def test_a_directory_is_no_page(tmp_path: Path) -> None:
    write_log(tmp_path, [])
    with pytest.raises(UsageError, match="is a directory: name a file in it"):
        report_command([str(tmp_path), "--output", str(tmp_path)])


def test_a_page_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "run", surge_entries(5))
    with pytest.raises(UsageError, match="--output"):
        report_command([str(folder), "--output", str(tmp_path / "missing" / "page.html")])
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="--output"):
        report_command([str(folder), "--output", str(tmp_path / "taken")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "taken"]


def test_directories_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        report_command([str(tmp_path / "nowhere")])
    with pytest.raises(UsageError, match=r"log\.jsonl"):
        report_command([str(tmp_path)])


def test_without_plotly_the_way_to_get_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_log(tmp_path, surge_entries(5))
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UsageError, match=r"pip install 'dc-trl\[report\]'"):
        report_command([str(folder)])
