# SPDX-License-Identifier: Apache-2.0
"""`dc-trl evaluate`: arguments, their checks, and the way from benchmarks to table, results.jsonl and model card."""

import argparse
import dataclasses
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dc_trl.commands.evaluate.benchmarks import BENCHMARKS, Benchmark
from dc_trl.commands.evaluate.table import results_table
from dc_trl.commands.usage import UsageError, model_directory
from dc_trl.records.json_lines import parse_json
from dc_trl.records.text import terminal

_LOCAL_SAMPLES = 4


def make_parser() -> argparse.ArgumentParser:
    """The parser of `dc-trl evaluate`."""
    parser = argparse.ArgumentParser(prog="dc-trl evaluate", description="Score a model as the papers do.")
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="Model directory, or model of the Hub.")
    add("--model_revision", help="Revision of a Hub model.")
    add("--benchmarks", help=f"Names with commas, of {','.join(BENCHMARKS)}; default: all, or none with --dataset.")
    add("--dataset", nargs="+", default=[], help="Your problems: .jsonl, .json or .parquet files, or Hub datasets.")
    add("--dataset_config", help="Configuration of --dataset.")
    add("--dataset_split", default="train", help="Split of --dataset; a local file's only split is train.")
    add("--problem_column", help="Column of --dataset; default: prompt, problem or question.")
    add("--answer_column", help="Column of --dataset; default: reward_model, answer or solution.")
    add(
        "--samples",
        type=_positive,
        help=f"Completions a problem; default: the paper's, {_LOCAL_SAMPLES} of --dataset.",
    )
    add("--limit", type=_positive, help="Only the first problems of each benchmark; the result says so.")
    add("--engine", choices=("vllm", "server", "transformers"), default="vllm", help="What samples; default: vllm.")
    add("--vllm_engine_kwargs", type=_mapping, default={}, help='JSON for vllm.LLM, as {"quantization": "fp8"}.')
    add("--server_base_url", default="http://127.0.0.1:8000", help="Of the vLLM server.")
    add("--precision", help="transformers: bf16, fp16, fp8, int8, int4 or int3. server: a word for the record.")
    add("--dtype", default="auto", help="Of the weights as they are loaded: auto, bfloat16, float16 or float32.")
    add("--temperature", type=float, default=0.7)
    add("--top_p", type=float, default=1.0)
    add("--max_tokens", type=_positive, default=32768, help="Of a completion; longer ones count as wrong.")
    add("--seed", type=int, default=0)
    add("--prompt_template", help="User message, with {problem} in it; default: asks for a boxed answer, as training.")
    add(
        "--prompt_format",
        choices=("auto", "chat", "plain"),
        default="auto",
        help="By the model's chat template, or as text; default: chat where it has one. As it was trained.",
    )
    add("--batch_size", type=_positive, help="Sequences at once: transformers 32, server 256; vLLM sees to it itself.")
    add("--output_dir", help="Default: MODEL/evaluation of a directory, else outputs/evaluation/MODEL.")
    add("--save_completions", action="store_true", help="Record the texts too.")
    add("--model_card", help="Card to write the scores into; default: README.md of a model directory.")
    add("--push_to_hub", action="store_true", help="Write the scores into the card of the Hub's repository.")
    add("--hub_model_id", help="The repository; default: the model, where it is one of the Hub.")
    return parser


def evaluate_command(argv: Sequence[str]) -> int:
    """`dc-trl evaluate`: samples, judges, prints the table and records the scores. Returns the exit status.

    Raises:
        UsageError: for what cannot be carried out; as far as possible before a model loads.
    """
    args: Any = make_parser().parse_args(argv)
    benchmarks = chosen_benchmarks(args)
    local, card = _check(args)
    folder = Path(args.output_dir or _default_folder(args.model_name_or_path, local))
    from dc_trl.commands.evaluate.run import Evaluation, load_judge

    try:
        evaluation = Evaluation(args, folder, load_judge())
        loaded = evaluation.load(benchmarks)
        _check_writable(folder)
        results = [evaluation.run(benchmark, problems) for benchmark, problems in loaded]
    except ConnectionError as error:
        raise UsageError(f"{error}. Samples so far are kept: the same command draws only the rest.") from error
    except KeyboardInterrupt:
        print("Interrupted. Samples so far are kept: the same command draws only the rest.", file=sys.stderr)
        return 130
    print(results_table(results))
    _publish(args, card, results)
    return 0


