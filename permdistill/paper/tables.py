"""The paper's tables: systems -> measured rows -> CSV, LaTeX, and what people are shown.

A table is a pandas DataFrame in long form with plain numbers (shares, not points): for each metric ``m`` the columns
``m``, ``m_low``, ``m_high``. :func:`pretty` makes points with intervals of it, for people.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from permdistill import catalogue, debias
from permdistill.api.jobs import Drawn
from permdistill.files import write_text
from permdistill.measure import metrics
from permdistill.measure.evaluate import HEADLINE, METRICS, correct, in_points, measure
from permdistill.paper.experiments import Scored, System
from permdistill.paper.systems import described_rows, titled
from permdistill.paper.tasks import SEED, TaskSplit
from permdistill.prompts import LOW_MASS
from permdistill.questions import Question

BIASED_ORIGINAL, BIASED, DEBIASED = "biased, original order", "biased, mean over orders", debias.DEBIASED


def _averaged(s: Scored) -> np.ndarray:
    """The debiased teacher's probabilities, the same in every order."""
    return debias.broadcast(debias.permutation_average(s.P), len(s.orders))


def teachers(scored: Iterable[Scored]) -> pd.DataFrame:
    """T1: one row per teacher, task and treatment; ``gain`` is paired with the mean over orders of the biased teacher."""
    rows = []
    for s in scored:
        baseline = correct(s.P, s.task.questions)
        treatments = {
            BIASED: s.P,
            debias.PRIOR_MATCHING: debias.prior_matching(s.P, s.orders),
            debias.CONTEXT_PRIOR_MATCHING: debias.context_prior_matching(s.P, s.orders),
            DEBIASED: _averaged(s),
        }
        measured = {
            name: measure(P, s.orders, s.task.questions, s.task.groups, None if name == BIASED else baseline)
            for name, P in treatments.items()
        }
        # The original order alone has its own accuracy; sensitivity and positional bias are those of the biased teacher.
        alone = measure(s.P[:, :1], s.orders[:1], s.task.questions, s.task.groups, names=["accuracy"])
        measured = {BIASED_ORIGINAL: measured[BIASED] | alone, **measured}
        about = {"teacher": s.teacher, "task": s.task.name, "label_mass": s.label_mass}
        rows += [{**about, "treatment": name, **row} for name, row in measured.items()]
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """T1 with one row per teacher and task, for people: accuracies in points, gain and ps with their intervals; without gold
    answers ps alone."""
    shown = {BIASED: "biased", debias.PRIOR_MATCHING: "prior-matching", debias.CONTEXT_PRIOR_MATCHING: "context prior-m."}
    shown[DEBIASED] = "all orders"
    by = table.set_index(["teacher", "task", "treatment"])
    rows = []
    for teacher, task in table[["teacher", "task"]].drop_duplicates().itertuples(index=False):
        biased, debiased = by.loc[(teacher, task, BIASED)], by.loc[(teacher, task, DEBIASED)]
        row = {"teacher": teacher, "task": task, "n": int(biased.n)}
        for treatment, name in shown.items() if "accuracy" in table else ():
            row[name] = f"{100 * by.loc[(teacher, task, treatment)].accuracy:.1f}"
        for column, cell, name in (("gain", debiased, "gain"), ("ps (TV), biased", biased, "ps")):
            if name in table:
                row[column] = metrics.Interval(cell[name], cell[f"{name}_low"], cell[f"{name}_high"]).percent()
        mass = float(biased.label_mass)
        fix = " (the model wants to say something else: try another template, template_args or variants)" * (mass < LOW_MASS)
        rows.append(row | ({"label mass": f"{mass:.2f}{fix}"} if mass == mass else {}))
    return pd.DataFrame(rows)


