"""Black-box teachers: a plan of calls, their replies, and the arrays that the rest of the package works on.

    endpoint = Endpoint("http://127.0.0.1:8000/v1", "my-model")
    job = Job(endpoint, TEMPLATES["letters"], drawn_calls(questions, n=32))
    store = Replies("replies/my-model")
    print(plan(job, store))
    print(ask(job, store, Limits(calls=40_000)))          # in a notebook: await asking(...)
    targets = drawn(job, store).targets()                 # (item, option), what a student learns from

There are two ways to answer. *Decisions*: one token is sampled; the label that it names is the teacher's decision. Any API
can do that, and with orders drawn at random the histogram of n decisions estimates the debiased teacher (the paper's
hierarchical Monte-Carlo targets). *Logprobs*: one call gives the label probabilities in one order, where the API lists
``top_logprobs``.

A reply that names no option is paid, kept and counted, and the draw is asked again, ``tries`` times in all: what is then
learnt is the decision *given that an option was named*, which is what the white-box teacher's renormalised probabilities
say too. A draw without a decision is a listed failure, never a guess.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from tqdm import tqdm

from permdistill.assets import locked
from permdistill.data import Question
from permdistill.endpoint import (
    FREE,
    UNLIMITED,
    Budget,
    CallFailed,
    Connection,
    Endpoint,
    EndpointError,
    Limits,
    Prices,
    Reply,
    Stopped,
)
from permdistill.orders import all_orders
from permdistill.prompts import Template
from permdistill.replies import Replies, content_key

CHAT_TOKENS = 32  # of a chat template around the message, about; for estimates only
BYTES_PER_TOKEN = 3.5  # of English, about; for estimates without a tokenizer
GIVE_UP = 20  # so many calls in a row failed, each with all its retries: the server is down


class MissingReplies(LookupError):
    """The store lacks replies that were asked for; the message counts and names them."""


@dataclass(frozen=True)
class Call:
    """One question in one order; ``draw`` tells apart calls that are otherwise the same."""

    question: Question
    order: tuple[int, ...]
    draw: int = 0


def drawn_calls(questions: Sequence[Question], n: int, seed: int = 0) -> list[Call]:
    """``n`` calls for each question, each in a uniformly drawn order (with replacement): (item x draw) calls.

    The order of a draw depends on the question's texts, the seed and the draw's number only. So a larger ``n`` begins with
    the draws of a smaller one, and other questions change nothing. Raises ValueError when ``n`` is not positive.
    """
    if n < 1:
        raise ValueError(f"n = {n} draws: give at least 1")
    calls = []
    every = {k: all_orders(k) for k in {len(question.options) for question in questions}}
    for question in questions:
        orders = every[len(question.options)]
        texts = json.dumps([question.context, question.question, list(question.options), seed])
        own_seed = int.from_bytes(hashlib.sha256(texts.encode()).digest()[:16], "big")
        # One generator a question: its stream's first n numbers do not depend on n.
        places = np.random.default_rng(own_seed).random(n) * len(orders)
        calls += [Call(question, tuple(orders[int(place)].tolist()), draw) for draw, place in enumerate(places)]
    return calls


def calls_in_orders(questions: Sequence[Question], orders: np.ndarray | None = None) -> list[Call]:
    """One call for each question and order: (item x order) calls. ``orders`` (order, K); None: all K! of each question."""
    return [
        Call(question, tuple(map(int, order)))
        for question in questions
        for order in (all_orders(len(question.options)) if orders is None else orders)
    ]


@dataclass(frozen=True)
class Job:
    """What is asked of whom, and how. The same job finds its replies in any store again.

    mode   decisions or logprobs
    tries  replies to one call that may name no option before it counts as failed
    """

    endpoint: Endpoint
    template: Template
    calls: Sequence[Call]
    mode: str = "decisions"
    tries: int = 3

    def __post_init__(self) -> None:
        self.endpoint.sampling(self.mode)
        if self.tries < 1:
            raise ValueError(f"tries = {self.tries}: give at least 1")
        for call in self.calls:  # an impossible question must fail here, not after hours
            self.template.user_message(call.question, call.order)
            if sorted(call.order) != list(range(len(call.question.options))):
                raise ValueError(f"question {call.question.id!r}: order {call.order} is no permutation of its options")

    @cached_property
    def _keys(self) -> dict[int, list[str]]:
        return {}

    def keys(self, call: Call) -> Iterator[str]:
        """The keys of a call's replies, one try after the other."""
        known = self._keys.setdefault(id(call), [])
        for number in range(self.tries):
            if number == len(known):
                model, sampling = self.endpoint.model_key, self.endpoint.sampling(self.mode)
                known.append(content_key(call.question, call.order, self.template, model, sampling, call.draw, number))
            yield known[number]

    def identity(self, call: Call) -> str:
        """The same for calls with the same content."""
        return next(self.keys(call))

    def found(self, store: Replies, call: Call) -> tuple[dict[str, Any] | None, str | None]:
        """The reply that answers a call, and the key under which to ask next: (row, None) when it is answered, (None, key)
        when it is to be asked, (None, None) when it failed for good."""
        for key in self.keys(call):
            row = store.get(key)
            if row is None:
                return None, key
            if _answers(row):
                return row, None
            if row.get("failed") == NO_LABEL_LISTED:
                return None, None  # the next reply would list the same
        return None, None

    def record(self, store: Replies, call: Call) -> dict[str, Any] | None:
        """An answered call as a record: id, order, draw, and decision (the option's index) or probabilities (by position, as
        :func:`permdistill.scores.from_records` reads them; a label that is not listed has 0). None without an answer."""
        row, _ = self.found(store, call)
        if row is None:
            return None
        record = {"id": call.question.id, "order": list(call.order), "draw": call.draw}
        if self.mode == "decisions":
            return record | {"decision": call.order[row["position"]]}
        return record | {"probabilities": [0.0 if v is None else math.exp(v) for v in row["log_probs"]]}

    def failure(self, store: Replies, call: Call) -> str:
        """Why a call failed for good, according to the store."""
        rows = [row for key in self.keys(call) if (row := store.get(key)) is not None]
        return f"{rows[-1]['failed']} in {len(rows)} repl{'y' if len(rows) == 1 else 'ies'}"


