"""One model behind an OpenAI-compatible chat API, and the budget that every request passes.

The ``openai`` client does the asking and the retrying: 408, 409, 429, 5xx, lost connections and time-outs, after
Retry-After or exponential back-off with jitter. Every single attempt goes through :class:`permdistill.api.wire.Wire`.
"""

from __future__ import annotations

import asyncio
import math
import os
import uuid
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai

from permdistill.api.replies import Replies
from permdistill.api.wire import LONGEST_WAIT, REPEATS, Repeats, Reply, Shared, Wire, retry_after, word_of
from permdistill.prompts import Template
from permdistill.questions import Question

MODES = ("decisions", "answer", "logprobs")
# Tokens of a decision: one is the label, and what follows shows whether a word has begun there, "A" before " trout".
DECISION_TOKENS, ANSWER_TOKENS = 4, 1024
_RETRYABLE = (408, 409, 429)  # and 5xx; what the openai client retries


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
    server adds on its own (a system prompt) or generates beyond ``completion``, the tokens that a reply may have, is learnt
    from the replies in the store. As long as there is none, one request goes at a time.
    """

    def __init__(self, store: Replies, limits: Limits, prices: Prices, completion: int = 1):
        if limits.cost is not None and not prices.prompt and not prices.completion:
            raise ValueError(f"a limit of {limits.cost} on cost without prices: give the prices per million tokens too")
        self.store, self.limits, self.prices, self.completion = store, limits, prices, completion
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
            bound = (n_bytes + beyond, max(completion, self.completion))
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
            self.stop(f"{self.store.path} cannot be written ({os.strerror(error.errno or 0)})")
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
                 none: OPENAI_API_KEY may be unset, a variable that you name must be set; "" is no key at all
    timeout      seconds for one attempt, from sending to the reply's last byte
    max_retries  of one call, beyond the first attempt
    extra_body   further fields of the request, e.g. what a server needs to sample from the whole distribution. temperature
                 and top_p are 1 already, but llama.cpp's server has a top_k and min_p of its own ({"top_k": 0, "min_p": 0}),
                 vLLM takes top_k from the model's folder ({"top_k": -1}), and `transformers serve` does not sample at all
                 unless told ({"generation_config": '{"do_sample": true, "top_k": 0}'}). Constrained answers too, where there
                 are: {"structured_outputs": {"choice": ["A", "B", "C", "D"]}} for vLLM. For logprobs see the README
    top_logprobs how many alternatives are asked for; the API allows 20, some servers fewer
    limit_field  what the API calls the limit on the reply's tokens: max_tokens or max_completion_tokens
    reply_tokens the limit itself, thoughts included, for decisions (None: 4) and answers (None: 1,024)
    reasoning_effort  as the API knows it ("low", ..), "" leaves it out
    """

    base_url: str
    model: str
    key_name: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    max_retries: int = 6
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    top_logprobs: int = 20
    limit_field: str = "max_tokens"
    reply_tokens: int | None = None
    reasoning_effort: str = ""

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"base_url is {self.base_url!r}: give something like https://api.example.com/v1")
        if url.username or url.password or url.query:
            raise ValueError(f"base_url at {url.hostname} holds more than an address: give the key in the environment")
        if not 0 < self.timeout < math.inf or self.max_retries < 0 or not 1 <= self.top_logprobs <= 20:
            raise ValueError(
                f"timeout {self.timeout}, max_retries {self.max_retries}, top_logprobs {self.top_logprobs}: give a finite "
                "timeout above 0, at least 0 retries and 1 to 20 logprobs"
            )
        if self.reply_tokens is not None and self.reply_tokens < 2:
            raise ValueError(f"reply_tokens = {self.reply_tokens}: give at least 2, one alone may be the start of a word")

    @property
    def model_key(self) -> str:
        """Identifies the model in the keys of its replies: host and model. Port and path do not count, since one's own
        server comes up at another port each time."""
        return f"api:{urlsplit(self.base_url).hostname}/{self.model}"

    def sampling(self, mode: str) -> dict[str, Any]:
        """What is asked for, as it stands in the keys of the replies: from the whole distribution one token, or a reply.

        The limit of a decision stands there as 1 unless it is set: what follows the label is read, and changes no label.
        """
        if mode not in MODES:
            raise ValueError(f"mode {mode!r}: give one of {', '.join(MODES)}")
        if mode != "logprobs" and "stop" in self.extra_body:
            raise ValueError("extra_body has 'stop': it hides how a reply goes on, and with that whether it is a label")
        limit = 1 if mode == "logprobs" else self.reply_tokens or (ANSWER_TOKENS if mode == "answer" else 1)
        body: dict[str, Any] = {self.limit_field: limit, "temperature": 1.0, "top_p": 1.0}
        if mode == "logprobs":
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.reasoning_effort:
            body["reasoning_effort"] = self.reasoning_effort
        return body | dict(self.extra_body)

    def request(self, mode: str) -> dict[str, Any]:
        """The request but for model and messages: :meth:`sampling` with the limit that a decision really has."""
        short = mode == "decisions" and self.reply_tokens is None and self.limit_field not in self.extra_body
        return self.sampling(mode) | ({self.limit_field: DECISION_TOKENS} if short else {})

    def most_tokens(self, mode: str) -> int:
        """Tokens that a reply may have, thoughts included."""
        limit = self.request(mode)[self.limit_field]
        return limit if isinstance(limit, int) else 1

    def messages(self, question: Question, order: tuple[int, ...], template: Template) -> list[dict[str, str]]:
        """The chat. A template's answer_prefix is the start of the assistant's turn: many servers go on from there, some
        only when told (vLLM: extra_body {"continue_final_message": true, "add_generation_prompt": false}), some never."""
        chat = [{"role": "user", "content": template.user_message(question, order)}]
        if template.answer_prefix:
            chat.append({"role": "assistant", "content": template.answer_prefix})
        return chat

    def key(self) -> str:
        """The key, "" if there is none. It is never kept: what holds it could print it, a traceback with variables too."""
        key = os.environ.get(self.key_name, "") if self.key_name else ""
        if not key and self.key_name and self.key_name != "OPENAI_API_KEY":
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
        shared, certificates, key = Shared(budget, self.timeout), httpx2.create_ssl_context(), self.key()
        url = urlsplit(self.base_url)
        if key and url.scheme == "http" and not _is_local(url.hostname or ""):
            warnings.warn(f"the key in {self.key_name} goes to {url.hostname} unencrypted: use https", stacklevel=4)
        # The client would tell any server whose account it is.
        omitted: dict[str, Any] = {} if key and self.key_name == "OPENAI_API_KEY" else dict.fromkeys(_ACCOUNT, openai.Omit())
        async with AsyncExitStack() as stack:
            connections = []
            for _ in range(n):
                wire = Wire(
                    shared,
                    timeout=httpx2.Timeout(self.timeout),
                    # One each, not a pool: what is wrong with a connection is found when its reply is read, and a pool would
                    # have lent it to another request by then.
                    limits=httpx2.Limits(max_connections=1),
                    verify=certificates,
                )
                client = openai.AsyncOpenAI(
                    base_url=self.base_url,
                    api_key=key or "none",
                    max_retries=self.max_retries,
                    default_headers=omitted,
                    http_client=wire,
                )
                connections.append(Connection(self, await stack.enter_async_context(client), shared.faults))
            yield connections


