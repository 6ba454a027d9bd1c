"""Counting what records say, item by item, and shares of counts with intervals, for any number of options and orders.

What becomes of it is :mod:`permdistill.measure.report`; the measures are those of :mod:`permdistill.measure.metrics`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import binomtest

from permdistill import debias
from permdistill.measure import metrics
from permdistill.measure.metrics import Interval
from permdistill.measure.records import Block, Records
from permdistill.orders import to_positions

RESAMPLED = 2000  # of more items, so many random groups are resampled instead: the interval is the same, the time is not


def interval(
    values: np.ndarray, statistic: Callable[[np.ndarray], float] | None = None, level: float = 0.95, counts: bool = True
) -> Interval:
    """:func:`permdistill.measure.metrics.bootstrap` for any number of items: without an interval for one; of ``counts`` that
    are 0, or all, for each item, which resampling cannot vary, the exact binomial interval."""
    n = len(values)
    mean = values.mean(axis=0)
    value = float(mean if statistic is None else statistic(mean))
    if n < 2:
        return Interval(value, np.nan, np.nan)
    shares = values if values.ndim == 1 else values[:, 0] / values[:, 1]
    if counts and value in (0.0, 1.0) and (shares == value).all():
        exact = binomtest(int(value) * n, n).proportion_ci(level)
        return Interval(value, float(exact.low), float(exact.high))
    groups = np.arange(n) if n <= RESAMPLED else np.random.default_rng(0).integers(RESAMPLED, size=n)
    return metrics.bootstrap(values, groups, statistic, level=level)


def over_pairs(P: np.ndarray, orders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean total variation over the pairs of records in different orders, and over those in one order: (item,) each, NaN
    where there are no such pairs.

    P, orders  (item, record, option), (item, record, position); records in one order stand side by side

    The first is :func:`permdistill.measure.metrics.permutation_sensitivity` where no order comes twice.
    """
    n, within, repeats = P.shape[1], np.zeros(len(P)), np.zeros(len(P))
    for far in range(1, n):
        same = (orders[:, far:] == orders[:, :-far]).all(axis=2)
        if not same.any():
            break
        within += (np.abs(P[:, far:] - P[:, :-far]).sum(axis=2) / 2 * same).sum(axis=1)
        repeats += same.sum(axis=1)
    pairs = n * (n - 1) / 2 - repeats
    across, own = metrics.permutation_sensitivity(P), np.full(len(P), np.nan)
    others = (across * (pairs + repeats) - within).round(12)  # so that equal answers stay exactly 0
    np.divide(others, pairs, out=across, where=(repeats > 0) & (pairs > 0))
    across[pairs == 0] = np.nan
    return across, np.divide(within, repeats, out=own, where=repeats > 0)


def _ratio(mean: np.ndarray) -> float:
    return float(mean[0] / mean[1])


def share_of(part: np.ndarray, of: np.ndarray, level: float = 0.95, counts: bool = True) -> tuple[Interval, int]:
    """Share of one number per item in another, over items that have any: (item,), (item,) -> interval, items."""
    some = of > 0
    return interval(np.stack([part[some], of[some]], axis=1).astype(float), _ratio, level, counts), int(some.sum())


# --------------------------------------------------------------------------------------------------------------------
# Counting, item by item


class Tally:
    """What each item's records say: arrays (item,), NaN where an item does not allow a measure.

    n, tied, failed, decided   numbers of records; decided: one option alone is the most probable
    orders                     number of different orders with a verdict
    right                      credit for the gold answer summed over records, ties sharing it; failures have none
    averaged                   credit of the mean over the item's orders
    ps, consistency, flips     of items with verdicts in two orders or more, see :mod:`permdistill.measure.metrics`; over
                               records in different orders: repeated calls in one order say nothing of it
    agreement                  share of pairs of orders with the same verdict, a tie being one of its own
    repeats                    share of pairs of records in one order that decide otherwise
    balanced                   whether each option stands equally often at each position
    wins                       {K: (items, (item, position))}: decided records that a position wins
    gold, recalled             {K: (item, position)}: records with the gold answer there, and credit for it, failures out
    """

    def __init__(self, records: Records) -> None:
        self.records = records
        items = len(records.ids)
        self.n, self.orders, self.tied, self.failed, self.decided, self.right = (np.zeros(items) for _ in range(6))
        self.averaged, self.ps, self.consistency = (np.full(items, np.nan) for _ in range(3))
        self.flips, self.agreement, self.repeats = (np.full(items, np.nan) for _ in range(3))
        self.balanced = np.ones(items, dtype=bool)
        self.wins: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.gold: dict[int, np.ndarray] = {}
        self.recalled: dict[int, np.ndarray] = {}
        self.n[:] = records.counts
        self.failed[:] = np.bincount(records.item, records.failed, minlength=items)
        answered = np.flatnonzero(self.failed < self.n)  # items, by their place among the answered
        parts: dict[int, list[tuple[np.ndarray, ...]]] = {}
        for block in records.where(~records.failed).blocks() if len(answered) else ():
            parts.setdefault(block.orders.shape[2], []).append(self._count(block, answered[block.items]))
        for k, own in parts.items():
            at, wins, gold, recalled = (np.concatenate(part) for part in zip(*own, strict=True))
            self.wins[k], self.gold[k], self.recalled[k] = (at, wins), gold, recalled

    def _count(self, block: Block, at: np.ndarray) -> tuple[np.ndarray, ...]:
        P, orders, n, k = block.P, block.orders, *block.orders.shape[1:]
        D = debias.decide(P)
        decided = D.max(axis=2) == 1
        self.decided[at], self.tied[at] = decided.sum(axis=1), n - decided.sum(axis=1)
        by_position = to_positions(D, orders)
        wins = (by_position * decided[..., None]).sum(axis=1)
        seats = (orders[..., None] == np.arange(k)).sum(axis=1)  # (item, position, option)
        self.balanced[at] = (seats == n / k).all(axis=(1, 2))
        self.orders[at] = n - (orders[:, 1:] == orders[:, :-1]).all(axis=2).sum(axis=1)
        if n > 1:
            verdicts = np.concatenate([D * decided[..., None], ~decided[..., None]], axis=2)
            self.ps[at], (differ, self.repeats[at]) = over_pairs(P, orders)[0], over_pairs(D, orders)
            self.consistency[at], self.agreement[at] = 1 - differ, 1 - over_pairs(verdicts, orders)[0]
            other = (orders[:, 1:] != orders[:, :1]).any(axis=2)  # than the first record's
            flips = (np.abs(D[:, 1:] - D[:, :1]).sum(axis=2) / 2 * other).sum(axis=1)
            self.flips[at] = np.divide(flips, other.sum(axis=1), out=np.full(len(P), np.nan), where=self.orders[at] > 1)
        known = block.answers >= 0
        gold = np.where(known, block.answers, 0)
        credit = np.where(known[:, None], np.take_along_axis(D, gold[:, None, None], axis=2)[..., 0], 0.0)
        self.right[at] = credit.sum(axis=1)
        mean = debias.decide(P.mean(axis=1, keepdims=True))[:, 0]
        self.averaged[at] = np.take_along_axis(mean, gold[:, None], axis=1)[:, 0]
        there = (orders == gold[:, None, None]) & known[:, None, None]  # (item, order, position)
        return at, wins, there.sum(axis=1), (there * credit[..., None]).sum(axis=1)


def mean_of(values: np.ndarray, counts: bool = True) -> tuple[Interval, int]:
    own = values[~np.isnan(values)]
    return interval(own, counts=counts), len(own)
