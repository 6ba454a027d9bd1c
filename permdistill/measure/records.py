"""Records of what any judge or harness said: read from JSONL, JSON, CSV or parquet (each also .gz), checked, as flat arrays.

A record is one item in one order::

    id             the item, a string (or a whole number)
    order          list of K: order[k] is the index of the option that was shown at position k
    probabilities  list of K, by position: of the labels; what other tokens got may be missing from the sum. Or
    log_probs      list of K, by position, null where a label is not listed. Or
    decision       the *index of the option* that was chosen, or the *letter of the position* ("B": the second one shown),
                   or "tie", or null: no verdict could be read
    draw           optional: tells apart records of one item in one order
    answer         optional: index of the right option
    systems        optional: K names, by option, of what is compared; measure ranks the systems of pairs

Items may come in any orders and any number of them, with 2 to 26 options. All bad records are named at once.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from permdistill import layouts
from permdistill.measure.rows import Problems, Row, rows
from permdistill.orders import LETTERS, MAX_OPTIONS, MIN_OPTIONS
from permdistill.questions import HALF

LARGE = 1e300  # a whole number in JSON may be larger than any floating-point one
EXACT = 2**53  # whole numbers above it are rounded by many readers of JSON
VALUES = ("probabilities", "log_probs", "decision")
RELATIVE = "relative"  # a field that adapters set: values that compare the options alone, so that their sum says nothing
ROUNDING = 1e-3  # how far a sum of probabilities may lie above 1


@dataclass(frozen=True)
class Block:
    """Items with the same number of options and of records: dense arrays.

    items    (item,) places in :attr:`Records.ids`
    orders   (item, order, K)
    P        (item, order, option), NaN where a verdict failed; a tie is 1/K each
    answers  (item,) option indices, -1 where there is none
    """

    items: np.ndarray
    orders: np.ndarray
    P: np.ndarray
    answers: np.ndarray


@dataclass(frozen=True)
class Records:
    """Checked records, sorted by item (as first met) and order, in flat arrays: no object for each record.

    ids      of the items
    item     (record,) place in ``ids``
    k        (record,) number of options
    orders   (sum of k,) one order after the other
    p        (sum of k,) probabilities by position, each record's summing to 1; 1/K for a tie, NaN where a verdict failed
    hard     (record,) whether it was a decision rather than probabilities
    mass     (record,) what the labels got of the whole probability; NaN where that is not known
    answers  (item,) option indices, -1 where there is none
    systems  {place in ``ids``: names of the K systems compared}, of items that say so
    """

    ids: list[str]
    item: np.ndarray
    k: np.ndarray
    orders: np.ndarray
    p: np.ndarray
    hard: np.ndarray
    mass: np.ndarray
    answers: np.ndarray
    systems: dict[int, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each record's values begin, (record,)."""
        return np.cumsum(self.k, dtype=np.int64) - self.k

    @cached_property
    def failed(self) -> np.ndarray:
        """Whether a record has no verdict, (record,)."""
        return np.isnan(self.p[self.starts])

    @cached_property
    def counts(self) -> np.ndarray:
        """Number of records of each item, (item,)."""
        return np.bincount(self.item, minlength=len(self.ids))

    @cached_property
    def repeated(self) -> np.ndarray:
        """Whether a record has the order of the one before it, of the same item: (record,)."""
        same = np.concatenate([[False], self.item[1:] == self.item[:-1]])
        before = np.arange(len(self.orders)) - np.repeat(np.where(same, self.k, 0), self.k)
        return same & np.logical_and.reduceat(self.orders == self.orders[before], self.starts)

    @cached_property
    def options(self) -> np.ndarray:
        """Number of options of each item, (item,)."""
        result = np.zeros(len(self.ids), dtype=np.int64)
        result[self.item] = self.k
        return result

    @cached_property
    def incomplete(self) -> np.ndarray:
        """Items with a failed verdict, or with fewer records than most items of as many options: (item,)."""
        result = np.zeros(len(self.ids), dtype=bool)
        result[self.item[self.failed]] = True
        for k in np.unique(self.options):
            own = self.options == k
            usual = np.bincount(self.counts[own])
            result |= own & (self.counts < len(usual) - 1 - usual[::-1].argmax())
        return result

    def where(self, keep: np.ndarray) -> Records:
        """The records chosen by a mask (record,); items without any leave too."""
        kept = np.unique(self.item[keep])
        renamed = np.zeros(len(self.ids), dtype=np.int32)
        renamed[kept] = np.arange(len(kept))
        values = np.repeat(keep, self.k)
        return Records(
            [self.ids[i] for i in kept],
            renamed[self.item[keep]],
            self.k[keep],
            self.orders[values],
            self.p[values],
            self.hard[keep],
            self.mass[keep],
            self.answers[kept],
            {place: self.systems[i] for place, i in enumerate(kept.tolist()) if i in self.systems} if self.systems else {},
        )

    def blocks(self) -> Iterator[Block]:
        """All records as dense arrays, a block for each number of options and of records."""
        first = np.searchsorted(self.item, np.arange(len(self.ids)))
        shapes = np.stack([self.options, self.counts], axis=1)
        for k, n in np.unique(shapes, axis=0):
            items = np.flatnonzero((shapes == (k, n)).all(axis=1))
            places = self.starts[first[items][:, None] + np.arange(n)][..., None] + np.arange(k)  # (item, order, K)
            orders = self.orders[places].astype(np.int64)
            P = np.empty(places.shape)
            np.put_along_axis(P, orders, self.p[places], axis=-1)
            yield Block(items, orders, P, self.answers[items])


