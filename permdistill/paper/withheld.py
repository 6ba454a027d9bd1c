"""Tasks whose texts may not be passed on: their tables from numbers alone.

RACE is for non-commercial research, so that neither its texts nor a sample of them lie in the repository. What does: the
teacher's scores, in the store, and ``scores/withheld.parquet``, which says of each question which row is its own and which
option is right::

    id      the question's; for RACE a hash of its texts
    key     content key of its scores, see :mod:`permdistill.scores`
    answer  index of the right option

    read_scores(("race_middle", "race_high"))    the tasks as one, without texts, with the stored scores
    write(tasks)                                 makes the file, where the texts can be had
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from permdistill import scores
from permdistill.files import replacing
from permdistill.orders import all_orders
from permdistill.paper import tables
from permdistill.paper.ablations import rivals
from permdistill.paper.experiments import COMMITTED, Scored
from permdistill.paper.models import TEACHERS
from permdistill.paper.tasks import TaskSplit, load_task
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question
from permdistill.teachers import model_key

FILE, TEMPLATE = "withheld.parquet", "letters"
RACE = ("race_middle", "race_high")
# Accuracy on RACE++ as the paper gives it (M, H and C together; ours are M and H): (system, distillation, correction).
PAPER = (
    ("biased teacher", 61.2, None),
    ("debiased teacher", 68.3, None),
    ("BERT-base", 45.6, 58.7),
    ("RoBERTa-base", 26.7, 61.4),
    ("DeBERTa-base", None, 64.1),
    ("RoBERTa-large", 26.9, 68.0),
    ("DeBERTa-large", None, 68.1),
)


def found(tasks: Sequence[str] = RACE, teacher: str = TEACHERS[0]) -> pd.DataFrame:
    """What :func:`write` writes, from the texts: a row for each test question. Raises AssetError where they are not."""
    rows, template, key = [], TEMPLATES[TEMPLATE], model_key(teacher)
    for task in tasks:
        for q in load_task(task, "test", TEMPLATE).questions:
            own = scores.content_key(q, all_orders(len(q.options)), template, key)
            rows.append({"id": q.id, "key": own, "answer": q.answer})
    return pd.DataFrame(rows).astype({"answer": "int8"})


def write(folder: Path = COMMITTED) -> None:
    """Make the file in ``folder``, where the texts can be had."""
    with replacing(folder / FILE) as part:
        found().to_parquet(part, index=False, compression="zstd")


def read_scores(tasks: Sequence[str] = RACE, teacher: str = TEACHERS[0], folder: Path = COMMITTED) -> Scored:
    """The test questions of these tasks as one, with stored scores and answers and without texts, so that nothing can be
    asked about them. Raises MissingScores."""
    rows = pd.read_parquet(folder / FILE)
    rows = rows[rows.id.str.split("/").str[0].isin(tasks)]
    store = scores.Store(folder / Path(teacher).name)
    if lacking := [key for key in rows.key if key not in store]:
        raise scores.MissingScores(f"{len(lacking)} of {len(rows)} rows of {folder / FILE} are not in {store.folder}")
    P = scores.probabilities(np.stack([store.get(key) for key in rows.key]))
    blank = tuple(f"option {i}" for i in range(P.shape[2]))
    questions = [Question(id_, "", "", blank, int(answer)) for id_, answer in zip(rows.id, rows.answer, strict=True)]
    members = [id_.split("/")[0] for id_ in rows.id]
    return Scored(Path(teacher).name, TaskSplit("all", questions, TEMPLATES[TEMPLATE], list(rows.id), members, {}), P)


def table() -> pd.DataFrame:
    """RACE in the form of the paper's table of students: what this teacher answers, biased and debiased."""
    test = read_scores()
    return tables.students(test, rivals(test))


def paper() -> pd.DataFrame:
    """The paper's own numbers, for people."""
    return pd.DataFrame(PAPER, columns=["RACE++, as published", "distillation", "error correction"])