NO_OPTION, NO_LOGPROBS, NO_LABEL_LISTED = "no option named", "no logprobs given", "no label among the top logprobs"


def _answers(row: dict[str, Any]) -> bool:
    return "failed" not in row


# --------------------------------------------------------------------------------------------------------------------
# Before: what it will cost


@dataclass(frozen=True)
class Plan:
    """What a job will ask, before it is asked. Without retries and second tries; tokens are an estimate.

    stored  calls that the store answers already (or has given up)
    calls   calls to make
    """

    items: int
    stored: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float

    def __str__(self) -> str:
        return (
            f"{self.items} items, {self.stored + self.calls} calls: {self.stored} in the store, {self.calls} to make\n"
            f"about {self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens, cost {self.cost:.4f} "
            "(without retries)"
        )


def _todo(job: Job, store: Replies) -> dict[str, Call]:
    """Calls that the store does not answer, by the key to ask under: the same content under two ids is asked once.

    Logprobs are asked for context by context, and within one in the order of the prompts' texts, which is the depth-first
    order of their shared prefixes: a server that caches prefixes then computes each of them once.
    """
    result: dict[str, Call] = {}
    contexts: dict[str, int] = {}
    for call in job.calls:
        contexts.setdefault(call.question.context or call.question.id, len(contexts))
        _, key = job.found(store, call)
        if key is not None:
            result.setdefault(key, call)
    if job.mode != "logprobs":
        return result

    def place(call: Call) -> tuple[int, str]:
        context = contexts[call.question.context or call.question.id]
        return context, job.template.user_message(call.question, call.order)

    return dict(sorted(result.items(), key=lambda item: place(item[1])))


