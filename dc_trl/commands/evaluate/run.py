# SPDX-License-Identifier: Apache-2.0
"""One model under one set of settings, benchmark after benchmark: what `dc-trl evaluate` does between its arguments
and the table."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from dc_trl.commands.evaluate.benchmarks import Benchmark, Problem, load_problems, short_hash
from dc_trl.commands.evaluate.engines import Engine, Sampling, TransformersEngine
from dc_trl.commands.evaluate.sampling import Judge, SampleFile, planned_draws, sample_benchmark
from dc_trl.commands.evaluate.scoring import summarize
from dc_trl.commands.evaluate.vllm_engines import ServerEngine, VLLMEngine
from dc_trl.commands.usage import UsageError
from dc_trl.records.results import append_result, score
from dc_trl.records.text import terminal
from dc_trl.tasks.data import BOXED_TEMPLATE, DatasetError
from dc_trl.tasks.prompts import PromptFormatError, prompt_ids, resolve_prompt_format

# What a model directory's samples depend on, beside its weights.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class Evaluation:
    """One model under one set of settings, benchmark after benchmark.

    Args:
        args: the parsed arguments.
        folder: for results.jsonl and the samples.
        judge: verdicts on texts against gold answers.

    Raises:
        UsageError: the model's configuration or tokenizer cannot be loaded, it has no chat template where one is asked
            for, or the engine cannot be had.
    """

    def __init__(self, args: Any, folder: Path, judge: Judge) -> None:
        self.args, self.folder, self.judge = args, folder, judge
        self.template = args.prompt_template or BOXED_TEMPLATE
        self.config, self.tokenizer = _load_config_and_tokenizer(args)
        self.prompt_format = _prompt_format(args, self.tokenizer)
        self.engine = make_engine(args, self.config, self.tokenizer)

    def load(self, benchmarks: list[Benchmark]) -> list[tuple[Benchmark, list[Problem]]]:
        """The benchmarks with their problems, all of them before anything is sampled.

        Raises:
            UsageError: a dataset cannot be loaded.
        """
        try:
            plain = self.prompt_format == "plain"
            return [(each, load_problems(each, self.template, self.args.limit, plain)) for each in benchmarks]
        except DatasetError as error:
            raise UsageError(str(error)) from error

    def run(self, benchmark: Benchmark, problems: list[Problem]) -> dict[str, Any]:
        """Samples a benchmark, appends its result to results.jsonl and returns it.

        Raises:
            UsageError: a prompt leaves no room for a completion, the chat template does not take it, or the file of
                samples cannot be used.
        """
        if benchmark.problems and len(problems) != min(self.args.limit or benchmark.problems, benchmark.problems):
            print(
                terminal(
                    f"{benchmark.name}: {benchmark.dataset} has {len(problems)} problems, not {benchmark.problems}."
                )
            )
        prompts = {problem.index: self._tokens(problem) for problem in problems}
        max_tokens = self._room(benchmark, max(map(len, prompts.values())))
        limit = self.args.limit if len(problems) == self.args.limit else None
        draws = planned_draws(problems, benchmark.samples, self.args.seed)
        settings = self._settings(benchmark, max_tokens, limit)
        with SampleFile(self.folder / "samples", benchmark.name, settings) as file:
            records = sample_benchmark(
                draws, prompts, self.engine, max_tokens, file, self.judge, self.args.save_completions
            )
        result = self._result(benchmark, max_tokens, limit, file.key) | summarize(records)
        append_result(self.folder, result)
        scored = f"{benchmark.title}, {result['metric']}: {score(result['mean'], result['stderr'])} %"
        print(terminal(scored), flush=True)
        return result

    def _tokens(self, problem: Problem) -> list[int]:
        from jinja2 import TemplateError

        try:
            return prompt_ids(self.tokenizer, problem.prompt)
        except TemplateError as error:
            raise UsageError(f"the model's chat template does not take problem {problem.index}: {error}.") from error

    def _room(self, benchmark: Benchmark, longest: int) -> int:
        """The token limit of a completion: the one asked for, or what the model's context leaves of it."""
        room = self.engine.context - longest
        if room < 1:
            raise UsageError(
                f"{benchmark.name}: a prompt of {longest} tokens fills the context of {self.engine.context} tokens. "
                "Use a shorter --prompt_template, or a model or an engine with a longer context."
            )
        if room < self.args.max_tokens:
            print(
                f"{terminal(benchmark.name)}: completions are limited to {room} tokens instead of --max_tokens "
                f"{self.args.max_tokens}: the context has {self.engine.context} and the longest prompt {longest}.",
                flush=True,
            )
        return min(room, self.args.max_tokens)

    def _settings(self, benchmark: Benchmark, max_tokens: int, limit: int | None) -> dict[str, Any]:
        """Everything that decides what is drawn, except the problems, which are recorded with each sample."""
        args = self.args
        model = args.model_name_or_path
        settings = {
            "temperature": args.temperature,
            "top_p": args.top_p,
            "seed": args.seed,
            "model": None if Path(model).is_dir() else model,
            "weights": weights_identity(model, args.model_revision),
            "engine": self.engine.name,
            "precision": self.engine.precision,
            "options": self.engine.options,
            "max_tokens": max_tokens,
            "prompt_template": self.template,
            "dataset": _dataset_name(benchmark),
        }
        if self.prompt_format == "plain":  # what was sampled before there was a choice keeps its name
            settings |= {"prompt_format": "plain"}
        if self.engine.batch_size is not None:  # then the grouping into batches decides too
            settings |= {"samples": benchmark.samples, "limit": limit}
        return settings

    def _result(self, benchmark: Benchmark, max_tokens: int, limit: int | None, key: str) -> dict[str, Any]:
        args = self.args
        return {
            "benchmark": benchmark.name,
            "title": benchmark.title,
            "dataset": _dataset_name(benchmark),
            "config": benchmark.config,
            "split": benchmark.split,
            "metric": f"avg@{benchmark.samples}",
            "samples": benchmark.samples,
            "limit": limit,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "max_tokens": max_tokens,
            "seed": args.seed,
            "engine": self.engine.name,
            "precision": self.engine.precision,
            "options": self.engine.options,
            "prompt_template": self.template,
            "prompt_format": self.prompt_format,
            "model": args.model_name_or_path,
            "model_revision": args.model_revision,
            "settings": short_hash([key, benchmark.samples, limit]),
            "samples_file": f"samples/{benchmark.name}-{key}.jsonl",
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def make_engine(args: Any, config: Any, tokenizer: Any) -> Engine:
    """The engine that the arguments name, not yet started.

    Raises:
        UsageError: vLLM is not installed, the server does not answer, or an option is not the engine's.
    """
    sampling = Sampling(args.temperature, args.top_p)
    model = args.model_name_or_path
    revision = args.model_revision
    if args.engine == "vllm":
        if args.precision:
            raise UsageError(
                f"--precision {args.precision} is for the other engines. For vLLM: --vllm_engine_kwargs "
                '\'{"quantization": "fp8"}\', --dtype, or a quantised checkpoint.'
            )
        return VLLMEngine(model, config, sampling, revision, args.dtype, args.vllm_engine_kwargs)
    if args.vllm_engine_kwargs:
        raise UsageError(f"--vllm_engine_kwargs is for --engine vllm, not {args.engine}.")
    if args.engine == "server":
        precision = args.precision or "as served"
        return ServerEngine(args.server_base_url, model, sampling, args.batch_size or 256, precision)
    size = args.batch_size or 32
    return TransformersEngine(model, config, tokenizer, sampling, args.precision, size, revision, args.dtype)


def load_judge() -> Judge:
    """math-verify in processes of its own: the verdict on each text; None where the gold cannot be parsed.

    Raises:
        UsageError: math-verify is not installed, or does not work.
    """
    from dc_trl.tasks.rewards import REWARDS, MathAccuracyReward

    try:
        reward = MathAccuracyReward()
    except ImportError as error:
        raise UsageError(str(error)) from error

    def judge(texts: list[str], golds: list[str]) -> list[bool | None]:
        rewards = (REWARDS[verdict] for verdict in reward.verdicts(texts, golds))
        return [None if value is None else value == 1.0 for value in rewards]

    return judge


def weights_identity(model: str, revision: str | None = None) -> str | None:
    """What tells two states of a model apart: a Hub model's commit, a directory's files with sizes and times.

    The commit is that of the configuration in the Hub's cache, loaded before. None where there is none.
    """
    if not Path(model).is_dir():
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
        # The cache keeps a file as snapshots/COMMIT/name.
        return Path(cached).parent.name if isinstance(cached, str) else None
    files = sorted(Path(model).iterdir())
    kept = [path for path in files if path.suffix in (".safetensors", ".bin") or path.name in _MODEL_FILES]
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in kept]
    return short_hash([state for state in states if state[0] != "training_args.bin"])


