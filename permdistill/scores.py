"""The store of teacher scores: what was paid for once is never paid for again.

A store is a folder of parquet files with one row an item::

    key        content key: sha256 over teacher (weights, number format), template, orders, and the item's texts
    id         the question's id (for people; never used to find a row)
    k          number of options
    n_orders   K!, in the order of :func:`permdistill.orders.all_orders`; or 1, and the key ends in the order: "..:2,0,1"
    log_probs  float32 list, (order, option) in C order: log-probability of each option's label over the vocabulary

Whatever set of orders is asked for is put together from these rows: of cyclic orders, a later Williams design pays for
those only that are not among them, and a row of all K! orders answers each set.

Rows hold numbers, ids and orders only, no dataset text. A run appends shards (write, then atomic rename), so a killed run
loses only the group in flight, and a second run starts where the first stopped, because a row is found by content. Shards
are merged on the way, ``compact`` makes one file of all; every page has a checksum. Files of other names are not touched.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import softmax
from tqdm import tqdm

from permdistill.files import locked, replacing
from permdistill.orders import ENUMERATED, MAX_OPTIONS, MIN_OPTIONS, all_orders, order_set
from permdistill.prompts import Template
from permdistill.questions import Question
from permdistill.teachers import Asked, Teacher, in_groups

SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "id": pa.string(),
        "k": pa.int8(),
        "n_orders": pa.int16(),
        "log_probs": pa.list_(pa.float32()),
    }
)

MAX_SHARDS = 64  # so many files are merged: one file would be read and written anew too often, thousands are slow to open
MERGED = "scores.parquet"
_OWN = re.compile(r"part-\d+-[0-9a-f]{8}\.parquet|" + re.escape(MERGED))
_UNFINISHED = re.compile(rf"\.(?:{_OWN.pattern})\.\d+\.part")  # see permdistill.files.replacing

Row = tuple[str, np.ndarray]  # id, log-probabilities (order, option)
# Of each question: a name (:func:`permdistill.orders.order_set`), (order, K), or a function of the question that gives it.
Orders = str | np.ndarray | Callable[[Question], np.ndarray]


class MissingScores(LookupError):
    """The store lacks scores that were asked for; the message says how to make them."""


def content_key(question: Question, orders: np.ndarray, template: Template, model_key: str) -> str:
    """What a score depends on, and nothing else: a new docstring, file time or id changes no key."""
    parts = [model_key, template.key, orders.tolist(), question.context, question.question, list(question.options)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class Store:
    """Scores in a folder of parquet files, by content key. Several processes may write into one folder.

    Raises ValueError for a file that is damaged, holds values that are not finite, or contradicts another one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._rows: dict[str, Row] = {}  # the arrays are views into their file's column
        self._files: dict[tuple, list[str]] = {}  # (name, size, time, inode) of a file that was read -> its keys
        self._shards = 0  # written since the last merge
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes have added since."""
        # Until a look at the folder shows nothing new: files that vanish have been merged by another process, and their rows
        # are in a file that perhaps came too late for the last look.
        for attempt in range(100):
            found = self._list()
            self._files = {mark: self._files[mark] for mark in found if mark in self._files}
            if len(self._files) == len(found):
                return
            for mark in found:
                if mark not in self._files:
                    try:
                        self._enter(mark, _read(self.folder / mark[0]))
                    except FileNotFoundError:
                        if attempt == 99:
                            raise

    def _list(self) -> list[tuple]:
        try:
            with os.scandir(self.folder) as entries:
                return sorted(filter(None, (_mark(entry) for entry in entries if _OWN.fullmatch(entry.name))))
        except FileNotFoundError:
            return []

    def _enter(self, mark: tuple, rows: Iterable[tuple[str, Row]]) -> None:
        keys = []
        for key, (name, values) in rows:
            keys.append(key)
            known = self._rows.setdefault(key, (name, values))[1]
            if known is not values and not np.array_equal(known, values):
                raise ValueError(
                    f"{self.folder / mark[0]}: row {key} (id {name!r}) has other values than in another file of this store: "
                    "delete one of the two"
                )
        if len(set(keys)) != len(keys):
            raise ValueError(f"{self.folder / mark[0]} is damaged (a key is there twice): restore it, or delete it")
        self._files[mark] = keys

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def append(self, rows: Sequence[dict]) -> None:
        """Add rows as one new shard: on disk, complete, before this returns. A row that is there already, perhaps because
        another process was quicker, stays as it is. Now and then shards are merged."""
        if not rows:
            return
        with self._writing():
            fresh = {
                row["key"]: (row["id"], np.asarray(row["log_probs"], np.float32).reshape(row["n_orders"], row["k"]))
                for row in rows
                if row["key"] not in self._rows
            }
            if fresh:
                self._write(_shard(), fresh)
                self._shards += 1
            if self._shards >= MAX_SHARDS:
                self._merge()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Be the only one who writes, and know what others have written. What is half written by now, a kill left."""
        with locked(self.folder / ".lock"):
            for path in self.folder.glob(".*.part"):
                if _UNFINISHED.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            self.refresh()
            yield

    def _merge(self) -> None:
        """Merge all files but those that hold more rows than all smaller ones together: what a file holds is written anew
        only when it doubles, so that n appends cost n log n."""
        files, before, some = sorted(self._files, key=lambda mark: len(self._files[mark])), 0, 0
        for place, mark in enumerate(files):
            if len(self._files[mark]) <= before:
                some = place + 1
            before += len(self._files[mark])
        self._replace(files[:some], MERGED if some == len(files) else _shard())

    def compact(self) -> Path:
        """Merge everything into one file, also what other processes have added meanwhile. A kill in the middle leaves rows
        twice, never none."""
        with self._writing():
            self._replace(list(self._files), MERGED)
        return self.folder / MERGED

    def _replace(self, files: Sequence[tuple], name: str) -> None:
        keys = {key for mark in files for key in self._files[mark]}
        rows = sorted(((key, self._rows[key]) for key in keys), key=lambda row: (row[1][0], row[0]))
        self._write(name, dict(rows))
        self._shards = 0
        for mark in files:
            self._files.pop(mark, None)
            if mark[0] != name:
                (self.folder / mark[0]).unlink(missing_ok=True)

    def _write(self, name: str, rows: dict[str, Row]) -> None:
        _write(self.folder / name, rows)
        self._enter(_mark(self.folder / name), rows.items())

    def get(self, key: str) -> np.ndarray:
        """Log-probabilities (order, option) of one row. Raises KeyError."""
        return self._rows[key][1].astype(np.float64)


