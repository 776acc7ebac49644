# SPDX-License-Identifier: Apache-2.0
"""The package as rooms on floors: arrows point downwards, there is no circle, and nothing loads before it is needed.

An arrow is any import of one module by another: at the top, inside a function, for the type checker alone, or by a
string that names a module, as the table of commands has. Importing a module runs the `__init__` of its packages too; a
package that hands out names of its own modules makes no circle, unless one of them asks the package for a name.
"""

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from places import ROOT
from processes import run_python

PACKAGE = ROOT / "dc_trl"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# From the ground up; entries of one line share a floor, and know nothing of each other unless they are one room.
FLOORS = (
    {"discrepancy", "dual", "length_decay", "constraint", "estimators", "step"},
    {"rollouts"},
    {"config"},
    {"records"},
    {"tasks"},
    {"training"},
    {"trainer"},
    {"__init__"},
    {"commands"},
    {"__main__"},
)
# The maths is one room, whose files lie at the top: their import paths are public.
OPEN_FLOOR = FLOORS[0]
# The front door names the public classes, and says the version. Everything may ask it for that, and nothing else.
FRONT_DOOR = "dc_trl"
MOST_ENTRIES = 16


def targets(path: Path) -> set[str]:
    """The modules of this package that a file names, with the packages around them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` names the module; of others, the one that holds the names.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"dc_trl(\.\w+)+(:\w+)?", node.value):
                found.add(node.value.partition(":")[0])
    own = {name for name in found if name in MODULES}
    around = {package for name in own for package in packages(name)}
    return own | (around - packages(next(name for name in MODULES if MODULES[name] == path)))


def packages(module: str) -> set[str]:
    """The packages around a module, the front door excepted."""
    parts = module.split(".")
    return {".".join(parts[:depth]) for depth in range(2, len(parts))}


@cache
def arrows() -> dict[str, set[str]]:
    return {name: targets(path) - {name, FRONT_DOOR} for name, path in MODULES.items()}


def entry(module: str) -> str:
    """The file or folder at the top of the package in which a module lies."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def floor(module: str) -> int:
    found = [number for number, names in enumerate(FLOORS) if entry(module) in names]
    assert found, f"{module} lies on no floor: give its room a place in FLOORS"
    return found[0]


def test_there_is_no_circle() -> None:
    try:
        order = list(TopologicalSorter(arrows()).static_order())
    except CycleError as error:
        pytest.fail("a circle: " + " ← ".join(error.args[1]))
    assert set(order) == set(MODULES)


def test_the_graph_sees_imports_in_functions_and_in_strings() -> None:
    graph = arrows()
    assert "dc_trl.commands.train.command" in graph["dc_trl.commands.cli"]  # a string
    assert "dc_trl.commands.report.run" in graph["dc_trl.commands.report.command"]  # in a function
    assert "dc_trl.tasks.judge" in graph["dc_trl.tasks.rewards"]  # from package import module
    assert "dc_trl.trainer" in graph["dc_trl"]  # the table of exports


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_downwards(module: str) -> None:
    for target in arrows()[module]:
        same_room = entry(target) == entry(module) or {entry(target), entry(module)} <= OPEN_FLOOR
        assert same_room or floor(target) < floor(module), f"{module} → {target}"


@pytest.mark.parametrize("module", MODULES)
def test_only_the_version_is_asked_for_at_the_front_door(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == FRONT_DOOR:
            names = {alias.name for alias in node.names}
            assert {name for name in names if f"{FRONT_DOOR}.{name}" not in MODULES} <= {"__version__"}


def test_commands_know_each_other_only_where_one_builds_on_the_other() -> None:
    between = set()
    for module, found in arrows().items():
        for target in found:
            rooms = [name.split(".")[2] for name in (module, target) if name.count(".") > 2]
            if len(rooms) == 2 and rooms[0] != rooms[1] and entry(module) == "commands" == entry(target):
                between.add(tuple(rooms))
    assert between == {("calibrate", "train")}


def test_the_top_is_taken_in_at_a_glance() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= MOST_ENTRIES, sorted(entries)
    known = {name for names in FLOORS for name in names}
    assert {Path(name).stem for name in entries} - {"py"} <= known


def test_every_command_is_a_room_of_its_name() -> None:
    from dc_trl.commands.cli import COMMANDS

    rooms = {path.name for path in (PACKAGE / "commands").iterdir() if (path / "__init__.py").is_file()}
    assert rooms == set(COMMANDS)
    for name, (_, target) in COMMANDS.items():
        assert target == f"dc_trl.commands.{name}.command:{name}_command"


# What loads when


def loaded(code: str) -> set[str]:
    """The modules that are there after the code ran in a fresh process."""
    listing = f"import sys\n{code}\nprint('LOADED', *sys.modules)"
    done = run_python("-c", listing, fresh=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LOADED ")]
    return set(line.split()[1:])


HEAVY = {
    "torch",
    "trl",
    "transformers",
    "torchao",
    "accelerate",
    "datasets",
    "numpy",
    "pyarrow",
    "matplotlib",
    "plotly",
}


def test_the_trainer_loads_no_command_and_no_plotting() -> None:
    modules = loaded("import dc_trl.trainer")
    assert "dc_trl.trainer" in modules and "trl" in modules
    assert not {name for name in modules if name.startswith("dc_trl.commands") or name == "dc_trl.__main__"}
    assert not {"matplotlib", "plotly"} & modules
    assert not {name for name in modules if name.startswith("dc_trl.tasks")}


@pytest.mark.parametrize(
    "arguments",
    [[], ["train"], ["report"], ["calibrate"], ["evaluate"], ["export"]],
    ids=lambda words: " ".join(words),
)
def test_help_loads_nothing_that_it_does_not_need(arguments: list[str]) -> None:
    code = (
        "from dc_trl.commands.cli import main\n"
        f"try:\n    main({[*arguments, '--help']})\n"
        "except SystemExit as end:\n    assert not end.code\n"
    )
    modules = loaded(code)
    assert "dc_trl.commands.cli" in modules
    assert not HEAVY & modules
    others = {name for name in modules if name.startswith("dc_trl.") and not name.startswith("dc_trl.commands")}
    # The names of engines and precisions, what an evaluation wrote, how text is shown: standard library only.
    light = {"dc_trl.records", "dc_trl.records.results", "dc_trl.records.json_lines", "dc_trl.rollouts"}
    light |= {"dc_trl.records.text"}
    light |= {"dc_trl.rollouts.precisions"}
    assert {name for name in others if not name.startswith("dc_trl.rollouts.engines")} <= light


@pytest.mark.parametrize("name", ["train", "calibrate", "evaluate", "report", "export"])
def test_a_command_is_found_without_what_it_will_need(name: str) -> None:
    assert not HEAVY & loaded(f"import dc_trl.commands.{name}.command")


@pytest.mark.parametrize("name", ["dual", "length_decay"])
def test_the_maths_on_numbers_loads_the_standard_library_alone(name: str) -> None:
    assert not HEAVY & loaded(f"import dc_trl.{name}")
