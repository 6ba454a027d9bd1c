"""What each notebook shows, in words: a function a notebook, from its tables to Markdown, with the numbers filled in from
them. Nothing here is measured; where a table lacks what a sentence needs (no gold answers), the sentence is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from permdistill import debias, fewcalls
from permdistill.measure.metrics import Interval
from permdistill.paper import claims, tables
from permdistill.paper.display import Words
from permdistill.paper.systems import (
    BIASED,
    CORRECTION,
    DISTILLATION,
    STACKED,
    STACKED_WHITE_BOX,
    UNTRAINED,
    WHITE_BOX,
    described,
    head_title,
)
from permdistill.paper.systems import title as system_title
from permdistill.paper.tasks import title


def _points(row: pd.Series, name: str) -> str:
    """A metric of a row with its interval, e.g. "6.9 [5.2, 8.6]"."""
    return Interval(row[name], row[f"{name}_low"], row[f"{name}_high"]).percent()


def _list(lines: Iterable[str]) -> Words:
    return Words("\n".join(f"* {line}" for line in lines if line))


def claim(letters: str) -> str:
    """Which of the paper's claims this is about, and where in the paper they stand."""
    named = [c for c in claims.CLAIMS if c.letter in letters]
    words = "; ".join(f"({c.letter}) {c.text} ({c.place})" for c in named)
    return f"*Claim{'s' * (len(named) > 1)} {words}. Verdicts: notebook 8.*"


def _all(table: pd.DataFrame) -> pd.DataFrame:
    return table[table.task.isin(["all", "all of T2", "all of T3"])]


def teachers(t1: pd.DataFrame, race: pd.DataFrame) -> Words:
    """Of T1 (:func:`permdistill.paper.tables.teachers`), and RACE (:func:`permdistill.paper.race.table`)."""
    lines = [_race(race)]
    for teacher, own in t1.groupby("teacher", sort=False):
        biased, debiased = (own[own.treatment == name].set_index("task") for name in (tables.BIASED, tables.DEBIASED))
        low, high = biased.loc[biased.ps.idxmin()], biased.loc[biased.ps.idxmax()]
        after = debiased.ps.max()
        words = f"**{teacher}**: two orders' answers differ by {100 * low.ps:.1f} ({title(str(low.name))}) to "
        words += (
            f"{100 * high.ps:.1f} ({title(str(high.name))}) points of probability, after averaging by {100 * after:.1f}."
        )
        if "gain" in own and debiased.gain.notna().any():
            up, down = (debiased.gain_low > 0).sum(), (debiased.gain_high < 0).sum()
            best = debiased.loc[debiased.gain.idxmax()]
            words += f" Averaging gains accuracy on {(debiased.gain > 0).sum()} of {len(debiased)} tasks, with the whole "
            words += f"interval above 0 on {up} (below 0 on {down}); "
            words += f"most on {title(str(best.name))}, {_points(best, 'gain')} points."
        lines.append(words)
    return _list([*lines, claim("ad")])


def _race(table: pd.DataFrame) -> str:
    """Of RACE beside the paper's numbers (:func:`permdistill.paper.race.table`)."""
    ours, theirs = table[(table.source == "stored") & (table.task == "all")], table[table.source == "published"]
    biased, average = (ours[ours.method == method].iloc[0] for method in (BIASED, debias.DEBIASED))
    before, after = (100 * theirs[theirs.method == method].accuracy.iloc[0] for method in (BIASED, debias.DEBIASED))
    return (
        f"**RACE**, {int(average.n):,} questions: averaging takes our teacher from {_points(biased, 'accuracy')} to "
        f"{_points(average, 'accuracy')}, a gain of {_points(average, 'gain')} points; the paper's, on RACE++, goes from "
        f"{before:.1f} to {after:.1f}."
    )


