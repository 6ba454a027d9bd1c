"""Black-box teachers over real HTTP: a local server with planted answers, and a proxy that breaks things in front of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from fault_proxy import FAULTS, WHOLE, faulty
from openai_server import Next, planted, planted_backend, serving

from permdistill import cli, debias
from permdistill.api.ask import Report, ask, asking
from permdistill.api.endpoint import Endpoint, EndpointError, Limits, Prices
from permdistill.api.jobs import (
    NO_LABEL_LISTED,
    NO_LOGPROBS,
    NO_OPTION,
    Call,
    Drawn,
    Job,
    MissingReplies,
    calls_in_orders,
    drawn,
    drawn_calls,
    plan,
    probabilities,
    read_decision,
    read_logprobs,
)
from permdistill.api.replies import Replies
from permdistill.measure import metrics
from permdistill.measure.formats import read
from permdistill.orders import all_orders, cyclic_orders
from permdistill.paper import manifest
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question

TESTS = Path(__file__).parent
LETTERS = TEMPLATES["letters"]
CANARY = "sk-canary-0123456789abcdef"


def make_questions(n: int, k: int = 3) -> list[Question]:
    return [Question(f"q{i}", "", f"Question {i}?", tuple(f"{o}{i}" for o in "uvwxyz"[:k])) for i in range(n)]


def make_job(url: str, calls: list[Call], mode: str = "decisions", tries: int = 3, **settings) -> Job:
    return Job(Endpoint(url, "local", **{"timeout": 20} | settings), LETTERS, calls, mode, tries)


def white_box(question: Question, order: np.ndarray) -> np.ndarray:
    """Probabilities by option that the planted server has for one order, renormalised."""
    p = planted([{"role": "user", "content": LETTERS.user_message(question, order)}])
    by_position = np.array([p["ABCDEF"[k]] for k in range(len(order))])
    by_option = np.empty(len(order))
    by_option[order] = by_position / by_position.sum()
    return by_option


@pytest.fixture(scope="module")
def server():
    with serving(planted_backend()) as running:
        yield running


# --------------------------------------------------------------------------------------------------------------------
# What is asked


def test_drawn_orders_depend_on_content_seed_and_number_only():
    questions = make_questions(4)
    calls = drawn_calls(questions, 6)
    assert drawn_calls(questions[2:3], 3) == calls[12:15]
    renamed = Question("other", "", questions[0].question, questions[0].options, answer=1)
    assert [c.order for c in drawn_calls([renamed], 6)] == [c.order for c in calls[:6]]
    assert [c.order for c in drawn_calls(questions, 6, seed=1)] != [c.order for c in calls]
    with pytest.raises(ValueError, match="n = 0 draws"):
        drawn_calls(questions, 0)


def test_drawn_orders_are_uniform():
    n = Counter(c.order for c in drawn_calls(make_questions(200), 30))
    assert len(n) == 6 and abs(np.array(list(n.values())) / 6000 - 1 / 6).max() < 0.025  # five standard deviations


def test_calls_in_orders_are_all_or_those_given():
    questions = make_questions(2)
    assert [c.order for c in calls_in_orders(questions)] == [tuple(o) for _ in questions for o in all_orders(3).tolist()]
    assert [c.order for c in calls_in_orders(questions, np.array([[1, 2, 0]]))] == [(1, 2, 0)] * 2


@pytest.mark.parametrize(
    "text, position",
    [("A", 0), (" B", 1), ("C.", 2), ("(B)", 1), ("**C**", 2), ("b", None), ("D", None), ("The", None), ("", None)]
    + [("The answer is A.", None), ("A or B", None), ("AB", None), (None, None)],
)
def test_a_decision_is_read_or_refused_never_guessed(text, position):
    expected = {"failed": NO_OPTION} if position is None else {"position": position}
    assert read_decision({"message": {"content": text}, "finish_reason": "stop"}, LETTERS.labels[:3]) == expected


def test_logprobs_are_read_by_the_exact_label():
    def choice(listed: dict[str, float], own: tuple[str, float] = ("A", -1.0)) -> dict:
        top = [{"token": token, "logprob": value} for token, value in listed.items()]
        return {"logprobs": {"content": [{"token": own[0], "logprob": own[1], "top_logprobs": top}]}}

    found = read_logprobs(choice({"B": -0.5, " A": -0.7, "A": -1.0, "The": -4.0}), LETTERS.labels[:3])
    assert found == {"log_probs": [-1.0, -0.5, None], "floor": -4.0}
    assert read_logprobs(choice({"The": -0.1}, ("C", -9.0)), LETTERS.labels[:3])["log_probs"] == [None, None, -9.0]
    assert read_logprobs(choice({"The": -0.1}, ("The", -0.1)), LETTERS.labels[:3]) == {"failed": NO_LABEL_LISTED}
    for nothing in ({}, {"logprobs": None}, {"logprobs": {"content": []}}, {"logprobs": {"content": None}}):
        assert read_logprobs(nothing, LETTERS.labels[:3]) == {"failed": NO_LOGPROBS}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"base_url": "localhost:8000"}, "base_url is 'localhost:8000'"),
        ({"base_url": f"https://user:{CANARY}@host/v1"}, "base_url at host holds more than an address"),
        ({"timeout": 0}, "timeout 0"),
        ({"top_logprobs": 21}, "top_logprobs 21"),
    ],
)
def test_bad_endpoints_are_refused(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        Endpoint(**{"base_url": "http://127.0.0.1:1/v1", "model": "m"} | fields)
    assert CANARY not in str(error.value)


def test_bad_jobs_are_refused_before_any_call(tmp_path):
    url = "http://127.0.0.1:1/v1"
    question = Question("q", "", "?", ("a", "b", "c"))
    with pytest.raises(ValueError, match="mode 'guess'"):
        make_job(url, [], mode="guess")
    with pytest.raises(ValueError, match="tries = 0"):
        make_job(url, [], tries=0)
    with pytest.raises(ValueError, match=r"'q': order \(0, 1\) is no permutation"):
        make_job(url, [Call(question, (0, 1))])
    job = make_job(url, [Call(question, (0, 1, 2))], key_name="NO_SUCH_KEY")
    with pytest.raises(ValueError, match="NO_SUCH_KEY is not set"):
        ask(job, Replies(tmp_path))
    with pytest.raises(ValueError, match="without prices"):
        ask(job, Replies(tmp_path), Limits(cost=1.0))
    assert not Replies(tmp_path).spent.calls


# --------------------------------------------------------------------------------------------------------------------
# What comes back


def test_decisions_and_targets(server, tmp_path):
    questions = make_questions(6)
    # One reply in ten names no option; with the usual three tries one of 384 calls may well have none that does.
    job = make_job(server.url, drawn_calls(questions, 64), tries=9)
    report = ask(job, Replies(tmp_path), concurrency=16)
    assert (report.items, report.complete, report.failed, report.unasked, report.stopped) == (6, 6, {}, [], "")
    assert report.replies == report.calls and report.retries == 0
    assert 0 < report.unparsed == report.said["The"] < 0.2 * report.replies
    store = Replies(tmp_path)
    found = drawn(job, store)
    assert found.orders.shape == (6, 64, 3) and found.decisions.shape == (6, 64)
    assert found.counts.sum(axis=1).tolist() == [64] * 6
    expected = np.array([np.mean([white_box(q, o) for o in all_orders(3)], axis=0) for q in questions])
    assert found.targets() == pytest.approx(expected, abs=4 * 0.5 / 8)  # four standard deviations of a share in 64 draws
    # A larger n goes on from a smaller one.
    fewer = drawn(make_job(server.url, drawn_calls(questions, 16), tries=9), store)
    assert (fewer.decisions == found.decisions[:, :16]).all()
    paid = len(store)
    assert ask(job, store).calls == 0 and len(store) == paid


def test_logprobs_are_the_white_box_scores(server, tmp_path):
    questions = make_questions(4)
    job = make_job(server.url, calls_in_orders(questions), mode="logprobs")
    assert ask(job, Replies(tmp_path)).complete == 4
    P, worst = probabilities(job, Replies(tmp_path))
    expected = np.array([[white_box(q, order) for order in all_orders(3)] for q in questions])
    assert P == pytest.approx(expected, abs=1e-9)
    assert worst == pytest.approx(0.1)  # what this server's labels leave, other forms of them could have had
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps(job.record(Replies(tmp_path), c)) for c in job.calls), encoding="utf-8")
    records = read(path)
    (block,) = records.blocks()
    assert records.ids == [q.id for q in questions] and block.P == pytest.approx(P)
    assert (block.orders == all_orders(3)).all()


def test_arrays_go_into_the_pipeline(server, tmp_path):
    """Listed probabilities in all orders are scores; one decision in each given order is what error correction needs of the
    teacher at inference, one call a question."""
    questions, store = make_questions(5, k=4), Replies(tmp_path)
    listed = make_job(server.url, calls_in_orders(questions), mode="logprobs")
    ask(listed, store, concurrency=16)
    P, _ = probabilities(listed, store)
    assert debias.permutation_average(P).shape == (5, 4) and (metrics.permutation_sensitivity(P) > 0).all()
    decided = make_job(server.url, calls_in_orders(questions, cyclic_orders(4)), tries=6)
    ask(decided, store)
    found = drawn(decided, store)
    assert found.decisions.shape == (5, 4) and (found.orders == cyclic_orders(4)).all()
    assert debias.one_hot(found.decisions, 4).shape == (5, 4, 4)


def test_labels_beyond_the_listed_count_as_nothing_and_are_bounded(server, tmp_path):
    questions = make_questions(3)
    job = make_job(server.url, calls_in_orders(questions), mode="logprobs", top_logprobs=2)
    ask(job, Replies(tmp_path))
    try:
        P, worst = probabilities(job, Replies(tmp_path))
    except MissingReplies:
        pytest.fail("two of four tokens always hold a label")
    expected = np.array([[white_box(q, order) for order in all_orders(3)] for q in questions])
    assert (P == 0).any() and 0 < worst < 1
    assert np.abs(P - expected).max() <= worst


def test_replies_are_of_their_mode_and_complete(server, tmp_path):
    questions = make_questions(2)
    job = make_job(server.url, drawn_calls(questions, 3))
    with pytest.raises(MissingReplies, match=r"2 of 2 items lack replies in .* \(first: 'q0'; model 'local'"):
        drawn(job, Replies(tmp_path))
    assert (drawn(job, Replies(tmp_path), partial=True).decisions == -1).all()
    with pytest.raises(ValueError, match="the job's mode is 'decisions'"):
        probabilities(job, Replies(tmp_path))
    mixed = make_job(
        server.url, drawn_calls([*questions, *make_questions(1, k=4)[:0], Question("k", "", "?", ("a", "b"))], 3)
    )
    with pytest.raises(ValueError, match="make a job for each number of options"):
        drawn(mixed, Replies(tmp_path))
    with pytest.raises(MissingReplies, match="1 of 2 items have no decision"):
        Drawn(np.zeros((2, 1, 3), int), np.array([[0], [-1]])).targets()


def test_same_content_under_two_ids_is_asked_once(server, tmp_path):
    one, two = Question("one", "", "Which?", ("a", "b")), Question("two", "", "Which?", ("a", "b"))
    job = make_job(server.url, drawn_calls([one, two], 8))
    assert plan(job, Replies(tmp_path)).calls == 8
    ask(job, Replies(tmp_path))
    found = drawn(job, Replies(tmp_path))
    assert (found.decisions[0] == found.decisions[1]).all()


def test_replies_that_name_no_option_are_tried_again_then_listed(tmp_path):
    with serving(planted_backend(other=0.7)) as server:
        job = make_job(server.url, drawn_calls(make_questions(5), 8), tries=2)
        report = ask(job, Replies(tmp_path))
        again = ask(job, Replies(tmp_path))
    found = drawn(job, Replies(tmp_path))
    failed = found.decisions == -1
    assert 0.3 < failed.mean() < 0.7  # 0.49 expected
    assert report.failed == {"no option named in 2 replies": [f"q{i}" for i in np.flatnonzero(failed.any(axis=1))]}
    assert report.replies == 40 + report.unparsed - failed.sum()
    assert again.calls == 0 and again.failed == report.failed  # given up: paid for, and kept
    assert (found.counts.sum(axis=1) == 8 - failed.sum(axis=1)).all()


def test_several_at_a_time_and_never_more(tmp_path):
    with serving(planted_backend(), latency=0.05) as server:
        now, most = [0], [0]
        backend = server.backend

        def counting(chat):
            with server.lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.02)
            with server.lock:
                now[0] -= 1
            return backend(chat)

        server.backend = counting
        ask(make_job(server.url, drawn_calls(make_questions(8), 5)), Replies(tmp_path), concurrency=6)
    assert 2 <= most[0] <= 6


def test_asking_in_a_running_loop_as_notebooks_do(server, tmp_path):
    job = make_job(server.url, drawn_calls(make_questions(1), 2))

    async def cell() -> Report:
        return await asking(job, Replies(tmp_path))

    assert asyncio.run(cell()).complete == 1


# --------------------------------------------------------------------------------------------------------------------
# Plan and budget


def test_plan_counts_what_is_to_pay(server, tmp_path):
    questions = make_questions(10)
    job, prices = make_job(server.url, drawn_calls(questions, 4)), Prices(2.0, 8.0)
    first = plan(job, Replies(tmp_path), prices)
    assert (first.items, first.stored, first.calls, first.completion_tokens) == (10, 0, 40, 160)
    assert first.cost == pytest.approx((2 * first.prompt_tokens + 8 * 160) / 1e6)  # four tokens a reply at most
    ask(make_job(server.url, drawn_calls(questions[:5], 4)), Replies(tmp_path))
    second = plan(job, Replies(tmp_path), prices, count_tokens=lambda text: 100)
    assert (second.stored, second.calls, second.prompt_tokens) == (20, 20, 20 * 132)
    assert "20 in the store, 20 to make" in str(second)


@pytest.mark.parametrize("kind", ["calls", "tokens", "cost"])
def test_limits_are_never_exceeded_over_several_runs(kind, tmp_path, hasty):
    prices = Prices(1000.0, 1000.0)
    limits = {"calls": Limits(calls=60), "tokens": Limits(tokens=4000), "cost": Limits(cost=4.0)}[kind]
    with (
        serving(planted_backend()) as server,
        faulty(server.url, 0.3, faults=("429", "503", "reset after", "prose")) as proxy,
    ):
        job = make_job(proxy.url, drawn_calls(make_questions(20), 10))
        for _ in range(3):
            report = ask(job, Replies(tmp_path), limits, prices, concurrency=8)
            assert f"{kind}" in report.stopped and report.unasked and report.complete < 20
        assert kind != "calls" or proxy.requests == 60
    store = Replies(tmp_path)
    assert report.total_calls == store.spent.calls >= proxy.requests
    assert store.spent.calls <= (limits.calls or 10**9) and store.spent.tokens <= (limits.tokens or 10**9)
    assert report.total_cost <= (limits.cost or 10**9)
    assert len(store) > 30  # and they are used
    assert ask(job, store, limits, prices).calls == 0


def test_what_the_server_charges_beyond_the_estimate_is_learnt(tmp_path):
    def chatty(chat):
        return replace(planted_backend()(chat), n_prompt=1000)  # a long system prompt of the server's own

    with serving(chatty) as server:
        job = make_job(server.url, drawn_calls(make_questions(10), 10))
        for limit in (10_500, 20_500, 21_100):  # several at a time, in several runs
            report = ask(job, Replies(tmp_path), Limits(tokens=limit), concurrency=8)
            assert f"{limit} tokens is used up" in report.stopped
            assert limit - 2100 < report.total_tokens <= limit


def test_an_attempt_that_a_gateway_gave_up_may_have_been_charged(tmp_path, hasty):
    with serving(planted_backend(other=0.0)) as server:
        job = make_job(server.url, drawn_calls(make_questions(1), 4))
        spent = []
        for fault in ("503", "504"):
            with faulty(server.url, 0.0, first=(fault,)) as proxy:
                report = ask(replace(job, endpoint=replace(job.endpoint, base_url=proxy.url)), Replies(tmp_path / fault))
            assert report.faults == {fault: 1} and report.complete == 1 and report.calls == 5
            spent.append(report.total_tokens)
    assert spent[1] > spent[0] + 100  # its bound: the bytes of the request


# --------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_every_call_ends_with_an_answer_or_a_listed_failure(tmp_path, hasty):
    """2,000 calls, 30% of the requests broken in all ways: none lost, none paid twice, none taken for another."""
    questions = make_questions(200)
    limits = Limits(calls=6000, tokens=10**6)
    with serving(planted_backend(certain=True)) as server, faulty(server.url, 0.3) as proxy:
        # Long enough for what is not stalled: a reply that is given up on the way would have been delivered.
        job = make_job(proxy.url, drawn_calls(questions, 10), timeout=4.0)
        report = ask(job, Replies(tmp_path), limits, concurrency=64)
    store = Replies(tmp_path)
    print(report, proxy.met)
    assert set(proxy.met) == {"", *FAULTS}
    assert 0.25 < 1 - proxy.met[""] / proxy.requests < 0.35
    # Every reply that was delivered whole is in the store, once, and no other.
    rows = [json.loads(line) for line in store.path.read_text().splitlines()]
    replies = [row for row in rows if "key" in row]
    void = {row["void"] for row in rows if "void" in row}  # came to two calls at once: asked again
    certain = [row["key"] for row in replies if row["reply"] not in void]
    assert len(set(certain)) == len(certain) and len(replies) == report.replies
    assert len(void) <= proxy.met["stale"]
    assert Counter(row["reply"] for row in replies) == Counter(
        hashlib.sha256(name.encode()).hexdigest()[:16] for name in proxy.delivered
    )
    # Every call has an answer or a reason.
    found = drawn(job, store, partial=True)
    failed = [name for names in report.failed.values() for name in names]
    assert report.unasked == [] and report.stopped == ""
    assert {f"q{i}" for i in np.flatnonzero((found.decisions == -1).any(axis=1))} == set(failed)
    assert report.complete == 200 - len(set(failed)) and (found.decisions >= 0).mean() > 0.99
    # The right answer each: a reply to another question would show.
    for calls, decided in zip(np.array(job.calls, dtype=object).reshape(200, 10), found.decisions, strict=True):
        for call, decision in zip(calls, decided, strict=True):
            text = LETTERS.user_message(call.question, call.order)
            (label,) = planted([{"role": "user", "content": text}], certain=True)
            assert decision in (-1, call.order["ABC".index(label)])
    assert proxy.requests <= report.calls == store.spent.calls <= 6000 and store.spent.tokens <= 10**6
    assert report.retries == report.calls - len(replies) > 300


def test_each_fault_alone(tmp_path, hasty):
    for fault in FAULTS:
        mode = "logprobs" if fault == "no logprobs" else "decisions"
        with serving(planted_backend(other=0.0)) as server, faulty(server.url, 0.4, faults=(fault,), seed=1) as proxy:
            calls = calls_in_orders(make_questions(4)) if mode == "logprobs" else drawn_calls(make_questions(4), 6)
            job = make_job(proxy.url, calls, mode=mode, tries=12, timeout=1.0, max_retries=12)
            report = ask(job, Replies(tmp_path / fault), concurrency=12)
        assert report.complete == 4, (fault, str(report))
        assert proxy.met[fault] > 2, fault
        if fault in ("prose", "no logprobs"):
            assert report.unparsed == proxy.met[fault] and report.retries == 0
        elif fault not in WHOLE:
            assert report.retries >= proxy.met[fault], fault
        expected = {"stall": "time-out", "malformed": "broken reply", "stale": "reply of another call", "500": "500"}
        assert fault not in expected or report.faults[expected[fault]]


@pytest.mark.timing
def test_retry_after_holds_back_everybody(tmp_path):
    """The first request meets a rate limit: those that left with it arrive, all others wait as long as it says."""
    stamps = []
    with serving(planted_backend()) as server:
        reply = server.reply
        server.reply = lambda body: (stamps.append(time.monotonic()), reply(body))[1]
        with faulty(server.url, 0.0, first=("429 with Retry-After",), retry_after=1.5) as proxy:
            started = time.monotonic()
            report = ask(make_job(proxy.url, drawn_calls(make_questions(2), 12)), Replies(tmp_path), concurrency=4)
    assert report.faults == {"429": 1} and report.complete == 2
    assert (np.array(stamps) < started + 1.5).sum() <= 3 and len(stamps) >= 24


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"key": "right"}, r"answered 401 for model 'local': .*Incorrect API key.*Check the key"),
        ({"path": "/v2"}, r"answered 404 .*no such path.*Check base_url"),
        ({"limit_field": "max_completion_tokens"}, r"answered 400 .*max_tokens is None: give 1.*extra_body and limit_field"),
    ],
)
def test_final_refusals_stop_the_run_at_once(setting, message, tmp_path):
    with serving(planted_backend(), key=setting.get("key", "")) as server:
        url = server.url.replace("/v1", setting.get("path", "/v1"))
        fields = {k: v for k, v in setting.items() if k == "limit_field"}
        job = make_job(url, drawn_calls(make_questions(50), 10), **fields)
        with pytest.raises(EndpointError, match=message):
            ask(job, Replies(tmp_path), concurrency=4)
    spent = Replies(tmp_path).spent
    assert spent.calls <= 4 and spent.tokens == 0  # those under way


def test_a_server_that_is_down_stops_the_run(tmp_path, hasty):
    with serving(planted_backend()) as server:
        url = server.url
    job = make_job(url, drawn_calls(make_questions(50), 10), max_retries=1)
    with pytest.raises(EndpointError, match="20 calls in a row failed, each after 1 retries .*is http://127.0.0.1:.* up?"):
        ask(job, Replies(tmp_path), concurrency=4)
    spent = Replies(tmp_path).spent
    assert 40 <= spent.calls <= 60 and spent.tokens == 0


CLIENT = """
    import sys
    sys.path.insert(0, {tests!r})
    from openai import _base_client
    _base_client.INITIAL_RETRY_DELAY, _base_client.MAX_RETRY_DELAY = 0.05, 0.4
    from test_blackbox import make_job, make_questions
    from permdistill.api.ask import ask
    from permdistill.api.jobs import drawn_calls
    from permdistill.api.endpoint import Limits
    from permdistill.api.replies import Replies
    job = make_job({url!r}, drawn_calls(make_questions(60), 10), timeout=2.0)
    print(ask(job, Replies({folder!r}), Limits(calls=2400), concurrency=16))
