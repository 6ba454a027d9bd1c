"""Data sets of the model hub, as the profile "paper" takes them: RACE++, COSMOS QA, MedMCQA, ReClor, and all of SummEval.

RACE++ is RACE-M, RACE-H (Lai et al., EMNLP 2017) and RACE-C (Liang et al., ACML 2019) together. Sets whose published test
labels are hidden (COSMOS QA, MedMCQA, ReClor) are tested on their validation split.

None of these sets has an id that names one question in all of its revisions (RACE's names a passage), so a question's id is
a hash of its texts: another revision, another order of rows or a repeated row changes no id.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import datasets

from permdistill.assets import AssetError
from permdistill.data import ATTRIBUTES, Question, Split, Summary, clean, distinct, problems, summary_pairs, validate
from permdistill.hub import locate

_ABOVE = re.compile(r"^\s*(none) of the above( choices)?\b", re.IGNORECASE)
# Share of rows that may be left out as no proper questions; more is a changed layout, not slips of a set's authors, who
# repeat an option now and then (in 2% of CommonsenseQA, one of the laptop's sets).
MAX_BAD = {"does not fit the schema": 0.01, "repeated or empty option": 0.1}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class HubSet:
    """One set of questions with K = 4 options.

    repo     of permdistill.hub.REPOS
    config   of the repository, None for its only one
    splits   {"train" | "val" | "test": its name there}
    columns  that ``record`` reads
    record   row -> context, question, options, and the answer's index
    sizes    {split: published number of questions}
    words    about how many, on average: context, question, one option
    """

    repo: str
    config: str | None
    splits: Mapping[str, str]
    columns: tuple[str, ...]
    record: Callable[[Row], tuple[str, str, Sequence[str], int | None]]
    sizes: Mapping[str, int]
    words: tuple[int, int, int]


def _race(row: Row) -> tuple[str, str, Sequence[str], int]:
    return row["article"], row["question"], row["options"], "ABCD".find(str(row["answer"])[:1] or "?")


def _race_c(row: Row) -> tuple[str, str, Sequence[str], int]:
    return row["article"], row["question"], row["option"], row["label"]


def _cosmos(row: Row) -> tuple[str, str, Sequence[str], int]:
    """Most of its questions have an option "None of the above choices .", which says where the others stand and so has no
    meaning in another order. It becomes one that has: the same, without the place."""
    options = [_ABOVE.sub(r"\1 of the other choices", row[f"answer{i}"]) for i in range(4)]
    return row["context"], row["question"], options, int(row["label"])


def _medmcqa(row: Row) -> tuple[str, str, Sequence[str], int]:
    return "", row["question"], [row[name] for name in ("opa", "opb", "opc", "opd")], row["cop"]


def _reclor(row: Row) -> tuple[str, str, Sequence[str], int]:
    return row["context"], row["question"], row["answers"], row["label"]


_ALL = {"train": "train", "val": "validation", "test": "test"}
_RACE = ("article", "question", "options", "answer")
_COSMOS = ("context", "question", "answer0", "answer1", "answer2", "answer3", "label")
_MED = ("question", "opa", "opb", "opc", "opd", "cop")
# Sizes as the authors publish them. Words are rough means after their papers, which serve to plan (permdistill.plan) where
# the questions themselves are not at hand, and nothing else.
SETS: dict[str, HubSet] = {
    "race_middle": HubSet(
        "ehovy/race", "middle", _ALL, _RACE, _race, {"train": 25421, "val": 1436, "test": 1436}, (231, 9, 4)
    ),
    "race_high": HubSet("ehovy/race", "high", _ALL, _RACE, _race, {"train": 62445, "val": 3451, "test": 3498}, (353, 10, 6)),
    "race_c": HubSet(
        "tasksource/race-c",
        None,
        _ALL,
        ("article", "question", "option", "label"),
        _race_c,
        {"train": 12702, "val": 712, "test": 708},
        (424, 12, 8),
    ),
    "cosmosqa": HubSet("allenai/cosmos_qa", None, {"test": "validation"}, _COSMOS, _cosmos, {"test": 2985}, (69, 11, 8)),
    "medmcqa": HubSet("openlifescienceai/medmcqa", None, {"test": "validation"}, _MED, _medmcqa, {"test": 4183}, (0, 14, 3)),
    "reclor": HubSet(
        "metaeval/reclor",
        None,
        {"test": "validation"},
        ("context", "question", "answers", "label"),
        _reclor,
        {"test": 500},
        (74, 17, 21),
    ),
}
RACE = ("race_middle", "race_high", "race_c")  # together RACE++
SUMMEVAL_REPO = "mteb/summeval"
SUMMEVAL_DOCUMENTS, SUMMEVAL_SYSTEMS, SUMMEVAL_WORDS = 100, 16, (359, 6, 63)


def _rows(repo: str, config: str | None, split: str, columns: Sequence[str]) -> datasets.Dataset:
    """The rows of a split. Raises AssetError when they cannot be had, or lack columns."""
    source, revision = locate(repo)
    # Of a local folder datasets would take another folder's data, or old ones, from its cache: nothing tells them apart.
    anew = {} if revision else {"download_mode": "reuse_cache_if_exists", "verification_mode": "no_checks"}
    try:
        rows = datasets.load_dataset(source, config, split=split, revision=revision, **anew)
    except Exception as error:  # the hub's, the network's, and the file formats' own errors
        raise AssetError(f"{repo}, configuration {config}, split {split!r} cannot be loaded: {error}") from error
    if missing := [name for name in columns if name not in rows.column_names]:
        raise AssetError(
            f"{repo}: no column {missing[0]!r} (columns: {', '.join(rows.column_names)}): its layout has changed since this "
            "loader was written, pin the revision of permdistill.hub.REPOS that you know"
        )
    return rows.select_columns(list(columns))


def question_id(task: str, split: str, context: str, question: str, options: Sequence[str]) -> str:
    """task/split/hash of the texts."""
    text = json.dumps([context, question, list(options)])
    return f"{task}/{split}/{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def read(task: str, split: str) -> Split:
    """All questions of one of :data:`SETS` that fit the schema, each once. Raises AssetError, and ValueError when too many
    do not fit."""
    own, left_out = SETS[task], Counter[str]()
    first: dict[str, str] = {}
    kept: list[dict[str, Any]] = []
    seen: set[str] = set()
    rows = _rows(own.repo, own.config, own.splits[split], own.columns)
    for number, row in enumerate(rows):
        context, question, options, answer = own.record(row)
        record = {"context": context, "question": question, "options": options, "answer": answer}
        wrong = problems({"id": "?", **record}) or ["no answer"] * (answer is None)
        if wrong:
            texts = isinstance(options, (list, tuple)) and all(isinstance(o, str) for o in options)
            slip = texts and not distinct(options) and all(line.startswith("field 'options'") for line in wrong)
            reason = "repeated or empty option" if slip else "does not fit the schema"
            left_out[reason] += 1
            first.setdefault(reason, f"row {number}, {record}: {'; '.join(wrong)}")
            continue
        name = question_id(task, split, context, question, options)
        if name in seen:
            left_out["repeated"] += 1
            continue
        seen.add(name)
        kept.append(record | {"id": name})
    for reason, share in MAX_BAD.items():
        if (bad := left_out[reason]) > max(2, share * len(rows)):
            raise ValueError(
                f"{own.repo}, {split}: {bad} of {len(rows)} rows: {reason}, so its layout has changed since this loader was "
                f"written, pin the revision of permdistill.hub.REPOS that you know. The first: {first[reason]}"
            )
    return Split(validate(kept, own.repo), dict(left_out))


@lru_cache(maxsize=16)
def _load(task: str, split: str, source: tuple[str, str | None]) -> Split:
    whole = read(task, split)
    held_out: list[Question] = []
    if split == "train":
        held_out = [q for t in RACE for s in ("val", "test") for q in read(t, s).questions]
    cleaned = clean(whole.questions, held_out, k=4)
    counts = Counter(whole.left_out)
    counts.update(cleaned.left_out)
    return Split(cleaned.questions, dict(counts))


def load(task: str, split: str) -> Split:
    """A clean split of one of :data:`SETS`; training questions that also stand in val or test of any part of RACE++ are left
    out. Read once a process."""
    if split not in SETS[task].splits:
        raise ValueError(f"task {task!r}, split {split!r}: give one of {', '.join(SETS[task].splits)}")
    return _load(task, split, locate(SETS[task].repo))


def load_summeval(attributes: Sequence[str]) -> dict[str, list[Question]]:
    """All pairs of all 16 systems: {document id: questions}, as :func:`permdistill.data.load_summeval_pairs` makes them."""
    rows = _rows(SUMMEVAL_REPO, None, "test", ("id", "text", "machine_summaries", *ATTRIBUTES))
    documents = {}
    for row in rows:
        scores = [dict(zip(ATTRIBUTES, values, strict=True)) for values in zip(*(row[a] for a in ATTRIBUTES), strict=True)]
        named = zip(row["machine_summaries"], scores, strict=True)
        summaries = [Summary(f"{place:02d}", text, given) for place, (text, given) in enumerate(named)]
        documents[row["id"]] = (row["text"], summaries)
    return summary_pairs(documents, SUMMEVAL_SYSTEMS, 0, attributes)