def debiasers(d1: pd.DataFrame, kinds: Mapping[str, Sequence[str]]) -> Words:
    """Of D1 (:func:`permdistill.paper.tables.debiasers`) of one teacher, by kind of task."""
    lines = []
    for kind, tasks in kinds.items():
        own = d1[d1.task.isin(list(tasks))]
        by = own.groupby(["debiaser", "family"], sort=False)[["calls", "accuracy", "ps"]].mean().reset_index()
        by = by.set_index("debiaser")
        biased, average = by.loc[debias.BIASED], by.loc[debias.DEBIASED]
        one = by[(by.calls < 1.5) & (by.family != debias.BLACK_BOX_FAMILY)]
        few = by[(by.calls >= 1.5) & (by.calls < average.calls) & (by.family != debias.BLACK_BOX_FAMILY)]
        best = one.accuracy.idxmax()
        words = f"**{kind}**: {100 * biased.accuracy:.1f} biased, {100 * average.accuracy:.1f} after all "
        words += f"{average.calls:.0f} orders. Best at about one call: {best}, {100 * one.accuracy[best]:.1f}."
        if len(few):
            near = few[few.accuracy >= few.accuracy.max() - 0.005].calls.idxmin()
            at = "" if "call" in near else f" at {few.calls[near]:.1f} calls"
            words += f" With fewer calls than all: {near}, {100 * few.accuracy[near]:.1f}{at}, "
            words += f"sensitivity {100 * few.ps[near]:.1f}."
        lines.append(words)
    note = (
        "These are means over the tasks of a kind; which debiaser is best was seen on these same test questions; how rows "
    )
    note += f'"{fewcalls.ADAPTIVE_FAMILY}" were chosen stands above.'
    return _list([*lines, note, claim("bc")])


def students(table: pd.DataFrame) -> Words:
    """Of T2, T3 or any other table of students (:func:`permdistill.paper.tables.answers`)."""
    whole = _all(table)
    whole = whole.assign(system=[system_title(what) for what in described(whole)])
    lines = []
    for teacher, own in whole.groupby("teacher", sort=False) if "teacher" in whole else [("", whole)]:
        pupils, biased = own[own.kind == "student"], own[own.kind.isin(["teacher", "copy"])].iloc[0]
        start = f"**{teacher}**: " if teacher else ""
        words = f"{start}the biased answers are right on {_points(biased, 'accuracy')}"
        if (own.kind == "debiased").any():
            words += f", the average over all orders on {_points(own[own.method == debias.DEBIASED].iloc[0], 'accuracy')}"
        lines += [_beaten(pupils, start), f"{words} of 100 questions."]
        for method in (DISTILLATION, CORRECTION, WHITE_BOX, STACKED, STACKED_WHITE_BOX, UNTRAINED):
            rows = pupils[pupils.method == method]
            if len(rows):
                best = rows.loc[rows.accuracy.idxmax()]
                above, below = (rows.gain_low > 0).sum(), (rows.gain_high < 0).sum()
                name = best.system.replace(f", {method}", "")
                lines.append(
                    f"{start}{method}, {best.calls} call{'s' * int(best.calls != 1)} of the teacher an answer: the best of "
                    f"{len(rows)} is {name} with {_points(best, 'accuracy')}, {_points(best, 'gain')} against the biased "
                    f"teacher. Measurably above it: {above} of {len(rows)}; measurably below: {below}."
                )
    return _list([*lines, claim("efk")])


def _beaten(pupils: pd.DataFrame, start: str) -> str:
    """Whether a student's gain over the biased teacher has its whole interval above 0, by what it sees of that one."""
    parts = []
    for what, methods in (
        ("without a call", (DISTILLATION,)),
        ("with one decision", (CORRECTION, STACKED)),
        ("with its probabilities for one order", (WHITE_BOX, STACKED_WHITE_BOX)),
    ):
        rows = pupils[pupils.method.isin(methods)]
        if len(rows):
            best = _points(rows.loc[rows.gain.idxmax()], "gain")
            parts.append(f"{what} {'yes' if (rows.gain_low > 0).any() else 'no'}, {best} points at best")
    return f"{start}does a student beat the biased teacher? {'; '.join(parts).capitalize()}." if parts else ""


def sensitivity(systems: pd.DataFrame) -> Words:
    """Of the systems of T2 and T3 (:func:`permdistill.paper.tables.read`)."""
    lines = []
    for task, part in systems.groupby("task", sort=False):
        if not str(task).startswith("all"):
            continue
        teacher, pupils = part[part.kind == "teacher"].iloc[0], part[part.kind == "student"]
        below = pupils[pupils.ps < teacher.ps]
        both = below[below.gain_low > 0]
        words = f"**{task}**: {len(below)} of {len(pupils)} students depend less on the order than the biased teacher "
        words += f"(median {100 * pupils.ps.median():.1f} against {100 * teacher.ps:.1f}). Measurably more accurate "
        words += f"than it: {len(both)} of these; measurably less: {(below.gain_high < 0).sum()}."
        lines.append(words)
    return _list(
        [*lines, "Being stable is easy: a student at chance is stable too. Being stable and right is not.", claim("j")]
    )


