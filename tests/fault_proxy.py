"""A proxy that breaks things: it stands before an OpenAI-compatible server and, by chance and seed, does what networks,
gateways and rate limiters do.

Each request is either passed on and answered whole, or meets one fault of :data:`FAULTS`. ``delivered`` holds the id of
every reply that left whole: what the client must have, no less and no more.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy as np

FAULTS = (
    "429",  # without Retry-After
    "429 with Retry-After",
    "500",
    "503",
    "reset",  # before the server hears of it
    "reset after",  # when the server has done its work
    "stall",  # half a body, then silence
    "truncated",  # half a body, then the end
    "malformed",  # whole, but no JSON
    "stale",  # the reply to another request, again
    "twice",  # the reply two times over: the second one stands where the next request's reply should
    "late",  # whole, but overtaken by others
    "prose",  # whole, but names no option
    "no logprobs",  # whole, but without them
)
WHOLE = ("late", "prose", "no logprobs", "twice")  # the client gets the reply to its request


class Proxy:
    """Before the server at ``upstream`` (a base_url). ``first``: the faults of the first requests, whatever chance says."""

    def __init__(
        self,
        upstream: str,
        probability: float,
        seed: int = 0,
        faults: tuple[str, ...] = FAULTS,
        first: tuple[str, ...] = (),
        retry_after: float = 0.05,
    ):
        self.host, self.port = urlsplit(upstream).hostname, urlsplit(upstream).port
        self.probability, self.faults, self.first, self.retry_after = probability, faults, first, retry_after
        self.rng = np.random.default_rng(seed)
        self.requests = 0
        self.met: Counter[str] = Counter()
        self.delivered: list[str] = []
        self.keys: set[str] = set()  # Authorization headers
        self.last = b""
        self.poisoned: set[asyncio.StreamWriter] = set()  # connections on which a reply came twice: now one behind
        self.url = ""

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        """Until ``stop``."""
        self.connections: set[asyncio.Task] = set()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        ready.set()
        async with server:
            await stop.wait()
            for task in self.connections:
                task.cancel()
            await asyncio.gather(*self.connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self.connections.discard(task)
            self.poisoned.discard(writer)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request. Returns whether the connection lives on."""
        request = await _message(reader)
        self.requests += 1
        self.keys |= {line for line in request.decode().split("\r\n") if line.lower().startswith("authorization")}
        broken = self.rng.random() < self.probability
        fault = self.faults[int(self.rng.integers(len(self.faults)))] if broken else ""
        if self.requests <= len(self.first):
            fault = self.first[self.requests - 1]
        if fault == "stale" and not self.last:
            fault = ""
        self.met[fault] += 1
        if fault[:3] in ("429", "500", "503", "504"):
            after = f"Retry-After: {self.retry_after}\r\n" if "Retry" in fault else ""
            return await _write(writer, _response(fault[:3], b'{"error": {"message": "injected", "code": null}}', after))
        if fault == "reset":
            return _reset(writer)
        if fault == "stale":
            return await _write(writer, _response("200 OK", self.last))
        status, body = await self._upstream(request)
        if fault == "reset after":
            return _reset(writer)
        if fault in ("stall", "truncated"):
            await _write(writer, _response("200 OK", body)[: -len(body) // 2])
            if fault == "stall":
                await reader.read(1)  # until the client has had enough
            return False
        if fault == "malformed":
            return await _write(writer, _response("200 OK", body[:-20]))
        if fault == "late":
            await asyncio.sleep(float(self.rng.random()) * 0.5)
        if fault in ("prose", "no logprobs"):
            body = _changed(body, fault)
        response = _response(status, body)
        await _write(writer, response + response if fault == "twice" else response)
        if status.startswith("200") and writer not in self.poisoned:
            self.last = body
            self.delivered.append(json.loads(body)["id"])
        if fault == "twice":
            self.poisoned.add(writer)
        return True

    async def _upstream(self, request: bytes) -> tuple[str, bytes]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(request)
            await writer.drain()
            head, _, body = (await _message(reader)).partition(b"\r\n\r\n")
            return head.split(b"\r\n")[0].decode().partition(" ")[2], body
        finally:
            writer.close()


def _changed(body: bytes, fault: str) -> bytes:
    reply = json.loads(body)
    choice = reply["choices"][0]
    if fault == "prose":
        choice["message"]["content"] = "The answer is A, I would say."
    choice["logprobs"] = None
    return json.dumps(reply).encode()


async def _message(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    return head + await reader.readexactly(int(lengths[0]) if lengths else 0)


def _response(status: str, body: bytes, headers: str = "") -> bytes:
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


async def _write(writer: asyncio.StreamWriter, data: bytes) -> bool:
    writer.write(data)
    await writer.drain()
    return True


def _reset(writer: asyncio.StreamWriter) -> bool:
    raw: Any = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with RST
    writer.transport.abort()
    return False


@contextmanager
def faulty(upstream: str, probability: float, **settings: Any) -> Iterator[Proxy]:
    """A proxy on a free port, in a thread, for the time of a ``with`` block."""
    proxy, ready = Proxy(upstream, probability, **settings), threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    def work() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(proxy.serve(ready, stop))
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
