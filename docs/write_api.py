# SPDX-License-Identifier: Apache-2.0
"""Writes docs/api.md from the docstrings, signatures and options of the package; a test holds that it was run.

    python docs/write_api.py

A docstring is Markdown in Google's sections: `Args`, `Attributes`, `Returns`, `Raises`. What it lacks, a parameter or
a member without a word, is an error here that names it.
"""

import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trl import GRPOConfig

from dc_trl import DCGRPOConfig
from dc_trl.commands.cli import COMMANDS
from dc_trl.commands.train.arguments import TrainArguments

PAGE = Path(__file__).with_name("api.md")

INTRO = """# API

Every public name: signature, shapes, errors. This page is written by `python docs/write_api.py` from the docstrings.
The names under [dc_trl](#dc_trl), and `token_discrepancy`, `discrepancy_metrics`, `DualVariable`,
`LengthSurgeDetector` and the command `dc-trl`, stay as they are within a minor version. The others may change with a
note in the changelog. What is not listed is internal.

Shapes: B sequences, T completion tokens, G completions a group, N completions of a generation batch, K numbers of a
summary. π is a token's probability under the training engine, μ under the sampling engine; log-probs are natural
logarithms. A token is *valid* if it is unmasked and both engines scored it (`dc_trl.discrepancy.is_scored`)."""

# Heading → (what to know of it, the names under it).
CONTENTS = {
    "dc_trl": ("", ["dc_trl.DCGRPOTrainer", "dc_trl.DCGRPOConfig", "dc_trl.LengthDecayCallback"]),
    "dc_trl.discrepancy": (
        "Needs torch alone.",
        [
            "dc_trl.discrepancy.token_discrepancy",
            "dc_trl.discrepancy.DiscrepancyMetric",
            "dc_trl.discrepancy.discrepancy_metrics",
            "dc_trl.discrepancy.is_scored",
            "dc_trl.discrepancy.valid_tokens",
            "dc_trl.discrepancy.trajectory_mean",
            "dc_trl.discrepancy.summarise",
            "dc_trl.discrepancy.combine",
            "dc_trl.discrepancy.mean_discrepancy",
            "dc_trl.discrepancy.metrics",
            "dc_trl.discrepancy.correction_metrics",
        ],
    ),
    "dc_trl.estimators": (
        "Need torch alone.",
        [
            "dc_trl.estimators.advantage.rloo_advantages",
            "dc_trl.estimators.advantage.zero_variance_groups",
            "dc_trl.estimators.importance.importance_sampling_ratio",
            "dc_trl.estimators.importance.ImportanceSampling",
        ],
    ),
    "dc_trl.dual and dc_trl.constraint": (
        "The dual variable is plain Python; the constraint needs torch.",
        [
            "dc_trl.dual.DualVariable",
            "dc_trl.constraint.discrepancy_penalty",
            "dc_trl.constraint.penalised_advantages",
            "dc_trl.constraint.ConstraintKind",
            "dc_trl.constraint.DiscrepancyTolerance",
            "dc_trl.constraint.DiscrepancyConstraint",
            "dc_trl.constraint.penalty_notices",
        ],
    ),
    "dc_trl.step": ("Needs torch alone.", ["dc_trl.step.constrain", "dc_trl.step.Step", "dc_trl.step.Masks"]),
    "dc_trl.length_decay": (
        "Plain Python.",
        [
            "dc_trl.length_decay.LengthSurgeDetector",
            "dc_trl.length_decay.length_decay_scale",
            "dc_trl.length_decay.decay_period",
            "dc_trl.length_decay.RateScaler",
        ],
    ),
    "Engines, rewards, data": (
        "",
        [
            "dc_trl.rollouts.transformers.TransformersGeneration",
            "dc_trl.tasks.rewards.MathAccuracyReward",
            "dc_trl.tasks.data.load_math_dataset",
        ],
    ),
}

