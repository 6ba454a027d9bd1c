"""The paper's claims, one by one, against what was measured here; and the numbers that a rerun should find again.

    verdicts(Measured(scored, t1, t2, t3)) -> table      what :data:`CLAIMS` come to; listed(): the claims themselves

A verdict is "confirmed", "not confirmed" or "not testable here", with the evidence beside it. Claims: Liusie, Fathullah,
Gales, Findings of ACL 2024, lettered (a) to (k) by us.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from permdistill import debias
from permdistill.files import write_text
from permdistill.measure import evaluate, metrics
from permdistill.measure.metrics import Interval
from permdistill.paper import ablations, matrix, paths, systems, tables
from permdistill.paper.experiments import Scored
from permdistill.paper.models import MODELS
from permdistill.paper.systems import CORRECTION, DISTILLATION, STACKED, STACKED_WHITE_BOX, WHITE_BOX, Description, described
from permdistill.paper.tasks import RACE, SUMMARIES, TASKS, title

CONFIRMED, NOT_CONFIRMED, NOT_TESTABLE = "confirmed", "not confirmed", "not testable here"
CLOSE = 0.02  # claim (c): accuracies within so much of each other are close
# The paper's students see the teacher's decision, or nothing of it. Those that see its probabilities are ours, and so are
# those that are stacked with the teacher: they are counted, and decide no claim.
PAPERS_METHODS = (DISTILLATION, CORRECTION)
OURS = {"white-box": (WHITE_BOX,), "stacked": (STACKED, STACKED_WHITE_BOX)}
LIVE, STORED = "this run's", "stored"
USUAL_TEACHER = Path(matrix.USUAL.teacher).name
TARGETS = Path(__file__).parent / "targets.csv"
PAPERS_MODELS = {Path(name).name: model.papers for name, model in MODELS.items() if model.papers}


@dataclass(frozen=True)
class Measured:
    """What claims are judged by.

    scored      teachers' scores
    t1, t2, t3  the tables of teachers, and of this run's students on multiple choice and on SummEval
    folder      of the stored students' predictions, "" for the committed ones
    """

    scored: Sequence[Scored]
    t1: pd.DataFrame
    t2: pd.DataFrame
    t3: pd.DataFrame
    folder: str | Path = ""

    @property
    def with_stored(self) -> bool:
        """Whether the stored students count: those of other teachers say nothing of this run's."""
        return USUAL_TEACHER in set(self.t1.teacher)

    @property
    def teacher(self) -> str:
        """Of this run's students: a profile's first."""
        return str(self.t1.teacher.iloc[0])

    @cached_property
    def gaps(self) -> pd.DataFrame:
        """Of the trained stored students on ARC and OpenBookQA, and of those of whole training sets, paired by question."""
        columns = ["teacher", "kind", "method", "greedy", *(f"rival_{name}" for name in ablations.RIVAL)]
        parts = []
        for names, stack in ((("heads and inputs", "encoders"), False), (("scale",), True)) if self.with_stored else ():
            cells = [cell for name in names for cell in matrix.MATRIX[name] if cell.run.training.epochs]
            if there := ablations.available(cells, self.folder):
                parts.append(ablations.differences(there, self.folder, stack))
        nothing = pd.DataFrame(columns=[*columns, "tasks", "difference", "difference_low", "difference_high"])
        return pd.concat(parts, ignore_index=True) if parts else nothing


class Finding(NamedTuple):
    """What a claim comes to for one teacher, or for ``students`` of one ("": it is about teachers); None: not testable."""

    teacher: str
    students: str
    holds: bool | None
    evidence: str


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    place  where in the paper it stands
    judge  what was measured -> findings; its docstring is the criterion
    """

    letter: str
    text: str
    place: str
    judge: Callable[[Measured], Iterable[Finding]]

    @property
    def criterion(self) -> str:
        """What it takes to be confirmed."""
        return " ".join(str(self.judge.__doc__).split())


def _in_turn(scored: Sequence[Scored]) -> Iterator[tuple[str, list[Scored]]]:
    """Teacher by teacher."""
    for teacher in dict.fromkeys(s.teacher for s in scored):
        yield teacher, [s for s in scored if s.teacher == teacher]


def _over_all(table: pd.DataFrame, *methods: str) -> pd.DataFrame:
    """The students of a students' table, over all its tasks."""
    rows = table[(table.task == "all") & (table.kind == "student")]
    return rows[rows.method.isin(methods)] if methods else rows


