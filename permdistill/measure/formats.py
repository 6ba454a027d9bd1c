"""Other tools' files as records: each adapter is a few lines from one of their rows to records of
:mod:`permdistill.measure.records`.

How each names what was chosen matters: a verdict *by position* names the first or second answer shown, one *un-swapped*
names the answer itself, whichever came first. JudgeBench, PandaLM and the arrays of PriDe are by position; FastChat, LLMBar,
AlpacaEval and Inspect are un-swapped already.
"""

from __future__ import annotations

import json
import os
import random
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import factorial
from pathlib import Path
from typing import Any

from permdistill.measure.records import RELATIVE, VALUES, Records, build
from permdistill.measure.rows import Problems, Row, fits, rows
from permdistill.orders import ENUMERATED, LETTERS, all_orders, cyclic_orders

Texts = dict[str, list[str]]  # id -> its options' texts, in the order in which they came first


@dataclass(frozen=True)
class Format:
    """A tool's files.

    about       for the help text
    recognises  row -> whether it looks like one of the tool's
    records     (row, its number, texts of the ids before) -> records; KeyError, TypeError, ValueError where it is none
    within      of tools that number the items of each file, or task, from 0 on: (path, all paths) -> what tells apart the
                items of several files, which goes before their ids where it differs
    """

    about: str
    recognises: Callable[[Mapping[str, Any]], bool]
    records: Callable[[Mapping[str, Any], int, Texts], Iterable[Mapping[str, Any]]]
    within: Callable[[Path, Sequence[Path]], str] = lambda path, paths: ""


def _order(name: str, shown: Sequence[str], known: Texts) -> list[int]:
    """Which option stands at which position: by its text, where the item was first met in another order."""
    first = known.setdefault(name, list(shown))
    if sorted(first) != sorted(shown) or len(set(first)) < len(first):
        raise ValueError(f"its options are {list(shown)}, before they were {first}: give it another id")
    return [first.index(text) for text in shown]


def _both(name: str, first: Any, second: Any, answer: int | None = None) -> Iterator[dict[str, Any]]:
    """A pair in both orders."""
    for order, decision in (([0, 1], first), ([1, 0], second)):
        yield {"id": name, "order": order, "decision": decision, "answer": answer}


# --------------------------------------------------------------------------------------------------------------------
# Harnesses


def _choices(row: Mapping[str, Any], k: int) -> list[str] | None:
    """The texts of a document's options in lm-evaluation-harness, as far as its task names them."""
    doc: Any = row.get("doc")
    if not isinstance(doc, Mapping):
        return None
    for field in ("choices", "options", "endings", "answers"):
        found = doc.get(field)
        found = found.get("text") if isinstance(found, Mapping) else found
        if isinstance(found, list) and len(found) == k and len(set(map(str, found))) == k:
            return list(map(str, found))
    return None


def _task(path: Path, paths: Sequence[Path]) -> str:
    """The task of "samples_TASK_2026-01-31T12-00-00.000000.jsonl"; files of one task are runs of the same questions."""
    found = re.fullmatch(r"samples_(.+?)(_\d{4}-\d\d-\d\dT[\d.-]+)?\.jsonl?(\.gz)?", path.name)
    return found[1] if found else ""


