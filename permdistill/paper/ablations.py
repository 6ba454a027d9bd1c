"""The matrix of students: those whose training together takes hours, by their stored predictions.

    make(cells, folder, work)                train what is missing, answer the test questions, keep the answers
    answer(cell, folder) -> System           the kept answers, or MissingPredictions
    compare(cells, folder) -> table          students beside what they have to beat, teacher by teacher
    effects(cells, "draws") -> table         what a setting does; distances(..): from the targets
    students(settings, pool, ..)             those of a table: stored, or trained now

Predictions are found by content, as scores are: their key covers whatever the student was trained on and asked, so that
stored ones are never taken for those of another recipe, store of scores or question. (Where a student learnt or answers
RACE, whose texts may not be on this machine, settings and ids have to do.) Weights are not kept.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from permdistill import debias
from permdistill.files import locked
from permdistill.measure import evaluate, metrics
from permdistill.orders import cyclic_orders
from permdistill.paper import tables, withheld
from permdistill.paper.experiments import (
    Scored,
    System,
    baselines,
    black_box_decisions,
    by_k,
    distil,
    in_cyclic_orders,
    lessons_of,
    read_predictions,
    read_scores,
    save_predictions,
    stacked,
    test_inputs,
    together,
)
from permdistill.paper.matrix import MATRIX, Cell, cells_of, together_as
from permdistill.paper.paths import ROOT
from permdistill.paper.profiles import PROFILES, Pool, Profile, n_test
from permdistill.paper.sweeps import uniform
from permdistill.paper.systems import (
    COPY,
    DISTILLATION,
    STACKED,
    STACKED_WHITE_BOX,
    TWO_ORDERS,
    UNTRAINED,
    Description,
    described_rows,
    title,
)
from permdistill.paper.tasks import TASKS, WITHHELD, at_hand
from permdistill.questions import Question
from permdistill.students import Student
from permdistill.training import content_key, digest, read_log, train

COMMITTED = ROOT / "predictions"
STORED, LIVE = "stored", "live"
RIVAL = ("kind", "method", "calls", "encoder", "head", "greedy")  # what tells rivals apart


class MissingPredictions(LookupError):
    """A student's predictions are not stored; the message says how to make them."""


def data(teacher: str, tasks: tuple[str, ...], on: tuple[str, ...] = ()) -> tuple[list[Scored], Scored]:
    """What students of ``teacher`` learn from: all training questions of ``tasks``, pooled by number of options. And what
    they are tested on: the full profile's questions of ``on`` (of ``tasks`` if that is empty), pooled."""
    return taught(teacher, tasks), asked(teacher, on or tasks)


@lru_cache(maxsize=32)
def taught(teacher: str, tasks: tuple[str, ...]) -> list[Scored]:
    """The first part of :func:`data`."""
    return by_k([read_scores(teacher, task, "train") for task in tasks])


@lru_cache(maxsize=32)
def asked(teacher: str, tasks: tuple[str, ...]) -> Scored:
    """Its second part. Of a task whose texts are withheld, and not on this machine, without these."""
    n = n_test(PROFILES["full"], tasks)
    return together([read_scores(teacher, task, "test", n=n) if at_hand(task) else _withheld(task) for task in tasks])


def _withheld(task: str) -> Scored:
    found = withheld.read_scores()
    return replace(found, task=replace(found.task, members=[task] * len(found.P)))


def taught_and_asked(cell: Cell) -> tuple[list[Scored], Scored]:
    """:func:`data` of a cell. Raises MissingPredictions where it cannot be read here."""
    if not readable(cell):
        raise MissingPredictions(f"{path(cell, '.')}: RACE's texts are not on this machine, see docs/scale.md")
    return data(cell.teacher, cell.tasks, cell.on)


def readable(cell: Cell) -> bool:
    """Whether all that a cell learns and answers can be read here; of RACE there may be numbers alone."""
    return all(task not in WITHHELD or at_hand(task) for task in (*cell.tasks, *cell.tested))


def _tested(cell: Cell) -> Scored:
    """What the cell answers."""
    return taught_and_asked(cell)[1] if readable(cell) else asked(cell.teacher, cell.tested)


def key(cell: Cell, over: tuple[list[Scored], Scored] | None = None) -> str:
    """sha256 over whatever the predictions depend on: training, its data, and what the student is asked. ``over``: questions
    to train and test on, by default those of :func:`data`."""
    return _key(cell, over) if over else _own_key(cell)