def _dataset_name(benchmark: Benchmark) -> str:
    """A Hub dataset's name; of a local one the last part, so that no directory gets into a model card."""
    path = Path(benchmark.dataset).expanduser()
    return path.name if path.exists() else benchmark.dataset


def _load_config_and_tokenizer(args: Any) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    name = args.model_name_or_path
    if Path(name, "adapter_config.json").is_file() and not Path(name, "config.json").is_file():
        raise UsageError(
            f"{name} holds a PEFT adapter, not a whole model: merge it (`merge_and_unload`), save the merged model "
            "and its tokenizer with `save_pretrained`, and name that directory."
        )
    try:
        config = AutoConfig.from_pretrained(name, revision=args.model_revision)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=args.model_revision)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load configuration and tokenizer of {name}: {error}") from error
    return config, tokenizer


def _prompt_format(args: Any, tokenizer: Any) -> str:
    """The format of the prompts, chat or plain; says so where nobody asked for plain ones."""
    try:
        found = resolve_prompt_format(args.prompt_format, tokenizer, args.model_name_or_path)
    except PromptFormatError as error:
        raise UsageError(str(error)) from error
    if found == "plain" and args.prompt_format == "auto":
        name = terminal(args.model_name_or_path)
        print(f"The tokenizer of {name} has no chat template, so prompts are plain text.", flush=True)
    return found
