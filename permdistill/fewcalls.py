"""Debiasing with few calls: which orders to ask, when to stop asking, and corrections that need no further call.

Pure functions like those of :mod:`permdistill.debias`: scores (item, order, option) in the orders ``orders`` (order, K) ->
answers. A *design* (order, K) is a list of orders relative to the presented one, itself first: the options that stand at
positions 0..K-1 are shown in the order ``design[j]``. All are answered from scores in all the orders that the design needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import softmax

from permdistill.debias import (
    EPSILON,
    TIE,
    check_orders,
    check_scores,
    reweigh,
)
from permdistill.orders import all_orders, reverse_pairs, to_positions, williams_orders

REVERSE_PAIR = "mean of an order and its reverse"
WILLIAMS = "mean over a Williams design"
GEOMETRIC = "geometric mean over all orders"
BATCH_CALIBRATION = "batch calibration"
ADAPTIVE, ADAPTIVE_FAMILY = "adaptive, {:g} calls", "adaptive, by margin"


def places(orders: np.ndarray, design: np.ndarray) -> np.ndarray:
    """Where the orders that a design takes to each of ``orders`` stand among them: indices (order, order of the design).

    Raises ValueError naming the first that is missing.
    """
    orders, design = np.asarray(orders), np.asarray(design)
    index = {tuple(order): j for j, order in enumerate(orders.tolist())}
    wanted = orders[:, design]  # (order, order of the design, K)
    found = [[index.get(tuple(order), -1) for order in row] for row in wanted.tolist()]
    result = np.array(found, dtype=np.int64)
    if (result < 0).any():
        i, j = np.argwhere(result < 0)[0]
        raise ValueError(
            f"order {wanted[i, j].tolist()}, which goes with order {orders[i].tolist()}, is missing: score it too"
        )
    return result


def has(design: np.ndarray, orders: np.ndarray) -> bool:
    """Whether ``orders`` hold all that a design needs of them."""
    try:
        return bool(places(orders, design).size)
    except ValueError:
        return False


def design_average(P: np.ndarray, orders: np.ndarray, design: np.ndarray) -> np.ndarray:
    """The mean over the orders of a design, from the presented one on: (item, order, option), at len(design) calls.

    :func:`permdistill.orders.reverse_pairs` of one order: two calls, between which the first and the last place change.
    :func:`permdistill.orders.williams_orders`: each option once at each place, and behind each other one. Raises ValueError
    when an order is missing.
    """
    P, orders = check_orders(P, orders)
    # Ascending: presented orders that need the same calls get exactly equal answers.
    return P[:, np.sort(places(orders, design), axis=1)].mean(axis=2)


def geometric_average(P: np.ndarray) -> np.ndarray:
    """The renormalised geometric mean over the orders, (item, option): the product of experts (Hinton 2002).

    Probabilities below :data:`permdistill.debias.EPSILON` count as that much. Under a bias that multiplies each position's
    probability by a factor of its own, the mean over all or cyclic orders has no bias left.
    """
    return softmax(np.log(np.maximum(check_scores(P), EPSILON)).mean(axis=1), axis=-1)


def batch_calibration(P: np.ndarray, orders: np.ndarray, fit: np.ndarray | None = None) -> np.ndarray:
    """Q(position) prop. to P(position) / mean of P(position), (item, order, option).

    fit  (item', order, option), in the same orders: the unlabelled scores whose mean it is. Default: ``P`` itself

    Source: Zhou et al., "Batch Calibration", ICLR 2024 (arXiv 2309.17249); prior-matching's first step, at one call. Raises
    ValueError where a position has probability 0 throughout.
    """
    P, orders = check_orders(P, orders)
    fit, _ = check_orders(P if fit is None else fit, orders)
    prior = to_positions(fit, orders).mean(axis=(0, 1))
    if not (prior > 0).all():
        raise ValueError(f"position {int(prior.argmin())} has probability 0 throughout: no factor helps")
    return reweigh(P, orders, -np.log(prior))


# --------------------------------------------------------------------------------------------------------------------
# Stopping when it is clear


class Adaptive(NamedTuple):
    """Answers (item, order, option), and the calls that each took (item, order)."""

    answers: np.ndarray
    calls: np.ndarray


def margins(Q: np.ndarray) -> np.ndarray:
    """How far the most probable option is above the next: (..., option) -> (...)."""
    top = np.sort(Q, axis=-1)
    return top[..., -1] - top[..., -2]


def stages(k: int, last: int | None = None) -> list[np.ndarray]:
    """Designs that extend each other: the presented order, with its reverse, a Williams design, all orders of up to 4
    options. ``last``: how many of these."""
    designs = [np.arange(k)[None], reverse_pairs(np.arange(k)[None]), williams_orders(k)]
    if k <= 4:
        designs.append(all_orders(k))
    own = [design for i, design in enumerate(designs) if i == 0 or len(design) > len(designs[i - 1])]
    return own[:last]


def adaptive_average(P: np.ndarray, orders: np.ndarray, designs: Sequence[np.ndarray], margin: Sequence[float]) -> Adaptive:
    """Ask the first design; where the answer's margin is below ``margin[0]``, ask on to the second, and so on.

    designs  each holding the one before, so that no call is wasted
    margin   one less than designs, see :func:`fit_margins`

    The answer is the mean over what was asked. Raises ValueError when an order is missing, or a design does not extend the
    one before.
    """
    P, orders = check_orders(P, orders)
    if len(margin) != len(designs) - 1:
        raise ValueError(f"{len(margin)} margins for {len(designs)} designs: give one for each but the last")
    for before, after in zip(designs[:-1], designs[1:], strict=True):
        if not {tuple(o) for o in before.tolist()} <= {tuple(o) for o in after.tolist()}:
            raise ValueError(f"a design of {len(after)} orders does not hold the {len(before)} of the one before")
    Q = design_average(P, orders, designs[0])
    calls = np.full(Q.shape[:2], len(designs[0]))
    going = np.ones(Q.shape[:2], dtype=bool)
    for design, least in zip(designs[1:], margin, strict=True):
        going &= margins(Q) < least
        Q = np.where(going[..., None], design_average(P, orders, design), Q)
        calls = np.where(going, len(design), calls)
    return Adaptive(Q, calls)


def share(designs: Sequence[np.ndarray], calls: float) -> float:
    """The share of the questions that goes on from each design to the next, so that one takes ``calls`` calls on average:
    the root of n_0 + sum_i share^i (n_i - n_(i-1)) = calls. 1 where that is enough for all. Raises ValueError when the first
    design alone costs more."""
    n = [len(design) for design in designs]
    if calls < n[0]:
        raise ValueError(f"{calls} calls a question: the first design takes {n[0]}")
    if calls >= n[-1]:
        return 1.0
    return float(brentq(lambda r: n[0] - calls + sum(r ** (i + 1) * step for i, step in enumerate(np.diff(n))), 0, 1))


def fit_margins(P: np.ndarray, orders: np.ndarray, designs: Sequence[np.ndarray], calls: float) -> tuple[float, ...]:
    """Margins under which :func:`adaptive_average` takes ``calls`` calls a question on these scores: the least sure
    :func:`share` of those that came to a design goes on to the next. No gold answer is read. Raises ValueError when the
    first design alone costs more.
    """
    P, orders = check_orders(P, orders)
    part, found = share(designs, calls), []
    going = np.ones(P.shape[:2], dtype=bool)
    for design in designs[:-1]:
        margin = margins(design_average(P, orders, design))
        own = np.sort(margin[going])
        found.append(float(own[int(part * len(own))]) if part < 1 and len(own) else np.inf)
        going &= margin < found[-1]
    return tuple(found)


def adaptive_plan(k: int, calls: float | None = None, hard: bool = False) -> tuple[list[np.ndarray], float]:
    """Designs and calls a question: 2.6 unless given, 1.5 of two options. From 4 on, four options go on to all 24 orders.
    ``hard``: a single decision is always sure, so that these begin with a pair."""
    every, first = stages(k), int(hard)
    calls = calls or (2.6 if k > 2 else 1.5 + 0.5 * hard)
    return (every[1:] if calls >= 4 and len(every) > 3 else every[first:3]), calls


def ask_adaptively(
    ask: Callable[[np.ndarray, np.ndarray], np.ndarray],
    items: int,
    designs: Sequence[np.ndarray],
    calls: float,
    calibrate: bool = True,
) -> np.ndarray:
    """Ask design by design, each time only the least sure :func:`share` of the questions: the number of each one's last
    design, (item,).

    ask        (places of items, design) -> P (item, order, option) in the orders of the design
    calibrate  whether margins are those after batch calibration, by the mean over all items in the first design. Not for
               hard verdicts; of these, unanimous ones are sure
    """
    part, last, going = share(designs, calls), np.zeros(items, dtype=np.int64), np.arange(items)
    weights: np.ndarray | None = None
    for number, design in enumerate(designs):
        if not len(going):
            break
        last[going] = number
        P = check_scores(ask(going, design))
        if weights is None:
            prior = to_positions(P, design).mean(axis=(0, 1))
            weights = -np.log(np.maximum(prior, EPSILON)) if calibrate else np.zeros(len(prior))
        margin = margins(reweigh(P, design, weights).mean(axis=1))
        least = np.argsort(margin, kind="stable")[: int(part * len(going))]
        going = np.sort(going[least[margin[least] < 1 - TIE]])
    return last
