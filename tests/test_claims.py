"""Verdicts follow the numbers, on planted teachers for which each claim is known to hold or to fail."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_experiments import planted

from permdistill import debias
from permdistill.measure.metrics import Interval
from permdistill.orders import cyclic_orders
from permdistill.paper import ablations, claims, matrix, systems, tables
from permdistill.paper.claims import CONFIRMED, NOT_CONFIRMED, NOT_TESTABLE
from permdistill.paper.experiments import System
from permdistill.paper.systems import (
    BIASED,
    COPY,
    CORRECTION,
    DISTILLATION,
    STACKED,
    STACKED_WHITE_BOX,
    WHITE_BOX,
    Description,
    described_rows,
)

USUAL = Path(matrix.USUAL.teacher).name


NOTHING = pd.DataFrame(columns=["teacher", "task", "kind", "method"])


def measured(scored=(), t1=NOTHING, t2=NOTHING, t3=NOTHING, gaps=None) -> claims.Measured:
    """What claims are judged by; ``gaps`` stands in for the stored students'."""
    found = claims.Measured(scored, t1, t2, t3)
    found.__dict__["gaps"] = pd.DataFrame(columns=GAPS) if gaps is None else gaps
    return found


def judged(m: claims.Measured, letters: str) -> list[tuple[str, claims.Finding]]:
    return [(claim.letter, f) for claim in claims.CLAIMS if claim.letter in letters for f in claim.judge(m)]


def by_claim(m: claims.Measured, letters: str) -> dict[str, bool | None]:
    return {letter: found.holds for letter, found in judged(m, letters)}


def of_teacher(name: str = "t") -> pd.DataFrame:
    """T1, as far as it says whose scores there are."""
    return pd.DataFrame({"teacher": [name]})


def test_debiasing_is_confirmed_where_accuracy_rises_and_not_where_it_cannot():
    biased, knowing = planted("one"), planted("two", bias=0.5)
    (found,) = claims.debiased(measured(t1=tables.teachers([biased])))
    assert found.holds and "ps = 0 on 1 of 1 tasks" in found.evidence
    # Right in every order with the bias too: nothing to gain.
    (found,) = claims.debiased(measured(t1=tables.teachers([biased, knowing])))
    assert not found.holds and "accuracy up on 1" in found.evidence


def test_prior_matching_equals_debiasing_on_an_additive_bias():
    found = by_claim(measured([planted("one", n=60)]), "bc")
    # It recovers everything, so it does not lie *between*, and context prior-matching is as good as debiasing.
    assert found == {"b": False, "c": True}


def test_invariance_is_compared_at_the_same_number_of_options():
    pairs = planted("summeval_coherence", k=2, bias=3.0)
    assert by_claim(measured([pairs, planted("piqa", k=2, bias=0.1)]), "d") == {"d": True}
    assert by_claim(measured([pairs, planted("piqa", k=2, bias=3.0)]), "d") == {"d": False}
    assert by_claim(measured([pairs, planted("arc", k=3)]), "d") == {"d": None}


def students(*rows: tuple[Description, float, float | None, float]) -> pd.DataFrame:
    """(what, accuracy, gain, ps), each with intervals of 2 points and 0.01."""
    numbers = [dict(zip(("accuracy", "gain", "ps"), row[1:], strict=True)) for row in rows]
    whats = [asdict(what) for what, *_ in rows]
    frame = described_rows([{"teacher": "t", "task": "all", **w, **n} for w, n in zip(whats, numbers, strict=True)])
    for name, half in (("accuracy", 0.02), ("gain", 0.02), ("ps", 0.01)):
        frame[f"{name}_low"], frame[f"{name}_high"] = frame[name] - half, frame[name] + half
    return frame


def student(method: str, encoder: str = "m", head: str = "joint", greedy: bool = False) -> Description:
    return Description("student", method, int(method != DISTILLATION), encoder, head, greedy, 1.0, 0, 0, "all")


BASELINES = [
    (Description("teacher", BIASED, 1), 0.6, None, 0.2),
    (Description("copy", COPY, 1, greedy=False), 0.5, -0.1, 0.4),
]


