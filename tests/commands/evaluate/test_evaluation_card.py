# SPDX-License-Identifier: Apache-2.0
"""What `dc-trl evaluate` writes into a model card, and what it leaves there."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from known_engine import STDERR, KnownEngine, evaluate
from tiny import save_tiny_policy

from dc_trl.commands.evaluate.benchmarks import Benchmark
from dc_trl.records.card.model_index import model_index_results
from dc_trl.records.results import read_results

OLD_CARD = """---
license: mit
model-index:
- name: Old name
  results:
  - task: {type: text-generation}
    dataset: {name: Other, type: other/data}
    metrics: [{type: bleu, value: 12.5}]
- name: Second
  results: []
---

# Title

Text with --- and é.
"""


def card_results(path: str = "policy/README.md") -> dict[tuple[str, str, Any], float]:
    found = ModelCard.load(path).data.eval_results or []
    keys = [(r.dataset_name, r.metric_name, (r.metric_args or {}).get("temperature")) for r in found]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, (r.metric_value for r in found), strict=True))


def test_the_card_keeps_what_it_has(engine: KnownEngine) -> None:
    Path("policy/README.md").write_text(OLD_CARD, encoding="utf-8")
    assert evaluate() == 0
    expected = {
        ("Other", None, None): 12.5,
        ("sums", "avg@4", 0.7): 50.0,
        ("sums", "avg@4 standard error", 0.7): round(100 * STDERR, 2),
    }
    assert card_results() == expected
    card = ModelCard.load("policy/README.md")
    assert "Text with --- and é." in card.text and card.data.license == "mit"
    written = Path("policy/README.md").read_text(encoding="utf-8")
    assert "- name: Old name\n" in written and "- name: Second\n" in written

    engine.right = {(0, 0), (1, 0), (2, 0)}
    engine.learn(Benchmark("sums", "sums", "sums.jsonl", 4, "train"), seed=1)
    assert evaluate("--seed", "1") == 0  # the same settings as far as a reader cares: replaced
    assert card_results() == expected | {
        ("sums", "avg@4", 0.7): 25.0,
        ("sums", "avg@4 standard error", 0.7): 0.0,
    }
    engine.learn(Benchmark("sums", "sums", "sums.jsonl", 4, "train"))
    assert evaluate("--temperature", "1.0") == 0
    assert len(card_results()) == 5
    assert len(read_results("policy")) == 3 and len(model_index_results(read_results("policy"))) == 4


def test_a_card_is_made_where_there_is_none_and_elsewhere_when_asked(engine: KnownEngine) -> None:
    assert evaluate() == 0
    assert ModelCard.load("policy/README.md").data.model_name == "policy"
    assert evaluate("--model_card", "cards/mine.md") == 0
    assert card_results("cards/mine.md") == card_results()


def test_a_broken_card_is_found_before_sampling(engine: KnownEngine, capsys: pytest.CaptureFixture[str]) -> None:
    Path("policy/README.md").write_text("---\na: [\n---\n")
    assert evaluate() == 2
    assert "policy/README.md is not valid" in capsys.readouterr().err
    assert not engine.seen


def test_push_to_hub(engine: KnownEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pushed: list[Any] = []

    def hub(repository: str, metadata: dict[str, Any], *, overwrite: bool) -> str:
        pushed.append((repository, metadata["model-index"], overwrite))
        if len(pushed) == 2:
            raise OSError("no network")
        return "https://example.org/commit"

    monkeypatch.setattr("dc_trl.records.card.model_index.metadata_update", hub)
    assert evaluate("--push_to_hub", "--hub_model_id", "me/policy") == 0
    repository, index, overwrite = pushed[0]
    assert (repository, index[0]["name"], overwrite) == ("me/policy", "policy", True)
    assert index[0]["results"][0]["metrics"][0]["value"] == 50.0
    assert evaluate("--push_to_hub", "--hub_model_id", "me/policy") == 2
    assert "no network" in capsys.readouterr().err and len(engine.seen) == 12


def test_a_card_has_no_score_of_older_weights(engine: KnownEngine) -> None:
    assert evaluate() == 0
    save_tiny_policy(Path("policy"))
    engine.right = set()
    engine.learn(Benchmark("sums", "sums", "sums.jsonl", 4, "train"))
    assert evaluate() == 0
    old, new = read_results("policy")
    assert (old["mean"], new["mean"]) == (0.5, 0.0)
    assert [entry.metric_value for entry in model_index_results([old, new])] == [0.0, 0.0]
    other = old | {"temperature": 1.0}
    assert [entry.metric_value for entry in model_index_results([old, other, new])][::2] == [0.0, 50.0]
