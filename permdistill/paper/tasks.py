"""The tasks: what each is called, where its questions come from, which of them are asked, and in which words.

    TASKS["arc_easy"].title, .k, .splits, .reader.licence
    load_task("arc_easy", "test")            its questions, with gold answers: a TaskSplit

One entry of :data:`TASKS` adds a data set; everything else reads it from there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from hashlib import sha256

import numpy as np

from permdistill.paper import hub, readers
from permdistill.paper.assets import Asset
from permdistill.paper.hub import Repo
from permdistill.paper.readers import ATTRIBUTES, HUB_FILES, SUMMEVAL_REPO, MmluFiles, OlmoFiles, Reader
from permdistill.prompts import TEMPLATES, Template
from permdistill.questions import Cleaned, Question, clean, sample, sample_contexts, stratified, unlabelled

SEED = 0
CHOICE, SUMMARIES = "multiple choice", "SummEval"  # families


@dataclass(frozen=True)
class TaskSplit:
    """Questions of one task and split (with gold answers where there are any), their template, and what was left out."""

    name: str
    questions: list[Question]
    template: Template
    members: list[str]  # per question: the task it belongs to, for several tasks in one
    left_out: dict[str, int]

    def first(self, n: int | None) -> TaskSplit:
        """The first ``n`` questions only; None: all."""
        return self.where(np.arange(len(self.questions)) < (len(self.questions) if n is None else n))

    def where(self, chosen: np.ndarray) -> TaskSplit:
        """The questions at which ``chosen`` (item,) is true."""
        places = np.flatnonzero(chosen)
        return replace(self, questions=[self.questions[i] for i in places], members=[self.members[i] for i in places])

    @property
    def k(self) -> int:
        """Number of options."""
        return len(self.questions[0].options)

    @cached_property
    def groups(self) -> list[str]:
        """Per question, what intervals resample as one: its passage (a hash), or itself if it has none or all share one."""
        same = len({q.context for q in self.questions}) == 1
        return [q.id if same or not q.context else sha256(q.context.encode()).hexdigest()[:16] for q in self.questions]

    @cached_property
    def unlabelled(self) -> list[Question]:
        """The questions without gold answers."""
        return unlabelled(self.questions)

    @property
    def family(self) -> str:
        """Of its task; questions that are nobody's are multiple choice."""
        return TASKS[self.name].family if self.name in TASKS else CHOICE


@dataclass(frozen=True)
class Task:
    """A multiple-choice data set.

    title     in tables and figures
    k         number of options; questions with another number are left out
    reader    of the published files
    splits    {"test", perhaps "train": the publishers' split}
    sizes     {split: number of questions drawn}; all of a split that is not there
    stratum   question -> what the sample shall have in equal shares
    held_out  tasks whose ``evaluated`` questions may not stand among the training questions
    evaluated the publishers' splits that are not for training
    template  the usual one
    papers    which of the paper's groups of tasks it is in, "" if in none
    whole_contexts  whether the sample is of contexts (passages) with all their questions: a teacher reads each once
    orders    {split: the orders that its scores are in, "cyclic"}; all of a split that is not there
    words     about how many, on average, in context, question and one option: for planning before anything is downloaded
    published {split: number of questions, as its authors say}, for the same purpose
    """

    title: str
    k: int
    reader: Reader
    splits: Mapping[str, str]
    sizes: Mapping[str, int] = field(default_factory=dict)
    stratum: Callable[[Question], str] | None = None
    held_out: Sequence[str] = ()
    evaluated: Sequence[str] = ("val", "test")
    template: str = "letters"
    papers: str = ""
    words: tuple[int, int, int] = (0, 0, 0)
    published: Mapping[str, int] = field(default_factory=dict)
    whole_contexts: bool = False
    orders: Mapping[str, str] = field(default_factory=dict)
    family: str = CHOICE

    @property
    def repo(self) -> Repo | None:
        """Of the model hub, where it comes from there."""
        return self.reader.repo

    @property
    def licence(self) -> str:
        """As its publishers declare it."""
        return self.reader.licence

    @property
    def assets(self) -> Sequence[Asset]:
        """Its files of the package index."""
        return self.reader.assets

    def load(self, name: str, split: str, template: str = "") -> TaskSplit:
        """The questions of a split, cleaned and sampled, in the usual template or another."""
        every = whole(name, split)
        questions = every.questions
        if split in self.sizes:
            draw = sample if self.stratum is None else partial(stratified, stratum=self.stratum)
            draw = sample_contexts if self.whole_contexts else draw
            questions = draw(questions, self.sizes[split], SEED)
        own = TEMPLATES[template or self.template]
        return TaskSplit(name, list(questions), own, [name] * len(questions), every.left_out)


