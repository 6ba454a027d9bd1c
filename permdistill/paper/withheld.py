"""RACE, whose texts may not be passed on, as numbers alone.

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

from pathlib import Path

import numpy as np
import pandas as pd

from permdistill import scores
from permdistill.files import replacing
from permdistill.orders import all_orders
from permdistill.paper.experiments import COMMITTED, Scored
from permdistill.paper.models import TEACHERS
from permdistill.paper.tasks import TaskSplit, load_task
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question
from permdistill.teachers import model_key

FILE, TEMPLATE = "withheld.parquet", "letters"
RACE = ("race_middle", "race_high")


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
