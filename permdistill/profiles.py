"""What the paper's runs consist of: questions, teachers, templates, students.

The notebooks, ``permdistill score`` and the tests all read the same definitions, so that the committed scores, the live
audit and the tables always speak of the same questions. A :class:`Profile` says how much of it a run does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from permdistill.data import ATTRIBUTES, MULTIPLE_CHOICE, Question, load_multiple_choice, load_summeval_pairs, sample
from permdistill.prompts import TEMPLATES, Template
from permdistill.students import StudentConfig
from permdistill.teachers import TEACHERS
from permdistill.training import TrainingConfig

SEED = 0
TEST_QUESTIONS = 250  # per multiple-choice set
TRAIN_QUESTIONS = 350  # per multiple-choice set
TEST_DOCUMENTS = 25
TRAIN_DOCUMENTS = 18
SYSTEMS = 8  # of SummEval's 16, per document
TASKS = (*MULTIPLE_CHOICE, *(f"summeval_{attribute}" for attribute in ATTRIBUTES))


@dataclass(frozen=True)
class Task:
    """Questions of one task and split (with gold answers where there are any), their template, and what was left out."""

    name: str
    questions: list[Question]
    template: Template
    groups: list[str]  # per question: the unit of resampling for intervals (the item; for pairs the document)
    members: list[str]  # per question: the task it belongs to, for several tasks in one
    left_out: dict[str, int]

    def first(self, n: int) -> Task:
        """The first ``n`` questions only."""
        return replace(self, questions=self.questions[:n], groups=self.groups[:n], members=self.members[:n])


def load_task(name: str, split: str) -> Task:
    """One of :data:`TASKS`; ``split`` is train or test. SummEval's splits have different documents."""
    if name not in TASKS or split not in ("train", "test"):
        raise ValueError(f"task {name!r}, split {split!r}: give one of {', '.join(TASKS)} and train or test")
    if name in MULTIPLE_CHOICE:
        whole = load_multiple_choice(name, split)
        questions = sample(whole.questions, TEST_QUESTIONS if split == "test" else TRAIN_QUESTIONS, SEED)
        return Task(
            name, questions, TEMPLATES["letters"], [q.id for q in questions], [name] * len(questions), whole.left_out
        )
    documents = load_summeval_pairs(SYSTEMS, SEED, [name.removeprefix("summeval_")])
    names = list(documents)
    names = names[:TEST_DOCUMENTS] if split == "test" else names[TEST_DOCUMENTS : TEST_DOCUMENTS + TRAIN_DOCUMENTS]
    questions = [q for n in names for q in documents[n]]
    groups = [n for n in names for _ in documents[n]]
    return Task(name, questions, TEMPLATES["summaries"], groups, [name] * len(questions), {})


@dataclass(frozen=True)
class Run:
    """One student to train: what it is and how it is trained."""

    student: StudentConfig
    training: TrainingConfig

    @property
    def name(self) -> str:
        """For files, e.g. "all-MiniLM-L6-v2-joint-plain-k4"."""
        s = self.student
        return f"{Path(s.encoder).name}-{s.head}-{s.inputs}-k{s.k}"

    @property
    def title(self) -> str:
        """For tables, e.g. "all-MiniLM-L6-v2, joint, distillation"."""
        method = {"plain": "distillation", "prediction": "error correction"}[self.student.inputs]
        return f"{Path(self.student.encoder).name}, {self.student.head.replace('_', '-')} head, {method}"


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

    teachers         whose scores the teachers' table reports on multiple choice; the first also on SummEval, and it teaches
    n_test, n_train  questions per task, at most
    multiple_choice  students for multiple choice
    pairs            students for SummEval
    """

    teachers: tuple[str, ...]
    n_test: int
    n_train: int
    multiple_choice: tuple[Run, ...]
    pairs: tuple[Run, ...]

    def tasks(self, teacher: str) -> tuple[str, ...]:
        """What the teachers' table reports on for ``teacher``."""
        return TASKS if teacher == self.teachers[0] else MULTIPLE_CHOICE


SUMMEVAL = tuple(task for task in TASKS if task not in MULTIPLE_CHOICE)
_TINY = TrainingConfig(epochs=1, learning_rate=1e-4)
PROFILES = {
    # Runs in a minute: the notebooks' defaults, what nbval checks.
    "smoke": Profile(
        teachers=TEACHERS[:1],
        n_test=84,
        n_train=32,
        multiple_choice=_runs("all-MiniLM-L6-v2", 4, 192, 128, _TINY),
        pairs=_runs("all-MiniLM-L6-v2", 2, 384, 256, _TINY)[::2],
    ),
    # The paper at the scale of a laptop.
    "full": Profile(
        teachers=TEACHERS,
        n_test=10**9,
        n_train=10**9,
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