def debiased(m: Measured) -> Iterator[Finding]:
    """On every task ps is 0, and the whole interval of the gain lies above 0."""
    for teacher, rows in m.t1[m.t1.treatment == tables.DEBIASED].groupby("teacher", sort=False):
        n, zero = len(rows), int((rows.ps.abs() < debias.TIE).sum())
        up, down = int((rows.gain_low > 0).sum()), int((rows.gain_high < 0).sum())
        rose = int((rows.gain > 0).sum())
        evidence = f"ps = 0 on {zero} of {n} tasks; accuracy up on {rose}, interval above 0 on {up}, below on {down}"
        yield Finding(str(teacher), "", zero == up == n, evidence)


def _pooled(scored: Sequence[Scored], first: np.ndarray, second: np.ndarray) -> Interval:
    """Paired difference of two systems' accuracies (item,) over all of a teacher's tasks, each task counting alike."""
    tasks = np.concatenate([[s.task.name] * len(s.task.questions) for s in scored])
    groups = np.concatenate([s.task.groups for s in scored])
    labelled = ~np.isnan(first)
    sizes = pd.Series(tasks[labelled]).value_counts()
    weights = 1 / sizes[tasks[labelled]].to_numpy() / len(sizes) * labelled.sum()
    return metrics.bootstrap((first - second)[labelled] * weights, groups[labelled])


def _right(scored: Sequence[Scored], answer: Callable[[Scored], np.ndarray]) -> np.ndarray:
    """Accuracy (item,) of what ``answer`` makes of a teacher's scores, over all its tasks."""
    return np.concatenate([evaluate.correct(answer(s), s.task.questions) for s in scored])


def _averaged(s: Scored) -> np.ndarray:
    return debias.permutation_average(s.P)[:, None]


def _difference(a: Interval, b: Interval) -> Interval:
    """a - b of two independent estimates: their intervals' halves, squared and added (Newcombe, Stat. Med. 1998)."""
    value = a.value - b.value
    low = value - np.hypot(a.value - a.low, b.high - b.value)
    return Interval(value, float(low), value + float(np.hypot(a.high - a.value, b.value - b.low)))


def matched_between(m: Measured) -> Iterator[Finding]:
    """All tasks together: the paired intervals of prior-matching over biased and of debiased over
    prior-matching lie above 0."""
    for teacher, own in _in_turn(m.scored):
        matched = _right(own, lambda s: debias.prior_matching(s.P, s.orders))
        lower = _pooled(own, matched, _right(own, lambda s: s.P))
        upper = _pooled(own, _right(own, _averaged), matched)
        evidence = f"prior-matching - biased {lower.percent()}; debiased - prior-matching {upper.percent()} points"
        yield Finding(teacher, "", lower.low > 0 and upper.low > 0, evidence)


def context_close(m: Measured) -> Iterator[Finding]:
    """All tasks together: the paired interval of context prior-matching against the debiased teacher lies within
    2 points of 0."""
    for teacher, own in _in_turn(m.scored):
        context = _right(own, lambda s: debias.context_prior_matching(s.P, s.orders))
        apart = _pooled(own, context, _right(own, _averaged))
        evidence = f"context prior-matching - debiased {apart.percent()} points; close: within {100 * CLOSE:.0f}"
        yield Finding(teacher, "", -CLOSE < apart.low and apart.high < CLOSE, evidence)


def task_specific(m: Measured) -> Iterator[Finding]:
    """ps differs between SummEval and questions, both with K = 2: the interval of the difference is without 0."""
    for teacher, every in _in_turn(m.scored):
        own = [s for s in every if s.task.k == 2]
        pairs = np.concatenate([[s.task.family == SUMMARIES] * len(s.P) for s in own]) if own else np.array([])
        if len(set(pairs)) < 2:
            yield Finding(teacher, "", None, "no scores of both kinds of task with K = 2")
            continue
        ps = np.concatenate([metrics.permutation_sensitivity(s.P) for s in own])
        groups = np.concatenate([s.task.groups for s in own])
        difference = _difference(*(metrics.bootstrap(ps[kind], groups[kind]) for kind in (pairs, ~pairs)))
        evidence = f"ps on SummEval - ps on questions with K = 2: {difference.percent()} points"
        evidence += " (no base model: tuning's part is not tested)"
        yield Finding(teacher, "", difference.low > 0 or difference.high < 0, evidence)