def _shard() -> str:
    return f"part-{time.time_ns()}-{uuid.uuid4().hex[:8]}.parquet"


def _mark(path: Path | os.DirEntry) -> tuple:
    """What tells a file from another one of the same name; () when it is gone."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return (path.name,) if path.is_symlink() else ()
    return (path.name, found.st_size, found.st_mtime_ns, found.st_ino)


def _write(path: Path, rows: dict[str, Row]) -> None:
    arrays = [values for _, values in rows.values()]
    offsets = np.cumsum([0, *(values.size for values in arrays)], dtype=np.int32)
    columns = [
        pa.array(rows.keys(), pa.string()),
        pa.array([name for name, _ in rows.values()], pa.string()),
        pa.array([values.shape[1] for values in arrays], pa.int8()),
        pa.array([len(values) for values in arrays], pa.int16()),
        pa.ListArray.from_arrays(offsets, np.concatenate([np.empty(0, np.float32), *(v.ravel() for v in arrays)])),
    ]
    with replacing(path) as part:
        table = pa.Table.from_arrays(columns, schema=SCHEMA)
        pq.write_table(table, part, compression="zstd", write_page_checksum=True)


def _read(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of one file. Raises ValueError, FileNotFoundError."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, buffer_size=1 << 18, pre_buffer=False) as file:
            found = {field.name: field.type for field in file.schema_arrow}
            if found != {field.name: field.type for field in SCHEMA}:
                raise ValueError(f"its columns are {', '.join(found)}")
            # In batches: the whole file at once takes four times the memory while it is unpacked.
            n = 0
            for batch in file.iter_batches(batch_size=8192, use_threads=False):
                yield from _rows_of(batch)
                n += len(batch)
            if n != file.metadata.num_rows:
                raise ValueError(f"{n} of {file.metadata.num_rows} rows")
    except (FileNotFoundError, PermissionError):
        raise
    except (ValueError, TypeError, OSError, MemoryError, pa.ArrowException) as error:
        raise ValueError(
            f"{path} is damaged, or no file of a store ({str(error).splitlines()[0]}): restore it, or delete it and "
            "score its questions anew"
        ) from None


def _rows_of(batch: pa.RecordBatch) -> Iterator[tuple[str, Row]]:
    key, name, *numbers, lists = batch.columns
    values = lists.flatten()
    if any(column.null_count for column in (key, name, *numbers, lists, values)):
        raise ValueError("values are missing")
    k, n_orders = (column.to_pylist() for column in numbers)
    possible = {(options, n) for options in range(MIN_OPTIONS, MAX_OPTIONS + 1) for n in (1, math.factorial(options))}
    if not set(zip(k, n_orders, strict=True)) <= possible:
        raise ValueError("numbers of options or orders are impossible")
    sizes, flat = lists.value_lengths().to_pylist(), values.to_numpy(zero_copy_only=False)
    if not np.isfinite(flat).all():
        raise ValueError("log-probabilities are not finite")
    end = 0
    for row, label, options, orders, size in zip(key.to_pylist(), name.to_pylist(), k, n_orders, sizes, strict=True):
        end += size
        if orders == 1 and sorted(row.partition(":")[2].split(","), key=int) != list(map(str, range(options))):
            raise ValueError(f"key {row!r} of one order names none of {options} options")
        yield row, (label, flat[end - size : end].reshape(orders, options))


@cache
def _places(k: int) -> dict[tuple[int, ...], int]:
    """Where each of all K! orders stands among them."""
    return {tuple(order): place for place, order in enumerate(all_orders(k).tolist())}


def score(store: Store, teacher: Teacher, questions: Sequence[Question], template: Template, orders: Orders = "all") -> int:
    """Score each question in those of ``orders`` that the store lacks. Returns the number of questions scored now.

    What a forward pass, or a group (:func:`lacking`), cost is on disk before the next one starts. A second process that
    scores into this store waits for the first, then scores what is left. Raises ValueError before any compute when a
    question does not fit the template. :func:`permdistill.scaleout.score` does the same with several workers.
    """
    with alone(store):
        groups = lacking(store, questions, template, teacher.model_key, orders)
        missing = [asked for group in groups for asked in group]
        teacher.check([asked.question for asked in missing], template)
        paid = len(questions) - len(missing)
        with tqdm(total=len(questions), initial=paid, unit="question", desc=f"score {teacher.name}") as bar:
            for done in in_groups(teacher, groups, template):
                places, log_probs = zip(*done, strict=True)
                keep(store, [missing[place] for place in places], log_probs, template, teacher.model_key)
                bar.set_postfix_str(getattr(teacher, "plan", ""), refresh=False)
                bar.update(len(places))
    return len(missing)


@contextmanager
def alone(store: Store) -> Iterator[None]:
    """Be the only one who scores into a store, and know what others have added: no work is done twice."""
    with locked(store.folder / ".scoring.lock"):
        store.refresh()
        yield


def lacking(
    store: Store, questions: Sequence[Question], template: Template, model_key: str, orders: Orders = "all"
) -> list[list[Asked]]:
    """The questions that the store lacks, with the orders that it lacks, in groups with the same context and K: scored
    together, they pay for it once.

    The same texts under two ids come once. Raises ValueError when a question does not fit the template.
    """
    missing: dict[str, Asked] = {}
    for question in questions:
        wanted = _orders(orders, question)
        template.user_message(question, wanted[0])  # an impossible question must fail here, not after hours
        found = _found(store, question, wanted, template, model_key)
        new = [order for order, values in zip(wanted, found, strict=True) if values is None]
        if new:
            missing[content_key(question, wanted, template, model_key)] = Asked(question, np.array(new))
    groups: dict[tuple, list[Asked]] = {}
    for asked in missing.values():
        question = asked.question
        groups.setdefault((question.context or question.id, len(question.options)), []).append(asked)
    return list(groups.values())


def _orders(orders: Orders, question: Question) -> np.ndarray:
    if isinstance(orders, str):
        return order_set(orders, len(question.options))
    return orders(question) if callable(orders) else orders


def _key_of_one(question: Question, template: Template, model_key: str) -> str:
    """Content key of a question in one order, but for the order itself, which goes at its end."""
    return content_key(question, np.empty((0, 0)), template, model_key) + ":"


def _found(
    store: Store, question: Question, orders: np.ndarray, template: Template, model_key: str
) -> list[np.ndarray | None]:
    """Log-probabilities (option,) in each of ``orders``, None where the store lacks them."""
    k = len(question.options)
    if k <= ENUMERATED and (whole := content_key(question, all_orders(k), template, model_key)) in store:
        values, places = store.get(whole), _places(k)
        return [values[places[tuple(order)]] for order in orders.tolist()]
    item = _key_of_one(question, template, model_key)
    keys = [item + ",".join(map(str, order)) for order in orders.tolist()]
    return [store.get(key)[0] if key in store else None for key in keys]


def keep(store: Store, group: Sequence[Asked], log_probs: Iterable[np.ndarray], template: Template, model_key: str) -> None:
    """Put log-probabilities (order, option) of questions, each in its orders, into the store: on disk, as one shard.

    Raises ValueError for a value that is not finite, after those before it are kept.
    """
    rows: list[dict] = []
    try:
        for (question, orders), own in zip(group, log_probs, strict=True):
            own, k = np.asarray(own, dtype=np.float32), len(question.options)
            if not np.isfinite(own).all():
                raise ValueError(f"question {question.id!r}: the teacher gave a log-probability that is not finite: {own}")
            if k <= ENUMERATED and np.array_equal(orders, all_orders(k)):
                found = {content_key(question, orders, template, model_key): own}
            else:
                item = _key_of_one(question, template, model_key)
                found = {item + ",".join(map(str, order)): one for order, one in zip(orders.tolist(), own, strict=True)}
            for key, values in found.items():
                n_orders = values.size // k
                rows.append({"key": key, "id": question.id, "k": k, "n_orders": n_orders, "log_probs": values.ravel()})
    finally:
        store.append(rows)


def load(
    store: Store, questions: Sequence[Question], template: Template, model_key: str, orders: Orders = "all"
) -> np.ndarray:
    """Log-probabilities (item, order, option), float64, of questions with the same K in the same number of orders:
    :func:`permdistill.orders.order_set` gives those that a name stands for.

    Raises :class:`MissingScores` that counts and names what is missing.
    """
    ks = {len(q.options) for q in questions}
    if len(ks) != 1:
        raise ValueError(f"questions have different numbers of options {sorted(ks)}: load each K for itself")
    found = load_each(store, questions, template, model_key, orders)
    if len(numbers := {len(values) for values in found}) != 1:
        raise ValueError(f"questions come in different numbers of orders {sorted(numbers)}: use load_each")
    return np.stack(found)


def load_each(
    store: Store, questions: Sequence[Question], template: Template, model_key: str, orders: Orders = "all"
) -> list[np.ndarray]:
    """Log-probabilities (order, option), float64, of each question in its own orders. Raises :class:`MissingScores`."""
    found = [_found(store, q, _orders(orders, q), template, model_key) for q in questions]
    missing = [q.id for q, own in zip(questions, found, strict=True) if any(values is None for values in own)]
    if missing:
        raise MissingScores(
            f"{len(missing)} of {len(questions)} questions have no scores in {store.folder} (first: {missing[0]!r}; teacher "
            f"{model_key!r}, template {template.name!r}). Make them with `permdistill score` (see --help) or score()."
        )
    return [np.stack(own) for own in found]  # type: ignore[arg-type]


def probabilities(log_probs: np.ndarray) -> np.ndarray:
    """Log-probabilities over the vocabulary -> probabilities renormalised over the K options (last axis)."""
    return softmax(log_probs, axis=-1)


def label_mass(
    store: Store, questions: Iterable[Question], template: Template, model_key: str, orders: Orders = "all"
) -> np.ndarray:
    """What the labels get of the whole probability, mean over the orders: (item,). Of questions with scores only."""
    found = (_found(store, q, _orders(orders, q), template, model_key) for q in questions)
    scored = (np.stack(own) for own in found if all(one is not None for one in own))  # type: ignore[arg-type]
    return np.array([np.exp(own).sum(axis=-1).mean() for own in scored])


def audit(
    store: Store,
    teacher: Teacher,
    questions: Iterable[Question],
    template: Template,
    model_key: str | None = None,
    orders: Orders = "all",
) -> np.ndarray:
    """Score ``questions`` live and compare with the store: total variation between the two, (item and order,).

    ``model_key`` names the stored scores when they were made in another number format than the live teacher's.
    """
    asked = [Asked(question, _orders(orders, question)) for question in questions]
    every = [question for question, _ in asked]
    stored = list(map(probabilities, load_each(store, every, template, model_key or teacher.model_key, orders)))
    differences: dict[int, np.ndarray] = {}
    for done in in_groups(teacher, [[one] for one in asked], template):
        for place, values in done:
            live = probabilities(values.astype(np.float64))
            differences[place] = np.abs(stored[place] - live).sum(axis=-1) / 2
    return np.concatenate([differences[place] for place in range(len(asked))])


def audit_passes(differences: np.ndarray, mean: float, largest: float) -> bool:
    """Whether total variations (item and order,) stay within both limits. None at all, or NaN among them, do not."""
    return bool(len(differences) and differences.mean() <= mean and differences.max() <= largest)
