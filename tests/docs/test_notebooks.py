# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom on a CPU, the second after the first, and were saved with the outputs."""

import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from places import ROOT
from processes import environment
from tiny import save_tiny_policy
from transformers import AutoModelForCausalLM

EXAMPLES = ROOT / "examples"
NAMES = ("finetune_with_dc_grpo", "reading_a_discrepancy", "published_model")  # the second reads the run of the first


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
    """The notebooks, run in a copy of the examples, offline; `published_model` on a random policy."""
    folder = tmp_path_factory.mktemp("checkout") / "examples"
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("outputs", "__pycache__", ".ipynb_checkpoints"))
    done = {}
    with pytest.MonkeyPatch.context() as patch:
        model = str(save_tiny_policy(folder.parent / "stand-in", dtype="float32"))
        for variable, value in environment(CUDA_VISIBLE_DEVICES="", STORY_MODEL=model).items():
            patch.setenv(variable, value)
        for name in NAMES:
            done[name] = saved(name)
            resources = {"metadata": {"path": str(folder / "notebooks")}}
            # Raises CellExecutionError with the cell and its traceback.
            NotebookClient(done[name], timeout=400, kernel_name="python3", resources=resources).execute()
        done["published_model"].metadata.folder = str(folder / "notebooks/outputs/story")
    return done


def test_fine_tuning_learns(executed: dict[str, Any]) -> None:
    said = text(executed["finetune_with_dc_grpo"])
    before, after = (int(re.findall(rf"right {when} training: (\d+)%", said)[0]) for when in ("before", "after"))
    assert after >= before + 20


def test_reading_finds_the_run_and_its_tokens(executed: dict[str, Any]) -> None:
    said = text(executed["reading_a_discrepancy"])
    assert "lagrangian, int4 rollouts" in said
    assert re.search(r"above the tolerance in \d+% of the logged steps", said)
    assert "healthy" in said  # calibrate's last word


def test_a_published_model_is_calibrated_trained_reported_and_saved(executed: dict[str, Any]) -> None:
    notebook = executed["published_model"]
    said, folder = text(notebook), Path(notebook.metadata.folder)
    assert "healthy" in said and "exit status 0" in said
    assert re.findall(r"(nearest|dither): right on held-out problems", said) == ["nearest", "dither"]
    assert "update that the sampler has" in said
    assert (folder / "report.html").stat().st_size > 100_000
    assert AutoModelForCausalLM.from_pretrained(folder / "deployed").dtype == torch.bfloat16
    assert "2606.08779" in (folder / "dither/README.md").read_text(encoding="utf-8")


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


@pytest.mark.parametrize("name", NAMES)
def test_the_same_cells_ran_as_are_saved(executed: dict[str, Any], name: str) -> None:
    """A number printed from a seeded run on one kind of machine may differ on another; the shape of it may not."""
    kinds = [[o.output_type for o in cell.outputs] for cell in code(saved(name))]
    again = [[o.output_type for o in cell.outputs] for cell in code(executed[name])]
    assert [sorted(set(k)) for k in kinds] == [sorted(set(k)) for k in again]
