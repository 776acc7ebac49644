# SPDX-License-Identifier: Apache-2.0
"""SECURITY.md is true of the code: what the source never does, and what the defaults are."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from dc_trl import DCGRPOConfig
from dc_trl.commands.evaluate.command import make_parser
from dc_trl.commands.train.arguments import make_parser as make_recipe_parser
from dc_trl.rollouts.checkpoint import READERS
from dc_trl.tasks.judge import _MEMORY_LIMIT
from dc_trl.training.pushing_trainer import SENT

PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
SOURCES = sorted((ROOT / "dc_trl").rglob("*.py"))

PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
LISTENS = {"bind", "listen", "create_server", "serve_forever", "HTTPServer", "ThreadingHTTPServer"}


def faults(source: str) -> list[str]:
    """What a file does that the page says nothing here does."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"imports {name}" for name in names if name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.Call):
            found += _faults_of_call(ast.unparse(node.func), {word.arg: word.value for word in node.keywords})
    return found


def _faults_of_call(name: str, words: dict[str | None, ast.expr]) -> list[str]:
    values = {key: ast.unparse(value) for key, value in words.items()}
    wrong = {
        "runs text": name in RUNS_TEXT,
        "runs a shell": name in SHELLS or values.get("shell", "False") != "False",
        "reads a pickle": (name == "torch.load" and values.get("weights_only") != "True")
        or values.get("allow_pickle", "False") != "False"
        or name.rpartition(".")[2] == "read_pickle",
        "reads unsafe YAML": name in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load")
        or (name in ("yaml.compose", "yaml.parse", "yaml.scan") and values.get("Loader") != "yaml.SafeLoader"),
        "trusts remote code": values.get("trust_remote_code", "False") == "True",
        "listens": name.rpartition(".")[2] in LISTENS and not name.endswith("signature(GRPOTrainer.__init__).bind"),
    }
    return [f"{what}: {name}" for what, applies in wrong.items() if applies]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_source_does_none_of_it(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "eval(text)",
        "exec(code)",
        "subprocess.run(line, shell=True)",
        "subprocess.run(line, shell=flag)",
        "os.system(line)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.compose(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "ThreadingHTTPServer(address, Handler)",
        "socket.bind(address)",
    ],
)
def test_it_would_be_found(line: str) -> None:
    assert len(faults(line)) == 1


def test_the_arguments_that_transformers_saves_are_the_only_thing_saved_by_torch() -> None:
    calls = [
        (path.name, ast.unparse(node.args[0]))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.save"
    ]
    assert calls == [("pushing_trainer.py", "arguments_without_secrets(self.args)")]


def test_the_defaults_are_those_of_the_page(tmp_path: Path) -> None:
    args = DCGRPOConfig(output_dir=str(tmp_path), bf16=False, report_to="none")
    assert args.trust_remote_code is False and args.vllm_server_host == "0.0.0.0"
    assert args.weight_sync_readers == "owner" and READERS == {"owner": 0o600, "group": 0o640, "all": 0o644}
    defaults: Any = vars(make_parser().parse_args(["--model_name_or_path", "m"]))
    assert defaults["server_base_url"] == "http://127.0.0.1:8000" and defaults["server_base_url"] in PAGE
    assert not [name for name in defaults if "trust" in name]
    assert make_recipe_parser().get_default("trust_remote_code") is False
    assert _MEMORY_LIMIT == 4 << 30 and {"README.md", "curves.png"} < set(SENT)


def test_every_server_in_the_documentation_is_bound_to_loopback() -> None:
    pages = [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *SOURCES,
        *sorted(ROOT.glob("examples/**/*.yaml")),
    ]
    started = 0
    for path in pages:
        text = re.sub(r"\\\n\s*|\"\n\s*\"|\n#\s+", " ", path.read_text(encoding="utf-8"))
        for command in re.findall(r"VLLM_SERVER_DEV_MODE=1 python[^\n`]*", text):
            assert "--host 127.0.0.1" in command, (path.name, command)
            started += 1
    assert started >= 3


def test_what_the_page_names_is_there() -> None:
    for path in re.findall(r"`((?:dc_trl|tests)/[\w/]+\.py)`", PAGE):
        assert (ROOT / path).is_file()
    for target in re.findall(r"\]\(([\w/]+\.md)", PAGE):
        assert (ROOT / target).is_file()
    assert not re.search(r"[\w.]+@[\w.]+|https?://(?!127\.0\.0\.1)", PAGE)  # no address is invented
