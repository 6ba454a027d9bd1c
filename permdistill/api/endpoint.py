"""One model behind an OpenAI-compatible chat API, and the budget that every request passes.

The ``openai`` client does the asking and the retrying: 408, 409, 429, 5xx, lost connections and time-outs, after
Retry-After or exponential back-off with jitter. It sees one request at a time, and only its outcome, so three things are
ours, all in :class:`_Wire`, through which every single attempt goes: the budget counts retries too; a rate limit that one
request runs into holds back all; and what the client would hand on although it is no reply (broken JSON, no choices, an
error with status 200, the reply to another request) counts as a lost connection, which the client retries.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai

from permdistill.api.replies import Replies
from permdistill.prompts import Template
from permdistill.questions import Question

MODES = ("decisions", "logprobs")
LONGEST_WAIT = 120.0  # seconds of Retry-After that the openai client obeys; it gives up on more
_RETRYABLE = (408, 409, 429)  # and 5xx; what the openai client retries
_IN_DOUBT = (408, 502, 504)  # a gateway waited no longer: what stands behind it may have answered, and charged


class EndpointError(RuntimeError):
    """The endpoint refuses, and would refuse every further call: the run stops. What was paid for is in the store."""


class Stopped(openai.OpenAIError):
    """No further request may leave. (The openai client hands on its own exceptions as they are, without retrying.)"""


@dataclass(frozen=True)
class Prices:
    """Money per million tokens, in whatever currency."""

    prompt: float = 0.0
    completion: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.prompt < math.inf and 0 <= self.completion < math.inf):
            raise ValueError(f"{self}: give prices per million tokens of at least 0")

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """What so many tokens cost."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(frozen=True)
class Limits:
    """What a store of replies may cost altogether, earlier runs and retries included; None: no limit."""

    calls: int | None = None
    tokens: int | None = None
    cost: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("calls", self.calls), ("tokens", self.tokens), ("cost", self.cost)):
            if value is not None and not value >= 0:
                raise ValueError(f"limit {name} = {value}: give a number of at least 0, or None")

    def __str__(self) -> str:
        named = (("calls", self.calls), ("tokens", self.tokens), ("cost", self.cost))
        return ", ".join(f"{name} {value:,}" for name, value in named if value is not None) or "none"


FREE, UNLIMITED = Prices(), Limits()


