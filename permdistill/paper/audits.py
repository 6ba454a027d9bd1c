"""Some students of the matrix trained anew, against their stored predictions."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from permdistill.paper.ablations import MissingPredictions, answer, available, path, taught_and_asked
from permdistill.paper.experiments import lessons_of, test_inputs
from permdistill.paper.matrix import Cell
from permdistill.training import train

# A guess: on the machine that stored them a bi-encoder trained anew differs by 1e-8; other machines were not measured.
AUDIT_TV = 0.05


def auditable(cells: Iterable[Cell], folder: str | Path = "") -> list[Cell]:
    """Those of ``cells`` whose predictions are stored; the others are named. Raises MissingPredictions if there are none."""
    cells = list(dict.fromkeys(cells))
    found = available(cells, folder)
    for cell in cells:
        if cell not in found:
            print(f"not audited, since its predictions are not stored: {path(cell, '.')}")
    if not found:
        raise MissingPredictions("none of these students' predictions are stored: run `make students`")
    return found


def audit(cells: Iterable[Cell], work: Path, folder: str | Path = "") -> pd.DataFrame:
    """Train students anew and compare what they answer with their stored predictions: total variation between the two,
    over questions and orders, and whether its mean is at most :data:`AUDIT_TV`. Training sums in another order on other
    cores, and what differs by rounding at first differs by more in the end. Finished weights are deleted."""
    rows = []
    for cell in cells:
        train_on, test = taught_and_asked(cell)
        student = train(cell.run.student, cell.run.training, lessons_of(cell.run, train_on), work / cell.run.name)
        stored, P = answer(cell, folder).P, student.predict_batch(**test_inputs(cell.run, test))
        tv = np.abs(P - stored).sum(axis=-1) / 2
        same = (P.argmax(axis=-1) == stored.argmax(axis=-1)).mean()
        row = {"tasks": cell.about, "student": cell.run.title, "mean TV": tv.mean(), "max TV": tv.max(), "same answer": same}
        rows.append(row | {"ok": tv.mean() <= AUDIT_TV})
        shutil.rmtree(work / cell.run.name)
    return pd.DataFrame(rows)
