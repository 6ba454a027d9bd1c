"""What the paper's runs consist of: questions, teachers, templates, students.

The notebooks, ``permdistill score`` and the tests all read the same definitions, so that the committed scores, the live
audit and the tables always speak of the same questions. A :class:`Profile` says how much of it a run does.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from permdistill.data import (
    ATTRIBUTES,
    MULTIPLE_CHOICE,
    TEST_ONLY,
    Question,
    load_multiple_choice,
    load_summeval_pairs,
    sample,
    stratified,
)
from permdistill.prompts import TEMPLATES, Template
from permdistill.students import StudentConfig
from permdistill.teachers import TEACHERS
from permdistill.training import TrainingConfig

SEED = 0
QUESTIONS = 350  # per multiple-choice set that has training questions, and split
TEST_ONLY_QUESTIONS = 300  # per multiple-choice set that has none
TEST_DOCUMENTS = (*range(25), *range(43, 58))  # places of SummEval's documents
TRAIN_DOCUMENTS = tuple(range(25, 43))
SYSTEMS = 8  # of SummEval's 16, per document
SUMMEVAL = tuple(f"summeval_{attribute}" for attribute in ATTRIBUTES)
TASKS = (*MULTIPLE_CHOICE, *TEST_ONLY, *SUMMEVAL)
# Other ways to put the questions of some tasks; the first of each kind is the one that everything else uses.
PROMPTS = {"letters": ("letters", "numbers", "brief"), "summaries": ("summaries", "summaries_letters")}
PUT_DIFFERENTLY = {"letters": (*MULTIPLE_CHOICE, "mmlu", "socialiqa", "piqa"), "summaries": SUMMEVAL}


@dataclass(frozen=True)
class Task:
    """Questions of one task and split (with gold answers where there are any), their template, and what was left out."""

    name: str
    questions: list[Question]
    template: Template
    groups: list[str]  # per question: the unit of resampling for intervals (the item; for pairs the document)
    members: list[str]  # per question: the task it belongs to, for several tasks in one
    left_out: dict[str, int]

    def first(self, n: int | None) -> Task:
        """The first ``n`` questions only; None: all."""
        return self.where(np.arange(len(self.questions)) < (len(self.questions) if n is None else n))

    def where(self, chosen: np.ndarray) -> Task:
        """The questions at which ``chosen`` (item,) is true."""
        places = np.flatnonzero(chosen)
        return replace(
            self,
            questions=[self.questions[i] for i in places],
            groups=[self.groups[i] for i in places],
            members=[self.members[i] for i in places],
        )

    @property
    def k(self) -> int:
        """Number of options."""
        return len(self.questions[0].options)


def splits(name: str) -> tuple[str, ...]:
    """The splits of one of :data:`TASKS`."""
    return ("test",) if name in TEST_ONLY else ("test", "train")


def load_task(name: str, split: str, template: str = "") -> Task:
    """One of :data:`TASKS`, with its usual template or another one. SummEval's splits have different documents."""
    if name not in TASKS or split not in splits(name):
        raise ValueError(
            f"task {name!r}, split {split!r}: give one of {', '.join(TASKS)} and test, or train, which "
            f"{', '.join(TEST_ONLY)} do not have here"
        )
    if name not in SUMMEVAL:
        whole = load_multiple_choice(name, split)
        n = TEST_ONLY_QUESTIONS if name in TEST_ONLY else QUESTIONS
        by_subject = partial(stratified, stratum=lambda question: question.id.split("/")[2])
        questions = (by_subject if name == "mmlu" else sample)(whole.questions, n, SEED)
        usual = TEMPLATES[template or "letters"]
        return Task(name, questions, usual, [q.id for q in questions], [name] * len(questions), whole.left_out)
    documents = load_summeval_pairs(SYSTEMS, SEED, [name.removeprefix("summeval_")])
    every = list(documents)
    names = [every[place] for place in (TEST_DOCUMENTS if split == "test" else TRAIN_DOCUMENTS)]
    questions = [q for n in names for q in documents[n]]
    groups = [n for n in names for _ in documents[n]]
    return Task(name, questions, TEMPLATES[template or "summaries"], groups, [name] * len(questions), {})


