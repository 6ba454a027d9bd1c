"""What a student learns from: questions without gold answers, targets, and what it is shown of the teacher's answers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from permdistill.configs import StudentConfig
from permdistill.orders import all_orders
from permdistill.questions import Question


@dataclass(frozen=True, eq=False)
class Distributions:
    """A white-box teacher's answers: probabilities P (item, order, option) over ``orders`` (order, K); None: all K!."""

    P: np.ndarray
    orders: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Draws:
    """A black-box teacher's answers: sampled decisions, each in an order of its own.

    orders     (item, draw, K)
    decisions  (item, draw) option indices; -1 where the draw has no decision
    """

    orders: np.ndarray
    decisions: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "orders", np.asarray(self.orders, dtype=np.int64))
        object.__setattr__(self, "decisions", np.asarray(self.decisions, dtype=np.int64))

    def check(self, n: int, k: int) -> None:
        """Raises ValueError unless these are draws on ``n`` questions of ``k`` options, at least one decision on each."""
        orders, decisions = self.orders, self.decisions
        if orders.shape != (n, *decisions.shape[1:], k) or decisions.shape != orders.shape[:2]:
            raise ValueError(
                f"drawn orders of shape {orders.shape} and decisions of shape {decisions.shape}: "
                f"give ({n}, draw, {k}) and ({n}, draw)"
            )
        if (np.sort(orders, axis=-1) != np.arange(k)).any() or (decisions < -1).any() or (decisions >= k).any():
            raise ValueError(f"drawn orders and decisions: give permutations of 0..{k - 1}, and option indices or -1")
        if (silent := (decisions < 0).all(axis=1)).any():
            raise ValueError(
                f"question {int(silent.argmax())} has no decision ({silent.sum()} in all): leave such questions out"
            )


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a student learns from. It is checked when it is made: ValueError for gold answers and misfitting arrays.

    questions  K options each, without gold answers, as :func:`permdistill.questions.unlabelled` gives them
    targets    (item, option) probabilities, the debiased teacher's
    seen       what the teacher said, which the student sees beside the question: none for inputs="plain";
               :class:`Distributions`, from which inputs="prediction" draws one decision each time; :class:`Draws`, for
               inputs="prediction" alone: each time one of the question's draws
    orders     (order, K) to show the questions in where ``seen`` brings none; None: all K!
    """

    questions: Sequence[Question]
    targets: np.ndarray
    seen: Distributions | Draws | None = None
    orders: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.questions)
        answered = [q.id for q in self.questions if q.answer is not None]
        if answered:
            raise ValueError(
                f"{len(answered)} of {n} questions have an answer ({answered[0]!r}): pass questions.unlabelled(questions)"
            )
        if not n:
            raise ValueError("0 questions: give at least 1")
        k = np.shape(self.targets)[-1] if np.ndim(self.targets) else len(self.questions[0].options)
        object.__setattr__(self, "targets", _checked("targets", self.targets, (n, k)))
        for question in self.questions:
            if len(question.options) != k:
                raise ValueError(f"question {question.id!r} has {len(question.options)} options, its targets {k}")
        if self.seen is not None and self.orders is not None:
            raise ValueError("orders given beside what the teacher said, which has its own: give one of the two")
        if isinstance(self.seen, Distributions):
            P = _checked("distributions", self.seen.P, (n, len(self.shown), k))
            object.__setattr__(self, "seen", Distributions(P, self.shown))
        elif self.seen is not None:
            self.seen.check(n, k)
        if self.shown.shape[1:] != (k,) or (np.sort(self.shown, axis=-1) != np.arange(k)).any():
            raise ValueError(f"orders of shape {self.shown.shape}: give (order, {k}) permutations of 0..{k - 1}")

    @property
    def shown(self) -> np.ndarray:
        """The orders from which one is drawn for each question, (order, K). Draws bring theirs instead."""
        orders = self.seen.orders if isinstance(self.seen, Distributions) else self.orders
        return all_orders(self.targets.shape[1]) if orders is None else np.asarray(orders, dtype=np.int64)

    @property
    def arrays(self) -> tuple[np.ndarray | None, ...]:
        """Everything but the questions, in the order in which :func:`permdistill.training.content_key` reads it."""
        P = self.seen.P if isinstance(self.seen, Distributions) else None
        drawn = (self.seen.orders, self.seen.decisions) if isinstance(self.seen, Draws) else ()
        return (self.targets, P, self.shown, *drawn)

    def check(self, config: StudentConfig) -> None:
        """Raises ValueError unless a student of this config can learn from it."""
        if config.k not in (0, self.targets.shape[1]):
            raise ValueError(f"targets of shape {self.targets.shape}: give {(len(self.targets), config.k)}")
        if isinstance(self.seen, Draws) and config.inputs != "prediction":
            raise ValueError(f"inputs={config.inputs!r}, draws given: draws go with inputs='prediction'")
        if (self.seen is not None) != (config.inputs != "plain"):
            found = "missing" if self.seen is None else "given"
            raise ValueError(f"inputs={config.inputs!r} and distributions {found}: 'plain' takes none, the others need them")

    def draw(self, inputs: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """An order for each question, uniformly: (item, 1, K). And what the student sees of the teacher's answer in it: a
        decision (item, 1) for inputs="prediction", probabilities (item, 1, option) for "distribution", else None."""
        items = np.arange(len(self.questions))
        if isinstance(self.seen, Draws):
            place = _one_of_the_decided(self.seen.decisions, rng)
            return self.seen.orders[items, place][:, None], self.seen.decisions[items, place][:, None], None
        place = rng.integers(len(self.shown), size=len(items))
        orders = self.shown[place][:, None]
        if self.seen is None:
            return orders, None, None
        said = self.seen.P[items, place]
        return (orders, _sampled(said, rng)[:, None], None) if inputs == "prediction" else (orders, None, said[:, None])

    def wordings(self) -> list[Hashable]:
        """By question: those of one context and wording share sequences when each option stands in its own."""
        return [(q.context, q.question) for q in self.questions]

    def split(self, share: float, seed: int) -> tuple[Lesson, Lesson | None]:
        """What is trained on, and a random ``share`` of the questions, at least one; those of one wording stay together. A
        share of 0 holds none out. Raises ValueError when none are left to train on."""
        if not share:
            return self, None
        wordings = self.wordings()
        different = list(dict.fromkeys(wordings))
        n = max(1, round(share * len(different)))
        if n >= len(different):
            raise ValueError(
                f"held_out = {share} of {len(different)} questions leaves none to train on: give more questions"
            )
        chosen = np.random.default_rng((seed, n)).permutation(len(different))[:n]
        out = {different[i] for i in chosen}
        inside = np.array([wording in out for wording in wordings])
        return self._part(np.flatnonzero(~inside)), self._part(np.flatnonzero(inside))

    def _part(self, items: np.ndarray) -> Lesson:
        seen = self.seen
        if isinstance(seen, Distributions):
            seen = replace(seen, P=seen.P[items])
        elif seen is not None:
            seen = Draws(seen.orders[items], seen.decisions[items])
        return replace(self, questions=[self.questions[i] for i in items], targets=self.targets[items], seen=seen)


def _checked(name: str, p: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    p = np.asarray(p, dtype=np.float64)
    if p.shape != shape:
        raise ValueError(f"{name} of shape {p.shape}: give {shape}")
    if not (np.isfinite(p).all() and (p >= 0).all() and np.allclose(p.sum(-1), 1, atol=1e-4)):
        raise ValueError(f"{name} are no probabilities: give finite values of at least 0 that sum to 1 over the options")
    return p


def _sampled(p: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One draw from each distribution (item, option) -> (item,)."""
    u = rng.random(len(p))[:, None] * p.sum(-1, keepdims=True)
    return (np.cumsum(p, axis=-1)[:, :-1] <= u).sum(-1)


def _one_of_the_decided(decisions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each item the place of one of its decisions that are not -1, uniformly: (item, draw) -> (item,)."""
    n_decided = (decisions >= 0).sum(axis=1)
    chosen = (rng.random(len(decisions)) * n_decided).astype(np.int64)
    decided_first = np.argsort(decisions < 0, axis=1, kind="stable")
    return decided_first[np.arange(len(decisions)), chosen]