class Budget:
    """Lets requests leave as long as the limits hold even if every request under way costs the most that it can.

    A byte is at least a token of every tokenizer in use, so a request has at most as many prompt tokens as bytes; what a
    server adds on its own (a system prompt) or generates although one token was asked for is learnt from the replies in the
    store. As long as there is none, one request goes at a time.
    """

    def __init__(self, store: Replies, limits: Limits, prices: Prices):
        if limits.cost is not None and not prices.prompt and not prices.completion:
            raise ValueError(f"a limit of {limits.cost} on cost without prices: give the prices per million tokens too")
        self.store, self.limits, self.prices = store, limits, prices
        self.stopped = ""  # why no request may leave any more
        self._run = uuid.uuid4().hex[:12]
        self._number = 0
        self._open: set[str] = set()  # attempts under way
        self._changed = asyncio.Event()

    def stop(self, why: str) -> None:
        """Let no further request leave."""
        self.stopped = self.stopped or why
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _exceeded(self, prompt: int, completion: int) -> str:
        """Which limit one more request might break, "" for none."""
        spent, limits = self.store.spent, self.limits
        cost = self.prices.cost(spent.prompt_tokens + prompt, spent.completion_tokens + completion)
        if limits.calls is not None and spent.calls + 1 > limits.calls:
            return f"{limits.calls} calls"
        if limits.tokens is not None and spent.tokens + prompt + completion > limits.tokens:
            return f"{limits.tokens} tokens"
        if limits.cost is not None and cost > limits.cost:
            return f"cost {limits.cost:g}"
        return ""

    async def enter(self, n_bytes: int) -> str:
        """Book a request of so many bytes before it leaves; returns the attempt. Waits while requests under way might use
        up a limit, but need not. Raises Stopped when it must not leave."""
        while True:
            beyond, completion = self.store.dearest or (0, 1)
            bound = (n_bytes + beyond, completion)
            exceeded = "" if self.stopped else self._exceeded(*bound)
            if exceeded and not self._open:
                self.stop(f"the budget of {exceeded} is used up")
            if self.stopped:
                raise Stopped(self.stopped)
            alone = self.store.dearest is None and (self.limits.tokens, self.limits.cost) != (None, None)
            if not exceeded and not (alone and self._open):
                break
            await self._changed.wait()
        self._number += 1
        attempt = f"{self._run}-{self._number}"
        try:
            self.store.append({"attempt": attempt, "bytes": n_bytes, "bound": bound})
        except OSError as error:  # what cannot be booked must not be spent
            self.stop(f"{self.store.path} cannot be written ({error.strerror})")
            raise Stopped(self.stopped) from None
        self._open.add(attempt)
        return attempt

    def free(self, attempt: str, reason: str) -> None:
        """The attempt costs nothing: the server refused it, or was never reached."""
        self.store.append({"attempt": attempt, "free": reason})
        self._leave(attempt)

    def uncertain(self, attempt: str) -> None:
        """The attempt may have been charged: its bound stays counted."""
        self._leave(attempt)

    async def reply(self, line: Mapping[str, Any]) -> None:
        """Write a reply; on disk before this returns. In a thread: a slow disk must hold up no other reply."""
        await asyncio.to_thread(self.store.append, line)
        self._leave(line["attempt"])

    def _leave(self, attempt: str) -> None:
        self._open.discard(attempt)
        self._wake()

    async def settled(self) -> None:
        """Wait until no request is under way."""
        while self._open:
            await self._changed.wait()


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible chat API.

    base_url     up to and with "/v1"
    model        as the API calls it
    key_name     environment variable that holds the key, the only place where it is looked for. Servers of one's own need
                 none: OPENAI_API_KEY may be unset, a variable that you name must be set
    timeout      seconds for one attempt, from sending to the reply's last byte
    max_retries  of one call, beyond the first attempt
    extra_body   further fields of the request, e.g. what a server needs to sample from the whole distribution. temperature
                 and top_p are 1 already, but llama.cpp's server has a top_k and min_p of its own ({"top_k": 0, "min_p": 0}),
                 vLLM takes top_k from the model's folder ({"top_k": -1}), and `transformers serve` does not sample at all
                 unless told ({"generation_config": '{"do_sample": true, "top_k": 0}'}). Constrained answers too, where there
                 are: {"structured_outputs": {"choice": ["A", "B", "C", "D"]}} for vLLM. For logprobs see the README
    top_logprobs how many alternatives are asked for; the API allows 20, some servers fewer
    limit_field  what the API calls the limit on the reply's tokens: max_tokens or max_completion_tokens
    """

    base_url: str
    model: str
    key_name: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    max_retries: int = 6
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    top_logprobs: int = 20
    limit_field: str = "max_tokens"

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"base_url is {self.base_url!r}: give something like https://api.example.com/v1")
        if url.username or url.password or url.query:
            raise ValueError(f"base_url at {url.hostname} holds more than an address: give the key in the environment")
        if self.timeout <= 0 or self.max_retries < 0 or not 1 <= self.top_logprobs <= 20:
            raise ValueError(
                f"timeout {self.timeout}, max_retries {self.max_retries}, top_logprobs {self.top_logprobs}: give a timeout "
                "above 0, at least 0 retries and 1 to 20 logprobs"
            )

    @property
    def model_key(self) -> str:
        """Identifies the model in the keys of its replies: host and model. Port and path do not count, since one's own
        server comes up at another port each time."""
        return f"api:{urlsplit(self.base_url).hostname}/{self.model}"

    def sampling(self, mode: str) -> dict[str, Any]:
        """The request but for model and messages: one token, from the whole distribution."""
        if mode not in MODES:
            raise ValueError(f"mode {mode!r}: give one of {', '.join(MODES)}")
        body: dict[str, Any] = {self.limit_field: 1, "temperature": 1.0, "top_p": 1.0}
        if mode == "logprobs":
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return body | dict(self.extra_body)

    def messages(self, question: Question, order: tuple[int, ...], template: Template) -> list[dict[str, str]]:
        """The chat. A template's answer_prefix is the start of the assistant's turn: many servers go on from there, some
        only when told (vLLM: extra_body {"continue_final_message": true, "add_generation_prompt": false}), some never."""
        chat = [{"role": "user", "content": template.user_message(question, order)}]
        if template.answer_prefix:
            chat.append({"role": "assistant", "content": template.answer_prefix})
        return chat

    def key(self) -> str:
        """The key, "" if there is none. It is never kept: what holds it could print it, a traceback with variables too."""
        key = os.environ.get(self.key_name, "")
        if not key and self.key_name != "OPENAI_API_KEY":
            raise ValueError(f"environment variable {self.key_name} is not set: put the key there")
        # What no header can hold would come back quoted in an error of the HTTP library.
        if not (key.isascii() and key.isprintable() and key == key.strip()):
            raise ValueError(
                f"environment variable {self.key_name} holds white space or a character that no key has (a line break at "
                "its end, a typographic quote?): put the key alone there"
            )
        return key

    @asynccontextmanager
    async def open(self, budget: Budget, n: int) -> AsyncIterator[list[Connection]]:
        """``n`` connections for the time of a ``with`` block."""
        shared, certificates = _Shared(budget, self.timeout), httpx2.create_ssl_context()
        async with AsyncExitStack() as stack:
            connections = []
            for _ in range(n):
                wire = _Wire(
                    shared,
                    timeout=httpx2.Timeout(self.timeout),
                    # One each, not a pool: what is wrong with a connection is found when its reply is read, and a pool would
                    # have lent it to another request by then.
                    limits=httpx2.Limits(max_connections=1),
                    verify=certificates,
                    follow_redirects=True,  # as the openai client does; the key does not go along to another host
                )
                client = openai.AsyncOpenAI(
                    base_url=self.base_url, api_key=self.key() or "none", max_retries=self.max_retries, http_client=wire
                )
                connections.append(Connection(self, await stack.enter_async_context(client), shared.faults))
            yield connections


@dataclass(frozen=True)
class Reply:
    """What came back: the attempt that brought it, the hash of the server's id, the first choice, tokens if counted."""

    attempt: str
    reply: str
    choice: dict[str, Any]
    tokens: tuple[int, int] | None


