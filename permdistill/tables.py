"""The paper's tables: systems -> measured rows -> CSV, LaTeX, and what a notebook or the README shows.

A table is a pandas DataFrame in long form with plain numbers (shares, not points): for each metric ``m`` the columns
``m``, ``m_low``, ``m_high``. :func:`pretty` makes points with intervals of it, for people.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from permdistill import debias, metrics
from permdistill.data import Question
from permdistill.experiments import Scored, System
from permdistill.orders import all_orders
from permdistill.profiles import Task

METRICS = {
    "accuracy": "accuracy",
    "gain": "gain over biased",
    "ps": "ps (TV)",
    "ps_kl": "ps (KL, nats)",
    "pb": "pb (TV)",
}
BIASED_ORIGINAL, BIASED, DEBIASED = "biased, original order", "biased, mean over orders", "all-orders average"


def correct(P: np.ndarray, questions: Sequence[Question]) -> np.ndarray:
    """Accuracy per item over its orders, NaN where there is no gold answer (tied human scores): (item,)."""
    labelled = np.array([q.answer is not None for q in questions])
    result = np.full(len(questions), np.nan)
    result[labelled] = metrics.accuracy(P[labelled], [q.answer for q in questions if q.answer is not None])
    return result


def measure(
    P: np.ndarray,
    orders: np.ndarray,
    questions: Sequence[Question],
    groups: Sequence[str],
    baseline: np.ndarray | None = None,
) -> dict[str, float]:
    """Every metric of one system on one task, with 95% bootstrap intervals; pb only where the orders are balanced.

    P         (item, order, option), the system's probabilities
    orders    (order, K)
    groups    per item, what is resampled together (its document)
    baseline  per item, the accuracy of the system to compare with (see :func:`correct`): adds the paired ``gain``
    """
    right = correct(P, questions)
    labelled, unit = ~np.isnan(right), np.asarray(groups)
    row: dict[str, float] = {"n": int(labelled.sum())}

    def add(name: str, interval: metrics.Interval) -> None:
        row.update({name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high})

    add("accuracy", metrics.bootstrap(right[labelled], unit[labelled]))
    if baseline is not None:
        add("gain", metrics.bootstrap((right - baseline)[labelled], unit[labelled]))
    add("ps", metrics.bootstrap(metrics.permutation_sensitivity(P), unit))
    add("ps_kl", metrics.bootstrap(metrics.permutation_sensitivity(P, "kl"), unit))
    if (orders.sum(axis=0) == orders.sum() / orders.shape[1]).all():  # each option equally often at each position
        add("pb", metrics.bootstrap(metrics.position_marginals(P, orders), unit, statistic=metrics.from_uniform))
    return row


def teachers(scored: Iterable[Scored]) -> pd.DataFrame:
    """T1: one row per teacher, task and treatment."""
    rows = []
    for s in scored:
        orders = all_orders(s.P.shape[2])
        baseline = correct(s.P, s.task.questions)
        averaged = debias.broadcast(debias.permutation_average(s.P), len(orders))
        for treatment, P in ((BIASED, s.P), (DEBIASED, averaged)):
            row = measure(P, orders, s.task.questions, s.task.groups, None if P is s.P else baseline)
            rows.append({"teacher": s.teacher, "task": s.task.name, "treatment": treatment, **row})
        # The original order alone has its own accuracy; sensitivity and positional bias are those of the biased teacher.
        first = correct(s.P[:, :1], s.task.questions)
        labelled = ~np.isnan(first)
        a = metrics.bootstrap(first[labelled], np.asarray(s.task.groups)[labelled])
        alone = rows[-2] | {
            "treatment": BIASED_ORIGINAL,
            "accuracy": a.value,
            "accuracy_low": a.low,
            "accuracy_high": a.high,
        }
        rows.insert(-2, alone)
    return pd.DataFrame(rows)


def left_out(tasks: Iterable[Task]) -> pd.DataFrame:
    """How many questions each task has, with gold answer, and how many were left out of its split and why."""
    rows = [
        {
            "task": t.name,
            "questions": len(t.questions),
            "with gold answer": sum(q.answer is not None for q in t.questions),
            "left out before sampling": ", ".join(f"{n} {reason}" for reason, n in t.left_out.items()) or "none",
        }
        for t in tasks
    ]
    return pd.DataFrame(rows)


def losses(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of T1 in which debiasing does *not* raise accuracy: what a reader must not miss."""
    return table[(table.treatment == DEBIASED) & ~(table.gain > 0)]