class _Builder:
    """Checks records one by one into growing arrays."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.items: dict[str, int] = {}
        self.numbers = bytearray()  # by item: whether its id was a number
        self.first, self.options, self.answers = array("q"), array("b"), array("h")  # by item; first: its first record
        self.systems: dict[int, tuple[str, ...]] = {}
        self.files: list[tuple[Path, str]] = []  # and what their lines are called
        self.item, self.line, self.draw, self.file = array("l"), array("q"), array("q"), array("i")  # by record
        self.k, self.hard, self.mass = array("b"), array("b"), array("d")
        self.orders, self.p = array("b"), array("d")  # by value

    def add(self, line: int, record: Any) -> None:
        """Take a record, or note what is wrong with it."""
        if not isinstance(record, Mapping):
            self.problems.add(line, f"is {_quoted(record)}: give an object with id, order and probabilities or decision")
            return
        found = _id_problem(record) or _order_problem(record)
        if not found:
            values, mass, found = _values(record)
        if not found:
            found = self._item_problem(record)
        if found:
            self.problems.add(line, f"(id {_quoted(record.get('id'))}) {found}")
            return
        order, here = record["order"], (self.problems.path, self.problems.unit)
        if self.files[-1:] != [here]:
            self.files.append(here)
        self.item.append(self.items[str(record["id"])])
        self.line.append(line)
        self.file.append(len(self.files) - 1)
        self.draw.append(record.get("draw") or 0)
        self.k.append(len(order))
        self.hard.append(record.get("probabilities") is None and record.get("log_probs") is None)
        self.mass.append(mass)
        self.orders.extend(order)
        self.p.extend(values)

    def _at(self, record: int) -> str:
        """Where a record stands, seen from the file that is read now."""
        (path, unit), line = self.files[self.file[record]], self.line[record]
        return f"{unit} {line}" if path == self.problems.path else f"{path}, {unit} {line}"

    def _item_problem(self, record: Mapping[str, Any]) -> str | None:
        """What does not fit the item's other records; a new item is noted."""
        name, k, answer, draw = str(record["id"]), len(record["order"]), record.get("answer"), record.get("draw")
        if answer is not None and (type(answer) is not int or not 0 <= answer < k):
            return f"field 'answer' is {_quoted(answer)}: give the index of the right option, in 0..{k - 1}"
        if draw is not None and (type(draw) is not int or not 0 <= draw < EXACT):
            return f"field 'draw' is {_quoted(draw)}: give a whole number"
        systems = record.get("systems")
        if systems is not None and not (isinstance(systems, list) and len({s for s in systems if _is_text(s)}) == k):
            return f"field 'systems' is {_quoted(systems)}: give {k} different names, by option"
        place, number = self.items.get(name), type(record["id"]) is int
        if systems is not None:
            self.systems.setdefault(len(self.items) if place is None else place, tuple(systems))
        if place is None:
            self.items[name] = len(self.items)
            self.numbers.append(number)
            self.first.append(len(self.item))  # the record that is being added
            self.options.append(k)
            self.answers.append(-1 if answer is None else answer)
            return None
        at = self._at(self.first[place])
        if number != self.numbers[place]:
            return f"field 'id' is {_quoted(record['id'])}: as a string and as a number; write it as in {at}"
        if k != self.options[place]:
            return f"field 'order' is {_quoted(record['order'])}: this item has {self.options[place]} options in {at}"
        if answer is not None and answer != self.answers[place]:
            if self.answers[place] >= 0:
                return f"field 'answer' is {answer}: it is {self.answers[place]} in {at}"
            self.answers[place] = answer
        return None

    def build(self) -> Records:
        """The records, sorted. Raises BadRecords that names all bad ones."""
        k, item = np.frombuffer(self.k, dtype=np.int8), np.frombuffer(self.item, dtype=self.item.typecode).astype(np.int32)
        orders, draw = np.asarray(self.orders), np.asarray(self.draw)
        starts = np.cumsum(k, dtype=np.int64) - k
        longest = int(k.max()) if len(k) else 0
        padded = np.full((len(k), longest), -1, dtype=np.int8)
        padded[np.arange(longest) < k[:, None]] = orders
        sequence = np.lexsort((draw, *padded.T[::-1], item))
        same = np.flatnonzero(
            (padded[sequence[1:]] == padded[sequence[:-1]]).all(axis=1)
            & (item[sequence[1:]] == item[sequence[:-1]])
            & (draw[sequence[1:]] == draw[sequence[:-1]])
        )
        names = list(self.items)
        for i in same.tolist():
            earlier, later = sorted(sequence[i : i + 2].tolist())
            self.problems.path, self.problems.unit = self.files[self.file[later]]
            text = f"(id {names[item[later]]!r}) field 'order' is {padded[later][: k[later]].tolist()}: this item has it "
            text += f"already, in {self._at(earlier)}; repeated calls need a field 'draw'"
            self.problems.add(self.line[later], text)
        if not len(k) and not self.problems.n:
            self.problems.add(0, "no records")
        self.problems.check()
        longest_values = np.repeat(starts[sequence], k[sequence])
        k = k[sequence]
        within = np.arange(len(longest_values)) - np.repeat(np.cumsum(k, dtype=np.int64) - k, k)
        places = longest_values + within
        hard, mass = np.asarray(self.hard).astype(bool)[sequence], np.asarray(self.mass)[sequence]
        answers = np.asarray(self.answers).astype(np.int64)
        return Records(
            names, item[sequence], k, orders[places], np.asarray(self.p)[places], hard, mass, answers, self.systems
        )