def distillation_suffices(m: Measured) -> Iterator[Finding]:
    """A distilled student is measurably above the biased teacher on SummEval, and all are below it on multiple choice."""
    simple, complex_ = (_over_all(table, DISTILLATION) for table in (m.t3, m.t2))
    enough, failed = int((simple.gain_low > 0).sum()), int((complex_.gain_high < 0).sum())
    yield Finding(
        m.teacher,
        LIVE,
        enough > 0 and failed == len(complex_),
        f"SummEval: {enough} of {len(simple)} distilled students above the biased teacher; multiple choice: "
        f"{failed} of {len(complex_)} below it",
    )


def _counts(rows: pd.DataFrame) -> str:
    """How many of the students hold, e.g. "0 of 2 of this run, 3 of 6 stored"."""
    return ", ".join(f"{int(own.holds.sum())} of {len(own)} {made}" for made, own in rows.groupby("made", sort=False))


def _judged(rows: pd.DataFrame, holds: Callable[[pd.Series], bool], words: str) -> Iterator[Finding]:
    """One finding a teacher, from columns teacher, method, made (:data:`LIVE` or :data:`STORED`) and holds: the paper's
    students decide, :data:`OURS` are counted beside them."""
    for teacher, every in rows.groupby("teacher", sort=False):
        own = every[every.method.isin(PAPERS_METHODS)]
        evidence = f"{words}: {_counts(own) or 'no students'}"
        if "difference" in own and len(own):
            best = own.loc[(own[own.holds] if own.holds.any() else own).difference.idxmax()]
            gap = Interval(best.difference, best.difference_low, best.difference_high)
            on = f", on {title(best.tasks).replace('_', ' ')}" if "tasks" in own and best.tasks == best.tasks else ""
            evidence += f"; best: {best.system}{on} {gap.percent()}"
        for kind, methods in OURS.items():
            other = every[every.method.isin(methods)]
            evidence += f"; {kind}, not the paper's: {_counts(other)}" if len(other) else ""
        made = " and ".join(dict.fromkeys(every.made))
        yield Finding(str(teacher), made, holds(own.holds) if len(own) else None, evidence)


def _students(live: pd.DataFrame, stored: pd.DataFrame) -> pd.DataFrame:
    """Both with titles, and whether their whole interval lies above 0: what :func:`_judged` takes."""
    parts = [rows.assign(made=made) for made, rows in ((LIVE, live), (STORED, stored)) if len(rows)]
    rows = pd.concat(parts or [live.assign(made=LIVE)], ignore_index=True)
    return rows.assign(system=[systems.title(what) for what in described(rows)], holds=rows.difference_low > 0)


def copying_beaten(m: Measured) -> Iterator[Finding]:
    """On multiple choice a student's whole interval lies above the copy of the decision that it sees, or, if it sees
    probabilities, of the most probable decision."""
    copy = m.t2[(m.t2.task == "all") & (m.t2.kind == "copy")].iloc[0]
    live, gaps = _over_all(m.t2, CORRECTION), m.gaps
    # This run's tables hold no difference from the copy: there it is the student's interval minus the copy's value.
    live = live[live.greedy == copy.greedy]
    live = live.assign(**{f"difference{end}": live[f"accuracy{end}"] - copy.accuracy for end in ("", "_low", "_high")})
    # The most probable decisions are right as often as the biased teacher, to which gains are.
    white_box = _over_all(m.t2, WHITE_BOX)
    white_box = white_box.assign(**{f"difference{end}": white_box[f"gain{end}"] for end in ("", "_low", "_high")})
    seen = gaps.greedy.astype(bool) | gaps.method.isin((WHITE_BOX, STACKED_WHITE_BOX))
    corrected = gaps.method.isin((CORRECTION, WHITE_BOX, STACKED, STACKED_WHITE_BOX))
    stored = gaps[corrected & (gaps.rival_kind == "copy") & (gaps.rival_greedy.astype(bool) == seen)]
    live = pd.concat([live, white_box], ignore_index=True)
    yield from _judged(_students(live, stored), any, "above the copy with the whole interval")


def students_less_sensitive(m: Measured) -> Iterator[Finding]:
    """The interval of ps of every student lies below the teacher's."""
    parts = []
    for table in (m.t2, m.t3):
        low = table[(table.task == "all") & (table.kind == "teacher")].ps_low.iloc[0]
        rows = _over_all(table)
        parts.append(rows.assign(made=LIVE, holds=rows.ps_high < low))
    yield from _judged(pd.concat(parts, ignore_index=True), all, "interval of ps below the teacher's")


