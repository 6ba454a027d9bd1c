"""The store: content decides, nothing is paid twice, nothing paid for is lost. Planted teachers, no language model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from permdistill import scores
from permdistill.orders import all_orders
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question
from permdistill.scores import MissingScores, Store
from permdistill.teachers import PlantedTeacher

LETTERS = TEMPLATES["letters"]
BIAS = np.array([1.0, 0.3, 0.0])


def make_questions(n: int) -> list[Question]:
    return [Question(f"q{i}", "", f"Question {i}?", ("a", "b", f"c{i}")) for i in range(n)]


def make_teacher(questions: list[Question], bias: np.ndarray = BIAS) -> PlantedTeacher:
    rng = np.random.default_rng(0)
    return PlantedTeacher({q.id: rng.normal(size=len(q.options)) for q in questions}, bias)


@contextmanager
def forked(work: Callable[[], object]) -> Iterator[int]:
    """A process that does the work and ends, killed at the end of the block if it is still at it; gives its id."""
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # the threads that OpenMP made before are not in this process: it would wait for them
            tqdm.set_lock(threading.RLock())  # the usual one is all forks' together: one killed with it holds up the others
            work()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    try:
        yield child
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


class Failing(PlantedTeacher):
    """Raises at the ``last``-th call of log_probs, as a killed machine would."""

    last: int = 3

    def log_probs(self, questions, orders, template):
        if self.calls == self.last:
            raise KeyboardInterrupt
        return super().log_probs(questions, orders, template)


# --------------------------------------------------------------------------------------------------------------------
# Content keys

QUESTION = Question("q", "Passage.", "Hot?", ("ice", "fire"))
KEY = scores.content_key(QUESTION, all_orders(2), LETTERS, "model")


@pytest.mark.parametrize(
    "changed",
    [
        replace(QUESTION, context="Other."),
        replace(QUESTION, question="Cold?"),
        replace(QUESTION, options=("ice", "fire!")),
        replace(QUESTION, options=("fire", "ice")),
        replace(QUESTION, context="", question="Passage.Hot?"),
    ],
)
def test_key_changes_with_every_text(changed):
    assert scores.content_key(changed, all_orders(2), LETTERS, "model") != KEY


def test_key_changes_with_template_orders_and_model():
    assert scores.content_key(QUESTION, all_orders(2), TEMPLATES["summaries"], "model") != KEY
    assert scores.content_key(QUESTION, all_orders(2), replace(LETTERS, after="!"), "model") != KEY
    assert scores.content_key(QUESTION, all_orders(2)[::-1], LETTERS, "model") != KEY
    assert scores.content_key(QUESTION, all_orders(2)[:1], LETTERS, "model") != KEY
    assert scores.content_key(QUESTION, all_orders(2), LETTERS, "model bfloat16") != KEY


def test_key_does_not_change_with_id_or_answer():
    assert scores.content_key(replace(QUESTION, id="other", answer=1), all_orders(2), LETTERS, "model") == KEY


def test_key_is_fixed():
    """The committed scores are found by this key: a change of its recipe must be a decision, not an accident."""
    template = replace(
        LETTERS, name="t", labels=("A", "B"), before="{context}{question}", before_no_context="{question}", option="{option}"
    )
    assert scores.content_key(QUESTION, all_orders(2), template, "model") == "f5bbb015d6d69baa64d60eb5e3a0597b"


# --------------------------------------------------------------------------------------------------------------------
# Scoring and loading


def test_scores_are_the_teachers(tmp_path):
    questions = make_questions(4)
    teacher = make_teacher(questions)
    assert scores.score(Store(tmp_path), teacher, questions, LETTERS) == 4
    loaded = scores.load(Store(tmp_path), questions, LETTERS, teacher.model_key)
    assert loaded.shape == (4, 6, 3)
    assert loaded.dtype == np.float64
    expected = make_teacher(questions).log_probs(questions, all_orders(3), LETTERS)
    assert np.array_equal(loaded, expected.astype(np.float64))
    # In closed form: question 2, order (1, 2, 0) puts option 0 at the last position.
    logits = teacher.preferences["q2"] + BIAS[[2, 0, 1]]
    order = all_orders(3).tolist().index([1, 2, 0])
    assert scores.probabilities(loaded)[2, order] == pytest.approx(np.exp(logits) / np.exp(logits).sum(), abs=1e-6)


def test_loading_follows_the_questions_not_the_file(tmp_path):
    questions = make_questions(5)
    teacher = make_teacher(questions)
    store = Store(tmp_path)
    scores.score(store, teacher, questions, LETTERS)
    forward = scores.load(store, questions, LETTERS, teacher.model_key)
    assert np.array_equal(scores.load(store, questions[::-1], LETTERS, teacher.model_key), forward[::-1])


def test_second_run_pays_nothing(tmp_path):
    questions = make_questions(5)
    teacher = make_teacher(questions)
    scores.score(Store(tmp_path), teacher, questions, LETTERS)
    assert teacher.calls == 5
    assert scores.score(Store(tmp_path), teacher, questions, LETTERS) == 0
    renamed = [replace(q, id=f"new {q.id}", answer=1) for q in questions]
    assert scores.score(Store(tmp_path), teacher, renamed, LETTERS) == 0
    assert teacher.calls == 5


def test_only_new_questions_are_paid(tmp_path):
    questions = make_questions(7)
    teacher = make_teacher(questions)
    scores.score(Store(tmp_path), teacher, questions[:3], LETTERS)
    assert scores.score(Store(tmp_path), teacher, questions, LETTERS) == 4
    assert teacher.calls == 7


def test_same_content_under_two_ids_is_paid_once(tmp_path):
    one, two = make_questions(1)[0], replace(make_questions(1)[0], id="again")
    teacher = PlantedTeacher({"q0": np.zeros(3), "again": np.zeros(3)}, BIAS)
    scores.score(Store(tmp_path), teacher, [one, two], LETTERS)
    assert teacher.calls == 1
    assert scores.load(Store(tmp_path), [one, two], LETTERS, teacher.model_key).shape == (2, 6, 3)


def test_different_numbers_of_options_share_a_store(tmp_path):
    for k in (2, 3, 4):  # a planted bias has a length, hence one teacher a K
        question = Question(f"k{k}", "Same passage.", "Which?", tuple("abcdef"[:k]))
        teacher = PlantedTeacher({question.id: np.arange(len(question.options))}, np.zeros(len(question.options)))
        scores.score(Store(tmp_path), teacher, [question], LETTERS)
        found = scores.load(Store(tmp_path), [question], LETTERS, teacher.model_key)
        assert found.shape == (1, len(all_orders(len(question.options))), len(question.options))
    assert len(Store(tmp_path)) == 3


def test_questions_of_one_passage_go_to_the_teacher_together(tmp_path):
    sizes = []

    class Recording(PlantedTeacher):
        def log_probs(self, questions, orders, template):
            sizes.append(len(questions))
            return super().log_probs(questions, orders, template)

    plain = make_questions(2)
    questions = [*(replace(q, id=f"p{i}", context="Passage.") for i, q in enumerate(make_questions(3))), *plain]
    scores.score(Store(tmp_path), Recording({q.id: np.zeros(3) for q in questions}, BIAS), questions, LETTERS)
    assert sorted(sizes) == [1, 1, 3]


def test_interrupted_run_is_resumed_without_loss_or_double_work(tmp_path):
    questions = make_questions(8)
    planted = make_teacher(questions)
    with pytest.raises(KeyboardInterrupt):
        scores.score(Store(tmp_path), Failing(planted.preferences, BIAS), questions, LETTERS)
    assert len(Store(tmp_path)) == 3
    assert scores.score(Store(tmp_path), planted, questions, LETTERS) == 5
    assert planted.calls == 5
    uninterrupted = planted.log_probs(questions, all_orders(3), LETTERS)
    assert np.array_equal(scores.load(Store(tmp_path), questions, LETTERS, planted.model_key), uninterrupted)


def test_kill_9_loses_the_group_in_flight_only(tmp_path):
    class Slow(PlantedTeacher):
        def log_probs(self, questions, orders, template):
            time.sleep(0.1)
            result = super().log_probs(questions, orders, template)
            with open(tmp_path / "paid", "a") as out:
                out.write(questions[0].id + "\n")
            return result

    questions = make_questions(200)
    teacher = Slow({q.id: np.zeros(3) for q in questions}, np.zeros(3))
    with forked(lambda: scores.score(Store(tmp_path), teacher, questions, LETTERS)) as process:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("*.parquet"))) < 3 and time.monotonic() < deadline:
            assert not os.waitpid(process, os.WNOHANG)[0], "the scoring process ended by itself"
            time.sleep(0.02)
    paid = (tmp_path / "paid").read_text().split()
    kept = len(Store(tmp_path))
    assert 3 <= kept < 200
    assert len(paid) - kept in (0, 1)
    questions = make_questions(200)
    teacher = PlantedTeacher({q.id: np.zeros(3) for q in questions}, np.zeros(3))
    scores.score(Store(tmp_path), teacher, questions, LETTERS)
    assert teacher.calls == 200 - kept
    assert np.allclose(scores.load(Store(tmp_path), questions, LETTERS, teacher.model_key), np.log(1 / 3))


def test_a_second_process_that_scores_waits_and_does_nothing_twice(tmp_path, monkeypatch):
    """What another one did while this one waited is known when it starts, and it keeps others out while it scores."""
    questions = make_questions(6)
    mine, theirs = make_teacher(questions), make_teacher(questions)
    store, real, held = Store(tmp_path), scores.locked, []

    @contextmanager
    def locked(path: Path):
        if path.name == ".scoring.lock" and not held:
            held.append(path)
            scores.score(Store(tmp_path), theirs, questions[:4], LETTERS)
        with real(path):
            yield

    class Alone(PlantedTeacher):
        def log_probs(self, *asked):
            with pytest.raises(Timeout):
                FileLock(tmp_path / ".scoring.lock").acquire(timeout=0)
            return super().log_probs(*asked)

    monkeypatch.setattr(scores, "locked", locked)
    alone = Alone(mine.preferences, BIAS)
    assert scores.score(store, alone, questions, LETTERS) == 2 and held
    assert (theirs.calls, alone.calls) == (4, 2)


def test_missing_scores_are_counted_and_named(tmp_path):
    questions = make_questions(5)
    teacher = make_teacher(questions)
    scores.score(Store(tmp_path), teacher, questions[:2], LETTERS)
    with pytest.raises(MissingScores) as caught:
        scores.load(Store(tmp_path), questions, LETTERS, teacher.model_key)
    for part in ("3 of 5 questions", "'q2'", str(tmp_path), "'letters'", "permdistill score"):
        assert part in str(caught.value)


def test_mixed_numbers_of_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"different numbers of options \[2, 3\]"):
        scores.load(Store(tmp_path), [*make_questions(1), QUESTION], LETTERS, "model")


def test_log_probability_that_is_not_finite_is_refused_and_the_rest_kept(tmp_path):
    questions = make_questions(3)

    class Broken(PlantedTeacher):
        def log_probs(self, questions, orders, template):
            return super().log_probs(questions, orders, template) * (np.inf if questions[0].id == "q2" else 1)

    teacher = Broken(make_teacher(questions).preferences, BIAS)
    with pytest.raises(ValueError, match="'q2'.*not finite"):
        scores.score(Store(tmp_path), teacher, questions, LETTERS)
    assert len(Store(tmp_path)) == 2


def test_question_that_does_not_fit_fails_before_any_compute(tmp_path):
    questions = make_questions(3)
    teacher = make_teacher(questions)
    with pytest.raises(ValueError, match="only 2 labels"):
        scores.score(Store(tmp_path), teacher, questions, replace(LETTERS, labels=("A", "B")))
    assert teacher.calls == 0


def test_probabilities_are_renormalised_and_stable():
    found = scores.probabilities(np.array([[-1000.0, -1000.0], [-3.0, -3.0 + np.log(3)]]))
    assert found.tolist() == [[0.5, 0.5], pytest.approx([0.25, 0.75])]


# --------------------------------------------------------------------------------------------------------------------
# Files


def test_rows_hold_no_text_but_the_id(tmp_path):
    questions = [Question("q", "SECRET passage", "SECRET question", ("SECRET a", "SECRET b"))]
    scores.score(Store(tmp_path), PlantedTeacher({"q": np.zeros(2)}, np.zeros(2)), questions, LETTERS)
    (path,) = tmp_path.glob("*.parquet")
    assert pq.read_table(path).column_names == ["key", "id", "k", "n_orders", "log_probs"]
    assert "SECRET" not in json.dumps(pq.read_table(path).to_pylist())


def test_compact_makes_one_file_with_the_same_rows(tmp_path):
    questions = make_questions(6)
    teacher = make_teacher(questions)
    store = Store(tmp_path)
    scores.score(store, teacher, questions, LETTERS)
    assert len(list(tmp_path.glob("*.parquet"))) == 6
    before = scores.load(store, questions, LETTERS, teacher.model_key)
    for _ in range(2):
        path = Store(tmp_path).compact()
        assert list(tmp_path.glob("*.parquet")) == [path]
        assert np.array_equal(scores.load(Store(tmp_path), questions, LETTERS, teacher.model_key), before)


def test_compact_file_does_not_depend_on_the_order_of_scoring(tmp_path):
    questions = make_questions(6)
    for folder, some in (("a", questions), ("b", questions[::-1])):
        store = Store(tmp_path / folder)
        scores.score(store, make_teacher(questions), some, LETTERS)
        store.compact()
    assert (tmp_path / "a" / "scores.parquet").read_bytes() == (tmp_path / "b" / "scores.parquet").read_bytes()


def test_many_shards_are_merged_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "MAX_SHARDS", 4)
    questions = make_questions(10)
    teacher = make_teacher(questions)
    scores.score(Store(tmp_path), teacher, questions, LETTERS)
    assert sorted(path.name[:6] for path in tmp_path.glob("*.parquet")) == ["part-1", "part-1", "scores"]
    assert len(Store(tmp_path)) == 10 and teacher.calls == 10


def test_compact_keeps_what_another_process_has_added(tmp_path):
    questions = make_questions(4)
    teacher = make_teacher(questions)
    mine, theirs = Store(tmp_path), Store(tmp_path)
    scores.score(mine, teacher, questions[:2], LETTERS)
    scores.score(theirs, teacher, questions[2:], LETTERS)
    mine.compact()
    assert len(Store(tmp_path)) == 4


def test_half_written_shard_is_not_read(tmp_path):
    store = Store(tmp_path)
    scores.score(store, make_teacher(make_questions(2)), make_questions(2), LETTERS)
    shard = min(tmp_path.glob("*.parquet"))
    (tmp_path / f".{shard.name}.123.part").write_bytes(shard.read_bytes()[:50])
    assert len(Store(tmp_path)) == 2


# --------------------------------------------------------------------------------------------------------------------
# Files that are damaged, somebody else's, or on the move


def row_of(i: int, value: float = -1.0, k: int = 2) -> dict:
    """A row as :meth:`Store.append` takes it."""
    orders = len(all_orders(k))
    return {
        "key": f"{i:032x}",
        "id": f"q{i}",
        "k": k,
        "n_orders": orders,
        "log_probs": np.full(orders * k, value, np.float32),
    }


def small_store(folder: Path, n: int = 5) -> Path:
    """A compacted store of ``n`` rows; its file."""
    store = Store(folder)
    store.append([row_of(i, -1.0 - i / 7, k=2 + i % 3) for i in range(n)])
    return store.compact()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_stored_values_that_are_not_finite_are_refused(tmp_path, value):
    path = small_store(tmp_path)
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[3]["log_probs"][1] = value
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    with pytest.raises(ValueError, match=r"scores.parquet is damaged.*\(log-probabilities are not finite\)"):
        Store(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"key": None},
        {"id": None},
        {"k": None},
        {"log_probs": None},
        {"log_probs": [-1.0]},
        {"log_probs": [None, -1.0, -1.0, -1.0]},
        {"k": 7},
        {"k": -2, "n_orders": -2},
        {"k": 1, "n_orders": 4},
        {"n_orders": 4, "k": 1},
    ],
)
def test_rows_that_are_none_are_refused(tmp_path, change):
    path = small_store(tmp_path, 1)
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_pylist([table.to_pylist()[0] | change], schema=table.schema), path)
    with pytest.raises(ValueError, match="scores.parquet is damaged, or no file of a store"):
        Store(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not a parquet file at all", None])
def test_a_file_under_a_stores_name_that_is_none_is_named(tmp_path, content):
    if content is None:
        pd.DataFrame({"key": ["mine"], "value": [1]}).to_parquet(tmp_path / "scores.parquet")
    else:
        (tmp_path / "scores.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="scores.parquet is damaged, or no file of a store"):
        Store(tmp_path)


def test_files_of_other_names_are_neither_read_nor_removed(tmp_path):
    pd.DataFrame({"price": [1, 2]}).to_parquet(tmp_path / "mine.parquet")
    small_store(tmp_path / "other")
    for name in ("backup.parquet", "part-1-copy.parquet", "scores.parquet.old"):
        (tmp_path / name).write_bytes((tmp_path / "other" / "scores.parquet").read_bytes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    store = Store(tmp_path)
    assert len(store) == 0
    store.append([row_of(9)])
    store.compact()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert len(Store(tmp_path)) == 1


@pytest.mark.parametrize("write", [lambda store: store.append([row_of(9)]), lambda store: store.compact()])
def test_what_killed_writers_left_half_written_goes(tmp_path, write):
    small_store(tmp_path)
    for name in (scores._shard(), "scores.parquet", "mine.parquet"):
        (tmp_path / f".{name}.4194399.part").write_bytes(b"half")
    (tmp_path / ".notes.part").touch()
    expected = Store(tmp_path)._rows.keys()
    write(Store(tmp_path))
    assert sorted(path.name for path in tmp_path.glob(".*.part")) == [".mine.parquet.4194399.part", ".notes.part"]
    assert expected <= Store(tmp_path)._rows.keys()


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path):
    path = small_store(tmp_path, 40)
    good, before = path.read_bytes(), Store(tmp_path)
    rng = np.random.default_rng(0)
    for place in rng.choice(len(good) * 8, size=300, replace=False):
        spoilt = bytearray(good)
        spoilt[place // 8] ^= 1 << place % 8
        path.write_bytes(spoilt)
        try:
            found = Store(tmp_path)
        except ValueError as error:
            assert "scores.parquet is damaged" in str(error)
        else:
            assert found._rows.keys() == before._rows.keys(), place
            assert all(np.array_equal(found.get(key), before.get(key)) for key in before._rows), place


def test_a_key_with_two_values_is_refused_with_one_it_is_not(tmp_path):
    small_store(tmp_path / "a")
    small_store(tmp_path / "b", 6)
    copy = (tmp_path / "a" / "part-1-01234567.parquet").write_bytes
    copy((tmp_path / "b" / "scores.parquet").read_bytes())
    assert len(Store(tmp_path / "a")) == 6
    Store(tmp_path / "c").append([row_of(0, -5.0)])
    copy(next((tmp_path / "c").glob("*.parquet")).read_bytes())
    with pytest.raises(ValueError, match=r"row 0{32} \(id 'q0'\) has other values than in another file"):
        Store(tmp_path / "a")
    path = small_store(tmp_path / "d")
    pq.write_table(pa.Table.from_pylist([row_of(0), row_of(0)], schema=scores.SCHEMA), path)
    with pytest.raises(ValueError, match="a key is there twice"):
        Store(tmp_path / "d")


def test_of_two_processes_the_quicker_one_counts(tmp_path):
    one, two = Store(tmp_path), Store(tmp_path)
    one.append([row_of(0, -1.0)])
    two.append([row_of(0, -2.0), row_of(1, -3.0)])  # rounding, say
    for store in (two, Store(tmp_path)):
        assert store.get(row_of(0)["key"])[0, 0] == -1 and store.get(row_of(1)["key"])[0, 0] == -3
    assert len(one) == 1 and one.refresh() is None and len(one) == 2


def test_a_file_that_another_process_merges_is_looked_for_again(tmp_path, monkeypatch):
    for i in range(3):
        Store(tmp_path).append([row_of(i)])
    read, done = scores._read, []

    def merged_meanwhile(path: Path):
        if not done:
            done.append(path)
            monkeypatch.setattr(scores, "_read", read)
            Store(tmp_path).compact()
        return read(path)

    monkeypatch.setattr(scores, "_read", merged_meanwhile)
    assert len(Store(tmp_path)) == 3 and done


@pytest.mark.slow
def test_a_store_can_be_opened_while_others_write_and_compact(tmp_path):
    def write_and_compact() -> None:
        store = Store(tmp_path)
        for i in range(10**6):
            store.append([row_of(i % 50)] if i % 50 not in range(len(store)) else [row_of(len(store))])
            if i % 5 == 0:
                store.compact()
            if (tmp_path / "stop").exists():
                break

    with forked(write_and_compact) as one, forked(write_and_compact) as two:
        opened, before, deadline = 0, 0, time.monotonic() + 60
        while opened < 300 and time.monotonic() < deadline:
            now = len(Store(tmp_path))
            assert now >= before  # nothing that was there is missed
            opened, before = opened + (now > 0), now
        (tmp_path / "stop").touch()
        ended = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in (one, two)]
    assert ended == [0, 0] and opened > 100


def test_n_appends_write_n_log_n_rows(tmp_path, monkeypatch):
    written, write = [], scores._write
    monkeypatch.setattr(scores, "MAX_SHARDS", 8)
    monkeypatch.setattr(scores, "_write", lambda path, rows: (written.append(len(rows)), write(path, rows)))
    store, n = Store(tmp_path), 256
    for i in range(n):
        store.append([row_of(i)])
        assert len(list(tmp_path.glob("*.parquet"))) <= 8 + np.log2(n)
    assert sum(written) <= n * (2 + np.log2(n / 8))  # each row once, and once for each time that its file doubles
    assert len(Store(tmp_path)) == n


@pytest.mark.long
def test_a_large_store_opens_quickly_and_in_little_memory(tmp_path):
    values = -np.random.default_rng(0).exponential(size=(100_000, 24, 4)).astype(np.float32)
    scores._write(tmp_path / "scores.parquet", {f"{i:032x}": (f"q{i}", values[i]) for i in range(len(values))})
    script = """
        import sys, time, torch
        from permdistill.engine.placement import PeakMemory
        from permdistill.scores import Store
        with PeakMemory(torch.device("cpu")) as memory:  # getrusage() would give this process's peak before it was forked
            started = time.process_time()
            store = Store(sys.argv[1])
            seconds = time.process_time() - started
        print(seconds, memory.bytes / 2**20, len(store))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    seconds, megabytes, n = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    print(seconds, megabytes)
    assert n == 100_000 and seconds < 1.5 and 38 < megabytes < 200  # on top of torch's; the values themselves are 38


