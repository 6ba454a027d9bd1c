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
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import softmax
from tqdm import tqdm

from permdistill.files import locked, replacing
from permdistill.orders import all_orders
from permdistill.prompts import Template
from permdistill.questions import Question
from permdistill.teachers import Teacher

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
    with replacing(path) as part:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), part, compression="zstd")


def score(store: Store, teacher: Teacher, questions: Sequence[Question], template: Template) -> int:
    """Score what the store lacks, all K! orders of each question. Returns the number of questions scored now.

    What a group (:func:`lacking`) cost is on disk before the next one starts. Raises ValueError before any compute when a
    question does not fit the template. :func:`permdistill.scaleout.score` does the same with several workers.
    """
    groups = lacking(store, questions, template, teacher.model_key)
    missing = [question for group in groups for question in group]
    teacher.check(missing, template)
    paid = len(questions) - len(missing)
    with tqdm(total=len(questions), initial=paid, unit="question", desc=f"score {teacher.name}") as bar:
        for group in groups:
            log_probs = teacher.log_probs(group, all_orders(len(group[0].options)), template)
            keep(store, group, log_probs, template, teacher.model_key)
            bar.update(len(group))
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


def keep(store: Store, group: Sequence[Question], log_probs: np.ndarray, template: Template, model_key: str) -> None:
    """Put a group's log-probabilities (item, order, option), over all K! orders, into the store: on disk, as one shard.

    Raises ValueError for a value that is not finite, after those before it are kept.
    """
    orders, rows = all_orders(len(group[0].options)), []
    try:
        for question, own in zip(group, log_probs, strict=True):
            own, key = np.asarray(own, dtype=np.float32), content_key(question, orders, template, model_key)
            if not np.isfinite(own).all():
                raise ValueError(f"question {question.id!r}: the teacher gave a log-probability that is not finite: {own}")
            n_orders, k = orders.shape
            rows.append({"key": key, "id": question.id, "k": k, "n_orders": n_orders, "log_probs": own.ravel()})
    finally:
        store.append(rows)


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
    return softmax(log_probs, axis=-1)


def audit(
    store: Store, teacher: Teacher, questions: Iterable[Question], template: Template, model_key: str | None = None
) -> np.ndarray:
    """Score ``questions`` live and compare with the store: total variation between the two, (item and order,).

    ``model_key`` names the stored scores when they were made in another number format than the live teacher's.
    """
    differences = []
    for question in questions:
        orders = all_orders(len(question.options))
        stored = probabilities(load(store, [question], template, model_key or teacher.model_key))
        live = probabilities(teacher.log_probs([question], orders, template).astype(np.float64))
        differences.append(np.abs(stored - live).sum(axis=-1)[0] / 2)
    return np.concatenate(differences)
