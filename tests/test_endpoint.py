"""What an endpoint's errors mean, and how the budget counts."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
import warnings
import zlib
from collections.abc import Callable
from email.utils import formatdate

import httpx2
import openai
import pytest

from permdistill.api import wire
from permdistill.api.ask import ask
from permdistill.api.endpoint import Budget, Endpoint, EndpointError, Limits, Prices, Stopped, _is_local, _refusal
from permdistill.api.jobs import Job, calls_in_orders, drawn, drawn_calls, probabilities
from permdistill.api.replies import Replies
from permdistill.api.wire import retry_after
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question


def error(status: int, code: str | None = None, headers: dict[str, str] | None = None) -> openai.APIStatusError:
    request = httpx2.Request("POST", "http://127.0.0.1/v1/chat/completions")
    response = httpx2.Response(status, headers=headers, request=request)
    return openai.APIStatusError("said", response=response, body={"code": code, "message": "said"})


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_errors_that_may_pass(status):
    assert _refusal(error(status)) == ""


@pytest.mark.parametrize(
    "problem, fix",
    [
        (error(401), "Check the key"),
        (error(403), "may not use this model"),
        (error(404), "base_url"),
        (error(400), "does not take the request"),
        (error(422), "does not take the request"),
        (error(429, "insufficient_quota"), "no credit left"),
        (error(429, headers={"Retry-After": "3600"}), "left alone for long"),
    ],
)
def test_errors_that_hold_for_every_call(problem, fix):
    assert fix in _refusal(problem)


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({}, None),
        ({"Retry-After": "2"}, 2.0),
        ({"Retry-After": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "Retry-After": "1"}, 0.25),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-5"}, None),
    ],
)
def testretry_after(headers, seconds):
    assert retry_after(error(429, headers=headers).response) == seconds


def test_retry_after_as_a_date():
    found = retry_after(error(429, headers={"Retry-After": formatdate(time.time() + 30, usegmt=True)}).response)
    assert found is not None and 27 < found <= 30


def test_host_and_model_name_the_model():
    one, other = Endpoint("http://127.0.0.1:8000/v1", "m"), Endpoint("http://127.0.0.1:9000/v1/", "m")
    assert one.model_key == other.model_key == "api:127.0.0.1/m"
    assert Endpoint("https://api.example.com/v1", "m").model_key != one.model_key


def test_request_is_fixed():
    """Part of every reply's key: a change must be a decision, not an accident."""
    endpoint = Endpoint("http://127.0.0.1:8000/v1", "m", extra_body={"top_k": 0})
    assert endpoint.sampling("decisions") == {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    listed = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "logprobs": True, "top_logprobs": 20, "top_k": 0}
    assert endpoint.sampling("logprobs") == listed


def test_requests_wait_while_others_might_use_up_the_limit(tmp_path):
    async def run() -> None:
        store = Replies(tmp_path)
        budget = Budget(store, Limits(tokens=1000), Prices())
        first = await budget.enter(800)
        second = asyncio.create_task(budget.enter(800))
        await asyncio.sleep(0.01)
        assert not second.done()  # both at their most would be too much
        await budget.reply({"key": "k", "attempt": first, "reply": "", "tokens": (150, 1), "position": 0})
        await second  # but the first took less
        budget.free(second.result(), "429")
        third = await budget.enter(800)
        budget.uncertain(third)
        with pytest.raises(Stopped, match="the budget of 1000 tokens is used up"):
            await budget.enter(800)
        assert store.spent.calls == 3 and store.spent.tokens == 151 + 801

    asyncio.run(run())


def test_first_request_goes_alone_where_tokens_are_limited(tmp_path):
    async def run() -> None:
        store = Replies(tmp_path)
        budget = Budget(store, Limits(tokens=10_000), Prices())
        first = await budget.enter(100)
        second = asyncio.create_task(budget.enter(100))
        await asyncio.sleep(0.01)
        assert not second.done()  # nobody knows yet what a request costs
        await budget.reply({"key": "k", "attempt": first, "reply": "", "tokens": (5100, 7), "position": 0})
        assert store.spent.tokens == 5107
        with pytest.raises(Stopped):  # 5,000 beyond its bytes: two of them are too much
            await second
        third = Budget(Replies(tmp_path), Limits(tokens=10_214), Prices())  # another run knows it too
        assert await third.enter(100) and third.store.spent.tokens == 2 * 5107

    asyncio.run(run())


