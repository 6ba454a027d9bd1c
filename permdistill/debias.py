"""From a teacher's scores in several orders to one answer: one pure function per method.

Scores ``P`` are probabilities with the axes (item, order, option), in option space, each row summing to 1. A method
returns (item, option) when its answer does not depend on the order, else (item, order, option). Metrics always take
(item, order, option), so an order-free answer goes to them through :func:`broadcast`. :func:`debiasers` lists every method
in one form, with what it costs.

A method answers in each *presented* order as if the question had come in that order. ``orders`` (order, K) says which
they are: ``orders[j][k]`` = option shown at position k in ``P[:, j]``.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize, root
from scipy.special import logsumexp, softmax

from permdistill.orders import to_options, to_positions

# Sums of the same numbers in another order differ by rounding; what differs by less than this is a tie.
TIE = 1e-9
_SUM_TOLERANCE = 1e-5  # of float32 probabilities

EPSILON = 1e-12  # PriDe: probabilities are raised to this much before their logarithm is averaged
UNIFORM_TOLERANCE = 1e-8  # prior-matching: how far from 1/K the marginal of a position may stay


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


def check_orders(P: np.ndarray, orders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores as of :func:`check_scores`, and orders (order, K). Raises ValueError unless these are permutations that fit."""
    P, orders = check_scores(P), np.asarray(orders)
    if orders.shape != P.shape[1:]:
        raise ValueError(f"orders of shape {orders.shape} for scores of shape {P.shape}: give (order, K) = {P.shape[1:]}")
    wrong = (np.sort(orders, axis=1) != np.arange(orders.shape[1])).any(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"order {row} is {orders[row].tolist()}: give a permutation of 0..{orders.shape[1] - 1}")
    return P, orders


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


def sharpen(Q: np.ndarray, power: float) -> np.ndarray:
    """Q (item, option) to ``power``, renormalised: more than 1 sharpens, less flattens (power = 1 / temperature). Averages
    over orders of a biased teacher are nearly uniform; this makes their preference visible. Infinity leaves the most
    probable option alone, or those that tie (:func:`decide`).

    Raises ValueError unless ``power`` is positive.
    """
    if not power > 0:
        raise ValueError(f"power = {power}: give a number above 0")
    if np.isinf(power):
        return decide(Q[:, None])[:, 0]
    return np.asarray(Q, dtype=np.float64) if power == 1 else softmax(power * _log(np.asarray(Q, dtype=np.float64)), axis=-1)