class CallFailed(Exception):
    """One call failed for good, all retries used up; ``str`` says how, in a word. The others go on."""


@dataclass
class Connection:
    """An open endpoint, for one call at a time. ``faults`` counts what went wrong on the way, retried or not, on all
    connections together."""

    endpoint: Endpoint
    client: openai.AsyncOpenAI
    faults: Counter[str]

    async def ask(self, messages: list[dict[str, str]], mode: str) -> Reply:
        """One reply. Raises CallFailed, Stopped when the budget lets nothing leave, EndpointError when the endpoint refuses
        for a reason that holds for every call."""
        body = self.endpoint.sampling(mode) | {"model": self.endpoint.model, "messages": messages}
        try:
            # `post` rather than `chat.completions.create`: the same path through the client without building typed objects,
            # which would take as long as everything else together and refuse replies that only lack a field.
            response = await self.client.post("/chat/completions", body=body, cast_to=httpx2.Response)
        except openai.APIStatusError as error:
            refusal = _refusal(error)
            if refusal:
                raise EndpointError(self._explained(error, refusal)) from None  # its request holds the key
            raise CallFailed(str(error.status_code)) from None
        except openai.APITimeoutError:
            raise CallFailed("time-out") from None
        except openai.APIConnectionError as error:
            raise CallFailed(_word(error.__cause__)) from None
        return response.extensions["reply"]

    def _explained(self, error: openai.APIStatusError, fix: str) -> str:
        # Redacted before it is cut, or a part of the key could stay.
        said = self.redacted(str(error.message))[:300]
        return f"{self.endpoint.base_url} answered {error.status_code} for model {self.endpoint.model!r}: {said}. {fix}"

    def redacted(self, text: str) -> str:
        """The text without the key, which some servers quote."""
        return text.replace(self.endpoint.key() or "\0", f"[{self.endpoint.key_name}]")


def _refusal(error: openai.APIStatusError) -> str:
    """What to do about an error that holds for every call, "" for one that may pass."""
    status, code = error.status_code, str(error.code)
    if status == 429 and code in ("insufficient_quota", "billing_hard_limit_reached"):
        return "The account has no credit left: add some, then run again; nothing paid is lost"
    if status == 429 and (_retry_after(error.response) or 0) > LONGEST_WAIT:
        return "It asks to be left alone for long: run again then; nothing paid is lost"
    if status >= 500 or status in _RETRYABLE:
        return ""
    return {
        401: "Check the key in the environment variable",
        403: "The key may not use this model: check both",
        404: "Check base_url (it usually ends in /v1) and the model's name",
    }.get(status, "It does not take the request: see its message; fields are changed by extra_body and limit_field")


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds that the server asks to wait, None if it does not say."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = response.headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) / unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except ValueError:
                continue
        if seconds >= 0:
            return seconds
    return None


