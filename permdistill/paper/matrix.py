"""The matrix of students: those whose training together takes hours, each a :class:`Cell`, in the parts that tables are made
of. Names of parts stand in ``make students``, in the notebooks and in ``python -m permdistill.paper students --parts``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from permdistill.configs import HEADS, StudentConfig, TrainingConfig
from permdistill.paper.models import TEACHERS
from permdistill.paper.profiles import PROFILES, Need, Pool, Profile, n_test, needs
from permdistill.paper.runs import Run
from permdistill.paper.systems import Description
from permdistill.paper.tasks import MULTIPLE_CHOICE, SUMMEVAL, TASKS, WITHHELD


@dataclass(frozen=True)
class Cell:
    """One student of the matrix.

    teacher  whose answers it learns
    tasks    that it learns
    run      what it is, and how it is trained
    on       other tasks that it answers, as one; (): those that it learns. Cells that differ in nothing else are one student
    """

    teacher: str
    tasks: tuple[str, ...]
    run: Run
    on: tuple[str, ...] = ()

    @property
    def tested(self) -> tuple[str, ...]:
        """The tasks that it answers."""
        return self.on or self.tasks

    @property
    def about(self) -> str:
        """The tasks in a word, and what else it answers: "piqa", "piqa-on-mmlu"."""
        return together_as(self.tasks) + (f"-on-{together_as(self.on)}" if self.on else "")

    @property
    def what(self) -> Description:
        """:attr:`Run.what`, and what it was taught on where it answers something else."""
        if not (self.on and self.run.training.epochs):
            return self.run.what
        return replace(self.run.what, taught_on=" and ".join(TASKS[task].title for task in self.tasks))


def together_as(tasks: Sequence[str]) -> str:
    """Tasks in a word: "multiple_choice", "summeval", or their own names."""
    return {MULTIPLE_CHOICE: "multiple_choice", SUMMEVAL: "summeval"}.get(tuple(tasks), "-".join(tasks))


def cells_of(settings: Profile, pool: Pool) -> tuple[Cell, ...]:
    """The students of a pool, taught by the profile's first teacher."""
    return tuple(Cell(settings.teachers[0], pool.tasks, run) for run in pool.runs)


SEEDS = (0, 1, 2)
BIG = ("socialiqa", "piqa")  # whole training sets
FOUR = (*BIG, "boolq", "race")
UNSEEN = (MULTIPLE_CHOICE, ("csqa",), ("hellaswag",), ("mmlu",), ("boolq",))
_MINILM, _MPNET = "all-MiniLM-L6-v2", "all-mpnet-base-v2"
LENGTH = {head: 256 if head == "joint" else 128 for head in HEADS}  # tokens
_UNTRAINED: dict[str, Any] = {"head": "bi_encoder", "epochs": 0, "run": {"n_train": 1000}}  # which fit the scale alone
_METHODS: tuple[dict[str, Any], ...] = tuple({"inputs": name} for name in ("plain", "distribution", "prediction"))
_METHODS += ({"inputs": "prediction", "greedy": True},)


def _cell(
    teacher: str = TEACHERS[0],
    encoder: str = _MINILM,
    head: str = "bi_encoder",
    inputs: str = "plain",
    training: dict[str, Any] | None = None,
    **run: Any,
) -> Cell:
    usual = {"epochs": 4 if encoder == _MINILM else 2, "learning_rate": 1e-4 if encoder == _MINILM else 5e-5}
    usual |= {"epochs": 2} if head == "bi_encoder" else {}  # held-out KL is lowest after one or two (`permdistill sweep`)
    student = StudentConfig(encoder, head, inputs, 4, LENGTH[head])
    return Cell(teacher, MULTIPLE_CHOICE, Run(student, TrainingConfig(**usual | (training or {})), **run))


def _pairs_cell(tasks: tuple[str, ...], encoder: str = _MINILM, **training: Any) -> Cell:
    # So low a rate that the student stays near the encoder that it begins with. Held-out KL prefers a higher one ("rates"),
    # and students that come nearer to this weak teacher answer worse: no choice that could be made without gold answers.
    usual = {"epochs": 2, "learning_rate": 1e-5, "batch_size": 28, "held_out": 0.1}
    student = StudentConfig(encoder, "bi_encoder", "plain", 2, 256)
    return Cell(TEACHERS[0], tasks, Run(student, TrainingConfig(**usual | training)))


def _piqa_cell(encoder: str = _MINILM, head: str = "bi_encoder", inputs: str = "plain", **training: Any) -> Cell:
    like = _cell(encoder=encoder, head=head, inputs=inputs, training=training).run
    length = 512 if head == "joint" else 256  # some of its solutions are long
    return Cell(TEACHERS[0], ("piqa",), replace(like, student=replace(like.student, k=2, max_length=length), n_train=1050))


