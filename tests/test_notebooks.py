"""The stored notebooks can be steered by papermill and have something for nbval to compare."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest

from permdistill.paper import profiles

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def tagged(notebook, tag: str) -> list:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def test_there_are_notebooks():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06", "07", "08", "09", "10"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestNotebook:
    def test_parameters_are_what_make_paper_sets(self, path):
        (cell,) = tagged(nbformat.read(path, 4), "parameters")
        values = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}
        own = {
            "01_teachers": {"teacher": "", "prompting": {}, "questions": ""},
            "03_students": {"pool": "multiple_choice", "students": "stored"},
            "09_your_own_student": {"profile": "smoke", "teacher": "smollm2-135m", "prompting": {}, "questions": ""},
            "10_api_to_student": {"profile": "smoke", "base_url": "", "model": "", "api": {}, "mode": "decisions"}
            | {"questions": "", "price_in": 0.15, "price_out": 0.6, "max_cost": 1.0},
        }
        assert values == {"profile": "full", "output": "", "scores": ""} | own.get(path.stem, {})
        assert values["profile"] in profiles.PROFILES

    def test_something_is_compared(self, path):
        compared = tagged(nbformat.read(path, 4), "nbval-check-output")
        assert compared and all(cell.outputs for cell in compared)
        assert any("<table" in output.get("data", {}).get("text/html", "") for cell in compared for output in cell.outputs)

    def test_every_code_cell_ran_once_in_order_without_error(self, path):
        cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        kinds = {output.output_type for cell in cells for output in cell.outputs}
        assert "error" not in kinds
        assert not [o for cell in cells for o in cell.outputs if o.output_type == "stream" and o.name == "stderr"]

    def test_holds_no_logic(self, path):
        code = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
        kinds = {type(node) for node in ast.walk(ast.parse(code))}
        assert not kinds & {ast.FunctionDef, ast.ClassDef, ast.If, ast.For, ast.While, ast.Try, ast.Lambda}

    def test_takes_tasks_and_teachers_from_the_profile_it_is_given(self, path):
        """Only the matrix, whose students are stored, is the same in all profiles."""
        code = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
        used = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)]
        constants = {node.attr for node in used if ast.unparse(node.value) in ("profiles", "matrix") and node.attr.isupper()}
        assert not constants or path.stem in ("05_ablations", "06_scale")
