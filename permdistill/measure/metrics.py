"""What is measured on a system: accuracy, permutation sensitivity, positional bias, and intervals for all of them.

A system is its probabilities ``P`` (item, order, option) in option space. Metrics are per item, so that any of them, and
any paired difference of two systems, goes through the one :func:`bootstrap`; a metric of the whole set (positional bias,
RStd, Cramer's V, CKLD) is a table per item and a ``statistic`` of the mean table. This is the only module besides
:mod:`permdistill.questions` that sees gold answers.

Definitions of permutation sensitivity and positional bias: Liusie, Fathullah, Gales, "Teacher-Student Training for
Debiasing", Findings of ACL 2024. The paper leaves the divergence open; total variation (TV) is our headline, KL beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import rel_entr
from scipy.stats import binom, binomtest

from permdistill.debias import broadcast, check_orders, check_scores, decide, majority_vote, one_hot
from permdistill.orders import cyclic_orders, to_positions

Divergence = Literal["tv", "kl"]

EPSILON = 1e-12  # KL: probabilities are raised to this much, then renormalised, so that hard decisions stay finite
_CHUNK = 1 << 22  # bootstrap weights held at a time


def _check_divergence(divergence: str) -> None:
    if divergence not in ("tv", "kl"):
        raise ValueError(f"divergence {divergence!r}: give 'tv' or 'kl'")


def _clip(p: np.ndarray) -> np.ndarray:
    p = np.maximum(p, EPSILON)
    return p / p.sum(axis=-1, keepdims=True)


def _rows(wanted: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """At which rows of ``orders`` (order, K) the orders ``wanted`` (row, K) are: (row,)."""
    same = (wanted[:, None] == orders).all(axis=-1)  # (row, order)
    missing = wanted[~same.any(axis=1)]
    if len(missing):
        raise ValueError(f"order {missing[0].tolist()} is not among the {len(orders)} given: score it too")
    return same.argmax(axis=1)


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


def _credit(P: np.ndarray, answers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Share of each decision that is on the gold answer, (item, order)."""
    decisions = decide(P)
    gold = _check_answers(answers, decisions.shape[0], decisions.shape[2])
    return np.take_along_axis(decisions, gold[:, None, None], axis=-1)[..., 0]


