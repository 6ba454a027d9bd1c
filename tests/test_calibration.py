"""Calibration, selective answers and rankings: closed-form cases."""

from __future__ import annotations

import json
import re

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
from permdistill.measure.report import measure, ranking
from permdistill.questions import BadRecords


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


# --------------------------------------------------------------------------------------------------------------------
# In the report of `permdistill measure --all`


def report_of(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return measure(path)


def test_the_report_says_how_far_probabilities_can_be_trusted(tmp_path):
    # In the order 0, 1 the judge says 0.9 for the first; in the other 0.7, so that the mean of an item is 0.6 for option 0.
    rows = [
        {"id": f"q{i}", "order": order, "probabilities": [p, 1 - p], "answer": int(i % 4 == 0)}
        for i in range(40)
        for order, p in (([0, 1], 0.9), ([1, 0], 0.7))
    ]
    report = report_of(tmp_path / "said.jsonl", rows)
    row = report.table.set_index("debiaser").loc["all-orders average"]
    assert row.ece == pytest.approx(0.75 - 0.6) and row.ece_low <= row.ece <= row.ece_high
    assert row.brier == pytest.approx(0.75 * 2 * 0.4**2 + 0.25 * 2 * 0.6**2)
    assert row.nll == pytest.approx(-0.75 * np.log(0.6) - 0.25 * np.log(0.4))
    biased = report.table.set_index("debiaser").loc["biased"]
    assert biased.ece == pytest.approx(((0.9 - 0.75) + (0.7 - 0.25)) / 2)  # each order has a bin of its own
    text = report.everything()
    assert "ECE\n" in text and "Brier\n" in text and "NLL (nats)\n" in text
    assert "accuracy where only the surest questions are answered, K = 2, and at most 10% errors" in text
    assert re.search(r"mean over orders +75\.0  .*no threshold guarantees it", text)


def test_the_average_is_sharpened_without_gold_answers(tmp_path):
    rng = np.random.default_rng(0)
    P = softmax(rng.normal(size=(60, 1, 2)) * 2 + rng.normal(size=(60, 2, 2)), axis=-1)
    answers = P.mean(axis=1).argmax(axis=1)
    rows = [
        {"id": f"q{i:02}", "order": order, "probabilities": P[i, j][order].tolist(), "answer": int(answers[i])}
        for i in range(60)
        for j, order in enumerate(([0, 1], [1, 0]))
    ]
    table = report_of(tmp_path / "said.jsonl", rows).table.set_index("debiaser")
    row, plain = table.loc["all-orders average, sharpened"], table.loc["all-orders average"]
    power = fit_power(P)
    assert power > 1 and row.nll == pytest.approx(nll(debias.sharpen(P.mean(axis=1), power), answers).mean())
    assert row.accuracy == plain.accuracy and row.ece < plain.ece and row.ps == 0 and row.calls == 2 and "gold" in row.source
    hard = report_of(tmp_path / "hard.jsonl", [{**r, "probabilities": None, "decision": "A"} for r in rows])
    assert "all-orders average, sharpened" not in hard.table.debiaser.tolist()


def test_hard_verdicts_have_no_calibration(tmp_path):
    rows = [{"id": f"q{i}", "order": [0, 1], "decision": "A", "answer": i % 2} for i in range(8)]
    report = report_of(tmp_path / "said.jsonl", rows)
    assert "ece" not in report.table and "surest" not in report.everything()


def test_a_threshold_is_fitted_on_one_half_and_tried_on_the_other(tmp_path):
    rows = [
        {"id": f"q{i:03}", "order": [0, 1], "probabilities": [p, 1 - p], "answer": int(i % 8 in (0, 1))}
        for i in range(400)
        for p in [0.6 if i % 4 in (0, 1) else 0.95]  # the unsure half is right one time in two, the sure one always
    ]
    text = report_of(tmp_path / "said.jsonl", rows).everything()
    assert re.search(r"from 0\.\d\d on: 50\.0% answered, 0\.0% of them wrong", text)


def test_experts_on_unconnected_systems_are_least_squares():
    """As numpy solves the comparisons themselves, which takes pairs times systems in memory."""
    rng = np.random.default_rng(0)
    pairs = np.array([sorted(rng.choice(own, 2, replace=False)) for own in (range(4), range(4, 9)) for _ in range(30)])
    wins = rng.uniform(size=60)
    design = np.eye(9)[pairs[:, 0]] - np.eye(9)[pairs[:, 1]]
    odds = np.log(np.clip(wins, 0.01, 0.99) / (1 - np.clip(wins, 0.01, 0.99)))
    expected = np.linalg.lstsq(np.vstack([design, np.ones(9)]), np.append(odds, 0.0), rcond=None)[0]
    assert product_of_experts(pairs, wins, 9) == pytest.approx(expected, abs=1e-9)


def test_more_systems_than_can_be_ranked_are_counted(tmp_path, monkeypatch):
    row = {"id": "a", "order": [0, 1], "decision": 0}
    rows = [row | {"id": f"{i}", "order": o, "systems": ["x", f"y{i}"]} for i in range(3) for o in ([0, 1], [1, 0])]
    report = report_of(tmp_path / "said.jsonl", rows)
    assert "systems, ranked from their pairs" in report.everything()
    monkeypatch.setattr("permdistill.measure.report.RANKED", 3)
    assert ranking(report.records) is None and "systems: 4 names, which are too many to rank" in report.everything()


def test_systems_are_ranked_from_their_pairs(tmp_path):
    strength = {"good": 2.0, "fair": 0.5, "poor": -2.5}
    rows = []
    for n, (a, b) in enumerate([(a, b) for a in strength for b in strength if a != b]):
        p = 1 / (1 + np.exp(strength[b] - strength[a]))
        for order in ([0, 1], [1, 0]):
            by_option = [p, 1 - p]
            row = {"id": f"{n}", "order": order, "probabilities": [by_option[o] for o in order], "systems": [a, b]}
            rows.append(row | {"answer": int(p < 0.5)})
    report = report_of(tmp_path / "said.jsonl", rows)
    frame = ranking(report.records)
    assert frame.system.tolist() == ["good", "fair", "poor"] and frame.pairs.tolist() == [4, 4, 4]
    for name in ("Bradley-Terry", "product of experts"):
        assert frame[name].to_numpy() == pytest.approx([2, 0.5, -2.5], abs=0.05)
    assert "rank correlation with gold: Spearman 1.00, Kendall 1.00" in report.everything()
    for wrong in (["good"], ["good", "good"], "good", ["good", 3], ["good", "\ud800"]):
        with pytest.raises(BadRecords, match="field 'systems' is .*: give 2 different names, by option"):
            report_of(tmp_path / "bad.jsonl", [rows[0] | {"systems": wrong}])
    assert ranking(report_of(tmp_path / "plain.jsonl", [r | {"systems": None} for r in rows]).records) is None


def test_systems_of_fastchat_are_ranked(tmp_path):
    winners = [("model_1", "model_1"), ("tie", "model_2"), ("error", "model_1")]
    rows = [
        {"question_id": i, "model_1": "x", "model_2": "y", "g1_winner": g1, "g2_winner": g2, "turn": 1}
        for i, (g1, g2) in enumerate(winners)
    ]
    frame = ranking(report_of(tmp_path / "pairs.jsonl", rows).records)
    assert frame.set_index("system").won.to_dict() == {"x": 1 + 0.25 + 1, "y": 0.75}
