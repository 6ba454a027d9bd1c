"""The store of teacher scores: what was paid for once is never paid for again.

A store is a folder of parquet files with one row an item::

    key        content key: sha256 over teacher (weights, number format), template, orders, and the item's texts
    id         the question's id (for people; never used to find a row)
    k          number of options
    n_orders   number of orders, K!: they are :func:`permdistill.orders.all_orders`
    log_probs  float32 list, (order, option) in C order: log-probability of each option's label over the vocabulary

Rows hold numbers, ids and orders only, no dataset text. A run appends shards (write, then atomic rename), so a killed run
loses only the group in flight, and a second run starts where the first stopped, because a row is found by content.
``compact`` merges the shards into one file.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from permdistill.files import locked
from permdistill.orders import MAX_OPTIONS, MIN_OPTIONS, all_orders, to_options
from permdistill.prompts import Template
from permdistill.questions import BadRecords, Question
from permdistill.teachers import Teacher, in_groups

SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "id": pa.string(),
        "k": pa.int8(),
        "n_orders": pa.int16(),
        "log_probs": pa.list_(pa.float32()),
    }
)

MAX_SHARDS = 256


class MissingScores(LookupError):
    """The store lacks scores that were asked for; the message says how to make them."""


def content_key(question: Question, orders: np.ndarray, template: Template, model_key: str) -> str:
    """What a score depends on, and nothing else: a new docstring, file time or id changes no key."""
    parts = [model_key, template.key, orders.tolist(), question.context, question.question, list(question.options)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class Store:
    """Scores in a folder of parquet files, by content key."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._rows: dict[str, dict] = {}
        self._shards = 0  # written since the last compaction
        self._read(sorted(self.folder.glob("*.parquet")))

    def _read(self, paths: Sequence[Path]) -> None:
        for path in paths:
            for row in pq.read_table(path, schema=SCHEMA).to_pylist():
                self._rows[row["key"]] = row

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def append(self, rows: Sequence[dict]) -> None:
        """Add rows as one new shard: on disk, complete, before this returns. Now and then all shards become one file."""
        if rows:
            _write(self.folder / f"part-{time.time_ns()}-{uuid.uuid4().hex[:8]}.parquet", rows)
            self._rows.update((row["key"], row) for row in rows)
            self._shards += 1
        if self._shards >= MAX_SHARDS:
            self.compact()

    def compact(self, name: str = "scores") -> Path:
        """Merge everything into ``<name>.parquet``, also what other processes have added meanwhile. A kill in the middle
        leaves rows twice, never none."""
        path = self.folder / f"{name}.parquet"
        with locked(self.folder / ".lock"):
            old = set(self.folder.glob("*.parquet"))
            self._read(sorted(old))
            _write(path, sorted(self._rows.values(), key=lambda row: (row["id"], row["key"])))
            for shard in old - {path}:
                shard.unlink()
        self._shards = 0
        return path

    def get(self, key: str) -> np.ndarray:
        """Log-probabilities (order, option) of one row. Raises KeyError."""
        row = self._rows[key]
        return np.array(row["log_probs"], dtype=np.float64).reshape(row["n_orders"], row["k"])


def _write(path: Path, rows: Sequence[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), part, compression="zstd")
    os.replace(part, path)


def score(store: Store, teacher: Teacher, questions: Sequence[Question], template: Template) -> int:
    """Score what the store lacks, all K! orders of each question. Returns the number of questions scored now.

    What a forward pass, or a group (:func:`lacking`), cost is on disk before the next one starts. Raises ValueError before
    any compute when a question does not fit the template. :func:`permdistill.scaleout.score` does the same with several
    workers.
    """
    groups = lacking(store, questions, template, teacher.model_key)
    missing = [question for group in groups for question in group]
    teacher.check(missing, template)
    paid = len(questions) - len(missing)
    with tqdm(total=len(questions), initial=paid, unit="question", desc=f"score {teacher.name}") as bar:
        for done in in_groups(teacher, groups, template):
            places, log_probs = zip(*done, strict=True)
            keep(store, [missing[place] for place in places], log_probs, template, teacher.model_key)
            bar.set_postfix_str(getattr(teacher, "plan", ""), refresh=False)
            bar.update(len(places))
    return len(missing)


def lacking(store: Store, questions: Sequence[Question], template: Template, model_key: str) -> list[list[Question]]:
    """The questions that the store lacks, in groups with the same context and K: scored together, they pay for it once.

    The same texts under two ids come once. Raises ValueError when a question does not fit the template.
    """
    missing: dict[str, Question] = {}
    for question in questions:
        orders = all_orders(len(question.options))
        template.user_message(question, orders[0])  # an impossible question must fail here, not after hours
        key = content_key(question, orders, template, model_key)
        if key not in store:
            missing[key] = question
    groups: dict[tuple, list[Question]] = {}
    for question in missing.values():
        groups.setdefault((question.context or question.id, len(question.options)), []).append(question)
    return list(groups.values())


def keep(
    store: Store, group: Sequence[Question], log_probs: Iterable[np.ndarray], template: Template, model_key: str
) -> None:
    """Put log-probabilities (order, option) of questions, over all K! orders, into the store: on disk, as one shard.

    Raises ValueError for a value that is not finite, after those before it are kept.
    """
    rows = []
    try:
        for question, values in zip(group, log_probs, strict=True):
            orders = all_orders(len(question.options))
            rows.append(_row(question, orders, values, content_key(question, orders, template, model_key)))
    finally:
        store.append(rows)


