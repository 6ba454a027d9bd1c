"""What is fitted in a few numbers, before an encoder learns anything (the correction of a teacher's one answer, the scale of
cosines) or after (a student's answer and the teacher's one as one answer). No gold answer is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import softmax

from permdistill.debias import EPSILON, check_orders
from permdistill.orders import to_options, to_positions


@dataclass(frozen=True)
class Correction:
    """What the teacher's probabilities in one order are turned into: logits scale * log P(position) + position[position].

    scale     1 / temperature
    position  (K,) what takes the preference for positions away
    """

    scale: float
    position: tuple[float, ...]

    def logits(self, distributions: np.ndarray, orders: np.ndarray) -> np.ndarray:
        """P (..., order, option) and orders (..., order, K) -> logits by option (..., order, option)."""
        by_position = np.log(np.maximum(to_positions(np.asarray(distributions, dtype=np.float64), orders), EPSILON))
        return to_options(self.scale * by_position + np.array(self.position), orders)


@dataclass(frozen=True)
class Stack:
    """What a student says and what the teacher says in one order, as one answer (stacking; Wolpert, Neural Networks 1992):
    logits student * log S + teacher * log P(position) + position[position].

    student, teacher  how much each counts. A decision's probabilities are 1 and 0, and log 0 is taken as log
                      :data:`permdistill.debias.EPSILON`, so that decisions count by small numbers
    position          (K,) what takes the teacher's preference for positions away, 0 on average
    """

    student: float
    teacher: float
    position: tuple[float, ...]

    def answer(self, S: np.ndarray, P: np.ndarray, orders: np.ndarray) -> np.ndarray:
        """The student's S and the teacher's P (item, order, option), orders (order, K) -> answers (item, order, option). P
        may be decisions (:func:`permdistill.debias.one_hot`), if it was in fitting. Raises ValueError for other shapes."""
        S, P = _checked([S, P], orders)
        logits = Correction(self.teacher, self.position).logits(P, orders)
        return softmax(self.student * np.log(np.maximum(S, EPSILON)) + logits, axis=-1)


def fit_correction(P: np.ndarray, orders: np.ndarray, targets: np.ndarray) -> Correction:
    """The scale and position logits that bring the teacher's answers in single orders closest to the targets.

    P (item, order, option) over ``orders`` (order, K), targets (item, option). Minimises the mean over items and orders of
    KL(target || softmax(scale log P + position logits)), which is convex. Like prior-matching it reads no gold answer;
    unlike it, it takes the teacher's answers over the other orders of the same questions as its goal. Raises ValueError
    when no minimum is found.
    """
    (scale,), position = _closest(_checked([P], orders), orders, targets)
    return Correction(scale, position)


def fit_stack(S: np.ndarray, P: np.ndarray, orders: np.ndarray, targets: np.ndarray) -> Stack:
    """The :class:`Stack` whose answers come closest to the targets, as :func:`fit_correction`.

    S, P     the student's and the teacher's answers (item, order, option) over ``orders`` (order, K), of questions that the
             student did not learn from: a hundred are enough for K + 2 numbers
    targets  (item, option), the teacher's averages over all orders. No gold answer is read

    Raises ValueError for answers of other shapes or that are no probabilities, and when no minimum is found.
    """
    (student, teacher), position = _closest(_checked([S, P], orders), orders, targets)
    return Stack(student, teacher, position)


def _checked(answers: Sequence[np.ndarray], orders: np.ndarray) -> list[np.ndarray]:
    """Answers of one shape, each of them of questions in ``orders``."""
    if len(shapes := {np.shape(P) for P in answers}) > 1:
        raise ValueError(f"answers of shapes {sorted(shapes)}: give both (item, order, option), over the same orders")
    return [check_orders(P, orders)[0] for P in answers]


def _closest(
    answers: Sequence[np.ndarray], orders: np.ndarray, targets: np.ndarray
) -> tuple[list[float], tuple[float, ...]]:
    """How much the log of each of ``answers`` (item, order, option) counts, and the logits of positions, that together come
    closest to the targets."""
    k, n = targets.shape[1], len(answers)
    logs = [np.log(np.maximum(to_positions(np.asarray(P, dtype=np.float64), orders), EPSILON)) for P in answers]
    log_p = np.stack(logs).reshape(n, -1, k)
    goals = to_positions(np.broadcast_to(targets[:, None], answers[0].shape), orders).reshape(-1, k)

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        logits = np.tensordot(x[:n], log_p, 1) + x[n:]
        log_q = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        slope = (np.exp(log_q) - goals) / len(goals)
        # The mean of the position logits changes nothing: the square picks 0.
        value = -(goals * log_q).sum() / len(goals) + x[n:].mean() ** 2 / 2
        return value, np.concatenate([(slope * log_p).sum(axis=(1, 2)), slope.sum(axis=0) + x[n:].mean() / k])

    found = minimize(value_and_gradient, np.r_[np.ones(n), np.zeros(k)], jac=True, method="BFGS", options={"gtol": 1e-6})
    if not np.abs(found.jac).max() < 1e-4:  # BFGS stops short of gtol where the value rounds off
        raise ValueError(f"no correction brings the teacher to the targets ({found.message}): use its decisions instead")
    return found.x[:n].tolist(), tuple((found.x[n:] - found.x[n:].mean()).tolist())


def fit_scale(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> float:
    """What cosines are multiplied by to become logits. It reads no gold answer.

    ``parts``: cosines, offsets and targets (item, option); several for several numbers of options.

    The scale that brings softmax(scale cosine + offset) closest to the targets (least mean KL(target || answer), a convex
    problem in one number); but where an untrained encoder's cosines do not follow the targets that is near 0, from where
    nothing can be learnt, so at least what lets a difference of 1 between two cosines say what the median target says of
    its most and least probable option, beyond the offsets. Targets below 0.01 count as that much here.
    """

    n = sum(len(targets) for *_, targets in parts)

    def value_and_slope(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = 0.0, 0.0
        for cosines, offsets, targets in parts:
            logits = x[0] * cosines + offsets
            log_q = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            slope += ((np.exp(log_q) - targets) * cosines).sum()
            value -= (targets * log_q).sum()
        return value / n, np.array([slope / n])

    closest = float(minimize(value_and_slope, np.ones(1), jac=True, method="BFGS").x[0])
    unsaid = [np.ptp(np.log(np.maximum(targets, 0.01)) - offsets, axis=1) for _, offsets, targets in parts]
    return max(closest, float(np.median(np.concatenate(unsaid))))