# --------------------------------------------------------------------------------------------------------------------
# Audit


def test_audit_of_an_honest_store_is_zero(tmp_path):
    questions = make_questions(4)
    teacher = make_teacher(questions)
    scores.score(Store(tmp_path), teacher, questions, LETTERS)
    difference = scores.audit(Store(tmp_path), teacher, questions, LETTERS)
    assert difference.shape == (4 * 6,)
    assert difference.max() == 0


def test_a_teacher_that_cannot_answer_a_question_says_so_before_any_compute(tmp_path):
    questions = make_questions(5)
    teacher = make_teacher(questions[:4])
    with pytest.raises(ValueError, match="'q4'"):
        scores.score(Store(tmp_path), teacher, questions, LETTERS)
    assert teacher.calls == 0 and not list(tmp_path.glob("*.parquet"))


def test_audit_takes_questions_with_different_numbers_of_options(tmp_path):
    questions = [Question("a", "", "q?", ("x", "y")), Question("b", "", "q?", ("x", "y", "z"))]
    teachers = {k: PlantedTeacher({q.id: np.arange(float(k)) for q in questions}, np.zeros(k)) for k in (2, 3)}
    for question in questions:
        scores.score(Store(tmp_path), teachers[len(question.options)], [question], LETTERS)

    class Both:
        name, model_key = "both", teachers[3].model_key

        def check(self, some, template):
            pass

        def log_probs(self, some, orders, template):
            return teachers[orders.shape[1]].log_probs(some, orders, template)

    both = Both()
    scores.score(Store(tmp_path), both, questions, LETTERS)
    assert scores.audit(Store(tmp_path), both, questions, LETTERS).shape == (2 + 6,)