def every_debiaser(
    P: np.ndarray,
    orders: np.ndarray,
    questions: Sequence[Question],
    groups: Sequence[str],
    content_free: np.ndarray | None = None,
    names: Sequence[str] = HEADLINE,
) -> pd.DataFrame:
    """One row per debiaser: ``calls`` a question, metrics (see :func:`measure`), ``gain`` paired with the biased teacher.

    Methods that need what is not there (all orders, rotations, content-free input) are left out.
    """
    rows, baseline = [], correct(P, questions)
    for method in catalogue.debiasers(orders.shape[1]):
        if not method.fits(orders) or (content_free is None and method.name == debias.CALIBRATION):
            continue
        answers = method.answer(P, orders, content_free, np.random.default_rng(SEED))
        row = measure(answers, orders, questions, groups, None if method.name == debias.BIASED else baseline, names)
        rows.append(
            {
                "debiaser": method.name,
                "family": method.family or method.name,
                "calls": method.calls(orders.shape[1]),
                **row,
                "source": method.source,
            }
        )
    return pd.DataFrame(rows)


def debiasers(scored: Iterable[Scored]) -> pd.DataFrame:
    """:func:`every_debiaser` on every teacher and task."""
    parts = []
    for s in scored:
        part = every_debiaser(s.P, s.orders, s.task.questions, s.task.groups, s.content_free)
        part.insert(0, "teacher", s.teacher)
        part.insert(1, "task", s.task.name)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def field(scored: Iterable[Scored]) -> pd.DataFrame:
    """Every metric of the field, for each teacher and task, biased and averaged over all orders."""
    rows = []
    for s in scored:
        for treatment, P in ((BIASED, s.P), (DEBIASED, _averaged(s))):
            row = measure(P, s.orders, s.task.questions, s.task.groups, names=list(METRICS))
            rows.append({"teacher": s.teacher, "task": s.task.name, "treatment": treatment, **row})
    return pd.DataFrame(rows)


def decisions(scored: Iterable[Scored]) -> pd.DataFrame:
    """McNemar's test of the all-orders average against the original order alone: questions that only one of them answers
    right (a tie for the most probable option counts as wrong), and the exact p-value. For pairs of one document, which are
    not independent, p is too small."""
    rows = []
    for s in scored:
        right = [correct(P[:, :1], s.task.questions) == 1 for P in (s.P, _averaged(s))]
        labelled = np.array([q.answer is not None for q in s.task.questions])
        test = metrics.mcnemar(right[0][labelled], right[1][labelled])
        row = {"only original right": test.only_a, "only average right": test.only_b, "p": f"{test.p:.2g}"}
        rows.append({"teacher": s.teacher, "task": s.task.name, "n": int(labelled.sum()), **row})
    return pd.DataFrame(rows)


def prompts(scored: Iterable[Sequence[Scored]]) -> pd.DataFrame:
    """Sensitivity to the prompt beside the sensitivity to the order. ``scored``: for each task the same questions in several
    templates.

    One row per task and template, with accuracy and ps, and one for all templates of the task together, whose ps is the
    sensitivity to the prompt: the same formula with prompts for orders, of the biased answers (the mean over orders of what
    each order says) and of the all-orders averages. Probabilities are those of options, so other label words compare.
    """
    rows = []
    for several in scored:
        task = several[0].task
        for s in several:
            key = {"teacher": s.teacher, "task": task.name, "prompt": s.task.template.name}
            baseline = correct(s.P, task.questions)
            for treatment, P in ((BIASED, s.P), (DEBIASED, _averaged(s))):
                row = measure(P, s.orders, task.questions, task.groups, None if P is s.P else baseline, ["accuracy", "ps"])
                rows.append({**key, "treatment": treatment, **row})
        stacked = np.stack([s.P for s in several], axis=1)  # (item, prompt, order, option)
        by_order = [metrics.permutation_sensitivity(stacked[:, :, j]) for j in range(stacked.shape[2])]
        across = {BIASED: np.mean(by_order, axis=0), DEBIASED: metrics.permutation_sensitivity(stacked.mean(axis=2))}
        for treatment, values in across.items():
            interval = metrics.bootstrap(values, task.groups)
            rows.append(
                {"teacher": several[0].teacher, "task": task.name, "prompt": "between prompts", "treatment": treatment}
                | {"n": len(values), "ps": interval.value, "ps_low": interval.low, "ps_high": interval.high}
            )
    return pd.DataFrame(rows)