# The samples whose scores are stored were drawn from what this left; :func:`permdistill.questions.permutation_unsafe` knows
# more, and another pool would be another sample.
_UNSAFE_WHEN_DRAWN = re.compile(
    r"(?<!\w)((all|none|both|neither|any|either|each)( \w+)? of (the )?(above|these|those|them|options|answers|choices)"
    r"|(both|neither|either)?\s*\(?[A-F]\)? (and|or|nor) \(?[A-F]\)?\s*$"
    r"|the above|above (answers|options|choices))(?!\w)",
)


def _unsafe_when_drawn(question: Question) -> bool:
    texts = (text for o in question.options for text in (o, o[:1].lower() + o[1:]))
    return any(_UNSAFE_WHEN_DRAWN.search(text) for text in texts)


def whole(name: str, split: str) -> Cleaned:
    """All clean questions of a multiple-choice task's split, and how many were left out for which reason. Read once a
    process, as long as the hub is in the same place."""
    repo = TASKS[name].repo
    return _clean(name, split, hub.locate(repo) if repo else None)


@lru_cache(maxsize=32)
def _clean(name: str, split: str, place: tuple[str, str | None] | None) -> Cleaned:
    task = TASKS[name]
    assert isinstance(task, Task)
    read = task.reader(task.splits[split])
    held_out: list[Question] = []
    if split == "train":
        others = [other for name in task.held_out if isinstance(other := TASKS[name], Task)]
        held_out = [q for other in others for s in other.evaluated for q in other.reader(s).questions]
    cleaned = clean(read.questions, held_out, task.k, _unsafe_when_drawn)
    counts = Counter(read.left_out)
    counts.update(cleaned.left_out)
    return Cleaned(cleaned.questions, dict(counts))


@dataclass(frozen=True)
class PairsTask:
    """One attribute of SummEval: which of two summaries of a document is better, K = 2.

    documents  reads them all
    systems    so many of a document's, drawn at random
    places     (split, number of documents) -> places of the split's documents; the splits share none
    """

    title: str
    attribute: str
    documents: Callable[[], readers.Documents]
    systems: int
    places: Callable[[str, int], Sequence[int]]
    template: str
    repo: Repo | None = None
    papers: str = ""
    words: tuple[int, int, int] = (359, 6, 63)
    licence: str = "MIT"
    assets: Sequence[Asset] = ()
    k: int = 2
    family: str = SUMMARIES
    splits: Sequence[str] = ("test", "train")
    published: Mapping[str, int] = field(default_factory=dict)

    def load(self, name: str, split: str, template: str = "") -> TaskSplit:
        """All pairs of the split's documents, in the usual template or another."""
        documents = readers.summary_pairs(self.documents(), self.systems, SEED, [self.attribute])
        every = list(documents)
        names = [every[place] for place in self.places(split, len(every))]
        questions = [q for n in names for q in documents[n]]
        return TaskSplit(name, questions, TEMPLATES[template or self.template], [name] * len(questions), {})


# --------------------------------------------------------------------------------------------------------------------
# From the package index, at the scale of a laptop

_TRAINED = ("arc_easy", "arc_challenge", "openbookqa")
_SAMPLE = {"test": 350, "train": 350}


def _trained(title: str, licence: str, name: str, train: str, val: str, test: str, papers: str = "") -> Task:
    reader = OlmoFiles(name, licence, {"train": train, "val": val, "test": test}, readers.plain)
    return Task(title, 4, reader, {"test": "test", "train": "train"}, _SAMPLE, held_out=_TRAINED, papers=papers)


