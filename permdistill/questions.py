"""The question: its schema, its checks, and what makes it unfit for permutation.

Every data set becomes a list of :class:`Question`: :func:`from_jsonl` and
:func:`from_dataset` read records with the fields ``id, context, question, options, answer`` (``context`` and ``answer``
may be absent or null), and refuse bad records *all at once*, by id, field and value, before any compute is spent.

Gold answers live only here and in :mod:`permdistill.measure.metrics`: whatever scores or trains takes questions through
:func:`unlabelled`.
"""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from permdistill import layouts
from permdistill.layouts import FIELDS
from permdistill.orders import MAX_OPTIONS, MIN_OPTIONS


@dataclass(frozen=True)
class Question:
    """One question.

    id         unique within its list
    context    passage or article, "" where there is none
    question   the question itself
    options    K = 2..26 different texts, in the dataset's own order
    answer     index of the gold option, None where there is none (unlabelled, or tied human scores)
    """

    id: str
    context: str
    question: str
    options: tuple[str, ...]
    answer: int | None = None


class BadRecords(ValueError):
    """Some records do not fit the schema; the message lists every one with its id, field, value and the fix."""


def problems(record: Mapping[str, Any]) -> list[str]:
    """What is wrong with one record, a line for each field; an empty list if it fits the schema."""
    found = []

    def bad(name: str, fix: str) -> None:
        found.append(f"field {name!r} is {_shown(record.get(name))}: {fix}")

    for name in FIELDS[:4]:
        texts = record.get(name)
        for text in texts if isinstance(texts, (list, tuple)) else [texts]:
            if isinstance(text, str) and HALF.search(text):
                bad(name, "half a character (a lone surrogate, \\ud800 to \\udfff): repair the text")
                break

    if not isinstance(record.get("id"), str) or not record["id"].strip():
        bad("id", "give a non-empty string")
    if not isinstance(record.get("context"), (str, type(None))):
        bad("context", "give a string, or leave it out")
    if not isinstance(record.get("question"), str) or not record["question"].strip():
        bad("question", "give a non-empty string")
    options = record.get("options")
    if not isinstance(options, (list, tuple)) or not all(isinstance(o, str) for o in options):
        bad("options", "give a list of strings")
        return found
    if any(not o.strip() for o in options):
        bad("options", "an option is empty: remove it or write it out")
    if not MIN_OPTIONS <= len(options) <= MAX_OPTIONS:
        bad("options", f"{len(options)} options: give {MIN_OPTIONS} to {MAX_OPTIONS}")
    repeated = [o for o, n in Counter(o.strip() for o in options).items() if n > 1 and o]
    if repeated:
        bad("options", f"repeated: {repeated}; options must differ")
    answer = record.get("answer")
    if answer is not None:
        if isinstance(answer, bool) or not isinstance(answer, (int, np.integer)):
            bad("answer", "give the index of the right option as an integer, or null")
        elif not 0 <= answer < len(options):
            bad("answer", f"out of range: give an index in 0..{len(options) - 1}, or null")
    return found


# What UTF-8 cannot write: half of a pair of UTF-16, which JSON's escapes can spell.
HALF = re.compile("[\ud800-\udfff]")


def _shown(value: object) -> str:
    try:
        return repr(value)
    except (RecursionError, ValueError):  # nested without end; digits without end
        return f"a {type(value).__name__} that is too large to show"


def validate(records: Iterable[Mapping[str, Any]], source: str = "records") -> list[Question]:
    """Records -> questions. Raises :class:`BadRecords` that lists every bad record; a field that all of several records lack
    is named once. Warns of names that look like a field's, misspelt."""
    questions: list[Question] = []
    bad: list[tuple[str, str]] = []  # where, what
    seen: dict[str, int] = {}
    other, lacking = Counter[str](), Counter[str]()
    row = -1
    for row, record in enumerate(records):
        if not isinstance(record, Mapping):
            bad.append((f"record {row}", f"is {_shown(record)}: give an object with the fields {', '.join(FIELDS)}"))
            continue
        other.update(name for name in record if isinstance(name, str) and name not in FIELDS)
        lacking.update(name for name in FIELDS if name not in record)
        found = problems(record)
        name = record.get("id")
        if isinstance(name, str) and seen.setdefault(name, row) != row:
            found.append(f"field 'id' is {name!r}: already used by record {seen[name]}; ids must be unique")
        bad += [(f"record {row} (id {_shown(name)})", problem) for problem in found]
        if not found:
            answer = None if record.get("answer") is None else int(record["answer"])
            context, options = record.get("context") or "", tuple(record["options"])
            questions.append(Question(record["id"], context, record["question"], options, answer))
    _warn_of_misspelt(other, lacking, source)
    everywhere = [name for name in ("id", "question", "options") if lacking[name] == row + 1 > 1]
    lines = [f"all {row + 1} records: no field {name!r}: give it, or rename yours" for name in everywhere]
    absent = tuple(f"field {name!r} is None" for name in everywhere)
    lines += [f"{where}: {what}" for where, what in bad if not (absent and what.startswith(absent))]
    if lines:
        raise BadRecords(f"{source}: {len(lines)} problem(s)\n  " + "\n  ".join(lines))
    return questions


