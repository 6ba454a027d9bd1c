"""One attempt to get a reply over HTTP.

The ``openai`` client sees one request at a time, and only its outcome, so three things are ours: the budget counts retries
too; a rate limit that one request runs into holds back all; and what the client would hand on although it is no reply
(broken JSON, no choices, an error with status 200, impossible numbers, a body without end, the reply to another request)
counts as a lost connection, which the client retries. Redirects are not followed: nobody but base_url sees a question.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import httpx2
import openai

from permdistill.api.replies import MOST_TOKENS

if TYPE_CHECKING:
    from permdistill.api.endpoint import Budget

LONGEST_BODY = 1 << 20  # bytes of a reply, unpacked
REPEATS = 10  # so many replies in a row had an id that was there already: no draw can be told from another
LONGEST_WAIT = 120.0  # seconds of Retry-After that the openai client obeys; it gives up on more
_IN_DOUBT = (408, 502, 504)  # a gateway waited no longer: what stands behind it may have answered, and charged


class Repeats(openai.OpenAIError):
    """The endpoint gives all its replies the same id."""


@dataclass(frozen=True)
class Reply:
    """What came back: the attempt that brought it, the hash of the server's id, the first choice, tokens if counted."""

    attempt: str
    reply: str
    choice: dict[str, Any]
    tokens: tuple[int, int] | None


def retry_after(response: httpx2.Response) -> float | None:
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


def word_of(error: BaseException | None) -> str:
    """A fault in a word or two: never the exception's own text, which may quote anything."""
    return error.word if isinstance(error, NoReply) else "connection lost" if error else "connection"


class NoReply(httpx2.RemoteProtocolError):
    """Something came back, but no reply."""

    def __init__(self, word: str, request: httpx2.Request):
        super().__init__(word, request=request)
        self.word = word


@dataclass
class Shared:
    """What all connections have in common."""

    budget: Budget
    total_timeout: float
    faults: Counter[str] = field(default_factory=Counter)
    arrived: dict[str, float] = field(default_factory=dict)  # hashed id of a reply -> when it came
    repeated: int = 0  # replies in a row with an id that was there
    not_before: float = 0.0


class Wire(httpx2.AsyncClient):
    """The HTTP client below the openai client: one :meth:`send` is one attempt."""

    def __init__(self, shared: Shared, **settings: Any):
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
                response = await self._received(request, settings)
            if not response.is_success:
                self._count(str(response.status_code))
                if response.status_code == 429:
                    pause = min(retry_after(response) or 0.0, LONGEST_WAIT)
                    self.shared.not_before = max(self.shared.not_before, time.monotonic() + pause)
                if response.status_code not in _IN_DOUBT:
                    self.budget.free(attempt, str(response.status_code))
                return response
            try:
                reply = response.extensions["reply"] = self._checked(attempt, started, request, response)
            except NoReply:
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
            self._count(word_of(error))
            raise
        finally:
            if reply is None:
                self.budget.uncertain(attempt)
        return response

    async def _received(self, request: httpx2.Request, settings: dict[str, Any]) -> httpx2.Response:
        """The response with its body, unpacked here so that a small body cannot become a large one. Raises NoReply."""
        request.headers["Accept-Encoding"] = "gzip, identity"
        response = await super().send(request, **settings | {"stream": True, "follow_redirects": False})
        try:
            packed = b""
            async for piece in response.aiter_raw():
                packed += piece
                if len(packed) > LONGEST_BODY:
                    break
            body = _unpacked(packed, response.headers.get("Content-Encoding", ""))
            if response.is_success and (body is None or len(body) > LONGEST_BODY):
                raise NoReply("broken reply", request)
        finally:
            await response.aclose()
        headers = {
            name: value for name, value in response.headers.items() if name not in ("content-encoding", "content-length")
        }
        content = body if body is not None and len(body) <= LONGEST_BODY else b""
        extensions = dict(response.extensions)
        return httpx2.Response(
            response.status_code, headers=headers, content=content, request=request, extensions=extensions
        )

    def _count(self, word: str) -> None:
        self.shared.faults[word] += 1

    def _checked(self, attempt: str, started: float, request: httpx2.Request, response: httpx2.Response) -> Reply:
        """The reply in a response. Raises NoReply, Repeats."""
        try:
            body = json.loads(response.content)
            choice = body["choices"][0]
            choice["message"].get("content")
            name = body.get("id")
            hashed = hashlib.sha256(name.encode()).hexdigest()[:16] if isinstance(name, str) and name else ""
            tokens = _tokens(body.get("usage"))
        # ValueError: not JSON, not UTF-8, or half a character; RecursionError: nested without end.
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise NoReply("broken reply", request) from None
        if hashed:
            # The same reply twice is no second draw, and may be another question's: a proxy or a cache is in the way. (A
            # copy is not recognised when its original never arrived, because the run that it was for was killed.)
            if hashed in self.shared.arrived or self.budget.store.has_reply_id(hashed):
                if self.shared.arrived.get(hashed, -math.inf) > started:
                    self._count("reply in doubt")  # the first of the two may be the wrong one just as well
                    self.budget.store.append({"attempt": attempt, "void": hashed})
                self.shared.repeated += 1
                if self.shared.repeated >= REPEATS:
                    self._count("reply of another call")
                    raise Repeats
                raise NoReply("reply of another call", request)
            self.shared.arrived[hashed] = time.monotonic()
        self.shared.repeated = 0
        return Reply(attempt, hashed, choice, tokens)


def _unpacked(body: bytes, encoding: str) -> bytes | None:
    """A body's bytes, one more than the longest at most; None where it is broken, or packed as nobody asked for."""
    if encoding.strip().lower() in ("", "identity"):
        return body
    if encoding.strip().lower() not in ("gzip", "x-gzip", "deflate"):
        return None
    try:
        return zlib.decompressobj(47).decompress(body, LONGEST_BODY + 1)
    except zlib.error:
        return None


def _tokens(usage: Any) -> tuple[int, int] | None:
    """Prompt and completion tokens of a reply, None where the server does not count. Raises ValueError for absurd ones."""
    try:
        tokens = (int(usage["prompt_tokens"]), int(usage["completion_tokens"]))
    except (TypeError, KeyError, ValueError, OverflowError):
        return None
    if max(tokens) > MOST_TOKENS:
        raise ValueError("no reply has so many tokens")
    return tokens if min(tokens) >= 0 else None
