# SPDX-License-Identifier: Apache-2.0
"""docs/api.md is what docs/write_api.py makes of the docstrings, and lists what the code has, no more and no less."""

import ast
import dataclasses
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from pages import DOCS, PAGES, README, rows
from runs import dc_trainer
from tiny import tiny_model, tiny_tokenizer
from trl import GRPOConfig

import dc_trl
from dc_trl import DCGRPOConfig, LengthDecayCallback
from dc_trl.commands.cli import COMMANDS
from dc_trl.commands.train.arguments import TrainArguments, find_accelerate_config, make_parser
from dc_trl.constraint import KINDS, DiscrepancyConstraint, DiscrepancyTolerance
from dc_trl.discrepancy import METRICS
from dc_trl.dual import DualVariable
from dc_trl.estimators.importance import ImportanceSampling
from dc_trl.length_decay import LengthSurgeDetector, RateScaler
from dc_trl.rollouts.transformers import TransformersGeneration
from dc_trl.step import Masks, Step
from dc_trl.tasks.rewards import MathAccuracyReward

PURE = (
    "discrepancy",
    "estimators.advantage",
    "estimators.importance",
    "dual",
    "constraint",
    "step",
    "length_decay",
)
# Argument checks that the config shares with the maths.
HELPERS = {"check_period", "check_factor", "check_min_ratio"}
TEXT = (DOCS / "api.md").read_text(encoding="utf-8")


def sections() -> dict[str, str]:
    """Dotted name → the text below its heading."""
    parts = re.split(r"^#+ (.*)$", TEXT, flags=re.MULTILINE)
    titled = zip(parts[1::2], parts[2::2], strict=True)
    return {title.strip("`"): body for title, body in titled if title.startswith("`")}


def resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def documented_signature(body: str) -> inspect.Signature:
    """The signature in the first Python block, its defaults as source text."""
    block = re.search(r"```python\n(.*?)```", body, flags=re.DOTALL)
    assert block, "no signature"
    function = ast.parse(f"def {block[1].strip()}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    kinds = inspect.Parameter
    given = function.args
    defaults = [None] * (len(given.args) - len(given.defaults)) + given.defaults
    listed = [(a, kinds.POSITIONAL_OR_KEYWORD, d) for a, d in zip(given.args, defaults, strict=True)]
    listed += [(given.vararg, kinds.VAR_POSITIONAL, None)] if given.vararg else []
    listed += [(a, kinds.KEYWORD_ONLY, d) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    listed += [(given.kwarg, kinds.VAR_KEYWORD, None)] if given.kwarg else []
    empty = kinds.empty
    return inspect.Signature([kinds(a.arg, k, default=ast.unparse(d) if d else empty) for a, k, d in listed])


def source_of_default(value: Any, module: Any) -> Any:
    if value is inspect.Parameter.empty:
        return value
    constants = {id(v): n for n, v in vars(module).items() if n.isupper()}
    return constants.get(id(value), repr(value)) if isinstance(value, str) else repr(value)


def test_the_page_is_what_the_docstrings_say() -> None:
    assert writer().page() == TEXT, "run `python docs/write_api.py`"


def test_what_has_no_word_is_an_error() -> None:
    def silent(number):  # type: ignore[no-untyped-def]
        return number

    with pytest.raises(LookupError, match="dc_trl.silent has no docstring"):
        writer().docstring(silent, "dc_trl.silent")
    silent.__doc__ = "Says nothing of its parameter."
    with pytest.raises(LookupError, match="dc_trl.silent says nothing of its parameter number"):
        list(writer().parameters(silent, "dc_trl.silent", writer().docstring(silent, "dc_trl.silent")))


@cache
def writer() -> Any:
    spec = importlib.util.spec_from_file_location("write_api", DOCS / "write_api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def callables() -> list[str]:
    return [name for name in sections() if name != "dc_trl.DCGRPOConfig"]


@pytest.mark.parametrize("name", callables())
def test_signatures_are_those_of_the_code(name: str) -> None:
    found = resolve(name)
    module = inspect.getmodule(found)
    parameters = inspect.signature(found).parameters.values()
    plain = [
        p.replace(annotation=inspect.Parameter.empty, default=source_of_default(p.default, module)) for p in parameters
    ]
    documented = documented_signature(sections()[name])
    assert str(documented) == str(inspect.Signature(plain))


@pytest.mark.parametrize("name", callables())
def test_every_parameter_is_explained(name: str) -> None:
    parameters = sections()[name].partition("\nParameters:\n\n")[2].partition("\n\n")[0]
    explained = re.findall(r"^- `([a-z]\w*)`: \S", parameters, flags=re.MULTILINE)
    assert explained == list(inspect.signature(resolve(name)).parameters)


def instances(folder: Path) -> dict[str, Callable[[], Any]]:
    engine = {"accelerator": SimpleNamespace(device=torch.device("cpu"), unwrap_model=lambda m, **_: m)}
    dual = DualVariable(0.1, 1.0, 1.0)
    masks = Masks(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1))
    return {
        "dc_trl.DCGRPOTrainer": lambda: dc_trainer(folder),
        "dc_trl.LengthDecayCallback": LengthDecayCallback,
        "dc_trl.discrepancy.DiscrepancyMetric": lambda: METRICS["prob_diff"],
        "dc_trl.dual.DualVariable": lambda: dual,
        "dc_trl.constraint.ConstraintKind": lambda: KINDS["fixed"],
        "dc_trl.estimators.importance.ImportanceSampling": lambda: ImportanceSampling("token_mask", None, 2.0),
        "dc_trl.step.Masks": lambda: masks,
        "dc_trl.step.Step": lambda: Step(*[torch.zeros(1, 1)] * 2, masks, *[torch.zeros(1, 1)] * 4, None, None),
        "dc_trl.constraint.DiscrepancyTolerance": lambda: DiscrepancyTolerance(None),
        "dc_trl.constraint.DiscrepancyConstraint": lambda: DiscrepancyConstraint(
            "none", dual, DiscrepancyTolerance(1.0)
        ),
        "dc_trl.length_decay.LengthSurgeDetector": LengthSurgeDetector,
        "dc_trl.length_decay.RateScaler": lambda: RateScaler(torch.optim.SGD([torch.zeros(1)]), None),
        "dc_trl.rollouts.transformers.TransformersGeneration": lambda: TransformersGeneration(
            tiny_model(), processing_class=tiny_tokenizer(), **engine
        ),
        "dc_trl.tasks.rewards.MathAccuracyReward": MathAccuracyReward,
    }


@pytest.mark.parametrize("name", [name for name in callables() if inspect.isclass(resolve(name))])
def test_members_are_those_of_the_code(name: str, tmp_path: Path) -> None:
    lines = "\n".join(re.findall(r"^- (`\..*?):", sections()[name], flags=re.MULTILINE))
    documented = {member: signature for member, signature in re.findall(r"`\.(\w+)(?:\((.*?)\))?`", lines)}
    instance = instances(tmp_path)[name]()
    own = {member for member in vars(resolve(name)) if not member.startswith("_")}
    assert own <= set(documented)
    for member, signature in documented.items():
        assert hasattr(instance, member), member
        if signature:
            assert signature.split(", ") == list(inspect.signature(getattr(instance, member)).parameters), member


def test_every_public_name_has_a_section() -> None:
    names = {f"dc_trl.{name}" for name in dc_trl.__all__}
    for module in (importlib.import_module(f"dc_trl.{name}") for name in PURE):
        for name, value in vars(module).items():
            # A package hands out names of its modules.
            is_own = callable(value) and str(getattr(value, "__module__", "")).startswith(module.__name__)
            names |= {f"{module.__name__}.{name}"} if is_own and not name.startswith("_") else set()
    names = {name for name in names if name.rpartition(".")[2] not in HELPERS}
    beyond = {name for name in sections() if not name.startswith(tuple(f"dc_trl.{module}." for module in PURE))}
    assert names - set(sections()) == set()
    assert set(sections()) - names == beyond - {f"dc_trl.{name}" for name in dc_trl.__all__}


def test_the_configuration_table_is_the_config() -> None:
    theirs = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    changed = {
        field.name: field
        for field in dataclasses.fields(DCGRPOConfig)
        if field.name not in theirs or field.default != theirs[field.name]
    }
    table = {cells[0].strip().strip("`"): cells for cells in rows("api.md") if len(cells) == 4}
    del table["field"], table["---"]
    assert set(table) == set(changed)
    for name, field in changed.items():
        assert table[name][1].strip().strip("`") == str(field.default), name
        choices = [str(choice) for choice in field.metadata.get("choices", [])]
        values = re.findall(r"\w+", table[name][2])
        assert sorted(choices) == sorted(values) or not choices, name


@pytest.mark.parametrize("name", writer().BOUNDS)
def test_bounds_are_those_of_the_configuration(name: str, tmp_path: Path) -> None:
    bounds, outside = writer().BOUNDS[name]
    assert bounds in next(cells[2] for cells in rows("api.md") if cells[0].strip() == f"`{name}`")
    options = {"rollout_backend": "transformers", "bf16": False, "length_decay": True, "ess_rate": True}
    # What counts with others alone.
    options |= {"gradient_guard": 10.0, "vllm_importance_sampling_mode": "drpo"}
    DCGRPOConfig(str(tmp_path), **options)
    with pytest.raises(ValueError, match=rf"`{name}`"):
        DCGRPOConfig(str(tmp_path), **(options | {name: outside}))


def test_the_options_of_train_are_its_arguments() -> None:
    fields = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(TrainArguments)
    }
    table = TEXT.partition("| option | default |")[2]
    listed = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", table, flags=re.MULTILINE))
    assert listed == {name: str(default) for name, default in fields.items()}


def test_the_commands_are_those_of_the_command_line() -> None:
    table = TEXT.partition("| command | what it does |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda path: path.name)
def test_commands_on_the_pages_have_options_that_exist(page: Path) -> None:
    known = set(make_parser()._option_string_actions)
    known |= set(launch_command_parser()._option_string_actions)
    for line in re.findall(r"^(?:CUDA_\S+ )?dc-trl train (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        words = line.split()
        assert {word for word in words if word.startswith("--")} - {"--config"} <= known, line
        for name, value in zip(words, words[1:], strict=False):
            assert name != "--config" or (DOCS.parent / value).is_file() or value.isupper(), value
            assert name != "--accelerate_config" or value.isupper() or find_accelerate_config(value).is_file()
