"""The matrix of students: those whose training together takes hours, by their stored predictions.

    make(cells, folder, work)                train what is missing, answer the test questions, keep the answers
    answer(cell, folder) -> System           the kept answers, or MissingPredictions
    compare(cells, folder) -> table          students beside what they have to beat, teacher by teacher

Predictions are found by content, as scores are: their key covers whatever the student was trained on and asked, so that
stored ones are never taken for those of another recipe, store of scores or question. Weights are not kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from permdistill import debias, tables
from permdistill.assets import locked
from permdistill.experiments import (
    ROOT,
    Scored,
    System,
    baselines,
    black_box_decisions,
    distil,
    exam,
    in_cyclic_orders,
    lessons,
    read_predictions,
    read_scores,
    save_predictions,
    together,
)
from permdistill.orders import cyclic_orders
from permdistill.profiles import PROFILES, SUMMEVAL, Cell
from permdistill.training import content_key, digest, read_log

COMMITTED = ROOT / "predictions"


class MissingPredictions(LookupError):
    """A student's predictions are not stored; the message says how to make them."""


@lru_cache(maxsize=4)
def data(teacher: str, tasks: tuple[str, ...], scores: str = "") -> tuple[Scored, Scored]:
    """What students of ``teacher`` learn from and are tested on: the questions of the full profile, pooled."""
    n = PROFILES["full"].n_students[tasks[0] in SUMMEVAL]
    train = together([read_scores(teacher, task, "train", scores) for task in tasks])
    test = together([read_scores(teacher, task, "test", scores, n) for task in tasks])
    return train, test


def key(cell: Cell, scores: str = "") -> str:
    """sha256 over whatever the predictions depend on: training, its data, and what the student is asked."""
    train, test = data(cell.teacher, cell.tasks, scores)
    asked = exam(cell.run, test)
    weights = content_key(cell.run.student, cell.run.training, **lessons(cell.run, train))
    return digest(weights, asked["questions"], asked["orders"], asked["decisions"], asked["distributions"])


def path(cell: Cell, folder: str | Path = "") -> Path:
    """Where the predictions of a cell are kept in ``folder``, "" for the committed ones."""
    return Path(folder or COMMITTED) / Path(cell.teacher).name / cell.about / f"{cell.run.name}.parquet"


def answer(cell: Cell, folder: str | Path = "", scores: str = "") -> System:
    """The stored predictions of a cell. Raises MissingPredictions when there are none, or those of other data or recipe."""
    file = path(cell, folder)
    if file.exists():
        ids, orders, P, about = read_predictions(file)
        if about["key"] == key(cell, scores):
            return System(cell.run.title, "student", P, orders, about["parameters"])
    found = "are those of another recipe, scores or questions" if file.exists() else "are not stored"
    raise MissingPredictions(f"predictions of {cell.run.name}, taught by {cell.teacher}, {found}: run `make students`")


def make(cells: Iterable[Cell], folder: str | Path, work: Path, scores: str = "") -> int:
    """Train the students of ``cells`` whose predictions ``folder`` lacks, let them answer and keep the answers; how many.

    ``work`` holds checkpoints: a killed run goes on from its last one. Finished weights are deleted.
    """
    missing = []
    for cell in dict.fromkeys(cells):
        try:
            answer(cell, folder, scores)
        except MissingPredictions:
            missing.append(cell)
    for cell in tqdm(missing, desc="students", unit="student"):
        home = work / Path(cell.teacher).name / cell.about
        with locked(home / f"{cell.run.name}.lock"):
            train, test = data(cell.teacher, cell.tasks, scores)
            system = distil(cell.run, train, test, home)
            log = read_log(home / "students" / cell.run.name)
            about = {"key": key(cell, scores), "teacher": cell.teacher, "tasks": cell.tasks, "run": asdict(cell.run)}
            about |= {"parameters": system.parameters, "losses": [round(x, 5) for x in log["losses"]]}
            about |= {name: round(log[name], 3) for name in ("seconds", "questions_per_second")}
            save_predictions(path(cell, folder), test, system.orders, system.P, about)
            shutil.rmtree(home / "students" / cell.run.name)
    return len(missing)


def rivals(test: Scored) -> list[System]:
    """What else one or a few teacher calls a question buy, without a student: :func:`experiments.baselines`, the copy of the
    teacher's most probable decision, prior-matching (one call), and averages over 2 and over all cyclic orders."""
    P, orders = in_cyclic_orders(test.P), cyclic_orders(test.task.k)
    half = (P + np.roll(P, len(orders) // 2, axis=1)) / 2
    greedy = debias.one_hot(black_box_decisions(test, greedy=True), test.task.k)
    everywhere = debias.broadcast(debias.permutation_average(P), len(orders))
    return [
        *baselines(test),
        System("copy of the most probable decision", "copy", greedy, orders),
        System("prior-matching, 1 call", "debiased", debias.prior_matching(P, orders), orders),
        System("mean over 2 orders, 2 calls", "debiased", half, orders),
        System(f"mean over {len(orders)} cyclic orders", "debiased", everywhere, orders),
    ]


def compare(cells: Sequence[Cell], folder: str | Path = "", scores: str = "", against: bool = True) -> pd.DataFrame:
    """Students of ``cells`` beside :func:`rivals` (or only the biased teacher), for each teacher and pool of tasks:
    :func:`permdistill.tables.students` with a column for each. Seeds of one student share a row."""
    parts = []
    for teacher, tasks in dict.fromkeys((cell.teacher, cell.tasks) for cell in cells):
        test = data(teacher, tasks, scores)[1]
        systems = rivals(test) if against else baselines(test)[:1]
        own = [cell for cell in cells if (cell.teacher, cell.tasks) == (teacher, tasks)]
        systems += [answer(cell, folder, scores) for cell in own]
        part = tables.students(test, systems)
        part.insert(0, "teacher", Path(teacher).name)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def available(cells: Iterable[Cell], folder: str | Path = "", scores: str = "") -> list[Cell]:
    """Those of ``cells`` whose predictions are stored."""
    return [cell for cell in cells if _stored(cell, folder, scores)]


def _stored(cell: Cell, folder: str | Path, scores: str) -> bool:
    try:
        answer(cell, folder, scores)
    except MissingPredictions:
        return False
    return True


def seeded(cells: Sequence[Cell]) -> list[Cell]:
    """One cell for each student, whatever its seed."""
    return list({replace(c, run=replace(c.run, training=replace(c.run.training, seed=0))): None for c in cells})