_LAPTOP: dict[str, Task] = {
    "arc_easy": _trained(
        "ARC-Easy",
        "CC-BY-SA-4.0",
        "arc_easy",
        "57c3e478243278c7164b2f2ebefadd76f81a5ae95cea6d3e736e3b3892201f95",
        "dbc5261d09c00760c895f61baa1ba12780230152c3007596a0499a1e523e50a5",
        "c964881d2bb2ae8d9612c81ed6c5aecc402aa31e498af87f61bde503cc8224dc",
        papers=CHOICE,
    ),
    "arc_challenge": _trained(
        "ARC-Challenge",
        "CC-BY-SA-4.0",
        "arc_challenge",
        "5e49466aad7410c1adc4b5645a214d4bd94de45d9c7399a2dd85eab1098c4415",
        "fcace4993cd9ff5cd937414a001a28338da69aad43045f282adbadd633a9f907",
        "98e001dffe5fc8fa3b6e15bbca96b1d7a55e5a797c12ff10c18ed574d54bfa57",
        papers=CHOICE,
    ),
    "openbookqa": _trained(
        "OpenBookQA",
        "Apache-2.0",
        "openbookqa",
        "cea76dde84f5a6d1480fe48947acd53826f8e4eb2d5bab8c18071dd6af459505",
        "8d0e058dcf4b81ee81152bfc621729f23ffbeff8ea56a544649b396bce70309c",
        "4159dc91f154933a0778fb5520997cc2c5314fa7f014c527f3a56e4a5844bd15",
    ),
    # Published test labels are hidden: tested on validation questions.
    "csqa": Task(
        "CommonsenseQA",
        5,
        OlmoFiles("csqa", "MIT", {"val": "90f6dcf77edbe60275031dedfb0310e472bed9f2b4cd4393c4dc515810d1ba3f"}, readers.plain),
        {"test": "val"},
        {"test": 300},
    ),
    "hellaswag": Task(
        "HellaSwag",
        4,
        OlmoFiles(
            "hellaswag",
            "MIT",
            {"val": "7aa4f641b0ae3ff767347548f902d297b180366489f7bbdce9c5ba08d6b1a4e9"},
            lambda doc: (doc["query"], "Which ending continues the text best?"),
            id_column="doc_id",
        ),
        {"test": "val"},
        {"test": 300},
        papers=CHOICE,
    ),
    "mmlu": Task(
        "MMLU", 4, MmluFiles(), {"test": "test"}, {"test": 300}, stratum=lambda question: question.id.split("/")[2]
    ),
    "socialiqa": Task(
        "SocialIQA",
        3,
        OlmoFiles(
            "socialiqa",
            "not declared",
            {
                "train": "45654b8664409fb9d99ca0a97af23d42057956a0edae6d06a53c8c8980ecdd57",
                "val": "ac5bd8ae2e42922dfbd37517fdafa7a225f25527f874b702f2ea1a0c7e257270",
            },
            lambda doc: (doc["context"], doc["question"]),
        ),
        {"test": "val", "train": "train"},
        {"test": 1923, "train": 33177},
        held_out=("socialiqa",),
        evaluated=("val",),
    ),
    "boolq": Task(
        "BoolQ",
        2,
        OlmoFiles(
            "boolq",
            "CC-BY-SA-3.0",
            {
                "train": "999f85f66f66663af1d01892102682632809e10a46b4def4b6008087dc705d60",
                "val": "d5ed2e5115f49d24c37ec17fb7b4a6ec6bc58c65ce15410bed2b40342f08fbc9",
            },
            readers.passage,
            id_column="doc_id",
            alphabetical=True,
        ),
        {"test": "val", "train": "train"},
        {"test": 3270},
        held_out=("boolq",),
        evaluated=("val",),
    ),
    "piqa": Task(
        "PIQA",
        2,
        OlmoFiles(
            "piqa",
            "AFL-3.0",
            {
                "train": "ad69a9d61a47c5886e71f916160823b800e2538cb17c49d862e301679a000e00",
                "val": "bd015eff372a9a8ec19251fe669055f919a5ec2e490177f6002bc777f3bfb6ce",
            },
            lambda doc: (f"Goal: {doc['goal']}", "Which solution reaches the goal?"),
        ),
        {"test": "val", "train": "train"},
        {"test": 1837, "train": 16084},
        held_out=("piqa",),
        evaluated=("val",),
    ),
}


def _laptop_places(split: str, n: int) -> Sequence[int]:
    return [*range(25), *range(43, 58)] if split == "test" else range(25, 43)


_SUMMEVAL = {
    f"summeval_{attribute}": PairsTask(
        f"SummEval {attribute}",
        attribute,
        readers.summeval_file,
        8,
        _laptop_places,
        "summaries",
        assets=(readers.SUMMEVAL_FILE,),
    )
    for attribute in ATTRIBUTES
}


# --------------------------------------------------------------------------------------------------------------------
# From the model hub: the paper's own, whole. The usual templates are the paper's: options as "A) ..", summaries as "Summary
# A: ..".

GIGABYTES = {"ehovy/race": 0.06, "openlifescienceai/medmcqa": 0.09}  # to download, roughly; of the others 0.02 or less
RACE = ("race_middle", "race_high", "race_c")  # together RACE++: Lai et al., EMNLP 2017, and Liang et al., ACML 2019
_BOTH, _TEST = {"test": "test", "train": "train"}, {"test": "test"}


