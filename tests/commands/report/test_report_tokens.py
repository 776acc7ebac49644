# SPDX-License-Identifier: Apache-2.0
"""The report's token view as data, and that hostile text stays text."""

import base64
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_text import HOSTILE
from plotly import graph_objects
from plotly.offline import get_plotlyjs
from report_pages import hostile_run, report, sentence, surge_entries, write_log, write_tokens

from dc_trl.commands.report.run import build_report
from dc_trl.commands.report.text import duration, embedded_json, label, number
from dc_trl.commands.report.tokens.choice import FIRST, NEWEST, WORST, kept_steps, token_logs, worst_step
from dc_trl.commands.report.tokens.completions import COMPLETIONS
from dc_trl.commands.report.tokens.figures import POINTS
from dc_trl.commands.report.tokens.view import TOKENS, token_view
from dc_trl.commands.report.verdict.bounds import CHECKS
from dc_trl.commands.report.verdict.links import section_link
from dc_trl.commands.usage import UsageError
from dc_trl.records.run_columns import read_columns
from dc_trl.records.text import visible
from dc_trl.records.token_log import SCHEMA

# Tokens


def test_no_token_log_says_how_to_get_one(tmp_path: Path) -> None:
    page = report(write_log(tmp_path, surge_entries(5)))
    assert page.data["steps"] == []
    assert "log_tokens=True" in page.text


def test_tokens_carry_their_values_and_the_worst_are_listed_first(tmp_path: Path) -> None:
    folder = write_log(tmp_path, surge_entries(5))
    rows = sentence(0, ["a", "b", "c", "d"]) + sentence(1, ["e", "f"])
    rows[2] |= {"train_logp": math.log(0.5), "sampling_logp": math.log(0.75), "discrepancy": 0.25, "penalty": 0.01}
    rows[4] |= {"discrepancy": 0.9, "valid": False, "token_id": 42}
    write_tokens(folder, 5, rows)
    (step,) = report(folder).data["steps"]
    first, second = step["completions"]
    assert (first["completion"], first["mean"], first["max"]) == (0, 0.0625, 0.25)  # 0.25 / 4
    assert (second["mean"], second["max"], second["invalid"], second["id"][0]) == (0, 0, [0], 42)
    assert first["text"] == ["a", "b", "c", "d"]
    assert first["train_logp"][2] == pytest.approx(math.log(0.5), rel=1e-4)
    (worst,) = step["top"]["discrepancy"]
    assert (worst["before"], worst["text"], worst["after"], worst["position"]) == ("ab", "c", "d", 2)
    # of [0, 0, .25, 0, 0] the 99th percentile is 0.96 of the way from 0 to .25
    assert step["scale"]["discrepancy"] == pytest.approx(0.24)


def test_the_tail_token_is_found_by_its_log_ratio(tmp_path: Path) -> None:
    folder = write_log(tmp_path, surge_entries(5))
    rows = sentence(0, ["small", "tail", "none"])
    rows[0] |= {"train_logp": math.log(0.5), "sampling_logp": math.log(0.6), "discrepancy": 0.1}
    rows[1] |= {"train_logp": math.log(1e-5), "sampling_logp": math.log(1e-2), "discrepancy": 0.01}
    rows[2] |= {"sampling_logp": -math.inf, "discrepancy": 0.9048}
    write_tokens(folder, 5, rows)
    (step,) = report(folder).data["steps"]
    assert [token["text"] for token in step["top"]["discrepancy"]] == ["none", "small", "tail"]
    assert [token["text"] for token in step["top"]["log_ratio"]] == ["none", "tail", "small"]
    assert step["completions"][0]["sampling_logp"][2] is None


def test_an_infinite_discrepancy_comes_first_and_leaves_the_scale_alone(tmp_path: Path) -> None:
    folder = write_log(tmp_path, surge_entries(5), settings={"discrepancy_metric": "logprob_diff"})
    rows = sentence(0, ["a", "b", "c"], discrepancy=0.2)
    rows[1] |= {"sampling_logp": -math.inf, "discrepancy": math.inf}
    write_tokens(folder, 5, rows)
    (step,) = report(folder).data["steps"]
    assert [token["text"] for token in step["top"]["discrepancy"]] == ["b", "a", "c"]
    assert step["scale"]["discrepancy"] == pytest.approx(0.2)
    assert step["completions"][0]["mean"] is None and step["metric"] == "logprob_diff"