def test_students_claims():
    t2 = students(*BASELINES, (student(DISTILLATION), 0.3, -0.3, 0.0), (student(CORRECTION), 0.64, 0.04, 0.1))
    t3 = students(*BASELINES, (student(DISTILLATION), 0.7, 0.1, 0.0))
    assert by_claim(measured((), of_teacher(), t2, t3), "efjk") == dict.fromkeys("efjk", True)
    t2 = students(
        *BASELINES,
        (student(DISTILLATION), 0.61, 0.01, 0.2),
        (student(CORRECTION), 0.5, -0.1, 0.2),
        (student(WHITE_BOX), 0.6, 0.0, 0.2),  # sees more than the copy
    )
    t3 = students(*BASELINES, (student(DISTILLATION), 0.61, 0.01, 0.2))
    assert by_claim(measured((), of_teacher(), t2, t3), "efjk") == dict.fromkeys("efjk", False)


def test_white_box_students_are_counted_and_decide_nothing():
    own = [(student(CORRECTION), 0.5, -0.1, 0.1), (student(WHITE_BOX), 0.7, 0.1, 0.3)]
    ours = [student(WHITE_BOX, "n"), student(STACKED_WHITE_BOX), student(STACKED, greedy=True), student(STACKED)]
    gaps = differences(
        *(("t", what, BASELINES[0][0], 0.1) for what in ours),
        *(("t", what, COPIES[1], 0.2) for what in ours[:3]),
        ("t", ours[3], COPIES[0], 0.0),
        # What a student does not see is not what it has to beat.
        *(("t", what, COPIES[0], -0.2) for what in ours[:3]),
        ("t", ours[3], COPIES[1], 0.2),
    )
    m = measured((), of_teacher(), students(*BASELINES, *own), students(*BASELINES), gaps)
    found = dict(judged(m, "fjk"))
    assert {letter: f.holds for letter, f in found.items()} == {"f": False, "j": True, "k": False}
    shown = {letter: f.evidence.split(": ", 1)[1] for letter, f in found.items()}
    others = "white-box, not the paper's: 1 of 1 this run's, 1 of 1 stored; stacked, not the paper's: "
    for letter, stacks in {"f": "2 of 3 stored", "k": "3 of 3 stored"}.items():
        assert shown[letter].startswith("0 of 1 this run's; best: m, joint head, error correction")
        assert shown[letter].endswith(others + stacks) and found[letter].students == "this run's and stored"
    assert shown["j"] == "1 of 1 this run's; white-box, not the paper's: 0 of 1 this run's"


def test_ablations_follow_the_stored_students(monkeypatch):
    """Answers planted for the cells: many draws as good as exact targets, one draw worse; size matters for one task only."""
    test = planted("one", n=200)
    questions = test.task.questions
    right = np.eye(3)[[q.answer for q in questions]]
    wrong = np.roll(right, 1, axis=1)
    luck = np.random.default_rng(0).random(200)

    def answers(share: float) -> np.ndarray:
        return np.repeat(np.where((luck < share)[:, None], right, wrong)[:, None], 3, axis=1)

    small, large = matrix.SIZES["SummEval"]
    shares = {cell: 0.6 for cell in matrix.MATRIX["draws"] if cell.run.draws >= 32}
    shares |= {cell: 0.3 for cell in matrix.MATRIX["draws"] if cell.run.draws < 32}
    shares |= {matrix.USUAL: 0.6, matrix.SIZES["multiple choice"][1]: 0.9, small: 0.5, large: 0.5}
    curve = matrix.MATRIX["questions at scale"]
    whole = next(cell for cell in curve if not cell.run.n_train)
    shares |= dict.fromkeys([*curve, *matrix.MATRIX["draws at scale"]], 0.5) | {whole: 0.9}
    orders = cyclic_orders(3)
    monkeypatch.setattr(ablations, "data", lambda teacher, tasks, on=(): ([test], test))

    def answer(cell: matrix.Cell, folder: str = "") -> System:
        if cell not in shares:
            raise ablations.MissingPredictions("run `make students`")
        return System(cell.run.what, answers(shares[cell]), orders, 1)

    monkeypatch.setattr(ablations, "answer", answer)
    m = measured(t1=of_teacher(USUAL))
    assert by_claim(m, "ghi") == {"g": True, "h": None, "i": True}
    shares[large] = 0.9
    del shares[matrix.MATRIX["draws"][1]]
    assert by_claim(m, "ghi") == {"g": None, "h": None, "i": False}
    shares[matrix.MATRIX["draws"][1]] = 0.3
    assert by_claim(m, "g") == {"g": False}
    shares[whole] = 0.5  # no more than 8,000 questions teach
    assert by_claim(m, "h") == {"h": False}
    del shares[whole]
    assert by_claim(m, "h") == {"h": None}


