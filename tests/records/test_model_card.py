# SPDX-License-Identifier: Apache-2.0
"""The model card's section and the picture of the run, from logs made by hand."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from cards import quick_start
from hostile import BAD_RESULTS, LARGE
from hostile_text import HOSTILE
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from matplotlib import pyplot
from PIL import Image
from runs import dc_trainer
from tiny import tiny_tokenizer

from dc_trl import DCGRPOConfig
from dc_trl.records.card.curves import PANELS, save_curves
from dc_trl.records.card.model_card import complete, copy_card, with_section
from dc_trl.records.card.series import series
from dc_trl.records.run_reader import LARGEST_DRAWN
from dc_trl.records.text import markdown, visible
from dc_trl.rollouts.engines import engine_name

# Of TRL's template, what matters here.
TRL_CARD = """\
---
library_name: transformers
model_name: tiny
tags:
- dc-grpo
---

# Model Card for tiny

This model is a fine-tuned version of [None](https://huggingface.co/None).

## Citations

Cite DC-GRPO as: arXiv:2606.08779
"""


def entry(step: int, **values: float) -> dict[str, Any]:
    """A training entry of the log; 20 of them give reward 1 to 20."""
    return {"step": step, "reward": float(step), "dc/discrepancy/mean": 0.001 * step, **values}


def card_of(
    folder: Path,
    log: list[dict[str, Any]],
    tolerance: float | None = None,
    rounding: str | None = None,
    **settings: Any,
) -> ModelCard:
    (folder / "README.md").write_text(TRL_CARD)
    args = DCGRPOConfig(output_dir=str(folder), report_to="none", bf16=False, **settings)
    complete(folder, args, tolerance, 0.1, rounding, log)
    return ModelCard.load(folder / "README.md")


def write_result(
    folder: Path,
    benchmark: str,
    mean: float | None,
    stderr: float | None,
    limit: int | None = None,
    settings: str = "0",
    **fields: str,
) -> None:
    result = {
        "benchmark": benchmark,
        "title": benchmark.upper(),
        "dataset": f"someone/{benchmark}",
        "config": None,
        "split": "test",
        "metric": "avg@4",
        "samples": 4,
        "limit": limit,
        "temperature": 0.7,
        "top_p": 1.0,
        "max_tokens": 64,
        "engine": "vllm",
        "precision": "bf16",
        "settings": settings,
        "problems": 8,
        "time": "2026-11-21T10:00:00+00:00",
        "mean": mean,
        "stderr": stderr,
    } | fields
    path = folder / "evaluation" / "results.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")


def test_final_values_are_the_mean_of_the_last_tenth_and_the_last(tmp_path: Path) -> None:
    log = [entry(step) for step in range(1, 21)]
    log.append({"step": 20, "train_runtime": 1.0})
    text = card_of(tmp_path, log).text
    assert "### Final values, step 20" in text
    assert "| `reward` | 19.5 | 20 |" in text  # a tenth of 20 entries: (19 + 20) / 2
    assert "| `dc/discrepancy/mean` | 0.0195 | 0.02 |" in text
    assert "`entropy`" not in text  # was not logged


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    log = [entry(1), entry(2) | {"dc/discrepancy/mean": math.nan}, entry(3) | {"dc/discrepancy/mean": None}]
    assert "| `dc/discrepancy/mean` | 0.001 | 0.001 |" in card_of(tmp_path, log).text
    assert series(log, "dc/discrepancy/mean").steps == [1]


@pytest.mark.parametrize("value", LARGE)
def test_values_near_what_a_float_can_hold_do_not_stop_the_card(tmp_path: Path, value: float) -> None:
    log = [entry(1), entry(2) | dict.fromkeys(["reward", "entropy", "dc/discrepancy/mean", "eval_reward"], value)]
    text = card_of(tmp_path, log, 0.5, discrepancy_tolerance=0.5).text
    assert "| `dc/discrepancy/mean` | 0.001 | 0.001 |" in text
    assert (tmp_path / "curves.png").is_file()


def test_values_that_can_just_be_drawn_are_drawn(tmp_path: Path) -> None:
    card_of(tmp_path, [entry(1) | {"reward": -LARGEST_DRAWN}, entry(2) | {"reward": LARGEST_DRAWN}])
    assert (tmp_path / "curves.png").is_file()


def test_what_is_no_result_does_not_stop_the_card(tmp_path: Path) -> None:
    write_result(tmp_path, "sums", 0.5, 0.1)
    with (tmp_path / "evaluation" / "results.jsonl").open("ab") as file:
        file.write(b"".join(line + b"\n" for line, _ in BAD_RESULTS.values()))
    card = card_of(tmp_path, [entry(1)])
    assert [result.dataset_name for result in card.data.eval_results] == ["SUMS"] * 2
    assert card.text.count("| SUMS, avg@4 |") == 1


def test_nothing_measured(tmp_path: Path) -> None:
    text = card_of(tmp_path, []).text
    assert "| `dc/discrepancy/mean` | not measured | not measured |" in text
    assert "curves.png" not in text and not (tmp_path / "curves.png").exists()
    assert "### Evaluation" not in text and "### Benchmarks" not in text
    assert "| tolerance | still being calibrated |" in text


@pytest.mark.parametrize(
    ("rounding", "asked", "words"),
    [
        ("dither", "auto", "dithered, with seed 7 (auto)"),
        ("nearest", "nearest", "to nearest (nearest)"),
        (None, "auto", "none: no engine of dc-trl rounds them"),
    ],
)
def test_the_rounding_in_force_and_what_the_sampler_saw(
    tmp_path: Path, rounding: str | None, asked: str, words: str
) -> None:
    seen = {"dc/sync/update_seen": 0.5, "dc/sync/update_seen_since_start": 0.75}
    settings = {"rollout_backend": "transformers", "rollout_precision": "bf16", "seed": 7, "sync_rounding": asked}
    text = card_of(tmp_path, [entry(1), entry(2, **seen)], rounding=rounding, **settings).text
    assert f"| rounding at the weight sync | {words} |" in text
    assert "| `dc/sync/update_seen` | 0.5 | 0.5 |" in text
    assert "| `dc/sync/update_seen_since_start` | 0.75 | 0.75 |" in text


def test_the_section_stands_before_the_citations_of_both_papers(tmp_path: Path) -> None:
    text = card_of(tmp_path, [entry(1)], 0.0123, discrepancy_tolerance=0.0123).text
    places = [text.index(part) for part in ("# Model Card for tiny", "## Discrepancy", "![Curves]", "## Citations")]
    assert places == sorted(places)
    assert text.index("## Citations") < text.index("2606.08779") < text.index("2602.01826")
    assert "| tolerance | 0.0123 (given) |" in text and "a model not on the Hub" in text
    assert "## Citations" in with_section("# A card without", "## Section\n")


def test_the_newest_evaluation_is_shown(tmp_path: Path) -> None:
    log = [entry(1), {"step": 1, "eval_reward": 0.25}, entry(2), {"step": 2, "eval_reward": 0.5, "eval_runtime": 3.0}]
    text = card_of(tmp_path, log).text
    assert "### Evaluation during training, step 2" in text and "| `eval_reward` | 0.5 |" in text
    assert "0.25" not in text and "eval_runtime" not in text


def test_benchmark_scores_survive_each_new_card(tmp_path: Path) -> None:
    write_result(tmp_path, "sums", 0.5, 0.02)
    assert card_of(tmp_path, [entry(1)]).data.eval_results[0].metric_value == 50.0
    write_result(tmp_path, "sums", 0.75, None)  # evaluated again: the last counts; one problem has no standard error
    write_result(tmp_path, "other", None, None)  # no problem could be judged
    card = card_of(tmp_path, [entry(1), entry(2)])
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_name, result.metric_value) == ("someone/sums", "avg@4", 75.0)
    assert card.data.model_name == "tiny"
    assert "| SUMS, avg@4 | 75.0 | 8 |" in card.text and "| OTHER, avg@4 | none |" in card.text


def test_scores_of_other_weights_replace_the_old_ones(tmp_path: Path) -> None:
    write_result(tmp_path, "sums", 0.5, 0.02, settings="of the old weights")
    write_result(tmp_path, "sums", 0.75, 0.02, settings="of the new weights")
    card = card_of(tmp_path, [entry(1)])
    assert [result.metric_value for result in card.data.eval_results] == [75.0, 2.0]  # and its standard error
    assert card.text.count("| SUMS, avg@4 |") == 1 and "50.0" not in card.text


def test_scores_of_a_part_and_of_nothing(tmp_path: Path) -> None:
    write_result(tmp_path, "sums", None, None, limit=8)
    card = card_of(tmp_path, [entry(1)])
    assert "| SUMS, avg@4 | none | first 8 |" in card.text
    assert card.data.eval_results is None and "model-index" not in card.content


def test_a_card_without_a_model_name_gets_the_folders(tmp_path: Path) -> None:
    write_result(tmp_path, "sums", 0.5, 0.02)
    (tmp_path / "README.md").write_text("# A card without a header\n")
    args = DCGRPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False)
    complete(tmp_path, args, None, 0.1, None, [])
    assert ModelCard.load(tmp_path / "README.md").data.model_name == tmp_path.name


def test_a_checkpoint_gets_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    copy_card(tmp_path, tmp_path / "checkpoint-1")
    assert not list((tmp_path / "checkpoint-1").iterdir())
    card_of(tmp_path, [entry(1)])
    copy_card(tmp_path, tmp_path / "checkpoint-1")
    for name in ("README.md", "curves.png"):
        assert (tmp_path / "checkpoint-1" / name).read_bytes() == (tmp_path / name).read_bytes()


def full_log(steps: int) -> list[dict[str, Any]]:
    return [{"step": s, **{key: 1.0 + math.sin(s * s) for key in PANELS.values()}} for s in range(1, steps + 1)]


def test_the_same_log_gives_the_same_picture_and_it_stays_small(tmp_path: Path) -> None:
    log = full_log(1000)
    assert save_curves(log, 0.01, tmp_path / "a.png") and save_curves(log, 0.01, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").stat().st_size < 120_000
    assert not pyplot.get_fignums()


@pytest.mark.parametrize(("keys", "panels"), [(1, (1, 1)), (3, (3, 1)), (4, (3, 2)), (6, (3, 2))])
def test_a_panel_for_each_key_that_was_logged(tmp_path: Path, keys: int, panels: tuple[int, int]) -> None:
    kept = ["step", *list(PANELS.values())[:keys]]
    log = [{key: line[key] for key in kept} for line in full_log(5)]
    assert save_curves(log, None, tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as image, Image.open(_reference(tmp_path)) as panel:
        assert (round(image.width / panel.width), round(image.height / panel.height)) == panels


def test_tolerance_and_evaluation_are_drawn(tmp_path: Path) -> None:
    log = [entry(step) for step in range(1, 6)]
    colours = []
    for name, tolerance, more in (("a", None, []), ("b", 0.003, []), ("c", None, [{"step": 3, "eval_reward": 2.0}])):
        save_curves(log + more, tolerance, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            colours.append({colour for _, colour in image.convert("RGB").getcolors(1 << 16) or []})
    tolerance_colour, evaluation_colour = (0xD5, 0x5E, 0x00), (0xE6, 0x9F, 0x00)
    assert [_near(tolerance_colour, found) for found in colours] == [False, True, False]
    assert [_near(evaluation_colour, found) for found in colours] == [False, False, True]


def _near(wanted: tuple[int, int, int], colours: set[Any]) -> bool:
    # Smoothed edges mix a thin line with the white around it.
    return any(max(abs(a - b) for a, b in zip(wanted, colour, strict=True)) < 40 for colour in colours)


def _reference(folder: Path) -> Path:
    """A picture of one panel."""
    save_curves([entry(1) | {"dc/discrepancy/mean": None}], None, folder / "reference.png")
    return folder / "reference.png"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"rollout_backend": "transformers", "rollout_precision": "int4"}, "in-process transformers, int4"),
        ({"rollout_backend": "transformers"}, "in-process transformers, as trained"),
        ({"use_vllm": True, "vllm_mode": "server", "weight_sync": "disk"}, "vLLM server, weights over disk"),
        ({"use_vllm": True, "vllm_mode": "server"}, "vLLM server"),
        ({"use_vllm": True, "vllm_engine_kwargs": {"quantization": "fp8"}}, "vLLM colocated (quantization=fp8)"),
        ({"rollout_backend": "vllm", "use_vllm": False}, "TRL's generation or a rollout_func"),
    ],
)
def test_every_engine_has_a_name(settings: dict[str, Any], name: str) -> None:
    assert engine_name(settings) == name


@pytest.mark.parametrize("text", HOSTILE)
def test_untrusted_text_stays_text_in_a_card(tmp_path: Path, text: str) -> None:
    text = text.replace("\ud800", "?")  # no character, which no result has
    write_result(tmp_path, "sums", 0.5, 0.02, title=text, engine=text, precision=text, time=text)
    header = {"model_name": text, "base_model": text, "datasets": [text]}
    linked = f"[{text}](https://huggingface.co/{text}) on the [{text}](https://huggingface.co/datasets/{text})"
    card = ModelCard(
        f"---\n{yaml.safe_dump(header)}---\n\n# Model Card for {text}\n\nA version of {linked} dataset.\n"
    )
    card.save(tmp_path / "README.md")
    args = DCGRPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False)
    log = [entry(1), {"step": 1, f"eval_rewards/{text}/mean": 0.5}]
    complete(tmp_path, args, None, 0.1, None, log)
    card = ModelCard.load(tmp_path / "README.md")
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(card.text)
    parts = [part for token in tokens if token.type == "inline" for part in token.children or []]
    kinds = {part.type for part in parts} | {token.type for token in tokens}
    assert not kinds & {"html_inline", "html_block", "strong_open", "em_open", "s_open"}
    links = [str(part.attrs["href"]) for part in parts if part.type == "link_open"]
    assert all(link.startswith("https://huggingface.co/") for link in links) and not (links and markdown(text) != text)
    assert [part.attrs["src"] for part in parts if part.type == "image"] == ["curves.png"]
    headings = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    assert headings[1:] == [
        "Discrepancy constraint",
        "Final values, step 1",
        "Evaluation during training, step 1",
        "Benchmarks",
        "Citations",
    ]
    assert headings[0] == f"Model Card for {markdown(text)}"
    rows = [token.content for token in tokens if token.type == "inline" and visible(text) in _read(token)]
    assert len(rows) >= 5  # in the heading, the sentence, the metric, and the row of the benchmark


def _read(token: Any) -> str:
    return "".join(part.content for part in token.children)


@pytest.mark.parametrize("chats", [True, False], ids=["a chat model", "a base model"])
def test_the_quick_start_of_a_card_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chats: bool
) -> None:
    tokenizer = tiny_tokenizer()
    if not chats:
        tokenizer.chat_template = None
    trainer = dc_trainer(tmp_path, processing_class=tokenizer)
    trainer.save_model()
    trainer.create_model_card(model_name="tiny")
    snippet = quick_start(tmp_path)
    assert ('"role"' in snippet) == chats
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    assert capsys.readouterr().out.strip()
