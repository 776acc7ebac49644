# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom on a CPU, the second after the first, and were saved with the outputs."""

import re
import shutil
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from places import ROOT
from processes import environment

EXAMPLES = ROOT / "examples"
NAMES = ("finetune_with_dc_grpo", "reading_a_discrepancy")  # the second reads the run of the first


def saved(name: str) -> Any:
    return nbformat.read(EXAMPLES / f"notebooks/{name}.ipynb", as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(notebook: Any) -> str:
    """What the cells printed and showed as text."""
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return "\n".join(str(o.get("text", "") or o.get("data", {}).get("text/plain", "")) for o in outputs)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both notebooks, run in a copy of the examples, offline."""
    folder = tmp_path_factory.mktemp("checkout") / "examples"
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("outputs", "__pycache__", ".ipynb_checkpoints"))
    done = {}
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environment(CUDA_VISIBLE_DEVICES="").items():
            patch.setenv(variable, value)
        for name in NAMES:
            done[name] = saved(name)
            resources = {"metadata": {"path": str(folder / "notebooks")}}
            # Raises CellExecutionError with the cell and its traceback.
            NotebookClient(done[name], timeout=400, kernel_name="python3", resources=resources).execute()
    return done


@pytest.mark.slow
def test_fine_tuning_learns(executed: dict[str, Any]) -> None:
    said = text(executed["finetune_with_dc_grpo"])
    before, after = (int(re.findall(rf"right {when} training: (\d+)%", said)[0]) for when in ("before", "after"))
    assert after >= before + 20


@pytest.mark.slow
def test_reading_finds_the_run_and_its_tokens(executed: dict[str, Any]) -> None:
    said = text(executed["reading_a_discrepancy"])
    assert "lagrangian, int4 rollouts" in said
    assert re.search(r"above the tolerance in \d+% of the logged steps", said)
    assert "healthy" in said  # calibrate's last word


@pytest.mark.parametrize("name", NAMES)
def test_saved_outputs_are_those_of_one_whole_run(name: str) -> None:
    notebook = saved(name)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell.outputs) for cell in cells) >= len(cells) // 2
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    pictures = [o for cell in cells for o in cell.outputs if "image/png" in o.get("data", {})]
    assert pictures
    assert not re.search(r"/(home|root|tmp|work|Users)/|site-packages", text(notebook))  # nobody's machine
    assert (EXAMPLES / f"notebooks/{name}.ipynb").stat().st_size < 500_000


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_same_cells_ran_as_are_saved(executed: dict[str, Any], name: str) -> None:
    """A number printed from a seeded run on one kind of machine may differ on another; the shape of it may not."""
    kinds = [[o.output_type for o in cell.outputs] for cell in code(saved(name))]
    again = [[o.output_type for o in cell.outputs] for cell in code(executed[name])]
    assert [sorted(set(k)) for k in kinds] == [sorted(set(k)) for k in again]