# What a number may be, and one that it may not be.
BOUNDS: dict[str, tuple[str, float]] = {
    "discrepancy_tolerance": ("≥ 0", -0.1),
    "tolerance_slack": ("≥ 0", -0.1),
    "tolerance_calibration_batches": ("≥ 1", 0),
    "multiplier_init": ("0 to `multiplier_max`", 1.1),
    "multiplier_max": ("≥ 0", -0.1),
    "dual_lr": ("≥ 0", -0.1),
    "drpo_limit": ("> 0", 0.0),
    "length_decay_period": ("≥ 1", 0),
    "length_surge_ratio": ("> 1", 1.0),
    "length_decay_factor": ("> 0", 0.0),
    "length_decay_min_lr_ratio": ("above 0, at most 1", 1.1),
    "ess_rate_reference": ("above 0, at most 1", 1.1),
    "ess_rate_min_scale": ("above 0, at most 1", 0.0),
    "gradient_guard": ("> 1, or `inf`", 1.0),
    "gradient_guard_patience": ("≥ 1", 0),
}

# Where a field is explained.
MORE = {
    "discrepancy_tolerance": "tuning.md",
    "multiplier_max": "tuning.md",
    "rejection": "method.md#rejection-and-what-else-controls-the-update",
    "vllm_importance_sampling_mode": "method.md#rejection-and-what-else-controls-the-update",
    "gradient_guard": "method.md#steps-that-are-left-out",
    "router_replay": "engines.md#router-replay",
    "weight_sync": "engines.md#a-vllm-server",
    "sync_rounding": "engines.md#rounding-at-the-weight-sync",
}

COMMAND_LINE = """## The command line

    dc-trl [--version] COMMAND …

Exit status 0, or 2 for a command that cannot be carried out as given, with the reason on standard error. `calibrate`
has [one more](calibration.md).

{commands}

Pages: [calibrate](calibration.md), [evaluate](evaluation.md), [report](report.md),
[export](engines.md#saving-what-samples).

`dc-trl train` takes `--config FILE.yaml`, every field of `DCGRPOConfig` and of TRL's `ModelConfig` as a flag or a key
of the file, and those below. A flag wins over the file. An unknown option is an error with the nearest known name;
with `--accelerate_config` it goes to Accelerate's launcher. `--help` is a page of the usual options; `--help-all`
lists every one, for `dc-trl calibrate` too.

{options}
"""

SECTION_NAMES = ("Args", "Attributes", "Returns", "Raises", "Yields")
# What of a docstring is for whoever changes the class: seams.md has the seams.
FOR_DEVELOPERS = re.compile(r"Seams of TRL .*?(?=\n\n(?!- ))", flags=re.DOTALL)


@dataclasses.dataclass
class Docstring:
    """A docstring in its parts.

    Args:
        text: what comes before the sections, Markdown.
        sections: by their names, their text without its indentation.
    """

    text: str
    sections: dict[str, str]

    def items(self, section: str) -> dict[str, str]:
        """`name: text` entries of a section; "a, b: text" is one for each of them."""
        found: dict[str, str] = {}
        entries = re.split(r"\n(?=\S)", self.sections.get(section, "").strip())
        for entry in filter(None, entries):
            names, _, text = entry.partition(": ")
            for name in re.sub(r"\s*\(.*?\)$", "", names).split(", "):
                found[name.strip("`* ")] = one_line(text)
        return found