def test_nothing_leaves_that_cannot_be_booked(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    budget = Budget(Replies(tmp_path), Limits(), Prices())
    monkeypatch.setattr(budget.store, "append", full)
    with pytest.raises(Stopped, match=r"replies.jsonl cannot be written \(No space left on device\)"):
        asyncio.run(budget.enter(100))
    assert budget.stopped


@pytest.mark.parametrize("key", ["sk-canary\n", " sk-canary", "sk-canary\t", "\u201csk-canary\u201d"])
def test_a_key_that_fits_in_no_header_is_refused_without_quoting_it(key, monkeypatch):
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(ValueError, match="MY_KEY holds white space or a character that no key has") as error:
        Endpoint("http://127.0.0.1:1/v1", "m", key_name="MY_KEY").key()
    assert "canary" not in str(error.value)


@pytest.mark.parametrize("bad", [{"calls": -1}, {"cost": float("nan")}])
def test_bad_limits_are_refused(bad):
    with pytest.raises(ValueError, match="give a number of at least 0"):
        Limits(**bad)
    assert str(Limits(calls=1000, cost=2.5)) == "calls 1,000, cost 2.5" and str(Limits()) == "none"
    with pytest.raises(ValueError, match="prices"):
        Prices(-1.0)


# --------------------------------------------------------------------------------------------------------------------
# Whatever comes back: an answer in the place of the network's


Answer = Callable[[httpx2.Request], httpx2.Response]
QUESTION = Question("q", "", "Which?", ("x", "y", "z"))


@pytest.fixture
def answered(monkeypatch, hasty) -> Callable[[Answer], list[httpx2.Request]]:
    """A function that puts an answer in the place of the network; the requests that left."""
    send = httpx2.AsyncClient.__init__

    def put(answer: Answer) -> list[httpx2.Request]:
        sent: list[httpx2.Request] = []

        def transport(request: httpx2.Request) -> httpx2.Response:
            sent.append(request)
            made = answer(request)  # as bytes that are still to come, which a response from a network is
            if not made.is_stream_consumed:
                return made
            return httpx2.Response(made.status_code, headers=made.headers, stream=httpx2.ByteStream(made.content))

        def init(self, **settings):
            send(self, **{"transport": httpx2.MockTransport(transport)} | settings)

        monkeypatch.setattr(httpx2.AsyncClient, "__init__", init)
        return sent

    return put


def reply(**fields) -> dict:
    """A good reply, but for ``fields``."""
    top = [{"token": token, "logprob": value} for token, value in (("A", -0.7), ("B", -1.0), ("C", -3.0))]
    content = [{"token": "A", "logprob": -0.7, "top_logprobs": top}]
    choice = {"message": {"content": "A"}, "finish_reason": "stop", "logprobs": {"content": content}}
    return {"choices": [choice], "usage": {"prompt_tokens": 20, "completion_tokens": 1}} | fields


def job(mode: str = "decisions", n: int = 1, **settings) -> Job:
    endpoint = Endpoint("http://127.0.0.1:9/v1", "m", **{"max_retries": 1} | settings)
    calls = drawn_calls([QUESTION], n) if mode == "decisions" else calls_in_orders([QUESTION])
    return Job(endpoint, TEMPLATES["letters"], calls, mode)


ODD = {
    "nested without end": b"[" * 5000,
    "half a character": json.dumps(reply(id="\ud800")).encode(),
    "absurd numbers of tokens": json.dumps(reply(usage={"prompt_tokens": 10**400, "completion_tokens": 1})).encode(),
    "many tokens": json.dumps(reply(usage={"prompt_tokens": 10**12, "completion_tokens": 1})).encode(),
    "digits without end": b'{"choices": ' + b"9" * 5000 + b"}",
    "not UTF-8": b'{"id": "\xff"}',
    "a list": b"[]",
    "null": b"null",
    "nothing": b"",
    "no choices": json.dumps(reply(choices=[])).encode(),
    "a choice that is none": json.dumps(reply(choices=[None])).encode(),
    "an error with status 200": b'{"error": {"message": "no"}}',
    "too long": json.dumps(reply(padding="x" * (1 << 20))).encode(),
}


@pytest.mark.parametrize("body", ODD.values(), ids=ODD)
def test_an_odd_reply_is_a_broken_reply(answered, tmp_path, body):
    """Bounded, counted, and its calls are asked again by a later run on the same store."""
    sent = answered(lambda request: httpx2.Response(200, content=body))
    report = ask(job(), Replies(tmp_path))
    assert report.faults == {"broken reply": 2} and len(sent) == report.calls == 2
    assert report.failed == {"broken reply": ["q"]}
    answered(lambda request: httpx2.Response(200, json=reply()))
    assert ask(job(), Replies(tmp_path)).complete == 1
    assert drawn(job(), Replies(tmp_path)).decisions.shape == (1, 1)


@pytest.mark.parametrize(
    "value",
    [
        800,
        0.1,
        pytest.param(10**400, id="1e400"),
        pytest.param(-(10**400), id="-1e400"),
        float("nan"),
        float("inf"),
        "x",
        "-0.5",
        None,
        True,
        [[]],
        {},
    ],
)
def test_odd_log_probabilities_are_none(answered, tmp_path, value):
    def odd(request: httpx2.Request) -> httpx2.Response:
        body = reply()
        body["choices"][0]["logprobs"]["content"][0]["top_logprobs"][1]["logprob"] = value
        return httpx2.Response(200, content=json.dumps(body).encode())

    answered(odd)
    report = ask(job("logprobs"), Replies(tmp_path), concurrency=1)
    if value != value:  # NaN: this label is not listed
        assert report.complete == 1 and probabilities(job("logprobs"), Replies(tmp_path))[0].shape == (1, 6, 3)
    else:
        assert report.failed == {"no logprobs given in 3 replies": ["q"]}


@pytest.mark.parametrize("packing", ["gzip", "deflate", "gzip twice", "br", "", "x" * 300])
@pytest.mark.parametrize("status", [200, 400])
def test_a_small_body_cannot_become_a_large_one(answered, tmp_path, packing, status):
    body = json.dumps(reply(padding="x" * (4 << 20))).encode()
    body = {"gzip": gzip.compress, "deflate": zlib.compress, "gzip twice": gzip.compress}.get(packing, lambda b: b)(body)
    asked, unpack = [], zlib.decompressobj

    def watched(*arguments):
        class Watched:
            def decompress(self, data, limit=0):
                asked.append(limit)
                return unpack(*arguments).decompress(data, limit)

        return Watched()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire.zlib, "decompressobj", watched)
        headers = {"Content-Encoding": packing.replace(" twice", ", gzip")} if packing else {}
        # Packed bytes as they are: the response of a server, not one of the library's own making.
        stream = httpx2.ByteStream(body)
        answered(lambda request: httpx2.Response(status, headers=headers, stream=stream))
        if status == 200:
            assert ask(job(), Replies(tmp_path)).failed == {"broken reply": ["q"]}
        else:
            with pytest.raises(EndpointError, match="answered 400"):
                ask(job(), Replies(tmp_path))
    assert asked == [wire.LONGEST_BODY + 1] * len(asked) and bool(asked) == (packing in ("gzip", "deflate"))


