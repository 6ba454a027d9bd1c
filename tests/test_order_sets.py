"""Any K in any set of orders: stored, audited, measured, asked of a server, learnt from. Planted answers, tiny encoders."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openai_server import planted_backend, serving
from test_scaleout import Teacher
from test_students import WORDS, make_encoder

from permdistill import cli, debias, fewcalls, scores, teachers
from permdistill.api.command import _said, _stages
from permdistill.api.endpoint import Endpoint
from permdistill.api.jobs import Job, drawn_calls, presented
from permdistill.api.replies import Replies
from permdistill.commands import adaptive_orders
from permdistill.configs import StudentConfig, TrainingConfig
from permdistill.lessons import Lesson
from permdistill.measure.report import measure
from permdistill.orders import SETS, all_orders, cyclic_orders, order_set, to_options, to_positions, williams_orders
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question
from permdistill.scores import Asked, Store
from permdistill.training import train

LETTERS = TEMPLATES["letters"]
SCORES = Path(__file__).parent.parent / "scores"


def some(k: int, n: int = 4) -> list[Question]:
    return [Question(f"k{k}-{i}", "", f"which {i} ?", tuple(f"{WORDS[j % 5]} {j}" for j in range(k))) for i in range(n)]


class Counting(Teacher):
    """Counts what it is asked."""

    def log_probs(self, questions, orders, template):
        self.orders = getattr(self, "orders", 0) + len(questions) * len(orders)
        return super().log_probs(questions, orders, template)


def make_teacher(questions: list[Question]) -> Counting:
    rng = np.random.default_rng(0)
    return Counting({q.id: 2 * rng.normal(size=len(q.options)) for q in questions}, np.zeros(1))


# --------------------------------------------------------------------------------------------------------------------
# Which orders


@pytest.mark.parametrize("k", [2, 3, 6, 7, 10, 26])
@pytest.mark.parametrize("name", [*SETS, "1", "2", "8", "50"])
def test_sets_are_different_orders_the_original_first(name, k):
    if name == "all" and k > 6:
        with pytest.raises(ValueError, match="take cyclic, Williams or reverse pairs"):
            order_set(name, k)
        return
    found = order_set(name, k)
    assert (np.sort(found, axis=1) == np.arange(k)).all() and found[0].tolist() == list(range(k))
    assert len({tuple(order) for order in found.tolist()}) == len(found)
    assert order_set(name, k).tolist() == found.tolist()


def test_random_orders_go_on_from_a_smaller_number_and_end_with_all():
    assert order_set("12", 4)[:5].tolist() == order_set("5", 4).tolist()
    assert order_set("12", 4, seed=1).tolist() != order_set("12", 4).tolist()
    assert sorted(order_set("99", 3).tolist()) == all_orders(3).tolist()
    for bad in ("drawn", "0", "-3", "", "1.5", "²"):
        with pytest.raises(ValueError, match="give all, cyclic, williams, pairs, or how many"):
            order_set(bad, 4)


@pytest.mark.parametrize("name", [*SETS, "3"])
def test_fixed_options_keep_their_places(name):
    found = order_set(name, 5, fixed=(4, 1))
    assert (found[:, [1, 4]] == [1, 4]).all() and len(found) == len(order_set(name, 3))
    assert order_set(name, 2, fixed=(1,)).tolist() == [[0, 1]] == order_set(name, 2, fixed=(0, 1)).tolist()


# --------------------------------------------------------------------------------------------------------------------
# The store


def test_committed_stores_are_read_and_written_without_a_change(tmp_path):
    committed = pq.read_table(SCORES / "smollm2-135m" / "scores.parquet")
    shutil.copy(SCORES / "smollm2-135m" / "scores.parquet", tmp_path)
    found = pq.read_table(Store(tmp_path).compact())
    assert found.schema.equals(committed.schema) and found.equals(committed)


def test_no_order_is_paid_twice_whatever_set_it_belongs_to(tmp_path):
    questions = some(4)
    teacher, store = make_teacher(questions), Store(tmp_path)
    every = teacher.log_probs(questions, all_orders(4), LETTERS).astype(float)
    teacher.orders, places = 0, {tuple(order): j for j, order in enumerate(all_orders(4).tolist())}
    known: set = set()
    for name in ("cyclic", "pairs", "williams", "3", "all", "8"):
        wanted = order_set(name, 4)
        new = {tuple(order) for order in wanted.tolist()} - known
        assert scores.score(store, teacher, questions, LETTERS, name) == (len(questions) if new else 0), name
        known |= new
        assert teacher.orders == len(questions) * len(known), name
        found = scores.load(Store(tmp_path), questions, LETTERS, teacher.model_key, name)
        assert np.array_equal(found, every[:, [places[tuple(order)] for order in wanted.tolist()]]), name
    assert scores.audit(store, teacher, questions, LETTERS, orders="williams").max() == 0
    assert not scores.lacking(store, questions, LETTERS, teacher.model_key, order_set("all", 4))


def test_a_row_of_all_orders_answers_each_set_and_keeps_its_form(tmp_path):
    questions = some(3)
    teacher, store = make_teacher(questions), Store(tmp_path)
    scores.score(store, teacher, questions, LETTERS)
    before = store.compact().read_bytes()
    assert pq.read_table(tmp_path / "scores.parquet")["n_orders"].to_pylist() == [6] * 4
    for name in ("cyclic", "pairs", "williams", "4"):
        assert scores.score(store, teacher, questions, LETTERS, name) == 0
        scores.load(store, questions, LETTERS, teacher.model_key, name)
    assert store.compact().read_bytes() == before


def test_the_orders_stand_in_the_keys(tmp_path):
    questions = some(10, 1)
    teacher, store = make_teacher(questions), Store(tmp_path)
    scores.score(store, teacher, questions, LETTERS, "pairs")
    rows = pq.read_table(store.compact()).to_pylist()
    assert sorted(row["key"].partition(":")[2] for row in rows) == ["0,1,2,3,4,5,6,7,8,9", "9,8,7,6,5,4,3,2,1,0"]
    assert {(row["k"], row["n_orders"], len(row["log_probs"])) for row in rows} == {(10, 1, 10)}


@pytest.mark.parametrize("end", ["", ":", ":0,1", ":0,1,1", ":0,1,3", ":a,b,c"])
def test_a_row_of_one_order_that_names_none_is_refused(end, tmp_path):
    row = {"key": "0" * 32 + end, "id": "q", "k": 3, "n_orders": 1, "log_probs": [-1.0, -2.0, -3.0]}
    pq.write_table(pa.Table.from_pylist([row], schema=scores.SCHEMA), tmp_path / "scores.parquet")
    with pytest.raises(ValueError, match="scores.parquet is damaged, or no file of a store"):
        Store(tmp_path)


def test_questions_in_different_orders_are_loaded_one_by_one(tmp_path):
    questions = some(3, 2)
    teacher, store = make_teacher(questions), Store(tmp_path)
    orders = {questions[0]: cyclic_orders(3), questions[1]: all_orders(3)[:1]}.__getitem__
    scores.score(store, teacher, questions, LETTERS, orders)
    assert [len(P) for P in scores.load_each(store, questions, LETTERS, teacher.model_key, orders)] == [3, 1]
    with pytest.raises(ValueError, match=r"different numbers of orders \[1, 3\]: use load_each"):
        scores.load(store, questions, LETTERS, teacher.model_key, orders)
    with pytest.raises(scores.MissingScores, match="1 of 2 questions have no scores"):
        scores.load(store, questions, LETTERS, teacher.model_key, "cyclic")
    (group,) = [g for g in scores.lacking(store, questions, LETTERS, teacher.model_key, "cyclic")]
    assert isinstance(group[0], Asked) and group[0].orders.tolist() == cyclic_orders(3)[1:].tolist()


# --------------------------------------------------------------------------------------------------------------------
# Adaptive orders


def test_asking_adaptively_keeps_to_its_calls_and_asks_the_least_sure():
    k, n = 4, 400
    every, rng = all_orders(k), np.random.default_rng(0)
    logits = 2 * rng.normal(size=(n, 1, k)) + np.array([1.5, 0.5, 0, 0])  # by position
    taste = np.exp(to_positions(np.broadcast_to(logits - [1.5, 0.5, 0, 0], (n, 24, k)), every) + [1.5, 0.5, 0, 0])
    P = to_options(taste / taste.sum(-1, keepdims=True), every)
    index, asked = {tuple(order): j for j, order in enumerate(every.tolist())}, Counter()

    def ask(places, design):
        asked[len(design)] += len(places)
        return P[places][:, [index[tuple(order)] for order in design.tolist()]]

    designs, calls = fewcalls.adaptive_plan(k)
    last = fewcalls.ask_adaptively(ask, n, designs, calls)
    cost = np.array([len(design) for design in designs])[last].mean()
    assert calls - 0.05 < cost <= calls == 2.6 and asked[1] == n > asked[2] > asked[4] > 0
    calibrated = fewcalls.batch_calibration(P[:, :1], every[:1])[:, 0]
    assert fewcalls.margins(calibrated)[last == 0].min() >= fewcalls.margins(calibrated)[last > 0].max()


def test_hard_verdicts_are_asked_on_where_they_disagree():
    said = np.eye(3)[np.array([[0, 0], [0, 1], [2, 2], [1, 2]])]  # (item, order, option) of a pair of orders
    designs, calls = fewcalls.adaptive_plan(3, 4.0, hard=True)
    assert [len(design) for design in designs] == [2, 6]
    last = fewcalls.ask_adaptively(
        lambda i, d: said[i] if len(d) == 2 else np.full((len(i), 6, 3), 1 / 3), 4, designs, 5, False
    )
    assert last.tolist() == [0, 1, 0, 1]  # three could go on, but two are sure
    assert [fewcalls.adaptive_plan(2, hard=hard)[1] for hard in (False, True)] == [1.5, 2]
    said = argparse.Namespace(calls=50, mode="logprobs")
    assert _stages(said, Question("q", "", "?", tuple("abcd")))[1] == 24  # more orders there are not
    with pytest.raises(ValueError, match="1 calls a question: the first design takes 2"):
        _stages(argparse.Namespace(calls=1, mode="decisions"), Question("q", "", "?", tuple("abcd")))
    assert [len(design) for design in fewcalls.adaptive_plan(4, 8)[0]] == [2, 4, 24]
    with pytest.raises(ValueError, match="1.5 calls a question: the first design takes 2"):
        fewcalls.share(designs, 1.5)


def test_questions_of_each_k_are_stopped_for_themselves():
    questions = [*some(2, 12), *some(5, 12)]
    teacher = make_teacher(questions)

    def answered(own, design):
        return scores.probabilities(teacher.log_probs(own, design, LETTERS))

    orders = adaptive_orders(questions, answered)
    counts = {k: [len(orders(q)) for q in questions if len(q.options) == k] for k in (2, 5)}
    assert set(counts[2]) == {1, 2} and sum(counts[2]) == 18 and set(counts[5]) == {1, 2, 10} and sum(counts[5]) <= 2.6 * 12


# --------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture
def mixed(tmp_path, monkeypatch) -> list[Question]:
    """Questions of 2, 3, 4 and 5 options in one file, and a planted teacher in the place of a downloaded one."""
    questions = [q for k in (2, 3, 4, 5) for q in some(k)]
    records = [{"id": q.id, "question": q.question, "options": q.options, "answer": 1} for q in questions]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    planted(monkeypatch, questions)
    return questions


def planted(monkeypatch, questions: list[Question]) -> Counting:
    teacher = make_teacher(questions)
    monkeypatch.setattr(teachers, "load_teacher", lambda name, dtype: teacher)
    monkeypatch.setattr(teachers, "model_key", lambda name, dtype: teacher.model_key)
    monkeypatch.setattr(teachers, "has_chat_template", lambda name: True)
    return teacher


def students_of(questions: list[Question], targets: dict[str, np.ndarray], name: str, folder: Path) -> None:
    """Train a student of each K from mean answers, in orders of that name; answers must be probabilities."""
    encoder = make_encoder(folder / "encoder")
    for k in sorted({len(q.options) for q in questions}):
        own, shown = [q for q in questions if len(q.options) == k], order_set(name, k)
        lesson = Lesson(own, np.stack([targets[q.id] for q in own]), orders=shown)
        config = StudentConfig(encoder, "per_option", "plain", k, 64)
        student = train(config, TrainingConfig(epochs=1), lesson, folder / f"student-{k}")
        P = student.predict_batch(own, shown)
        assert P.shape == (len(own), len(shown), k) and np.allclose(P.sum(-1), 1, atol=1e-5)


def means(path: Path) -> dict[str, np.ndarray]:
    """{id: mean over its orders} of a file of records; failures are left out."""
    found: dict[str, list[np.ndarray]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        order = record["order"]
        if "log_probs" in record:
            p = np.exp(record["log_probs"]) / np.exp(record["log_probs"]).sum()
        elif "probabilities" in record:
            p = np.array(record["probabilities"]) / sum(record["probabilities"])
        elif record["decision"] is None:
            continue
        else:
            p = np.eye(len(order))[order.index(record["decision"])]
        by_option = np.empty(len(order))
        by_option[order] = p
        found.setdefault(record["id"], []).append(by_option)
    return {name: np.mean(own, axis=0) for name, own in found.items()}


@pytest.mark.parametrize("name", ["cyclic", "adaptive"])
def test_mixed_numbers_of_options_from_score_to_student(mixed, name, tmp_path, capsys):
    path, records = str(tmp_path / "mine.jsonl"), tmp_path / "said.jsonl"
    command = ["--questions", path, "--teacher", "planted", "--scores", str(tmp_path / "scores"), "--orders", name]
    cli.main(["score", *command, "--records", str(records)])
    out = capsys.readouterr().out
    assert "16 questions scored now, 0 were in the store" in out
    assert name == "cyclic" or "calls a question" in out
    before = records.read_text()
    cli.main(["score", *command, "--records", str(records)])
    assert "all 16 questions were in the store" in capsys.readouterr().out and records.read_text() == before
    cli.main(["audit", *command, "--n", "16"])
    assert "16 questions re-scored" in capsys.readouterr().out
    cli.main(["measure", str(records), "--questions", path, "--all"])
    out = capsys.readouterr().out
    assert "16 items, K = 2, 3, 4, 5" in out and "flip rate" in out
    students_of(mixed, means(records), "cyclic", tmp_path)


@pytest.mark.parametrize(
    "name, mode",
    [*itertools.product(["williams", "adaptive", "3"], ["decisions", "logprobs"]), ("adaptive", "answer")],
)
def test_mixed_numbers_of_options_from_ask_to_student(mixed, name, mode, tmp_path, capsys):
    records = tmp_path / "said.jsonl"
    with serving(planted_backend(certain=mode != "logprobs")) as server:
        command = ["ask", "--base-url", server.url, "--model", "local", "--questions", str(tmp_path / "mine.jsonl")]
        command += ["--mode", mode, "--orders", name, "--replies", str(tmp_path / "replies"), "--records", str(records)]
        cli.main([*command, "--dry-run"])
        assert not server.answered
        planned = re.findall(r"at most ([\d,]+) calls in all", capsys.readouterr().out)
        cli.main(command)
        paid = server.answered.total()
        assert len(planned) == (name == "adaptive") and all(paid <= int(calls) <= 1.4 * paid for calls in planned)
        cli.main(command)
        assert server.answered.total() == paid
    n = Counter(json.loads(line)["id"] for line in records.read_text().splitlines())
    assert n.total() == paid and "16 of 16" in capsys.readouterr().out
    for question in mixed:
        k = len(question.options)
        least = 1 if mode == "logprobs" else 2  # one decision is always sure
        assert n[question.id] == len(order_set(name, k)) if name != "adaptive" else least <= n[question.id] <= 2 * k
    report = measure(records, tmp_path / "mine.jsonl")
    assert len(report.records.ids) == 16 and report.table.n.notna().any()
    students_of(mixed, means(records), "cyclic", tmp_path)


@pytest.mark.parametrize("k, name", [(10, "williams"), (10, "cyclic"), (26, "cyclic")])
def test_many_options_are_scored_measured_asked_and_learnt(k, name, tmp_path, monkeypatch, capsys):
    questions = some(k, 3)
    path, records = tmp_path / "mine.jsonl", tmp_path / "said.jsonl"
    rows = [{"id": q.id, "question": q.question, "options": q.options, "answer": 2} for q in questions]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    teacher = planted(monkeypatch, questions)
    command = ["--questions", str(path), "--teacher", "planted", "--scores", str(tmp_path / "scores")]
    with pytest.raises(SystemExit, match=f"K = {k} options have .* orders.*take cyclic, Williams or reverse pairs"):
        cli.main(["score", *command])
    cli.main(["score", *command, "--orders", name, "--records", str(records)])
    assert teacher.orders == 3 * k  # K = 10: one Williams square
    cli.main(["audit", *command, "--orders", name, "--n", "2"])
    report = measure(records, path)
    assert (report.records.counts == k).all() and "accuracy" in str(report)
    table = report.table.set_index("debiaser")
    assert table.n[debias.CYCLIC if name == "cyclic" else fewcalls.WILLIAMS] == 3
    students_of(questions, means(records), name, tmp_path)
    with serving(planted_backend(certain=True)) as server:
        command = ["ask", "--base-url", server.url, "--model", "local", "--questions", str(path), "--orders", name]
        cli.main([*command, "--replies", str(tmp_path / "replies"), "--records", str(records)])
        assert server.answered.total() == 3 * k
    assert len(records.read_text().splitlines()) == 3 * k
    students_of(questions, means(records), name, tmp_path / "asked")


def test_failed_draws_are_null_decisions_that_measure_counts(tmp_path):
    questions = some(3, 6)
    path, records = tmp_path / "mine.jsonl", tmp_path / "said.jsonl"
    rows = [{"id": q.id, "question": q.question, "options": q.options} for q in questions]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with serving(planted_backend(other=0.5)) as server:
        command = ["ask", "--base-url", server.url, "--model", "local", "--questions", str(path), "--draws", "8"]
        with pytest.raises(SystemExit, match="items are incomplete"):
            cli.main([*command, "--tries", "1", "--replies", str(tmp_path / "replies"), "--records", str(records)])
    said = [json.loads(line) for line in records.read_text().splitlines()]
    failed = sum(record["decision"] is None for record in said)
    assert len(said) == 48 and 10 < failed < 38
    report = measure(records)
    assert report.tally.failed.sum() == failed and report.tally.n.sum() == 48


def test_a_failed_call_says_nothing_of_any_option(tmp_path):
    with serving(planted_backend(other=1 - 1e-9)) as server:
        endpoint = Endpoint(server.url, "local")
        job = Job(endpoint, LETTERS, presented(some(3, 1), lambda q: williams_orders(3)), tries=1)
        assert np.array_equal(_said(job, Replies(tmp_path)), np.full((6, 3), 1 / 3))


# --------------------------------------------------------------------------------------------------------------------
# Options that refer to others


@pytest.fixture
def unsafe(tmp_path, monkeypatch) -> list[str]:
    rows = [
        {"id": "safe", "question": "which 0 ?", "options": ["cat", "dog", "tree"]},
        {"id": "last", "question": "which 1 ?", "options": ["cat", "dog", "None of the above"]},
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    planted(monkeypatch, [Question(row["id"], "", row["question"], tuple(row["options"])) for row in rows])
    return ["--questions", str(tmp_path / "mine.jsonl")]


SAYS = "1 of 2 questions have options that refer to others or to their place (first: 'last'): "
WHAT = {"keep": "kept, though no answer", "drop": "dropped", "anchor": "these options keep their places"}


@pytest.mark.parametrize("how", WHAT)
def test_unsafe_questions_are_counted_and_kept_dropped_or_anchored(how, unsafe, tmp_path, capsys):
    records, own = tmp_path / "said.jsonl", ["--unsafe", how] if how != "keep" else []
    command = ["score", *unsafe, *own, "--teacher", "planted", "--scores", str(tmp_path / "scores")]
    cli.main([*command, "--records", str(records)])
    assert SAYS + WHAT[how] in capsys.readouterr().err
    orders: dict[str, list] = {}
    for line in records.read_text().splitlines():
        orders.setdefault(json.loads(line)["id"], []).append(json.loads(line)["order"])
    assert orders["safe"] == all_orders(3).tolist()
    expected = {"keep": all_orders(3).tolist(), "drop": [], "anchor": [[0, 1, 2], [1, 0, 2]]}
    assert orders.get("last", []) == expected[how]


def test_anchored_options_keep_their_places_in_drawn_orders(unsafe, tmp_path, capsys):
    records = tmp_path / "said.jsonl"
    with serving(planted_backend(certain=True)) as server:
        command = ["ask", "--base-url", server.url, "--model", "local", *unsafe, "--unsafe", "anchor", "--draws", "16"]
        cli.main([*command, "--replies", str(tmp_path / "replies"), "--records", str(records)])
        assert SAYS + WHAT["anchor"] in capsys.readouterr().err
        with pytest.raises(SystemExit, match="--orders adaptive does not go with --unsafe anchor"):
            cli.main([*command, "--orders", "adaptive", "--replies", str(tmp_path / "replies")])
    orders = [(row["id"], tuple(row["order"])) for row in map(json.loads, records.read_text().splitlines())]
    assert {order for name, order in orders if name == "last"} == {(0, 1, 2), (1, 0, 2)}
    assert len({order for name, order in orders if name == "safe"}) > 3
    question = Question("q", "", "?", ("cat", "dog"))
    assert {call.order for call in drawn_calls([question], 5, fixed=lambda q: (1,))} == {(0, 1)}


def test_nothing_left_is_an_error(unsafe, tmp_path):
    with pytest.raises(SystemExit, match="all questions are permutation-unsafe: none is left"):
        rows = (tmp_path / "mine.jsonl").read_text().splitlines()[1:]
        (tmp_path / "mine.jsonl").write_text("\n".join(rows), encoding="utf-8")
        cli.main(["score", *unsafe, "--unsafe", "drop", "--teacher", "planted", "--scores", str(tmp_path)])


def test_orders_of_another_name_are_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["score", "--questions", "x.jsonl", "--orders", "some"])
    assert "orders 'some': give all, cyclic, williams, pairs, or how many random ones" in capsys.readouterr().err