def chosen_benchmarks(args: Any) -> list[Benchmark]:
    """The benchmarks that the arguments name.

    Raises:
        UsageError: for a name that is none, or that two benchmarks have.
    """
    from dc_trl.tasks.data import FORMATS

    names = args.benchmarks.split(",") if args.benchmarks else [] if args.dataset else list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise UsageError(f"--benchmarks has {unknown[0]!r}: it must be of {', '.join(BENCHMARKS)}.")
    chosen = [BENCHMARKS[name] for name in names]
    for dataset in args.dataset:
        path = Path(dataset).absolute()
        name = path.stem if path.suffix in FORMATS else path.name
        known = BENCHMARKS.get(name, Benchmark(name, name, "", _LOCAL_SAMPLES))
        chosen.append(
            Benchmark(
                name=name,
                title=known.title,
                dataset=dataset,
                samples=known.samples,
                split=args.dataset_split,
                config=args.dataset_config,
                problem_column=args.problem_column,
                answer_column=args.answer_column,
                problems=known.problems,
            )
        )
    name, count = Counter(benchmark.name for benchmark in chosen).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{count} benchmarks are named {name}, and a result is known by its name: rename the file.")
    return [dataclasses.replace(benchmark, samples=args.samples or benchmark.samples) for benchmark in chosen]


def _check(args: Any) -> tuple[bool, Path | None]:
    """Whether the model is a directory, and the card to write, if any."""
    from dc_trl.records.card.model_index import check_card
    from dc_trl.tasks.data import DatasetError, local_path

    name = args.model_name_or_path
    local = model_directory(name) is not None
    if not args.temperature > 0 or not 0 < args.top_p <= 1:
        raise UsageError(
            f"--temperature is {args.temperature} and --top_p {args.top_p}: avg@n needs a temperature above 0 and a "
            "top_p above 0 and at most 1."
        )
    if args.prompt_template and "{problem}" not in args.prompt_template:
        raise UsageError("--prompt_template has no {problem} in it.")
    if args.push_to_hub and local and not args.hub_model_id:
        raise UsageError("--push_to_hub of a model directory needs --hub_model_id OWNER/NAME.")
    card = Path(args.model_card) if args.model_card else Path(name, "README.md") if local else None
    try:
        for dataset in args.dataset:
            local_path(dataset)
        if card:
            check_card(card)
    except (DatasetError, ValueError) as error:
        raise UsageError(str(error)) from error
    return local, card


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"nothing can be written to {folder}: {error}. Name another with --output_dir.") from error


def _publish(args: Any, card: Path | None, results: list[dict[str, Any]]) -> None:
    from dc_trl.records.card.model_index import push_results, update_card

    if card:
        try:
            update_card(card, Path(args.model_name_or_path).resolve().name, results)
        except OSError as error:
            raise UsageError(
                f"the scores are recorded, but the model card cannot be written: {error}. Name another with "
                "--model_card; nothing is drawn again."
            ) from error
        print(f"model card: {terminal(card)}")
    if args.push_to_hub:
        repository = args.hub_model_id or args.model_name_or_path
        try:
            print(f"model card: {terminal(push_results(repository, results))}")
        except Exception as error:  # the Hub's client raises many kinds: no network, no token, no such repository
            raise UsageError(
                f"the scores are recorded, but could not be written to {repository} on the Hub: {error}. The same "
                "command draws nothing again."
            ) from error


def _default_folder(model: str, local: bool) -> str:
    return f"{model}/evaluation" if local else f"outputs/evaluation/{model.replace('/', '--')}"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} must be a JSON mapping")
    return value