@pytest.mark.parametrize("pack, name", [(gzip.compress, "gzip"), (zlib.compress, "deflate")])
def test_a_packed_reply_is_read(answered, tmp_path, pack, name):
    stream = httpx2.ByteStream(pack(json.dumps(reply()).encode()))
    answered(lambda request: httpx2.Response(200, headers={"Content-Encoding": name}, stream=stream))
    assert ask(job(), Replies(tmp_path)).complete == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(answered, tmp_path, status):
    sent = answered(lambda request: httpx2.Response(status, headers={"Location": "http://elsewhere.example/v1"}))
    with pytest.raises(EndpointError, match=f"answered {status} .*Redirects are not followed"):
        ask(job(n=4), Replies(tmp_path), Limits(calls=4), concurrency=1)
    assert [request.url.host for request in sent] == ["127.0.0.1"]
    assert Replies(tmp_path).spent.calls == 1 and Replies(tmp_path).spent.tokens == 0


def test_reply_ids_that_repeat_stop_the_run(answered, tmp_path):
    sent = answered(lambda request: httpx2.Response(200, json=reply(id="always")))
    with pytest.raises(EndpointError, match="reply ids repeat, 10 in a row"):
        ask(job(n=200, max_retries=6), Replies(tmp_path), concurrency=4)
    assert len(sent) <= 1 + wire.REPEATS + 4 and len(Replies(tmp_path)) == 1


def headers_of(endpoint: Endpoint, answered, tmp_path) -> httpx2.Headers:
    sent = answered(lambda request: httpx2.Response(200, json=reply()))
    ask(Job(endpoint, TEMPLATES["letters"], drawn_calls([QUESTION], 1)), Replies(tmp_path / str(time.time_ns())))
    return sent[0].headers


def test_account_and_key_go_only_where_they_belong(answered, tmp_path, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "MY_KEY"):
        monkeypatch.setenv(name, name.lower())
    at = "http://127.0.0.1:9/v1"
    openais = headers_of(Endpoint(at, "m"), answered, tmp_path)
    assert openais["Authorization"] == "Bearer openai_api_key" and openais["OpenAI-Organization"] == "openai_org_id"
    others = headers_of(Endpoint(at, "m", key_name="MY_KEY"), answered, tmp_path)
    ours = headers_of(Endpoint(at, "m", key_name=""), answered, tmp_path)
    assert others["Authorization"] == "Bearer my_key" and "openai_" not in str(others) + str(ours)
    assert ours["Authorization"] == "Bearer none"
    assert not {"openai-organization", "openai-project"} & {*others, *ours}


@pytest.mark.parametrize("host", ["127.evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1"])
def test_a_name_that_begins_like_this_machine_is_another_one(host):
    assert not _is_local(host)
    assert all(map(_is_local, ("localhost", "127.0.0.1", "127.8.9.1", "::1")))


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_is_finite(timeout):
    with pytest.raises(ValueError, match="give a finite timeout above 0"):
        Endpoint("http://127.0.0.1:1/v1", "m", timeout=timeout)


@pytest.mark.parametrize("url", ["http://api.example.com/v1", "https://api.example.com/v1", "http://127.0.0.2/v1"])
def test_a_key_that_goes_unencrypted_is_warned_of(answered, tmp_path, monkeypatch, url):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        headers_of(Endpoint(url, "m"), answered, tmp_path)
    said = [str(w.message) for w in told if "unencrypted" in str(w.message)]
    assert said == (["the key in OPENAI_API_KEY goes to api.example.com unencrypted: use https"] * ("http://api" in url))
    monkeypatch.delenv("OPENAI_API_KEY")
    headers_of(Endpoint(url, "m"), answered, tmp_path)  # no key, no warning