def plan(job: Job, store: Replies, prices: Prices = FREE, count_tokens: Callable[[str], int] | None = None) -> Plan:
    """What the job will ask and cost. ``count_tokens`` counts a text's tokens; None: an estimate by length."""
    count = count_tokens or (lambda text: math.ceil(len(text.encode()) / BYTES_PER_TOKEN))
    todo = _todo(job, store)
    prompt = 0
    for call in todo.values():
        chat = job.endpoint.messages(call.question, call.order, job.template)
        prompt += CHAT_TOKENS + sum(count(message["content"]) for message in chat)
    items = len({call.question.id for call in job.calls})
    return Plan(items, len(job.calls) - len(todo), len(todo), prompt, len(todo), prices.cost(prompt, len(todo)))


# --------------------------------------------------------------------------------------------------------------------
# Meanwhile: ask


@dataclass
class Report:
    """What a run did. ``str`` is the table that the command line prints.

    items, complete      questions, and those of which every call is answered
    failed               {reason: ids of questions with a call that failed so}; a later run asks them again, but for those
                         that named no option in all tries
    unasked              questions with calls that were not made because the run stopped
    stopped              why it stopped early, "" if it did not
    calls, replies       requests that left in this run, and what they brought
    unparsed             of these, replies that named no option (or lacked logprobs)
    said                 the first characters of such replies, with their numbers; they are not stored
    faults               {kind: number} of attempts that went wrong, most of them retried
    prompt_tokens, ...   of this run; attempts that may have been charged count with the most that they can cost
    total_...            of the store, all runs together
    """

    items: int = 0
    complete: int = 0
    failed: dict[str, list[str]] = field(default_factory=dict)
    unasked: list[str] = field(default_factory=list)
    stopped: str = ""
    calls: int = 0
    replies: int = 0
    unparsed: int = 0
    said: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    total_calls: int = 0
    total_tokens: int = 0
    total_cost: float = 0.0
    seconds: float = 0.0

    @property
    def retries(self) -> int:
        """Attempts that brought no reply."""
        return self.calls - self.replies

    def __str__(self) -> str:
        def some(names: list[str]) -> str:
            return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

        faults = ", ".join(f"{kind} {n}" for kind, n in self.faults.most_common())
        said = ", ".join(f"{text!r} {n}" for text, n in self.said.most_common(5))
        rate = f" ({self.replies / self.seconds:.1f} replies a second)" if self.seconds else ""
        rows = [
            ("items complete", f"{self.complete} of {self.items}"),
            *((f"failed: {why}", f"{len(ids)} items ({some(ids)})") for why, ids in sorted(self.failed.items())),
            ("not asked", f"{len(self.unasked)} items" + (f" ({some(self.unasked)})" if self.unasked else "")),
            (
                "calls",
                f"{self.calls}, replies {self.replies}, attempts without one {self.retries}" + f" ({faults})" * bool(faults),
            ),
            ("unparsed replies", f"{self.unparsed}" + f" ({said})" * bool(said)),
            ("tokens", f"{self.prompt_tokens:,} prompt, {self.completion_tokens:,} completion"),
            ("cost", f"{self.cost:.4f}"),
            ("store so far", f"{self.total_calls} calls, {self.total_tokens:,} tokens, cost {self.total_cost:.4f}"),
            ("seconds", f"{self.seconds:.1f}{rate}"),
        ]
        if self.stopped:
            rows.append(("stopped", self.stopped))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def ask(job: Job, store: Replies, limits: Limits = UNLIMITED, prices: Prices = FREE, concurrency: int = 8) -> Report:
    """Make the calls that the store does not answer; :func:`asking` without ``await``."""
    return asyncio.run(asking(job, store, limits, prices, concurrency))


