"""What the paper's runs consist of: questions, teachers, templates, students.

The notebooks, ``python -m permdistill.paper score`` and the tests all read the same definitions, so that the committed
scores, the live audit and the tables always speak of the same questions. A :class:`Profile` says how much of it a run does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from permdistill.configs import StudentConfig, TrainingConfig
from permdistill.paper.hub import Repo
from permdistill.paper.models import MODELS, TEACHERS
from permdistill.paper.runs import Run
from permdistill.paper.tasks import (
    HUB_CHOICE,
    LAPTOP,
    LAPTOP_CHOICE,
    MULTIPLE_CHOICE,
    RACE,
    SUMMARIES,
    SUMMEVAL,
    TASKS,
    WHOLE_SUMMEVAL,
    TaskSplit,
    load_task,
)

# Other ways to put the questions of some tasks; the first of each kind is the one that everything else uses.
PROMPTS = {"letters": ("letters", "numbers", "brief"), "summaries": ("summaries", "summaries_letters")}
PUT_DIFFERENTLY = {"letters": (*MULTIPLE_CHOICE, "mmlu", "socialiqa", "piqa"), "summaries": SUMMEVAL}


def _runs(encoder: str, k: int, joint: int, per_option: int, training: TrainingConfig) -> tuple[Run, ...]:
    """Both heads x both inputs of one encoder, with the heads' ``max_length``."""
    return tuple(
        Run(StudentConfig(encoder, head, inputs, k, {"joint": joint, "per_option": per_option}[head]), training)
        for head in ("joint", "per_option")
        for inputs in ("plain", "prediction")
    )


@dataclass(frozen=True)
class Pool:
    """Tasks that students learn and answer as one.

    table   of these students: the name of its file
    tasks   all with the same number of options
    n_test  questions per task that the students answer, at most
    runs    the students
    """

    table: str
    tasks: tuple[str, ...]
    n_test: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Profile:
    """How much a run does.

    teachers         whose scores the teachers' tables report on; the first one teaches
    tasks            what they report on
    n_test, n_train  questions per task, at most
    n_others         the same for other teachers: sets with training questions, test only, SummEval; 0: left out
    n_prompts        test questions per task that are put in several ways: multiple choice, SummEval
    pools            what students learn: {"multiple_choice", "summeval"}
    api_teacher      whom the black-box notebook asks, where the user has no API of her own
    n_api, draws     its questions, for training and testing together, and decisions for each training question
    matrix           whether the students of :data:`MATRIX` are its own too
    """

    teachers: tuple[str, ...]
    tasks: tuple[str, ...]
    n_test: int
    n_train: int
    n_others: tuple[int, int, int]
    n_prompts: tuple[int, int]
    pools: Mapping[str, Pool]
    api_teacher: str = TEACHERS[1]
    n_api: int = 60
    draws: int = 16
    matrix: bool = False

    def limited(self, n: int) -> Profile:
        """The same with at most ``n`` questions of each task, and without the matrix.

        SummEval's pairs in other words stay: intervals need two documents, and each has 28 pairs (the paper's 120).
        With real data, so does every other table: give more than that.
        """
        if n < 1:
            raise ValueError(f"limit = {n}: give a number of at least 1")
        sizes: dict[str, Any] = {name: min(getattr(self, name), n) for name in ("n_test", "n_train", "n_api")}
        sizes["n_others"] = tuple(min(m, n) for m in self.n_others)
        sizes["n_prompts"] = (min(self.n_prompts[0], n), self.n_prompts[1])
        sizes["pools"] = {name: replace(pool, n_test=min(pool.n_test, n)) for name, pool in self.pools.items()}
        return replace(self, matrix=False, **sizes)

    @property
    def runs(self) -> tuple[Run, ...]:
        """All students."""
        return tuple(run for pool in self.pools.values() for run in pool.runs)

    def n_questions(self, teacher: str, task: str) -> int:
        """How many test questions of ``task`` are asked of ``teacher``, at most."""
        if teacher == self.teachers[0]:
            return self.n_test
        kind = 2 if TASKS[task].family == SUMMARIES else 0 if task in MULTIPLE_CHOICE else 1
        return self.n_others[kind]