@dataclass(frozen=True)
class Run:
    """One student to train: what it is, how it is trained, and on what.

    greedy   whether the decision that error correction sees is the teacher's most probable one, instead of a sampled one
    power    targets are the debiased probabilities to this power, renormalised: 1 / temperature; infinity: hard targets
    draws    targets are histograms of so many black-box calls a question; 0: averages of the probabilities over all orders
    n_train  so many training questions, drawn at random, smaller samples inside larger ones; 0: all
    orders   "all": every epoch shows a question in a new order; "original": always in the data set's
    """

    student: StudentConfig
    training: TrainingConfig
    greedy: bool = False
    power: float = 1.0
    draws: int = 0
    n_train: int = 0
    orders: str = "all"

    def __post_init__(self) -> None:
        if self.orders not in ("all", "original"):
            raise ValueError(f"orders = {self.orders!r}: give 'all' or 'original'")
        if min(self.draws, self.n_train) < 0:
            raise ValueError(f"draws = {self.draws}, n_train = {self.n_train}: give numbers of at least 0")

    @property
    def _unusual(self) -> dict[str, bool]:
        return {
            "greedy": self.greedy,
            f"power{self.power:g}": self.power != 1,
            f"draws{self.draws}": self.draws > 0,
            f"questions{self.n_train}": self.n_train > 0,
            f"{self.orders}-order": self.orders != "all",
        }

    @property
    def name(self) -> str:
        """For files, e.g. "all-MiniLM-L6-v2-joint-plain-k4-4epochs-lr0.0001"; what is not the default is added."""
        s, t = self.student, self.training
        name = f"{Path(s.encoder).name}-{s.head}-{s.inputs}-k{s.k}-{t.epochs}epochs-lr{t.learning_rate:g}"
        extra = self._unusual | {
            f"warmup{t.warmup:g}": t.warmup != TrainingConfig.warmup,
            f"seed{t.seed}": t.seed != 0,
        }
        return "-".join([name, *(word for word, wanted in extra.items() if wanted)])

    @property
    def title(self) -> str:
        """For tables, e.g. "all-MiniLM-L6-v2, joint head, distillation"; the same for all seeds and learning rates."""
        methods = {"plain": "distillation", "prediction": "error correction", "distribution": "white-box error correction"}
        method = methods[self.student.inputs] + (" (greedy)" if self.greedy else "")
        extra = {
            "hard targets" if np.isinf(self.power) else f"targets to the power {self.power:g}": self.power != 1,
            f"{self.draws} draws": self.draws > 0,
            f"{self.n_train} questions": self.n_train > 0,
            "original order only": self.orders != "all",
        }
        head = f"{self.student.head.replace('_', '-')} head"
        return ", ".join(
            [Path(self.student.encoder).name, head, method, *(word for word, wanted in extra.items() if wanted)]
        )


def _runs(encoder: str, k: int, joint: int, per_option: int, training: TrainingConfig) -> tuple[Run, ...]:
    """Both heads x both inputs of one encoder, with the heads' ``max_length``."""
    return tuple(
        Run(StudentConfig(encoder, head, inputs, k, {"joint": joint, "per_option": per_option}[head]), training)
        for head in ("joint", "per_option")
        for inputs in ("plain", "prediction")
    )


@dataclass(frozen=True)
class Profile:
    """How much a run does.

    teachers         whose scores the teachers' tables report on; the first one teaches
    tasks            what they report on
    n_test, n_train  questions per task, at most
    n_others         the same for other teachers: sets with training questions, test only, SummEval; 0: left out
    n_prompts        test questions per task that are put in several ways: multiple choice, SummEval
    n_students       test questions per task that students answer: multiple choice, SummEval
    multiple_choice  students for multiple choice
    pairs            students for SummEval
    api_teacher      whom the black-box notebook asks, where the user has no API of her own
    n_api, draws     its questions, for training and testing together, and decisions for each training question
    """

    teachers: tuple[str, ...]
    tasks: tuple[str, ...]
    n_test: int
    n_train: int
    n_others: tuple[int, int, int]
    n_prompts: tuple[int, int]
    n_students: tuple[int, int]
    multiple_choice: tuple[Run, ...]
    pairs: tuple[Run, ...]
    api_teacher: str = TEACHERS[1]
    n_api: int = 100
    draws: int = 16

    def n_questions(self, teacher: str, task: str) -> int:
        """How many test questions of ``task`` are asked of ``teacher``, at most."""
        if teacher == self.teachers[0]:
            return self.n_test
        kinds: tuple[Collection[str], ...] = (MULTIPLE_CHOICE, TEST_ONLY, SUMMEVAL)
        return next(n for n, kind in zip(self.n_others, kinds, strict=True) if task in kind)


def own_student(k: int) -> Run:
    """A student to begin with, for questions of ``k`` options: exactly order-invariant, 23M parameters."""
    return Run(StudentConfig("all-MiniLM-L6-v2", "per_option", "plain", k, 256), TrainingConfig(learning_rate=1e-4))


def black_box_students(k: int, draws: int) -> tuple[Run, ...]:
    """Students of an API's ``draws`` decisions a question: with one decision of the API at inference too, and without."""
    training = TrainingConfig(epochs=4, learning_rate=1e-4, batch_size=8)
    return tuple(
        Run(StudentConfig("all-MiniLM-L6-v2", "per_option", inputs, k, 256), training, draws=draws)
        for inputs in ("prediction", "plain")
    )