def _warn_of_misspelt(other: Counter[str], lacking: Counter[str], source: str) -> None:
    for name, n in other.items():
        meant = difflib.get_close_matches(name.lower(), FIELDS, n=1, cutoff=0.8)
        if meant and lacking[meant[0]] >= n:
            text = f"{source}: field {name!r} of {n} record(s) is not read: is it {meant[0]!r}, which they lack?"
            warnings.warn(text, stacklevel=3)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]:
        raise ValueError(f"field {twice[0]!r} is there twice")
    return dict(pairs)


def from_jsonl(path: str | Path, columns: Mapping[str, str] | None = None) -> list[Question]:
    """Read a JSONL file, one question per line. ``columns``: see :func:`from_dataset`. Raises :class:`BadRecords`, also for
    a file without any."""
    path, records, broken = Path(path), [], []
    # Split on "\n" only: texts may hold U+2028 and U+0085, at which str.splitlines would cut.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line.decode("utf-8"), object_pairs_hook=_object))
            except (ValueError, RecursionError) as error:
                broken.append(f"{path}, line {number}: not JSON ({error}); write one JSON object per line")
    try:
        questions = _read(records, str(path), columns)
    except BadRecords as error:
        broken.append(str(error))
    if not records and not broken:
        broken.append(f"{path}: no questions: write one JSON object per line")
    if broken:
        raise BadRecords("\n".join(broken))
    return questions


def from_dataset(dataset: Iterable[Mapping[str, Any]], columns: Mapping[str, str] | None = None) -> list[Question]:
    """Read a ``datasets.Dataset``, or any other rows, with the columns :data:`FIELDS`, or in a layout of
    :mod:`permdistill.layouts`. ``columns`` {field: column} names another one. Raises :class:`BadRecords`, also when there is
    no row."""
    if not (questions := _read(list(dataset), "dataset", columns)):
        raise BadRecords("dataset: no questions")
    return questions


def _read(rows: Sequence[Any], source: str, columns: Mapping[str, str] | None) -> list[Question]:
    """Checked questions. Raises BadRecords; a layout that is not known is told once."""
    own = columns or (layouts.recognised(rows[0]) if rows else None)
    if lacking := layouts.missing(rows, source, own):
        raise BadRecords(lacking)
    return validate(layouts.converted(rows, columns), source)


def to_dataset(questions: Sequence[Question]) -> Any:
    """Questions -> ``datasets.Dataset`` with the columns :data:`FIELDS`. Needs the package ``datasets``."""
    from datasets import Dataset, Features, List, Value

    texts = {name: Value("string") for name in FIELDS[:3]}
    features = Features({**texts, "options": List(Value("string")), "answer": Value("int64")})
    return Dataset.from_list([{**q.__dict__, "options": list(q.options)} for q in questions], features=features)


def unlabelled(questions: Iterable[Question]) -> list[Question]:
    """The same questions without their gold answers: the only form in which scoring and training see them."""
    return [Question(q.id, q.context, q.question, q.options) for q in questions]  # 6 times as fast as dataclasses.replace


# --------------------------------------------------------------------------------------------------------------------
# What makes a question unfit for permutation