async def asking(
    job: Job, store: Replies, limits: Limits = UNLIMITED, prices: Prices = FREE, concurrency: int = 8
) -> Report:
    """Make the calls that the store does not answer, at most ``concurrency`` at a time.

    Every reply is on disk before it counts, so a killed run loses only what was under way, at most ``concurrency`` replies.
    ``limits`` hold for all that the store ever cost. Raises EndpointError when the endpoint refuses for good, or fails
    :data:`GIVE_UP` calls in a row; ValueError before any call when the key or the prices are missing.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency = {concurrency}: give at least 1")
    with locked(store.folder / ".lock"):
        store.read()
        return await _Run(job, store, Budget(store, limits, prices)).run(concurrency)


class _Run:
    """One run of a job."""

    def __init__(self, job: Job, store: Replies, budget: Budget):
        self.job, self.store, self.budget = job, store, budget
        self.report = Report()
        self.failures: dict[str, str] = {}  # Job.identity of a call -> reason
        self.in_a_row = 0
        self.fatal: EndpointError | None = None

    async def run(self, concurrency: int) -> Report:
        spent, started = self.store.spent, time.monotonic()
        before = (spent.calls, spent.prompt_tokens, spent.completion_tokens)
        n, todo = len(self.job.calls), _todo(self.job, self.store)
        async with self.job.endpoint.open(self.budget, min(concurrency, max(1, len(todo)))) as connections:
            self.report.faults = connections[0].faults
            with tqdm(total=n, initial=n - len(todo), unit="call", desc=f"ask {self.job.endpoint.model}") as bar:
                # Once, as a rule: what is then still to do had answers that turned out to be in doubt.
                while todo and not self.budget.stopped:
                    await self._round(connections, list(todo.values()), bar)
                    todo = {key: call for key, call in _todo(self.job, self.store).items() if not self._failed(call)}
        self._sum_up(before, time.monotonic() - started)
        if self.fatal is not None:
            raise self.fatal
        return self.report

    def _failed(self, call: Call) -> str | None:
        return self.failures.get(self.job.identity(call))

    async def _round(self, connections: list[Connection], todo: list[Call], bar: tqdm) -> None:
        """Ask the calls once each."""
        waiting = iter(todo)
        workers = [asyncio.create_task(self._work(connection, waiting, bar)) for connection in connections]
        outcomes: list[Any] = []
        try:
            running: set[asyncio.Task] = set(workers)
            while running and not self.budget.stopped:
                done, running = await asyncio.wait(running, timeout=0.2, return_when=asyncio.FIRST_EXCEPTION)
                if any(worker.exception() for worker in done):
                    break
        finally:
            # If the run ends early, by a limit, an error or Ctrl-C: no request leaves any more; what is under way is paid
            # and so is waited for, what only waits for its next attempt is not.
            if not all(worker.done() for worker in workers):
                self.budget.stop("the run was stopped")
                await self.budget.settled()
            for worker in workers:
                worker.cancel()
            outcomes = await asyncio.gather(*workers, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):  # not the cancellations
                raise outcome

    async def _work(self, connection: Connection, waiting: Iterator[Call], bar: tqdm) -> None:
        for call in waiting:
            try:
                await self._answer(connection, call)
            except Stopped:
                return
            except CallFailed as failure:
                self.failures[self.job.identity(call)] = str(failure)
                self.in_a_row += 1
                if self.in_a_row >= GIVE_UP:
                    self._refuse(
                        EndpointError(
                            f"{GIVE_UP} calls in a row failed, each after {self.job.endpoint.max_retries} retries (the "
                            f"last: {failure}): is {self.job.endpoint.base_url} up? Run again then; nothing paid is lost"
                        )
                    )
            except EndpointError as error:
                self._refuse(EndpointError(f"question {call.question.id!r}: {error}"))
                return
            bar.update()

    def _refuse(self, error: EndpointError) -> None:
        self.fatal = self.fatal or error
        self.budget.stop(str(error))

    async def _answer(self, connection: Connection, call: Call) -> None:
        """Ask one call until a reply names an option, or its tries are used up."""
        messages = self.job.endpoint.messages(call.question, call.order, self.job.template)
        while (key := self.job.found(self.store, call)[1]) is not None:
            reply = await connection.ask(messages, self.job.mode)
            try:
                row = self._row(key, call, reply)
                await self.budget.reply(row)
            finally:
                self.budget.uncertain(reply.attempt)  # unless it is written
            self.in_a_row = 0
            self.report.replies += 1
            if not _answers(row):
                self.report.unparsed += 1
                text = reply.choice["message"].get("content")
                self.report.said[connection.redacted(str(text))[:12]] += 1

    def _row(self, key: str, call: Call, reply: Reply) -> dict[str, Any]:
        row: dict[str, Any] = {"key": key, "attempt": reply.attempt, "reply": reply.reply, "tokens": reply.tokens}
        row |= {"id": call.question.id, "order": call.order, "draw": call.draw}
        labels = self.job.template.labels[: len(call.order)]
        if self.job.mode == "logprobs":
            return row | read_logprobs(reply.choice, labels)
        return row | read_decision(reply.choice, labels)

    def _sum_up(self, before: tuple[int, int, int], seconds: float) -> None:
        report, spent = self.report, self.store.spent
        states: dict[str, set[str]] = {}  # question id -> what became of its calls
        for call in self.job.calls:
            row, key = self.job.found(self.store, call)
            if row is not None:
                state = ""
            elif key is None:
                state = self.job.failure(self.store, call)
            else:
                state = self._failed(call) or "unasked"
            states.setdefault(call.question.id, set()).add(state)
        report.items = len(states)
        for name, found in states.items():
            report.complete += found == {""}
            for state in found - {"", "unasked"}:
                report.failed.setdefault(state, []).append(name)
        report.unasked = [name for name, found in states.items() if "unasked" in found]
        report.stopped = self.budget.stopped if report.unasked else ""
        calls, prompt, completion = before
        report.calls = spent.calls - calls
        report.prompt_tokens, report.completion_tokens = spent.prompt_tokens - prompt, spent.completion_tokens - completion
        cost = self.budget.prices.cost
        report.cost = cost(report.prompt_tokens, report.completion_tokens)
        report.total_calls, report.total_tokens = spent.calls, spent.tokens
        report.total_cost = cost(spent.prompt_tokens, spent.completion_tokens)
        report.seconds = seconds


def read_decision(choice: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """{"position": k} if the reply is the k-th label and nothing else but white space, brackets and punctuation around it;
    otherwise {"failed": reason}. "a" is no "A", and "The answer is B." names nothing: reading prose would be guessing."""
    text = choice["message"].get("content")
    named = text.strip(" \t\r\n()[].:,;*\"'`") if isinstance(text, str) else ""
    bare = [label.strip() for label in labels]
    return {"position": bare.index(named)} if named in bare else {"failed": NO_OPTION}


def read_logprobs(choice: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """{"log_probs": [by position, null where the label is not listed], "floor": the least listed}, or {"failed": reason}.

    A label is read where it stands as in the template (" A" is not "A"), as a white-box teacher reads it.
    """
    try:
        first = choice["logprobs"]["content"][0]
        listed = {str(top["token"]): float(top["logprob"]) for top in (*first["top_logprobs"], first)}
    except (KeyError, TypeError, IndexError, ValueError):
        return {"failed": NO_LOGPROBS}
    values = [listed.get(label, -math.inf) for label in labels]
    finite = [value if math.isfinite(value) else None for value in values]
    if all(value is None for value in finite):
        return {"failed": NO_LABEL_LISTED}
    return {"log_probs": finite, "floor": min(value for value in listed.values() if math.isfinite(value))}


# --------------------------------------------------------------------------------------------------------------------
# After: replies -> arrays


@dataclass(frozen=True)
class Drawn:
    """Sampled decisions, each in an order of its own.

    orders     (item, draw, K)
    decisions  (item, draw) option indices; -1 where the draw has no decision
    """

    orders: np.ndarray
    decisions: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """How often each option was decided for, (item, option)."""
        return (self.decisions[..., None] == np.arange(self.orders.shape[-1])).sum(axis=1)

    def targets(self) -> np.ndarray:
        """The histogram of the decisions, (item, option): the hierarchical Monte-Carlo targets. Raises MissingReplies when
        an item has no decision at all."""
        counts = self.counts
        if empty := np.flatnonzero(counts.sum(axis=1) == 0).tolist():
            raise MissingReplies(
                f"{len(empty)} of {len(counts)} items have no decision (first: item {empty[0]}): leave them out"
            )
        return counts / counts.sum(axis=1, keepdims=True)


def _by_item(job: Job) -> list[list[Call]]:
    """The job's calls, item by item. Raises ValueError unless all items have the same K and number of calls."""
    items: dict[str, list[Call]] = {}
    for call in job.calls:
        items.setdefault(call.question.id, []).append(call)
    shapes = {(len(calls), len(calls[0].order)) for calls in items.values()}
    if len(shapes) != 1:
        raise ValueError(f"items with (calls, options) {sorted(shapes)}: make a job for each number of options and of calls")
    return list(items.values())


