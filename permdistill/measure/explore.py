"""The explorer: every order of every question as one page, for a notebook or a browser, with nothing to install."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from permdistill.debias import broadcast, check_orders, check_scores
from permdistill.files import write_text
from permdistill.measure.page import Cells, Shown, embedded, filled
from permdistill.measure.records import Block
from permdistill.orders import LETTERS, all_orders
from permdistill.questions import Question


@dataclass(frozen=True)
class Explorer:
    """What :func:`explore` made. The last line of a notebook's cell shows it; :meth:`save` writes it for a browser.

    page   the whole page, HTML that loads nothing
    about  what is in it, in a line
    """

    page: str
    about: str

    def save(self, path: str | Path) -> Path:
        """Write the page to ``path``; gives the path."""
        write_text(Path(path), self.page)
        return Path(path)

    def _repr_html_(self) -> str:
        """The page in a frame of its own. A notebook that is not trusted drops the frame and keeps the line before it."""
        hint = "Nothing below? Trust this notebook, or write the page with <code>.save(&quot;explore.html&quot;)</code>."
        frame = f'<iframe title="explorer of all orders" sandbox="allow-scripts" srcdoc="{escape(self.page)}"'
        style = 'style="width: 100%; height: 860px; border: 1px solid #9993"'
        return f"<p>{escape(self.about)} <small>{hint}</small></p>{frame} {style}></iframe>"

    def __repr__(self) -> str:
        return f'{self.about} .save("explore.html") writes it for a browser.'


def explore(
    scored: Any,
    students: Mapping[str, np.ndarray] | None = None,
    *,
    questions: Sequence[Question] | None = None,
    orders: np.ndarray | None = None,
    tasks: Sequence[str] | None = None,
    title: str = "",
    note: str = "",
) -> Explorer:
    """Every order of every question, to click through: which answers move, where the judge leans, what averaging does.

    scored     probabilities (item, order, option), with their ``questions``; or an object that has both, as the paper's
               ``Scored`` (P, orders, task)
    students   {name: probabilities (item, order, option), or (item, option) where no order matters}
    questions  of the items, with or without gold answers
    orders     (order, K); default: all K!
    tasks      per item, the name to filter by
    title, note    heading, and last line (whose questions these are, under which licence)

    Raises ValueError where the numbers do not fit together.
    """
    task = getattr(scored, "task", None)
    labels = list(LETTERS)
    if task is not None:
        questions, tasks = questions or task.questions, tasks or task.members
        orders = scored.orders if orders is None else orders
        labels = [label.strip() for label in task.template.labels]
        title = title or f"{scored.teacher} on {task.name}: every order"
    P = np.asarray(scored if task is None else scored.P, dtype=float)
    questions = questions or ()
    if P.ndim != 3 or not len(P) or len(questions) != len(P) or len(tasks or questions) != len(P):
        raise ValueError(
            f"scores of shape {P.shape}, {len(questions)} questions: give (item, order, option), a question an item"
        )
    if wrong := [q.id for q in questions if len(q.options) != P.shape[2]]:
        raise ValueError(f"scores of {P.shape[2]} options: {wrong[0]!r} and {len(wrong) - 1} more questions have others")
    P, orders = check_orders(P, all_orders(P.shape[2]) if orders is None else orders)
    known = {name: _like(P, name, student) for name, student in (students or {}).items()}
    members = tasks or [""] * len(P)
    shown = [Shown(q.id, q.question, q.options, q.context, task) for q, task in zip(questions, members, strict=True)]
    answers, cells = np.array([-1 if q.answer is None else q.answer for q in questions]), Cells()
    cells.add(Block(np.arange(len(P)), np.broadcast_to(orders, (len(P), *orders.shape)), P, answers), shown, known)
    cells.weigh(P, orders)
    about = f"{len(P)} question{'s' * (len(P) > 1)} of {P.shape[2]} options, each in {P.shape[1]} orders."
    data: dict[str, Any] = {"about": about, "note": note, "labels": labels, "students": list(known)}
    data |= {"sets": cells.sets, "items": cells.items}
    title = escape(title or "Every order of every question")
    return Explorer(filled("explore.html", title=title, data=embedded(data)), about)


def _like(P: np.ndarray, name: str, student: np.ndarray) -> np.ndarray:
    """A student's scores in the shape of the teacher's. Raises ValueError where they do not fit."""
    own = check_scores(broadcast(student, P.shape[1]) if np.ndim(student) == 2 else student)
    if own.shape != P.shape:
        raise ValueError(f"student {name!r}: scores of shape {np.shape(student)}, the teacher's are {P.shape}")
    return own