def test_a_completion_with_a_nan_is_shown_among_the_worst(tmp_path: Path) -> None:
    rows = sentence(30, ["a", "b"], train_logp=math.nan, discrepancy=math.nan)
    rows += [row for c in range(30) for row in sentence(c, ["x", "y"], token_id=c, discrepancy=0.5)]
    write_tokens(write_log(tmp_path, [{"step": 1}]), 1, rows)
    first = report(tmp_path).data["steps"][0]["completions"][0]
    assert (first["completion"], first["mean"], first["train_logp"]) == (30, None, [None, None])


def test_short_completions_leave_their_room_to_long_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dc_trl.commands.report.tokens.view.TOKENS", 100)
    rows = sentence(0, ["a"] * 80) + sentence(1, ["b"] * 10, token_id=8) + sentence(2, ["c"] * 60, token_id=9)
    write_tokens(write_log(tmp_path, [{"step": 1}]), 1, rows)
    shown = {c["completion"]: len(c["text"]) for c in report(tmp_path).data["steps"][0]["completions"]}
    assert shown == {0: 45, 1: 10, 2: 45}
    monkeypatch.setattr("dc_trl.commands.report.tokens.view.TOKENS", 150)
    shown = {c["completion"]: len(c["text"]) for c in report(tmp_path).data["steps"][0]["completions"]}
    assert shown == {0: 80, 1: 10, 2: 60}


@pytest.mark.parametrize("column", ["token", "prompt", "valid", "completion"])
def test_a_token_log_with_other_values_is_left_out(tmp_path: Path, column: str) -> None:
    path = write_tokens(write_log(tmp_path, [{"step": 1}]), 1, sentence(0, ["a", "b"]))
    table = pq.read_table(path)
    place, field = table.schema.get_field_index(column), table.schema.field(column)
    pq.write_table(table.set_column(place, field, pa.nulls(2, field.type)), path)
    assert f"was left out: its column {column} holds other values" in report(tmp_path).text
    pq.write_table(table.set_column(place, column, pa.array(["<b>"] * 2)), path)
    assert f"was left out: its column {column} holds other values" in report(tmp_path).text


@pytest.mark.parametrize("rejected", ["no column", None, True])
def test_a_token_log_is_shown_with_and_without_what_was_rejected(tmp_path: Path, rejected: bool | str | None) -> None:
    path = write_tokens(write_log(tmp_path, [{"step": 1}]), 1, sentence(0, ["a", "b"]))
    table = pq.read_table(path)
    if rejected == "no column":
        pq.write_table(table.drop_columns("rejected"), path)  # as before there were rules
    else:
        column = pa.array([rejected, rejected], pa.bool_())
        pq.write_table(table.set_column(table.schema.get_field_index("rejected"), "rejected", column), path)
    page = report(tmp_path)
    assert [step["completions"][0]["text"] for step in page.data["steps"]] == [["a", "b"]]
    assert "was left out" not in page.text


def test_the_histogram_puts_tokens_in_the_bucket_of_mu(tmp_path: Path) -> None:
    folder = write_log(tmp_path, surge_entries(5))
    rows = sentence(0, ["a", "b", "c", "d"])
    for row, mu, d in zip(rows, (0.05, 0.05, 0.6, 1.0), (0.1, 0.3, 0.2, 0.05), strict=True):
        row |= {"sampling_logp": math.log(mu), "discrepancy": d}
    write_tokens(folder, 5, rows)
    (step,) = report(folder).data["steps"]
    figure = step["figures"]["buckets"]
    graph_objects.Figure(figure)
    bars = figure["data"][0]
    found = {x: y for x, y in zip(bars["x"], bars["y"], strict=True) if y is not None}
    assert found == pytest.approx({"0.01–0.1": 0.2, "0.5–0.75": 0.2, "0.99–1": 0.05})
    counts = {note["x"]: note["text"] for note in figure["layout"]["annotations"]}
    assert {name: count for name, count in counts.items() if count != "0"} == {
        "0.01–0.1": "2",
        "0.5–0.75": "1",
        "0.99–1": "1",
    }


