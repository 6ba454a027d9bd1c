"""What an endpoint's errors mean, and how the budget counts."""

from __future__ import annotations

import asyncio
import time
from email.utils import formatdate

import httpx2
import openai
import pytest

from permdistill.api.endpoint import Budget, Endpoint, Limits, Prices, Stopped, _refusal, _retry_after
from permdistill.api.replies import Replies


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
def test_retry_after(headers, seconds):
    assert _retry_after(error(429, headers=headers).response) == seconds


def test_retry_after_as_a_date():
    found = _retry_after(error(429, headers={"Retry-After": formatdate(time.time() + 30, usegmt=True)}).response)
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
        await budget.reply({"key": "k", "attempt": first, "reply": "", "tokens": (150, 1)})
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
        await budget.reply({"key": "k", "attempt": first, "reply": "", "tokens": (5100, 7)})
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
