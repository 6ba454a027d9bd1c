"""What is fitted before an encoder learns anything: the correction of a teacher's one answer, and the scale of cosines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from permdistill.debias import EPSILON
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


def fit_correction(P: np.ndarray, orders: np.ndarray, targets: np.ndarray) -> Correction:
    """The scale and position logits that bring the teacher's answers in single orders closest to the targets.

    P (item, order, option) over ``orders`` (order, K), targets (item, option). Minimises the mean over items and orders of
    KL(target || softmax(scale log P + position logits)), which is convex. Like prior-matching it reads no gold answer;
    unlike it, it takes the teacher's answers over the other orders of the same questions as its goal. Raises ValueError
    when no minimum is found.
    """
    k = P.shape[2]
    log_p = np.log(np.maximum(to_positions(np.asarray(P, dtype=np.float64), orders), EPSILON)).reshape(-1, k)
    goals = to_positions(np.broadcast_to(targets[:, None], P.shape), orders).reshape(-1, k)

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        logits = x[0] * log_p + x[1:]
        log_q = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        slope = (np.exp(log_q) - goals) / len(goals)
        # The mean of the position logits changes nothing: the square picks 0.
        value = -(goals * log_q).sum() / len(goals) + x[1:].mean() ** 2 / 2
        return value, np.concatenate([[(slope * log_p).sum()], slope.sum(axis=0) + x[1:].mean() / k])

    found = minimize(value_and_gradient, np.r_[1.0, np.zeros(k)], jac=True, method="BFGS", options={"gtol": 1e-6})
    if not np.abs(found.jac).max() < 1e-4:  # BFGS stops short of gtol where the value rounds off
        raise ValueError(f"no correction brings the teacher to the targets ({found.message}): use inputs='prediction'")
    return Correction(float(found.x[0]), tuple(float(v) for v in found.x[1:] - found.x[1:].mean()))


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
