"""Pages that stand alone: templates in ``web/`` with their data, style and plain JavaScript inside; they load nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from permdistill.debias import decide, prior_weights
from permdistill.measure import metrics
from permdistill.measure.records import Block
from permdistill.orders import to_positions

UNIT = 10**5  # probabilities are written as whole numbers of 1 / UNIT, as grid.js reads them; -1 where a verdict failed
_UNSAFE = {"<": "\\u003c", "\u2028": "\\u2028", "\u2029": "\\u2029"}  # would end a script, open a comment, or end a line


def embedded(data: Any) -> str:
    """JSON that may stand in a ``<script>``, whatever its strings hold. Raises ValueError for NaN."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = re.sub("[<\u2028\u2029]", lambda found: _UNSAFE[found[0]], text)
    return text.encode("utf-8", "backslashreplace").decode()  # half a character, as JSON writes it


def filled(template: str | Path, **parts: str) -> str:
    """A template, of ``web/`` or of a path, {{look}}, {{grid}} and each {{name}} of ``parts`` filled in (HTML already)."""
    web = files("permdistill.measure") / "web"
    own = {"look": "look.css", "grid": "grid.js"}
    source = template if isinstance(template, Path) else web / template

    def part(found: re.Match[str]) -> str:
        return parts[found[1]] if found[1] in parts else (web / own[found[1]]).read_text(encoding="utf-8")

    text = re.sub(r"\{\{(\w+)\}\}", part, source.read_text(encoding="utf-8"))
    return text.encode("utf-8", "backslashreplace").decode()  # half a character, as in a file's name that is no UTF-8


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", plain: bool = True) -> str:
    """An HTML table whose rows begin with a heading; ``plain``: the cells are text, else HTML already."""
    shown = escape if plain else str
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{shown(first)}</th>{"".join(f"<td>{shown(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    said = f'<p class="quiet">{escape(caption)}</p>' if caption else ""
    return f'{said}<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


@dataclass(frozen=True)
class Shown:
    """What a page says of an item beside its numbers; all of it may be empty."""

    id: str
    question: str = ""
    texts: Sequence[str] = ()
    context: str = ""
    task: str = ""


@dataclass
class Cells:
    """Items as the pages' JSON: ``sets`` of orders and the ``items`` that came in them."""

    sets: list[dict[str, Any]] = field(default_factory=list)
    items: list[dict[str, Any]] = field(default_factory=list)
    known: dict[tuple[tuple[int, ...], ...], int] = field(default_factory=dict)

    def add(self, block: Block, shown: Sequence[Shown], students: Mapping[str, np.ndarray] | None = None) -> None:
        """Add a block's items, described by ``shown``; ``students``: {name: P (item, order, option)}."""
        for i, about in enumerate(shown):
            own = [student[i] for student in (students or {}).values()]
            self.items.append(
                {"set": self._set(block.orders[i]), **vars(about), "texts": list(about.texts)}
                | _numbers(block.P[i], block.orders[i], int(block.answers[i]))
                | {"students": [_whole(P) for P in own]}
            )

    def _set(self, orders: np.ndarray) -> int:
        key = tuple(map(tuple, orders.tolist()))
        if key not in self.known:
            self.known[key] = len(self.sets)
            shuffled = np.random.default_rng(0).permutation(len(orders)).tolist()
            self.sets.append({"orders": orders.tolist(), "sequence": shuffled, "weights": None})
        return self.known[key]

    def weigh(self, P: np.ndarray, orders: np.ndarray) -> None:
        """Give ``orders`` (order, K) the prior-matching weights of P (item, order, option), where there are any."""
        try:
            weights = prior_weights(to_positions(P, orders).reshape(-1, P.shape[2])).tolist()
        except ValueError:
            weights = None
        self.sets[self._set(orders)]["weights"] = weights


def _whole(P: np.ndarray) -> list[int]:
    return np.where(np.isnan(P), -1, np.rint(UNIT * np.nan_to_num(P))).astype(int).ravel().tolist()


def _numbers(P: np.ndarray, orders: np.ndarray, answer: int) -> dict[str, Any]:
    """One item's numbers: P (order, option), NaN where a verdict failed; answer -1: none.

    p, wins    by order: probabilities, and the most probable options as bits
    ps, winners, lean   sensitivity (TV), number of different winners, and the position that wins most orders (-1: none)
    right, average      credit of the orders, and of their average, for the answer
    """
    k, valid = P.shape[1], ~np.isnan(P[:, 0])
    wins, found = np.zeros(len(P), dtype=int), {"ps": 0.0, "winners": 0, "lean": -1, "right": 0.0, "average": 0.0}
    if valid.any():
        D = decide(P[valid][None])[0]
        wins[valid] = (D > 0) @ (1 << np.arange(k))
        clear = D.max(axis=1) == 1
        seats = to_positions(D[clear][None], orders[valid][clear])[0].sum(axis=0)
        best = np.flatnonzero(seats == seats.max())
        found |= {"winners": len(set(D[clear].argmax(axis=1))), "lean": int(best[0]) if len(best) == 1 else -1}
        if valid.sum() > 1:
            found["ps"] = float(metrics.permutation_sensitivity(P[valid][None])[0])
        if answer >= 0:
            mean = decide(P[valid].mean(axis=0)[None, None])[0, 0]
            found |= {"right": float(D[:, answer].mean()), "average": float(mean[answer])}
    return {"options": k, "answer": answer, "p": _whole(P), "wins": wins.tolist()} | found
