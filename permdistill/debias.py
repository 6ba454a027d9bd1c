"""From a teacher's scores in several orders to one answer: one pure function per method.

Scores ``P`` are probabilities with the axes (item, order, option), in option space, each row summing to 1. A method
returns (item, option) when its answer does not depend on the order, else (item, order, option). Metrics always take
(item, order, option), so an order-free answer goes to them through :func:`broadcast`.
"""

from __future__ import annotations

import numpy as np

# Sums of the same numbers in another order differ by rounding; what differs by less than this is a tie.
TIE = 1e-9
_SUM_TOLERANCE = 1e-5  # of float32 probabilities


def check_scores(scores: np.ndarray) -> np.ndarray:
    """``scores`` as float64 (item, order, option). Raises ValueError, with the fix, unless they are such probabilities."""
    P = np.asarray(scores, dtype=np.float64)
    if P.ndim != 3 or 0 in P.shape:
        raise ValueError(
            f"scores of shape {P.shape}: give (item, order, option), each at least 1; "
            "debias.broadcast makes it of an order-free (item, option)"
        )
    bad = ~((P >= 0).all(axis=-1) & (np.abs(P.sum(axis=-1) - 1) <= _SUM_TOLERANCE))
    if bad.any():
        item, order = np.argwhere(bad)[0]
        raise ValueError(
            f"scores of item {item}, order {order} are {P[item, order].tolist()} (and {bad.sum() - 1} rows more): give "
            "probabilities that sum to 1; scores.probabilities makes them of log-probabilities"
        )
    return P


def decide(P: np.ndarray) -> np.ndarray:
    """Hard decisions, (item, order, option) -> (item, order, option): 1 on the most probable option.

    Tied options share the 1. Low-precision logits do tie, and "the first of them" would favour the options that a dataset
    lists first.
    """
    P = check_scores(P)
    tied = P >= P.max(axis=-1, keepdims=True) - TIE
    return tied / tied.sum(axis=-1, keepdims=True)


def original(P: np.ndarray) -> np.ndarray:
    """The biased answer, (item, option): the scores of the first order, which in all and cyclic orders is the original."""
    return check_scores(P)[:, 0]


def permutation_average(P: np.ndarray) -> np.ndarray:
    """Permutation debiasing, (item, option): the arithmetic mean of the probabilities over the orders.

    P~(o|x) = 1/K! sum_sigma P(o|x, sigma) (Liusie et al., Findings of ACL 2024). With all K! orders the answer does not
    depend on the order in which the options came.
    """
    return check_scores(P).mean(axis=1)


def majority_vote(P: np.ndarray) -> np.ndarray:
    """Hard permutation debiasing, (item, option): the share of orders that decide for the option (see :func:`decide`)."""
    return decide(P).mean(axis=1)


def sampled_decisions(P: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One black-box teacher call for each item and order: option indices (item, order), drawn from P(.|x, order).

    With one generator state, the decisions of the first items do not change when items are added.
    """
    cumulative = check_scores(P).cumsum(axis=-1)
    cumulative /= cumulative[..., -1:]  # ends in exactly 1, and the draw is below 1: no impossible option is ever drawn
    draw = rng.random(cumulative.shape[:2])
    return (draw[..., None] >= cumulative).sum(axis=-1)


def one_hot(decisions: np.ndarray, k: int) -> np.ndarray:
    """Option indices (...) -> probabilities 0 or 1 (..., option). Raises ValueError on an index outside 0..k-1."""
    decisions = np.asarray(decisions)
    if not np.issubdtype(decisions.dtype, np.integer):
        raise ValueError(f"decisions of type {decisions.dtype}: give option indices as integers")
    outside = decisions[(decisions < 0) | (decisions >= k)]
    if outside.size:
        raise ValueError(f"decision {outside.flat[0]} for K = {k} options: give option indices in 0..{k - 1}")
    return np.eye(k)[decisions]


def broadcast(Q: np.ndarray, n_orders: int) -> np.ndarray:
    """An order-free answer (item, option) as scores (item, order, option): the same in each order. A read-only view.

    Raises ValueError on another shape.
    """
    Q = np.asarray(Q, dtype=np.float64)
    if Q.ndim != 2:
        raise ValueError(f"answers of shape {Q.shape}: give (item, option), one answer an item")
    return np.broadcast_to(Q[:, None, :], (Q.shape[0], n_orders, Q.shape[1]))
