"""The steps between the store of scores and a table, for the questions that :mod:`permdistill.profiles` defines.

    test = read_scores(teacher, task, "test")        a task with a teacher's scores (item, order, option)
    train = together([read_scores(...), ...])        several tasks as one: what one student learns from
    systems = baselines(test) + [distil(run, train, test, folder), ...]

A :class:`System` is whatever answers questions: the biased teacher, the debiased one, a copied decision, a student. All
of it is plain arrays and files: look at them, replace one with your own, and carry on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from permdistill import debias, scores
from permdistill.data import unlabelled
from permdistill.orders import all_orders, cyclic_orders
from permdistill.profiles import SEED, Run, Task, load_task
from permdistill.teachers import model_key
from permdistill.training import train

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "scores"


def output_folder(output: str, profile: str) -> Path:
    """Where results go: ``output`` if given, else build/<profile> beside the package."""
    return Path(output) if output else ROOT / "build" / profile


@dataclass(frozen=True)
class Scored:
    """A task with a teacher's scores: P (item, order, option), all K! orders, renormalised over the options."""

    teacher: str
    task: Task
    P: np.ndarray


def read_scores(teacher: str, task: str, split: str, folder: str = "", n: int | None = None) -> Scored:
    """Scores of (the first ``n`` questions of) a task from the store ``folder``/<teacher>; "" means the committed ones.

    Raises MissingScores when the store lacks some, with the command that makes them.
    """
    loaded = load_task(task, split).first(n) if n is not None else load_task(task, split)
    store = scores.Store(Path(folder or COMMITTED) / teacher)
    log_probs = scores.load(store, unlabelled(loaded.questions), loaded.template, model_key(teacher))
    return Scored(teacher, loaded, scores.probabilities(log_probs))


def together(parts: Sequence[Scored]) -> Scored:
    """Several tasks of one teacher, template and K as one task "all"."""
    task = Task(
        name="all",
        questions=[q for s in parts for q in s.task.questions],
        template=parts[0].task.template,
        groups=[g for s in parts for g in s.task.groups],
        members=[m for s in parts for m in s.task.members],
        left_out={},
    )
    return Scored(parts[0].teacher, task, np.concatenate([s.P for s in parts]))


@dataclass(frozen=True)
class System:
    """Something that answers questions in several orders.

    name        as it stands in tables
    kind        teacher | debiased | copy | student
    parameters  number of parameters that answer one question, None where not known
    P           (item, order, option) probabilities
    orders      (order, K)
    """

    name: str
    kind: str
    P: np.ndarray
    orders: np.ndarray
    parameters: int | None = None


def in_cyclic_orders(P: np.ndarray) -> np.ndarray:
    """Scores over all K! orders (item, order, option) -> over the K cyclic ones, in the order of cyclic_orders."""
    every = all_orders(P.shape[2]).tolist()
    return P[:, [every.index(order) for order in cyclic_orders(P.shape[2]).tolist()]]


def black_box_decisions(test: Scored) -> np.ndarray:
    """The teacher's one sampled decision for each item and cyclic order, (item, order), as error correction sees it."""
    return debias.sampled_decisions(in_cyclic_orders(test.P), np.random.default_rng(SEED))


def baselines(test: Scored) -> list[System]:
    """The biased teacher, its average over all orders, and copying its one sampled decision.

    They answer in the K cyclic orders, in which each option stands once at each position; so do the students, so that
    differences between systems are not differences between orders.
    """
    k = test.P.shape[2]
    averaged = debias.broadcast(debias.permutation_average(test.P), k)
    copied = debias.one_hot(black_box_decisions(test), k)
    return [
        System(f"{test.teacher}, biased", "teacher", in_cyclic_orders(test.P), cyclic_orders(k)),
        System(f"{test.teacher}, all-orders average", "debiased", averaged, cyclic_orders(k)),
        System("copy of one sampled decision", "copy", copied, cyclic_orders(k)),
    ]


def distil(run: Run, train_on: Scored, test: Scored, folder: Path) -> System:
    """Train the student of ``run`` on the debiased teacher, or load it if it is there, and let it answer the test questions.

    Writes ``folder``/students/<run.name> (an ordinary transformers checkpoint) and ``folder``/predictions/<run.name>.parquet
    (id, order, probabilities by option). No gold answer enters: both sets of questions are stripped of theirs.
    """
    error_correction = run.student.inputs == "prediction"
    student = train(
        run.student,
        run.training,
        unlabelled(train_on.task.questions),
        debias.permutation_average(train_on.P),
        folder / "students" / run.name,
        decision_probs=train_on.P if error_correction else None,
    )
    orders = cyclic_orders(run.student.k)
    decisions = black_box_decisions(test) if error_correction else None
    P = student.predict(unlabelled(test.task.questions), orders, decisions)
    parameters = sum(p.numel() for p in student.model.parameters())
    _save_predictions(folder / "predictions" / f"{run.name}.parquet", test, orders, P)
    return System(run.title, "student", P, orders, parameters)


def _save_predictions(path: Path, test: Scored, orders: np.ndarray, P: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"id": q.id, "order": order.tolist(), "probabilities": p.tolist()}
        for q, by_order in zip(test.task.questions, P, strict=True)
        for order, p in zip(orders, by_order, strict=True)
    ]
    part = path.with_suffix(".part")
    pd.DataFrame(rows).to_parquet(part)
    part.replace(path)
