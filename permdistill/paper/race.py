"""T2 in the paper's form: RACE-M and RACE-H, our teacher and its students, with the paper's own numbers below."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from permdistill import debias
from permdistill.paper import ablations, claims, matrix, tables, withheld
from permdistill.paper.systems import BIASED, CORRECTION, Description, described_rows


def _published(row: pd.Series) -> dict[str, Any]:
    """A number of the paper's in the columns of a table of students."""
    if row.teacher == "biased teacher":
        return asdict(Description("teacher", BIASED, 1))
    if row.teacher == "debiased teacher":
        return asdict(Description("debiased", debias.DEBIASED, 24))
    return asdict(Description("student", row.treatment, int(row.treatment == CORRECTION), row.teacher, "joint"))


def table(folder: str | Path = "") -> pd.DataFrame:
    """RACE in the form of the paper's table: our teacher, biased and debiased, and the students whose predictions
    ``folder`` has ("": the committed ones), on M, H and both, with intervals; below the paper's own on RACE++ (M, H and C),
    which have none. Column ``source`` tells them apart."""
    test, every = withheld.read_scores(), [cell for part in matrix.MATRIX.values() for cell in part]
    cells = ablations.available((cell for cell in every if cell.tested == ("race",)), folder)
    alone = [cell for cell in cells if not (cell.on or cell.run.n_train)]  # these are stacked too
    answered = ablations.answers(test, alone, folder, stack=True)
    answered += ablations.answers(test, [cell for cell in cells if cell not in alone], folder)
    ours = tables.students(test, [*ablations.rivals(test), *answered]).assign(source="stored")
    paper = claims.targets("paper")
    rows = [
        {"source": "published", "task": row.task, "accuracy": row.value, **_published(row)}
        for _, row in paper[paper.table == "paper_RACE++"].iterrows()
    ]
    return described_rows([*ours.to_dict("records"), *rows])
