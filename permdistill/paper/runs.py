"""A run: one student to train, what it is called in files, and what it is in tables."""

from __future__ import annotations

from dataclasses import dataclass

from permdistill.configs import StudentConfig, TrainingConfig
from permdistill.paper.systems import CORRECTION, DISTILLATION, UNTRAINED, WHITE_BOX, Description, title
from permdistill.sources import short


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
    def calls(self) -> int:
        """Of the teacher that an answer of the student takes: error correction sees one."""
        return int(self.student.inputs != "plain")

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
        name = f"{short(s.encoder)}-{s.head}-{s.inputs}-k{s.k}-{t.epochs}epochs-lr{t.learning_rate:g}"
        extra = self._unusual | {f"warmup{t.warmup:g}": t.warmup != TrainingConfig.warmup, f"seed{t.seed}": t.seed != 0}
        return "-".join([name, *(word for word, wanted in extra.items() if wanted)])

    @property
    def what(self) -> Description:
        """The columns of tables; the same for all seeds and learning rates."""
        method = {
            "plain": DISTILLATION if self.training.epochs else UNTRAINED,
            "prediction": CORRECTION,
            "distribution": WHITE_BOX,
        }[self.student.inputs]
        n_train = self.n_train if self.training.epochs else 0  # of an untrained one they fit the scale alone
        encoder, settings = short(self.student.encoder), (self.greedy, self.power, self.draws, n_train, self.orders)
        return Description("student", method, self.calls, encoder, self.student.head, *settings)

    @property
    def title(self) -> str:
        """For people, see :func:`permdistill.paper.systems.title`."""
        return title(self.what)
