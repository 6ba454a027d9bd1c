"""What is measured on a system: accuracy, permutation sensitivity, positional bias, and intervals for all of them.

A system is its probabilities ``P`` (item, order, option) in option space. Metrics are per item, so that any of them, and
any paired difference of two systems, goes through the one :func:`bootstrap`. This is the only module besides
:mod:`permdistill.data` that sees gold answers.

Definitions of permutation sensitivity and positional bias: Liusie, Fathullah, Gales, "Teacher-Student Training for
Debiasing", Findings of ACL 2024. The paper leaves the divergence open; total variation (TV) is our headline, KL beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from permdistill.debias import check_scores, decide
from permdistill.orders import to_positions

Divergence = Literal["tv", "kl"]

EPSILON = 1e-12  # KL: probabilities are raised to this much, then renormalised, so that hard decisions stay finite
_CHUNK = 1 << 22  # bootstrap weights held at a time


def _check_divergence(divergence: str) -> None:
    if divergence not in ("tv", "kl"):
        raise ValueError(f"divergence {divergence!r}: give 'tv' or 'kl'")


def _clip(p: np.ndarray) -> np.ndarray:
    p = np.maximum(p, EPSILON)
    return p / p.sum(axis=-1, keepdims=True)


# --------------------------------------------------------------------------------------------------------------------
# Accuracy


def _check_answers(answers: Sequence[int] | np.ndarray, n: int, k: int) -> np.ndarray:
    given = np.asarray(answers, dtype=object)
    if given.shape != (n,):
        raise ValueError(f"answers of shape {given.shape} for {n} items: give one answer an item")
    for item, answer in enumerate(given):
        if answer is None or (isinstance(answer, (int, np.integer)) and answer == -1):
            raise ValueError(
                f"answer of item {item} is {answer}: leave unlabelled items out, P[labelled] and answers[labelled]"
            )
        if isinstance(answer, bool) or not isinstance(answer, (int, np.integer)) or not 0 <= answer < k:
            raise ValueError(f"answer of item {item} is {answer!r}: give the index of the right option, in 0..{k - 1}")
    return given.astype(np.int64)


def accuracy(P: np.ndarray, answers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Share of the orders whose most probable option is the gold answer, (item,).

    answers  (item,) option indices. Unlabelled items are left out by the caller, with a boolean mask.

    m tied options get 1/m of the credit each (ties as in :func:`permdistill.debias.decide`). Of the original order alone:
    ``accuracy(P[:, :1], answers)``. Raises ValueError on an answer that is no option.
    """
    decisions = decide(P)
    gold = _check_answers(answers, decisions.shape[0], decisions.shape[2])
    return np.take_along_axis(decisions, gold[:, None, None], axis=-1)[..., 0].mean(axis=1)


# --------------------------------------------------------------------------------------------------------------------
# Sensitivity to the order


def permutation_sensitivity(P: np.ndarray, divergence: Divergence = "tv") -> np.ndarray:
    """ps(x) = mean over ordered pairs of different orders of D(P(.|x, sigma), P(.|x, sigma')), (item,).

    divergence  "tv": total variation, half the L1 distance, in 0..1.
                "kl": Kullback-Leibler in nats, of probabilities raised to :data:`EPSILON` and renormalised: where a
                system gives probabilities near 0 (hard decisions), the value says more about epsilon than about it.

    Both means are computed for all n (n - 1) pairs at once, option by option, and are exactly 0 where no order differs:

    TV: with sorted values x_1 <= .. <= x_n, the gap x_(i+1) - x_i separates i (n - i) pairs.
    KL: sum over sigma, sigma' of p (log p - log p') = n sum p log p - sum p sum log p, that is n (n - 1) times the sample
    covariance of p and log p over the orders.

    Raises ValueError when there are fewer than 2 orders.
    """
    _check_divergence(divergence)
    P = check_scores(P)
    n = P.shape[1]
    if n < 2:
        raise ValueError(f"{n} order: sensitivity compares orders, give scores of at least 2")
    if divergence == "tv":
        below = np.arange(1, n)
        gaps = np.diff(np.sort(P, axis=1), axis=1)  # (item, order - 1, option)
        # n (n - 1) / 2 unordered pairs and the half of half L1
        return np.einsum("iko,k->i", gaps, below * (n - below)) / (n * (n - 1))
    p = _clip(P)
    log_p = np.log(p)
    p, log_p = p - p[:, :1], log_p - log_p[:, :1]  # a covariance does not change, and equal rows become exact zeros
    return ((p - p.mean(axis=1, keepdims=True)) * log_p).sum(axis=(1, 2)) / (n - 1)


def consistency(P: np.ndarray) -> np.ndarray:
    """Share of the pairs of different orders that decide for the same *option*, (item,); 1 - ps (TV) of hard decisions.

    Orders with tied options agree in what their :func:`permdistill.debias.decide` shares overlap, sum_o min(share, share').
    A model that always says "A" agrees with itself in (K-1)! - 1 of K! - 1 other orders, whatever the gold answer.
    """
    return 1 - permutation_sensitivity(decide(P), "tv")


# --------------------------------------------------------------------------------------------------------------------
# Preference for positions


