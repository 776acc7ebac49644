# SPDX-License-Identifier: Apache-2.0
"""What the package uses of TRL, transformers and Accelerate without their word for it, read from its source by `ast`.

A seam is a name that a release of theirs may change without a word:

- a method of theirs that a class of this package overrides;
- an attribute or method of one of their objects that is read, set or swapped, and that they document nowhere: its
  class lies within the package instead of at its top, or it is no parameter of the constructor, the class's docstring
  does not list it, and it has no docstring of its own;
- any name with a leading underscore that this package does not define itself, whoever's it is;
- what is imported from within one of the three packages, and what is swapped in a module of theirs.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

from accelerate import Accelerator
from places import ROOT
from trl import GRPOTrainer, TrlParser
from trl.distributed import DistributedBackend
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

SOURCES = sorted((ROOT / "dc_trl").rglob("*.py"))
PACKAGES = ("trl", "transformers", "accelerate")

OWNERS = {
    "GRPOTrainer": GRPOTrainer,
    "VLLMGeneration": VLLMGeneration,
    "VLLMClient": VLLMClient,
    "DistributedBackend": DistributedBackend,
    "Accelerator": Accelerator,
    "TrlParser": TrlParser,
}
# By what expressions the package speaks of their objects. `self` and `super()` are those of the class at hand.
EXPRESSIONS = {
    "trainer": "GRPOTrainer",
    "self.trainer": "GRPOTrainer",
    "engine": "VLLMGeneration",
    "trainer.vllm_generation": "VLLMGeneration",
    "self.vllm_generation": "VLLMGeneration",
    "self.vllm_client": "VLLMClient",
    "client": "VLLMClient",
    "backend": "DistributedBackend",
    "accelerator": "Accelerator",
    "self.accelerator": "Accelerator",
    "engine.accelerator": "Accelerator",
    "trainer.accelerator": "Accelerator",
    "parser": "TrlParser",
}
ELSEWHERE = "elsewhere"


def seams() -> dict[str, set[str]]:
    """Every seam by whose it is; `elsewhere` has private names of other objects, and what lies within the packages."""
    found: dict[str, set[str]] = defaultdict(set)
    own = _own_names()
    for path in SOURCES:
        tree = _tree(path)
        found[ELSEWHERE] |= set(_imports(tree)) | set(_swapped_in_modules(tree))
        for scope, owner in _scopes(tree):
            for expression, name in _used(scope):
                whose = owner if expression in ("self", "super()") else EXPRESSIONS.get(expression)
                if name.startswith("__"):
                    continue
                if whose in OWNERS and name in _attributes(OWNERS[whose]):
                    if name.startswith("_") or not _is_documented(OWNERS[whose], name):
                        found[whose].add(name)
                elif name.startswith("_") and name not in own:
                    found[ELSEWHERE].add(name)
    for owner, names in overrides().items():
        found[owner] |= names
    return {owner: names for owner, names in found.items() if names}


def overrides() -> dict[str, set[str]]:
    """The methods and class attributes of theirs that classes of this package override, by whose they are."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in SOURCES:
        for scope, owner in _scopes(_tree(path)):
            if owner is not None and isinstance(scope, ast.ClassDef):
                names = {node.name for node in scope.body if isinstance(node, ast.FunctionDef)}
                names |= {
                    target.id
                    for node in scope.body
                    if isinstance(node, ast.Assign)
                    for target in node.targets
                    if isinstance(target, ast.Name)
                }
                found[owner] |= {name for name in names & _attributes(OWNERS[owner]) if not name.startswith("__")}
    return found


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _scopes(tree: ast.Module) -> Iterator[tuple[ast.AST, str | None]]:
    """Each class of a file with the class of theirs that it extends, and the rest of the file."""
    for node in tree.body:
        yield node, _extended(node) if isinstance(node, ast.ClassDef) else None


@cache
def _extended(node: ast.ClassDef) -> str | None:
    """Which class of theirs a class extends: by its bases, or, for a mixin, by the private methods of its parent."""
    bases = {ast.unparse(base) for base in node.bases}
    for owner in OWNERS:
        if owner in bases:
            return owner
    for path in SOURCES:
        for parent in _tree(path).body:
            if isinstance(parent, ast.ClassDef) and parent.name in bases:
                return _extended(parent)
    called = {name for expression, name in _used(node) if expression == "super()" and name.startswith("_")}
    called = {name for name in called if not name.startswith("__")}
    return next((owner for owner, kind in OWNERS.items() if called & _attributes(kind)), None)


def _used(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """`(object as source, attribute)` of every attribute that is read, set, swapped, or asked for by its name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            target = ast.unparse(node.args[0])
            if node.func.id == "temporary_attributes":
                yield from ((target, keyword.arg) for keyword in node.keywords if keyword.arg)
            elif node.func.id in ("getattr", "setattr", "hasattr") and isinstance(node.args[1], ast.Constant):
                yield target, str(node.args[1].value)


def _imports(tree: ast.Module) -> Iterator[str]:
    """`package.module.name` of what is imported from within one of the packages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.count(".") > 0:
            if node.module.split(".")[0] in PACKAGES:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _swapped_in_modules(tree: ast.Module) -> Iterator[str]:
    """`package.module.name` of what is replaced in a module that was imported from within one of the packages."""
    modules = {name.rpartition(".")[2]: name for name in _imports(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            module = modules.get(ast.unparse(node.value))
            if module is not None:
                yield f"{module}.{node.attr}"


@cache
def _own_names() -> frozenset[str]:
    """Names that the package defines: functions, classes, variables, attributes that it sets on its own objects."""
    found: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return frozenset(found)


@cache
def _attributes(kind: type) -> frozenset[str]:
    """What instances of a class have: methods, class attributes, and what the methods assign to `self`."""
    found = set(dir(kind))
    for base in kind.__mro__[:-1]:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # built in
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    found.add(node.attr)
    return frozenset(found)


def _is_documented(kind: type, name: str) -> bool:
    if getattr(import_module(kind.__module__.partition(".")[0]), kind.__name__, None) is not kind:
        return False
    if name in inspect.signature(kind.__init__).parameters:
        return True
    for base in kind.__mro__[:-1]:
        if base.__module__.partition(".")[0] in sys.stdlib_module_names and hasattr(base, name):
            return True
        # An entry of an argument or attribute list, as "- **model** -- …" or "model (`PreTrainedModel`): …".
        if re.search(rf"^\s*(- )?(\*\*|`)?{name}(\*\*|`)?\s*(\(|:|--)", base.__doc__ or "", flags=re.MULTILINE):
            return True
    member = inspect.getattr_static(kind, name, None)
    return (inspect.isroutine(member) or isinstance(member, property)) and bool(inspect.getdoc(member))
