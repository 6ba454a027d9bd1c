"""Calibration, selective answers and rankings: closed-form cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from permdistill import debias
from permdistill.measure.calibration import (
    bradley_terry,
    brier,
    ece,
    fit_power,
    guaranteed_threshold,
    nll,
    product_of_experts,
    rank_correlation,
    selective_accuracy,
)


def test_ece_brier_and_nll_in_closed_form():
    Q = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.5, 0.5]])
    answers = np.array([0, 1, 1, 0])
    # Bins: two at 0.9 (half right), one at 0.7 (right), one tie at 0.5 (half right).
    assert ece(Q, answers) == pytest.approx((2 * 0.4 + 0.3 + 0) / 4)
    assert brier(Q, answers) == pytest.approx([0.02, 1.62, 0.18, 0.5])
    assert nll(Q, answers) == pytest.approx(-np.log([0.9, 0.1, 0.7, 0.5]))
    assert ece(np.eye(3)[[0, 1]], np.array([0, 1])) == 0
    assert nll(np.eye(2), np.array([1, 0])) == pytest.approx(-np.log(1e-12))
    for wrong in ([0, 1, 2, 0], [0, 1], [0.0, 1.0, 1.0, 0.0]):
        with pytest.raises(ValueError, match="give an option's index for each"):
            ece(Q, np.array(wrong))


def test_power_gives_averages_the_entropy_of_single_orders():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 1, 4)) * 2 + rng.normal(size=(200, 24, 4))
    P = softmax(logits, axis=-1)
    power = fit_power(P)
    sharp = debias.sharpen(debias.permutation_average(P), power)

    def entropy(p):
        return -(p * np.log(p)).sum(axis=-1).mean()

    assert power > 1 and entropy(sharp) == pytest.approx(entropy(P), abs=1e-5)
    assert fit_power(np.broadcast_to(P[:, :1], P.shape)) == 1
    with pytest.raises(ValueError, match="nearly. uniform"):
        fit_power(np.tile(np.eye(2)[None], (3, 1, 1)))  # always the first answer


def test_selective_accuracy_takes_the_surest():
    Q = np.array([[0.95, 0.05], [0.6, 0.4], [0.2, 0.8], [0.45, 0.55]])
    answers = np.array([0, 1, 1, 0])
    assert [selective_accuracy(Q, answers, c) for c in (0.25, 0.5, 0.75, 1)] == pytest.approx([1, 1, 2 / 3, 0.5])
    with pytest.raises(ValueError, match="coverage = 0"):
        selective_accuracy(Q, answers, 0)


def test_a_guaranteed_error_holds_on_new_items():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(100):
        sure = rng.uniform(0.5, 1, size=1000)
        wrong = rng.random(1000) > sure  # calibrated
        Q = np.stack([sure, 1 - sure], axis=1)
        threshold = guaranteed_threshold(Q, wrong.astype(int), 0.1)
        found += [threshold] if threshold is not None else []
    assert len(found) > 90 and 0.8 < np.mean(found) < 0.95
    assert sum((1 - t) / 2 > 0.1 for t in found) <= 10  # the true error above a threshold t is (1 - t) / 2
    assert guaranteed_threshold(Q, 1 - wrong.astype(int), 0.1) is None


@pytest.mark.parametrize("rank", [bradley_terry, product_of_experts])
def test_systems_are_ranked_from_comparisons(rank):
    strength = np.array([1.5, 0.5, 0.0, -0.7, -1.3])
    pairs = np.array([(a, b) for a in range(5) for b in range(5) if a != b])
    wins = 1 / (1 + np.exp(strength[pairs[:, 1]] - strength[pairs[:, 0]]))
    found = rank(pairs, wins, 5)
    assert found == pytest.approx(strength - strength.mean(), abs=0.01)
    assert rank_correlation(found, strength) == pytest.approx((1, 1))
    assert rank_correlation(-found, strength).kendall == pytest.approx(-1)
    few = rank(pairs[::5], (wins[::5] > 0.5).astype(float), 5)  # hard decisions, a fifth of the pairs
    assert np.isfinite(few).all() and few.sum() == pytest.approx(0, abs=1e-6)
