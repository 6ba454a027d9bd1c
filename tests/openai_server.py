"""A small server that speaks the OpenAI chat protocol, for a teacher of permdistill or a planted one, whose replies have one
token, or for whole texts.

    python tests/openai_server.py --teacher smollm2-135m --port 8000

Why not somebody else's server: `transformers serve` (5.23) leaves out logprobs without a word, decodes greedily whatever the
temperature, unless told otherwise by a field of its own, and cannot go on from the start of an answer (it does serve the
test of plain decisions, see test_transformers_serve.py). llama-cpp-python has no wheel on PyPI, and its quantised matrix
products are not the white-box teacher's, to 1e-3. What is compared here is two routes to the same numbers: this one takes
each prompt alone through the model (:mod:`permdistill.engine.batches`), the white-box teacher all orders through the trie.

Draws depend on the seed, the prompt and how often it came, so a test gets the same ones whatever arrives first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

Chat = list[dict[str, str]]


@dataclass
class Next:
    """What may come next: a token's text by its index, all tokens' log-probabilities, the number of prompt tokens."""

    text: Callable[[int], str]
    log_probs: np.ndarray
    n_prompt: int

    @cached_property
    def cumulative(self) -> np.ndarray:
        """To draw from."""
        return np.exp(self.log_probs).cumsum()


Backend = Callable[[Chat], Next | str]  # what comes first, and the reply ends; or a whole text


def planted(chat: Chat, other: float = 0.1, certain: bool = False) -> dict[str, float]:
    """Probabilities of the labels that start the lines of the last user message ("A. ..."), and of "The": a function of
    the text alone. ``certain``: one of the labels always."""
    text = chat[0]["content"]
    labels = re.findall(r"^([A-Z])\. ", text, re.M)
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
    p = rng.dirichlet(np.ones(len(labels)))
    if certain:
        return {labels[int(p.argmax())]: 1.0}
    return dict(zip(labels, (p * (1 - other)).tolist(), strict=True)) | ({"The": other} if other else {})


def planted_backend(**settings: Any) -> Backend:
    """Answers :func:`planted` distributions."""

    def answer(chat: Chat) -> Next:
        p = planted(chat, **settings)
        return Next(list(p).__getitem__, np.log(list(p.values())), len(chat[0]["content"]) // 4)

    return answer


def teacher_backend(teacher: Any, keep: int = 256) -> Backend:
    """A :class:`permdistill.teachers.CausalTeacher`, one prompt a pass; the last ``keep`` distributions are remembered."""
    from permdistill.engine import batches

    lock = threading.Lock()
    known: OrderedDict[str, Next] = OrderedDict()

    def answer(chat: Chat) -> Next:
        # The start of an answer is gone on from, as llama.cpp's server does.
        prefix = chat[-1]["content"] if chat[-1]["role"] == "assistant" else ""
        turns = chat[:-1] if prefix else chat
        text = teacher.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + prefix
        with lock:
            if text not in known:
                ids = teacher.tokenizer.encode(text, add_special_tokens=False)
                vocabulary = range(teacher.model.get_output_embeddings().weight.shape[0])
                log_probs, _ = batches.next_token_log_probs(teacher.model, [ids], vocabulary)
                known[text] = Next(lambda token: teacher.tokenizer.decode([token]), log_probs[0], len(ids))
                if len(known) > keep:
                    known.popitem(last=False)
            return known[text]

    return answer


class Server(ThreadingHTTPServer):
    """The server; ``answered`` counts replies by the text of the chat's first message."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, backend: Backend, port: int = 0, seed: int = 0, latency: float = 0.0, key: str = ""):
        super().__init__(("127.0.0.1", port), Handler)
        self.backend, self.seed, self.latency, self.key = backend, seed, latency, key
        self.lock = threading.Lock()
        self.answered: Counter[str] = Counter()

    @property
    def url(self) -> str:
        """base_url for a client."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion of one token, after which the model ends if it may, or of a text, cut at the limit."""
        chat, top = body["messages"], body.get("top_logprobs", 0)
        following = self.backend(chat)
        text = chat[0]["content"]
        with self.lock:
            self.answered[text] += 1
            number = self.answered[text]
        choice: dict[str, Any]
        if isinstance(following, str):
            tokens = re.findall(r"\s*\w+|\s*\S|\s+", following)
            said = tokens[: body["max_tokens"]]
            choice = {"index": 0, "finish_reason": "length" if len(tokens) >= body["max_tokens"] else "stop"}
            choice["message"] = {"role": "assistant", "content": "".join(said)}
            return self._completion(body, choice, len(text) // 4, len(said))
        token, log_probs = following.text, following.log_probs
        if self.latency:
            time.sleep(self.latency)
        digest = hashlib.sha256(json.dumps([self.seed, number, chat]).encode()).digest()
        draw = np.random.default_rng(int.from_bytes(digest[:8], "big")).random()
        if body.get("temperature", 1.0) == 0:
            chosen = int(log_probs.argmax())
        else:
            cumulative = following.cumulative
            chosen = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
        choice = {
            "index": 0,
            "finish_reason": "stop" if body["max_tokens"] > 1 else "length",
            "message": {"role": "assistant", "content": token(chosen)},
        }
        if body.get("logprobs"):
            best = np.argsort(-log_probs)[:top]
            listed = [{"token": token(int(i)), "logprob": float(log_probs[i]), "bytes": None} for i in best]
            own = {"token": token(chosen), "logprob": float(log_probs[chosen]), "bytes": None}
            choice["logprobs"] = {"content": [own | {"top_logprobs": listed}]}
        return self._completion(body, choice, following.n_prompt, 1)

    def _completion(self, body: dict[str, Any], choice: dict[str, Any], n_prompt: int, n: int) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body["model"],
            "choices": [choice],
            "usage": {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n},
        }


