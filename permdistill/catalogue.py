"""Every debiaser of the field as a record: its name, what it costs, what it needs, where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import factorial

import numpy as np

from permdistill.debias import (
    BIASED,
    BLACK_BOX,
    BLACK_BOX_FAMILY,
    CALIBRATION,
    CONTEXT_PRIOR_MATCHING,
    CYCLIC,
    DEBIASED,
    DRAWS,
    MAJORITY,
    PRIDE,
    PRIDE_FRACTION,
    PRIOR_MATCHING,
    RANDOM,
    RANDOM_FAMILY,
    black_box_targets,
    broadcast,
    check_scores,
    context_prior_matching,
    contextual_calibration,
    cyclic_average,
    majority_vote,
    permutation_average,
    pride,
    prior_matching,
    random_average,
    rotations,
)
from permdistill.fewcalls import (
    ADAPTIVE,
    ADAPTIVE_FAMILY,
    BATCH_CALIBRATION,
    GEOMETRIC,
    REVERSE_PAIR,
    WILLIAMS,
    adaptive_average,
    batch_calibration,
    design_average,
    fit_margins,
    geometric_average,
    has,
    stages,
)
from permdistill.orders import ENUMERATED, reverse_pairs, williams_orders

_LIUSIE, _ZHENG, _ZHAO = "Liusie et al., Findings of ACL 2024", "Zheng et al., ICLR 2024", "Zhao et al., ICML 2021"
_WEI, _WILLIAMS, _HINTON = "Wei et al., Findings of ACL 2024", "Williams 1949", "Hinton, Neural Computation 2002"
_ZHOU, _ADAPTIVE = "Zhou et al., ICLR 2024", "adaptive repetition, arXiv 2507.17788; margins without gold: here"


def _any(orders: np.ndarray) -> bool:
    return True


def _complete(orders: np.ndarray) -> bool:
    return len(orders) == len(np.unique(orders, axis=0)) == factorial(orders.shape[1])


def _closed(orders: np.ndarray) -> bool:
    try:
        return bool(rotations(orders).size)
    except ValueError:
        return False


@dataclass(frozen=True)
class Debiaser:
    """A method as tables and figures take it.

    name    as it stands in tables
    calls   number of options K -> teacher calls that one question costs in one presented order
    source  short citation
    answer  (P, orders, content_free, rng) -> (item, order, option). ``content_free`` (position,) or None; deterministic
            methods leave the generator ``rng`` alone
    fits    orders -> whether they are what the method needs: all K!, closed under rotation, or any
    family  the name of it with whatever number of calls; "": its own
    """

    name: str
    calls: Callable[[int], float]
    source: str
    answer: Callable[[np.ndarray, np.ndarray, np.ndarray | None, np.random.Generator], np.ndarray]
    fits: Callable[[np.ndarray], bool]
    family: str = ""


def _calibrated(P: np.ndarray, orders: np.ndarray, content_free: np.ndarray | None) -> np.ndarray:
    if content_free is None:
        raise ValueError(
            f"content_free is None: {CALIBRATION} needs the teacher's label probabilities on content-free input, (position,)"
        )
    return contextual_calibration(P, orders, content_free)


def _random(n: int) -> Debiaser:
    return Debiaser(
        RANDOM.format(n),
        lambda k: n,
        f"{_LIUSIE}, with fewer orders",
        lambda P, o, c, rng: random_average(P, n, rng),
        _complete,
        RANDOM_FAMILY,
    )


def _black_box(n: int) -> Debiaser:
    return Debiaser(
        BLACK_BOX.format(n),
        lambda k: n,
        _LIUSIE,
        lambda P, o, c, rng: broadcast(black_box_targets(P, n, rng), len(o)),
        _complete,
        BLACK_BOX_FAMILY,
    )


def _adaptive(k: int, designs: Sequence[np.ndarray], calls: float) -> Debiaser:
    def answer(P, orders, content_free, rng):
        # Costs no call, and what is clear is clear earlier. Input and margins were chosen by their agreement with the
        # all-orders answers on the store's training questions, without gold answers (docs/measure.md).
        calibrated = batch_calibration(P, orders)
        return adaptive_average(calibrated, orders, designs, fit_margins(calibrated, orders, designs, calls)).answers

    fits = partial(has, designs[-1])
    return Debiaser(ADAPTIVE.format(calls), lambda k: calls, _ADAPTIVE, answer, fits, ADAPTIVE_FAMILY)


def few_calls(k: int) -> list[Debiaser]:
    """Those of :mod:`permdistill.fewcalls`, as far as they differ for ``k`` options."""
    pair, williams, every = reverse_pairs(np.arange(k)[None]), williams_orders(k), stages(k)
    found = []
    if k > 2:
        found.append(
            Debiaser(
                REVERSE_PAIR, lambda k: 2, _WEI, lambda P, o, c, rng: design_average(P, o, pair), lambda o: has(pair, o)
            )
        )
    if k > 3:
        found.append(
            Debiaser(
                WILLIAMS,
                lambda k: len(williams),
                _WILLIAMS,
                lambda P, o, c, rng: design_average(P, o, williams),
                lambda o: has(williams, o),
            )
        )
    found.append(_adaptive(k, every[:3], 2.6) if k > 2 else _adaptive(k, every, 1.5))
    if k == 4:
        found.append(_adaptive(k, every[1:], 8))
    if k <= ENUMERATED:
        found.append(
            Debiaser(
                GEOMETRIC,
                factorial,
                _HINTON,
                lambda P, o, c, rng: broadcast(geometric_average(P), len(o)),
                lambda o: len(o) == len(np.unique(o, axis=0)) == factorial(k),
            )
        )
    found.append(
        Debiaser(BATCH_CALIBRATION, lambda k: 1, _ZHOU, lambda P, o, c, rng: batch_calibration(P, o), lambda o: True)
    )
    return found


def debiasers(k: int) -> list[Debiaser]:
    """Every method for questions of ``k`` options; few-order averages with powers of two below K! orders.

    Prior-matching and PriDe are charged what a question costs where it comes in one order: prior-matching fits on calls
    that are made anyway.
    """

    def average(P, orders, content_free, rng):
        return broadcast(permutation_average(P), len(orders))

    def vote(P, orders, content_free, rng):
        return broadcast(majority_vote(P), len(orders))

    return [
        Debiaser(BIASED, lambda k: 1, "the teacher itself", lambda P, o, c, rng: check_scores(P), _any),
        Debiaser(MAJORITY, factorial, _LIUSIE, vote, _complete),
        Debiaser(DEBIASED, factorial, _LIUSIE, average, _complete),
        Debiaser(CYCLIC, lambda k: k, _ZHENG, lambda P, o, c, rng: cyclic_average(P, o), _closed),
        *(_random(2**i) for i in range(1, 10) if 2**i < factorial(k)),
        Debiaser(PRIOR_MATCHING, lambda k: 1, _LIUSIE, lambda P, o, c, rng: prior_matching(P, o), _any),
        Debiaser(CONTEXT_PRIOR_MATCHING, factorial, _LIUSIE, lambda P, o, c, rng: context_prior_matching(P, o), _complete),
        Debiaser(
            PRIDE,
            lambda k: 1 + PRIDE_FRACTION * (k - 1),
            _ZHENG,
            lambda P, o, c, rng: pride(P, o, PRIDE_FRACTION, rng=rng),
            _closed,
        ),
        Debiaser(CALIBRATION, lambda k: 1, _ZHAO, lambda P, o, c, rng: _calibrated(P, o, c), _any),
        *map(_black_box, DRAWS),
        *few_calls(k),
    ]
