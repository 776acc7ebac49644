# SPDX-License-Identifier: Apache-2.0
"""`dc-trl evaluate` with an engine whose answers are known: scores, errors, options."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import DEEP
from known_engine import RIGHT, STDERR, SUMS, KnownEngine, evaluate, sample_files
from places import ROOT
from problems import write_rows
from tiny import save_tiny_policy
from transformers import AutoTokenizer

from dc_trl.commands.cli import main
from dc_trl.commands.evaluate.benchmarks import BENCHMARKS, Benchmark
from dc_trl.commands.evaluate.command import make_parser
from dc_trl.commands.evaluate.sampling import Judge
from dc_trl.commands.evaluate.scoring import mean_and_stderr
from dc_trl.commands.evaluate.table import results_table
from dc_trl.records.results import read_results
from dc_trl.tasks.data import BOXED_TEMPLATE


def test_the_score_is_the_hand_worked_one(engine: KnownEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate() == 0
    (result,) = read_results("policy")
    assert result["mean"] == pytest.approx(0.5) and result["stderr"] == pytest.approx(STDERR)
    assert (result["metric"], result["problems"], result["truncated"]) == ("avg@4", 3, 0.0)
    assert result["mean_tokens"] == 11.5  # (10 + 11 + 12 + 13) / 4
    assert "| sums, avg@4 | 3 | 50.0 ± 28.9 | 0.0 | 12 |" in capsys.readouterr().out
    lines = [json.loads(line) for line in sample_files()[0].read_text().splitlines()][1:]
    assert {(line["problem"], line["sample"]) for line in lines if line["correct"]} == RIGHT
    assert len(lines) == len({line["seed"] for line in lines}) == 12
    assert not any("completion" in line for line in lines)


def test_mean_and_standard_error() -> None:
    # m = (3/4, 1/4): mean 1/2, deviations ±1/4, s = √(2/16 / 1), divided by √2: 1/4.
    assert mean_and_stderr([[True, True, True, False], [False, False, True, False]]) == (0.5, pytest.approx(0.25))
    assert mean_and_stderr([[True, False]]) == (0.5, None)
    # Clustered: eight copies of the same verdict on two problems tell no more than one.
    assert mean_and_stderr([[True] * 8, [False] * 8]) == mean_and_stderr([[True], [False]])
    for empty in ([], [[True], []]):
        with pytest.raises(ValueError, match="at least one"):
            mean_and_stderr(empty)


def test_what_does_not_end_is_wrong(engine: KnownEngine) -> None:
    engine.cut = {(0, 0), (0, 1), (2, 3)}  # the first two would be right
    engine.learn(Benchmark("sums", "sums", "sums.jsonl", 4, "train"))
    assert evaluate("--save_completions") == 0
    (result,) = read_results("policy")
    assert result["mean"] == pytest.approx((2 / 4 + 2 / 4 + 0) / 3)
    assert result["truncated"] == pytest.approx(3 / 12)
    lines = [json.loads(line) for line in sample_files()[0].read_text().splitlines()][1:]
    assert all("boxed" in line["completion"] for line in lines)


def test_a_gold_answer_that_cannot_be_parsed_is_left_out_and_said(
    engine: KnownEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(Path("sums.jsonl"), [*SUMS, {"problem": "why?", "answer": "because $ of"}])
    engine.learn(Benchmark("sums", "sums", "sums.jsonl", 4, "train"))
    assert evaluate() == 0
    (result,) = read_results("policy")
    assert (result["problems"], result["unjudged_problems"]) == (3, 1)
    assert result["mean"] == pytest.approx(0.5)
    assert "3 (1 without a usable gold answer left out)" in capsys.readouterr().out
    # For a model that is cut off each time too, or two models would be scored on different problems.
    engine.cut = {(3, sample) for sample in range(4)}
    engine.learn(Benchmark("sums", "sums", "sums.jsonl", 4, "train"), seed=1)
    assert evaluate("--seed", "1") == 0
    assert read_results("policy")[-1]["problems"] == 3


def test_max_tokens_is_cut_to_the_context_and_said(
    engine: KnownEngine, capsys: pytest.CaptureFixture[str], policy: Path
) -> None:
    prompt = BOXED_TEMPLATE.replace("{problem}", SUMS[1]["problem"])
    engine.context = len(prompt) + 50  # one token a character
    assert evaluate() == 0
    assert engine.max_tokens == read_results("policy")[0]["max_tokens"] == 50
    assert "limited to 50 tokens instead of --max_tokens 32768" in capsys.readouterr().out
    engine.context = len(prompt)
    assert evaluate() == 2
    assert "fills the context" in capsys.readouterr().err


def test_a_base_model_is_scored_on_plain_prompts(
    engine: KnownEngine, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (policy / "chat_template.jinja").unlink()
    engine.learn(Benchmark("sums", "sums", "sums.jsonl", 4, "train"), plain=True)
    assert evaluate() == 0
    assert "The tokenizer of policy has no chat template, so prompts are plain text." in capsys.readouterr().out
    (result,) = read_results("policy")
    assert (result["prompt_format"], result["mean"]) == ("plain", pytest.approx(0.5))
    # The tokenizer adds what it adds to any text, as in training.
    tokenizer = AutoTokenizer.from_pretrained(policy)
    text = BOXED_TEMPLATE.replace("{problem}", SUMS[0]["problem"])
    assert engine.prompts[0] == tokenizer(text)["input_ids"]


def test_what_cannot_be_written_is_found_before_sampling(
    engine: KnownEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("")
    assert evaluate("--output_dir", "file/x") == 2
    assert "nothing can be written to file/x" in capsys.readouterr().err
    assert evaluate("--model_card", ".") == 2
    assert "the model card . is not valid" in capsys.readouterr().err
    assert not engine.seen
    assert evaluate("--model_card", "file/README.md") == 2
    assert "the scores are recorded, but the model card cannot be written" in capsys.readouterr().err
    assert len(read_results("policy")) == 1


def test_no_score_for_a_table_of_nothing() -> None:
    result = {"benchmark": "x", "title": "x", "metric": "avg@4", "limit": None, "problems": 0, "unjudged_problems": 1}
    row = results_table([result | {"mean": None, "stderr": None, "truncated": 0.0, "mean_tokens": 5.0}])
    assert row.endswith("| x, avg@4 | 0 (1 without a usable gold answer left out) | none | 0.0 | 5 |")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--benchmarks", "aime23"], "'aime23': it must be of aime24, "),
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--engine", "transformers", "--answer_column", "gold"], "no answer column: looked for gold"),
        (["--model_name_or_path", "./nowhere"], "model directory ./nowhere does not exist"),
        (["--model_name_or_path", "empty"], "cannot load configuration and tokenizer of empty"),
        (["--temperature", "0"], "--temperature is 0.0"),
        (["--top_p", "0"], "--top_p 0.0"),
        (["--samples", "0"], "0 is not a positive whole number"),
        (["--limit", "-1"], "-1 is not a positive whole number"),
        (["--max_tokens", "1e3"], "1e3 is not a positive whole number"),
        (["--model_name_or_path", "adapter"], "adapter holds a PEFT adapter, not a whole model: merge it"),
        (["--model_name_or_path", "bare", "--prompt_format", "chat"], "write it into chat_template.jinja"),
        (
            ["--engine", "transformers", "--model_name_or_path", "strict"],
            "chat template does not take problem 0: alternate!",
        ),
        (["--vllm_engine_kwargs", "{"], "is not JSON"),
        (["--vllm_engine_kwargs", "[]"], "must be a JSON mapping"),
        (["--vllm_engine_kwargs", DEEP], "is not JSON (nested deeper than 100 levels)"),
        (["--engine", "transformers", "--vllm_engine_kwargs", '{"a": 1}'], "is for --engine vllm, not transformers"),
        (["--engine", "transformers", "--top_p", "0.9"], "the in-process engine samples from the whole distribution"),
        (["--engine", "server", "--server_base_url", "http://127.0.0.1:9"], "no vLLM server answers"),
        (["--precision", "fp8"], "--precision fp8 is for the other engines"),
        (["--prompt_template", "Solve."], "has no {problem}"),
        (["--push_to_hub"], "needs --hub_model_id"),
    ],
)
def test_errors_name_the_value_and_the_way_out(
    policy: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    Path("empty").mkdir()
    write_rows(Path("adapter/adapter_config.json"), [{"peft_type": "LORA"}])
    (save_tiny_policy("bare") / "chat_template.jinja").unlink()
    (save_tiny_policy("strict") / "chat_template.jinja").write_text("{{ raise_exception('alternate!') }}")
    monkeypatch.setattr("dc_trl.commands.evaluate.run.sample_benchmark", lambda *args: pytest.fail("it samples"))
    try:
        status = main(["evaluate", "--model_name_or_path", "policy", "--dataset", "sums.jsonl", *flags])
    except SystemExit as error:  # argparse's own
        status = int(error.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err


def test_vllm_that_is_not_installed(
    policy: Path, judge: Judge, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dc_trl.commands.evaluate.run.load_judge", lambda: judge)
    monkeypatch.setattr("dc_trl.commands.evaluate.vllm_engines.importlib.util.find_spec", lambda name: None)
    assert evaluate() == 2
    assert "pip install 'dc-trl[vllm]'" in capsys.readouterr().err


@pytest.mark.vllm
def test_vllm_casts_nothing_silently(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_policy(policy, dtype="float32")
    assert evaluate() == 2
    assert "stored in float32" in capsys.readouterr().err


def test_the_documentation_has_every_option() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    options = {option for action in make_parser()._actions for option in action.option_strings} - {"-h", "--help"}
    assert set(re.findall(r"^\| `(--\w+)", page, flags=re.MULTILINE)) == options
    assert set(re.findall(r"(?<![\w-])--[a-z]\w+", page)) <= options | {"--model", "--host"}
    for name, benchmark in BENCHMARKS.items():
        assert f"| `{name}` | `{benchmark.dataset}` | {benchmark.split} | {benchmark.problems} |" in page
        assert f"| `{benchmark.problem_column}`, `{benchmark.answer_column}` |" in page


def test_the_readers_load_no_torch() -> None:
    heavy = "{'torch', 'vllm', 'datasets', 'transformers'}"
    code = f"import sys, dc_trl.records.results; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