def docstring(thing: Any, what: str) -> Docstring:
    """The parts of a docstring; an error if there is none."""
    whole = FOR_DEVELOPERS.sub("", inspect.getdoc(thing) or "")
    if not whole:
        raise LookupError(f"{what} has no docstring")
    parts = re.split(rf"^({'|'.join(SECTION_NAMES)}):$", whole, flags=re.MULTILINE)
    sections = {name: inspect.cleandoc("\n" + body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}
    return Docstring(references(parts[0].strip()), {name: references(body) for name, body in sections.items()})


def references(text: str) -> str:
    """Without the brackets of doc-builder's references: [`~trl.GRPOTrainer`] is `GRPOTrainer`."""
    return re.sub(r"\[`~?(?:[\w.]*\.)?(\w+)`\](?!\()", r"`\1`", text)


def one_line(text: str) -> str:
    return " ".join(text.split())


def resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def signature(found: Any, name: str) -> str:
    """`name(parameters) -> type` as in the source, without annotations of parameters."""
    own = inspect.signature(found)
    module = inspect.getmodule(found)
    parts, keywords = [], False
    for parameter in own.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            parts, keywords = [*parts, "*"], True
        keywords = keywords or parameter.kind is parameter.VAR_POSITIONAL
        parts.append(_parameter(parameter, module))
    returned = "" if inspect.isclass(found) else f" -> {annotation(own.return_annotation)}"
    line = f"{name}({', '.join(parts)}){returned}"
    if len(line) <= 110:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returned}"


def _parameter(parameter: inspect.Parameter, module: Any) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    if parameter.default is parameter.empty:
        return stars + parameter.name
    default = parameter.default
    constants = {id(value): name for name, value in vars(module).items() if name.isupper()}
    shown = constants.get(id(default), repr(default)) if isinstance(default, str) else repr(default)
    return f"{parameter.name}={shown.replace(chr(39), chr(34))}"


def annotation(of: Any) -> str:
    """A type as a reader names it."""
    if isinstance(of, types.UnionType) or typing.get_origin(of) is typing.Union:
        return " or ".join(annotation(each) for each in typing.get_args(of))
    if typing.get_args(of):
        inner = ", ".join(annotation(each) for each in typing.get_args(of))
        return f"{annotation(typing.get_origin(of))}[{inner}]"
    if of is type(None):
        return "None"
    return getattr(of, "__name__", str(of).rpartition(".")[2])


def section(name: str) -> Iterator[str]:
    """The lines about one name."""
    found = resolve(name)
    yield from (f"### `{name}`", "")
    doc = docstring(found, name)
    if found is not DCGRPOConfig:  # its parameters are the table's
        yield from ("```python", signature(found, name.rpartition(".")[2]), "```", "")
    yield from (doc.text, "")
    if found is not DCGRPOConfig:
        yield from parameters(found, name, doc)
    for kind in ("Returns", "Yields"):
        if kind in doc.sections:
            yield from (f"{kind}: {one_line(doc.sections[kind])}", "")
    yield from raised(doc)
    if inspect.isclass(found) and found is not DCGRPOConfig:
        yield from ("Attributes and methods:", "", *members(found, name, doc), "")
    if found is DCGRPOConfig:
        yield from (fields_table(), "")


def parameters(found: Any, name: str, doc: Docstring) -> Iterator[str]:
    """A line for each parameter, in the signature's order."""
    yield from ("Parameters:", "")
    described = (doc.items("Attributes") if record_fields(found) else {}) | doc.items("Args")
    for parameter in inspect.signature(found).parameters:
        if parameter not in described:
            raise LookupError(f"{name} says nothing of its parameter {parameter}")
        yield f"- `{parameter}`: {described[parameter]}"
    yield ""


def raised(doc: Docstring) -> Iterator[str]:
    if "Raises" in doc.sections:
        lines = [f"`{error}`: {text.rstrip('.')}." for error, text in doc.items("Raises").items()]
        yield from ("Raises " + " ".join(lines), "")


