"""Tables and sentences as notebooks show them, the same in JupyterLab, on a page and in a terminal.

shown(frame, note) -> Shown      every row and column, no index, each interval on one line; folded(..): closed at first
Words("**bold**")                Markdown
source(scores, students)         what of a table is stored, what is audited and what is live
explorer(scored)                 the most sensitive questions in every order, to click through
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
from transformers.utils import logging

from permdistill.measure import metrics
from permdistill.measure.explore import Explorer, explore
from permdistill.paper import ablations, experiments, tables
from permdistill.paper.experiments import Scored
from permdistill.paper.systems import titled
from permdistill.paper.tasks import TASKS, title

logging.disable_progress_bar()  # of loading weights: seconds, and dead bars in a stored notebook
_INTERVAL = re.compile(r" \[(-?[\d.]+), (-?[\d.]+)\]")
_COMMON = ("model", "teacher", "task", "seeds", "n")  # stands above a table in which it is always the same
_NAMES = {
    "parameters_millions": "parameters (M)",
    "n_train": "training questions",
    "label_mass": "label mass",
    "learning_rate": "learning rate",
}
_NAMES |= {"left out before sampling": "left out", "kl": "KL", "kl_drawn_from_white_box": "KL, drawn from white box"}
_NAMES |= {"inside_99": "inside 99%"}
_SHORT = 22  # letters: a column without a longer cell is never wrapped, others are not squeezed either
_STYLE = [
    {"selector": "", "props": "border-collapse: collapse; font-size: 12px; margin: 4px 0; table-layout: auto; width: auto;"},
    {"selector": "th", "props": "text-align: left; padding: 2px 8px; vertical-align: bottom;"},
    {"selector": "td", "props": "text-align: left; padding: 2px 8px; vertical-align: top;"},
]


EXPLORED = ("arc_easy", "arc_challenge")  # tasks whose licence allows to show their questions, with their source
ATTRIBUTION = "Questions: ARC (Clark et al., 2018), Allen Institute for AI, {}."


class Words(str):
    """Markdown, rendered by a notebook."""

    def _repr_markdown_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Shown:
    """A table for people.

    frame  of text and numbers, whose columns have their titles
    above  what all rows share
    note   below it
    fold   the line that opens the table; "": it is open
    """

    frame: pd.DataFrame
    above: str = ""
    note: str = ""
    fold: str = ""

    def _repr_html_(self) -> str:
        name = sha256(repr(self).encode()).hexdigest()[:8]  # the same table has the same name in every run
        styler = self.frame.style.hide(axis="index").format(_cell, escape="html").set_uuid(name)
        long = self.frame.map(_cell).map(len).max() > _SHORT
        widths = [
            {"selector": f"td.col{i}", "props": "min-width: 14em;" if it else "white-space: nowrap;"}
            for i, it in enumerate(long)
        ]
        styler = styler.set_table_styles([*_STYLE, *widths])
        small = "<div style='font-size: 12px; margin: 4px 0'>{}</div>"
        fold, *around = (escape(text).replace("`", "") for text in (self.fold, self.above, self.note))
        above, note = (small.format(text) if text else "" for text in around)
        table = f"<div style='overflow-x: auto'>{styler.to_html(cell_ids=False)}</div>"  # a wide one scrolls, not the page
        whole = f"{above}{table}{note}" if len(self.frame) else f"{above}<p>None.</p>{note}"
        return f"<details><summary>{fold}</summary>{whole}</details>" if fold else whole

    def __repr__(self) -> str:
        cells = self.frame.map(_cell)
        return "\n".join(part for part in (self.fold or self.above, tables.markdown(cells), self.note) if part)


def _cell(value: object) -> str:
    """Text of a cell: four digits of a number, nothing where there is none, an interval without a break."""
    if isinstance(value, (float, np.floating)):
        return "" if np.isnan(value) else f"{float(f'{value:.4g}'):,g}"
    return "" if value is pd.NA or value is None else _INTERVAL.sub("\u00a0[\\1,\u00a0\\2]", str(value))


def shown(frame: pd.DataFrame, note: str = "", fold: str = "", drop: Sequence[str] = ()) -> Shown:
    """A table of :mod:`permdistill.paper.tables`, or of any text and numbers, without the columns ``drop``. Whatever is the
    same in all rows, such as the teacher, stands above them."""
    if "method" in frame or "rival_method" in frame or "accuracy_low" in frame or "ps_low" in frame:
        frame = tables.pretty(frame)
    frame = titled(frame).drop(columns=[name for name in drop if name in frame])
    if "task" in frame:
        frame = frame.assign(task=["all tasks" if task == "all" else title(task) for task in frame.task])
    common = [c for c in _COMMON if c in frame and len(frame) > 1 and frame[c].astype(str).nunique() == 1]
    above = ", ".join(_common(name, _cell(frame[name].iloc[0])) for name in common)
    return Shown(frame.drop(columns=common).rename(columns=_NAMES), above, note, fold)


def _common(name: str, value: str) -> str:
    words = {"n": f"{value} questions with gold answer", "seeds": f"{value} seed{'s' * (value != '1')}"}
    return words.get(name, f"{name} {value}")


def folded(frame: pd.DataFrame, line: str, note: str = "", drop: Sequence[str] = ()) -> Shown:
    """:func:`shown`, but closed until ``line`` is clicked."""
    return shown(frame, note, fold=line, drop=drop)


def source(scores: str | None = None, students: str = "") -> str:
    """What of a table is stored, audited and live: the teachers' ``scores`` (a notebook's parameter; None: none enter), and
    its ``students``."""
    words = []
    if scores is not None:
        stored = Path(scores or experiments.COMMITTED).resolve() == experiments.COMMITTED.resolve()
        words.append(
            "Scores: stored (scores/); audited: `make paper` computes a random sample anew."
            if stored
            else "Scores: live, computed by this run."
        )
    if students:
        words.append(
            "Students: stored predictions (predictions/); audited: `make paper` trains a small one of each head anew."
            if students == ablations.STORED
            else "Students: live, trained by this run."
        )
    return " ".join(words)


def contents(scored: Sequence[Scored]) -> pd.DataFrame:
    """What scores were read: by teacher, tasks, questions, prompts, and a fingerprint of the probabilities (sha256 over
    six digits of each), so that no score can change without a notebook's showing it."""
    rows = []
    for teacher in dict.fromkeys(s.teacher for s in scored):
        own = [s for s in scored if s.teacher == teacher]
        digest = sha256()
        for s in own:
            digest.update(np.round(1e6 * s.P).astype(np.int32).tobytes())
        row = {"teacher": Path(teacher).name, "tasks": len(own), "questions": sum(len(s.P) for s in own)}
        rows.append(row | {"prompts": sum(s.P[..., 0].size for s in own), "fingerprint": digest.hexdigest()[:12]})
    return pd.DataFrame(rows)


def explorer(scored: Sequence[Scored], n: int = 5) -> Explorer:
    """:func:`permdistill.explore` of the ``n`` questions whose answers depend most on the order (ps): of the first task
    whose licence allows to show them, or of the first one of your own questions."""
    own = [s for s in scored if s.task.name in EXPLORED or s.task.name not in TASKS]
    if not own:
        raise ValueError(f"none of {', '.join(s.task.name for s in scored)} may be shown: give {' or '.join(EXPLORED)}")
    most = np.isin(np.arange(len(own[0].P)), np.argsort(-metrics.permutation_sensitivity(own[0].P), kind="stable")[:n])
    licence = TASKS[own[0].task.name].licence if own[0].task.name in TASKS else ""
    note = ATTRIBUTION.format(licence) if licence else ""
    return explore(replace(own[0], task=own[0].task.where(most), P=own[0].P[most]), note=note)