def makes(t4: pd.DataFrame, draws: pd.DataFrame, questions: pd.DataFrame, collapse: pd.DataFrame) -> Words:
    """Of the ablations: T4, F2, F3, the collapse check."""
    lines = [line[2:] for line in students(t4).split("\n")[:-1]]
    return _list([*lines, *_curves(draws, questions, collapse, 0.25), claim("efghi")])


def scale(
    t7: pd.DataFrame,
    t8: pd.DataFrame,
    t9: pd.DataFrame,
    alone: pd.DataFrame,
    questions: pd.DataFrame,
    draws: pd.DataFrame,
    collapse: pd.DataFrame,
) -> Words:
    """Of whole training sets: T7, the differences of T8 and T9, T9_alone, F3, F2 and the collapse check at that size."""
    lines = [_whole(str(task), own) for task, own in t7[t7.task != "all"].groupby("task", sort=False)]
    lines += [*_one_for_all(t8, "T8"), *_one_for_all(t9, "T9")]
    beside = "; ".join(f"{title(str(row.task))} {_points(row, 'together')}" for _, row in alone.iterrows())
    lines.append(f"**Together or alone** (T9): the one student minus the one of each task: {beside}." if beside else "")
    return _list([*lines, *_curves(draws, questions, collapse, 1 / 3), claim("eghk")])


def _curves(draws: pd.DataFrame, questions: pd.DataFrame, collapse: pd.DataFrame, chance: float) -> list[str]:
    few, many = questions.sort_values("n_train").iloc[[0, -1]].itertuples()
    first, last = draws[draws.draws > 0].sort_values("draws").iloc[[0, -1]].itertuples()
    exact = draws[draws.draws == 0].accuracy
    words = f"; exact targets {100 * exact.iloc[0]:.1f}" if len(exact) else ""
    stuck = (collapse.accuracy < chance + 0.02).sum()
    return [
        f"**Questions** (F3): {few.n_train:,g} teach {100 * few.accuracy:.1f}, {many.n_train:,g} teach "
        f"{100 * many.accuracy:.1f}.",
        f"**Draws** (F2): {first.draws:g} sampled decision a question teaches {100 * first.accuracy:.1f}, "
        f"{last.draws:g} teach {100 * last.accuracy:.1f}{words}.",
        f"**Collapse**: {stuck} of {len(collapse)} settings of the joint head, distilled, stay at chance; the best reaches "
        f"{_points(collapse.loc[collapse.accuracy.idxmax()], 'accuracy')}.",
    ]


def _whole(task: str, own: pd.DataFrame) -> str:
    """Of one task of T7."""
    biased, averaged = (own[own.method == name].iloc[0] for name in (BIASED, debias.DEBIASED))
    pupils = own[(own.kind == "student") & ~(own.n_train > 0)]  # taught by all questions, or by none
    words = f"**{title(task)}, whole test set** (T7): the biased teacher is right on {_points(biased, 'accuracy')} of 100"
    words += f" questions; its average over all orders gains {_points(averaged, 'gain')}, the student"
    for method, greedy, name in (
        (DISTILLATION, False, "alone"),
        (STACKED, True, "with the teacher's most probable decision"),
        (STACKED, False, "with a sampled one"),
        (STACKED_WHITE_BOX, False, "with its probabilities"),
        (UNTRAINED, False, "an untaught encoder"),
    ):
        rows = pupils[(pupils.method == method) & (pupils.greedy == greedy)]
        words += f" {_points(rows.iloc[0], 'gain')} {name}," if len(rows) else ""
    return f"{words[:-1]}."


def _one_for_all(gaps: pd.DataFrame, table: str) -> list[str]:
    taught = gaps[gaps.taught_on.notna()]
    lines: list[str] = []
    if taught.empty:
        return lines
    for name, rivals in (
        ("the same encoder untaught", taught.rival_method == UNTRAINED),
        ("the biased teacher", taught.rival_method == BIASED),
    ):
        own = taught[rivals]
        tasks = [title(task).replace("_", " ") for task in own.tasks]
        by_task = "; ".join(
            f"{task} {_points(row, 'difference')}" for task, (_, row) in zip(tasks, own.iterrows(), strict=True)
        )
        lines.append(f"**One student for all** ({table}), taught on {taught.taught_on.iloc[0]}, against {name}: {by_task}.")
    return lines


