"""Data sets in their own layouts -> records with the fields of :data:`permdistill.questions.FIELDS`.

A layout says in which column each field stands. Those of :data:`LAYOUTS` are recognised by their columns; any other one is
named: ``--map question=ctx,options=endings,answer=label``, several columns of options as ``options=sol1+sol2``. Answers may
be indices, digits, letters, labels of the options, or an option's text; ids that are not there are the records' numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from permdistill.orders import LETTERS

Columns = Mapping[str, str]  # field -> column, of options perhaps several ("sol1+sol2")
FIELDS = ("id", "context", "question", "options", "answer")

# The first that has all its columns is taken; records with id, question and options of their own are left as they are.
LAYOUTS: dict[str, Columns] = {
    "ARC": {"id": "id", "question": "question", "options": "choices", "answer": "answerKey"},
    "HellaSwag": {"id": "ind", "question": "ctx", "options": "endings", "answer": "label"},
    "MMLU-Pro": {"id": "question_id", "question": "question", "options": "options", "answer": "answer_index"},
    "RACE": {"id": "example_id", "context": "article", "question": "question", "options": "options", "answer": "answer"},
    "MMLU": {"question": "question", "options": "choices", "answer": "answer"},
}


def columns(text: str) -> dict[str, str]:
    """ "question=ctx,options=endings" -> {field: column}. Raises ValueError unless these are fields, each once."""
    found: dict[str, str] = {}
    for part in text.split(","):
        field, _, column = (word.strip() for word in part.partition("="))
        if field not in FIELDS or not column or field in found:
            raise ValueError(f"map {text!r}: give field=column, each field of {', '.join(FIELDS)} once, between commas")
        found[field] = column
    return found


def recognised(row: Any) -> Columns | None:
    """The layout of a record, None where it is none of :data:`LAYOUTS`."""
    if not isinstance(row, Mapping) or all(field in row for field in ("id", "question", "options")):
        return None
    return next((own for own in LAYOUTS.values() if all(column in row for column in own.values())), None)


def missing(rows: Iterable[Any], source: str, own: Columns | None) -> str | None:
    """Which columns of a layout none of the rows has, and which they have, in a sentence; None where none is missing."""
    there: dict[str, None] = {}
    n = 0
    for n, row in enumerate(rows, start=1):  # noqa: B007
        there.update(dict.fromkeys(map(str, row)) if isinstance(row, Mapping) else {})
    wanted = [column for name in (own or {}).values() for column in name.split("+")]
    wanted += [field for field in ("question", "options") if field not in (own or {})]
    lacking = [column for column in wanted if column not in there]
    if not there or not lacking or (own is None and n < 2):
        return None
    has, example = ", ".join(there), "--map question=COLUMN,options=COLUMN,answer=COLUMN"
    return f"{source}: its {n} records have the columns {has}; missing: {', '.join(lacking)}. Name yours: {example}"


def converted(rows: Iterable[Any], own: Columns | None) -> Iterator[Any]:
    """Rows as records; those that are no objects stay as they are. ``own``: as of :func:`columns`; None: as the first row
    looks. Ids that repeat in a recognised layout (RACE: of the passage) are numbered."""
    seen, layout = dict[str, int](), own
    for number, row in enumerate(rows):
        if number == 0 and own is None:
            layout = recognised(row)
        if layout is None or not isinstance(row, Mapping):
            yield row
            continue
        record = _record(row, layout, number)
        if own is None:
            seen[record["id"]] = seen.get(record["id"], -1) + 1
            record["id"] += f"/{seen[record['id']]}" if seen[record["id"]] else ""
        yield record


def _record(row: Mapping[str, Any], layout: Columns, number: int) -> dict[str, Any]:
    record = {field: row.get(layout.get(field, field)) for field in FIELDS}
    record["id"] = str(number if record["id"] is None else record["id"])
    if len(several := layout.get("options", "options").split("+")) > 1:
        record["options"] = [row.get(column) for column in several]
    options: Any = record["options"]
    labels: list[str] = []
    if isinstance(options, Mapping):  # ARC: {"text": [..], "label": [..]}
        options, labels = options.get("text"), list(map(str, options.get("label") or []))
    elif isinstance(options, (list, tuple)) and options and all(isinstance(one, Mapping) for one in options):
        labels = [str(one.get("label")) for one in options]
        options = [one.get("text") for one in options]
    record["options"] = options
    record["answer"] = _answer(record["answer"], options if isinstance(options, (list, tuple)) else [], labels)
    return record


def _answer(value: Any, options: Any, labels: list[str]) -> Any:
    """The index of the right option, None for none; what cannot be read stays as it is."""
    if value in (None, "", -1):
        return None
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text in labels:
        return labels.index(text)
    if text.isascii() and text.isdecimal():
        return int(text)
    if len(text) == 1 and text.upper() in LETTERS:
        return LETTERS.index(text.upper())
    return list(options).index(value) if value in options else value