def position_marginals(P: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Probability that each position gets, mean over the orders: (item, position).

    orders  (order, K), ``orders[j][k]`` = option shown at position k in ``P[:, j]``. Over all or cyclic orders each option
            stands equally often at each position, so the marginals show preferences for positions only; over other lists
            of orders they also carry the options' own probabilities.

    Raises ValueError when ``orders`` are not permutations or do not fit ``P``.
    """
    P, orders = check_scores(P), np.asarray(orders)
    if orders.shape != P.shape[1:]:
        raise ValueError(f"orders of shape {orders.shape} for scores of shape {P.shape}: give (order, K) = {P.shape[1:]}")
    wrong = (np.sort(orders, axis=1) != np.arange(orders.shape[1])).any(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"order {row} is {orders[row].tolist()}: give a permutation of 0..{orders.shape[1] - 1}")
    return to_positions(P, orders).mean(axis=1)


def from_uniform(marginals: np.ndarray, divergence: Divergence = "tv") -> np.ndarray:
    """D(marginal, uniform): (..., position) -> (...). TV, or KL(marginal || uniform) in nats."""
    _check_divergence(divergence)
    marginals = np.asarray(marginals, dtype=np.float64)
    k = marginals.shape[-1]
    if divergence == "tv":
        return np.abs(marginals - 1 / k).sum(axis=-1) / 2
    p = _clip(marginals)
    return (p * np.log(p * k)).sum(axis=-1)


def positional_bias(P: np.ndarray, orders: np.ndarray, divergence: Divergence = "tv") -> float:
    """pb = D(marginal over positions, uniform), the marginal over items and orders: from 0 to 1 - 1/K (TV) or log K (KL).

    ps = 0 implies pb = 0, never the reverse. With an interval:
    ``bootstrap(position_marginals(P, orders), statistic=from_uniform)``.
    """
    return float(from_uniform(position_marginals(P, orders).mean(axis=0), divergence))


def positional_bias_per_item(P: np.ndarray, orders: np.ndarray, divergence: Divergence = "tv") -> np.ndarray:
    """pb of each item's own marginal, (item,). Its mean is at least :func:`positional_bias`: items do not cancel."""
    return from_uniform(position_marginals(P, orders), divergence)


# --------------------------------------------------------------------------------------------------------------------
# Intervals


class Interval(NamedTuple):
    """A value and its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:z.3f} [{self.low:z.3f}, {self.high:z.3f}]"

    def percent(self) -> str:
        """In points, as in "68.3 [66.1, 70.2]"."""
        return f"{100 * self.value:z.1f} [{100 * self.low:z.1f}, {100 * self.high:z.1f}]"


def bootstrap(
    values: np.ndarray,
    groups: Sequence[Hashable] | np.ndarray | None = None,
    statistic: Callable[[np.ndarray], float | np.ndarray] | None = None,
    n: int = 2000,
    seed: int | np.random.Generator = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of ``statistic(mean of the values over items)`` (Efron 1979).

    values     (item, ...); a paired comparison of two systems is ``bootstrap(values_a - values_b)``
    groups     per item, what it shares with others (its document): whole groups are resampled, and count by their items.
               Default: each item is its own group
    statistic  maps the mean, an array (...), to a number. Default: the mean itself, of values (item,)
    n          resamples
    level      of confidence

    Raises ValueError on values that are missing or not finite, and on fewer than 2 groups, which show no variation.
    """
    values = np.asarray(values, dtype=np.float64)
    if statistic is None and values.ndim != 1:
        raise ValueError(f"values of shape {values.shape}: give (item,), or a statistic of their mean over items")
    if not np.isfinite(values).all():
        item = int(np.argwhere(~np.isfinite(values))[0][0])
        raise ValueError(f"values of item {item} are {values[item].tolist()}: leave such items out")
    if n < 1 or not 0 < level < 1:
        raise ValueError(f"n = {n} resamples, level = {level}: give at least 1, and a level between 0 and 1")
    names = range(len(values)) if groups is None else groups
    if len(names) != len(values):
        raise ValueError(f"{len(names)} groups for {len(values)} items: give one group an item")
    numbers: dict[Hashable, int] = {}
    group = np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)
    if len(numbers) < 2:
        raise ValueError(f"{len(numbers)} group(s) of {len(values)} items: an interval needs at least 2")
    counts = np.bincount(group).astype(np.float64)
    sums = np.zeros((len(counts), values[0].size))
    np.add.at(sums, group, values.reshape(len(values), -1))

    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // len(counts))
    means = []
    for start in range(0, n, chunk):
        size = min(chunk, n - start)
        weights = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=size).astype(np.float64)
        means.append((weights @ sums) / (weights @ counts)[:, None])
    resampled = np.concatenate(means).reshape(n, *values.shape[1:])
    estimates = resampled if statistic is None else np.array([statistic(mean) for mean in resampled], dtype=np.float64)
    low, high = np.quantile(estimates, [(1 - level) / 2, (1 + level) / 2])
    mean = values.mean(axis=0)
    return Interval(float(mean if statistic is None else statistic(mean)), float(low), float(high))
