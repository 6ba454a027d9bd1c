"""RACE, whose texts may not be passed on: its table from numbers alone.

RACE is for non-commercial research, so that neither its texts nor a sample of them lie in the repository. What does: the
teacher's scores, in the store, and ``scores/withheld.parquet``, which says of each question which row is its own and which
option is right::

    id       the question's; for RACE a hash of its texts
    key      content key of its scores, see :mod:`permdistill.scores`
    answer   index of the right option
    passage  a hash of its passage: what questions of one passage share, and intervals resample as one

    read_scores()    its test questions, without texts, with the stored scores
    write()          makes the file, where the texts can be had (``python -m permdistill.paper withheld``)
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from permdistill import debias, scores
from permdistill.files import replacing
from permdistill.orders import all_orders
from permdistill.paper import claims, tables
from permdistill.paper.ablations import rivals
from permdistill.paper.experiments import COMMITTED, Scored
from permdistill.paper.models import TEACHERS
from permdistill.paper.systems import BIASED, CORRECTION, Description, described_rows
from permdistill.paper.tasks import TaskSplit, load_task
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question
from permdistill.teachers import model_key

FILE, TEMPLATE = "withheld.parquet", "letters"
RACE = ("race_middle", "race_high")


def _published(row: pd.Series) -> dict[str, Any]:
    """A number of the paper's in the columns of a table of students."""
    if row.teacher == "biased teacher":
        return asdict(Description("teacher", BIASED, 1))
    if row.teacher == "debiased teacher":
        return asdict(Description("debiased", debias.DEBIASED, 24))
    return asdict(Description("student", row.treatment, int(row.treatment == CORRECTION), row.teacher, "joint"))


def found() -> pd.DataFrame:
    """What :func:`write` writes, from the texts: a row for each test question. Raises AssetError where they are not."""
    rows, template, key = [], TEMPLATES[TEMPLATE], model_key(TEACHERS[0])
    for task in RACE:
        split = load_task(task, "test", TEMPLATE)
        for q, passage in zip(split.questions, split.groups, strict=True):
            own = scores.content_key(q, all_orders(len(q.options)), template, key)
            rows.append({"id": q.id, "key": own, "answer": q.answer, "passage": passage})
    return pd.DataFrame(rows).astype({"answer": "int8"})


def write(folder: Path = COMMITTED) -> None:
    """Make the file in ``folder``, where the texts can be had."""
    with replacing(folder / FILE) as part:
        found().to_parquet(part, index=False, compression="zstd", write_page_checksum=True)


def read_scores(folder: Path = COMMITTED) -> Scored:
    """RACE's test questions, M and H as one, with stored scores and answers and without texts, so that nothing can be
    asked about them. Raises MissingScores."""
    rows, teacher = pd.read_parquet(folder / FILE, page_checksum_verification=True), Path(TEACHERS[0]).name
    store = scores.Store(folder / teacher)
    if lacking := [key for key in rows.key if key not in store]:
        raise scores.MissingScores(f"{len(lacking)} of {len(rows)} rows of {folder / FILE} are not in {store.folder}")
    P = scores.probabilities(np.stack([store.get(key) for key in rows.key]))
    blank = tuple(f"option {i}" for i in range(P.shape[2]))
    own = zip(rows.id, rows.passage, rows.answer, strict=True)
    questions = [Question(id_, passage, "", blank, int(answer)) for id_, passage, answer in own]
    members = [id_.split("/")[0] for id_ in rows.id]
    return Scored(teacher, TaskSplit("all", questions, TEMPLATES[TEMPLATE], members, {}), P)


def table() -> pd.DataFrame:
    """RACE in the form of the paper's table: our teacher, biased and debiased, on M, H and both, with intervals; below the
    paper's own on RACE++ (M, H and C), which have none. Column ``source`` tells them apart."""
    test = read_scores()
    ours = tables.students(test, rivals(test)).assign(source="stored")
    paper = claims.targets("paper")
    rows = [
        {"source": "published", "task": row.task, "accuracy": row.value, **_published(row)}
        for _, row in paper[paper.table == "paper_RACE++"].iterrows()
    ]
    return described_rows([*ours.to_dict("records"), *rows])