GAPS = ["teacher", "kind", "method", "greedy", "rival_kind", "rival_greedy"]
COPIES = [Description("copy", COPY, 1, greedy=greedy) for greedy in (False, True)]


def differences(*rows: tuple[str, Description, Description, float]) -> pd.DataFrame:
    """(teacher, student, rival, difference), with intervals of 2 points."""
    return described_rows(
        [
            {"teacher": teacher, **asdict(what), **{f"rival_{name}": value for name, value in asdict(rival).items()}}
            | {"difference": d, "difference_low": d - 0.02, "difference_high": d + 0.02}
            for teacher, what, rival, d in rows
        ]
    )


def test_stored_students_are_compared_with_what_they_see():
    biased, (one, probable) = BASELINES[0][0], COPIES
    distilled, corrected = (student(method, head="bi_encoder") for method in (DISTILLATION, CORRECTION))
    greedy, white_box = student(CORRECTION, head="bi_encoder", greedy=True), student(WHITE_BOX, head="bi_encoder")
    gaps = differences(
        ("weak", distilled, biased, 0.1),
        ("weak", distilled, one, 0.2),
        ("weak", corrected, biased, 0.0),
        ("weak", corrected, one, 0.1),
        ("weak", corrected, probable, -0.1),
        ("strong", greedy, biased, -0.1),
        ("strong", greedy, one, 0.1),
        ("strong", greedy, probable, 0.0),
        ("strong", white_box, biased, 0.01),
    )
    m = measured((), of_teacher(), students(*BASELINES), students(*BASELINES), gaps)
    found = {(letter, f.teacher): f for letter, f in judged(m, "fk")}
    assert {key: f.holds for key, f in found.items()} == {
        ("f", "weak"): True,
        ("f", "strong"): False,
        ("k", "weak"): True,
        ("k", "strong"): False,
    }
    assert found["k", "weak"].evidence.endswith("m, bi-encoder head, distillation 10.0 [8.0, 12.0]")
    assert "1 of 2 stored" in found["k", "weak"].evidence
    assert judged(measured((), of_teacher(), students(*BASELINES), students(*BASELINES)), "fk") == []


def test_stored_students_that_are_not_there_are_no_students(monkeypatch):
    monkeypatch.setattr(ablations, "available", lambda cells, folder: [])
    assert len(claims.Measured((), of_teacher(USUAL), NOTHING, NOTHING).gaps) == 0


def test_titles_are_for_people_alone(monkeypatch):
    """However systems are called, the verdicts are the same."""
    scored = [planted("one"), planted("summeval_coherence", k=2), planted("piqa", k=2)]
    own = [(student(DISTILLATION), 0.3, -0.3, 0.0), (student(CORRECTION, "a-base"), 0.64, 0.04, 0.1)]
    own += [(student(CORRECTION, "a-large"), 0.5, -0.1, 0.3), (student(WHITE_BOX), 0.9, 0.3, 0.0)]
    t2, t3 = students(*BASELINES, *own), students(*BASELINES, *own[::-1])
    gaps = differences(*(("t", what, rival, 0.1) for what, *_ in own for rival in (BASELINES[0][0], *COPIES)))

    def found() -> pd.DataFrame:
        return claims.verdicts(measured(scored, tables.teachers(scored), t2, t3, gaps))

    usual = found()
    assert set(usual.verdict) == {CONFIRMED, NOT_CONFIRMED, NOT_TESTABLE}
    for module in (systems, claims, tables):
        monkeypatch.setattr(module, "title", lambda what: f"system {hash(what)}", raising=False)
    renamed = found()
    assert "best: system" in renamed.evidence.str.cat() and "best: system" not in usual.evidence.str.cat()
    same = ["claim", "in the paper", "teacher", "students", "verdict"]
    pd.testing.assert_frame_equal(renamed[same], usual[same])
    counts = r"; best: .*?\]"
    assert usual.evidence.replace(counts, "", regex=True).equals(renamed.evidence.replace(counts, "", regex=True))
    papers = claims.in_the_papers_words(tables.teachers(scored), t2, t3)
    monkeypatch.undo()
    assert papers.keys() == claims.in_the_papers_words(tables.teachers(scored), t2, t3).keys()