def test_audit_finds_a_tampered_row(tmp_path):
    questions = make_questions(4)
    teacher = make_teacher(questions)
    store = Store(tmp_path)
    scores.score(store, teacher, questions, LETTERS)
    key = scores.content_key(questions[1], all_orders(3), LETTERS, teacher.model_key)
    path = store.compact()
    table = pq.read_table(path)
    rows = table.to_pylist()
    (row,) = (row for row in rows if row["key"] == key)
    row["log_probs"][15:] = np.log([0.1, 0.2, 0.7])  # one order of one question
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    difference = scores.audit(Store(tmp_path), teacher, questions, LETTERS).reshape(4, 6)
    honest = scores.probabilities(teacher.log_probs([questions[1]], all_orders(3), LETTERS))[0, 5]
    assert difference[1, 5] == pytest.approx(np.abs(honest - [0.1, 0.2, 0.7]).sum() / 2, abs=1e-6)
    difference[1, 5] = 0
    assert difference.max() == 0


@pytest.mark.parametrize(
    ("differences", "passes"),
    [
        ([0.0, 0.02], True),
        ([0.05, 0.05], False),  # on average
        ([0.0] * 20 + [0.2], False),
        ([np.nan, np.nan], False),
        ([0.0, np.nan], False),
        ([np.inf], False),
        ([], False),
    ],
)
def test_audit_passes_only_within_both_limits(differences, passes):
    assert scores.audit_passes(np.array(differences), 0.02, 0.15) is passes


def test_audit_of_missing_scores_says_so(tmp_path):
    questions = make_questions(1)
    with pytest.raises(MissingScores, match="1 of 1"):
        scores.audit(Store(tmp_path), make_teacher(questions), questions, LETTERS)


# --------------------------------------------------------------------------------------------------------------------
# The planted teacher itself


def test_planted_teacher_without_bias_is_invariant_and_with_it_is_not():
    questions = make_questions(3)
    fair = make_teacher(questions, np.zeros(3)).log_probs(questions, all_orders(3), LETTERS)
    biased = make_teacher(questions).log_probs(questions, all_orders(3), LETTERS)
    assert np.ptp(fair, axis=1).max() < 1e-6
    assert np.ptp(biased, axis=1).min() > 0.05


def test_planted_teachers_of_different_bias_have_different_keys():
    questions = make_questions(1)
    assert make_teacher(questions).model_key != make_teacher(questions, np.zeros(3)).model_key


def test_folder_may_be_absent(tmp_path):
    assert len(Store(tmp_path / "nothing")) == 0
    assert not Path(tmp_path / "nothing").exists()


# --------------------------------------------------------------------------------------------------------------------
# Scores from elsewhere
