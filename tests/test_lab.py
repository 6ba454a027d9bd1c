"""A notebook in JupyterLab itself, in a real browser: opening it changes nothing, and its cells write nothing on stderr."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("jupyterlab")
ROOT = Path(__file__).parent.parent
NAME = "04_sensitivity_accuracy.ipynb"  # it reads what is stored, so it takes seconds
pytestmark = pytest.mark.long


@pytest.fixture
def lab(tmp_path) -> Iterator[tuple[str, Path]]:
    """Address of a JupyterLab without settings of anybody's, and the notebook that it serves."""
    home = tmp_path / "home"
    served = Path(shutil.copy(ROOT / "notebooks" / NAME, tmp_path / NAME))
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    environment = os.environ | {name: str(home / name) for name in names} | {"JUPYTER_PREFER_ENV_PATH": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0", "--expose-app-in-browser"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={tmp_path}"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            said = next(line for line in server.stderr if "http://" in line and "/lab" in line)
            yield re.search(r"http://\S+/lab", said)[0], served
        finally:
            server.terminate()
            server.communicate()


def test_opening_changes_nothing_and_all_cells_run_without_stderr(lab, browser):
    address, path = lab
    before = json.loads(path.read_text(encoding="utf-8"))
    page = browser.new_page()
    page.goto(f"{address}/tree/{NAME}")
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=120_000)
    assert page.locator(".lm-TabBar-tab.jp-mod-dirty").count() == 0
    page.evaluate("jupyterapp.commands.execute('docmanager:save')")
    assert json.loads(path.read_text(encoding="utf-8")) == before

    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")  # ends when the last cell has
    page.evaluate("jupyterapp.commands.execute('docmanager:save')")
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("<table" in output.get("data", {}).get("text/html", "") for output in outputs)
    page.close()