def _word(error: BaseException | None) -> str:
    """A fault in a word or two: never the exception's own text, which may quote anything."""
    return error.word if isinstance(error, _NoReply) else "connection lost" if error else "connection"


class _NoReply(httpx2.RemoteProtocolError):
    """Something came back, but no reply."""

    def __init__(self, word: str, request: httpx2.Request):
        super().__init__(word, request=request)
        self.word = word


@dataclass
class _Shared:
    """What all connections have in common."""

    budget: Budget
    total_timeout: float
    faults: Counter[str] = field(default_factory=Counter)
    arrived: dict[str, float] = field(default_factory=dict)  # hashed id of a reply -> when it came
    not_before: float = 0.0


class _Wire(httpx2.AsyncClient):
    """The HTTP client below the openai client: one :meth:`send` is one attempt."""

    def __init__(self, shared: _Shared, **settings: Any):
        super().__init__(**settings)
        self.shared, self.budget = shared, shared.budget

    async def send(self, request: httpx2.Request, **settings: Any) -> httpx2.Response:
        """Send, receive and check one attempt; the reply, if it is one, goes into ``response.extensions``."""
        while (wait := self.shared.not_before - time.monotonic()) > 0 and not self.budget.stopped:
            await asyncio.sleep(min(wait, 1.0))
        attempt = await self.budget.enter(len(request.content))
        reply, started = None, time.monotonic()
        try:
            # The client's own time-out is for each piece of the body: a server that sends a byte a minute never meets it.
            async with asyncio.timeout(self.shared.total_timeout):
                response = await super().send(request, **settings)
            if response.is_error:
                self._count(str(response.status_code))
                if response.status_code == 429:
                    pause = min(_retry_after(response) or 0.0, LONGEST_WAIT)
                    self.shared.not_before = max(self.shared.not_before, time.monotonic() + pause)
                if response.status_code not in _IN_DOUBT:
                    self.budget.free(attempt, str(response.status_code))
                return response
            try:
                reply = response.extensions["reply"] = self._checked(attempt, started, request, response)
            except _NoReply:
                # Where one reply came twice, the next one on this connection would be the one after that: a wrong answer
                # that looks like any other. Closed, it is not used again.
                if stream := response.extensions.get("network_stream"):
                    await stream.aclose()
                raise
        except TimeoutError:
            self._count("time-out")
            raise httpx2.ReadTimeout("no reply in time", request=request) from None
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            self._count("no connection")
            self.budget.free(attempt, "no connection")
            raise
        except httpx2.TimeoutException:
            self._count("time-out")
            raise
        except httpx2.RequestError as error:
            self._count(_word(error))
            raise
        finally:
            if reply is None:
                self.budget.uncertain(attempt)
        return response

    def _count(self, word: str) -> None:
        self.shared.faults[word] += 1

    def _checked(self, attempt: str, started: float, request: httpx2.Request, response: httpx2.Response) -> Reply:
        """The reply in a response. Raises _NoReply."""
        try:
            body = response.json()
            choice = body["choices"][0]
            choice["message"].get("content")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):  # ValueError: not JSON, or not UTF-8
            raise _NoReply("broken reply", request) from None
        name = body.get("id")
        hashed = hashlib.sha256(name.encode()).hexdigest()[:16] if isinstance(name, str) and name else ""
        if hashed:
            # The same reply twice is no second draw, and may be another question's: a proxy or a cache is in the way. (A
            # copy is not recognised when its original never arrived, because the run that it was for was killed.)
            if hashed in self.shared.arrived or self.budget.store.has_reply_id(hashed):
                if self.shared.arrived.get(hashed, -math.inf) > started:
                    self._count("reply in doubt")  # the first of the two may be the wrong one just as well
                    self.budget.store.append({"attempt": attempt, "void": hashed})
                raise _NoReply("reply of another call", request)
            self.shared.arrived[hashed] = time.monotonic()
        usage = body.get("usage")
        try:
            tokens = (int(usage["prompt_tokens"]), int(usage["completion_tokens"]))
        except (TypeError, KeyError, ValueError, OverflowError):
            tokens = None
        if tokens is not None and min(tokens) < 0:
            tokens = None
        return Reply(attempt, hashed, choice, tokens)