def left_out(tasks: Iterable[TaskSplit]) -> pd.DataFrame:
    """How many questions each task has, with gold answer, and how many were left out of its split and why."""
    rows = []
    for t in tasks:
        row = {"task": t.name, "questions": len(t.questions)}
        row |= {"with gold answer": sum(q.answer is not None for q in t.questions)}
        why = ", ".join(f"{n} {reason}" for reason, n in t.left_out.items())
        rows.append(row | {"left out before sampling": why or "none"})
    return pd.DataFrame(rows)


def losses(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of T1 in which debiasing does *not* raise accuracy: what a reader must not miss."""
    gain = table.get("gain", pd.Series(np.nan, index=table.index))
    return table[(table.treatment == DEBIASED) & ~(gain > 0)]


def students(test: Scored, systems: Sequence[System]) -> pd.DataFrame:
    """T2 and T3: :func:`answers` of students beside those of their teacher, whom a column names."""
    table = answers(test.task, systems)
    table.insert(0, "teacher", test.teacher)
    return table


def answers(task: TaskSplit, systems: Sequence[System]) -> pd.DataFrame:
    """One row per system and task, and per system over all tasks together; what a system is stands in the columns of
    :class:`permdistill.paper.systems.Description`. ``gain`` is paired with the first of ``systems``, the biased teacher.
    Systems of the same description are seeds of one student, and share a row."""
    rows = []
    by_what = {system.what: [s for s in systems if s.what == system.what] for system in systems}
    members = np.array(task.members)
    baseline = correct(systems[0].P, task.questions)
    for name in dict.fromkeys([*task.members, "all"]):
        chosen = np.flatnonzero(members == name) if name != "all" else np.arange(len(members))
        questions, groups = [task.questions[i] for i in chosen], [task.groups[i] for i in chosen]
        for what, seeds in by_what.items():
            compared = None if seeds[0] is systems[0] else baseline[chosen]
            row = measure([s.P[chosen] for s in seeds], seeds[0].orders, questions, groups, compared)
            millions = np.nan if seeds[0].parameters is None else seeds[0].parameters / 1e6
            key = {"task": name, **asdict(what), "parameters_millions": millions}
            rows.append({**key, "seeds": len(seeds) if what.kind == "student" else np.nan, **row})
    return described_rows(rows)


def draws(said: Drawn, task: TaskSplit, P: np.ndarray | None = None) -> pd.DataFrame:
    """F2's experiment: how far the first 1, 2, 4, .. decisions of each question get, and where more of them lead.

    said  decisions on the questions of ``task``, each in an order of its own
    P     (item, order, option) the same teacher's probabilities in all orders, if anybody can see them; their average is
          what the histograms converge to. Adds, for each number of decisions: mean KL(histogram || average) in nats, the
          same for histograms drawn from P itself (mean of 32), and how many histograms lie inside the binomial 99% interval
          of the average (:func:`permdistill.measure.metrics.inside_binomial`); last, a row for the average

    Questions without a decision among the first so many are left out of that row.
    """
    rows = []
    for n in [2**i for i in range(said.decisions.shape[1].bit_length())]:
        counts = Drawn(said.orders[:, :n], said.decisions[:, :n]).counts
        some = counts.sum(axis=1) > 0
        counts, part = counts[some], task.where(some)
        histogram = counts / counts.sum(axis=1, keepdims=True)
        row = {"answer": f"histogram of {n} decision{'s' * (n > 1)}", "draws": n}
        row |= measure(histogram[:, None], np.arange(task.k)[None], part.questions, part.groups, names=["accuracy"])
        if P is not None:
            average = debias.permutation_average(P[some])
            own = (debias.black_box_targets(P[some], n, np.random.default_rng((SEED, i))) for i in range(32))
            row["kl"] = metrics.kl_divergence(histogram, average).mean()
            row["kl_drawn_from_white_box"] = np.mean([metrics.kl_divergence(h, average).mean() for h in own])
            row["inside_99"] = metrics.inside_binomial(counts, average).mean()
        rows.append(row)
    if P is not None:
        average = debias.permutation_average(P)[:, None]
        row = measure(average, np.arange(task.k)[None], task.questions, task.groups, names=["accuracy"])
        rows.append({"answer": "white-box average over all orders", "kl": 0.0, **row})
    return pd.DataFrame(rows)


def better_than_teacher(table: pd.DataFrame) -> pd.DataFrame:
    """Students whose gain over the biased teacher, over all tasks, has its whole interval above 0."""
    return table[(table.task == "all") & (table.kind == "student") & (table.gain_low > 0)]


def worse_than_teacher(table: pd.DataFrame) -> pd.DataFrame:
    """Students whose gain over the biased teacher, over all tasks, has its whole interval below 0."""
    return table[(table.task == "all") & (table.kind == "student") & (table.gain_high < 0)]


def less_sensitive(table: pd.DataFrame) -> pd.DataFrame:
    """Per task: ps of the biased teacher, the students' median, and how many of them lie below the teacher."""
    rows = []
    for task, part in table.groupby("task", sort=False):
        teacher, students = part[part.kind == "teacher"].ps.iloc[0], part[part.kind == "student"].ps
        row = {"task": task, "ps of teacher": teacher, "median ps of students": students.median()}
        rows.append({**row, "below teacher": f"{(students < teacher).sum()} of {len(students)}"})
    return pd.DataFrame(rows).round(3)


def read(folder: str | Path, *names: str) -> pd.DataFrame:
    """Tables that :func:`save` wrote, one below the other; "all" tasks of several tables are told apart by the table's name.

    Raises FileNotFoundError that says what to run first.
    """
    frames = []
    for name in names:
        path = Path(folder) / f"{name}.csv"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: run the notebook that writes table {name} first, with this profile")
        frame, whole = pd.read_csv(path), f"all of {name.split('_')[0]}" if len(names) > 1 else "all"
        frames.append(frame.assign(task=frame.task.replace("all", whole)))
    return pd.concat(frames, ignore_index=True)


def pretty(frame: pd.DataFrame) -> pd.DataFrame:
    """Titles for systems, shares -> "68.3 [66.1, 70.2]" in points; KL in nats with three digits. Columns without values
    are dropped."""
    frame = titled(frame)
    shown = {f"{name}{part}" for name in METRICS for part in ("", "_low", "_high")}
    keys = [c for c in frame if c not in shown and (frame.empty or frame[c].notna().any())]
    out = frame[keys].copy()
    if "parameters_millions" in out:
        out["parameters_millions"] = [f"{m:.1f}" if m == m else "" for m in frame.parameters_millions]
    for name in ("seeds", "n"):
        if name in out and (name == "seeds" or frame[name].dtype == float):  # n is a whole number where no row lacks it
            out[name] = [f"{n:.0f}" if n == n else "" for n in frame[name]]
    if "label_mass" in out:
        out["label_mass"] = [f"{mass:.2f}" if mass == mass else "" for mass in frame.label_mass]
    return out.assign(**in_points(frame))


def wide(frame: pd.DataFrame, index: Sequence[str], column: str, value: str = "difference") -> pd.DataFrame:
    """One metric alone, for people: a row for each of ``index``, a column for each value of ``column``."""
    frame = titled(frame)
    shown = frame.assign(text=pretty(frame[[value, f"{value}_low", f"{value}_high"]]).iloc[:, 0])
    keys = list(dict.fromkeys(shown[list(index)].itertuples(index=False, name=None)))
    by = shown.pivot(index=list(index), columns=column, values="text")[list(dict.fromkeys(frame[column]))]
    return by.reindex(keys if len(index) > 1 else [key[0] for key in keys]).fillna("").reset_index()


def save(frame: pd.DataFrame, folder: str | Path, name: str) -> Path:
    """Write ``name.csv`` (plain numbers) and ``name.tex`` (:func:`pretty`, booktabs) into ``folder``/tables."""
    folder = Path(folder) / "tables"
    write_text(folder / f"{name}.csv", frame.to_csv(index=False, float_format="%.6f"))
    write_text(folder / f"{name}.tex", pretty(frame).to_latex(index=False, escape=True))
    return folder / f"{name}.csv"


def markdown(shown: pd.DataFrame) -> str:
    """A Markdown table."""
    cells = shown.astype(object).fillna("")
    lines = [list(cells.columns), ["---"] * cells.shape[1], *cells.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
