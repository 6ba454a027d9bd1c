"""Mutations of what users, disks and servers hand us: each is refused in our own words, or means what it meant.

Nothing is drawn anew at each run (the seed is fixed), so a failure is found again; PERMDISTILL_FUZZ is another seed,
PERMDISTILL_FUZZ_N another number of mutations.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pandas as pd
import pytest
import torch
from test_endpoint import QUESTION, answered, reply  # noqa: F401 (a fixture)
from test_formats import inspect_sample, lm_eval
from test_scores import Store, small_store
from test_students import make_encoder

from permdistill.api.endpoint import Budget, CallFailed, Endpoint, EndpointError, Limits, Prices, Stopped
from permdistill.api.jobs import Job, calls_in_orders, drawn_calls, read_decision, read_logprobs
from permdistill.api.replies import Replies
from permdistill.configs import StudentConfig
from permdistill.corrections import Correction
from permdistill.measure.formats import FORMATS
from permdistill.measure.report import measure
from permdistill.prompts import TEMPLATES
from permdistill.questions import BadRecords, from_dataset, from_jsonl
from permdistill.students import Student, build
from permdistill.training import Checkpoint

N = int(os.environ.get("PERMDISTILL_FUZZ_N", "10000"))
LETTERS = TEMPLATES["letters"]
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:.*is not read")]

VALUES: list[Any] = [None, True, False, 0, 1, -1, 2, 7, 10**400, 0.5, 1e308, float("nan"), float("inf"), -0.0]
VALUES += ["", " ", "a", "A", "0", "\ud800", "\u2028", "x" * 5000, [], {}, [[]], [None], ["a", "b"], {"a": 1}, [0, 1, 1]]


def mutated(value: Any, rng: np.random.Generator) -> Any:
    """A JSON value with one change somewhere in it."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        places = list(value) if isinstance(value, dict) else range(len(value))
        place = places[rng.integers(len(places))]
        copy = value.copy()
        kind = rng.random()
        if kind < 0.15:
            del copy[place]
        elif kind < 0.25 and isinstance(copy, dict):
            copy[str(place)[:-1] + "x"] = copy.pop(place)
        elif kind < 0.25:
            copy.append(copy[place])
        else:
            copy[place] = mutated(copy[place], rng)
        return copy
    if isinstance(value, str) and value and rng.random() < 0.4:
        place = int(rng.integers(len(value)))
        return value[:place] + str(rng.choice(["", "\x00", "\udfff", "é", '"', "\\"])) + value[place + 1 :]
    return VALUES[rng.integers(len(VALUES))]


