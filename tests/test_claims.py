"""Verdicts follow the numbers, on planted teachers for which each claim is known to hold or to fail."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from test_experiments import planted

from permdistill.metrics import Interval
from permdistill.orders import cyclic_orders
from permdistill.paper import ablations, claims, profiles, tables
from permdistill.paper.claims import CONFIRMED, NOT_CONFIRMED, NOT_TESTABLE
from permdistill.paper.experiments import System


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
    pairs = planted("summeval_coherence", k=2, bias=3.0)
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
        *teachers,
        ("m, distillation", "student", 0.61, 0.01, 0.2),
        ("m, error correction", "student", 0.5, -0.1, 0.2),
        ("m, white-box error correction", "student", 0.6, 0.0, 0.2),  # sees more than the copy
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
    monkeypatch.setattr(ablations, "data", lambda teacher, tasks: (test, test))

    def answer(cell: profiles.Cell, folder: str = "") -> System:
        if cell not in shares:
            raise ablations.MissingPredictions("run `make students`")
        return System("s", "student", answers(shares[cell]), orders, 0, 1)

    monkeypatch.setattr(ablations, "answer", answer)
    assert by_claim(claims.varied()) == {"(g)": CONFIRMED, "(h)": NOT_TESTABLE, "(i)": CONFIRMED}
    shares[large] = 0.9
    del shares[profiles.MATRIX["draws"][1]]
    assert by_claim(claims.varied()) == {"(g)": NOT_TESTABLE, "(h)": NOT_TESTABLE, "(i)": NOT_CONFIRMED}
    shares[profiles.MATRIX["draws"][1]] = 0.3
    assert by_claim(claims.varied())["(g)"] == NOT_CONFIRMED


def test_stored_students_are_compared_with_what_they_see(monkeypatch):
    rows = [
        ("weak", "m, bi-encoder head, distillation", "biased teacher", 0.1),
        ("weak", "m, bi-encoder head, distillation", "copy of one sampled decision", 0.2),
        ("weak", "m, bi-encoder head, error correction", "biased teacher", 0.0),
        ("weak", "m, bi-encoder head, error correction", "copy of one sampled decision", 0.1),
        ("weak", "m, bi-encoder head, error correction", "copy of the most probable decision", -0.1),
        ("strong", "m, bi-encoder head, error correction (greedy)", "biased teacher", -0.1),
        ("strong", "m, bi-encoder head, error correction (greedy)", "copy of one sampled decision", 0.1),
        ("strong", "m, bi-encoder head, error correction (greedy)", "copy of the most probable decision", 0.0),
        ("strong", "m, bi-encoder head, white-box error correction", "biased teacher", 0.01),
    ]
    gaps = pd.DataFrame(rows, columns=["teacher", "system", "rival", "difference"])
    gaps = gaps.assign(difference_low=gaps.difference - 0.02, difference_high=gaps.difference + 0.02)
    monkeypatch.setattr(ablations, "available", lambda cells, folder: list(cells))
    monkeypatch.setattr(ablations, "differences", lambda cells, folder: gaps)
    found = {(v.claim[:3], v.about.split()[-1]): v for v in claims.stored()}
    assert {key: v.verdict for key, v in found.items()} == {
        ("(f)", "weak"): CONFIRMED,
        ("(f)", "strong"): NOT_CONFIRMED,
        ("(k)", "weak"): CONFIRMED,
        ("(k)", "strong"): NOT_CONFIRMED,
    }
    assert found["(k)", "weak"].evidence.endswith("m, bi-encoder head, distillation 10.0 [8.0, 12.0]")
    monkeypatch.setattr(ablations, "available", lambda cells, folder: [])
    assert claims.stored() == []


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


def test_the_papers_cells_are_found_under_its_names():
    race, pairs = ("race_middle", "race_high", "race_c"), "summeval16_coherence"
    rows = [("t, biased", "teacher", 0.61, 0.3), ("t, all-orders average", "debiased", 0.7, 0.0)]
    rows += [("roberta-large, joint head, error correction", "student", 0.675, 0.1)]
    rows += [("roberta-large, joint head, distillation", "student", 0.5, 0.1)]
    rows += [("roberta-large, per-option head, distillation", "student", 0.9, 0.0)]
    rows += [("deberta-v3-large, joint head, distillation", "student", 0.65, 0.1)]
    rows += [("all-MiniLM-L6-v2, joint head, distillation", "student", 0.2, 0.1)]
    systems = pd.DataFrame(rows, columns=["system", "kind", "accuracy", "ps"]).assign(n=100)
    t2, t3 = (pd.concat([systems.assign(task=task) for task in tasks]) for tasks in ((*race, "all"), (pairs, "all")))
    t1 = pd.DataFrame(
        [("flan-t5-xl", task, ps) for task, ps in (("race_c", 0.1), ("medmcqa", 0.14), (pairs, 0.4), ("piqa", 0.9))]
        + [("flan-t5-xxl", pairs, 0.5), ("smollm2-135m", "race_c", 0.1)],
        columns=["teacher", "task", "ps"],
    ).assign(treatment=tables.BIASED, n=100, accuracy=0.5)
    checked = claims.check(claims.targets("paper"), claims.in_the_papers_words(t1, t2, t3))
    rows = checked.fillna({"treatment": "", "found": -1.0}).itertuples()
    found = {(r.table.removeprefix("paper_"), r.teacher, r.treatment, r.task): (r.found, r.verdict) for r in rows}
    assert found["RACE++", "biased teacher", "", "RACE++"] == (0.61, CONFIRMED)
    assert found["RACE++", "debiased teacher", "", "RACE++"] == (0.7, CONFIRMED)
    assert found["RACE++", "RoBERTa-large", "error correction", "RACE++"] == (0.675, CONFIRMED)
    assert found["RACE++", "RoBERTa-large", "distillation", "RACE++"] == (0.5, NOT_CONFIRMED)
    assert found["RACE++", "BERT-base", "distillation", "RACE++"] == (-1, NOT_TESTABLE)
    assert found["SummEval", "DeBERTa-large", "distillation", "SummEval coherence"] == (0.65, CONFIRMED)
    # Means over the paper's sets, of which PIQA is none.
    assert found["sensitivity", "FlanT5-3B", "biased", "multiple choice"] == (pytest.approx(0.12), CONFIRMED)
    assert found["sensitivity", "FlanT5-11B", "biased", "SummEval"] == (0.5, NOT_CONFIRMED)
    assert found["sensitivity", "FlanT5-11B", "biased", "multiple choice"] == (-1, NOT_TESTABLE)
    # The laptop's tables hold no cell of the paper's.
    laptop = [t.assign(task=t.task.replace(dict.fromkeys((*race, pairs), "arc_easy"))) for t in (t2, t3)]
    nothing = claims.in_the_papers_words(t1[t1.teacher == "smollm2-135m"], *laptop)
    assert set(claims.check(claims.targets("paper"), nothing).verdict) == {NOT_TESTABLE}


def test_difference_of_independent_intervals():
    difference = claims._difference(Interval(0.5, 0.47, 0.54), Interval(0.2, 0.16, 0.23))
    assert difference == pytest.approx((0.3, 0.3 - 0.03 * 2**0.5, 0.3 + 0.04 * 2**0.5))


def test_stored_students_are_judged_beside_their_own_teachers_only(monkeypatch):
    monkeypatch.setattr(claims, "stored", lambda: [claims.Verdict("(f)", "stored", CONFIRMED, "")])
    monkeypatch.setattr(claims, "varied", lambda: [claims.Verdict("(g)", "stored", CONFIRMED, "")])
    monkeypatch.setattr(claims, "task_specific", lambda scored: [])
    monkeypatch.setattr(claims, "students", lambda t2, t3: [])
    for name, expected in ((profiles.USUAL.teacher, {"(f)", "(g)"}), ("her-own/llm", set())):
        t1 = tables.teachers([planted("one")]).assign(teacher=name)
        found = claims.verdicts([planted("one")], t1, students(), students())
        assert set(found[found.about == "stored"].claim) == expected
        rest = {} if expected else dict.fromkeys(("(g)", "(h)", "(i)"), NOT_TESTABLE)
        assert by_claim(found[found.about == "students"].itertuples()) == rest


def test_sizes_compare_large_encoders_with_their_own_base():
    def table(*accuracies: float) -> pd.DataFrame:
        names = [f"{family}-{size}, joint head, error correction" for family in ("a", "b") for size in ("base", "large")]
        rows = [(name, "student", accuracy, 0.0, 0.1) for name, accuracy in zip(names, accuracies, strict=True)]
        other = [(f"a-{size}, joint head, white-box error correction", at) for size, at in (("base", 0.1), ("large", 0.9))]
        other.append(("c-large, joint head, error correction", 0.9))  # without its base
        return students(*rows, *((name, "student", accuracy, 0.0, 0.1) for name, accuracy in other))

    even, better = table(0.5, 0.5, 0.6, 0.6), table(0.5, 0.6, 0.6, 0.7)
    found = claims.sizes(better, even)
    assert found.verdict == CONFIRMED and found.evidence.startswith("multiple choice: 2 of 2 large encoders above")
    half = table(0.5, 0.6, 0.6, 0.6)
    for t2, t3 in ((even, even), (better, half), (half, even)):
        assert claims.sizes(t2, t3).verdict == NOT_CONFIRMED
