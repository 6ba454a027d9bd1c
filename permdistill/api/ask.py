"""Black-box teachers: ask what a job lacks, within a budget, and report what became of it.

    endpoint = Endpoint("http://127.0.0.1:8000/v1", "my-model")
    job = Job(endpoint, TEMPLATES["letters"], drawn_calls(questions, n=32))
    store = Replies("replies/my-model")
    print(plan(job, store))
    print(ask(job, store, Limits(calls=40_000)))          # in a notebook: await asking(...)
    targets = drawn(job, store).targets()                 # (item, option), what a student learns from

There are three ways to answer. *Decisions*: a few tokens are sampled; the label that they are is the teacher's decision. Any
API can do that, and with orders drawn at random the histogram of n decisions estimates the debiased teacher (the paper's
hierarchical Monte-Carlo targets). *Answer*: the same for models that think or explain first, by the final answer that a
whole reply states (:mod:`permdistill.api.answers`). *Logprobs*: one call gives the label probabilities in one order, where
the API lists ``top_logprobs``.

A reply that names no option is paid, kept and counted, and the draw is asked again, ``tries`` times in all: what is then
learnt is the decision *given that an option was named*, which is what the white-box teacher's renormalised probabilities
say too. A draw without a decision is a listed failure, never a guess.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from permdistill.api.endpoint import (
    FREE,
    UNLIMITED,
    Budget,
    CallFailed,
    Connection,
    EndpointError,
    Limits,
    Prices,
    Stopped,
)
from permdistill.api.jobs import Call, Job, answers, label_mass, said_mass, unlisted
from permdistill.api.replies import Replies
from permdistill.api.wire import Reply
from permdistill.files import locked

FIRST = 32  # when so many replies have come and none names an option, the rest will not
GIVE_UP = 20  # so many calls in a row failed, each with all its retries: the server is down


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
    read                 {rule of :mod:`permdistill.api.answers`, or why a reply names no option: number of replies}
    mass                 see :func:`permdistill.api.jobs.label_mass`; of the store, all runs together
    bound                see :func:`permdistill.api.jobs.unlisted`, the largest of the job's replies
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
    read: Counter[str] = field(default_factory=Counter)
    mass: float | None = None
    bound: float = 0.0
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
        read = ", ".join(f"{rule} {n}" for rule, n in self.read.most_common())
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
            *([("read", read)] if read else []),
            ("tokens", f"{self.prompt_tokens:,} prompt, {self.completion_tokens:,} completion"),
            ("cost", f"{self.cost:.4f}"),
            ("store so far", f"{self.total_calls} calls, {self.total_tokens:,} tokens, cost {self.total_cost:.4f}"),
            ("seconds", f"{self.seconds:.1f}{rate}"),
        ]
        if self.mass is not None:
            unseen = f"; unlisted forms of labels may have {self.bound:.1%} of a distribution" if self.bound else ""
            rows.append(("label mass", said_mass(self.mass) + unseen))
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
        budget = Budget(store, limits, prices, job.endpoint.most_tokens(job.mode))
        return await _Run(job, store, budget).run(concurrency)


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
        n, todo = len(self.job.calls), self.job.todo(self.store)
        async with self.job.endpoint.open(self.budget, min(concurrency, max(1, len(todo)))) as connections:
            self.report.faults = connections[0].faults
            with tqdm(total=n, initial=n - len(todo), unit="call", desc=f"ask {self.job.endpoint.model}") as bar:
                # Once, as a rule: what is then still to do had answers that turned out to be in doubt.
                while todo and not self.budget.stopped:
                    await self._round(connections, list(todo.values()), bar)
                    todo = {key: call for key, call in self.job.todo(self.store).items() if not self._failed(call)}
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
            if why := row.get("failed") or row.get("rule"):
                self.report.read[why] += 1
            if not answers(row):
                self.report.unparsed += 1
                text = reply.choice["message"].get("content")
                self.report.said[connection.redacted(str(text))[:12]] += 1
                if self.report.unparsed == self.report.replies == FIRST:
                    self._refuse(EndpointError(f"the first {FIRST} replies name no option {self._why()}"))

    def _why(self) -> str:
        reasons, said = (", ".join(map(str, c)) for c in (self.report.read, list(self.report.said)[:3]))
        fixes = {"decisions": "; --mode answer reads longer replies", "answer": "; a reply may need more --max-reply-tokens"}
        return f"({reasons}; they begin {said!r}): try another --template{fixes.get(self.job.mode, '')}"

    def _row(self, key: str, call: Call, reply: Reply) -> dict[str, Any]:
        row: dict[str, Any] = {"key": key, "attempt": reply.attempt, "reply": reply.reply, "tokens": reply.tokens}
        row |= {"id": call.question.id, "order": call.order, "draw": call.draw}
        return row | self.job.read(reply.choice, call)

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
        report.seconds, report.mass = seconds, label_mass(self.job, self.store)
        rows = (self.job.found(self.store, call)[0] for call in self.job.calls)
        report.bound = max((unlisted(self.job, row) for row in rows if row and "log_probs" in row), default=0.0)
