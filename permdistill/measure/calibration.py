"""How far probabilities can be trusted, and what follows from them: calibration, answering only when sure, rankings of
systems from comparisons. Pure functions; ``Q`` is (item, option), an order-free answer, ``answers`` (item,) gold options.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq, minimize
from scipy.stats import binom, kendalltau, spearmanr

from permdistill.debias import check_scores, decide, permutation_average, sharpen

SMALLEST = 1e-12  # probabilities below it count as that much where a logarithm is taken


def _checked(Q: np.ndarray, answers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    Q, gold = check_scores(np.asarray(Q)[:, None])[:, 0], np.asarray(answers)
    if gold.shape != (len(Q),) or not np.issubdtype(gold.dtype, np.integer) or ((gold < 0) | (gold >= Q.shape[1])).any():
        raise ValueError(f"answers of shape {gold.shape} for {len(Q)} items: give an option's index for each")
    return Q, gold


def _right(Q: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Credit of each decision, ties sharing it: (item,)."""
    return decide(Q[:, None])[np.arange(len(Q)), 0, gold]


def bin_gaps(Q: np.ndarray, answers: Sequence[int] | np.ndarray, bins: int = 10) -> np.ndarray:
    """Accuracy minus confidence of each item in the bin of its largest probability, 0 in the others: (item, bin). The ECE is
    the sum over bins of |their mean over items|."""
    Q, gold = _checked(Q, answers)
    sure = Q.max(axis=1)
    bin_of = np.minimum((sure * bins).astype(int), bins - 1)
    return np.eye(bins)[bin_of] * (_right(Q, gold) - sure)[:, None]


