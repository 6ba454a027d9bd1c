"""Verdicts follow the numbers, on planted teachers for which each claim is known to hold or to fail."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from test_experiments import planted

from permdistill import claims, matrix, profiles, tables
from permdistill.claims import CONFIRMED, NOT_CONFIRMED, NOT_TESTABLE
from permdistill.experiments import System
from permdistill.metrics import Interval
from permdistill.orders import cyclic_orders


def by_claim(verdicts: list[claims.Verdict]) -> dict[str, str]:
    return {v.claim[:3]: v.verdict for v in verdicts}


def test_debiasing_is_confirmed_where_accuracy_rises_and_not_where_it_cannot():
    biased, knowing = planted("one"), planted("two", bias=0.5)
    (verdict,) = claims.debiasing(tables.teachers([biased]))
    assert verdict.verdict == CONFIRMED and "ps = 0 on 1 of 1 tasks" in verdict.evidence
    # Right in every order with the bias too: nothing to gain.
    (verdict,) = claims.debiasing(tables.teachers([biased, knowing]))
    assert verdict.verdict == NOT_CONFIRMED and "accuracy up on 1" in verdict.evidence


def test_prior_matching_equals_debiasing_on_an_additive_bias():
    found = by_claim(claims.prior_matching([planted("one", n=60)]))
    # It recovers everything, so it does not lie *between*, and context prior-matching is as good as debiasing.
    assert found == {"(b)": NOT_CONFIRMED, "(c)": CONFIRMED}


def test_invariance_is_compared_at_the_same_number_of_options():
    pairs = planted("summeval_x", k=2, bias=3.0)
    assert by_claim(claims.task_specific([pairs, planted("piqa", k=2, bias=0.1)])) == {"(d)": CONFIRMED}
    assert by_claim(claims.task_specific([pairs, planted("piqa", k=2, bias=3.0)])) == {"(d)": NOT_CONFIRMED}
    assert by_claim(claims.task_specific([pairs, planted("arc", k=3)])) == {"(d)": NOT_TESTABLE}


def students(*rows: tuple) -> pd.DataFrame:
    """(system, kind, accuracy, gain, ps), each with intervals of 2 points and 0.01."""
    frame = pd.DataFrame(rows, columns=["system", "kind", "accuracy", "gain", "ps"]).assign(task="all")
    for name, half in (("accuracy", 0.02), ("gain", 0.02), ("ps", 0.01)):
        frame[f"{name}_low"], frame[f"{name}_high"] = frame[name] - half, frame[name] + half
    return frame


def test_students_claims():
    teachers = [("t, biased", "teacher", 0.6, None, 0.2), ("copy of one", "copy", 0.5, -0.1, 0.4)]
    t2 = students(
        *teachers, ("m, distillation", "student", 0.3, -0.3, 0.0), ("m, error correction", "student", 0.64, 0.04, 0.1)
    )
    t3 = students(*teachers, ("m, distillation", "student", 0.7, 0.1, 0.0))
    found = by_claim(claims.students(t2, t3))
    assert {c: found[f"({c})"] for c in "efjk"} == dict.fromkeys("efjk", CONFIRMED)
    t2 = students(
        *teachers, ("m, distillation", "student", 0.61, 0.01, 0.2), ("m, error correction", "student", 0.5, -0.1, 0.2)
    )
    t3 = students(*teachers, ("m, distillation", "student", 0.61, 0.01, 0.2))
    found = by_claim(claims.students(t2, t3))
    assert {c: found[f"({c})"] for c in "efjk"} == dict.fromkeys("efjk", NOT_CONFIRMED)


def test_ablations_follow_the_stored_students(monkeypatch):
    """Answers planted for the cells: many draws as good as exact targets, one draw worse; size matters for one task only."""
    test = planted("one", n=200)
    questions = test.task.questions
    right = np.eye(3)[[q.answer for q in questions]]
    wrong = np.roll(right, 1, axis=1)
    luck = np.random.default_rng(0).random(200)

    def answers(share: float) -> np.ndarray:
        return np.repeat(np.where((luck < share)[:, None], right, wrong)[:, None], 3, axis=1)

    small, large = profiles.SIZES["SummEval"]
    shares = {cell: 0.6 for cell in profiles.MATRIX["draws"] if cell.run.draws >= 32}
    shares |= {cell: 0.3 for cell in profiles.MATRIX["draws"] if cell.run.draws < 32}
    shares |= {profiles.USUAL: 0.6, profiles.SIZES["multiple choice"][1]: 0.9, small: 0.5, large: 0.5}
    orders = cyclic_orders(3)
    monkeypatch.setattr(matrix, "data", lambda teacher, tasks: (test, test))

    def answer(cell: profiles.Cell, folder: str = "") -> System:
        if cell not in shares:
            raise matrix.MissingPredictions("run `make students`")
        return System("s", "student", answers(shares[cell]), orders, 1)

    monkeypatch.setattr(matrix, "answer", answer)
    assert by_claim(claims.ablations()) == {"(g)": CONFIRMED, "(h)": NOT_TESTABLE, "(i)": CONFIRMED}
    shares[large] = 0.9
    del shares[profiles.MATRIX["draws"][1]]
    assert by_claim(claims.ablations()) == {"(g)": NOT_TESTABLE, "(h)": NOT_TESTABLE, "(i)": NOT_CONFIRMED}
    shares[profiles.MATRIX["draws"][1]] = 0.3
    assert by_claim(claims.ablations())["(g)"] == NOT_CONFIRMED


def test_targets_are_found_missed_or_not_there():
    t1 = tables.teachers([planted("one"), planted("two", bias=0.5)])
    expected = claims.as_targets(t1, "T1_teachers", 0.001).drop(columns="source")
    assert len(expected) == 2 * len(t1)
    assert set(claims.check(expected, {"T1_teachers": t1}).verdict) == {CONFIRMED}
    assert set(claims.check(expected, {"T1_teachers": t1.assign(accuracy=t1.accuracy + 0.01)}).verdict) == {
        CONFIRMED,
        NOT_CONFIRMED,
    }
    assert set(claims.check(expected, {"T1_teachers": t1.assign(n=7)}).verdict) == {NOT_TESTABLE}
    assert set(claims.check(expected, {}).verdict) == {NOT_TESTABLE}
    counts = claims.tally(claims.check(expected, {"T1_teachers": t1}))
    assert counts.to_dict("records") == [{"table": "T1_teachers", CONFIRMED: 20, NOT_CONFIRMED: 0, NOT_TESTABLE: 0}]


def test_the_targets_file_holds_the_papers_numbers_and_ours():
    paper = claims.targets("paper").set_index(["table", "teacher", "treatment"])
    assert paper.loc[("paper_RACE++", "DeBERTa-large", "error correction"), "value"] == 0.681
    assert paper.value.between(0, 1).all() and (paper.tolerance > 0).all()
    assert set(claims.targets("laptop").table) == {"T1_teachers"}
    with pytest.raises(ValueError, match="source 'mine'"):
        claims.targets("mine")


def test_difference_of_independent_intervals():
    difference = claims._difference(Interval(0.5, 0.47, 0.54), Interval(0.2, 0.16, 0.23))
    assert difference == pytest.approx((0.3, 0.3 - 0.03 * 2**0.5, 0.3 + 0.04 * 2**0.5))