@lru_cache(maxsize=1024)
def _own_key(cell: Cell) -> str:
    return _key(cell, taught_and_asked(cell))


def _key(cell: Cell, over: tuple[list[Scored], Scored]) -> str:
    train_on, test = over
    asked = test_inputs(cell.run, test)
    weights = content_key(cell.run.student, cell.run.training, lessons_of(cell.run, train_on))
    return digest(weights, asked["questions"], asked["orders"], asked["decisions"], asked["distributions"])


def path(cell: Cell, folder: str | Path = "") -> Path:
    """Where the predictions of a cell are kept in ``folder``, "" for the committed ones."""
    return Path(folder or COMMITTED) / Path(cell.teacher).name / cell.about / f"{cell.run.name}.parquet"


def answer(cell: Cell, folder: str | Path = "", over: tuple[list[Scored], Scored] | None = None) -> System:
    """The stored predictions of a cell. Raises MissingPredictions when there are none, or those of other data or recipe."""
    P, orders, about = _kept(cell, folder, over)
    return System(cell.what, P, orders, about["parameters"])


def _kept(
    cell: Cell, folder: str | Path, over: tuple[list[Scored], Scored] | None = None
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Probabilities (item, order, option), their orders, and what :func:`make` wrote beside them."""
    file = path(cell, folder)
    if file.exists():
        ids, orders, P, about = read_predictions(file)
        if _own(cell, about, ids, over):
            return P, orders, about
    found = "are those of another recipe, scores or questions" if file.exists() else "are not stored"
    raise MissingPredictions(
        f'predictions of {cell.run.name}, taught by {cell.teacher}, {found}: run `make students`, or set students = "live"'
    )


def _own(cell: Cell, about: dict[str, Any], ids: list[str], over: tuple[list[Scored], Scored] | None) -> bool:
    """Whether stored predictions are the cell's: by their key, or, where texts cannot be read, by settings and ids."""
    if over or readable(cell):
        return bool(about["key"] == key(cell, over))
    kept = [about.get(name) for name in ("teacher", "tasks", "on", "run")]
    own = [cell.teacher, cell.tasks, cell.on or None, asdict(cell.run)]
    return kept == json.loads(json.dumps(own)) and ids == [q.id for q in _tested(cell).task.questions]


def students(
    settings: Profile, pool: Pool, train_on: Scored, test: Scored, folder: Path, made: str = STORED
) -> list[System]:
    """The students of a pool. ``made``: :data:`STORED`, by their committed predictions, or :data:`LIVE`, trained now into
    ``folder`` (:func:`permdistill.paper.experiments.distil`). What is not stored is trained, with a word."""
    if made not in (STORED, LIVE):
        raise ValueError(f"students = {made!r}: give {STORED!r} or {LIVE!r}")
    if made == LIVE:
        return [distil(run, train_on, test, folder) for run in pool.runs]
    found = []
    for cell in cells_of(settings, pool):
        try:
            found.append(answer(cell, over=([train_on], test)))
        except MissingPredictions:
            print(f"not stored, so trained now: {cell.run.title}")
            found.append(distil(cell.run, train_on, test, folder))
    return found


def make(cells: Iterable[Cell], folder: str | Path, work: Path) -> int:
    """Train the students of ``cells`` whose predictions ``folder`` lacks, let them answer and keep the answers; how many.

    ``work`` holds checkpoints: a killed run goes on from its last one. Finished weights are deleted.
    """
    missing = []
    for cell in dict.fromkeys(cells):
        try:
            answer(cell, folder)
        except MissingPredictions:
            missing.append(cell)
    for cell in [cell for cell in missing if not readable(cell)]:
        print(f"not trained, since RACE's texts are not on this machine (docs/scale.md): {path(cell, '.')}")
        missing.remove(cell)
    alike: dict[Cell, list[Cell]] = {}  # one student, asked several things
    for cell in missing:
        alike.setdefault(replace(cell, on=()), []).append(cell)
    for own, its in tqdm(alike.items(), desc="students", unit="student"):
        home = work / Path(own.teacher).name / own.about / own.run.name
        with locked(home / "lock"):
            lessons = lessons_of(own.run, taught_and_asked(its[0])[0])
            student = train(own.run.student, own.run.training, lessons, home / "student")
            for cell in its:
                _keep(cell, student, read_log(home / "student"), folder)
            shutil.rmtree(home / "student")
    return len(missing)


def _keep(cell: Cell, student: Student, log: dict[str, Any], folder: str | Path) -> None:
    """Let the student answer the test questions; write the answers, and how it was trained, where :func:`answer` looks."""
    _, test = taught_and_asked(cell)
    asked = test_inputs(cell.run, test)
    P = student.predict_batch(**asked)
    about: dict[str, Any] = {"key": key(cell), "teacher": cell.teacher, "tasks": cell.tasks, "run": asdict(cell.run)}
    about |= {"on": cell.on} if cell.on else {}
    about |= {"parameters": sum(p.numel() for p in student.model.parameters())}
    about |= {name: round(log[name], 3) for name in ("seconds", "questions_per_second")}
    about |= cost(student, asked) | {"losses": [round(loss, 5) for loss in log["losses"]]}
    about |= {"held_out_kl": [round(kl, 6) for kl in log["held_out_kl"]]}
    save_predictions(path(cell, folder), test, asked["orders"], P, about)


def cost(student: Student, asked: dict[str, Any], n: int = 128) -> dict[str, float]:
    """What it takes to answer one question in one order: floating-point operations of its matrix products, and seconds with
    tokenisation, over the first ``n`` questions of ``asked`` (:func:`permdistill.paper.experiments.test_inputs`)."""
    first = {name: value if value is None or name == "orders" else value[:n] for name, value in asked.items()}
    first |= {name: first[name][:, :1] for name in ("decisions", "distributions") if first[name] is not None}
    first["orders"] = asked["orders"][:1]
    started = time.monotonic()
    student.predict_batch(**first)
    seconds = time.monotonic() - started
    with FlopCounterMode(display=False) as counter:
        student.predict_batch(**first)
    count = len(first["questions"])
    return {"answer_flops": counter.get_total_flops() / count, "answer_seconds": seconds / count}


def rivals(test: Scored) -> list[System]:
    """What a student has to beat: :func:`permdistill.paper.experiments.baselines`, and what else one or a few calls a
    question buy without a student: the teacher's most probable decision, prior-matching, averages over 2 and over the cyclic
    orders (where these are not all orders anyway)."""
    P, orders = in_cyclic_orders(test.P), cyclic_orders(test.task.k)
    biased, averaged, copied = baselines(test)
    greedy = debias.one_hot(black_box_decisions(test, greedy=True), test.task.k)
    two = (P + np.roll(P, len(orders) // 2, axis=1)) / 2
    cyclic = debias.broadcast(debias.permutation_average(P), len(orders))
    few = [
        System(Description("debiased", TWO_ORDERS, 2), two, orders),
        System(Description("debiased", debias.CYCLIC, len(orders)), cyclic, orders),
    ]
    return [
        biased,
        copied,
        System(Description("copy", COPY, 1, greedy=True), greedy, orders),
        System(Description("debiased", debias.PRIOR_MATCHING, 1), debias.prior_matching(P, orders), orders),
        *(system for system in few if system.what.calls < averaged.what.calls),
        averaged,
    ]


def _pools(cells: Iterable[Cell]) -> Iterator[tuple[str, Scored, list[Cell]]]:
    """Cells by teacher and the tasks that they answer: the teacher's name, the test questions, the cells, none twice. Raises
    MissingPredictions when there are none."""
    cells = list(dict.fromkeys(cells))
    if not cells:
        raise MissingPredictions("none of these students' predictions are stored: run `make students`")
    for teacher, tested in dict.fromkeys((cell.teacher, cell.tested) for cell in cells):
        own = [cell for cell in cells if (cell.teacher, cell.tested) == (teacher, tested)]
        yield Path(teacher).name, _tested(own[0]), own


def compare(cells: Iterable[Cell], folder: str | Path = "", stack: bool = False) -> pd.DataFrame:
    """Students beside :func:`rivals`, teacher by teacher: :func:`permdistill.paper.tables.students`. Seeds of one student
    share a row. ``stack``: with :func:`stacked` of each that was taught and sees no answer of the teacher. Where students of
    several tasks together and of one of them alone are asked that one, column "together" says who is whose."""
    parts, asked = [], []
    for _, test, own in _pools(cells):
        part = tables.students(test, [*rivals(test), *answers(test, own, folder, stack)])
        parts.append(part.assign(together=together_as(own[0].tested)))
        asked += [(own[0].teacher, task) for task in own[0].tested]
    table = pd.concat(parts, ignore_index=True)
    return table if len(set(asked)) < len(asked) else table.drop(columns="together")


def answers(test: Scored, cells: Sequence[Cell], folder: str | Path = "", stack: bool = False) -> list[System]:
    """The stored predictions of cells that answer ``test``, and (``stack``) what :func:`compare` adds to them."""
    found = [answer(cell, folder) for cell in cells]
    alone = [one for one in found if stack and one.what.method == DISTILLATION]
    return [*found, *(both for one in alone for both in stacked(test, one))]


def _stem(question: Question) -> str:
    """Its context, or the question where there is none, but for capitals and spaces."""
    return " ".join((question.context or question.question).casefold().split())


def differences(cells: Iterable[Cell], folder: str | Path = "", stack: bool = False, new: bool = False) -> pd.DataFrame:
    """Accuracy of each student (``stack``: see :func:`compare`; then also against the student alone) minus that of each of
    :func:`rivals`, and of each untrained student among ``cells``, paired by question: one row for each pair, with the 95%
    interval over the questions (or documents) of the mean over the student's seeds. What the rival is stands in columns
    "rival_kind" etc. ``new``: on those questions alone whose context (PIQA's goal, BoolQ's passage) no training
    question has; they are ``n``."""
    rows = []
    for teacher, test, own in _pools(cells):
        seen = {_stem(q) for part in taught_and_asked(own[0])[0] for q in part.task.questions} if new else set()
        kept = np.array([_stem(q) not in seen for q in test.task.questions])
        questions, groups = (task := test.task.where(kept)).questions, task.groups
        students: dict[Description, list[System]] = {}
        for one in answers(test, own, folder, stack):
            students.setdefault(one.what, []).append(replace(one, P=one.P[kept]))
        alike = {what: [evaluate.correct(one.P, questions) for one in seeds] for what, seeds in students.items()}
        fixed = {rival.what: evaluate.correct(rival.P[kept], questions) for rival in rivals(test)}
        fixed |= {what: np.mean(right, axis=0) for what, right in alike.items() if what.method == UNTRAINED}
        for student, seeds in students.items():
            plain = replace(student, method=DISTILLATION, calls=0, greedy=False)
            stacks = student.method in (STACKED, STACKED_WHITE_BOX)
            against = fixed | ({plain: np.mean(alike[plain], axis=0)} if stacks else {})
            for rival, baseline in against.items():
                if rival == student:
                    continue
                P = [one.P for one in seeds]
                row = evaluate.measure(P, cyclic_orders(test.task.k), questions, groups, baseline, ["accuracy"])
                gain = {f"difference{part}": row[f"gain{part}"] for part in ("", "_low", "_high")}
                other = {f"rival_{name}": getattr(rival, name) for name in RIVAL}
                who = {"teacher": teacher, "tasks": together_as(own[0].tested)}
                rows.append({**who, **asdict(student), **other, "seeds": len(seeds), "n": len(questions), **gain})
    return described_rows(rows)


def effects(cells: Iterable[Cell], *names: str, folder: str | Path = "") -> pd.DataFrame:
    """What settings do to a student: a row for each combination of the settings ``names``, which are fields of Run,
    TrainingConfig or StudentConfig, with the usual metrics, the gain over the biased teacher, and the range over seeds.
    ``n_train`` = 0 is given as the number of all questions."""
    rows = []
    for teacher, test, own in _pools(cells):
        by_value: dict[tuple, list[Cell]] = {}
        for cell in own:
            by_value.setdefault(tuple(_setting(cell, name) for name in names), []).append(cell)
        baseline = evaluate.correct(rivals(test)[0].P, test.task.questions)
        for value, seeds in by_value.items():
            P = [answer(cell, folder).P for cell in seeds]
            alone = [np.nanmean(evaluate.correct(p, test.task.questions)) for p in P]
            row = evaluate.measure(P, cyclic_orders(test.task.k), test.task.questions, test.task.groups, baseline)
            ends = {"seeds": len(seeds), "worst seed": min(alone), "best seed": max(alone)}
            rows.append({"teacher": teacher, **dict(zip(names, value, strict=True)), **ends, **row})
    return pd.DataFrame(rows).sort_values(["teacher", *names], ignore_index=True)


def distances(cells: Iterable[Cell], *names: str, folder: str | Path = "") -> pd.DataFrame:
    """How close students came to what they were taught, by settings as in :func:`effects`: KL(targets || answer) in nats, of
    1/K ("uniform"), of the students themselves over their last epoch ("training KL"), and on held-out questions where there
    are some, after the best epoch; means over the students of a row.

    A student that is no closer than 1/K has not even learnt the questions that it was shown.
    """
    rows = []
    for teacher, _, own in _pools(cells):
        for cell in own:
            about = _kept(cell, folder)[2]
            losses = about["losses"]
            if not losses:  # untrained
                continue
            row = {"teacher": teacher, **{name: _setting(cell, name) for name in names}, "students": 1}
            row["uniform"] = uniform(lessons_of(cell.run, taught_and_asked(cell)[0]))
            kls = about.get("held_out_kl", [])  # predictions stored before this was kept held nothing out
            epochs = len(kls) or cell.run.training.epochs  # that were run: patience may end training early
            row["training KL"] = np.mean(losses[-(len(losses) // epochs) :])
            rows.append(row | {"held-out KL": min(kls, default=np.nan)})
    by = pd.DataFrame(rows).groupby(["teacher", *names])
    return by.mean().assign(students=by.students.sum()).reset_index()


def held_out(cells: Iterable[Cell], folder: str | Path = "") -> pd.DataFrame:
    """KL(targets || answer) in nats on the questions held out, after each epoch: a row a student. And, for whoever wants to
    know what was not looked at, its accuracy minus the biased teacher's where it answers what it learnt."""
    rows = []
    for cell in cells:
        kls = _kept(cell, folder)[2]["held_out_kl"]
        row = {
            "taught on": " and ".join(TASKS[task].title for task in cell.tasks),
            "student": cell.run.title,
            "seed": cell.run.training.seed,
        }
        row |= {"held-out KL by epoch": ", ".join(f"{kl:.4f}" for kl in kls), "lowest": min(kls)}
        if cell.tested == cell.tasks:
            test = _tested(cell)
            row |= _ends("gain", _paired(test, answer(cell, folder).P, rivals(test)[0].P))
        rows.append(row)
    return pd.DataFrame(rows)


def gap(first: Cell, second: Cell, folder: str | Path = "") -> metrics.Interval:
    """Accuracy of one student minus that of another that is asked the same, paired by question. Raises
    MissingPredictions."""
    return _paired(_tested(first), *(answer(cell, folder).P for cell in (first, second)))


def _paired(test: Scored, first: np.ndarray, second: np.ndarray) -> metrics.Interval:
    right = [evaluate.correct(P, test.task.questions) for P in (first, second)]
    labelled = ~np.isnan(right[0])
    return metrics.bootstrap((right[0] - right[1])[labelled], np.asarray(test.task.groups)[labelled])


def together_or_alone(together: Iterable[Cell], alone: Iterable[Cell], folder: str | Path = "") -> pd.DataFrame:
    """:func:`gap` of a student of several tasks over the first of ``alone`` that learnt all questions of the one asked."""
    rows, own = [], [cell for cell in alone if cell.run.training.epochs and not cell.run.n_train]
    for cell in together:
        if other := next((one for one in own if one.tasks == cell.tested != cell.tasks), None):
            found = gap(cell, other, folder)
            rows.append({"task": together_as(cell.tested), **_ends("together", found)})
    return pd.DataFrame(rows)


def _ends(name: str, interval: metrics.Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def levels(cell: Cell, folder: str | Path = "", student: bool = True) -> dict[str, float]:
    """What a curve of students is to be seen beside: the accuracy of the biased teacher and its all-orders average, and of
    the student ``cell`` if wanted."""
    test = _tested(cell)
    biased, *_, averaged = rivals(test)
    found = {title(system.what): system.P for system in (biased, averaged)}
    found |= {"student of exact targets": answer(cell, folder).P} if student else {}
    return {name: float(np.nanmean(evaluate.correct(P, test.task.questions))) for name, P in found.items()}


def coverage(parts: Iterable[str], folder: str | Path = "") -> pd.DataFrame:
    """How many students of each of these parts of :data:`permdistill.paper.matrix.MATRIX` are stored."""
    counts = [(part, len(available(MATRIX[part], folder)), len(set(MATRIX[part]))) for part in parts]
    return pd.DataFrame(counts, columns=["part", "stored", "of"])


def _setting(cell: Cell, name: str) -> Any:
    run = cell.run
    if name == "n_train" and not run.n_train:
        return sum(len(part.P) for part in taught_and_asked(cell)[0])
    return next(getattr(part, name) for part in (run, run.training, run.student) if hasattr(part, name))


def available(cells: Iterable[Cell], folder: str | Path = "") -> list[Cell]:
    """Those of ``cells`` whose predictions are stored."""
    result = []
    for cell in dict.fromkeys(cells):
        try:
            answer(cell, folder)
        except MissingPredictions:
            continue
        result.append(cell)
    return result