def _lm_eval(row: Mapping[str, Any], number: int, known: Texts) -> Iterator[dict[str, Any]]:
    name, likelihoods = str(row["doc_id"]), [float(pair[0]) for pair in row["filtered_resps"]]
    if "acc_mutual_info" in row:  # then the K choices come once more, without the question
        likelihoods = likelihoods[: len(likelihoods) // 2]
    k = len(likelihoods)
    texts = _choices(row, k)
    order = _order(name, texts, known) if texts else list(range(k))
    target, position = str(row.get("target", "")).strip(), None
    if target.isdecimal() and int(target) < k:
        position = int(target)
    elif texts and target in texts:
        position = texts.index(target)
    elif len(target) == 1 and target in LETTERS[:k]:
        position = LETTERS.index(target)
    answer = None if position is None else order[position]
    yield {"id": name, "order": order, "log_probs": [min(v, 0.0) for v in likelihoods], "answer": answer, RELATIVE: True}


def _listed(explanation: str) -> str:
    """What multiple_choice(shuffle=True) listed in "Choices were shuffled ..:", "" where it did not shuffle."""
    after = explanation.partition("Choices were shuffled ")[2].partition(":\n\n")[2]
    return after.rpartition("\nShuffled answer:\nANSWER:")[0]


def _shown(listed: str, choices: list[str]) -> list[int] | None:
    """The order in "A) ..\\nB) ..", a list of all ``choices``."""
    order: list[int] = []
    for position in range(len(choices)):
        starts = [
            i
            for i, text in enumerate(choices)
            if i not in order and f"{listed}\n".startswith(f"{LETTERS[position]}) {text}\n")
        ]
        if not starts:
            return None
        order.append(max(starts, key=lambda i: len(choices[i])))
        listed = listed[len(choices[order[-1]]) + 4 :]
    return order


def _inspect(row: Mapping[str, Any], number: int, known: Texts) -> Iterator[dict[str, Any]]:
    for sample in row["samples"]:
        choices = sample.get("choices")
        if not choices:
            continue  # no multiple choice
        name, scores = str(sample["id"]), list((sample.get("scores") or {}).values())
        score = next((s for s in scores if isinstance(s, Mapping) and "answer" in s), {})
        options = _order(name, choices, known)  # dataset.shuffle_choices: samples of one id in several orders
        listed = _listed(str(score.get("explanation") or ""))
        order = _shown(listed, choices) if listed else list(range(len(choices)))
        if order is None:
            raise ValueError(f"sample {name!r}: its explanation lists other options than its choices")
        letters = [letter for letter in re.findall(r"[A-Z]", str(score.get("answer") or "")) if letter in LETTERS]
        target = sample.get("target")
        target = target[0] if isinstance(target, list) and len(target) == 1 else target
        gold = isinstance(target, str) and len(target) == 1 and target in LETTERS[: len(choices)]
        yield {
            "id": name,
            "order": [options[i] for i in order],
            "decision": options[LETTERS.index(letters[0])] if len(letters) == 1 else None,
            "answer": options[LETTERS.index(target)] if gold else None,
            "draw": int(sample.get("epoch", 0)) * 1000 + number,
        }


def _subject(path: Path, paths: Sequence[Path]) -> str:
    return path.name.split(".")[0]


def _pride(row: Mapping[str, Any], number: int, known: Texts) -> Iterator[dict[str, Any]]:
    if row.get("type") != "result":
        return
    data = row["data"]
    found = data.get("probs", data.get("observed"))
    by_order = found if isinstance(found[0], list) else [found]
    k = len(by_order[0])
    if len(by_order) == 1:
        orders = [list(range(k))]
    elif k <= ENUMERATED and len(by_order) == factorial(k):
        orders = all_orders(k).tolist()
    elif len(by_order) == k:
        orders = cyclic_orders(k).tolist()
    else:
        raise ValueError(f"{len(by_order)} rows of {k} probabilities: neither all orders nor the rotations")
    ideal = data.get("ideal")
    answer = LETTERS.index(ideal) if isinstance(ideal, str) and len(ideal) == 1 and ideal in LETTERS[:k] else None
    for order, p in zip(orders, by_order, strict=True):
        total = sum(p)
        scaled = [v / total for v in p] if total > 1 else list(p)  # counts of an API's replies too
        name = str(data.get("idx", number))
        yield {"id": name, "order": order, "probabilities": scaled, "answer": answer, RELATIVE: True}


# --------------------------------------------------------------------------------------------------------------------
# Judges of pairs


def _fastchat(row: Mapping[str, Any], number: int, known: Texts) -> Iterator[dict[str, Any]]:
    winners = {"model_1": 0, "model_2": 1, "tie": "tie", "error": None}
    judge = "/".join(row["judge"]) if isinstance(row.get("judge"), list) else ""
    name = f"{judge} {row['question_id']} turn {row.get('turn', 1)} {row['model_1']} {row['model_2']}".strip()
    systems = [str(row["model_1"]), str(row["model_2"])]
    for record in _both(name, winners[row["g1_winner"]], winners[row["g2_winner"]]):
        yield record | {"systems": systems if systems[0] != systems[1] else None}


def _judgebench(row: Mapping[str, Any], number: int, known: Texts) -> Iterator[dict[str, Any]]:
    verdicts = {"A>B": "A", "B>A": "B", "A=B": "tie", "B=A": "tie"}
    found = [verdicts.get(str((judgment or {}).get("decision"))) for judgment in row["judgments"]]
    answer = {"A>B": 0, "B>A": 1}[row["label"]]
    records = list(_both(str(row["pair_id"]), found[0], found[-1], answer))
    yield from records[: len(found)]


def _below(path: Path, paths: Sequence[Path]) -> str:
    """The path from where the paths part: each file is named result.json."""
    return path.absolute().relative_to(os.path.commonpath([other.absolute().parent for other in paths])).as_posix()


def _llmbar(row: Mapping[str, Any], number: int, known: Texts) -> Iterator[dict[str, Any]]:
    last, winners = row["results"][-1], {"1": 0, "2": 1}
    first, second = (winners.get(str(last[f"swap = {swap}"]["winner"])) for swap in (False, True))
    yield from _both(f"{number}", first, second, int(row["label"]) - 1)


def _pandalm(row: Mapping[str, Any], number: int, known: Texts) -> Iterator[dict[str, Any]]:
    said = row[next((key for key in row if key.endswith("_result")), "*_result")]
    decision = {"1": "A", "2": "B", "0": "tie", "tie": "tie"}.get(str(said).strip().lower().split("\n")[0])
    name, pair = str(row["idx"]), [str(row[key]) for key in ("response1", "response2") if key in row]
    pair = pair or str(row.get("cmp_key", "")).split("_")
    order = _order(name, pair, known) if len(set(pair)) == 2 else [0, 1]
    votes = [row[key] for key in ("annotator1", "annotator2", "annotator3") if key in row]
    most = max(votes, key=votes.count, default=0)
    yield {"id": name, "order": order, "decision": decision, "answer": order[int(most) - 1] if most in (1, 2) else None}


def _alpaca(row: Mapping[str, Any], number: int, known: Texts) -> Iterator[dict[str, Any]]:
    name = " / ".join(str(row[key]) for key in ("generator_1", "generator_2", "annotator", "instruction") if row.get(key))
    # Which output was shown first is not stored; it is drawn from a seed that the row's texts make.
    switched = random.Random(f"{_SWITCH}{row['instruction']}{_SEED}").choices([False, True], k=1)[0]
    record: dict[str, Any] = {"id": name, "order": [1, 0] if switched else [0, 1]}
    systems = [str(row.get("generator_1")), str(row.get("generator_2"))]
    record["systems"] = systems if systems[0] != systems[1] else None
    preference = row["preference"]
    if preference in (0, 1.5):
        yield record | {"decision": "tie"}
    elif preference is None or not 1 <= preference <= 2:
        yield record | {"decision": None}
    elif preference in (1, 2):
        yield record | {"decision": int(preference) - 1}
    else:
        by_option = [2 - preference, preference - 1]
        yield record | {"probabilities": [by_option[o] for o in record["order"]], RELATIVE: True}


_SWITCH, _SEED = "is_switched_outputs", 0


def _has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda row: all(name in row for name in names)


FORMATS: dict[str, Format] = {
    "records": Format(
        "id, order, and probabilities, log_probs or decision",
        lambda row: "order" in row and any(name in row for name in VALUES),
        lambda row, number, known: [row],
    ),
    "lm-eval": Format("lm-evaluation-harness samples_*.jsonl", _has("doc_id", "filtered_resps"), _lm_eval, _task),
    "inspect": Format("Inspect logs, .eval or .json", _has("samples"), _inspect),
    "fastchat": Format("FastChat MT-bench pairs", _has("g1_winner", "g2_winner"), _fastchat),
    "judgebench": Format("JudgeBench outputs", _has("pair_id", "judgments", "label"), _judgebench),
    "llmbar": Format("LLMBar result.json", _has("results", "label", "output_1"), _llmbar, _below),
    "pandalm": Format("PandaLM results", lambda row: "idx" in row and any(key.endswith("_result") for key in row), _pandalm),
    "alpaca_eval": Format("AlpacaEval annotations.json", _has("preference", "output_1", "output_2"), _alpaca),
    "pride": Format("PriDe's arrays", _has("type", "data"), _pride, _subject),
}


# --------------------------------------------------------------------------------------------------------------------
# Reading


def _zipped(path: Path, problems: Problems) -> Iterator[Row]:
    """The samples of an Inspect .eval log."""
    problems.unit = "sample"
    try:
        with zipfile.ZipFile(path) as log:
            names = [name for name in log.namelist() if name.startswith("samples/") and name.endswith(".json")]
            for number, name in enumerate(sorted(names), start=1):
                if fits(log.getinfo(name).file_size, number, problems):  # no more than that is ever unpacked
                    yield number, {"samples": [json.loads(log.read(name))]}
    except Exception as error:  # of zipfile, zlib, struct or json, by what is damaged
        problems.add(0, f"no Inspect log that can be read ({error}): convert it with `inspect log convert --to json`")


def _records(
    found: Iterable[Row], format: str | None, problems: Problems, known: dict[str, Texts], paths: Sequence[Path], runs: int
) -> Iterator[Row]:
    """The records of the file ``paths[runs]``; ``known``: the texts of the items before, by what their ids count within."""
    chosen = FORMATS[format] if format else None
    within: str | None = None
    for line, row in found:
        if not isinstance(row, Mapping):
            problems.add(line, f"is {str(row)[:100]!r}: give one object a line")
            continue
        if chosen is None:
            chosen = next((one for one in FORMATS.values() if one.recognises(row)), FORMATS["records"])
        if within is None:
            names = [chosen.within(path, paths) for path in paths]
            within = f"{names[runs]} " if names[runs] and len(set(names)) > 1 else ""
        number, texts = line if chosen.records is not _inspect else runs, known.setdefault(within, {})
        try:
            for record in chosen.records(row, number, texts):
                yield line, {**record, "id": within + record["id"]} if within else record
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            problems.add(line, f"not as in {chosen.about}: {what}")


def read(paths: str | Path | Sequence[str | Path], format: str | None = None) -> Records:
    """Records from one file or several, of a tool of :data:`FORMATS` (None: as the first row looks).

    Raises BadRecords that names all bad records, ValueError for an unknown format.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format {format!r}: give one of {', '.join(FORMATS)}")
    every_path = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    problems = Problems(every_path[0])
    known: dict[str, Texts] = {}

    def every() -> Iterator[Row]:
        for runs, path in enumerate(every_path):
            problems.path = path
            found = _zipped(path, problems) if zipfile.is_zipfile(path) else rows(path, problems)
            yield from _records(found, format, problems, known, every_path, runs)

    return build(every(), problems)