def _row(question: Question, orders: np.ndarray, log_probs: np.ndarray, key: str) -> dict:
    values = np.asarray(log_probs, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"question {question.id!r}: the teacher gave a log-probability that is not finite: {values}")
    n_orders, k = orders.shape
    return {"key": key, "id": question.id, "k": k, "n_orders": n_orders, "log_probs": values.ravel()}


def load(store: Store, questions: Sequence[Question], template: Template, model_key: str) -> np.ndarray:
    """Log-probabilities (item, order, option), float64, of questions with the same K.

    Raises :class:`MissingScores` that counts and names what is missing.
    """
    ks = {len(q.options) for q in questions}
    if len(ks) != 1:
        raise ValueError(f"questions have different numbers of options {sorted(ks)}: load each K for itself")
    orders = all_orders(ks.pop())
    keys = [content_key(q, orders, template, model_key) for q in questions]
    missing = [q.id for q, key in zip(questions, keys, strict=True) if key not in store]
    if missing:
        raise MissingScores(
            f"{len(missing)} of {len(questions)} questions have no scores in {store.folder} (first: {missing[0]!r}; teacher "
            f"{model_key!r}, template {template.name!r}). Make them with `permdistill score` (see --help) or score()."
        )
    return np.stack([store.get(key) for key in keys])


def probabilities(log_probs: np.ndarray) -> np.ndarray:
    """Log-probabilities over the vocabulary -> probabilities renormalised over the K options (last axis)."""
    shifted = np.exp(log_probs - log_probs.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def from_records(path: str | Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Scores that somebody else's harness made: ids (item), orders (order, K), probabilities (item, order, option).

    ``path`` is a JSONL or parquet file with a record for each item and order, in any sequence::

        id             the item
        order          list of K: order[k] is the index of the option that was shown at position k
        probabilities  list of K: probability of the label at position k; what other tokens got may be missing from the sum

    Every item must come in the same orders; all K! are not needed. The orders are sorted, the original one first.
    Raises BadRecords that lists all bad records.
    """
    path = Path(path)
    frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_json(path, lines=True, dtype=False)
    if missing := [c for c in ("id", "order", "probabilities") if c not in frame]:
        raise BadRecords(
            f"{path}: no field {missing[0]!r} (fields: {', '.join(map(str, frame))}): give id, order, probabilities"
        )
    problems: list[str] = []
    found: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    for row, (name, order, values) in enumerate(zip(frame["id"], frame["order"], frame["probabilities"], strict=True)):
        problem = _record_problem(name, order, values)
        if not problem and tuple(order) in found.setdefault(str(name), {}):
            problem = f"field 'order' is {list(order)}: this item has it already"
        if problem:
            problems.append(f"record {row} (id {name!r}): {problem}")
        else:
            found[str(name)][tuple(map(int, order))] = np.asarray(values, dtype=np.float64)
    every = {tuple(sorted(by_order)) for by_order in found.values()}
    if not problems and len(every) != 1:
        expected = max(every, key=lambda orders: sum(tuple(sorted(b)) == orders for b in found.values()), default=())
        odd = next((name for name, b in found.items() if tuple(sorted(b)) != expected), None)
        problems.append(
            f"item {odd!r} comes in {len(found[odd])} orders that are not the {len(expected)} of most items: give every "
            "item in the same orders, and items with another number of options in a file of their own"
            if odd
            else "no records"
        )
    if problems:
        raise BadRecords(f"{path}: {len(problems)} problem(s)\n  " + "\n  ".join(problems))
    orders = np.array(sorted(next(iter(every))), dtype=np.int64)
    by_position = np.array([[by_order[tuple(order)] for order in orders.tolist()] for by_order in found.values()])
    return list(found), orders, to_options(by_position / by_position.sum(axis=-1, keepdims=True), orders)


def _record_problem(name: object, order: object, values: object) -> str | None:
    """What is wrong with one record of :func:`from_records`, or None."""
    if not isinstance(name, (str, int, np.integer)) or not str(name).strip():
        return f"field 'id' is {name!r}: give a string"
    if not isinstance(order, (list, tuple, np.ndarray)) or sorted(map(str, order)) != sorted(map(str, range(len(order)))):
        return f"field 'order' is {order!r}: give a permutation of 0..K-1"
    try:
        p = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        p = np.array([np.nan])
    if p.shape != (len(order),) or not MIN_OPTIONS <= len(order) <= MAX_OPTIONS:
        return (
            f"field 'probabilities' is {values!r}: give one number a position, {MIN_OPTIONS} to {MAX_OPTIONS} as 'order' has"
        )
    if not (np.isfinite(p).all() and (p >= 0).all() and 0 < p.sum() <= 1 + 1e-3):
        return f"field 'probabilities' is {values!r}: give numbers in 0..1 with a sum above 0 and at most 1"
    return None


def audit(
    store: Store, teacher: Teacher, questions: Iterable[Question], template: Template, model_key: str | None = None
) -> np.ndarray:
    """Score ``questions`` live and compare with the store: total variation between the two, (item and order,).

    ``model_key`` names the stored scores when they were made in another number format than the live teacher's.
    """
    questions = list(questions)
    stored = [probabilities(load(store, [question], template, model_key or teacher.model_key))[0] for question in questions]
    differences: dict[int, np.ndarray] = {}
    for done in in_groups(teacher, [[question] for question in questions], template):
        for place, values in done:
            live = probabilities(values.astype(np.float64))
            differences[place] = np.abs(stored[place] - live).sum(axis=-1) / 2
    return np.concatenate([differences[place] for place in range(len(questions))])