def build(records: Iterable[Row], problems: Problems) -> Records:
    """Records with their lines -> flat arrays. Raises BadRecords that names all bad ones."""
    builder = _Builder(problems)
    for line, record in records:
        builder.add(line, record)
    return builder.build()


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}.. ({len(text)} characters)"


def _id_problem(record: Mapping[str, Any]) -> str | None:
    name = record.get("id")
    if type(name) is int and abs(name) > EXACT:
        return f"field 'id' is {name}: a number this long is rounded by other readers, write it as a string"
    if type(name) is not int and (not isinstance(name, str) or not name.strip()):
        return f"field 'id' is {_quoted(name)}: give a string"
    if isinstance(name, str) and not _is_text(name):
        return f"field 'id' is {_quoted(name)}: half a character (a lone surrogate), write it out"
    return None


def _is_text(value: Any) -> bool:
    """Whether it is a string without half characters (lone surrogates)."""
    return isinstance(value, str) and (value.isascii() or not HALF.search(value))


def _order_problem(record: Mapping[str, Any]) -> str | None:
    order = record.get("order")
    if not isinstance(order, list) or any(type(o) is not int for o in order) or sorted(order) != list(range(len(order))):
        return f"field 'order' is {_quoted(order)}: give a permutation of 0..K-1"
    if not MIN_OPTIONS <= len(order) <= MAX_OPTIONS:
        return f"field 'order' is {_quoted(order)}: {len(order)} options, give {MIN_OPTIONS} to {MAX_OPTIONS}"
    return None