def _scale_cell(
    *tasks: str,
    on: tuple[str, ...] = (),
    small: bool = False,
    head: str = "shared_prefix",
    run: dict | None = None,
    **more: Any,
) -> Cell:
    """One look at all questions, unless said, at the small students' rate: no other was tried here. ``small``: any K."""
    usual = {"epochs": 1, "learning_rate": 1e-4 if small else 5e-5, "batch_size": 32, "micro_tokens": 4096, "held_out": 0.04}
    encoder, length = _MINILM if small else _MPNET, 128 if tasks == ("socialiqa",) and not small else 256
    if set(tasks) & {"race", "boolq"}:  # passages; made on a GPU, which wants more at a time (a CPU takes 24 GB for it)
        length, usual = 512, usual | {"micro_tokens": 32768}
    k = 0 if (small or on or len(tasks) > 1) and head != "joint" else TASKS[tasks[0]].k
    student = StudentConfig(encoder, head, "plain", k, length)
    return Cell(TEACHERS[0], tasks, Run(student, TrainingConfig(**usual | more), **run or {}), on)


def _whole(*tasks: str, **more: Any) -> Cell:
    return _scale_cell(*tasks, head="cross_option", **more)


def _curve_cell(
    n: int, epochs: int = 1, head: str = "shared_prefix", power: float = 1.0, draws: int = 0, **more: Any
) -> Cell:
    run = {"n_train": n, "power": power, "draws": draws}
    return _scale_cell("socialiqa", small=True, head=head, run=run, epochs=epochs, **more)