def test_a_page_holds_a_bounded_number_of_completions_and_tokens(tmp_path: Path) -> None:
    folder = write_log(tmp_path, surge_entries(5))
    for step in range(1, 8):
        rows = []
        for completion in range(40):
            rows += sentence(completion, ["x"] * 1500, discrepancy=completion / 1000, token_id=completion)
        write_tokens(folder, step, rows)
    steps = token_view([folder], [read_columns(folder)]).steps
    assert [step["step"] for step in steps] == [7, 5, 3, 1]
    shown = [completion["completion"] for completion in steps[0]["completions"]]
    assert shown[: COMPLETIONS // 2] == list(range(39, 31, -1))  # the highest means
    assert len(shown) == COMPLETIONS and shown[-1] == 0
    assert sum(len(c["text"]) for step in steps for c in step["completions"]) <= TOKENS
    assert steps[0]["completions"][0]["tokens"] == 1500
    (one,) = token_view([folder], [read_columns(folder)], wanted=2).steps
    assert one["step"] == 2 and len(one["completions"][0]["text"]) == 1500


def test_equal_completions_are_shown_once(tmp_path: Path) -> None:
    folder = write_log(tmp_path, surge_entries(5))
    rows = [row for completion in range(6) for row in sentence(completion, ["a", "b"], discrepancy=0.1)]
    for row in rows[-2:]:
        row["prompt"] = "another"
    write_tokens(folder, 5, rows)
    (step,) = report(folder).data["steps"]
    assert [completion["times"] for completion in step["completions"]] == [5, 1]
    assert step["total"] == {"completions": 6, "different": 2, "tokens": 12}
    assert [token["times"] for token in step["top"]["discrepancy"]] == [5, 5, 1, 1]  # of another prompt is another


def test_the_same_token_after_the_same_tokens_is_listed_once_with_its_largest_size(tmp_path: Path) -> None:
    folder = write_log(tmp_path, surge_entries(5))
    rows = []
    for completion, (last, discrepancy) in enumerate((("c", 0.3), ("d", 0.4), ("e", 0.5))):
        words = sentence(completion, ["a", "b", last])
        for word, token_id in zip(words, (1, 2, 10 + completion), strict=True):
            word |= {"token_id": token_id}
        words[1] |= {"discrepancy": discrepancy}
        rows += words
    rows += sentence(3, ["x", "b"], token_id=2)
    rows[-1] |= {"discrepancy": 0.2}  # the same token after another
    write_tokens(folder, 5, rows)
    (step,) = report(folder).data["steps"]
    found = [(token["text"], token["discrepancy"], token["times"]) for token in step["top"]["discrepancy"]]
    assert found == [("b", 0.5, 3), ("b", 0.2, 1)]


# The steps that are kept


def test_the_newest_the_first_and_the_step_with_the_largest_discrepancy_are_kept(tmp_path: Path) -> None:
    folder = write_log(tmp_path, surge_entries(60))
    for step in range(10, 70, 10):
        write_tokens(folder, step, sentence(0, ["a", "b"], discrepancy=0.9 if step == 40 else 0.1))
    rows = sentence(0, ["a", "b"], discrepancy=0.2)
    rows[0] |= {"discrepancy": 1.0, "valid": False}  # a tool's token has no say
    write_tokens(folder, 20, rows)
    steps = {step["step"]: step["why"] for step in report(folder).data["steps"]}
    assert steps == {60: [NEWEST], 40: [WORST], 30: [], 10: [FIRST]}


def test_one_step_has_every_reason_and_a_damaged_one_has_none(tmp_path: Path) -> None:
    write_tokens(tmp_path, 5, sentence(0, ["a"], discrepancy=0.5))
    assert kept_steps(token_logs(tmp_path), 4) == {5: [NEWEST, FIRST, WORST]}
    (tmp_path / "tokens" / "tokens_00009.parquet").write_bytes(b"PAR1 half of a file")
    assert worst_step(token_logs(tmp_path)) == 5
    assert kept_steps({}, 4) == {}
    rewritten(write_tokens(tmp_path, 7, sentence(0, ["a", "b"])), "discrepancy", [math.nan, 0.6])
    assert worst_step(token_logs(tmp_path)) == 7


# Answers and rejection


def test_a_completion_has_its_reward_its_answer_and_the_gold_one(tmp_path: Path) -> None:
    folder = write_log(tmp_path, surge_entries(5))
    rows = sentence(0, ["a", "b"], reward=1.0, answer="92", gold="<b>92", rejected=False)
    rows += sentence(1, ["c"], reward=math.nan, answer=None, gold="92", token_id=8, discrepancy=0.1, rejected=True)
    write_tokens(folder, 5, rows)
    second, first = report(folder).data["steps"][0]["completions"]
    assert (first["reward"], first["answer"], first["gold"], first["rejected"]) == (1.0, "92", "<b>92", [])
    assert (second["reward"], second["answer"], second["gold"], second["rejected"]) == (None, None, "92", [0])


OLD_COLUMNS = ["rejected", "reward", "answer", "gold"]


def test_a_token_log_of_an_older_version_is_read(tmp_path: Path) -> None:
    path = write_tokens(write_log(tmp_path, [{"step": 1}]), 1, sentence(0, ["a", "b"]))
    pq.write_table(pq.read_table(path).drop_columns(OLD_COLUMNS), path)
    (step,) = report(tmp_path).data["steps"]
    (completion,) = step["completions"]
    assert completion["text"] == ["a", "b"] and completion["rejected"] == []
    assert [completion[name] for name in ("reward", "answer", "gold")] == [None] * 3


# Figures


def tokens_of(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
    """Rows of one completion with these π and μ."""
    rows = sentence(0, ["t"] * len(pairs))
    for row, (pi, mu) in zip(rows, pairs, strict=True):
        row |= {"train_logp": math.log(pi), "sampling_logp": math.log(mu), "discrepancy": abs(pi - mu)}
    return rows


def test_the_figures_of_a_step_are_plotlys_and_hold_its_tokens(tmp_path: Path) -> None:
    folder = write_log(tmp_path, surge_entries(5))
    rows = tokens_of((0.5, 0.75), (0.2, 0.1), (0.9, 0.9), (1e-5, 1e-2))
    rows[2] |= {"valid": False}
    write_tokens(folder, 5, rows)
    figures = report(folder).data["steps"][0]["figures"]
    for figure in figures.values():
        graph_objects.Figure(figure)
    line, points = figures["probabilities"]["data"]
    assert sorted(zip(points["x"], points["y"], strict=True)) == [(0.01, 1e-5), (0.1, 0.2), (0.75, 0.5)]
    assert line["x"] == line["y"] == [1e-5, 1]
    (bars,) = figures["log_ratios"]["data"]
    assert sum(bars["y"]) == 3 and bars["y"][0] == 1 and "down to -6.91" in bars["customdata"][0]
    bars, tails = figures["positions"]["data"]
    assert (bars["x"], bars["y"]) == ([0, 1, 3], pytest.approx([0.25, 0.1, 0.00999]))
    assert tails["y"] == pytest.approx([0.25, 0.1, 0.00999])


def test_figures_without_data_are_absent(tmp_path: Path) -> None:
    folder = write_log(tmp_path, surge_entries(5))
    write_tokens(folder, 4, sentence(0, ["a"], valid=False))
    write_tokens(folder, 5, sentence(0, ["a"]))  # one position, and no difference
    newest, first = report(folder).data["steps"]
    assert set(newest["figures"]) == {"buckets", "probabilities"} and first["figures"] == {}


def test_a_large_step_draws_a_bounded_number_of_points_with_the_worst_among_them(tmp_path: Path) -> None:
    folder = write_log(tmp_path, surge_entries(5))
    write_tokens(folder, 5, tokens_of(*[(0.5, 0.5)] * 4_000, (0.1, 0.9), (1e-9, 1e-3), *[(0.5, 0.5)] * 4_000))
    figures = report(folder).data["steps"][0]["figures"]
    points = figures["probabilities"]["data"][1]
    drawn = set(zip(points["x"], points["y"], strict=True))
    assert len(points["x"]) <= POINTS and {(0.9, 0.1), (1e-3, 1e-9)} <= drawn
    assert len(figures["positions"]["data"][0]["x"]) <= 60
    assert sum(figures["log_ratios"]["data"][0]["y"]) == 8_002


def test_an_unreadable_token_log_is_replaced_by_the_one_before_it_with_a_note(tmp_path: Path) -> None:
    folder = write_log(tmp_path, surge_entries(5))
    write_tokens(folder, 3, sentence(0, ["a"]))
    (folder / "tokens" / "tokens_00005.parquet").write_bytes(b"PAR1 half of a file")
    page = report(folder)
    assert [step["step"] for step in page.data["steps"]] == [3]
    assert "tokens_00005.parquet was left out" in page.text


def rewritten(path: Path, column: str, values: Any) -> None:
    """Puts other values into a column of a token log."""
    table = pq.read_table(path)
    place, field = table.schema.get_field_index(column), table.schema.field(column)
    values = values if isinstance(values, pa.Array) else pa.array(values, field.type)
    pq.write_table(table.set_column(place, field, values), path)


# Two strings, of the bytes ff and fe.
NOT_UTF8 = pa.DictionaryArray.from_arrays(
    pa.array([0, 1], pa.int32()),
    pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(np.int32([0, 1, 2])), pa.py_buffer(b"\xff\xfe")]),
)
DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "overwritten": lambda path: path.write_bytes(b"PAR1" + bytes(path.stat().st_size - 8) + b"PAR1"),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "tokens not UTF-8": lambda path: rewritten(path, "token", NOT_UTF8),
    "prompts not UTF-8": lambda path: rewritten(path, "prompt", NOT_UTF8),
    "no rows": lambda path: pq.write_table(pq.read_table(path).slice(0, 0), path),
    "a column twice": lambda path: pq.write_table(
        pa.table([*pq.read_table(path).columns, pa.array([1, 2])], names=[*SCHEMA.names, "step"]), path
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("wanted", [None, 3])
def test_one_bad_token_log_does_not_refuse_the_page(tmp_path: Path, name: str, wanted: int | None) -> None:
    folder = write_log(tmp_path, surge_entries(5))
    write_tokens(folder, 3, sentence(0, ["a", "b"]))
    DAMAGE[name](write_tokens(folder, 5, sentence(0, ["a", "b"])))
    page = report(folder, step=wanted)
    assert [step["step"] for step in page.data["steps"]] == [3]
    assert ("tokens_00005.parquet was left out: " in page.text) == (wanted is None)
    with pytest.raises(UsageError, match=r"no readable token log of step 5\."):
        build_report([folder], 5)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        *(("completion", [-(2**31), 2**31 - 1]), ("position", [-1, -1]), ("token_id", [-5, 2**31 - 1])),
        *(("train_logp", [3e38, -3e38]), ("discrepancy", [3e38, 3e38]), ("discrepancy", [-3e38, math.nan])),
        *(("advantage", [math.inf, math.nan]), ("penalty", [3e38, -3e38]), ("valid", [False, False])),
    ],
)
def test_values_that_no_run_would_write_are_shown(tmp_path: Path, column: str, values: list[Any]) -> None:
    folder = write_log(tmp_path, surge_entries(5))
    rewritten(write_tokens(folder, 5, sentence(0, ["a", "b"])), column, values)
    (step,) = report(folder).data["steps"]
    assert step["total"]["tokens"] == 2


