"""``make site``: executed notebooks, the explorer and a report as static pages with an index; they load nothing.

python -m permdistill.paper site BUILD        BUILD/notebooks/*.ipynb -> BUILD/site/
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

from permdistill.files import write_text
from permdistill.measure.document import document
from permdistill.measure.page import filled
from permdistill.measure.report import measure
from permdistill.paper import experiments
from permdistill.paper.display import EXPLORED, explorer
from permdistill.paper.paths import ROOT
from permdistill.paper.profiles import PROFILES
from permdistill.paper.tasks import TASKS

PAGE = Path(__file__).with_name("site.html")
TASK, N = EXPLORED[0], 84
_FORMULA = re.compile(r"(?<![\\$\w])\$([^$\n]+?)\$(?![\w$])")


def _write(path: Path, title: str, body: str, style: str = "", here: str = "") -> None:
    page = filled(PAGE, title=escape(title), body=body, style=style, here=here)
    write_text(path, page)


def _heading(notebook: Any) -> tuple[str, str]:
    """A notebook's title, and its question: the paragraph that is called so."""
    text = next((cell.source for cell in notebook.cells if cell.cell_type == "markdown"), "")
    title = re.search(r"^# *(.+)", text, re.M)
    question = re.search(r"^\*\*Question\.?\*\*(.+?)(?:\n\n|\Z)", text, re.M | re.S)
    shown = _FORMULA.sub(r"\1", " ".join(question[1].split())) if question else ""
    return title[1] if title else "", re.sub(r"[`*]", "", shown)


def _mathml(formula: str) -> str:
    """A formula as MathML, which browsers draw themselves; as it is where it cannot be read."""
    from latex2mathml.converter import convert

    try:
        return convert(formula)
    except Exception:  # of many kinds, none of them documented
        return escape(formula)


def notebook_page(path: Path, folder: Path) -> tuple[str, str, str]:
    """Write an executed notebook as a page into ``folder``; gives the page's name, title and question."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook = nbformat.read(path, 4)
    title, question = _heading(notebook)
    formulas: list[str] = []

    def keep(found: re.Match[str]) -> str:
        formulas.append(found[1])
        return f"\ue000{len(formulas) - 1}\ue001"  # characters that nobody writes: nbconvert takes tags apart

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _FORMULA.sub(keep, cell.source)
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True, embed_images=True)
    body, resources = exporter.from_notebook_node(notebook)
    body = re.sub("\ue000(\\d+)\ue001", lambda found: _mathml(formulas[int(found[1])]), body)
    colours = resources["inlining"]["css"][0] if resources.get("inlining", {}).get("css") else ""
    _write(folder / f"{path.stem}.html", title, body, colours, '<a href="index.html">all pages</a>')
    return f"{path.stem}.html", title, question


def write(build: str | Path) -> Path:
    """Write all pages into ``build``/site; gives the index. Raises FileNotFoundError where no notebook was executed."""
    build = Path(build)
    notebooks = sorted(path for path in (build / "notebooks").glob("*.ipynb") if not path.name.endswith(".part.ipynb"))
    if not notebooks:
        raise FileNotFoundError(f"{build}/notebooks has no executed notebooks: run make paper")
    site = build / "site"
    rows = [notebook_page(path, site) for path in notebooks]
    scored = experiments.read_scores(PROFILES["full"].teachers[0], TASK, "test", n=N)
    explorer([scored], N).save(site / "explore.html")
    records = ROOT / "examples" / "judge.jsonl"
    command = f"permdistill measure examples/{records.name} --html report.html"
    write_text(site / "report.html", document(measure(records), [records], command))
    rows.append(("explore.html", "Every order of a question", f"{N} questions of {TASKS[TASK].title}, to click through."))
    rows.append(("report.html", "A report on a judge", "What permdistill measure says of an invented judge."))
    listed = "".join(
        f'<li><a href="{escape(name)}">{escape(title)}</a><p class="quiet">{escape(question)}</p></li>'
        for name, title, question in rows
    )
    about = "<p>Do answers depend on the order of the options, and what helps? Each page answers one question.</p>"
    _write(site / "index.html", "permdistill", f"<h1>permdistill</h1>{about}<ul>{listed}</ul>")
    return site / "index.html"