def test_every_claim_is_listed_once_with_its_place_and_criterion():
    assert "".join(claim.letter for claim in claims.CLAIMS) == "abcdefghijk"
    listed = claims.listed()
    assert len(listed) == 11 and (listed.map(len) > 5).all(axis=None)
    assert len({claim.judge for claim in claims.CLAIMS}) == 11


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
    rows = [(Description("teacher", BIASED, 1), 0.61, 0.3), (Description("debiased", debias.DEBIASED, 24), 0.7, 0.0)]
    rows += [(student(CORRECTION, "roberta-large"), 0.675, 0.1), (student(DISTILLATION, "roberta-large"), 0.5, 0.1)]
    rows += [(student(DISTILLATION, "roberta-large", "per_option"), 0.9, 0.0)]
    rows += [(replace(student(DISTILLATION, "roberta-large"), draws=32), 0.9, 0.0)]  # not the paper's targets
    rows += [(student(DISTILLATION, "deberta-v3-large"), 0.65, 0.1), (student(DISTILLATION, "all-MiniLM-L6-v2"), 0.2, 0.1)]
    made = described_rows([{**asdict(what), "accuracy": accuracy, "ps": ps, "n": 100} for what, accuracy, ps in rows])
    t2, t3 = (pd.concat([made.assign(task=task) for task in tasks]) for tasks in ((*race, "all"), (pairs, "all")))
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


@pytest.mark.parametrize("teacher", [matrix.USUAL.teacher, "her-own/llm"])
def test_stored_students_are_judged_beside_their_own_teachers_only(monkeypatch, teacher):
    asked = []
    monkeypatch.setattr(ablations, "available", lambda cells, folder: asked.append(1) or [])
    monkeypatch.setattr(ablations, "gap", lambda *cells: asked.append(1) or Interval(0.0, -0.1, 0.1))
    t1 = tables.teachers([planted("one")]).assign(teacher=teacher)
    m = claims.Measured((), t1, students(*BASELINES), students(*BASELINES))
    found = claims.verdicts(m)
    assert bool(asked) == m.with_stored == (teacher == USUAL)
    if m.with_stored:
        assert set(found[found.students == "stored"].claim.str[:3]) == {"(g)", "(h)", "(i)"}
    else:
        assert "stored" not in set(found.students)
        varied = found[found.claim.str[:3].isin(["(g)", "(h)", "(i)"])]
        assert varied.verdict.tolist() == [NOT_TESTABLE] * 3 and set(varied.students) == {"this run's"}


def test_sizes_compare_large_encoders_with_their_own_base():
    def table(*accuracies: float) -> pd.DataFrame:
        encoders = [f"{family}-{size}" for family in ("a", "b") for size in ("base", "large")]
        rows = [(student(CORRECTION, e), accuracy, 0.0, 0.1) for e, accuracy in zip(encoders, accuracies, strict=True)]
        rows += [(student(WHITE_BOX, f"a-{size}"), at, 0.0, 0.1) for size, at in (("base", 0.1), ("large", 0.9))]
        rows.append((student(CORRECTION, "c-large"), 0.9, 0.0, 0.1))  # without its base
        return students(*rows)

    def found(t2: pd.DataFrame, t3: pd.DataFrame) -> claims.Finding:
        return next(claims.student_size(measured((), of_teacher("her-own"), t2, t3)))

    even, better = table(0.5, 0.5, 0.6, 0.6), table(0.5, 0.6, 0.6, 0.7)
    assert found(better, even).holds
    assert found(better, even).evidence.startswith("multiple choice: 2 of 2 large encoders above")
    half = table(0.5, 0.6, 0.6, 0.6)
    for t2, t3 in ((even, even), (better, half), (half, even)):
        assert not found(t2, t3).holds