def own_student(k: int) -> Run:
    """A student to begin with, for questions of ``k`` options: exactly order-invariant, 23M parameters."""
    return Run(StudentConfig("all-MiniLM-L6-v2", "bi_encoder", "plain", k, 256), TrainingConfig(learning_rate=1e-4))


def untrained(k: int) -> Run:
    """:func:`own_student` before it is taught: what the encoder knows by itself."""
    run = own_student(k)
    return replace(run, training=replace(run.training, epochs=0))


def _bi_encoder(encoder: str, k: int, length: int, training: TrainingConfig, inputs: str = "plain") -> Run:
    return Run(StudentConfig(encoder, "bi_encoder", inputs, k, length), training)


def black_box_students(k: int, draws: int) -> tuple[Run, ...]:
    """Students of an API's ``draws`` decisions a question: with one decision of the API at inference too, and without."""
    training = TrainingConfig(epochs=4, learning_rate=1e-4, batch_size=8)
    return tuple(
        Run(StudentConfig("all-MiniLM-L6-v2", "bi_encoder", inputs, k, 256), training, draws=draws)
        for inputs in ("prediction", "plain")
    )


# The paper does not say here which teacher's targets its students learn: Llama-2-13B is the one for which a gain of 7 points
# from 61% on RACE++ is plausible (FlanT5's gains are small, Llama-2-7B's sensitivity is 0.66). Put another one first to see.
PAPER_TEACHERS = (
    "meta-llama/Llama-2-13b-chat-hf",
    "meta-llama/Llama-2-7b-chat-hf",
    "google/flan-t5-xxl",
    "google/flan-t5-xl",
)
PAPER_ENCODERS = {  # and the learning rate of each: the paper gives none, these are the usual ones for RACE
    "google-bert/bert-base-uncased": 2e-5,
    "FacebookAI/roberta-base": 2e-5,
    "microsoft/deberta-v3-base": 2e-5,
    "google-bert/bert-large-uncased": 1e-5,
    "FacebookAI/roberta-large": 1e-5,
    "microsoft/deberta-v3-large": 1e-5,
}


def _paper_runs(k: int, epochs: int) -> tuple[Run, ...]:
    """The paper's students, both inputs to the joint head, and beside each base encoder an exactly invariant one."""
    return tuple(
        Run(StudentConfig(encoder, head, inputs, k, 512), TrainingConfig(epochs, rate, micro_tokens=16384))
        for encoder, rate in PAPER_ENCODERS.items()
        for head, inputs in (("joint", "plain"), ("joint", "prediction"), ("per_option", "plain"))
        if head == "joint" or "large" not in encoder
    )


def _pools(
    n_test: tuple[int, int],
    multiple_choice: tuple[Run, ...],
    summeval: tuple[Run, ...],
    tasks: tuple[tuple[str, ...], tuple[str, ...]] = (MULTIPLE_CHOICE, SUMMEVAL),
) -> dict[str, Pool]:
    return {
        "multiple_choice": Pool("T2_students_multiple_choice", tasks[0], n_test[0], multiple_choice),
        "summeval": Pool("T3_students_summeval", tasks[1], n_test[1], summeval),
    }