_ACCOUNT = ("OpenAI-Organization", "OpenAI-Project")


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"  # another name may begin like an address


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
        body = self.endpoint.request(mode) | {"model": self.endpoint.model, "messages": messages}
        try:
            # `post` rather than `chat.completions.create`: the same path through the client without building typed objects,
            # which would take as long as everything else together and refuse replies that only lack a field.
            response = await self.client.post("/chat/completions", body=body, cast_to=httpx2.Response)
        except openai.APIStatusError as error:
            refusal = _refusal(error)
            if refusal:
                raise EndpointError(self._explained(error, refusal)) from None  # its request holds the key
            raise CallFailed(str(error.status_code)) from None
        except Repeats:
            raise EndpointError(
                f"{self.endpoint.base_url}: reply ids repeat, {REPEATS} in a row, so that no new reply can be told from "
                "an old one. Is a cache in between, or does the server give every reply the same id?"
            ) from None
        except openai.APITimeoutError:
            raise CallFailed("time-out") from None
        except openai.APIConnectionError as error:
            raise CallFailed(word_of(error.__cause__)) from None
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
    if status == 429 and (retry_after(error.response) or 0) > LONGEST_WAIT:
        return "It asks to be left alone for long: run again then; nothing paid is lost"
    if status >= 500 or status in _RETRYABLE:
        return ""
    if status < 400:
        return "Redirects are not followed: give the address that it leads to, if it is the right one, as base_url"
    return {
        401: "Check the key in the environment variable",
        403: "The key may not use this model: check both",
        404: "Check base_url (it usually ends in /v1) and the model's name",
    }.get(status, "It does not take the request: see its message; fields are changed by extra_body and limit_field")