def _values(record: Mapping[str, Any]) -> tuple[list[float], float, str | None]:
    """Probabilities by position that sum to 1, the labels' mass (NaN: not known), and what is wrong."""
    order, given = record["order"], [name for name in VALUES if record.get(name) is not None]
    k = len(order)
    if len(given) > 1 or not (given or "decision" in record):
        return [], math.nan, f"has {' and '.join(given) or 'no verdict'}: give one of {', '.join(VALUES)}"
    if not given:
        return [math.nan] * k, math.nan, None
    name = given[0]
    values = record[name]
    if name == "decision":
        return _decision(values, order)
    numbers = isinstance(values, list) and all(
        type(v) is float or type(v) is int or (v is None and name == "log_probs") for v in values
    )
    if not numbers or len(values) != k:
        return [], math.nan, f"field {name!r} is {_quoted(values)}: give one number a position, {k} as 'order' has"
    if name == "log_probs":
        values = [-math.inf if v is None else v for v in values]
        top = max(values)
        # Of the whole: exp(top) may underflow, so that the shares are taken relative to the largest.
        if not (-math.inf < top <= ROUNDING and all(v == -math.inf or -LARGE < v <= top for v in values)):
            return [], math.nan, f"field 'log_probs' is {_quoted(record[name])}: give logarithms of at most 0, not all null"
        relative = [math.exp(v - top) for v in values]
        total = sum(relative)
        mass = math.exp(top) * total
        if mass > 1 + ROUNDING and not record.get(RELATIVE):
            return [], math.nan, f"field 'log_probs' is {_quoted(record[name])}: their probabilities sum to {mass:.4g}"
        return [v / total for v in relative], math.nan if record.get(RELATIVE) else min(mass, 1.0), None
    total = sum(values) if all(-LARGE < v < LARGE for v in values) else math.nan
    if not (0 < total <= 1 + ROUNDING and min(values) >= 0):
        fix = "give numbers in 0..1 with a sum above 0 and at most 1"
        return [], math.nan, f"field 'probabilities' is {_quoted(values)}: {fix}"
    return [v / total for v in values], math.nan if record.get(RELATIVE) else min(total, 1.0), None


def _decision(value: Any, order: list[int]) -> tuple[list[float], float, str | None]:
    k = len(order)
    position = None
    if type(value) is int and 0 <= value < k:
        position = order.index(value)
    elif isinstance(value, str) and value.strip().lower() == "tie":
        return [1 / k] * k, math.nan, None
    elif isinstance(value, str) and len(value.strip()) == 1 and value.strip() in LETTERS[:k]:
        position = LETTERS.index(value.strip())
    if position is None:
        fix = f'give an option\'s index in 0..{k - 1}, the label A..{LETTERS[k - 1]} of a position, "tie", or null'
        return [], math.nan, f"field 'decision' is {_quoted(value)}: {fix}"
    return [float(i == position) for i in range(k)], math.nan, None


# --------------------------------------------------------------------------------------------------------------------
# Gold answers


def with_answers(records: Records, path: str | Path, columns: Mapping[str, str] | None = None) -> Records:
    """The records with gold answers from a file of questions: id, answer (index, letter, or null), and k or options (a list
    or a number), or in a layout of :mod:`permdistill.layouts`, ``columns`` naming another one. Texts are not needed. Raises
    BadRecords that names what does not fit."""
    problems = Problems(Path(path))
    known: dict[str, tuple[int | None, int | None, int]] = {}
    read = list(rows(path, problems))
    for (line, _), row in zip(read, layouts.converted((row for _, row in read), columns), strict=True):
        found = _gold_problem(row)
        name = str(row["id"]) if not found else ""
        if not found and name in known:
            found = f"already used in line {known[name][2]}; ids must be unique"
        if found:
            problems.add(line, f"(id {_quoted(row.get('id') if isinstance(row, Mapping) else row)}) {found}")
            continue
        options, answer = row.get("k", row.get("options")), row.get("answer")
        k = len(options) if isinstance(options, list) else options
        known[name] = (k, LETTERS.index(answer) if isinstance(answer, str) else answer, line)
    problems.check()
    answers = records.answers.copy()
    for place, (name, k) in enumerate(zip(records.ids, records.options.tolist(), strict=True)):
        own, answer, _ = known.get(name, (None, None, 0))
        if name not in known or (own is not None and own != k) or (answer is not None and answer >= k):
            found = "no such question" if name not in known else f"{own} options" if own else f"answer {answer}"
            problems.add(0, f"id {name!r} has {k} options, {path} has {found}")
        elif answer is not None:
            answers[place] = answer
    problems.check()
    return replace(records, answers=answers)


def _gold_problem(row: Any) -> str | None:
    if not isinstance(row, Mapping):
        return "give an object with id and answer"
    options, answer = row.get("k", row.get("options")), row.get("answer")
    if found := _id_problem(row):
        return found
    if options is not None and not isinstance(options, list) and type(options) is not int:
        return f"field 'k' is {_quoted(options)}: give the number of options"
    if answer is None or (type(answer) is int and answer >= 0) or (isinstance(answer, str) and answer in tuple(LETTERS)):
        return None
    return f"field 'answer' is {_quoted(answer)}: give the index of the right option, its letter, or null"
