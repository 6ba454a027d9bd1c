"""What a system is: the columns by which tables tell systems apart, and the one place that makes titles of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import isinf
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

BIASED, COPY, TWO_ORDERS = "biased", "copy", "two-order average"
DISTILLATION, CORRECTION, WHITE_BOX, UNTRAINED = (
    "distillation",
    "error correction",
    "white-box error correction",
    "untrained",
)
STACKED, STACKED_WHITE_BOX = "stacked error correction", "stacked white-box error correction"


@dataclass(frozen=True)
class Description:
    """What answers. Each field is a column of tables; None where it does not concern the kind.

    kind           teacher | debiased | copy | student
    method         of a student :data:`DISTILLATION`, :data:`CORRECTION`, :data:`WHITE_BOX` or :data:`UNTRAINED`, or, after
                   distillation, :data:`STACKED`, :data:`STACKED_WHITE_BOX`; else what is made of the teacher's answers
    calls          of the teacher that an answer in one order takes
    encoder, head  of a student
    greedy         whether the decision that it sees or copies is the most probable one, not a sampled one
    power, draws, n_train, orders  how it was trained, see :class:`permdistill.paper.profiles.Run`
    taught_on      the data sets, where they are others than those that it answers
    """

    kind: str
    method: str
    calls: int
    encoder: str | None = None
    head: str | None = None
    greedy: bool | None = None
    power: float | None = None
    draws: int | None = None
    n_train: int | None = None
    orders: str | None = None
    taught_on: str | None = None


DESCRIPTION = tuple(field.name for field in fields(Description))

_COPIED = {True: "the most probable decision", False: "one sampled decision", None: "the one decision"}


def head_title(head: str) -> str:
    """For people, e.g. "bi-encoder head"."""
    return f"{head.replace('_', '-')} head"


def title(what: Description) -> str:
    """For people alone, e.g. "all-MiniLM-L6-v2, joint head, error correction (greedy)": what is not usual is added, and
    nothing reads it."""
    if what.kind == "copy":
        return f"copy of {_COPIED[what.greedy]}"
    if what.kind != "student":
        from permdistill import debias

        titles = {
            BIASED: "biased teacher",
            debias.PRIOR_MATCHING: "prior-matching, 1 call",
            TWO_ORDERS: "mean over 2 orders",
        }
        titles[debias.CYCLIC] = f"mean over {what.calls:g} cyclic orders"
        return titles.get(what.method, what.method)
    power = 1 if what.power is None else what.power
    words = {
        what.encoder or "": what.encoder is not None,
        head_title(what.head or ""): what.head is not None,
        what.method + (" (greedy)" if what.greedy else ""): True,
        "hard targets" if isinf(power) else f"targets to the power {power:g}": power != 1,
        f"{what.draws or 0:g} draws": bool(what.draws),
        f"{what.n_train or 0:g} questions": bool(what.n_train),
        "original order only": what.orders == "original",
        f"taught on {what.taught_on}": bool(what.taught_on),
    }
    return ", ".join(word for word, wanted in words.items() if wanted)


def described_rows(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A table with the columns of a Description, in which whole numbers stay whole."""
    import pandas as pd

    return pd.DataFrame(rows).astype({"draws": "Int64", "n_train": "Int64"})


def described(frame: pd.DataFrame, prefix: str = "") -> list[Description]:
    """What the system of each row is, from the columns ``prefix``kind etc.; those that are not there count as None."""
    cells = frame.reindex(columns=[prefix + name for name in DESCRIPTION]).astype(object)
    return [Description(*row) for row in cells.where(cells.notna(), None).itertuples(index=False, name=None)]


def titled(frame: pd.DataFrame) -> pd.DataFrame:
    """For people: a title ("system", or "rival") in place of the columns that say what a system, or its rival, is."""
    for prefix, name in (("", "system"), ("rival_", "rival")):
        if f"{prefix}method" in frame:
            titles = [title(what) for what in described(frame, prefix)]
            gone = {prefix + column for column in DESCRIPTION} - {"calls"}
            at = frame.columns.get_loc(f"{prefix}method")
            frame = frame.copy()
            frame.insert(at, name, titles)
            frame = frame[[column for column in frame if column not in gone]]
    return frame