class Handler(BaseHTTPRequestHandler):
    """POST /v1/chat/completions; GET /v1/models."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_: Any) -> None:
        """No line for each request."""

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        head = b"".join(self._headers_buffer) + b"\r\n"  # type: ignore[attr-defined]
        self._headers_buffer: list[bytes] = []
        self.wfile.write(head + data)  # at once: a head alone would cost a round trip

    def do_GET(self) -> None:
        """Which model it is."""
        self._send(200, {"object": "list", "data": [{"id": "local", "object": "model"}]})

    def do_POST(self) -> None:
        """A completion, or an error in the protocol's form."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.server.key and given != self.server.key:
            # Some servers quote the key that they refuse.
            self._send(401, {"error": {"message": f"Incorrect API key provided: {given}", "code": "invalid_api_key"}})
        elif not self.path.endswith("/v1/chat/completions"):
            self._send(404, {"error": {"message": f"no such path: {self.path}", "code": None}})
        elif not isinstance(body.get("max_tokens"), int) or body["max_tokens"] < 1:
            self._send(400, {"error": {"message": f"max_tokens is {body.get('max_tokens')}: give 1", "code": None}})
        else:
            self._send(200, self.server.reply(body))


@contextmanager
def serving(backend: Backend, **settings: Any) -> Iterator[Server]:
    """A server on a free port, in a thread, for the time of a ``with`` block."""
    with Server(backend, **settings) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description="an OpenAI-compatible server of one token at a time")
    parser.add_argument("--teacher", help="what permdistill.teachers.load_teacher takes (default: planted answers)")
    parser.add_argument("--port", type=int, default=0, help="0: a free one; the address is printed")
    parser.add_argument("--other", type=float, default=0.1, help="planted answers: share that names no option")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds that a reply takes at least")
    args = parser.parse_args()
    if args.teacher:
        import torch

        from permdistill.teachers import load_teacher

        backend = teacher_backend(load_teacher(args.teacher, torch.float32))
    else:
        backend = planted_backend(other=args.other)
    with Server(backend, args.port, latency=args.latency) as server:
        print(server.url, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
