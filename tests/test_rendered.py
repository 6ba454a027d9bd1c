"""Notebooks as their reader meets them: the repository's, and those that `make paper` executed, if there are any."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from permdistill import scores as store
from permdistill.paper import profiles
from permdistill.paper.tasks import load_task
from permdistill.questions import unlabelled
from permdistill.teachers import model_key

ROOT = Path(__file__).parent.parent
FOLDERS = ("notebooks", "build/notebooks")
NOTEBOOKS = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.ipynb")) if ".part." not in path.name]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREEN = (1280, 900)


def outputs(path: Path) -> list:
    return [output for cell in nbformat.read(path, 4).cells if cell.cell_type == "code" for output in cell.outputs]


def texts(path: Path) -> list[str]:
    """What outputs say, whatever kind they are of."""
    shown = []
    for output in outputs(path):
        data = output.get("data", {})
        shown += [output.get("text", ""), *(data.get(kind, "") for kind in ("text/plain", "text/html", "text/markdown"))]
    return shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.parent.name}/{p.stem}")
class TestNotebook:
    def test_no_progress_bar_cut_table_warning_or_place_of_this_machine(self, path):
        for text in texts(path):
            for unwanted in ("%|", "rows ×", "rows x", "…", "Warning", "/tmp/", "/home/", "/root/", "site-packages"):
                assert unwanted not in text, (unwanted, text[:300])
            assert not re.search(r"(^|[ >])\.\.\.([ <]|$)", text), text[:300]
        assert not [output for output in outputs(path) if any("widget" in kind for kind in output.get("data", {}))]
        assert not [output for output in outputs(path) if output.get("name") == "stderr"]

    def test_tables_have_no_index_and_intervals_on_one_line(self, path):
        for text in texts(path):
            if "<table" in text:
                assert "row_heading" not in text and not re.search(r"\d \[-?\d", text), text[:300]

    def test_ends_with_words_that_hold_numbers(self, path):
        *_, heading, last = nbformat.read(path, 4).cells
        assert heading.source == "## What it shows"
        (output,) = last.outputs
        assert len(re.findall(r"\d+\.\d", output.data["text/markdown"])) >= 1 or "confirmed" in output.data["text/markdown"]

    def test_says_question_method_and_what_is_stored_or_live(self, path):
        first = nbformat.read(path, 4).cells[0].source
        assert "**Question.**" in first and "**Method.**" in first
        whole = "\n".join([first, *texts(path)]).lower()
        assert "stored" in whole or "live" in whole

    def test_opening_it_changes_nothing(self, path):
        """JupyterLab writes the kernel's own name and language into the file, and times into cells unless told otherwise."""
        notebook = nbformat.read(path, 4)
        if path.parent.parent != ROOT:
            pytest.skip("an executed copy has papermill's times")
        assert notebook.metadata.kernelspec.display_name == "Python 3 (ipykernel)"
        assert set(notebook.metadata) == {"kernelspec", "language_info"}
        assert not [cell for cell in notebook.cells if set(cell.metadata) - {"tags"}]


@pytest.fixture(scope="module")
def page():
    """A page of a real browser without a network."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport=dict(zip(("width", "height"), SCREEN, strict=True)), offline=True)
        yield context.new_page()
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.parent.name}/{p.stem}")
def test_fits_the_screen_in_a_browser(path, page, tmp_path):
    from nbconvert import HTMLExporter

    html, _ = HTMLExporter(template_name="lab").from_filename(str(path))
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    page.goto((tmp_path / "page.html").as_uri(), wait_until="domcontentloaded")
    page.evaluate("document.querySelectorAll('.jp-CodeCell .jp-Cell-inputWrapper').forEach(e => e.remove())")
    shown = "[...document.querySelectorAll('table, img')].filter(e => !e.closest('details'))"  # folded ones scroll
    wide = page.evaluate(f"{shown}.map(e => e.getBoundingClientRect().right)")
    assert max(wide) <= SCREEN[0] and page.evaluate("document.documentElement.scrollWidth") <= SCREEN[0]
    assert page.evaluate("document.documentElement.scrollHeight") <= 6 * SCREEN[1]


@pytest.mark.parametrize(
    "name",
    [
        "03_students",
        "04_sensitivity_accuracy",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("01_teachers", "02_debiasers", "08_claims")),
    ],
)
def test_nbval_fails_when_one_stored_score_changes_by_005(name, tmp_path):
    """A notebook up to the first cell that is compared, on a copy of the scores with one number changed."""
    teacher = profiles.PROFILES["full"].teachers[0]
    task = load_task("arc_easy", "test")
    (question,) = unlabelled(task.questions[:1])
    key = store.content_key(question, store.all_orders(task.k), task.template, model_key(teacher))
    table = pq.read_table(ROOT / "scores" / teacher / "scores.parquet")
    at = table["key"].to_pylist().index(key)
    changed = table["log_probs"][at].as_py()
    changed[0] += 0.05 if changed[0] < -0.1 else -0.05
    row = table.slice(at, 1).set_column(4, table.schema.field(4), pa.array([changed], table.schema.field(4).type))
    (tmp_path / "scores" / teacher).mkdir(parents=True)
    for other in (ROOT / "scores").iterdir():
        if other.name != teacher:
            (tmp_path / "scores" / other.name).symlink_to(other)
    whole = pa.concat_tables([table.slice(0, at), row, table.slice(at + 1)])
    pq.write_table(whole, tmp_path / "scores" / teacher / "scores.parquet")

    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    compared = [i for i, cell in enumerate(notebook.cells) if "nbval-check-output" in cell.metadata.get("tags", [])]
    notebook.cells = notebook.cells[: compared[0] + 1]
    for cell in notebook.cells:
        cell.source = re.sub(r'^scores = ""', f"scores = {str(tmp_path / 'scores')!r}", cell.source, flags=re.M)
    nbformat.write(notebook, tmp_path / "changed.ipynb")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env"]
    done = subprocess.run([*command, "changed.ipynb"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Cell outputs differ" in done.stdout and "1 failed" in done.stdout, done.stdout[-2000:]
