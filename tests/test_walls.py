"""The rooms and their walls: who may import whom, what the core needs, and how much there is of it."""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_students import make_encoder

import permdistill
from permdistill import _moved

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "permdistill"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in PACKAGE.rglob("*.py")
}
# Imports run cli -> paper -> measure, api -> core -> engine, never back; files is the ground.
ALLOWED = {
    "cli": {"cli", "paper", "measure", "api", "core", "engine", "files"},
    "paper": {"paper", "measure", "api", "core", "engine", "files"},
    "measure": {"measure", "core", "engine", "files"},  # where gold answers are read: nobody below may look
    "api": {"api", "core", "engine", "files"},
    "core": {"core", "engine", "files"},
    "engine": {"engine", "files"},
    "files": set(),
}


def room(module: str) -> str:
    """Of a module of the package, e.g. "permdistill.engine.trie" -> "engine"."""
    first = (module.split(".") + ["core"])[1]
    return first if first in ALLOWED else "core"


def imported(source: str) -> set[str]:
    """Modules of the package that a source text imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"a relative import, line {node.lineno}"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return {name for name in found if name.split(".")[0] == "permdistill"}


def crossings(module: str, source: str) -> set[str]:
    """What a module imports and may not."""
    others = imported(source) - {"permdistill"}
    return {name for name in others if name not in MODULES or room(name) not in ALLOWED[room(module)]}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_wall_is_crossed(module):
    assert not crossings(module, MODULES[module].read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "module, source",
    [
        ("permdistill.scores", "def f():\n    from permdistill.paper import tasks"),
        ("permdistill.engine.trie", "import permdistill.scores"),
        ("permdistill.api.ask", "from permdistill.paper.tasks import TASKS"),
        ("permdistill.paper.cli", "from permdistill import cli"),
        ("permdistill.files", "from permdistill.orders import apply"),
        ("permdistill.paper.tables", "from permdistill.data import from_jsonl"),  # no old names inside
    ],
)
def test_a_crossed_wall_is_seen(module, source):
    assert crossings(module, source)


def test_core_alone_runs_from_teacher_to_student(tmp_path):
    make_encoder(tmp_path / "encoder")
    command = [sys.executable, str(Path(__file__).parent / "core_only.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = set(done.stdout.split())
    assert {"torch", "transformers", "permdistill", "pyarrow"} <= loaded
    assert not loaded & {"openai", "datasets", "matplotlib", "accelerate", "psutil", "nbformat"}


@pytest.mark.parametrize("old, new", list(_moved.MOVED.items()))
def test_old_module_names_work_and_warn(old, new):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        module = importlib.import_module(old)
    names = [name for name in vars(importlib.import_module(new)) if not name.startswith("_")]
    assert names and all(getattr(module, name) is getattr(importlib.import_module(new), name) for name in names)


def test_snippets_of_the_old_readme_import():
    code = """
from permdistill import blackbox, data, debias, jobs, metrics, scores
from permdistill.endpoint import Endpoint, Limits
from permdistill.prompts import TEMPLATES
from permdistill.replies import Replies
from permdistill.server import Server
from permdistill.teachers import model_key
from permdistill.training import lead
from permdistill.students import Student
import permdistill
assert permdistill.Student is Student
data.from_jsonl, data.unlabelled, blackbox.ask, blackbox.asking, jobs.Job, jobs.drawn_calls, jobs.plan, jobs.drawn
"""
    shown = ["-W", "always:permdistill:DeprecationWarning"]
    done = subprocess.run([sys.executable, *shown, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the old name goes with the next version") == 7
    assert "<string>:2: DeprecationWarning: permdistill.data is now permdistill.questions" in done.stderr


def test_old_command_of_a_module_says_where_it_went():
    done = subprocess.run([sys.executable, "-m", "permdistill.tables"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "python -m permdistill.tables is now python -m permdistill.paper results" in done.stderr


def test_unknown_names_are_errors_as_ever():
    with pytest.raises(ModuleNotFoundError, match="permdistill.nothing"):
        importlib.import_module("permdistill.nothing")
    with pytest.raises(AttributeError, match="nothing"):
        _ = permdistill.nothing


def test_sizes():
    """Limits on lines: a module, a function; and ratchets on the core and the package, which are to go down, not up."""
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    command_line = {"permdistill.cli", "permdistill.commands", "permdistill._moved"}
    core = sum(n for name, n in lines.items() if MODULES[name].parent == PACKAGE and name not in command_line)
    functions = {
        f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    too_much = {name: n for name, n in lines.items() if n > 480} | {name: n for name, n in functions.items() if n > 60}
    too_much |= {"core": core} if core > 4485 else {}
    too_much |= {"package": sum(lines.values())} if sum(lines.values()) > 18854 else {}
    assert not too_much


def test_installed_package_reads_and_writes_in_the_working_folder(tmp_path):
    """Not beside itself in site-packages."""
    site, work = tmp_path / "site-packages", tmp_path / "work"
    shutil.copytree(PACKAGE, site / "permdistill", ignore=shutil.ignore_patterns("__pycache__"))
    work.mkdir()
    code = """
import permdistill, sys
from permdistill.paper import ablations, cli, cost, experiments, manifest, paths
assert str(paths.ROOT) == "." and permdistill.__file__.startswith(sys.argv[1])
scores = cli.parser().parse_args(["score"]).scores
print(experiments.output_folder("", "smoke"), experiments.COMMITTED, ablations.COMMITTED, scores)
print(manifest.write(experiments.output_folder("", "smoke")))
try:
    cost.read()
except FileNotFoundError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code, str(site)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=work, env=environment)
    assert done.returncode == 0, done.stderr
    folders, written, missing = done.stdout.splitlines()
    assert folders == "build/smoke scores predictions scores" and written == "build/smoke/manifest.json"
    assert missing == f"figures/cost.json is not in {work}: work in a checkout of permdistill, or give a path"
    assert (work / written).exists() and [path.name for path in site.iterdir()] == ["permdistill"]
    from permdistill.paper import experiments

    assert experiments.output_folder("", "smoke") == ROOT / "build" / "smoke" and experiments.COMMITTED == ROOT / "scores"