def members(found: type, name: str, doc: Docstring) -> Iterator[str]:
    """A line for each public member that the package gives the class: attributes, then methods and properties."""
    given = set(inspect.signature(found).parameters)
    described = {key: text for key, text in doc.items("Attributes").items() if key not in given}
    own = {key: value for base in reversed(found.__mro__) if _is_ours(base) for key, value in vars(base).items()}
    fields = record_fields(found)
    if fields:
        yield f"- {', '.join(f'`.{field}`' for field in fields)}: as given."
    for key, text in described.items():
        yield f"- `.{key}`: {text}"
    for key, value in own.items():
        if key == "__call__":
            yield f"- Called with {', '.join(f'`{each}`' for each in _named(value))}: {_summary(value, f'{name}()')}"
        if key.startswith("_") or key in fields or key in described or not _is_member(value):
            continue
        yield f"- `.{key}{_call(value)}`: {_summary(value, f'{name}.{key}')}"


def record_fields(found: Any) -> list[str]:
    """The fields of a dataclass or a named tuple; none of anything else."""
    if dataclasses.is_dataclass(found):
        return [field.name for field in dataclasses.fields(found)]
    return list(getattr(found, "_fields", ()))


def _is_ours(base: type) -> bool:
    return base.__module__.partition(".")[0] == "dc_trl"


def _is_member(value: Any) -> bool:
    return inspect.isroutine(value) or isinstance(value, (property, classmethod, staticmethod))


def _call(value: Any) -> str:
    """The parameters in parentheses; nothing where the method hands on whatever its parent takes."""
    if isinstance(value, property):
        return ""
    given = list(inspect.signature(value).parameters.values())[1:]
    if any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) or each.name.startswith("_") for each in given):
        return ""
    return f"({', '.join(each.name for each in given)})"


def _named(value: Any) -> list[str]:
    """The parameters that a method has a name for."""
    given = list(inspect.signature(value).parameters.values())[1:]
    return [each.name for each in given if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


def _summary(value: Any, what: str) -> str:
    """A member's docstring without its parameters, on one line."""
    doc = docstring(value.fget if isinstance(value, property) else value, what)
    returned = [f"Returns: {one_line(doc.sections['Returns'])}"] if "Returns" in doc.sections else []
    return " ".join([one_line(doc.text), *returned, *filter(None, raised(doc))])


def fields_table() -> str:
    """The fields of the configuration that TRL has not, or with other defaults."""
    theirs = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    hints = typing.get_type_hints(DCGRPOConfig)
    rows = []
    for field in dataclasses.fields(DCGRPOConfig):
        if field.name in theirs and field.default == theirs[field.name]:
            continue
        choices = [f"`{choice}`" if choice is not None else "None" for choice in field.metadata.get("choices", [])]
        values = ", ".join(choices) or _numbers(field.name, annotation(hints[field.name]))
        note = " TRL's default differs." if field.name in theirs else ""
        more = f" [More]({MORE[field.name]})." if field.name in MORE else ""
        rows.append([f"`{field.name}`", f"`{field.default}`", values, field.metadata["help"] + note + more])
    return table(["field", "default", "values", "what it does"], rows)


def _numbers(name: str, of: str) -> str:
    """The bounds of a field in the place of `float` or `int`."""
    bounds = BOUNDS.get(name, ("", 0))[0]
    return re.sub("float|int", bounds, of, count=1) if bounds else of


def options_table() -> str:
    """The options of `dc-trl train` that are neither the configuration's nor the model's."""
    rows = []
    for field in dataclasses.fields(TrainArguments):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        rows.append([f"`{field.name}`", f"`{default}`", field.metadata["help"]])
    return table(["option", "default", "what it does"], rows)


def commands_table() -> str:
    return table(["command", "what it does"], [[f"`{name}`", text] for name, (text, _) in COMMANDS.items()])


def table(head: list[str], rows: list[list[str]]) -> str:
    escaped = [[one_line(cell).replace("|", "\\|") for cell in row] for row in [head, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def page() -> str:
    """The whole of api.md."""
    lines = [INTRO, ""]
    for heading, (intro, names) in CONTENTS.items():
        lines += [f"## {heading}", "", *filter(None, [intro]), *([""] if intro else [])]
        for name in names:
            lines += section(name)
    lines.append(COMMAND_LINE.format(commands=commands_table(), options=options_table()))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