def _of_race(level: str, title: str, words: tuple[int, int, int], published: Mapping[str, int]) -> Task:
    reader = HUB_FILES[f"race_{level}"]
    more = {"held_out": RACE, "template": "brief", "papers": CHOICE, "words": words, "published": published}
    return Task(title, 4, reader, _BOTH, **more)  # type: ignore[arg-type]


_HUB: dict[str, Task] = {
    "race_middle": _of_race("middle", "RACE-M", (231, 9, 4), {"train": 25421, "val": 1436, "test": 1436}),
    "race_high": _of_race("high", "RACE-H", (353, 10, 6), {"train": 62445, "val": 3451, "test": 3498}),
    "race_c": Task(
        "RACE-C",
        4,
        HUB_FILES["race_c"],
        _BOTH,
        held_out=RACE,
        template="brief",
        papers=CHOICE,
        words=(424, 12, 8),
        published={"train": 12702, "val": 712, "test": 708},
    ),
    # The test labels of the other three are hidden: tested on validation questions.
    "cosmosqa": Task(
        "COSMOS QA",
        4,
        HUB_FILES["cosmosqa"],
        _TEST,
        template="brief",
        papers=CHOICE,
        words=(69, 11, 8),
        published={"test": 2985},
    ),
    "medmcqa": Task(
        "MedMCQA",
        4,
        HUB_FILES["medmcqa"],
        _TEST,
        template="brief",
        papers=CHOICE,
        words=(0, 14, 3),
        published={"test": 4183},
    ),
    "reclor": Task(
        "ReClor",
        4,
        HUB_FILES["reclor"],
        _TEST,
        template="brief",
        papers=CHOICE,
        words=(74, 17, 21),
        published={"test": 500},
    ),
}

# RACE-M and RACE-H, in the prompt in which the laptop's teacher was asked: what its students learn (30,000 questions) and
# answer. Their texts, unlike the numbers, do not lie in the repository (see withheld.py).
_WITHHELD = {
    "race": Task(
        "RACE",
        4,
        readers.SeveralFiles(tuple(HUB_FILES[name] for name in RACE[:2])),
        _BOTH,
        {"train": 30000},
        held_out=("race",),
        words=(318, 10, 5),
        published={"train": 87866, "val": 4887, "test": 4934},
        whole_contexts=True,
        orders={"train": "cyclic"},
    )
}


def _whole_places(split: str, n: int) -> Sequence[int]:
    """50 of the 100 documents to test on; students learn from the others."""
    cut = min(50, n // 2)
    return range(cut) if split == "test" else range(cut, n)


_WHOLE_SUMMEVAL = {
    f"summeval16_{attribute}": PairsTask(
        f"SummEval {attribute}",
        attribute,
        partial(readers.summeval_of_the_hub, SUMMEVAL_REPO),
        16,
        _whole_places,
        "summaries_letters",
        repo=SUMMEVAL_REPO,
        papers=SUMMARIES,
        published={"test": 50 * 120, "train": 50 * 120},
    )
    for attribute in ATTRIBUTES
}

# --------------------------------------------------------------------------------------------------------------------

TASKS: dict[str, Task | PairsTask] = {**_LAPTOP, **_SUMMEVAL, **_HUB, **_WITHHELD, **_WHOLE_SUMMEVAL}
LAPTOP_CHOICE, SUMMEVAL, HUB_CHOICE, WHOLE_SUMMEVAL = tuple(_LAPTOP), tuple(_SUMMEVAL), tuple(_HUB), tuple(_WHOLE_SUMMEVAL)
WITHHELD = tuple(_WITHHELD)
LAPTOP = (*LAPTOP_CHOICE, *SUMMEVAL)
MULTIPLE_CHOICE = _TRAINED  # what the laptop's students learn, as one


def load_task(name: str, split: str, template: str = "") -> TaskSplit:
    """One of :data:`TASKS`, with its usual template or another one. Raises ValueError for an unknown task or split."""
    if name not in TASKS or split not in TASKS[name].splits:
        without = ", ".join(t for t in TASKS if "train" not in TASKS[t].splits)
        raise ValueError(
            f"task {name!r}, split {split!r}: give one of {', '.join(TASKS)} and test, or train, which {without} do not have"
        )
    return TASKS[name].load(name, split, template)


def at_hand(name: str) -> bool:
    """Whether the texts of a task may be read: RACE's only where all of its files are on this machine already."""
    return name not in _WITHHELD or _WITHHELD[name].reader.at_hand  # type: ignore[attr-defined]


def title(name: str) -> str:
    """A task's name for people; of your own questions, the name that they have."""
    return TASKS[name].title if name in TASKS else name