"""


def test_interrupted_run_waits_for_what_is_under_way(tmp_path):
    with serving(planted_backend(other=0.0), latency=0.5) as server:
        script = textwrap.dedent(CLIENT).format(tests=str(TESTS), url=server.url, folder=str(tmp_path))
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while server.answered.total() < 40:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)  # Ctrl-C
        _, err = process.communicate()
    assert "KeyboardInterrupt" in err
    store = Replies(tmp_path)
    assert 40 <= len(store) == store.spent.calls == server.answered.total() <= 60


@pytest.mark.long
def test_killed_five_times_the_store_is_the_same(tmp_path, hasty):
    with serving(planted_backend(certain=True), latency=0.05) as server:
        # Without "stale": the copy of a reply whose own client was killed has an id that nobody knows, so that nobody can
        # tell it from a reply. No store can help there.
        with faulty(server.url, 0.3, faults=tuple(f for f in FAULTS if f != "stale")) as proxy:
            script = textwrap.dedent(CLIENT).format(tests=str(TESTS), url=proxy.url, folder=str(tmp_path / "killed"))
            path = tmp_path / "killed" / "replies.jsonl"
            kills, seen = 0, 0
            while True:
                process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
                while kills < 5 and process.poll() is None:
                    if path.exists() and path.read_bytes().count(b'"key"') >= seen + 80:
                        process.send_signal(signal.SIGKILL)
                        process.wait()
                        kills += 1
                        break
                    time.sleep(0.01)
                else:
                    out, _ = process.communicate()
                    break
                process.stdout.close()
                seen = path.read_bytes().count(b'"key"')
            assert kills == 5 and process.returncode == 0, out
            delivered, requests = proxy.delivered, proxy.requests
        job = make_job(server.url, drawn_calls(make_questions(60), 10))
        ask(job, Replies(tmp_path / "whole"), concurrency=16)
    killed, whole = Replies(tmp_path / "killed"), Replies(tmp_path / "whole")
    same, alike = drawn(job, killed, partial=True), drawn(job, whole)
    gone = same.decisions == -1
    assert gone.mean() < 0.01 and (same.decisions == alike.decisions)[~gone].all()
    assert "no option named" in out if gone.any() else f"{60} of 60" in out
    # What was delivered and is not in the store was under way when the client was killed.
    names = {hashlib.sha256(name.encode()).hexdigest()[:16] for name in delivered}
    rows = [json.loads(line) for line in killed.path.read_text().splitlines()]
    kept = [row["reply"] for row in rows if "key" in row]
    assert len(set(kept)) == len(kept) and set(kept) <= names and len(names) - len(kept) <= 5 * 16
    assert requests <= killed.spent.calls <= 2400


def test_the_key_is_nowhere(tmp_path, monkeypatch, capsys, caplog):
    """A server that quotes the key, every logger at its most talkative: the key is in no file, output, log or traceback."""
    monkeypatch.setenv("MY_KEY", CANARY)
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx2", "httpcore2", "asyncio"):
        caplog.set_level(logging.DEBUG, logger=name)
    questions = tmp_path / "mine.jsonl"
    questions.write_text(json.dumps({"id": "q", "question": "Which?", "options": ["a", "b"]}) + "\n", encoding="utf-8")

    def command(url: str, *more: str) -> list[str]:
        return ["ask", "--base-url", url, "--model", "local", "--key-name", "MY_KEY", "--questions", str(questions)] + [
            *("--replies", str(tmp_path / "replies"), "--draws", "4", "--records", str(tmp_path / "out.jsonl")),
            *more,
        ]

    texts = []
    with serving(planted_backend(other=0.0), key=CANARY) as server, faulty(server.url, 0.0) as proxy:
        cli.main(command(proxy.url))
        assert {key.lower() for key in proxy.keys} == {f"authorization: bearer {CANARY}"}  # it did go where it belongs
    with serving(planted_backend(), key="another") as server:
        with pytest.raises(SystemExit) as stopped:
            cli.main(command(server.url, "--draws", "8"))
        texts.append(str(stopped.value))
        assert "Incorrect API key provided: [MY_KEY]" in texts[0]
        endpoint = Endpoint(server.url, "local", key_name="MY_KEY")
        with pytest.raises(EndpointError) as refused:
            ask(Job(endpoint, LETTERS, drawn_calls(make_questions(2), 2)), Replies(tmp_path / "more"))
        # As debuggers and notebooks print it, with every variable on the way.
        texts += traceback.TracebackException.from_exception(refused.value, capture_locals=True).format()
        script = (
            f"import sys; sys.path.insert(0, {str(TESTS)!r}); from test_blackbox import *; "
            f"job = Job(Endpoint({server.url!r}, 'local', key_name='MY_KEY'), LETTERS, drawn_calls(make_questions(2), 2)); "
            f"ask(job, Replies({str(tmp_path / 'other')!r}))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert "EndpointError" in done.stderr and "Traceback" in done.stderr
        texts += [done.stdout, done.stderr, repr(endpoint)]
    texts += [caplog.text, *capsys.readouterr()]
    assert "Sending HTTP Request" in caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 3
    texts += [path.read_bytes().decode(errors="replace") for path in files]
    assert not [text for text in texts if CANARY in text or CANARY[3:] in text]


@pytest.mark.slow
def test_the_key_is_nowhere_in_a_notebook_nor_in_the_manifest(tmp_path):
    """Notebook 10 with somebody else's API: its outputs, what it writes, and the manifest of the run."""
    build = tmp_path / "build"
    (build / "notebooks").mkdir(parents=True)
    records = [asdict(q) | {"answer": 0} for q in make_questions(10)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    with serving(planted_backend(other=0.0), key=CANARY) as server, faulty(server.url, 0.0) as proxy:
        parameters = {
            "output": build / "smoke",
            "base_url": proxy.url,
            "model": "local",
            "questions": tmp_path / "mine.jsonl",
        }
        command = [sys.executable, "-m", "papermill", "--kernel", "python3", "--log-output"]
        command += [word for name, value in parameters.items() for word in ("-r", name, str(value))]
        command += [
            str(TESTS.parent / "notebooks/10_api_to_student.ipynb"),
            str(build / "notebooks/10_api_to_student.ipynb"),
        ]
        environment = os.environ | {"OPENAI_API_KEY": CANARY}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert {key.lower() for key in proxy.keys} == {f"authorization: bearer {CANARY}"}
        assert (
            server.answered.total() == 4 * 4 + 6
        )  # 4 decisions for each training question, one call for each test question
    assert "T4_api_students" in manifest.write(build).read_text()
    texts = [done.stdout, done.stderr, *(p.read_bytes().decode(errors="replace") for p in build.rglob("*") if p.is_file())]
    assert len(texts) > 15 and "4 of 4" in texts[0] + texts[1]
    assert not [text for text in texts if CANARY in text or CANARY[3:] in text]


def test_store_holds_no_text(tmp_path):
    secret = [Question("q", "SECRET passage", "SECRET question", ("SECRET a", "SECRET b"))]

    def echo(chat):
        return Next(lambda _: chat[0]["content"], np.zeros(1), 5)

    with serving(echo) as server:
        report = ask(make_job(server.url, drawn_calls(secret, 2)), Replies(tmp_path))
    assert report.unparsed == 6
    assert "SECRET" not in "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())


# --------------------------------------------------------------------------------------------------------------------
# Command line and speed


def test_ask_from_the_command_line(server, tmp_path, capsys):
    questions = tmp_path / "mine.jsonl"
    records = [{"id": q.id, "question": q.question, "options": list(q.options)} for q in make_questions(4)]
    questions.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    command = ["ask", "--base-url", server.url, "--model", "local", "--questions", str(questions)]
    command += ["--replies", str(tmp_path / "replies"), "--price-in", "1", "--price-out", "2", "--draws", "5"]
    before = server.answered.total()
    cli.main([*command, "--dry-run"])
    out = capsys.readouterr().out
    assert "4 items, 20 calls: 0 in the store, 20 to make" in out and "cost 0.00" in out
    assert server.answered.total() == before and not (tmp_path / "replies").exists()
    with pytest.raises(SystemExit, match="items are incomplete: see the table; the same command goes on from here"):
        cli.main([*command, "--max-calls", "10"])
    assert "the budget of 10 calls is used up" in capsys.readouterr().out
    cli.main([*command, "--records", str(tmp_path / "decisions.jsonl")])
    out = capsys.readouterr().out
    assert "items complete" in out and "4 of 4" in out
    lines = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert len(lines) == 20 and {line["decision"] for line in lines} <= {0, 1, 2}
    cli.main(["measure", str(tmp_path / "decisions.jsonl")])  # drawn orders, some of them twice
    orders = [len({tuple(line["order"]) for line in lines if line["id"] == name}) for name in {line["id"] for line in lines}]
    shown = capsys.readouterr().out
    again = f" ({20 - sum(orders)} repeat an order)" if sum(orders) < 20 else ""
    assert f"; 20 records{again}: 20 decided, 0 tied, 0 failed" in shown
    said = str(orders[0]) if len(set(orders)) == 1 else f"{min(orders)} to {max(orders)}"
    assert f"4 items, K = 3, {said} orders" in shown
    path = str(tmp_path / "logprobs.jsonl")
    cli.main([*command, "--mode", "logprobs", "--orders", "cyclic", "--records", path])
    cli.main(["measure", path])
    assert "4 items, K = 3, 3 orders" in capsys.readouterr().out


def load_generator(url: str, bodies: list[dict], concurrency: int) -> float:
    """Replies a second of a plain client."""

    async def run() -> float:
        waiting = iter(bodies)
        limits = httpx.Limits(max_connections=concurrency)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:

            async def work() -> None:
                for body in waiting:
                    (await client.post(f"{url}/chat/completions", json=body)).raise_for_status()

            started = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(concurrency)))
            return len(bodies) / (time.perf_counter() - started)

    return asyncio.run(run())


