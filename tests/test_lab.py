"""Notebooks in JupyterLab itself, in a real browser: opening one changes nothing, and its cells write nothing on stderr."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("jupyterlab")
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
RUN = "04_sensitivity_accuracy.ipynb"  # it reads what is stored, so it takes seconds
OPEN = """name => jupyterapp.commands.execute('docmanager:open', {path: name, factory: 'Notebook'})
    .then(panel => { window.panel = panel; return panel.context.ready; }).then(() => true)"""
IDLE = "() => panel.context.sessionContext.session?.kernel?.status === 'idle'"
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def lab(tmp_path_factory, browser) -> Iterator[tuple]:
    """A page with a JupyterLab without anybody's settings, and the folder with the copies that it serves."""
    home, served = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("notebooks")
    for path in NOTEBOOKS:
        shutil.copy(path, served)
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    environment = os.environ | {name: str(home / name) for name in names} | {"JUPYTER_PREFER_ENV_PATH": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0", "--expose-app-in-browser"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={served}"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            address = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+/lab\b", line)))
            threading.Thread(target=server.stderr.read, daemon=True).start()  # a full pipe would stop it
            page = browser.new_page()
            page.set_default_timeout(240_000)
            page.goto(address, wait_until="domcontentloaded")
            page.wait_for_function("() => window.jupyterapp && document.querySelector('.jp-Launcher, .jp-DirListing')")
            yield page, served
        finally:
            server.terminate()


@pytest.mark.parametrize("name", [path.name for path in NOTEBOOKS])
def test_opening_changes_nothing(lab, name):
    page, served = lab
    page.evaluate(OPEN, name)
    page.wait_for_function(IDLE)
    page.wait_for_timeout(1000)  # what the kernel says of itself goes into the notebook
    assert not page.evaluate("panel.context.model.dirty")
    page.evaluate("panel.context.save()")
    before = json.loads((Path(__file__).parent.parent / "notebooks" / name).read_text(encoding="utf-8"))
    assert json.loads((served / name).read_text(encoding="utf-8")) == before
    page.evaluate("panel.context.sessionContext.shutdown().then(() => panel.close())")


def test_all_cells_run_without_stderr(lab):
    page, served = lab
    page.evaluate(OPEN, RUN)
    page.wait_for_function(IDLE)
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")  # ends when the last cell has
    page.evaluate("panel.context.save()")
    cells = [cell for cell in nbformat.read(served / RUN, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("<table" in output.get("data", {}).get("text/html", "") for output in outputs)