_WHO = r"(?:all|none|both|neither|any|either|each|more than one)"
_OTHERS = r"(?:above|below|aforementioned|foregoing|preceding|options|answers|choices|alternatives|responses)"
_WORDS = re.compile(  # how an option begins: "none of the above; he thinks otherwise"
    rf"^\W*{_WHO}(?: \w+)? of(?: the| these| those| all| other)* {_OTHERS}(?!\w)"
    rf"|^\W*{_WHO}(?: the| these| those)? (?:mentioned |listed )?{_OTHERS}(?: given| listed)?(?:\W*$|,? (?:is|are)(?!\w))"
    rf"|^\W*{_WHO}(?: \w+)? of (?:these|those)(?!\w)(?=(?:\W*\w++){{,9}}\W*$)"
    rf"|^\W*{_WHO}(?: \w+)? of them(?: (?:is|are|apply|applies)(?: \w+)?)?\W*$"
    r"|^\W*(?:all|none|both|neither) (?:is|are) (?:all |both )?(?:correct|true|right|wrong|false|incorrect)\W*$",
    re.IGNORECASE,
)
_INSIDE = re.compile(
    rf"(?<![\w-])(?:{_WHO}(?: \w+)? of (?:the |these |those )?{_OTHERS}"
    rf"|{_WHO}(?: \w+)? of (?:these|those)\W*$|the above|above (?:answers|options|choices)|as above)(?!\w)",
    re.IGNORECASE,
)
_NAMED = re.compile(r"(?<!\w)(?:[Oo]ption|[Aa]nswer|[Cc]hoice)s? (?:[A-Z](?![\w'])|\([A-Za-z]\))")
_BETWEEN, _AND = r"(?:\s*,\s*|\s+)", r"\s*(?:,\s*)?(?:and|or|nor|&|/|\+)\s*"
_UPPER, _LOWER, _BRACKETS = (rf"{label}(?:{_BETWEEN}{label})*" for label in (r"\(?[A-Z]\)?", r"\(?[a-z]\)?", r"\([a-z]\)"))
_LOWER += r"\s*(?:,\s*)?(?:(?<=[\s)])(?:and|or|nor)(?=[\s(])|[&/+])\s*\(?[a-z]\)?"  # words hold letters too
_TAIL = r"(?:\s*(?:,\s*)?(?:only|both|alone|above|together|(?:are |is )?(?:both )?(?:correct|true|right)))?"
_LETTERS = re.compile(  # the whole option: capitals, or small letters that "both", "only" or brackets show to be labels
    rf"(?:(?i:do )?(?i:both|neither|either|only|all|just)?(?: of)?\s*{_UPPER}{_AND}\(?[A-Z]\)?{_TAIL}"
    rf"|(?i:both|neither|either|only)\s+{_LOWER}{_TAIL}"
    rf"|{_LOWER}\s+(?:only|both|alone)"
    rf"|{_BRACKETS}{_AND}\([a-z]\){_TAIL})"
)
_ABROAD = re.compile(
    "以上(?:都|皆|全|均|选项|選項|答案|各项|各項)|(?:以上|上述)(?:的)?(?:所有|任何|任一)|(?:都|均)不(?:对|對|是|正确|正確)$|すべて正しい|上記の(?:すべて|全て|いずれ|どれ)"
    "|위의? ?(?:모두|모든|보기)|모두 (?:정답|맞)"
    "|\\b(?:tod[oa]s|ningun[oa]|ambas|nenhum[a]?|cualquiera|qualquer uma) (?:l[ao]s |de l[ao]s |d?[ao]s )?"
    "(?:anteriores|respuestas|opciones|alternativas|respostas|acima)"
    "|\\b(?:alle|keine|keines|beide|jede)s?r? (?:der |die )?(?:oben|obigen|genannten|vorgenannten|antworten)"
    "|\\b(?:toutes|aucune|tous|aucun|les deux)\\b.{0,25}\\b(?:ci-dessus|réponses|précédent)"
    "|\\b(?:tutte|nessuna|tutti|nessuno|entrambe)\\b.{0,20}\\b(?:precedenti|risposte|sopra)"
    "|\\b(?:все|всё|ничего|ни один|оба|любой)\\b.{0,15}(?:вышепереч|перечисленн|вариант|ответ|из вышеуказ)",
    re.IGNORECASE,
)
_SHORT = 8  # words: what stands inside a longer text speaks of that text


def _refers(option: str, k: int) -> bool:
    text = option.strip().rstrip(".!;, ")
    if len(text) <= 60 and _LETTERS.fullmatch(text):
        labels = [label.upper() for label in re.findall(r"(?<![a-z])[A-Z](?![a-z])|(?<![A-Za-z])[a-z](?![A-Za-z])", text)]
        return all(ord(label) - ord("A") < k for label in labels)  # of the vitamins "D, E and K" two are no labels of four
    short = len(text.split()) <= _SHORT
    return bool(_WORDS.search(text) or _ABROAD.search(text) or (short and (_INSIDE.search(text) or _NAMED.search(text))))


def unsafe_options(question: Question) -> tuple[int, ...]:
    """Indices of the options that refer to other options or to their place ("all of the above", "both A and B")."""
    return tuple(i for i, option in enumerate(question.options) if _refers(option, len(question.options)))


def permutation_unsafe(question: Question) -> bool:
    """True when an option refers to other options or to their place (:func:`unsafe_options`).

    Such a question changes its meaning with the order, so no order-invariant answer exists.
    """
    return bool(unsafe_options(question))