_TINY = TrainingConfig(epochs=1, learning_rate=1e-4)
PROFILES = {
    # Runs in a minute: the notebooks' defaults, what nbval checks.
    "smoke": Profile(
        teachers=TEACHERS[:1],
        tasks=LAPTOP,
        n_test=84,
        n_train=16,
        n_others=(84, 84, 84),
        n_prompts=(40, 140),
        pools=_pools(
            (48, 84),
            (*_runs("all-MiniLM-L6-v2", 4, 192, 128, _TINY), _bi_encoder("all-MiniLM-L6-v2", 4, 128, _TINY)),
            (*_runs("all-MiniLM-L6-v2", 2, 384, 256, _TINY)[::2], _bi_encoder("all-MiniLM-L6-v2", 2, 256, _TINY)),
        ),
        api_teacher="smollm2-135m",
        n_api=30,
        draws=4,
    ),
    # The paper at the scale of a laptop.
    "full": Profile(
        teachers=TEACHERS,
        tasks=LAPTOP,
        n_test=10**9,
        n_train=10**9,
        n_others=(350, 150, 10 * 28),
        n_prompts=(80, 5 * 28),
        draws=8,
        matrix=True,
        # The small encoder, one seed; an hour on 2 cores. For summaries the lengths leave all
        # heads about the same share of the article, since the joint head's sequence holds two summaries.
        pools=_pools(
            (350, 25 * 28),
            (
                *_runs("all-MiniLM-L6-v2", 4, 256, 128, TrainingConfig(epochs=4, learning_rate=1e-4)),
                _bi_encoder("all-MiniLM-L6-v2", 4, 128, TrainingConfig(epochs=2, learning_rate=1e-4)),
                _bi_encoder("all-MiniLM-L6-v2", 4, 128, TrainingConfig(epochs=2, learning_rate=1e-4), "distribution"),
            ),
            (
                *_runs("all-MiniLM-L6-v2", 2, 384, 256, TrainingConfig(epochs=1, learning_rate=1e-4, batch_size=28)),
                _bi_encoder("all-MiniLM-L6-v2", 2, 256, TrainingConfig(epochs=1, learning_rate=1e-4, batch_size=28)),
            ),
        ),
    ),
    # The paper at its own scale: for GPUs, and whoever may use Llama 2.
    "paper": Profile(
        teachers=PAPER_TEACHERS,
        tasks=(*HUB_CHOICE, *LAPTOP_CHOICE, *WHOLE_SUMMEVAL),
        n_test=10**9,
        n_train=10**9,
        n_others=(10**9, 10**9, 10**9),
        n_prompts=(80, 5 * 28),
        pools=_pools((10**9, 10**9), _paper_runs(4, epochs=2), _paper_runs(2, epochs=3), tasks=(RACE, WHOLE_SUMMEVAL)),
    ),
}


def get(name: str) -> Profile:
    """A profile by its name; "paper-12" is the profile "paper" with :meth:`Profile.limited` (12). Raises ValueError."""
    known, _, limit = name.partition("-")
    if known not in PROFILES or (limit or "1").strip("0123456789") or name.endswith("-"):
        raise ValueError(f"profile {name!r}: give {', '.join(PROFILES)}, or one of them with a limit, like paper-12")
    return PROFILES[known].limited(int(limit)) if limit else PROFILES[known]


@dataclass(frozen=True)
class Need:
    """Scores that a table needs: the first ``n`` questions of a task and split, in a template ("": the usual one)."""

    table: str
    teacher: str
    task: str
    split: str
    n: int
    template: str = ""

    @property
    def template_name(self) -> str:
        """Of the template in which the questions are put."""
        return self.template or TASKS[self.task].template

    def load(self) -> TaskSplit:
        """The questions."""
        return load_task(self.task, self.split, self.template).first(self.n)


def needs(settings: Profile) -> list[Need]:
    """All scores that a profile's tables are made of, none twice: T1 (and D1) of every teacher, and of the first one the
    training questions of T2 and T3, and R1, the same questions in other words."""
    found = [
        Need("T1", teacher, task, "test", n)
        for teacher in settings.teachers
        for task in settings.tasks
        if (n := settings.n_questions(teacher, task))
    ]
    first = settings.teachers[0]
    for pool in settings.pools.values():
        table = pool.table.split("_")[0]
        found += [Need(table, first, task, "train", settings.n_train) for task in pool.tasks]
        found += [Need(table, first, t, "test", pool.n_test) for t in pool.tasks if t not in settings.tasks]
    for (kind, tasks), n in zip(PUT_DIFFERENTLY.items(), settings.n_prompts, strict=True):
        usual, *others = PROMPTS[kind]
        tasks = tasks if n else ()
        templates = [usual] * (not set(tasks) <= set(settings.tasks)) + others
        found += [Need("R1", first, task, "test", n, template) for template in templates for task in tasks]
    return found


def repositories(settings: Profile) -> list[Repo]:
    """What a profile needs of the model hub: teachers, encoders, data."""
    encoders = [run.student.encoder for run in settings.runs]
    models = [MODELS[name].repo for name in (*settings.teachers, *encoders) if name in MODELS]
    data = [TASKS[task].repo for task in settings.tasks]
    return [repo for repo in dict.fromkeys([*models, *data]) if repo is not None]


def n_test(settings: Profile, tasks: Sequence[str]) -> int:
    """How many test questions of each task students of these tasks are asked: that of their pool, or else all."""
    return next((pool.n_test for pool in settings.pools.values() if set(tasks) <= set(pool.tasks)), 10**9)