def throughputs(url: str, n: int, concurrency: int, folder: Path) -> tuple[float, float]:
    """Replies a second of the plain client and of :func:`ask`, same requests, the better of two rounds each."""
    job = make_job(url, calls_in_orders(make_questions(n // 6)))
    bodies = [
        job.endpoint.sampling("decisions")
        | {"model": "local", "messages": job.endpoint.messages(call.question, call.order, LETTERS)}
        for call in job.calls
    ]
    plain, ours = [], []
    for round in range(2):
        plain.append(load_generator(url, bodies, concurrency))
        report = ask(job, Replies(folder / str(round)), concurrency=concurrency)
        ours.append(report.replies / report.seconds)
    return max(plain), max(ours)


# The short one has few calls, for which the start counts for more. Measured alone on two cores, one of them busy: 97% at 32
# calls at a time, 92% to 96% at 8.
@pytest.mark.parametrize(
    "n, concurrency, latency, share",
    [(360, 8, 0.05, 0.85), pytest.param(1800, 16, 0.2, 0.9, marks=pytest.mark.long)],
)
@pytest.mark.timing
def test_throughput_is_that_of_a_plain_load_generator(n, concurrency, latency, share, tmp_path):
    command = [sys.executable, str(TESTS / "openai_server.py"), "--latency", str(latency), "--other", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            plain, ours = throughputs(process.stdout.readline().strip(), n, concurrency, tmp_path)
        finally:
            process.terminate()
    print(f"plain {plain:.1f}, ours {ours:.1f} replies a second: {ours / plain:.1%}")
    if ours <= share * plain and plain < 0.9 * concurrency / latency:
        pytest.skip(f"other work takes this machine's time: even the plain client gets {plain:.0f} replies a second")
    assert ours > share * plain
