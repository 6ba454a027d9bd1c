"""Systems -> measured rows: every metric of the field with its interval, as far as orders and gold answers allow it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from permdistill.measure import calibration, metrics
from permdistill.orders import cyclic_orders
from permdistill.questions import Question


@dataclass(frozen=True)
class Metric:
    """A metric as tables show it.

    title      of the column
    values     (P, orders, gold answers) -> (item, ...)
    statistic  of the mean of the values over items; None: the mean is the metric
    gold       whether it needs gold answers, and so leaves out items without
    defined    orders -> whether they are what it is defined on
    points     whether it is a share, shown in points of 100
    """

    title: str
    values: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    statistic: Callable[[np.ndarray], float | np.ndarray] | None = None
    gold: bool = False
    defined: Callable[[np.ndarray], bool] = lambda orders: len(orders) > 1
    points: bool = True


def _balanced(orders: np.ndarray) -> bool:
    """Whether each option stands equally often at each position."""
    k = orders.shape[1]
    counts = np.array([np.bincount(column, minlength=k) for column in orders.T])
    return bool((counts == len(orders) / k).all())


def _holds(orders: np.ndarray, wanted: np.ndarray) -> bool:
    return {tuple(order) for order in wanted.tolist()} <= {tuple(order) for order in orders.tolist()}


def _rotations(orders: np.ndarray) -> bool:
    return _holds(orders, orders[0][cyclic_orders(orders.shape[1])])


METRICS = {
    "accuracy": Metric("accuracy", lambda P, o, g: metrics.accuracy(P, g), gold=True, defined=lambda o: True),
    "gain": Metric("gain over biased", lambda P, o, g: np.full(len(P), np.nan), gold=True, defined=lambda o: False),
    "difference": Metric("difference", lambda P, o, g: np.full(len(P), np.nan), gold=True, defined=lambda o: False),
    "ps": Metric("ps (TV)", lambda P, o, g: metrics.permutation_sensitivity(P)),
    "ps_kl": Metric("ps (KL, nats)", lambda P, o, g: metrics.permutation_sensitivity(P, "kl"), points=False),
    "pb": Metric("pb (TV)", lambda P, o, g: metrics.position_marginals(P, o), metrics.from_uniform, defined=_balanced),
    "pb_item": Metric("pb per item (TV)", lambda P, o, g: metrics.positional_bias_per_item(P, o), defined=_balanced),
    "consistency": Metric("consistency rate", lambda P, o, g: metrics.consistency(P)),
    "flip": Metric("flip rate", lambda P, o, g: metrics.flip_rate(P)),
    "fluctuation": Metric(
        "fluctuation rate", lambda P, o, g: metrics.fluctuation(P, o), defined=lambda o: _holds(o, o[:1, ::-1])
    ),
    "ppa": Metric("PPA", lambda P, o, g: metrics.plurality_agreement(P)),
    "pbm": Metric("PBM", lambda P, o, g: metrics.position_variance(P), points=False),
    "circular": Metric("CircularEval", lambda P, o, g: metrics.circular_accuracy(P, o, g), gold=True, defined=_rotations),
    "adversarial": Metric("adversarial accuracy", lambda P, o, g: metrics.adversarial_accuracy(P, g), gold=True),
    "rstd": Metric("RStd", lambda P, o, g: metrics.recall_by_position(P, o, g), metrics.rstd, gold=True),
    "cramers_v": Metric(
        "Cramer's V", lambda P, o, g: metrics.position_correctness(P, o, g), metrics.cramers_v, gold=True, points=False
    ),
    "ckld": Metric(
        "CKLD (nats)", lambda P, o, g: metrics.gold_and_predicted_positions(P, o, g), metrics.ckld, gold=True, points=False
    ),
}


def _over_orders(value: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """The mean over the orders of what is measured on an answer (item, option)."""
    return lambda P, o, g: np.mean([value(P[:, j], g) for j in range(P.shape[1])], axis=0)


# How far probabilities can be trusted; not for hard verdicts. Beside METRICS, which the paper's tables show.
TRUST = {
    "ece": Metric(
        "ECE",
        _over_orders(calibration.bin_gaps),
        lambda mean: np.abs(mean).sum(axis=-1),
        gold=True,
        defined=lambda orders: True,
    ),
    "brier": Metric("Brier", _over_orders(calibration.brier), gold=True, defined=lambda orders: True, points=False),
    "nll": Metric("NLL (nats)", _over_orders(calibration.nll), gold=True, defined=lambda orders: True, points=False),
}
EVERY = METRICS | TRUST
HEADLINE = ("accuracy", "ps", "ps_kl", "pb")


def correct(P: np.ndarray, questions: Sequence[Question]) -> np.ndarray:
    """Accuracy per item over its orders, NaN where there is no gold answer (tied human scores): (item,)."""
    labelled = np.array([q.answer is not None for q in questions])
    result = np.full(len(questions), np.nan)
    if labelled.any():
        result[labelled] = metrics.accuracy(P[labelled], [q.answer for q in questions if q.answer is not None])
    return result


def measure(
    P: np.ndarray | Sequence[np.ndarray],
    orders: np.ndarray,
    questions: Sequence[Question],
    groups: Sequence[Any],
    baseline: np.ndarray | None = None,
    names: Sequence[str] = HEADLINE,
) -> dict[str, float]:
    """Metrics of one system on one task, with 95% bootstrap intervals, as far as these orders and questions allow them.

    P         (item, order, option), the system's probabilities; several of them (a student's seeds) count as their mean,
              item by item, so that the interval is of the mean over these seeds
    orders    (order, K)
    groups    per item, what is resampled together (its document)
    baseline  per item, the accuracy of the system to compare with (see :func:`correct`): adds the paired ``gain``
    names     of :data:`METRICS` and :data:`TRUST`
    """
    seeds = [P] if isinstance(P, np.ndarray) else list(P)
    # Python's own objects: what a group is called is hashed anew in each copy that numpy makes of a text.
    labelled, unit = np.array([q.answer is not None for q in questions]), np.asarray(groups, dtype=object)
    gold = np.array([q.answer for q in questions if q.answer is not None])
    row: dict[str, float] = {"n": int(labelled.sum())}

    def add(name: str, values: np.ndarray, units: np.ndarray) -> None:
        interval = metrics.bootstrap(values, units, statistic=EVERY[name].statistic)
        row.update({name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high})

    for name in names:
        metric = EVERY[name]
        if not metric.defined(orders) or (metric.gold and not labelled.any()):
            continue
        chosen = labelled if metric.gold else np.ones(len(labelled), dtype=bool)
        values = np.mean([metric.values(one[chosen], orders, gold) for one in seeds], axis=0)
        add(name, values, unit[chosen])
        if name == "accuracy" and baseline is not None:
            add("gain", values - baseline[labelled], unit[chosen])
    return row


def in_points(frame: pd.DataFrame) -> dict[str, list[str]]:
    """The metrics of a table for people, by their titles: "68.3 [66.1, 70.2]" in points, nats with three digits. Without an
    interval, as published numbers come, "68.3"."""
    shown = {}
    for name, metric in EVERY.items():
        if name not in frame or frame[name].isna().all():
            continue
        scale, digits = (100, 1) if metric.points else (1, 3)
        columns = (name, f"{name}_low", f"{name}_high")
        shown[metric.title] = [
            ("" if np.isnan(v) else f"{scale * v:z.{digits}f}")
            + ("" if np.isnan(lo) else f" [{scale * lo:z.{digits}f}, {scale * hi:z.{digits}f}]")
            for v, lo, hi in zip(*(frame[c] for c in columns), strict=True)
        ]
    return shown