def teacher_beaten(m: Measured) -> Iterator[Finding]:
    """A student's gain over the biased teacher, paired by question, has its whole interval above 0."""
    pools = {"multiple choice": m.t2, "SummEval": m.t3}
    live = pd.concat([_over_all(table).assign(tasks=name) for name, table in pools.items()], ignore_index=True)
    live = live.assign(**{f"difference{end}": live[f"gain{end}"] for end in ("", "_low", "_high")})
    yield from _judged(_students(live, m.gaps[m.gaps.rival_kind == "teacher"]), any, "gain's whole interval above 0")


def _of_stored(judge: Callable[[Measured], tuple[bool | None, str]]) -> Callable[[Measured], Iterator[Finding]]:
    """A claim about what is varied for the stored students alone: whether it holds, and the evidence, as a finding."""

    @wraps(judge)
    def findings(m: Measured) -> Iterator[Finding]:
        if not m.with_stored:
            why = f"draws and examples are varied for the stored students alone, taught by {USUAL_TEACHER}"
            yield Finding(m.teacher, LIVE, None, why)
            return
        try:
            yield Finding(USUAL_TEACHER, STORED, *judge(m))
        except ablations.MissingPredictions as missing:
            yield Finding(USUAL_TEACHER, STORED, None, str(missing))

    return findings


@_of_stored
def draws_saturate(m: Measured) -> tuple[bool | None, str]:
    """The interval of exact targets minus 32 draws holds 0, and 1 draw is measurably worse than exact targets."""
    by_draws, scale = ({c.run.draws: c for c in matrix.MATRIX[part]} for part in ("draws", "draws at scale"))
    few, many = (ablations.gap(matrix.USUAL, by_draws[n], m.folder) for n in (1, 32))
    one, sixteen = (ablations.gap(matrix.SCALE_USUAL, scale[n], m.folder) for n in (1, 16))
    evidence = f"exact targets - 32 draws {many.percent()} points, - 1 draw {few.percent()}; on SocialIQA, 8,000 questions, "
    evidence += f"- 16 draws {sixteen.percent()}, - 1 draw {one.percent()}"
    return many.low <= 0 <= many.high and few.low > 0, evidence


@_of_stored
def examples_needed(m: Measured) -> tuple[bool | None, str]:
    """SocialIQA's 33,177 questions teach measurably more than 8,000. That is the complex half: where it holds, the claim is
    still not testable, since SummEval has too few pairs for the simple one."""
    curve = matrix.MATRIX["questions at scale"]
    more = ablations.gap(next(cell for cell in curve if not cell.run.n_train), matrix.SCALE_USUAL, m.folder)
    shown = ablations.effects(curve, "n_train", folder=m.folder)
    words = ", ".join(f"{n:,}: {100 * a:.1f}" for n, a in zip(shown.n_train, shown.accuracy, strict=True))
    evidence = f"SocialIQA, all questions - 8,000: {more.percent()} points; accuracy by their number: {words}"
    race = [c for c in matrix.MATRIX["scale"] if c.tasks == ("race",) and c.run.training.epochs]
    by_number = {c.run.n_train: c for c in ablations.available(race, m.folder)}
    if {0, 1000} <= by_number.keys():
        apart = ablations.gap(by_number[0], by_number[1000], m.folder)
        evidence += f"; RACE, 30,000 seen twice - 1,000 seen once: {apart.percent()}"
    return None if more.low > 0 else False, evidence


@_of_stored
def _stored_sizes(m: Measured) -> tuple[bool | None, str]:
    pairs = (matrix.SIZES["multiple choice"], matrix.SIZES["SummEval"])
    choice, summaries = (ablations.gap(large, small, m.folder) for small, large in pairs)
    evidence = f"mpnet - MiniLM: multiple choice {choice.percent()} points, SummEval {summaries.percent()}"
    return choice.low > 0 >= summaries.low, evidence


def student_size(m: Measured) -> Iterator[Finding]:
    """The larger encoder is measurably better on multiple choice, and not on SummEval."""
    # Of stored students, paired by question, or else from this run's tables.
    yield from _stored_sizes(m) if m.with_stored else [_sizes(m)]