@dataclass(frozen=True)
class Treated:
    """Own questions, those that are unsafe kept, dropped or anchored.

    questions  what is to be scored
    unsafe     how many were unsafe
    anchors    {id: indices of options that keep their place}, see :func:`permdistill.orders.order_set`
    """

    questions: list[Question]
    unsafe: int
    anchors: dict[str, tuple[int, ...]] = field(default_factory=dict)


UNSAFE = ("keep", "drop", "anchor")


def treat_unsafe(questions: Sequence[Question], how: str = "keep") -> Treated:
    """What to do with permutation-unsafe questions: "keep" them, "drop" them, or "anchor" the options that refer to others
    while the rest permutes. Raises ValueError for another word."""
    if how not in UNSAFE:
        raise ValueError(f"unsafe {how!r}: give one of {', '.join(UNSAFE)}")
    found = {q.id: fixed for q in questions if (fixed := unsafe_options(q))}
    kept = [q for q in questions if how != "drop" or q.id not in found]
    return Treated(kept, len(found), found if how == "anchor" else {})


def _text(question: Question) -> tuple[str, ...]:
    return (question.question.strip().lower(), *sorted(o.strip().lower() for o in question.options))


@dataclass(frozen=True)
class Cleaned:
    """Questions that are fit for permutation, and how many were left out for which reason."""

    questions: list[Question]
    left_out: dict[str, int] = field(default_factory=dict)


def clean(
    questions: Sequence[Question],
    held_out: Sequence[Question] = (),
    k: int | None = None,
    unsafe: Callable[[Question], bool] = permutation_unsafe,
) -> Cleaned:
    """Leave out questions that are ``unsafe``, repeated, also in ``held_out``, or not of ``k`` options."""
    kept: list[Question] = []
    left_out: Counter[str] = Counter()
    seen, held = set(), {_text(q) for q in held_out}
    for q in questions:
        text = (q.context, *_text(q))
        if k is not None and len(q.options) != k:
            left_out[f"not {k} options"] += 1
        elif unsafe(q):
            left_out["permutation-unsafe"] += 1
        elif _text(q) in held:
            left_out["also held out"] += 1
        elif text in seen:
            left_out["repeated"] += 1
        else:
            seen.add(text)
            kept.append(q)
    return Cleaned(kept, dict(left_out))


def sample(questions: Sequence[Question], n: int, seed: int) -> list[Question]:
    """``n`` questions drawn without replacement; a larger ``n`` with the same seed extends the smaller sample."""
    if n > len(questions):
        raise ValueError(f"{n} questions asked for, only {len(questions)} there: ask for at most {len(questions)}")
    return [questions[i] for i in np.random.default_rng(seed).permutation(len(questions))[:n]]


def sample_contexts(questions: Sequence[Question], n: int, seed: int) -> list[Question]:
    """:func:`sample` of whole contexts: all questions of one, then of the next, up to ``n``."""
    of: dict[str, list[Question]] = {}
    for question in questions:
        of.setdefault(question.context, []).append(question)
    together = list(of.values())
    if n > len(questions):
        raise ValueError(f"{n} questions asked for, only {len(questions)} there: ask for at most {len(questions)}")
    return [q for i in np.random.default_rng(seed).permutation(len(together)) for q in together[i]][:n]


def stratified(questions: Sequence[Question], n: int, seed: int, stratum: Callable[[Question], str]) -> list[Question]:
    """:func:`sample`, taking one question of each stratum in turn: strata count alike as long as they last."""
    shuffled, turn, drawn = sample(questions, len(questions), seed), [], Counter[str]()
    for question in shuffled:
        turn.append(drawn[stratum(question)])
        drawn[stratum(question)] += 1
    in_turn = [shuffled[i] for i in np.argsort(turn, kind="stable")]
    if n > len(in_turn):
        raise ValueError(f"{n} questions asked for, only {len(in_turn)} there: ask for at most {len(in_turn)}")
    return in_turn[:n]


CONTENT_FREE = ("N/A", "[MASK]", "-")


def content_free(questions: Sequence[Question]) -> list[Question]:
    """What these questions, of the same K, look like without their content, for contextual calibration (Zhao et al., ICML
    2021): context, question and options are replaced by a filler, three fillers in all. A question that is the same in
    all of them belongs to the task and stays."""
    texts, k = {q.question for q in questions}, len(questions[0].options)
    return [
        Question(
            id=f"content-free/{filler}",
            context=filler if questions[0].context else "",
            question=texts.copy().pop() if len(texts) == 1 else filler,
            options=(filler,) * k,
        )
        for filler in CONTENT_FREE
    ]


def distinct(options: Sequence[str]) -> bool:
    """Whether no option is empty or the same as another, spaces at the ends aside."""
    return len({o.strip() for o in options} - {""}) == len(options)