def ece(Q: np.ndarray, answers: Sequence[int] | np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: mean over items of |accuracy - confidence| of their bin, the bins equally wide in the
    largest probability (Naeini et al., AAAI 2015; Guo et al., ICML 2017). From 0 to 1."""
    return float(np.abs(bin_gaps(Q, answers, bins).mean(axis=0)).sum())


def brier(Q: np.ndarray, answers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Squared distance of the probabilities from the gold answer's 1, summed over options: (item,), 0 to 2 (Brier 1950)."""
    Q, gold = _checked(Q, answers)
    return ((Q - np.eye(Q.shape[1])[gold]) ** 2).sum(axis=1)


def nll(Q: np.ndarray, answers: Sequence[int] | np.ndarray) -> np.ndarray:
    """-log probability of the gold answer in nats, of at least :data:`SMALLEST`: (item,)."""
    Q, gold = _checked(Q, answers)
    return -np.log(np.maximum(Q[np.arange(len(Q)), gold], SMALLEST))


def _entropy(P: np.ndarray) -> float:
    return float(-(P * np.log(np.maximum(P, SMALLEST))).sum(axis=-1).mean())


def fit_power(P: np.ndarray) -> float:
    """The power for :func:`permdistill.debias.sharpen` after which the average over orders is as sure as one order is.

    P  (item, order, option)

    Averaging raises the entropy with each order that disagrees. This takes it back: the sharpened averages have the mean
    entropy of the single answers. No gold answer is read. It is cautious: on RACE (1.5B teacher) the ECE goes from 15.3 to
    12.1 at 1.15; the best power, by gold answers, is about 2, with 4.5. 1 where the orders agree. Raises ValueError when
    the averages are (nearly) uniform.
    """
    P = check_scores(P)
    average, goal = permutation_average(P), _entropy(P)
    if _entropy(average) - goal < 1e-9:
        return 1.0
    if _entropy(sharpen(average, 100.0)) > goal:
        raise ValueError("the averages over the orders are (nearly) uniform: no power makes them as sure as one order")
    return float(brentq(lambda power: _entropy(sharpen(average, power)) - goal, 1.0, 100.0, xtol=1e-6))


# --------------------------------------------------------------------------------------------------------------------
# Answering only when sure


def selective_accuracy(Q: np.ndarray, answers: Sequence[int] | np.ndarray, coverage: float) -> float:
    """Accuracy on the share ``coverage`` of the items with the largest probabilities (Geifman, El-Yaniv, NeurIPS 2017)."""
    Q, gold = _checked(Q, answers)
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage = {coverage}: give a share of the items, above 0 and at most 1")
    chosen = np.argsort(-Q.max(axis=1), kind="stable")[: max(1, round(coverage * len(Q)))]
    return float(_right(Q, gold)[chosen].mean())


def guaranteed_threshold(
    Q: np.ndarray, answers: Sequence[int] | np.ndarray, error: float, confidence: float = 0.95
) -> float | None:
    """The least probability to answer from, so that at most a share ``error`` of what is answered is wrong, with confidence.

    ``Q`` and ``answers`` are a labelled calibration split; the bound holds for new items of the same kind. Thresholds are
    tried from sure to unsure, as long as the binomial upper bound of their error stays below ``error`` (fixed-sequence
    testing: Bauer 1991; Angelopoulos et al., "Learn then Test", 2021). None: no threshold does it.
    """
    Q, gold = _checked(Q, answers)
    sure, wrong = Q.max(axis=1), 1 - _right(Q, gold)
    found = None
    for threshold in np.quantile(sure, np.linspace(0.9, 0, 19)):
        chosen = sure >= threshold
        # The p-value of "the error is above": chance of so few wrong answers if it were exactly ``error``.
        if binom.cdf(np.ceil(wrong[chosen].sum()), chosen.sum(), error) > 1 - confidence:
            break
        found = float(threshold)
    return found


# --------------------------------------------------------------------------------------------------------------------
# Ranking systems from comparisons


def bradley_terry(pairs: np.ndarray, wins: np.ndarray, systems: int) -> np.ndarray:
    """Strengths (system,) of mean 0, P(a beats b) = 1 / (1 + exp(strength_b - strength_a)), by maximum likelihood.

    pairs  (comparison, 2), the systems compared
    wins   (comparison,) probability that the first wins: 1, 0, 1/2 for a tie, or a judge's debiased probability

    A ridge of 1e-3 keeps systems finite that win always (Bradley, Terry 1952).
    """
    a, b = np.asarray(pairs).T
    w = np.asarray(wins, dtype=np.float64)

    def loss(s: np.ndarray) -> tuple[float, np.ndarray]:
        d = s[a] - s[b]
        gradient = np.zeros(systems)
        slope = 1 / (1 + np.exp(-d)) - w
        np.add.at(gradient, a, slope)
        np.add.at(gradient, b, -slope)
        value = (np.logaddexp(0, d) - w * d).sum() + 0.5e-3 * (s**2).sum()
        return float(value), gradient + 1e-3 * s

    found = minimize(loss, np.zeros(systems), jac=True, method="L-BFGS-B").x
    return found - found.mean()


def product_of_experts(pairs: np.ndarray, wins: np.ndarray, systems: int) -> np.ndarray:
    """Scores (system,) of mean 0: each comparison is a Gaussian expert on a difference, at the log-odds of the win.

    Their product has its mean where the squared errors are least, in closed form (Liusie et al., "Efficient LLM Comparative
    Assessment", arXiv 2405.05894). Probabilities are held within 0.01..0.99. Arguments as of :func:`bradley_terry`.
    """
    a, b = np.asarray(pairs).T
    w = np.clip(np.asarray(wins, dtype=np.float64), 0.01, 0.99)
    odds, normal = np.log(w / (1 - w)), np.ones((systems, systems))  # the ones: the mean is 0
    for row, column, sign in ((a, a, 1), (b, b, 1), (a, b, -1), (b, a, -1)):
        np.add.at(normal, (row, column), sign)
    return np.linalg.lstsq(normal, np.bincount(a, odds, systems) - np.bincount(b, odds, systems), rcond=None)[0]


class Correlation(NamedTuple):
    """Rank correlation of two lists of scores."""

    spearman: float
    kendall: float


def rank_correlation(scores: np.ndarray, human: np.ndarray) -> Correlation:
    """How alike two rankings of the same systems are, from -1 to 1: Spearman's rho and Kendall's tau-b."""
    return Correlation(float(spearmanr(scores, human).statistic), float(kendalltau(scores, human).statistic))
