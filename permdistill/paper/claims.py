"""The paper's claims, one by one, against what was measured here; and the numbers that a rerun should find again.

A verdict is "confirmed", "not confirmed" or "not testable here", with the evidence beside it. What each claim takes to be
confirmed stands in its function. Claims: Liusie, Fathullah, Gales, Findings of ACL 2024, lettered (a) to (k) by us.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from permdistill import debias, metrics
from permdistill.metrics import Interval
from permdistill.paper import ablations, paths, profiles, tables
from permdistill.paper.experiments import Scored
from permdistill.paper.models import MODELS
from permdistill.paper.tasks import RACE, SUMMARIES, TASKS

CONFIRMED, NOT_CONFIRMED, NOT_TESTABLE = "confirmed", "not confirmed", "not testable here"
CLOSE = 0.02  # claim (c): accuracies within so much of each other are close
SATURATE = "(g) 32 draws saturate"
EXAMPLES = "(h) about 2,000 examples for the simple task, 30,000 for the complex one"
SIZE = "(i) student size matters on the complex task only"
TARGETS = Path(__file__).parent / "targets.csv"
PAPERS_MODELS = {Path(name).name: model.papers for name, model in MODELS.items() if model.papers}


class Verdict(NamedTuple):
    """One claim, for one teacher where it is about teachers."""

    claim: str
    about: str
    verdict: str
    evidence: str


def _verdict(claim: str, about: str, holds: bool, evidence: str) -> Verdict:
    return Verdict(claim, about, CONFIRMED if holds else NOT_CONFIRMED, evidence)


def debiasing(t1: pd.DataFrame) -> list[Verdict]:
    """(a), per teacher: on every task ps is 0 and the whole interval of the gain lies above 0."""
    result = []
    for teacher, rows in t1[t1.treatment == tables.DEBIASED].groupby("teacher", sort=False):
        n, zero = len(rows), int((rows.ps.abs() < debias.TIE).sum())
        up, down = int((rows.gain_low > 0).sum()), int((rows.gain_high < 0).sum())
        rose = int((rows.gain > 0).sum())
        evidence = f"ps = 0 on {zero} of {n} tasks; accuracy up on {rose}, interval above 0 on {up}, below on {down}"
        holds = zero == up == n
        result.append(_verdict("(a) permutation debiasing: ps = 0, accuracy up everywhere", str(teacher), holds, evidence))
    return result


def _pooled(scored: Sequence[Scored], first: np.ndarray, second: np.ndarray) -> Interval:
    """Paired difference of two systems' accuracies (item,) over all of a teacher's tasks, each task counting alike."""
    tasks = np.concatenate([[s.task.name] * len(s.task.questions) for s in scored])
    groups = np.concatenate([s.task.groups for s in scored])
    labelled = ~np.isnan(first)
    sizes = pd.Series(tasks[labelled]).value_counts()
    weights = 1 / sizes[tasks[labelled]].to_numpy() / len(sizes) * labelled.sum()
    return metrics.bootstrap((first - second)[labelled] * weights, groups[labelled])


def _difference(a: Interval, b: Interval) -> Interval:
    """a - b of two independent estimates: their intervals' halves, squared and added (Newcombe, Stat. Med. 1998)."""
    value = a.value - b.value
    low = value - np.hypot(a.value - a.low, b.high - b.value)
    return Interval(value, float(low), value + float(np.hypot(a.high - a.value, b.value - b.low)))


def prior_matching(scored: Sequence[Scored]) -> list[Verdict]:
    """(b) and (c), per teacher, all tasks together. (b): the paired intervals of prior-matching over biased and of debiased
    over prior-matching both lie above 0. (c): the paired interval of context prior-matching against the debiased teacher
    lies within :data:`CLOSE` of 0."""
    result = []
    for teacher in dict.fromkeys(s.teacher for s in scored):
        own = [s for s in scored if s.teacher == teacher]
        by_method: dict[str, list[np.ndarray]] = {}
        for s in own:
            for name, P in (
                ("biased", s.P),
                ("matched", debias.prior_matching(s.P, s.orders)),
                ("context", debias.context_prior_matching(s.P, s.orders)),
                ("debiased", debias.permutation_average(s.P)[:, None]),
            ):
                by_method.setdefault(name, []).append(tables.correct(P, s.task.questions))
        right = {name: np.concatenate(parts) for name, parts in by_method.items()}
        lower = _pooled(own, right["matched"], right["biased"])
        upper = _pooled(own, right["debiased"], right["matched"])
        evidence = f"prior-matching - biased {lower.percent()}; debiased - prior-matching {upper.percent()} points"
        holds = lower.low > 0 and upper.low > 0
        result.append(_verdict("(b) prior-matching lies between biased and debiased", teacher, holds, evidence))
        apart = _pooled(own, right["context"], right["debiased"])
        evidence = f"context prior-matching - debiased {apart.percent()} points; close: within {100 * CLOSE:.0f}"
        holds = -CLOSE < apart.low and apart.high < CLOSE
        result.append(_verdict("(c) context prior-matching is close to debiasing", teacher, holds, evidence))
    return sorted(result)