def accuracy(P: np.ndarray, answers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Share of the orders whose most probable option is the gold answer, (item,).

    answers  (item,) option indices. Unlabelled items are left out by the caller, with a boolean mask.

    m tied options get 1/m of the credit each (ties as in :func:`permdistill.debias.decide`). Of the original order alone:
    ``accuracy(P[:, :1], answers)``. Raises ValueError on an answer that is no option.
    """
    return _credit(P, answers).mean(axis=1)


def adversarial_accuracy(P: np.ndarray, answers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Whether the item is answered right in every order given, (item,): the worst that an adversary's order can do.

    min over the orders of the credit of :func:`accuracy`, so from 0 to that accuracy (Zong et al., "Fool Your (Vision and)
    Language Model With Embarrassingly Simple Permutations", ICML 2024). A tie shared with the gold answer leaves 1/m in the
    one worst order. The minimum, not the product over orders: an answer that depends on no order keeps its accuracy.
    """
    return _credit(P, answers).min(axis=1)


def circular_accuracy(P: np.ndarray, orders: np.ndarray, answers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Whether the item is answered right in every rotation of the first order, (item,), from 0 to 1.

    :func:`adversarial_accuracy` over these K of the ``orders`` (order, K), and never below that over all of them
    (CircularEval; Liu et al., "MMBench", ECCV 2024). Raises ValueError when ``orders`` lack a rotation of the first.
    """
    P, orders = check_orders(P, orders)
    rotations = orders[0][cyclic_orders(orders.shape[1])]
    return adversarial_accuracy(P[:, _rows(rotations, orders)], answers)


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


def kl_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) = sum_o p_o (log p_o - log q_o) in nats, (..., option) -> (...), with 0 log 0 = 0 and q raised to
    :data:`EPSILON`."""
    return rel_entr(p, _clip(q)).sum(axis=-1)


def inside_binomial(counts: np.ndarray, p: np.ndarray, level: float = 0.99) -> np.ndarray:
    """Whether counts are what draws from a distribution give: (item,).

    counts (item, option), p (item, option). True where every option's count lies in its central binomial interval at the
    level 1 - (1 - level) / K, so that all K do with probability of at least ``level`` (Bonferroni).
    """
    tail = (1 - level) / 2 / p.shape[-1]
    n = counts.sum(axis=-1, keepdims=True)
    return ((counts >= binom.ppf(tail, n, p)) & (counts <= binom.ppf(1 - tail, n, p))).all(axis=-1)


def consistency(P: np.ndarray) -> np.ndarray:
    """Share of the pairs of different orders that decide for the same *option*, (item,); 1 - ps (TV) of hard decisions.

    Orders with tied options agree in what their :func:`permdistill.debias.decide` shares overlap, sum_o min(share, share').
    A model that always says "A" agrees with itself in (K-1)! - 1 of K! - 1 other orders, whatever the gold answer.
    """
    return 1 - permutation_sensitivity(decide(P), "tv")


def commutativity(P: np.ndarray) -> np.ndarray:
    """Whether the two orders of a pair agree, (item,): :func:`consistency` of K = 2, from 0 to 1.

    The mean is the share of pairs whose comparison does not depend on which of the two comes first. Raises ValueError
    unless ``P`` is (item, 2, 2).
    """
    P = check_scores(P)
    if P.shape[1:] != (2, 2):
        raise ValueError(f"scores of shape {P.shape}: give pairs in both orders, (item, 2, 2); consistency takes any K")
    return consistency(P)


def _differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 - sum_o min(a_o, b_o) of decisions (..., option), as half the L1 distance: exactly 0 where they are equal."""
    return np.abs(a - b).sum(axis=-1) / 2


def flip_rate(P: np.ndarray) -> np.ndarray:
    """Share of the other orders that decide otherwise than the first order, (item,), from 0 to 1.

    Tied options: 1 - sum_o min(share, share'), as in :func:`consistency`, which compares all pairs of orders instead. The
    answer's fluctuation of Wei et al., "Unveiling Selection Biases" (Findings of ACL 2024), over every other order; of
    their one other order: :func:`fluctuation`. Raises ValueError when there are fewer than 2 orders.
    """
    decisions = decide(P)
    if decisions.shape[1] < 2:
        raise ValueError("1 order: flips are from the first order to others, give scores of at least 2")
    return _differ(decisions[:, 1:], decisions[:, :1]).mean(axis=1)


def fluctuation(P: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Whether the decision differs between the first order and its reverse, (item,), from 0 to 1.

    Its mean is the fluctuation rate of Wei et al., "Unveiling Selection Biases" (Findings of ACL 2024). Tied options as
    in :func:`flip_rate`. Raises ValueError when the reverse of the first is not among the ``orders`` (order, K).
    """
    decisions, orders = check_orders(decide(P), orders)
    (reverse,) = _rows(orders[:1, ::-1], orders)
    return _differ(decisions[:, reverse], decisions[:, 0])


def plurality_agreement(P: np.ndarray) -> np.ndarray:
    """PPA: share of the orders that decide for the item's most frequent option, (item,), from 1/K to 1.

    max_o of :func:`permdistill.debias.majority_vote`, in which tied options share their order (proportion of plurality
    agreement; Robinson, Rytting, Wingate, "Leveraging Large Language Models for Multiple Choice Question Answering", ICLR
    2023). Over all or cyclic orders, 1/K is what a model gets that always says the same letter.
    """
    return majority_vote(P).max(axis=-1)


def position_variance(P: np.ndarray) -> np.ndarray:
    """PBM: mean over options of the variance over orders of that option's probability, (item,). Needs no labels.

    1/K sum_o Var_sigma P(o|x, sigma), the population variance: from 0, exactly so where no order differs, to (K-1)/K^2,
    which is 1/4 for K = 2.
    """
    P = check_scores(P)
    return (P - P[:, :1]).var(axis=1).mean(axis=-1)  # a variance does not change, and equal rows become exact zeros


# --------------------------------------------------------------------------------------------------------------------
# Preference for positions


def position_marginals(P: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Probability that each position gets, mean over the orders: (item, position).

    orders  (order, K), ``orders[j][k]`` = option shown at position k in ``P[:, j]``. Over all or cyclic orders each option
            stands equally often at each position, so the marginals show preferences for positions only; over other lists
            of orders they also carry the options' own probabilities.

    Raises ValueError when ``orders`` are not permutations or do not fit ``P``.
    """
    P, orders = check_orders(P, orders)
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


def _gold_and_decisions(
    P: np.ndarray, orders: np.ndarray, answers: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """1 where the gold answer is shown, and the decisions: two arrays (item, order, position)."""
    decisions, orders = check_orders(decide(P), orders)
    n, n_orders, k = decisions.shape
    gold = broadcast(one_hot(_check_answers(answers, n, k), k), n_orders)
    return to_positions(gold, orders), to_positions(decisions, orders)


def recall_by_position(P: np.ndarray, orders: np.ndarray, answers: Sequence[int] | np.ndarray) -> np.ndarray:
    """What the recall at each position is made of, (item, position, 2), for :func:`rstd`.

    [i, k] = share of the orders with the gold answer at position k, and share with it there and decided for. recall_k is
    the second over the first of the mean over items. PriDe takes the original order alone: ``P[:, :1], orders[:1]``.
    """
    gold, decisions = _gold_and_decisions(P, orders, answers)
    return np.stack([gold, gold * decisions], axis=-1).mean(axis=1)


def rstd(table: np.ndarray) -> float:
    """RStd: standard deviation over positions k of recall_k = P(decided for k | gold answer at k), from 0 to 1/2.

    table  (position, 2), the mean over items of :func:`recall_by_position`. A position at which the gold answer never is
           has no recall and is left out.

    The population standard deviation, as in the code of Zheng et al., "Large Language Models Are Not Robust Multiple Choice
    Selectors" (PriDe), ICLR 2024; theirs is in points. A model that always says the same letter has sqrt(K-1)/K. With an
    interval: ``bootstrap(recall_by_position(P, orders, answers), statistic=rstd)``. Like every distance from "no
    bias", V and CKLD included, it is above 0 by chance alone: compare systems, do not look for 0 in the interval.
    """
    seen, right = np.asarray(table, dtype=np.float64).T
    return float((right[seen > 0] / seen[seen > 0]).std())


def position_correctness(P: np.ndarray, orders: np.ndarray, answers: Sequence[int] | np.ndarray) -> np.ndarray:
    """The gold answer's position against correctness, (item, position, 2), for :func:`cramers_v`.

    [i, k] = share of the orders with the gold answer at position k and decided for, and with it there and not decided for
    (tied options share their order). Sums to 1 per item.
    """
    gold, decisions = _gold_and_decisions(P, orders, answers)
    return np.stack([gold * decisions, gold * (1 - decisions)], axis=-1).mean(axis=1)


def cramers_v(table: np.ndarray) -> float:
    """Cramer's V = sqrt(chi2 / n / min(K - 1, 1)) of a table (position, 2), from 0 to 1 (Cramer 1946).

    table  the mean over items of :func:`position_correctness`, or counts: V does not depend on n. 0 when all is right, or
           all is wrong, or the gold answer is always at one position: an empty margin shows no association.

    chi2 / n = sum (p - e)^2 / e, e the product of the margins; the minimum is 1, the table having two columns. There is no
    chi2 test with it, as the orders of one item are not independent: ``bootstrap(.., groups, statistic=cramers_v)``.
    """
    p = np.asarray(table, dtype=np.float64)
    p = p / p.sum()
    expected = p.sum(axis=1, keepdims=True) * p.sum(axis=0)
    held = expected > 0
    return float(np.sqrt(((p - expected)[held] ** 2 / expected[held]).sum()))


def gold_and_predicted_positions(P: np.ndarray, orders: np.ndarray, answers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where the gold answers are and where the decisions go, (item, 2, position), for :func:`ckld`.

    [i, 0, k] = share of the orders with the gold answer at position k; [i, 1, k] = share that decides for position k.
    """
    return np.stack(_gold_and_decisions(P, orders, answers), axis=2).mean(axis=1)


def ckld(table: np.ndarray) -> float:
    """CKLD = KL(positions of the gold answers || positions decided for), in nats, from 0 to -log :data:`EPSILON`.

    table  (2, position), the mean over items of :func:`gold_and_predicted_positions`

    Choice Kullback-Leibler divergence; Choi et al., "Mitigating Selection Bias with Node Pruning and Auxiliary Options", ACL
    2025 (arXiv 2024). Of shares raised to :data:`EPSILON` and renormalised: where a position is never decided for, the value
    says more about epsilon than about it. With an interval: ``bootstrap(.., statistic=ckld)``.
    """
    gold, predicted = _clip(np.asarray(table, dtype=np.float64))
    return float((gold * np.log(gold / predicted)).sum())


# --------------------------------------------------------------------------------------------------------------------
# Intervals and tests


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
    counts = np.bincount(group := _numbered(tuple(names))).astype(np.float64)
    if len(counts) < 2:
        raise ValueError(f"{len(counts)} group(s) of {len(values)} items: an interval needs at least 2")
    sums = np.zeros((len(counts), values[0].size))
    np.add.at(sums, group, values.reshape(len(values), -1))

    drawn = _resamples(len(counts), n, seed) if isinstance(seed, int) else _drawn(len(counts), n, seed)
    chunk = max(1, _CHUNK // len(counts))
    means = []
    for start in range(0, n, chunk):
        weights = drawn[start : start + chunk].astype(np.float64)
        means.append((weights @ sums) / (weights @ counts)[:, None])
    resampled = np.concatenate(means).reshape(n, *values.shape[1:])
    estimates = resampled if statistic is None else np.array([statistic(mean) for mean in resampled], dtype=np.float64)
    low, high = np.quantile(estimates, [(1 - level) / 2, (1 + level) / 2])
    mean = values.mean(axis=0)
    return Interval(float(mean if statistic is None else statistic(mean)), float(low), float(high))


@lru_cache(maxsize=8)  # tables ask for the same groups again and again
def _numbered(names: tuple[Hashable, ...]) -> np.ndarray:
    """The number of each name, in the order in which they come."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def _drawn(groups: int, n: int, seed: int | np.random.Generator) -> np.ndarray:
    """How often each group stands in each of ``n`` resamples, (resample, group)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=n).astype(np.uint16)


# Drawing takes ten times as long as using what was drawn, and tables ask for the same resamples again and again.
_resamples = lru_cache(maxsize=8)(_drawn)


class McNemar(NamedTuple):
    """Items that only one of two systems gets right, and the p-value of their difference."""

    only_a: int
    only_b: int
    p: float


def mcnemar(right_a: Sequence[int] | np.ndarray, right_b: Sequence[int] | np.ndarray) -> McNemar:
    """Exact two-sided test that two systems are right on equally many items (McNemar 1947).

    right_a, right_b  (item,), 1 where the system is right and 0 where it is wrong, the same items in the same order

    p = P(|X - n/2| >= |only_a - n/2|) for X ~ Binomial(n, 1/2), n = only_a + only_b; 1 when n = 0. Items count as
    independent: where they share a document, :func:`bootstrap` the paired difference by groups instead. Raises ValueError
    on values other than 0 and 1.
    """
    a, b = np.asarray(right_a), np.asarray(right_b)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"right_a of shape {a.shape}, right_b of shape {b.shape}: give both as (item,), of the same items")
    for name, right in (("right_a", a), ("right_b", b)):
        hard = np.isin(right, (0, 1))
        if not hard.all():
            item = int(hard.argmin())
            raise ValueError(
                f"{name} of item {item} is {right[item]}: give 0 or 1; take one order rather than a mean, and break its ties"
            )
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return McNemar(only_a, only_b, float(p))