def test_a_number_that_is_no_step_is_no_token_log(tmp_path: Path) -> None:
    folder = write_log(tmp_path, surge_entries(5))
    path = write_tokens(folder, 5, sentence(0, ["a"]))
    path.rename(path.with_name(f"tokens_{'9' * 200}.parquet"))
    assert report(folder).data["steps"] == []


def test_a_step_without_tokens_is_refused_with_those_there_are(tmp_path: Path) -> None:
    folder = write_log(tmp_path, surge_entries(5))
    with pytest.raises(UsageError, match="log_tokens=True"):
        build_report([folder], 4)
    write_tokens(folder, 3, sentence(0, ["a"]))
    with pytest.raises(UsageError, match=r"step 4\. The last of those there are: 3\."):
        build_report([folder], 4)


# Text


def test_what_cannot_be_seen_is_written_out() -> None:
    assert visible("a\u202eb\x00\u2028\ud800\u200d") == "a⟨U+202E⟩b⟨U+0000⟩⟨U+2028⟩⟨U+D800⟩⟨U+200D⟩"
    assert visible("a\tb\n") == "a⇥b↵"
    assert visible("\u0301x") == "◌\u0301x"
    assert visible("é日本\ufffd") == "é日本\ufffd"
    assert visible("x" * 12, limit=10) == "x" * 10 + "… (2 more characters)"