def _sizes(m: Measured) -> Finding:
    """(i), from a run's own students in error correction whose encoders are a "-base" and a "-large", over all tasks.

    The larger one of each family is measurably better on multiple choice, none on SummEval. Tables hold no answers, so the
    intervals are those of independent estimates, as a rule wider than paired ones: harder for the first half of the claim,
    easier for the second.
    """
    above, counts, words = [], [], []
    for name, table in (("multiple choice", m.t2), ("SummEval", m.t3)):
        rows = _over_all(table, CORRECTION)
        intervals = map(Interval, rows.accuracy, rows.accuracy_low, rows.accuracy_high)
        by_what = dict(zip(described(rows), intervals, strict=True))
        bases = {
            what: replace(what, encoder=what.encoder.replace("-large", "-base"))
            for what in by_what
            if what.encoder and "-large" in what.encoder
        }
        differences = [_difference(by_what[what], by_what[base]) for what, base in bases.items() if base in by_what]
        counts.append(len(differences))
        above.append(sum(d.low > 0 for d in differences))
        words.append(f"{name}: {above[-1]} of {counts[-1]} large encoders above their base")
    if not all(counts):
        return Finding(m.teacher, LIVE, None, "no students with encoders of two sizes")
    return Finding(m.teacher, LIVE, above[0] == counts[0] and above[1] == 0, "; ".join(words))


_RACE, _BOTH, _METHOD = "RACE++ table", "RACE++ table; SummEval coherence results", "method"
CLAIMS = (
    Claim("a", "permutation debiasing: ps = 0, accuracy up everywhere", f"{_METHOD}; debiasing gains", debiased),
    Claim("b", "prior-matching lies between biased and debiased", f"{_METHOD}, prior-matching", matched_between),
    Claim("c", "context prior-matching is close to debiasing", f"{_METHOD}, context prior-matching", context_close),
    Claim("d", "invariance is task-specific", "sensitivities of the teachers", task_specific),
    Claim("e", "distillation suffices for the simple task, fails on the complex one", _BOTH, distillation_suffices),
    Claim("f", "error correction beats copying the biased decision", f"{_METHOD}, error correction", copying_beaten),
    Claim("g", "32 draws saturate", "black-box targets", draws_saturate),
    Claim("h", "about 2,000 examples for the simple task, 30,000 for the complex one", "training data", examples_needed),
    Claim("i", "student size matters on the complex task only", _BOTH, student_size),
    Claim("j", "students are less sensitive than the biased teacher", "results of students", students_less_sensitive),
    Claim("k", "compact encoder students beat their larger biased teacher", f"abstract; {_RACE}", teacher_beaten),
)


def listed() -> pd.DataFrame:
    """The claims: where in the paper they stand, and what it takes to confirm them."""
    rows = [(f"({c.letter}) {c.text}", c.place, c.criterion) for c in CLAIMS]
    return pd.DataFrame(rows, columns=["claim", "in the paper", "confirmed if"])


def verdicts(m: Measured) -> pd.DataFrame:
    """Every claim with its verdict and evidence, teacher by teacher; of the stored students only where the teachers are
    theirs."""
    words = {True: CONFIRMED, False: NOT_CONFIRMED, None: NOT_TESTABLE}
    rows = [
        (f"({claim.letter}) {claim.text}", claim.place, f.teacher, f.students, words[f.holds], f.evidence)
        for claim in CLAIMS
        for f in claim.judge(m)
    ]
    return pd.DataFrame(rows, columns=["claim", "in the paper", "teacher", "students", "verdict", "evidence"])


def targets(source: str, path: Path = TARGETS) -> pd.DataFrame:
    """The numbers to find again: ``source`` "paper" (published; models and data of the hub) or "laptop" (ours).

    Columns: table, teacher (or student), task, treatment, n (questions with a gold answer), metric, value, tolerance; values
    are shares.
    """
    frame = pd.read_csv(path)
    if source not in set(frame.source):
        raise ValueError(f"source {source!r}: give one of {', '.join(sorted(set(frame.source)))}")
    return frame[frame.source == source].drop(columns="source").reset_index(drop=True)


def _as_published(what: Description) -> bool:
    """Whether a student is one of the paper's: joint head, exact targets, all questions in all orders."""
    usual = not (what.greedy or what.draws or what.n_train) and what.power in (None, 1) and what.orders in (None, "all")
    return what.head == "joint" and what.method in PAPERS_METHODS and usual


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
        rows = table[table.task == ours]
        for what, row in zip(described(rows), rows.itertuples(), strict=True):
            if what.kind == "student" and what.encoder in PAPERS_MODELS and _as_published(what):
                who, treatment = PAPERS_MODELS[what.encoder], what.method
            elif what.kind in ("teacher", "debiased"):
                who, treatment = {"teacher": "biased teacher", "debiased": "debiased teacher"}[what.kind], ""
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
            cell = table[(table.teacher == target.teacher) & (table.task == target.task)]
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
    write_text(TARGETS, pd.concat([published, own]).to_csv(index=False))