def task_specific(scored: Sequence[Scored]) -> list[Verdict]:
    """(d), per teacher: ps differs between multiple choice and comparing summaries at the same K = 2 (PIQA and SummEval),
    the interval of the difference without 0. What part instruction tuning has in it would take base models."""
    claim, result = "(d) invariance is task-specific", []
    for teacher in dict.fromkeys(s.teacher for s in scored):
        own = [s for s in scored if s.teacher == teacher and s.task.k == 2]
        pairs = np.concatenate([[s.task.family == SUMMARIES] * len(s.P) for s in own]) if own else np.array([])
        if len(set(pairs)) < 2:
            result.append(Verdict(claim, teacher, NOT_TESTABLE, "no scores of both kinds of task with K = 2"))
            continue
        ps = np.concatenate([metrics.permutation_sensitivity(s.P) for s in own])
        groups = np.concatenate([s.task.groups for s in own])
        difference = _difference(*(metrics.bootstrap(ps[kind], groups[kind]) for kind in (pairs, ~pairs)))
        evidence = f"ps on SummEval - ps on PIQA: {difference.percent()} points (no base model: tuning's part is not tested)"
        result.append(_verdict(claim, teacher, difference.low > 0 or difference.high < 0, evidence))
    return result


def students(t2: pd.DataFrame, t3: pd.DataFrame) -> list[Verdict]:
    """(e), (f), (j) and (k), from the students' tables, over all tasks of each."""
    complex_, simple = (t[t.task == "all"] for t in (t2, t3))
    about, both = "students", pd.concat([complex_, simple])
    own, teacher, copy = (both[both.kind == kind] for kind in ("student", "teacher", "copy"))
    distilled = [t[t.system.str.contains("distillation")] for t in (simple, complex_)]
    enough = int((distilled[0].gain_low > 0).sum())
    failed = int((distilled[1].gain_high < 0).sum())
    # The paper's, which sees the decision alone; white-box error correction sees more than the copy has.
    corrected = complex_[complex_.system.str.contains(", error correction", regex=False)]
    copied = float(copy.accuracy.iloc[0])
    above = int((corrected.accuracy_low > copied).sum())
    less = sum(
        int((t[t.kind == "student"].ps_high < t[t.kind == "teacher"].ps_low.iloc[0]).sum()) for t in (complex_, simple)
    )
    better = tables.better_than_teacher(both)
    assert len(teacher) == 2
    return [
        _verdict(
            "(e) distillation suffices for the simple task, fails on the complex one",
            about,
            enough > 0 and failed == len(distilled[1]),
            f"SummEval: {enough} of {len(distilled[0])} distilled students above the biased teacher; multiple choice: "
            f"{failed} of {len(distilled[1])} below it",
        ),
        _verdict(
            "(f) error correction beats copying the biased decision",
            about,
            above > 0,
            f"multiple choice: {above} of {len(corrected)} students' intervals lie above the copy's {100 * copied:.1f}",
        ),
        _verdict(
            "(j) students are less sensitive than the biased teacher",
            about,
            less == len(own),
            f"{less} of {len(own)} students' intervals of ps lie below the teacher's",
        ),
        _verdict(
            "(k) compact encoder students beat their larger biased teacher",
            about,
            len(better) > 0,
            f"{len(better)} of {len(own)} students' gains have their whole interval above 0",
        ),
    ]


