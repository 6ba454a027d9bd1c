"""Which student to choose, without gold answers: the one that comes closest to its targets on questions held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from permdistill import debias
from permdistill.lessons import Lesson
from permdistill.paper.experiments import Scored, lessons_of
from permdistill.paper.runs import Run
from permdistill.questions import Question
from permdistill.students import build
from permdistill.training import read_log, train


def sweep(runs: Iterable[Run], train_on: Scored | Sequence[Scored], folder: str | Path) -> pd.DataFrame:
    """Train every run into ``folder``/<run.name>, and say which one comes closest to its targets on the questions that it
    held out: mean KL in nats, the lowest first. No gold answer is read, so that none is needed to choose a student.

    ``train_on``: several, of different numbers of options, for runs with k = 0. ``uniform`` is the KL of an answer that is
    always 1/K: a student that is no better has learnt nothing. Finished runs are loaded, not repeated. Raises what
    :func:`comparable` does.
    """
    rows: list[dict[str, Any]] = []
    for run in comparable(runs):
        lessons = lessons_of(run, train_on)
        train(run.student, run.training, lessons, Path(folder) / run.name)
        log = read_log(Path(folder) / run.name)
        row = {"student": run.title, "learning rate": run.training.learning_rate, "warm-up": run.training.warmup}
        row |= {"seed": run.training.seed, "held-out KL": min(log["held_out_kl"])}
        row |= {"epoch": int(np.argmin(log["held_out_kl"])) + 1, "seconds": round(log["seconds"])}
        rows.append(row | {"uniform": uniform(lessons), "folder": str(Path(folder) / run.name)})
    return pd.DataFrame(rows).sort_values("held-out KL", ignore_index=True)


def comparable(runs: Iterable[Run]) -> list[Run]:
    """The runs. Raises ValueError for those that hold nothing out, and for different ones of the same name, whose folder
    would be the same."""
    named: dict[str, Run] = {}
    for run in (runs := list(runs)):
        if not run.training.held_out:
            raise ValueError(f"{run.name}: held_out = 0, give a share of the questions to compare the students on")
        if named.setdefault(run.name, run) != run:
            raise ValueError(f"two students are called {run.name}: give encoders and rates that differ in their names")
    return runs


def overlong(runs: Iterable[Run], questions: Sequence[Question]) -> set[str]:
    """Ids of the questions of which some student of ``runs`` would cut an option (:meth:`Student.overlong`)."""
    configs = dict.fromkeys(run.student for run in runs)
    return {questions[i].id for config in configs for i in build(config, 0).overlong(questions)}


def uniform(lessons: Sequence[Lesson]) -> float:
    """Mean KL(targets || 1/K) in nats."""
    by_question = [
        np.log(Q.shape[1]) + (Q * np.log(np.maximum(Q, debias.EPSILON))).sum(-1) for Q in (one.targets for one in lessons)
    ]
    return float(np.concatenate(by_question).mean())
