"""The store of an API's replies, and the book of what they cost: what was paid for once is never paid for again.

A store is a folder with one file, ``replies.jsonl``, to which lines are only ever appended. There are four kinds::

    {"attempt": a, "bytes": n, "bound": [prompt, completion]}    a request is about to leave; it costs at most so many tokens
    {"attempt": a, "free": reason}                   the server refused it, or was never reached: nothing to pay
    {"key": ..., "attempt": a, "tokens": [prompt, completion] or null, ...}    a reply; null where the server did not count
    {"attempt": a, "void": r}                        this attempt brought the reply r too, so whose it is nobody knows

An attempt with neither of the middle two (a time-out, a broken reply, a kill) may have been charged, so it counts with its
bound. Lines hold ids, numbers and hashes: no dataset text, no reply text (it may quote the dataset), no key.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permdistill.files import disk_errors
from permdistill.prompts import Template
from permdistill.questions import Question

FILE = "replies.jsonl"
MOST_TOKENS = 10**8  # of one request; more is a mistake, or meant to exhaust a budget


def content_key(
    question: Question,
    order: tuple[int, ...],
    template: Template,
    model_key: str,
    sampling: Mapping[str, Any],
    draw: int,
    attempt: int,
) -> str:
    """What a reply is a reply to: model, template, texts, order, sampling parameters, number of the draw, and how many
    replies to this draw named no option before. The id and the gold answer do not count."""
    texts = [question.context, question.question, list(question.options)]
    parts = [model_key, template.key, list(order), texts, sampling, draw, attempt]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@dataclass
class Spent:
    """Calls (every request that left, retries too) and tokens; of what is uncertain, the most that it can be."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens


class Replies:
    """Replies in a folder, by content key. Threads of one process may append at once; other processes must hold
    ``folder/.lock`` (:func:`permdistill.files.locked`), as :func:`permdistill.api.ask.ask` does."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._lock = threading.Lock()
        self.read()

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / FILE

    def read(self) -> None:
        """Read the file again, because another process may have written. A last line that a kill cut short is dropped, one
        that only lacks its end of line is not.

        Raises ValueError for a line that is no JSON, or no line of a store, elsewhere than at the end.
        """
        with self._lock:
            self._rows: dict[str, dict[str, Any]] = {}
            self._attempts: dict[str, tuple[int, int, int]] = {}
            self._ids: dict[str, str] = {}  # (hashed) id of a reply -> key
            self._void: set[str] = set()
            self.spent = Spent()
            # Of the dearest replies so far: prompt tokens beyond the request's bytes, and completion tokens.
            self.dearest: tuple[int, int] | None = None
            *lines, last = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
            for number, line in enumerate(lines, start=1):
                try:
                    self._enter(_parsed(line))
                except _NO_LINE as error:
                    raise ValueError(
                        f"{self.path}, line {number} is no line of a store ({error!r}): the file was changed by something "
                        "else than permdistill; restore it, or delete that line and pay for its reply again"
                    ) from None
            if _is_whole(last):
                self._enter(_parsed(last))

    def _enter(self, line: dict[str, Any]) -> None:
        """Bring memory up to date with one line."""
        attempt, spent = line["attempt"], self.spent
        if "bound" in line:
            prompt, completion = line["bound"]
            self._attempts[attempt] = (prompt, completion, line.get("bytes", prompt))
            spent.calls += 1
            spent.prompt_tokens += prompt
            spent.completion_tokens += completion
            return
        if "void" in line:
            self._void.add(line["void"])
            key = self._ids.get(line["void"], "")
            if key in self._rows and self._rows[key]["reply"] == line["void"]:
                del self._rows[key]  # the call has another reply by now, if it is not this one
            return
        paid = line.get("tokens") if "key" in line else (0, 0)
        if attempt in self._attempts and paid is not None:  # else the bound stands
            bound = self._attempts.pop(attempt)
            spent.prompt_tokens += paid[0] - bound[0]
            spent.completion_tokens += paid[1] - bound[1]
            if "key" in line:
                beyond, longest = self.dearest or (0, 1)
                self.dearest = max(beyond, paid[0] - bound[2]), max(longest, paid[1])
        if "key" in line:
            self.dearest = self.dearest or (0, 1)  # also where the server does not count
            if line["reply"]:
                self._ids[line["reply"]] = line["key"]
            if line["reply"] not in self._void:
                self._rows.setdefault(line["key"], line)  # the first reply to a question is the one that was used

    def append(self, *lines: Mapping[str, Any]) -> None:
        """Add lines; replies are on disk, complete, before this returns. A reply to a key that is there changes nothing.

        Raises OSError that names the file where the disk is full or broken."""
        with disk_errors(self.path, "the replies before are kept"):
            self._append(lines)

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with self._lock:
            fresh = [dict(line) for line in lines if line.get("key") not in self._rows]
            descriptor = self._write(fresh) if fresh else None
        if descriptor is not None:
            try:
                # Attempts are not synced for themselves: a killed process leaves them in the system's cache, and after a
                # power cut a reply, which is synced, brings all lines before it along. Without the lock: syncing may take
                # long, and many threads' lines are synced at once.
                if any("key" in line for line in fresh):
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            with self._lock:
                for line in fresh:
                    self._enter(line)

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> int:
        """Write lines after the last whole one. Returns the file's descriptor."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        end, size = _end_of_last_line(descriptor), os.lseek(descriptor, 0, os.SEEK_END)
        if _is_whole(os.pread(descriptor, size - end, end)):
            data = b"\n" + data
        else:
            os.ftruncate(descriptor, end)  # a line that a kill cut short
            os.lseek(descriptor, end, os.SEEK_SET)
        while data:
            data = data[os.write(descriptor, data) :]
        return descriptor

    def get(self, key: str) -> dict[str, Any] | None:
        """The reply to a key, None if it is not there."""
        return self._rows.get(key)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def has_reply_id(self, reply: str) -> bool:
        """Whether a reply with this (hashed) id of the server's is there."""
        return reply in self._ids