def sampled_decisions(P: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One black-box teacher call for each item and order: option indices (item, order), drawn from P(.|x, order).

    With one generator state, the decisions of the first items do not change when items are added.
    """
    P = check_scores(P)
    return _drawn(P, rng.random(P.shape[:2]))


def _drawn(P: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Probabilities (..., option) and uniform numbers in [0, 1) (...) -> option indices (...)."""
    cumulative = P.cumsum(axis=-1)
    cumulative /= cumulative[..., -1:]  # ends in exactly 1, and the draw is below 1: no impossible option is ever drawn
    return (draws[..., None] >= cumulative).sum(axis=-1)


def black_box_targets(P: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """What ``n`` black-box calls say, (item, option): the histogram of ``n`` decisions, each in an order of its own.

    An order is drawn uniformly, with replacement, then a decision from P(.|x, order) (Liusie et al., Findings of ACL 2024).
    The expectation is :func:`permutation_average`. With one generator state, a larger ``n`` begins with the draws of a
    smaller one; other items, or another number of items, are other draws. Raises ValueError when ``n`` is not positive.
    """
    P = check_scores(P)
    if n < 1:
        raise ValueError(f"n = {n} draws: give at least 1")
    draws = rng.random((n, len(P), 2)).swapaxes(0, 1)  # (item, draw, 2): the number of draws is the generator's slowest axis
    order = (draws[..., 0] * P.shape[1]).astype(np.int64)
    decisions = _drawn(np.take_along_axis(P, order[..., None], axis=1), draws[..., 1])
    return one_hot(decisions, P.shape[2]).mean(axis=1)


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


# --------------------------------------------------------------------------------------------------------------------
# Averages over some of the orders


def rotations(orders: np.ndarray) -> np.ndarray:
    """Where the K rotations of each order stand in ``orders``: indices (order, K), ascending.

    Raises ValueError naming the first that is missing.
    """
    listed = orders.tolist()
    index = {tuple(order): j for j, order in enumerate(listed)}
    rotated = [[tuple(order[r:] + order[:r]) for r in range(len(order))] for order in listed]
    missing = [(order, r) for order, rotations in zip(listed, rotated, strict=True) for r in rotations if r not in index]
    if missing:
        order, rotation = missing[0]
        raise ValueError(f"rotation {list(rotation)} of order {order} is missing: give scores in all or in cyclic orders")
    return np.sort([[index[r] for r in rotations] for rotations in rotated], axis=1)


def cyclic_average(P: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """The mean over the K rotations of the presented order, (item, order, option), at K calls instead of K!.

    "Cyclic permutation" of Zheng et al., "Large Language Models Are Not Robust Multiple Choice Selectors", ICLR 2024. Each
    option stands once at each position, but its neighbours stay: orders that are no rotations of each other may still
    get different answers. Raises ValueError when ``orders`` lack a rotation of one of them.
    """
    P, orders = check_orders(P, orders)
    return P[:, rotations(orders)].mean(axis=2)  # indices ascend: the rotations of one order get exactly equal answers


def random_average(P: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """The mean over the presented order and ``n`` - 1 others, drawn anew for each item and order: (item, order, option).

    The others are drawn without replacement, so ``n`` = 1 is ``P`` itself, and ``n`` = all is :func:`permutation_average` in
    every order. With one generator state, a larger ``n`` adds orders to those of a smaller one. Raises ValueError when ``n``
    is not in 1..number of orders.
    """
    P = check_scores(P)
    items, n_orders = P.shape[:2]
    if not 1 <= n <= n_orders:
        raise ValueError(f"n = {n} orders of {n_orders}: give 1..{n_orders}")
    Q = np.empty_like(P)
    for j in range(n_orders):  # one at a time: all the keys together would take (number of orders)^2
        keys = rng.random((items, n_orders))
        keys[:, j] = -1  # the presented order is always among them
        chosen = np.sort(keys.argsort(axis=1)[:, :n], axis=1)  # sorted, so that equal sets have equal sums
        Q[:, j] = np.take_along_axis(P, chosen[..., None], axis=1).mean(axis=1)
    return Q


# --------------------------------------------------------------------------------------------------------------------
# Division by a prior over positions


def _log(p: np.ndarray) -> np.ndarray:
    """Logarithm, of 0 minus infinity and no warning."""
    with np.errstate(divide="ignore"):
        return np.log(p)


def reweigh(P: np.ndarray, orders: np.ndarray, log_weights: np.ndarray) -> np.ndarray:
    """Q(position) prop. to weight(position) P(position), renormalised, (item, order, option).

    log_weights  (position,), or any shape that broadcasts with (item, order, position)
    """
    P, orders = check_orders(P, orders)
    return to_options(softmax(_log(to_positions(P, orders)) + log_weights, axis=-1), orders)


def prior_weights(by_position: np.ndarray) -> np.ndarray:
    """Log weights a (position,), of mean 0, under which the mean over rows of softmax(log p + a) is uniform.

    by_position  (row, position) probabilities

    They minimise the convex f(a) = mean_r logsumexp(log p_r + a) - mean(a), whose gradient is that mean minus 1/K, and
    exist and are unique where all p > 0. The marginal is checked: it lies within :data:`UNIFORM_TOLERANCE` of uniform.

    Raises ValueError when it does not. Then probabilities of exactly 0 leave some position less than 1/K whatever its
    weight.
    """
    p = np.asarray(by_position, dtype=np.float64)
    if p.ndim != 2:
        raise ValueError(f"probabilities of shape {p.shape}: give (row, position)")
    p = check_scores(p[:, None])[:, 0]
    fix = "mix some of the uniform distribution into the probabilities, or use a method that averages over orders"
    if (never := (p == 0).all(axis=0)).any():
        raise ValueError(f"position {never.argmax()} has probability 0 in all {len(p)} rows, no weight helps: {fix}")
    log_p, k = _log(p), p.shape[1]

    # f does not change with the mean of a; mean(a)^2 / 2 on top picks mean 0 and makes the Hessian regular.
    def value(a: np.ndarray) -> float:
        return logsumexp(log_p + a, axis=1).mean() - a.mean() + a.mean() ** 2 / 2

    def gradient(a: np.ndarray) -> np.ndarray:
        return softmax(log_p + a, axis=-1).mean(axis=0) - 1 / k + a.mean() / k

    def hessian(a: np.ndarray) -> np.ndarray:
        q = softmax(log_p + a, axis=-1)
        return np.diag(q.mean(axis=0)) - q.T @ q / len(q) + 1 / k**2

    start = -np.log(p.mean(axis=0))
    options = {"gtol": 1e-6}  # near the minimum f is flat to its last digit, so that the rest is left to the gradient
    near = minimize(value, start - start.mean(), jac=gradient, hess=hessian, method="trust-exact", options=options).x
    a = root(gradient, near, jac=hessian, tol=1e-14).x
    a -= a.mean()
    marginal = softmax(log_p + a, axis=-1).mean(axis=0)
    if not np.abs(marginal - 1 / k).max() <= UNIFORM_TOLERANCE:
        raise ValueError(f"no weights make the positions uniform, the marginal reached is {marginal.tolist()}: {fix}")
    return a


def prior_matching(P: np.ndarray, orders: np.ndarray, fit: np.ndarray | None = None) -> np.ndarray:
    """P^(w_k|x, sigma) prop. to alpha_k P(w_k|x, sigma), (item, order, option) (Liusie et al., Findings of ACL 2024).

    fit  (item', order, option), in the same orders: the unlabelled scores over all of which, items and orders together,
         alpha makes the marginal over positions uniform (:func:`prior_weights`). Default: ``P`` itself.

    Exact where the bias multiplies each position by the same factor in all questions, and the options themselves are
    balanced over the positions of ``fit``: so they are over all or cyclic orders, but not in the original order of a data
    set that prefers some option. Raises ValueError where no alpha does it.
    """
    P, orders = check_orders(P, orders)
    fit, _ = check_orders(P if fit is None else fit, orders)
    return reweigh(P, orders, prior_weights(to_positions(fit, orders).reshape(-1, P.shape[2])))


def context_prior_matching(P: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Prior-matching with an alpha of each item's own, fitted over its orders: (item, order, option).

    Source: Liusie et al., Findings of ACL 2024. It costs as many calls as :func:`permutation_average`. The answer may still
    depend on the order, except over all orders of two options, where it is the renormalised geometric mean of the two.
    Raises ValueError naming the first item for which no alpha makes the marginal over positions uniform.
    """
    P, orders = check_orders(P, orders)
    by_position = to_positions(P, orders)
    weights = _newton(by_position)
    for item in np.flatnonzero(np.isnan(weights).any(axis=1)):  # few, if any: a search that is slower and more robust
        try:
            weights[item] = prior_weights(by_position[item])
        except ValueError as error:
            raise ValueError(f"item {item}: {error}") from error
    return reweigh(P, orders, weights[:, None])


def _newton(p: np.ndarray) -> np.ndarray:
    """:func:`prior_weights` of each item (item, row, position) by Newton's method, all at once: (item, position), NaN for
    items with a 0 or at which it does not settle."""
    weights, k = np.full((len(p), p.shape[2]), np.nan), p.shape[2]
    left = np.flatnonzero((p > 0).all(axis=(1, 2)))
    log_p = np.log(p[left])
    a = -np.log(p[left].mean(axis=1))
    a -= a.mean(axis=1, keepdims=True)
    for _ in range(30):
        q = softmax(log_p + a[:, None], axis=-1)
        marginal = q.mean(axis=1)
        hessian = marginal[..., None] * np.eye(k) - q.swapaxes(1, 2) @ q / p.shape[1] + 1 / k**2 + 1e-12 * np.eye(k)
        step = np.linalg.solve(hessian, (marginal - 1 / k)[..., None])[..., 0]
        largest = np.abs(step).max(axis=1, keepdims=True)
        done = (largest[:, 0] < 1e-9) & (np.abs(marginal - 1 / k).max(axis=1) <= UNIFORM_TOLERANCE)
        a -= step * np.minimum(1, 2 / np.maximum(largest, 2))  # far from the minimum a whole step may lead away from it
        weights[left[done]] = a[done]
        left, log_p, a = left[~done], log_p[~done], a[~done]
    return weights


def position_prior(P: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """PriDe's prior over positions, (position,): the mean over items and presented orders of

    softmax over positions of the mean over the K rotations of log P(position|x, rotation),

    in which an option's own logit is at each position once and cancels, so that the softmax of an additive position bias is
    recovered exactly. Probabilities below :data:`EPSILON` count as that much. Source and errors as in :func:`pride`.
    """
    P, orders = check_orders(P, orders)
    log_p = np.log(np.maximum(to_positions(P, orders), EPSILON))
    return softmax(log_p[:, rotations(orders)].mean(axis=2), axis=-1).mean(axis=(0, 1))


def pride(P: np.ndarray, orders: np.ndarray, fraction: float = 0.05, *, rng: np.random.Generator) -> np.ndarray:
    """PriDe, (item, order, option): P(position) / prior(position), renormalised, with the prior of a few items.

    fraction  of the items, rounded, at least one, drawn by ``rng``: they are seen in all K rotations, give the
              :func:`position_prior`, and are themselves answered by their :func:`cyclic_average`

    Source: Zheng et al., "Large Language Models Are Not Robust Multiple Choice Selectors", ICLR 2024. There the questions
    come in one order each; here the prior is the mean over all presented orders as well, so of P in all K! orders it is
    less noisy than one of the same fraction there. Raises ValueError for a fraction outside (0, 1], and when ``orders``
    lack a rotation of one of them.
    """
    P, orders = check_orders(P, orders)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction = {fraction}: give a share of the items, above 0 and at most 1")
    seen = rng.choice(len(P), size=max(1, round(fraction * len(P))), replace=False)
    Q = reweigh(P, orders, -np.log(position_prior(P[seen], orders)))
    Q[seen] = cyclic_average(P[seen], orders)
    return Q


def contextual_calibration(P: np.ndarray, orders: np.ndarray, content_free: np.ndarray) -> np.ndarray:
    """Q(position) prop. to P(position) / content_free(position), (item, order, option).

    content_free  (position,) probabilities of the labels where the question and its options say nothing ("N/A")

    Source: Zhao et al., "Calibrate Before Use", ICML 2021. Raises ValueError unless ``content_free`` are K positive
    probabilities that sum to 1.
    """
    P, orders = check_orders(P, orders)
    prior = np.asarray(content_free, dtype=np.float64)
    if prior.shape != P.shape[2:] or not ((prior > 0).all() and abs(prior.sum() - 1) <= _SUM_TOLERANCE):
        raise ValueError(f"content_free = {prior.tolist()}: give {P.shape[2]} positive probabilities that sum to 1")
    return reweigh(P, orders, -np.log(prior))


# --------------------------------------------------------------------------------------------------------------------
# Names, as they stand in tables


BIASED = "biased"
MAJORITY = "majority vote over all orders"
DEBIASED = "all-orders average"
CYCLIC = "cyclic average"
RANDOM, RANDOM_FAMILY = "mean over {} random orders", "mean over random orders"
PRIOR_MATCHING = "prior-matching"
CONTEXT_PRIOR_MATCHING = "context prior-matching"
PRIDE_FRACTION = 0.05
PRIDE = "PriDe at 5%"
CALIBRATION = "contextual calibration"
BLACK_BOX, BLACK_BOX_FAMILY = "black-box histogram, {} draws", "black-box histogram"
DRAWS = (1, 2, 4, 8, 16, 32, 64)