_TINY = TrainingConfig(epochs=1, learning_rate=1e-4)
PROFILES = {
    # Runs in a minute: the notebooks' defaults, what nbval checks.
    "smoke": Profile(
        teachers=TEACHERS[:1],
        tasks=TASKS,
        n_test=84,
        n_train=32,
        n_others=(84, 84, 84),
        n_prompts=(40, 140),
        n_students=(84, 84),
        multiple_choice=_runs("all-MiniLM-L6-v2", 4, 192, 128, _TINY),
        pairs=_runs("all-MiniLM-L6-v2", 2, 384, 256, _TINY)[::2],
        api_teacher="smollm2-135m",
        n_api=30,
        draws=8,
    ),
    # The paper at the scale of a laptop.
    "full": Profile(
        teachers=TEACHERS,
        tasks=TASKS,
        n_test=10**9,
        n_train=10**9,
        n_others=(350, 150, 10 * 28),
        n_prompts=(80, 5 * 28),
        n_students=(350, 25 * 28),
        # Within the hour on 2 cores: the larger encoder does not do everything. For summaries the lengths leave both heads
        # about the same share of the article, since the joint head's sequence holds two summaries.
        multiple_choice=(
            *_runs("all-MiniLM-L6-v2", 4, 256, 128, TrainingConfig(epochs=4, learning_rate=1e-4)),
            *_runs("all-mpnet-base-v2", 4, 256, 128, TrainingConfig(epochs=2, learning_rate=5e-5))[:3],
        ),
        pairs=(
            *_runs("all-MiniLM-L6-v2", 2, 384, 256, TrainingConfig(epochs=1, learning_rate=1e-4, batch_size=28)),
            *_runs("all-mpnet-base-v2", 2, 384, 256, TrainingConfig(epochs=1, learning_rate=5e-5, batch_size=28))[2:3],
        ),
    ),
}


@dataclass(frozen=True)
class Cell:
    """One student of the matrix: its teacher, the tasks that it learns and answers as one, and the run."""

    teacher: str
    tasks: tuple[str, ...]
    run: Run

    @property
    def about(self) -> str:
        """The tasks in a word: "multiple_choice", "summeval", or the one task's name."""
        names = {tuple(MULTIPLE_CHOICE): "multiple_choice", SUMMEVAL: "summeval"}
        return names.get(self.tasks, "-".join(self.tasks))


SEEDS = (0, 1, 2)
_MINILM, _MPNET = "all-MiniLM-L6-v2", "all-mpnet-base-v2"
_LENGTH = {"joint": 256, "per_option": 128}
_METHODS: tuple[dict[str, Any], ...] = (
    {"inputs": "plain"},
    {"inputs": "distribution"},
    {"inputs": "prediction"},
    {"inputs": "prediction", "greedy": True},
)


def _cell(
    teacher: str = TEACHERS[0],
    encoder: str = _MINILM,
    head: str = "per_option",
    inputs: str = "plain",
    training: dict[str, Any] | None = None,
    **run: Any,
) -> Cell:
    usual = {"epochs": 4, "learning_rate": 1e-4} if encoder == _MINILM else {"epochs": 2, "learning_rate": 5e-5}
    student = StudentConfig(encoder, head, inputs, 4, _LENGTH[head])
    return Cell(teacher, tuple(MULTIPLE_CHOICE), Run(student, TrainingConfig(**usual | (training or {})), **run))


# Students that `make paper` does not train, since together they take hours: `make students` does, and their predictions
# are kept. The first of each part matter most. A cell may belong to several parts.
MATRIX: dict[str, tuple[Cell, ...]] = {
    "heads and inputs": tuple(
        _cell(teacher, head=head, training={"seed": seed}, **method)
        for head in ("per_option", "joint")
        for seed in SEEDS
        for teacher in TEACHERS[:2]
        for method in _METHODS
    ),
    "draws": tuple(_cell(draws=n) for n in (64, 32, 16, 8, 4, 2, 1)),
    "questions": tuple(_cell(n_train=n) for n in (500, 250, 125)),
    "targets": (*(_cell(power=power) for power in (2.0, 4.0, 8.0, np.inf)), _cell(orders="original")),
    "encoders": tuple(_cell(teacher, _MPNET, **method) for teacher in TEACHERS[:2] for method in _METHODS[:2]),
    "orders": tuple(_cell(head="joint", inputs=i, orders="original") for i in ("plain", "distribution")),
    "collapse": tuple(
        _cell(head="joint", training={"learning_rate": rate, "warmup": warmup, "seed": seed})
        for seed in SEEDS[:2]
        for rate in (1e-5, 3e-5, 1e-4, 3e-4)
        for warmup in (0.1, 0.5)
    ),
}