def varied(folder: str | Path = "") -> list[Verdict]:
    """(g), (h) and (i), from the stored students of :data:`permdistill.paper.profiles.MATRIX`, paired by question.

    (g): more targets than 32 draws make no measurable difference (the interval of exact targets minus 32 draws holds 0), and
    1 draw is measurably worse. (i): the larger encoder is measurably better on multiple choice, and not on SummEval.
    """
    found, usual = [], profiles.USUAL
    about = f"stored students of {Path(usual.teacher).name}"
    by_draws = {cell.run.draws: cell for cell in profiles.MATRIX["draws"]}
    try:
        few, many = (ablations.gap(usual, by_draws[n], folder) for n in (1, 32))
        evidence = f"exact targets - 32 draws {many.percent()} points, - 1 draw {few.percent()}"
        found.append(_verdict(SATURATE, about, many.low <= 0 <= many.high and few.low > 0, evidence))
    except ablations.MissingPredictions as missing:
        found.append(Verdict(SATURATE, about, NOT_TESTABLE, str(missing)))
    rows = [*ablations.available(profiles.MATRIX["questions"], folder), *ablations.available([usual], folder)]
    curve = ablations.effects(rows, "n_train", folder=folder) if rows else pd.DataFrame(columns=["n_train", "accuracy"])
    points = ", ".join(f"{n}: {100 * a:.1f}" for n, a in zip(curve.n_train, curve.accuracy, strict=True))
    found.append(
        Verdict(
            EXAMPLES,
            about,
            NOT_TESTABLE,
            f"there are fewer questions with scores; accuracy on multiple choice by their number: {points or 'none stored'}",
        )
    )
    try:
        larger = [
            ablations.gap(large, small, folder)
            for small, large in (profiles.SIZES["multiple choice"], profiles.SIZES["SummEval"])
        ]
        evidence = f"mpnet - MiniLM: multiple choice {larger[0].percent()} points, SummEval {larger[1].percent()}"
        found.append(_verdict(SIZE, about, larger[0].low > 0 >= larger[1].low, evidence))
    except ablations.MissingPredictions as missing:
        found.append(Verdict(SIZE, about, NOT_TESTABLE, str(missing)))
    return found


def sizes(t2: pd.DataFrame, t3: pd.DataFrame) -> Verdict:
    """(i), from a run's own students in error correction whose encoders are a "-base" and a "-large", over all tasks.

    The larger one of each family is measurably better on multiple choice, none on SummEval. Tables hold no answers, so the
    intervals are those of independent estimates, as a rule wider than paired ones: harder for the first half of the claim,
    easier for the second.
    """
    above, counts, words = [], [], []
    for title, table in (("multiple choice", t2), ("SummEval", t3)):
        rows = table[(table.task == "all") & table.system.str.contains(", error correction", regex=False)]
        by_name = {r.system: Interval(r.accuracy, r.accuracy_low, r.accuracy_high) for r in rows.itertuples()}
        bases = {name: name.replace("-large", "-base") for name in by_name if "-large" in name}
        pairs = [(by_name[base], by_name[large]) for large, base in bases.items() if base in by_name]
        differences = [_difference(large, base) for base, large in pairs]
        counts.append(len(pairs))
        above.append(sum(d.low > 0 for d in differences))
        words.append(f"{title}: {above[-1]} of {len(pairs)} large encoders above their base")
    if not all(counts):
        return Verdict(SIZE, "students", NOT_TESTABLE, "no students with encoders of two sizes")
    return _verdict(SIZE, "students", above[0] == counts[0] and above[1] == 0, "; ".join(words))


def stored(folder: str | Path = "") -> list[Verdict]:
    """(f) and (k), per teacher, from the stored students on multiple choice, paired by question.

    (f): an error-correction student has its whole interval above the copy of the decision that it sees. (k): a trained
    student has its whole interval above the biased teacher.
    """
    cells = ablations.available((*profiles.MATRIX["heads and inputs"], *profiles.MATRIX["encoders"]), folder)
    if not cells:
        return []
    gaps, result = ablations.differences(cells, folder), []
    greedy = gaps.system.str.contains("greedy")
    seen = np.where(greedy, "copy of the most probable decision", "copy of one sampled decision")
    corrected = gaps[gaps.system.str.contains(", error correction") & (gaps.rival == seen)]
    for claim, rows in (
        ("(f) error correction beats copying the biased decision", corrected),
        ("(k) compact encoder students beat their larger biased teacher", gaps[gaps.rival == "biased teacher"]),
    ):
        for teacher, own in rows.groupby("teacher", sort=False):
            best = own.loc[own.difference.idxmax()]
            gain = Interval(best.difference, best.difference_low, best.difference_high).percent()
            above = int((own.difference_low > 0).sum())
            evidence = (
                f"{above} of {len(own)} students' differences have their whole interval above 0; best: {best.system} {gain}"
            )
            result.append(_verdict(claim, f"stored students of {teacher}", above > 0, evidence))
    return result


def verdicts(scored: Sequence[Scored], t1: pd.DataFrame, t2: pd.DataFrame, t3: pd.DataFrame) -> pd.DataFrame:
    """Every claim with its verdict and evidence; of the stored students only where the teachers are theirs."""
    found = [*debiasing(t1), *prior_matching(scored), *task_specific(scored), *students(t2, t3)]
    if Path(profiles.USUAL.teacher).name in set(t1.teacher):
        found += [*stored(), *varied()]
    else:
        why = f"draws and examples are varied for the stored students alone, taught by {Path(profiles.USUAL.teacher).name}"
        found += [Verdict(claim, "students", NOT_TESTABLE, why) for claim in (SATURATE, EXAMPLES)]
        found.append(sizes(t2, t3))
    return pd.DataFrame(found).sort_values("claim", kind="stable", ignore_index=True)