def cost(p1: pd.DataFrame, costs: pd.DataFrame) -> Words:
    """Of P1 (:func:`permdistill.paper.bench.table`) and P2 (:func:`permdistill.paper.cost.table`)."""
    lines = []
    for (model, workload), own in p1.groupby(["model", "workload"], sort=False):
        by = own.set_index("arm").ratio
        ours = by["forest" if "forest" in by else "trie"]  # what scoring does
        lines.append(
            f"**{model}, {workload}**: with shared prefixes all orders take {ours / by['one order']:.2g} times as long as "
            f"one order; padded batches take {by['padded'] / ours:.3g} times, a trie for each question {1 / ours:.3g} times "
            "the forest's time."
        )
    students = costs[costs.kind == "student"]
    fast, slow = students.loc[students.seconds.idxmin()], students.loc[students.seconds.idxmax()]
    lines.append(
        f"A student without a call answers {slow['times all orders']:.0f} ({slow.encoder}, {head_title(slow['head'])}) to "
        f"{fast['times all orders']:,.0f} times ({fast.encoder}, {head_title(fast['head'])}) as many questions a second as "
        "the first teacher does in all orders, one by one."
    )
    return _list([*lines, "The paper says what it takes in calls, K! against 1; seconds are ours."])


def verdicts(table: pd.DataFrame) -> Words:
    """Of C1 (:func:`permdistill.paper.claims.verdicts`): which claims hold, by verdict."""
    lines = []
    for letter, own in table.groupby(table.claim.str[:3], sort=False):
        by = {v: ", ".join(dict.fromkeys(rows.teacher)) for v, rows in own.groupby("verdict", sort=False)}
        text = str(own.claim.iloc[0])[4:]
        lines.append(f"**{letter}** {text}: " + "; ".join(f"**{verdict}** for {who}" for verdict, who in by.items()))
    counts = table.groupby("verdict").size()
    together = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
    return _list([*lines, f"Together, of {len(table)} verdicts, one for a claim and a teacher: {together}."])


def own(table: pd.DataFrame) -> Words:
    """Of a student of one's own questions, beside the untrained encoder (:func:`permdistill.paper.tables.students`)."""
    if "accuracy" not in table or table.accuracy.isna().all():
        return _list(["Without gold answers nothing can be said about accuracy: look at ps, and at held-out KL in the log."])
    whole = _all(table)
    n, taught = int(whole.n.iloc[0]), whole[whole.method == DISTILLATION].iloc[-1]
    lines = [
        f"On {n} test questions: biased teacher {_points(whole.iloc[0], 'accuracy')}, student {_points(taught, 'accuracy')}."
    ]
    if (whole.method == UNTRAINED).any():
        before = whole[whole.method == UNTRAINED].iloc[-1]
        lines[0] = lines[0][:-1] + f", the same encoder untrained {_points(before, 'accuracy')}."
        if before.accuracy_high >= taught.accuracy_low:
            lines.append(
                "Intervals of the trained and the untrained one overlap: these questions do not show that teaching helped."
            )
    lines.append(
        "So few questions show that everything runs, not how good a student is: give a few hundred." if n < 100 else ""
    )
    return _list(lines)


def api(draws: pd.DataFrame, table: pd.DataFrame) -> Words:
    """Of histograms of decisions (:func:`permdistill.paper.tables.draws`) and students taught by them."""
    histograms = draws[draws.draws.notna()]
    lines = []
    if "kl" in histograms:
        first, last = histograms.iloc[0], histograms.iloc[-1]
        lines.append(
            f"From {first.draws:g} to {last.draws:g} decisions a question, KL to the average over all orders falls from "
            f"{first.kl:.2f} to {last.kl:.2f} nats; decisions drawn from the model's own probabilities give "
            f"{last.kl_drawn_from_white_box:.2f}."
        )
    whole = _all(table)
    if "accuracy" in whole:
        copy, n = whole[whole.kind == "copy"].iloc[0], int(whole.n.iloc[0])
        found = [f"{s.method} {_points(s, 'accuracy')}" for _, s in whole[whole.kind == "student"].iterrows()]
        lines.append(f"On {n} test questions: the one decision, copied, {_points(copy, 'accuracy')}; {'; '.join(found)}.")
        lines.append("So few questions show that everything runs, not how good a student is." if n < 100 else "")
    return _list([*lines, claim("fg")])
