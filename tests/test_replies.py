"""The store of replies: what is in the file is what memory says, whatever was cut short, came twice or came at once."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest

from permdistill.api.replies import Replies, content_key
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question

QUESTION = Question("q", "A context.", "Which?", ("x", "y", "z"))
SAMPLING = {"max_tokens": 1, "temperature": 1.0}


def key(question=QUESTION, order=(2, 0, 1), template="letters", model="api:host/m", sampling=SAMPLING, draw=0, attempt=0):
    return content_key(question, order, TEMPLATES[template], model, sampling, draw, attempt)


def reply(number: int, tokens: tuple[int, int] | None = (50, 1), **fields) -> list[dict]:
    return [
        {"attempt": f"r-{number}", "bound": [200, 1]},
        {"key": f"k{number}", "attempt": f"r-{number}", "reply": f"id{number}", "tokens": tokens, "position": 0, **fields},
    ]


def test_key_changes_with_everything_that_the_reply_depends_on():
    others = [
        key(replace(QUESTION, context="Another.")),
        key(replace(QUESTION, question="Who?")),
        key(replace(QUESTION, options=("x", "z", "y"))),
        key(order=(0, 1, 2)),
        key(template="numbers"),
        key(model="api:host/n"),
        key(sampling=SAMPLING | {"temperature": 0.7}),
        key(draw=1),
        key(attempt=1),
    ]
    assert len({key(), *others}) == 1 + len(others)
    assert key(replace(QUESTION, id="other", answer=1)) == key()


def test_key_is_fixed():
    """Paid replies are found by this key: a change of its recipe must be a decision, not an accident."""
    assert key() == "7a2f3f8e982b32f56c46fce26a73bcfa"


def test_round_trip_and_what_it_cost(tmp_path):
    store = Replies(tmp_path)
    store.append(*reply(1), *reply(2, tokens=None))
    store.append({"attempt": "r-3", "bound": [300, 1]})  # nobody knows what became of it
    store.append({"attempt": "r-4", "bound": [400, 1]}, {"attempt": "r-4", "free": "429"})
    for found in (store, Replies(tmp_path)):
        assert len(found) == 2 and "k1" in found and found.get("k3") is None
        assert found.get("k1")["position"] == 0
        assert (found.spent.calls, found.spent.prompt_tokens, found.spent.completion_tokens) == (4, 50 + 200 + 300, 3)
        assert found.spent.tokens == 553
        assert found.has_reply_id("id2") and not found.has_reply_id("id3")


def test_second_reply_to_a_key_changes_nothing(tmp_path):
    store = Replies(tmp_path)
    store.append(*reply(1))
    before = store.path.read_bytes()
    store.append({**reply(1)[1], "position": 2})
    assert store.get("k1")["position"] == 0 and store.path.read_bytes() == before


def test_line_cut_short_by_a_kill_is_dropped_and_written_over(tmp_path):
    store = Replies(tmp_path)
    store.append(*reply(1))
    whole = store.path.read_bytes()
    for cut in (1, 20, len(whole.split(b"\n")[1]) - 1):
        store.path.write_bytes(whole + whole.split(b"\n")[1][:cut])
        again = Replies(tmp_path)
        assert len(again) == 1
        again.append(*reply(2))
        assert len(Replies(tmp_path)) == 2
        assert all(json.loads(line) for line in again.path.read_text().splitlines())


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path):
    store = Replies(tmp_path)
    store.append(*reply(1), *reply(2))
    store.path.write_bytes(store.path.read_bytes()[:-1])
    again = Replies(tmp_path)
    assert len(again) == 2 and again.spent == store.spent
    again.append(*reply(3))
    assert len(Replies(tmp_path)) == 3 and len(store.path.read_text().splitlines()) == 6


@pytest.mark.parametrize(
    "change",
    [
        {"position": -1},
        {"position": 6},
        {"position": 3, "order": [0, 2, 1]},
        {"position": True},
        {"position": 1.0},
        {"position": None},
        {"tokens": [10**400, 1]},
        {"tokens": [-1, 1]},
        {"tokens": [1]},
        {"tokens": []},
        {"tokens": 0},
        {"tokens": "12"},
        {"tokens": [50.5, 1]},
        {"reply": 5},
        {"reply": None},
        {"key": ["k"]},
        {"attempt": None},
        {"failed": "also"},
        {"failed": 1, "position": ...},
        {"log_probs": [800, -1, -2], "floor": -3, "position": ...},
        {"log_probs": [float("nan"), -1, -2], "floor": -3, "position": ...},
        {"log_probs": [-1, -2, -3], "floor": None, "position": ...},
        {"log_probs": [None, None], "floor": -1.0, "position": ...},
        {"log_probs": [-1.0, -2.0], "floor": -2.0, "order": [0, 1, 2], "position": ...},
        {"log_probs": -1, "floor": -1.0, "position": ...},
        {"position": ...},
    ],
)
def test_a_reply_of_which_something_is_wrong_is_named(tmp_path, change):
    store = Replies(tmp_path)
    store.append(*reply(1))
    first, second = map(json.loads, store.path.read_text().splitlines())
    changed = {name: value for name, value in {**second, **change}.items() if value is not ...}
    store.path.write_text(f"{json.dumps(first)}\n{json.dumps(changed)}\n")
    with pytest.raises(ValueError, match="line 2 is no line of a store"):
        Replies(tmp_path)
    store.path.write_text(f"{json.dumps(first)}\n" + "[" * 5000 + "\n")
    with pytest.raises(ValueError, match="line 2 is no line of a store"):
        Replies(tmp_path)


@pytest.mark.parametrize("bound", [[10**400, 1], [1], [1, 2, 3], [-1, 0], ["1", 1], [None, 1]])
def test_an_attempt_of_which_something_is_wrong_is_named(tmp_path, bound):
    (tmp_path / "replies.jsonl").write_text(json.dumps({"attempt": "a", "bound": bound}) + "\n")
    with pytest.raises(ValueError, match="line 1 is no line of a store"):
        Replies(tmp_path)


def test_broken_line_in_the_middle_is_named(tmp_path):
    Replies(tmp_path).append(*reply(1), *reply(2))
    path = tmp_path / "replies.jsonl"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], lines[1][:10], *lines[2:]]))
    with pytest.raises(ValueError, match=r"replies.jsonl, line 2 is no line of a store \(JSONDecodeError"):
        Replies(tmp_path)
    for other in ("null", '{"key": "k1"}', '{"attempt": "r-1", "bound": 5}'):
        path.write_text("\n".join([lines[0], other, *lines[2:]]))
        with pytest.raises(ValueError, match=r"line 2 is no line of a store .*restore it, or delete that line"):
            Replies(tmp_path)


def test_what_the_dearest_replies_cost_is_known_again(tmp_path):
    store = Replies(tmp_path)
    assert store.dearest is None
    store.append(*reply(1, tokens=None))
    assert store.dearest == Replies(tmp_path).dearest == (0, 1)
    for number, (n_bytes, bound, tokens) in enumerate([(100, 100, (150, 3)), (100, 150, (170, 1)), (300, 370, (200, 2))], 2):
        store.append({"attempt": f"r-{number}", "bytes": n_bytes, "bound": [bound, 1]}, reply(number, tokens)[1])
    store.append({"attempt": "r-9", "bytes": 10, "bound": [900, 1]}, {"attempt": "r-9", "free": "429"})
    assert store.dearest == Replies(tmp_path).dearest == (70, 3)


def test_appends_of_many_threads_are_all_there(tmp_path):
    store = Replies(tmp_path)

    def work(start: int) -> None:
        for number in range(start, start + 50):
            for line in reply(number):
                store.append(line)

    threads = [threading.Thread(target=work, args=(1000 * t,)) for t in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in (store, Replies(tmp_path)):
        assert len(found) == 400
        assert (found.spent.calls, found.spent.prompt_tokens) == (400, 400 * 50)


def test_order_of_the_lines_does_not_matter_to_the_replies(tmp_path):
    a, b = Replies(tmp_path / "a"), Replies(tmp_path / "b")
    lines = [reply(n) for n in range(5)]
    a.append(*(line for pair in lines for line in pair))
    b.append(*(pair[0] for pair in lines), *(pair[1] for pair in reversed(lines)))
    assert {k: a.get(k) for k in map("k{}".format, range(5))} == {k: b.get(k) for k in map("k{}".format, range(5))}
    assert a.spent == b.spent


@pytest.mark.parametrize("late", [False, True])
def test_void_reply_answers_nothing_but_is_paid(late, tmp_path):
    store = Replies(tmp_path)
    void = {"attempt": "r-9", "void": "id1"}
    for line in [void, *reply(1)] if late else [*reply(1), void]:
        store.append(line)
    for found in (store, Replies(tmp_path)):
        assert "k1" not in found and found.has_reply_id("id1") and found.spent.prompt_tokens == 50
    store.append({"attempt": "r-8", "bound": [200, 1]}, {**reply(1)[1], "attempt": "r-8", "reply": "id8", "position": 2})
    store.append(void)  # a third copy: the new reply stays
    assert store.get("k1")["position"] == Replies(tmp_path).get("k1")["position"] == 2