def test_labels_escape_what_plotly_reads_and_are_cut() -> None:
    assert label("<b>&") == "&lt;b&gt;&amp;"
    assert len(label("x" * 100)) == 32


def test_embedded_json_holds_nothing_that_ends_a_script_and_says_the_same() -> None:
    text = embedded_json(HOSTILE)
    assert not re.search(r"[<>&\u2028\u2029]|[^\x00-\x7f]", text)
    assert json.loads(text) == HOSTILE
    with pytest.raises(ValueError):
        embedded_json([math.nan])


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0036912, "0.003691"), (12345.6, "12,346"), (150, "150"), (None, "–"), (math.nan, "–")]
)
def test_numbers(value: Any, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(-1, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (260_000, "3 days")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


# Safety


ELEMENTS = set(
    "html head meta title style body a header p h1 h2 h3 ul li span nav main noscript section table thead tbody tr th "
    "td i small progress div figure figcaption code details summary footer script form label select fieldset legend "
    "input".split()
)


def project_links() -> set[str | None]:
    """Addresses of the documentation, which a verdict may lead to. A run has no part in them."""
    return {section_link(bound.section) for check in CHECKS for bound in check.bounds} - {None}


@pytest.mark.parametrize("name", ["<script>window.pwned=1<", '"><img src=x onerror=window.pwned=1>', "\u202ename"])
def test_hostile_text_makes_no_element_and_no_attribute(tmp_path: Path, name: str) -> None:
    page = report(hostile_run(tmp_path / name), hostile_run(tmp_path / "other"))
    assert {tag for tag, _ in page.elements} <= ELEMENTS
    for _, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on")]
        assert (attributes.get("href") or "#").startswith("#") or attributes["href"] in project_links()
    assert len(page.scripts) == 4
    assert not re.search("[\u2028\u2029\u202a-\u202e\u2066-\u2069\x00\x07\x1b]", page.text)
    assert visible(HOSTILE[0]) in page.text  # as text it is there


def test_only_the_pages_own_scripts_may_run_and_nothing_is_loaded(tmp_path: Path) -> None:
    page = report(hostile_run(tmp_path))
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'; ")
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in page.scripts[1:]]
    assert re.search("script-src ([^;]*);", policy)[1] == " ".join(f"'sha256-{digest}'" for digest in digests)  # type: ignore[index]
    assert not [attributes for _, attributes in page.elements if "src" in attributes]
    assert {a["href"] for _, a in page.elements if "href" in a} - project_links() == {
        "#verdicts",
        "#summary",
        "#run",
        "#tail",
        "#tokens",
        "#settings",
    }


def test_plotlys_script_can_stand_in_a_page() -> None:
    assert not re.search("</script|<!--|\r|\0", get_plotlyjs(), flags=re.IGNORECASE)
