# SPDX-License-Identifier: Apache-2.0
"""The documentation says what the code does: every logged key, every default, every link and every code block."""

import ast
import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import DOCS, PAGES, README, rows
from runs import PROMPTS, dc_trainer, replayed_rollouts, trl_trainer
from trl import GRPOConfig

from dc_trl import DCGRPOConfig, LengthDecayCallback

# Pages that lie elsewhere.
BESIDE = [README, *(DOCS.parent / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]
BESIDE += [DOCS.parent / "examples" / name for name in ("README.md", "papers/PROTOCOL.md")]
OURS = ("dc/", "length_decay/", "ess_rate/", "sampling/")


def documented_keys() -> list[str]:
    first = (cells[0].strip().strip("`") for cells in rows("metrics.md"))
    return [key for key in first if key.startswith(OURS)]


def logged_keys(trainer: Any) -> set[str]:
    """This package's keys in the log of a run, evaluation's without its prefix."""
    trainer.train()
    keys = {key.removeprefix("eval_") for entry in trainer.state.log_history for key in entry}
    return {key for key in keys if key.startswith(OURS)}


def surge_keys() -> set[str]:
    """The keys of a callback that has seen a surge: 60 steps of 100 tokens, then 20 of 400."""
    callback = LengthDecayCallback()
    for step in range(1, 81):
        callback.observe(step, 100.0 if step <= 60 else 400.0)
    return set(callback.metrics())


def test_every_logged_key_is_documented_and_the_reverse(tmp_path: Path) -> None:
    options = {"length_decay": True, "ess_rate": True, "rejection": ["icepop"], "tolerance_calibration_batches": 1}
    evaluation = {"eval_dataset": PROMPTS.select(range(4)), "eval_strategy": "steps", "eval_steps": 2}
    produced = logged_keys(dc_trainer(tmp_path, **options, **evaluation)) | surge_keys()
    # A run of its own, since a guard knows the usual norm from its ninth step on.
    produced |= logged_keys(dc_trainer(tmp_path / "guarded", gradient_guard=1e9, max_steps=10))
    produced = {key.replace("rejection/icepop", "rejection/RULE") for key in produced}
    documented = documented_keys()
    assert len(documented) == len(set(documented))
    assert set(documented) == produced


@pytest.mark.parametrize("source", ["in-process", "rollout_func"])
def test_metrics_only_mode_logs_the_same_keys(tmp_path: Path, source: str) -> None:
    options: dict[str, Any] = {"tolerance_calibration_batches": 1}
    if source == "rollout_func":
        options["rollout_func"] = replayed_rollouts()
    constrained = logged_keys(dc_trainer(tmp_path, **options))
    measured = logged_keys(dc_trainer(tmp_path, constraint="none", **options))
    assert {key for key in constrained if key.startswith("dc/")} == {key for key in measured if key.startswith("dc/")}


def test_the_sampling_keys_are_those_of_trl(tmp_path: Path) -> None:
    assert logged_keys(trl_trainer(tmp_path, max_steps=1)) == {
        k for k in documented_keys() if k.startswith("sampling/")
    }


def test_every_metric_has_a_complete_row() -> None:
    for cells in rows("metrics.md"):
        assert len(cells) == 5, cells
        assert all(cell.strip() for cell in cells), cells


def test_the_paper_index_has_every_default() -> None:
    fields = {field.name: str(field.default) for field in dataclasses.fields(DCGRPOConfig)}
    listed = [(cells[0].strip().strip("`"), cells[1].strip().strip("`")) for cells in rows("paper_index.md")]
    options = [(name, value) for name, value in listed if name in fields]
    assert options == [(name, fields[name]) for name, _ in options]
    own = set(fields) - {field.name for field in dataclasses.fields(GRPOConfig)}
    assert own <= {name for name, _ in options}
    assert all(cell.strip() for cells in rows("paper_index.md") for cell in cells)


def test_the_paper_index_maps_equations_to_functions_that_exist() -> None:
    named = {name for cells in rows("paper_index.md") for name in re.findall(r"`(dc_trl\.[\w.]+)`", cells[1])}
    assert len(named) >= 15
    for module, _, name in (name.rpartition(".") for name in named):
        assert hasattr(importlib.import_module(module), name), name


# What a recipe says otherwise on purpose: the papers' tolerance and period hold for their stack and data.
@pytest.mark.parametrize(
    ("index", "recipe", "apart"),
    [
        (0, "qwen3_8b_bf16", {"output_dir", "discrepancy_tolerance"}),
        (1, "qwen3_4b_length_decay", {"output_dir", "length_decay_period"}),
    ],
)
def test_the_papers_settings_are_those_of_the_recipes(index: int, recipe: str, apart: set[str]) -> None:
    call = ast.parse(python_blocks(DOCS / "paper_index.md")[index]).body[-1].value  # type: ignore[attr-defined]
    settings = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    path = DOCS.parent / "examples" / "configs" / f"{recipe}.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert apart == {name for name, value in settings.items() if values.get(name, value) != value}
    assert len(set(settings) & set(values)) >= 15


def test_every_page_is_in_the_table_of_contents() -> None:
    sections = yaml.safe_load((DOCS / "_toctree.yml").read_text(encoding="utf-8"))
    listed = [page["local"] for section in sections for page in section["sections"]]
    assert sorted(listed) == sorted(page.stem for page in PAGES)


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


# The blocks of api.md are signatures, which test_docs_api.py reads.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "api.md"], ids=lambda path: path.name)
def test_python_blocks_parse(page: Path) -> None:
    for block in python_blocks(page):
        # `...` stands for the reader's own arguments; before keywords it is a positional one, so the block parses.
        assert ast.parse(block).body


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=lambda path: str(path.relative_to(DOCS.parent)))
def test_links_between_pages_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        destination = (page.parent / name) if name else page
        assert destination.exists(), target
        if anchor:
            assert anchor in anchors(destination), target


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda path: path.name)
def test_pages_name_only_keys_that_exist(page: Path) -> None:
    known = set(documented_keys())
    named = re.findall(r"`((?:dc|length_decay|ess_rate|sampling)/[\w/]+)`", page.read_text(encoding="utf-8"))
    # A family, such as `dc/importance_ratio`, stands for its members.
    named = [re.sub("rejection/(drift|icepop)", "rejection/RULE", key) for key in named]
    unknown = {key for key in named if key not in known and not any(k.startswith(f"{key}/") for k in known)}
    assert not unknown