_NO_LINE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what _parsed raises


def _parsed(text: bytes) -> dict[str, Any]:
    """A line with all that is read of it later in its type and range. Raises one of _NO_LINE."""
    line = json.loads(text)
    texts, counts = [line["attempt"]], list[Any]()
    if "bound" in line:
        prompt, completion = line["bound"]
        counts = [prompt, completion, line.get("bytes", 0)]
    elif "key" in line:
        texts += [line["key"], line["reply"]]
        prompt, completion = (0, 0) if line["tokens"] is None else line["tokens"]
        counts = [prompt, completion]
        (kind,) = {"failed", "position", "log_probs"} & line.keys()
        if kind == "failed":
            texts.append(line["failed"])
        elif kind == "position":
            counts.append(line["position"])
            texts.append(line.get("rule", ""))
            if line["position"] >= len(line.get("order", "ABCDEF")):
                raise ValueError("position")
        else:
            others = line.get("others", [None] * len(line["log_probs"]))
            listed = [value for value in (*line["log_probs"], *others) if value is not None]
            if not all(isinstance(value, (int, float)) and -math.inf < value <= 0 for value in (*listed, line["floor"])):
                raise ValueError("log_probs")
            counts += line.get("listed", [])
            sizes = {len(line["log_probs"]), len(others), len(line.get("order", others)), len(line.get("listed", others))}
            if not listed or len(sizes) > 1:
                raise ValueError("log_probs")
    else:
        texts.append(line["void"] if "void" in line else line["free"])
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a text is none")
    if not all(type(count) is int and 0 <= count <= 10 * MOST_TOKENS for count in counts):
        raise ValueError("a number is none, or out of range")
    return line


def _is_whole(text: bytes) -> bool:
    try:
        return bool(_parsed(text))
    except _NO_LINE:
        return False


def _end_of_last_line(descriptor: int) -> int:
    """Bytes up to and with the last newline."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