def spoilt(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes with one flipped, cut off, doubled or overwritten."""
    place, kind = int(rng.integers(len(content))), rng.integers(4)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + bytes([content[place] ^ 1 << int(rng.integers(8))]) + content[place + 1 :]
    length = int(rng.integers(1, 40))
    if kind == 2:
        return content[: place + length] + content[place:]
    return content[:place] + rng.bytes(length) + content[place + length :]


def one(content: list[Any], rng: np.random.Generator) -> bytes:
    """Lines of JSON with one mutation: in a value, or in the bytes."""
    if rng.random() < 0.5:
        place = int(rng.integers(len(content)))
        content = [*content[:place], mutated(content[place], rng), *content[place + 1 :]]
    text = "".join(json.dumps(line) + "\n" for line in content).encode()
    return spoilt(text, rng) if rng.random() < 0.5 else text


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(int(os.environ.get("PERMDISTILL_FUZZ", "0")))


def tally(outcomes: Counter[str], started: float, most: float) -> None:
    print(dict(outcomes), f"{time.monotonic() - started:.0f} s, slowest {most:.2f} s")
    assert sum(outcomes.values()) == N and most < 10


def run(change: Callable[[], str]) -> None:
    """``change`` N times; what it says is counted."""
    outcomes, started, most = Counter[str](), time.monotonic(), 0.0
    for _ in range(N):
        before = time.monotonic()
        outcomes[change()] += 1
        most = max(most, time.monotonic() - before)
    tally(outcomes, started, most)


def test_questions(tmp_path, rng):
    records = [
        {
            "id": f"q{i}",
            "context": "Passage." * (i % 2),
            "question": f"Which {i}?",
            "options": ["x", "y", f"z{i}"][: 2 + i % 2],
        }
        | ({"answer": i % 2} if i % 3 else {})
        for i in range(4)
    ]
    path = tmp_path / "mine.jsonl"

    def change() -> str:
        path.write_bytes(one(records, rng))
        try:
            questions = from_jsonl(path)
        except BadRecords as error:
            assert "mine.jsonl" in str(error)
            str(error).encode()
            return "refused"
        for question in questions:  # whatever passes can be scored
            LETTERS.user_message(question, range(len(question.options))).encode()
            assert question.answer is None or type(question.answer) is int and 0 <= question.answer < len(question.options)
        return "read"

    run(change)


def test_columns_of_datasets(rng):
    from datasets import Dataset

    names = ["id", "context", "question", "options", "answer"]
    columns: dict[str, Any] = {"id": ["a", "b", "c"], "context": ["", "Passage.", None], "question": ["Which?"] * 3}
    columns |= {"options": [["x", "y"], ["x", "y", "z"], ["é", "y"]], "answer": [0, None, 1]}

    def change() -> str:
        spoilt = mutated(columns, rng)
        try:
            rows: Any = Dataset.from_dict(spoilt)
        except Exception:  # the library's own: such columns are no data set; a list of rows may still have them
            listed = {name: c for name, c in spoilt.items() if isinstance(c, list)} if isinstance(spoilt, dict) else {}
            rows = [{n: c[i] for n, c in listed.items() if i < len(c)} for i in range(3)]
        try:
            questions = from_dataset(rows)
        except BadRecords as error:
            assert "dataset" in str(error)
            str(error).encode()
            return "refused"
        assert len(questions) == len(rows)
        for question, row in zip(questions, rows, strict=True):
            assert [getattr(question, name) or None for name in names[:3]] == [row.get(name) or None for name in names[:3]]
            assert list(question.options) == list(row["options"]) and question.answer == row.get("answer")
            LETTERS.user_message(question, range(len(question.options))).encode()
        return "read"

    run(change)


def files_of_records(folder: Path) -> dict[str, bytes]:
    """{name: bytes} of records in every kind of file that is read, and of gold answers."""
    own = [{"id": f"q{i // 2}", "order": [i % 2, 1 - i % 2], "probabilities": [0.6, 0.3]} for i in range(6)]
    own += [{"id": "q4", "order": [2, 0, 1], "log_probs": [-0.5, -2.0, None], "answer": 1, "draw": 1}]
    own += [{"id": "q5", "order": [1, 0, 2], "decision": 2}, {"id": "q5", "order": [0, 1, 2], "decision": None}]
    harness = [lm_eval(i, ["ice", "fire", "air"], [-1.0, -2.0, -9.0], "0") for i in range(3)]
    log = {"version": 2, "status": "success", "eval": {}, "samples": [inspect_sample(["ice", "fire"], "A", "B")] * 2}
    pd.DataFrame(own[:6]).to_parquet(folder / "r.parquet")
    lines = {"r.jsonl": own, "lm.jsonl": harness, "gold.jsonl": [{"id": f"q{i}", "answer": 0} for i in range(6)]}
    found = {name: "".join(json.dumps(row) + "\n" for row in rows).encode() for name, rows in lines.items()}
    found |= {"r.json": json.dumps(own).encode(), "log.json": json.dumps(log).encode()}
    found |= {"r.jsonl.gz": gzip.compress(found["r.jsonl"]), "r.parquet": (folder / "r.parquet").read_bytes()}
    with zipfile.ZipFile(folder / "log.eval", "w", zipfile.ZIP_DEFLATED) as packed:
        for i in range(3):
            packed.writestr(f"samples/{i}.json", json.dumps(log["samples"][0] | {"epoch": i}))
    found |= {"log.eval": (folder / "log.eval").read_bytes()}
    return found | {"r.csv": b'id,order,decision\na,0 1,B\na,1 0,0\nb,"[0, 1]",tie\nb,1;0,\n'}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_records(tmp_path, rng):
    good, n = files_of_records(tmp_path), 0
    for name, content in good.items():
        (tmp_path / name).write_bytes(content)

    def change() -> str:
        nonlocal n
        n += 1
        name = list(good)[n % len(good)]
        content = good[name]
        if name.endswith(".jsonl"):
            content = one([json.loads(line) for line in content.splitlines()], rng)
        elif name.endswith(".json") and rng.random() < 0.5:
            content = json.dumps(mutated(json.loads(content), rng)).encode()
        else:
            content = spoilt(content, rng)
        (tmp_path / name).write_bytes(content)
        try:
            asked = ("r.jsonl", "gold.jsonl") if name == "gold.jsonl" else (name, None)
            report = measure(tmp_path / asked[0], asked[1] and tmp_path / asked[1])
        except ValueError as error:
            assert isinstance(error, BadRecords) or str(error).startswith(("no record has", "one record without"))
            str(error).encode()
            return "refused"
        finally:
            (tmp_path / name).write_bytes(good[name])
        found = report.records
        sums = np.add.reduceat(found.p, found.starts)
        assert (np.isnan(sums) | (np.abs(sums - 1) < 1e-9)).all() and (found.answers < found.options).all()
        for start, k in zip(found.starts, found.k, strict=True):
            assert sorted(found.orders[start : start + k]) == list(range(k))
        if name == "r.jsonl":
            assert len(found.k) == sum(bool(line.strip()) for line in content.split(b"\n"))
        if n % 100 < len(good):
            str(report).encode()
        return "read"

    run(change)


def test_rows_of_other_tools(tmp_path, rng):
    judged = {"judgment": {"judge_model": "m"}, "decision": "A>B"}
    said = {
        "output_1": "x",
        "generator_1": "r",
        "output_2": "y",
        "generator_2": "m",
        "instruction": "Say",
        "preference": 1.25,
    }
    swaps = {f"swap = {swap}": {"completion": ["", ""], "winner": "1"} for swap in (False, True)}
    shuffled = "Choices were shuffled before:\n\nA) fire\nB) ice\nShuffled answer:\nANSWER: A"
    played = {
        "question_id": 1,
        "model_1": "x",
        "model_2": "y",
        "g1_winner": "tie",
        "g2_winner": "model_1",
        "judge": ["j", "p"],
    }
    voted = {
        "idx": 7,
        "response1": "x",
        "response2": "y",
        "j_result": "1",
        "annotator1": 2,
        "annotator2": 2,
        "annotator3": 0,
    }
    rows = {
        "lm-eval": lm_eval(0, ["ice", "fire", "air"], [-1.0, -2.0, -9.0], "0"),
        "inspect": {"samples": [inspect_sample(["ice", "fire"], "A", "B", explanation=shuffled)]},
        "fastchat": played,
        "judgebench": {"pair_id": "p", "judgments": [judged, judged], "label": "B>A"},
        "llmbar": {"label": 2, "output_1": "x", "results": [swaps]},
        "pandalm": voted,
        "alpaca_eval": said,
        "pride": {"type": "result", "data": {"idx": 3, "probs": [[0.5, 0.2], [3, 4]], "ideal": "B"}},
    }
    assert rows.keys() == FORMATS.keys() - {"records"}
    path, n = tmp_path / "tool.jsonl", 0

    def change() -> str:
        nonlocal n
        n += 1
        name = list(rows)[n % len(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in (mutated(rows[name], rng), rows[name])))
        try:
            report = measure(path, format=name)
        except ValueError as error:
            assert isinstance(error, BadRecords) or str(error).startswith(("no record has", "one record without"))
            return "refused"
        if n % 100 < len(rows):
            str(report).encode()
        return "read"

    run(change)


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_folders_of_students(tmp_path, rng):
    student = build(StudentConfig(make_encoder(tmp_path / "encoder"), "bi_encoder", "distribution", 3, 64), 0)
    student.scale, student.correction = 2.5, Correction(1.5, (0.25, -0.5, 0.25))
    student.save(tmp_path / "student")
    good = {path: path.read_bytes() for path in (tmp_path / "student").iterdir()}
    described = tmp_path / "student" / "permdistill.json"
    asked = ("which is red ?", ["yes", "no", "tall"], "long story")
    before = student.predict(*asked, distribution=[0.2, 0.3, 0.5])

    def change() -> str:
        path = described if rng.random() < 0.5 else list(good)[rng.integers(len(good))]
        if rng.random() < 0.02:
            path.unlink()
        elif path.suffix == ".json" and rng.random() < 0.5:
            path.write_text(json.dumps(mutated(json.loads(good[path]), rng)))
        else:
            path.write_bytes(spoilt(good[path], rng))
        try:
            found = Student.from_pretrained(tmp_path / "student")
        except (ValueError, FileNotFoundError) as error:
            assert str(tmp_path / "student") in str(error) and ("restore" in str(error) or "give a folder" in str(error))
            str(error).encode()
            return "refused"
        finally:
            path.write_bytes(good[path])
        assert found.config == student.config and (found.scale, found.correction) == (2.5, student.correction)
        assert np.allclose(found.predict(*asked, distribution=[0.2, 0.3, 0.5]), before, atol=1e-6)
        return "the same"

    run(change)


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_checkpoints(tmp_path, rng):
    checkpoint = Checkpoint(tmp_path, "key")
    values = torch.arange(300.0)
    state = {"losses": [0.5, 0.25], "kls": [0.5], "seconds": 3.0, "scale": 1.5, "model": {"w": values}}
    checkpoint.save(state | {"optimiser": torch.optim.AdamW([torch.nn.Parameter(values)]).state_dict()})
    checkpoint.save({"model": {"w": values}}, "best.pt")
    (tmp_path / "train.json").write_text(json.dumps({"key": "key", "losses": [0.5, 0.25]}))
    good = {tmp_path / name: (tmp_path / name).read_bytes() for name in ("checkpoint.pt", "best.pt", "train.json")}

    def change() -> str:
        path = list(good)[rng.integers(len(good))]
        path.write_bytes(spoilt(good[path], rng))
        found, finished = checkpoint.load(), checkpoint.finished()
        if found is not None and path.name == "best.pt":
            assert torch.equal(checkpoint.best()["w"], values)
        path.write_bytes(good[path])
        if found is None:
            return "from the start"
        assert {name: found[name] for name in list(state)[:4]} == {name: state[name] for name in list(state)[:4]}
        assert torch.equal(found["model"]["w"], values) and found["optimiser"].keys() == {"state", "param_groups"}
        return "the same" if finished else "trained anew"

    run(change)


def test_stores(tmp_path, rng):
    path = small_store(tmp_path, 12)
    good, before = path.read_bytes(), Store(tmp_path)

    def change() -> str:
        path.write_bytes(spoilt(good, rng))
        try:
            found = Store(tmp_path)
        except ValueError as error:
            assert "scores.parquet" in str(error) and "restore it, or delete" in str(error)
            return "refused"
        assert {k: (name, v.tolist()) for k, (name, v) in found._rows.items()} == {
            k: (name, v.tolist()) for k, (name, v) in before._rows.items()
        }
        return "the same"

    run(change)


def test_stores_of_replies(tmp_path, rng):
    jobs = [
        Job(Endpoint("http://127.0.0.1:9/v1", "m"), LETTERS, calls, mode)
        for mode, calls in (("decisions", drawn_calls([QUESTION], 2)), ("logprobs", calls_in_orders([QUESTION])[:2]))
    ]
    lines: list[Any] = []
    for job in jobs:
        for call in job.calls:
            read = read_decision if job.mode == "decisions" else read_logprobs
            lines.append({"attempt": f"r-{len(lines)}", "bytes": 300, "bound": [300, 1]})
            row = {"key": job.identity(call), "attempt": lines[-1]["attempt"], "reply": f"id{len(lines)}", "tokens": [80, 1]}
            row |= {"id": call.question.id, "order": list(call.order), "draw": call.draw}
            lines.append(row | read(reply()["choices"][0], LETTERS.labels[:3]))
    lines += [{"attempt": "r-8", "bound": [9, 1]}, {"attempt": "r-8", "free": "429"}, {"attempt": "r-9", "void": "id3"}]
    path = tmp_path / "replies.jsonl"

    def change() -> str:
        path.write_bytes(one(lines, rng))
        try:
            store = Replies(tmp_path)
        except ValueError as error:
            assert "is no line of a store" in str(error)
            return "refused"
        assert 0 <= store.spent.tokens < 10**12
        for job in jobs:  # whatever passes can be used
            for call in job.calls:
                if (record := job.record(store, call)) is not None:
                    given = record.get("probabilities", [0.5])
                    assert record.get("decision", 0) in (0, 1, 2) and all(0 <= p <= 1 for p in given)
        store.append({"attempt": "new", "bound": [5, 1]})
        assert Replies(tmp_path).spent == store.spent
        return "read"

    run(change)


def test_api_replies(tmp_path, rng, answered):  # noqa: F811
    """One attempt each through the openai client: bodies, statuses and headers."""
    names = [
        "Retry-After",
        "retry-after-ms",
        "Content-Type",
        "Content-Encoding",
        "Location",
        "x-should-retry",
        "x-request-id",
    ]
    values = [
        "-1",
        "nan",
        "1e400",
        "inf",
        "Mon, 01 Jan 0001 00:00:00 -0000",
        "Fri, 31 Dec 9999 23:59:59 +1400",
        "gzip",
        "x" * 99,
    ]
    values += [
        "application/json; charset=utf-7",
        "text/html",
        "true",
        "http://elsewhere.example/",
        "",
        "0.0001",
        "99999999999999",
    ]
    endpoint = Endpoint("http://127.0.0.1:9/v1", "m", max_retries=0)

    def answer(request: httpx2.Request) -> httpx2.Response:
        body = one([reply(id=f"r{rng.integers(10**12)}")], rng)
        headers = {names[rng.integers(len(names))]: values[rng.integers(len(values))]} if rng.random() < 0.3 else {}
        status = (
            200
            if rng.random() < 0.8
            else int(rng.choice([201, 204, 302, 400, 401, 404, 408, 409, 418, 429, 500, 502, 504, 599]))
        )
        return httpx2.Response(status, headers=headers, stream=httpx2.ByteStream(body))

    answered(answer)
    store = Replies(tmp_path)
    outcomes, started = Counter[str](), time.monotonic()

    async def ask() -> float:
        most = 0.0
        budget = Budget(store, Limits(), Prices(1.0, 1.0))
        async with endpoint.open(budget, 1) as (connection,):
            for number in range(N):
                mode = ("decisions", "logprobs")[number % 2]
                before = time.monotonic()
                connection.client._client.shared.not_before = 0.0
                try:
                    found = await connection.ask(endpoint.messages(QUESTION, (0, 1, 2), LETTERS), mode)
                except (CallFailed, EndpointError, Stopped) as error:
                    outcomes[type(error).__name__] += 1
                else:
                    row = (read_decision if mode == "decisions" else read_logprobs)(found.choice, LETTERS.labels[:3])
                    outcomes["failed" if "failed" in row else "read"] += 1
                    row |= {"key": f"k{number}", "attempt": found.attempt, "reply": found.reply, "tokens": found.tokens}
                    await budget.reply(row)
                most = max(most, time.monotonic() - before)
        return most

    most = asyncio.run(ask())
    again = Replies(tmp_path)  # what was kept can be read
    assert len(again) == outcomes["failed"] + outcomes["read"] and again.spent == store.spent and store.spent.calls == N
    tally(outcomes, started, most)