USUAL = _cell()  # what the ablations vary
SCALE_USUAL = _curve_cell(8000)  # and those at scale
SIZES = {  # the same student, small and large
    "multiple choice": (USUAL, _cell(encoder=_MPNET)),
    "SummEval": (_pairs_cell(SUMMEVAL), _pairs_cell(SUMMEVAL, _MPNET)),
}
# Students that `make paper` does not train, since together they take hours: `make students` does, and their predictions
# are kept. The first of each part matter most. A cell may belong to several parts.
MATRIX: dict[str, tuple[Cell, ...]] = {
    # T2's and T3's.
    "tables": tuple(cell for pool in PROFILES["full"].pools.values() for cell in cells_of(PROFILES["full"], pool)),
    # The bi-encoder with everything; the other heads where there is something to learn, with the stronger teacher.
    "heads and inputs": tuple(
        _cell(teacher, head=head, training={"seed": seed}, **method)
        for head in ("bi_encoder", "per_option", "joint")
        for seed in SEEDS
        for teacher in TEACHERS[:2]
        for method in _METHODS
        if head == "bi_encoder" or teacher == TEACHERS[0] or (seed == 0 and method["inputs"] == "plain")
    ),
    "untrained": tuple(_cell(t, encoder, training={"epochs": 0}) for t in TEACHERS[:2] for encoder in (_MINILM, _MPNET)),
    "encoders": tuple(_cell(teacher, _MPNET, **method) for teacher in TEACHERS[:2] for method in _METHODS[:2]),
    "draws": tuple(_cell(draws=n) for n in (64, 32, 16, 8, 4, 2, 1)),
    "questions": tuple(_cell(n_train=n) for n in (500, 250, 125)),
    "targets": (*(_cell(power=power) for power in (2.0, 4.0, 8.0, np.inf)), _cell(TEACHERS[1], power=8.0)),
    "orders": tuple(
        _cell(head="joint", inputs=inputs, orders=orders)
        for inputs in ("plain", "distribution")
        for orders in ("all", "original")
    ),
    # What might keep the joint head from chance: another rate, a longer warm-up, sharper targets, more epochs, capacity.
    "collapse": (
        *(_cell(head="joint", training={"learning_rate": rate}) for rate in (1e-5, 3e-5, 1e-4, 3e-4)),
        *(_cell(head="joint", training={"seed": seed}) for seed in SEEDS[1:]),
        _cell(head="joint", training={"warmup": 0.5}),
        _cell(head="joint", power=8.0),
        _cell(head="joint", training={"epochs": 12}),
        _cell(head="joint", encoder=_MPNET),
    ),
    "summaries": (
        *(_pairs_cell(SUMMEVAL, seed=seed) for seed in SEEDS),
        *(_pairs_cell((task,)) for task in SUMMEVAL),
        *(_pairs_cell(SUMMEVAL, encoder, epochs=0) for encoder in (_MINILM, _MPNET)),
        _pairs_cell(SUMMEVAL, _MPNET),
    ),
    # Pairs again, of which the averaged teacher knows more than of SummEval's; as many questions as above.
    "piqa": (
        *(_piqa_cell(seed=seed) for seed in SEEDS),
        _piqa_cell(inputs="distribution"),
        *(_piqa_cell(head="joint", inputs=inputs) for inputs in ("plain", "prediction", "distribution")),
        *(_piqa_cell(head="per_option", inputs=inputs) for inputs in ("plain", "prediction", "distribution")),
        *(_piqa_cell(encoder, epochs=0) for encoder in (_MINILM, _MPNET)),
        *(_piqa_cell(_MPNET, inputs=inputs) for inputs in ("plain", "distribution")),
    ),
    # Whole training sets (of RACE 30,000 questions), whole test sets. Cross-option is the head with MiniLM's lower held-out
    # KL on PIQA (0.0142 to 0.0147). What else was tried stands in "epochs at scale"; of BoolQ and RACE nothing.
    "scale": tuple(
        cell
        for task, epochs in (("socialiqa", 4), ("piqa", 4), ("boolq", 3), ("race", 2))
        for cell in (
            *(_whole(task, epochs=epochs, seed=seed) for seed in SEEDS[: 2 if task == "boolq" else 1]),
            _whole(task, run={"n_train": 1000}, **({"micro_tokens": 4096} if task == "boolq" else {})),
            _scale_cell(task, **_UNTRAINED),
        )
    ),
    "epochs at scale": (
        _scale_cell("socialiqa", epochs=2),
        _whole("socialiqa", epochs=4),
        _whole("piqa", epochs=2),
        _whole("piqa", epochs=4),
        _whole("boolq", epochs=3),
        _whole("race", epochs=2),
    ),
    # One student of any number of options, taught on two whole training sets, for tasks that it has seen and not seen;
    # beside it the same encoder taught on each alone, and untaught.
    "one for all": (
        *(_scale_cell(*BIG, on=on, small=True) for on in (*((task,) for task in BIG), *UNSEEN)),
        *(_scale_cell(task, small=True, head=head) for head in ("shared_prefix", "cross_option") for task in BIG),
        *(_scale_cell("socialiqa", on=on, small=True, **_UNTRAINED) for on in ((), ("piqa",), *UNSEEN)),
    ),
    # The large encoder taught on all four together, once; it has seen no question of the others.
    "one for four": (
        *(_whole(*FOUR, on=on) for on in (*((task,) for task in FOUR), *(on for on in UNSEEN if on != ("boolq",)))),
        *(_scale_cell("socialiqa", on=on, **_UNTRAINED) for on in UNSEEN if on != ("boolq",)),
    ),
    # Curves at that size, with the small encoder. Fewer questions are looked at more often; still they make fewer steps.
    "questions at scale": tuple(
        _curve_cell(n, epochs, seed=seed)
        for n, epochs in ((500, 4), (2000, 2), (8000, 1), (0, 1))
        for seed in SEEDS[: 1 if n == 0 else 3]
    ),
    "draws at scale": tuple(_curve_cell(8000, draws=n) for n in (1, 4, 16)),
    "targets at scale": tuple(_curve_cell(8000, power=power) for power in (2.0, 8.0)),
    # At the rate of the joint students above.
    "collapse at scale": (
        *(_curve_cell(n, head="joint", learning_rate=3e-5) for n in (8000, 0, 16000)),
        _curve_cell(0, head="joint", learning_rate=3e-5, seed=1),
    ),
    # In no table: one student of each head that is cheap enough for `make paper` to train it anew.
    "audited": tuple(_cell(head=head, training={"epochs": 1}, n_train=500) for head in HEADS),
    "rates": tuple(_pairs_cell(SUMMEVAL, learning_rate=rate) for rate in (1e-5, 3e-5, 1e-4)),
}
AT_SCALE = (
    "scale",
    "epochs at scale",
    "one for all",
    "one for four",
    "questions at scale",
    "draws at scale",
    "targets at scale",
    "collapse at scale",
)


def all_needs(settings: Profile) -> list[Need]:
    """:func:`needs`, and what the matrix reads besides where the profile has it; the committed stores hold these scores.
    (RACE's too, but few machines have its texts, so that they are neither made nor audited with the others.)"""
    found = needs(settings)
    cells = [cell for part in MATRIX.values() for cell in part] if settings.matrix else []
    parts = [(c.teacher, "train", c.tasks, settings.n_train) for c in cells]
    parts += [(c.teacher, "test", c.tested, n_test(settings, c.tested)) for c in cells]
    for teacher, split, tasks, n in dict.fromkeys(parts):
        for need in (Need("matrix", teacher, task, split, n) for task in tasks if task not in WITHHELD):
            own = (need.teacher, need.task, need.split, need.template_name)
            if not any((f.teacher, f.task, f.split, f.template_name) == own and f.n >= need.n for f in found):
                found.append(need)
    return found