def students(test: Scored, systems: Sequence[System]) -> pd.DataFrame:
    """T2 and T3: one row per system and task, and per system over all tasks together. ``gain`` is paired with the biased
    teacher, the first of ``systems``."""
    rows = []
    members = np.array(test.task.members)
    baseline = correct(systems[0].P, test.task.questions)
    for name in dict.fromkeys([*test.task.members, "all"]):
        chosen = np.flatnonzero(members == name) if name != "all" else np.arange(len(members))
        questions = [test.task.questions[i] for i in chosen]
        groups = [test.task.groups[i] for i in chosen]
        for system in systems:
            compared = None if system is systems[0] else baseline[chosen]
            row = measure(system.P[chosen], system.orders, questions, groups, compared)
            millions = np.nan if system.parameters is None else system.parameters / 1e6
            rows.append({"task": name, "system": system.name, "kind": system.kind, "parameters_millions": millions, **row})
    return pd.DataFrame(rows)


def better_than_teacher(table: pd.DataFrame) -> pd.DataFrame:
    """Students whose gain over the biased teacher, over all tasks, has its whole interval above 0."""
    return table[(table.task == "all") & (table.kind == "student") & (table.gain_low > 0)]


def worse_than_teacher(table: pd.DataFrame) -> pd.DataFrame:
    """Students whose gain over the biased teacher, over all tasks, has its whole interval below 0."""
    return table[(table.task == "all") & (table.kind == "student") & (table.gain_high < 0)]


def less_sensitive(systems: pd.DataFrame) -> pd.DataFrame:
    """Per task: ps of the biased teacher, the students' median, and how many of them lie below the teacher."""
    rows = []
    for task, part in systems.groupby("task", sort=False):
        teacher, students = part[part.kind == "teacher"].ps.iloc[0], part[part.kind == "student"].ps
        below = f"{(students < teacher).sum()} of {len(students)}"
        rows.append(
            {"task": task, "ps of teacher": teacher, "median ps of students": students.median(), "below teacher": below}
        )
    return pd.DataFrame(rows).round(3)


def read(folder: str | Path, *names: str) -> pd.DataFrame:
    """Tables that :func:`save` wrote, one below the other; "all" tasks of several tables are told apart by the table's name.

    Raises FileNotFoundError that says what to run first.
    """
    frames = []
    for name in names:
        path = Path(folder) / "tables" / f"{name}.csv"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: run the notebook that writes table {name} first, with this profile")
        frame = pd.read_csv(path)
        frames.append(
            frame.assign(task=frame.task.replace("all", f"all of {name.split('_')[0]}")) if len(names) > 1 else frame
        )
    return pd.concat(frames, ignore_index=True)


def pretty(frame: pd.DataFrame) -> pd.DataFrame:
    """Shares -> "68.3 [66.1, 70.2]" in points; KL stays in nats with three digits. Columns without values are dropped."""
    keys = [c for c in frame if c.split("_low")[0].split("_high")[0] not in METRICS]
    out = frame[keys].copy()
    if "parameters_millions" in out:
        out["parameters_millions"] = [f"{m:.1f}" if m == m else "" for m in frame.parameters_millions]
    for name, title in METRICS.items():
        if name not in frame or frame[name].isna().all():
            continue
        scale, digits = (1, 3) if name == "ps_kl" else (100, 1)
        columns = (name, f"{name}_low", f"{name}_high")
        out[title] = [
            "" if np.isnan(v) else f"{scale * v:z.{digits}f} [{scale * lo:z.{digits}f}, {scale * hi:z.{digits}f}]"
            for v, lo, hi in zip(*(frame[c] for c in columns), strict=True)
        ]
    return out


def save(frame: pd.DataFrame, folder: str | Path, name: str) -> Path:
    """Write ``name.csv`` (plain numbers) and ``name.tex`` (:func:`pretty`, booktabs) into ``folder``/tables."""
    folder = Path(folder) / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / f"{name}.csv", index=False, float_format="%.6f")
    (folder / f"{name}.tex").write_text(pretty(frame).to_latex(index=False, escape=True), encoding="utf-8")
    return folder / f"{name}.csv"


def markdown(frame: pd.DataFrame) -> str:
    """:func:`pretty` as a Markdown table."""
    shown = pretty(frame).astype(object).fillna("")
    lines = [list(shown.columns), ["---"] * shown.shape[1], *shown.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def readme(text: str, folder: str | Path) -> str:
    """The README with its tables drawn from the CSV files in ``folder``; the rest of ``text`` stays as it is.

    A table stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``. The students' tables show the rows over all tasks.
    """
    for name in re.findall(r"<!-- /(\w+) -->", text):
        frame = pd.read_csv(Path(folder) / f"{name}.csv").drop(columns=["kind"], errors="ignore")
        frame = frame[[c for c in frame if not c.startswith(("ps_kl", "pb"))]]
        if "system" in frame:
            frame = frame[frame.task == "all"].drop(columns="task")
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n{markdown(frame)}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":  # python -m permdistill.tables: bring the README's numbers up to date
    root = Path(__file__).parent.parent
    (root / "README.md").write_text(
        readme((root / "README.md").read_text(encoding="utf-8"), root / "figures"), encoding="utf-8"
    )