def targets(source: str, path: Path = TARGETS) -> pd.DataFrame:
    """The numbers to find again: ``source`` "paper" (published; models and data of the hub) or "laptop" (ours).

    Columns: table, teacher (or system), task, treatment, n (questions with a gold answer), metric, value, tolerance; values
    are shares.
    """
    frame = pd.read_csv(path)
    if source not in set(frame.source):
        raise ValueError(f"source {source!r}: give one of {', '.join(sorted(set(frame.source)))}")
    return frame[frame.source == source].drop(columns="source").reset_index(drop=True)


def in_the_papers_words(t1: pd.DataFrame, t2: pd.DataFrame, t3: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The cells of T1, T2 and T3 that stand for the paper's, under its names, for :func:`check` with targets("paper").

    RACE++ is T2 over its three parts together, SummEval's coherence a part of T3; students are those with the paper's joint
    head. Sensitivity is that of the biased teacher, the mean over the paper's sets. Models or tasks that are not the paper's
    give no cell.
    """
    parts = []
    for name, table, task, ours in (
        ("RACE++", t2 if set(RACE) <= set(t2.task) else t2[:0], "RACE++", "all"),
        ("SummEval", t3, "SummEval coherence", "summeval16_coherence"),
    ):
        for row in table[table.task == ours].itertuples(index=False):
            encoder, _, rest = str(row.system).partition(", joint head, ")
            if row.kind == "student" and encoder in PAPERS_MODELS and rest in ("distillation", "error correction"):
                who, treatment = PAPERS_MODELS[encoder], rest
            elif row.kind in ("teacher", "debiased"):
                who, treatment = {"teacher": "biased teacher", "debiased": "debiased teacher"}[str(row.kind)], ""
            else:
                continue
            parts.append((f"paper_{name}", who, task, treatment, row.n, row.accuracy, row.ps))
    biased = t1[t1.treatment == tables.BIASED]
    for (teacher, task), rows in biased.groupby(
        ["teacher", biased.task.map({name: task.papers for name, task in TASKS.items() if task.papers})], sort=False
    ):
        if teacher in PAPERS_MODELS:
            cell = (PAPERS_MODELS[str(teacher)], task, "biased", rows.n.sum(), rows.accuracy.mean(), rows.ps.mean())
            parts.append(("paper_sensitivity", *cell))
    cells = pd.DataFrame(parts, columns=["table", "teacher", "task", "treatment", "n", "accuracy", "ps"])
    return {str(name): part for name, part in cells.groupby("table", sort=False)}


def check(expected: pd.DataFrame, found: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Each target beside what ``found`` ({table name: table}) has for it, and whether it lies within the tolerance.

    A target whose cell is not there, or has another number of questions, is "not testable here". A target without a number
    of questions or a treatment asks for none.
    """
    rows = []
    for target in expected.itertuples(index=False):
        value = float("nan")
        if (table := found.get(str(target.table))) is not None:
            who = table["teacher"] if "teacher" in table else table["system"]
            cell = table[(who == target.teacher) & (table.task == target.task)]
            if "treatment" in table and not pd.isna(target.treatment):
                cell = cell[cell.treatment == target.treatment]
            if len(cell) == 1 and (pd.isna(target.n) or cell.n.iloc[0] == target.n):
                value = float(cell[str(target.metric)].iloc[0])
        within = abs(value - float(target.value)) <= float(target.tolerance)
        verdict = NOT_TESTABLE if np.isnan(value) else CONFIRMED if within else NOT_CONFIRMED
        rows.append({**target._asdict(), "found": value, "verdict": verdict})
    return pd.DataFrame(rows)


def tally(checked: pd.DataFrame) -> pd.DataFrame:
    """How many targets of each table were found again."""
    counts = pd.crosstab(checked.table, checked.verdict)
    return counts.reindex(columns=[CONFIRMED, NOT_CONFIRMED, NOT_TESTABLE], fill_value=0).reset_index()


def as_targets(table: pd.DataFrame, name: str, tolerance: float) -> pd.DataFrame:
    """Accuracy and ps of a table of ours as laptop targets."""
    long = table.assign(source="laptop", table=name, tolerance=tolerance).melt(
        ["source", "table", "teacher", "task", "treatment", "n", "tolerance"], ["accuracy", "ps"], "metric", "value"
    )
    return long[["source", "table", "teacher", "task", "treatment", "n", "metric", "value", "tolerance"]].round(4)


if __name__ == "__main__":  # python -m permdistill.paper.claims: the laptop targets become what figures/T1_teachers.csv says
    own = as_targets(pd.read_csv(paths.ROOT / "figures" / "T1_teachers.csv"), "T1_teachers", 0.02)
    published = targets("paper").assign(source="paper")
    pd.concat([published, own]).to_csv(TARGETS, index=False)