def drawn(job: Job, store: Replies, partial: bool = False) -> Drawn:
    """Decisions of a job made of :func:`drawn_calls`, or of :func:`calls_in_orders`.

    A draw that failed for good is -1. Raises MissingReplies when a draw is still to be asked, unless ``partial``.
    """
    _expect(job, "decisions")
    items = _by_item(job)
    rows = [[job.found(store, call) for call in calls] for calls in items]
    lacking = [calls[0].question.id for calls, own in zip(items, rows, strict=True) if any(key for _, key in own)]
    if lacking and not partial:
        raise _missing(job, store, lacking, len(items))
    decisions = [
        [-1 if row is None else call.order[row["position"]] for call, (row, _) in zip(calls, own, strict=True)]
        for calls, own in zip(items, rows, strict=True)
    ]
    return Drawn(np.array([[call.order for call in calls] for calls in items]), np.array(decisions))


def probabilities(job: Job, store: Replies) -> tuple[np.ndarray, float]:
    """Label probabilities of a job made of :func:`calls_in_orders`, renormalised: P (item, order, option), and how wrong the
    worst of them may be because labels were not among the top logprobs (they count as 0; at most so much is missing).

    P is what :func:`permdistill.scores.probabilities` gives for a white-box teacher. Raises MissingReplies.
    """
    _expect(job, "logprobs")
    items, lacking, P, worst = _by_item(job), [], [], 0.0
    for calls in items:
        rows = [job.found(store, call)[0] for call in calls]
        answered = [row for row in rows if row is not None]
        if len(answered) < len(calls):
            lacking.append(calls[0].question.id)
            continue
        own = np.empty((len(calls), len(calls[0].order)))
        for p, call, row in zip(own, calls, answered, strict=True):
            values = np.array([-np.inf if value is None else value for value in row["log_probs"]])
            p[list(call.order)] = np.exp(values - values.max())
            absent = np.isinf(values).sum() * np.exp(row["floor"] - values.max())
            worst = max(worst, absent / (p.sum() + absent))
            p /= p.sum()
        P.append(own)
    if lacking:
        raise _missing(job, store, lacking, len(items))
    return np.stack(P), float(worst)


def _expect(job: Job, mode: str) -> None:
    if job.mode != mode:
        raise ValueError(f"the job's mode is {job.mode!r}, these arrays are made of {mode!r}")


def _missing(job: Job, store: Replies, names: list[str], n: int) -> MissingReplies:
    return MissingReplies(
        f"{len(names)} of {n} items lack replies in {store.folder} (first: {names[0]!r}; model {job.endpoint.model!r}, "
        f"template {job.template.name!r}). Ask with `permdistill ask` (see --help) or ask(), or leave these items out."
    )
