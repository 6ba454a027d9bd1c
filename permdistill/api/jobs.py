"""A job for a black-box teacher: its calls, what they will cost, how replies are read, and the arrays that come of them.

Nothing here asks anything: :mod:`permdistill.api.ask` does.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from permdistill.api.answers import final_answer, plain
from permdistill.api.endpoint import DECISION_TOKENS, FREE, Endpoint, Prices
from permdistill.api.replies import Replies, content_key
from permdistill.lessons import Draws
from permdistill.orders import ENUMERATED, MIN_OPTIONS, all_orders, apply
from permdistill.prompts import LOW_MASS, Template, forms
from permdistill.questions import Question

CHAT_TOKENS = 32  # of a chat template around the message, about; for estimates only
BYTES_PER_TOKEN = 3.5  # of English, about; for estimates without a tokenizer


class MissingReplies(LookupError):
    """The store lacks replies that were asked for; the message counts and names them."""


@dataclass(frozen=True)
class Call:
    """One question in one order; ``draw`` tells apart calls that are otherwise the same."""

    question: Question
    order: tuple[int, ...]
    draw: int = 0


def drawn_calls(
    questions: Sequence[Question], n: int, seed: int = 0, fixed: Callable[[Question], Sequence[int]] = lambda question: ()
) -> list[Call]:
    """``n`` calls for each question, each in a uniformly drawn order (with replacement): (item x draw) calls.

    The order of a draw depends on the question's texts, the seed and the draw's number only. So a larger ``n`` begins with
    the draws of a smaller one, and other questions change nothing. ``fixed``: a question's options that keep their places.
    Raises ValueError when ``n`` is not positive.
    """
    if n < 1:
        raise ValueError(f"n = {n} draws: give at least 1")
    calls = []
    every = {k: all_orders(k) for k in range(MIN_OPTIONS, ENUMERATED + 1)}
    for question in questions:
        whole = np.arange(len(question.options))
        free = np.setdiff1d(whole, np.array(fixed(question), dtype=np.int64))
        k = len(free)
        texts = json.dumps([question.context, question.question, list(question.options), seed])
        own_seed = int.from_bytes(hashlib.sha256(texts.encode()).digest()[:16], "big")
        # One generator a question: its stream's first n numbers do not depend on n.
        rng = np.random.default_rng(own_seed)
        if k in every:
            orders = [every[k][int(place)] for place in rng.random(n) * len(every[k])]
        else:
            orders = [rng.permutation(k) for _ in range(n)]
        for draw, order in enumerate(orders):
            shown = whole.copy()
            shown[free] = free[order]
            calls.append(Call(question, tuple(shown.tolist()), draw))
    return calls


def presented(questions: Sequence[Question], orders: Callable[[Question], np.ndarray]) -> list[Call]:
    """One call for each question and each of its orders (order, K)."""
    return [call for question in questions for call in calls_in_orders([question], orders(question))]


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

    mode      decisions, answer or logprobs
    tries     replies to one call that may name no option before it counts as failed
    variants  whether the forms of a label that are listed ("A", " A", "(A", "a") count together; both are in the store
    """

    endpoint: Endpoint
    template: Template
    calls: Sequence[Call]
    mode: str = "decisions"
    tries: int = 3
    variants: bool = True

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
                if self.mode == "answer":
                    sampling["read"] = "answer"  # the same request may be one for a decision
                elif self.mode == "decisions" and self.endpoint.reply_tokens is None:
                    sampling["read"] = DECISION_TOKENS  # version 0.1 took the first token alone for the whole reply
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
            if answers(row) and ("log_probs" not in row or self.by_position(row).any()):
                return row, None
            if row.get("failed", NO_LABEL_LISTED) == NO_LABEL_LISTED:
                return None, None  # the next reply would list the same
        return None, None

    def todo(self, store: Replies) -> dict[str, Call]:
        """Calls that the store does not answer, by the key to ask under: the same content under two ids is asked once.

        Logprobs are asked for context by context, and within one in the order of the prompts' texts, which is the
        depth-first order of their shared prefixes: a server that caches prefixes then computes each of them once.
        """
        result: dict[str, Call] = {}
        contexts: dict[str, int] = {}
        for call in self.calls:
            contexts.setdefault(call.question.context or call.question.id, len(contexts))
            _, key = self.found(store, call)
            if key is not None:
                result.setdefault(key, call)
        if self.mode != "logprobs":
            return result

        def place(call: Call) -> tuple[int, str]:
            context = contexts[call.question.context or call.question.id]
            return context, self.template.user_message(call.question, call.order)

        return dict(sorted(result.items(), key=lambda item: place(item[1])))

    def record(self, store: Replies, call: Call) -> dict[str, Any] | None:
        """An answered call as a record: id, order, draw, and decision (the option's index; null where the call failed for
        good) or probabilities (by position, as :mod:`permdistill.measure.records` reads them; a label that is not listed has
        0). None where it is still to be asked."""
        row, key = self.found(store, call)
        record = {"id": call.question.id, "order": list(call.order), "draw": call.draw}
        if row is None:
            return record | {"decision": None} if key is None else None
        if self.mode != "logprobs":
            return record | {"decision": call.order[row["position"]]}
        return record | {"probabilities": self.by_position(row).tolist()}

    def read(self, choice: dict[str, Any], call: Call) -> dict[str, Any]:
        """What a reply says, as the store keeps it: see the functions that read, below."""
        labels, options = self.template.words(len(call.order)), apply(call.order, call.question.options)
        if self.mode == "decisions":
            return read_decision(choice, labels, options)
        if self.mode == "answer":
            return read_answer(choice, labels, options)
        found, others = read_logprobs(choice, labels), other_forms(choice, labels)
        if others and found.get("failed") == NO_LABEL_LISTED:
            found = {"log_probs": [None] * len(labels)}
        return found if "failed" in found else found | others

    def by_position(self, row: dict[str, Any]) -> np.ndarray:
        """Probabilities of the labels by position, before renormalisation, 0 where a label is not listed: (option,)."""
        own = np.array([-np.inf if value is None else value for value in row["log_probs"]])
        if self.variants and "others" in row:
            own = np.logaddexp(own, [-np.inf if value is None else value for value in row["others"]])
        return np.minimum(np.exp(own), 1.0)

    def failure(self, store: Replies, call: Call) -> str:
        """Why a call failed for good, according to the store."""
        rows = [row for key in self.keys(call) if (row := store.get(key)) is not None]
        return f"{rows[-1].get('failed', NO_LABEL_LISTED)} in {len(rows)} repl{'y' if len(rows) == 1 else 'ies'}"


NO_OPTION, NO_LOGPROBS, NO_LABEL_LISTED = "no option named", "no logprobs given", "no label among the top logprobs"
CUT = "cut before its end"


def answers(row: dict[str, Any]) -> bool:
    return "failed" not in row


# --------------------------------------------------------------------------------------------------------------------
# What it will cost


@dataclass(frozen=True)
class Plan:
    """What a job will ask, before it is asked. Without retries and second tries; tokens are an estimate, those of replies
    the most that they may have.

    stored  calls that the store answers already (or has given up)
    calls   calls to make
    mass    see :func:`label_mass`
    """

    items: int
    stored: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    mass: float | None = None

    def __str__(self) -> str:
        known = "" if self.mass is None else f"\nlabel mass of the replies in the store {said_mass(self.mass)}"
        return (
            f"{self.items} items, {self.stored + self.calls} calls: {self.stored} in the store, {self.calls} to make\n"
            f"about {self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens, cost {self.cost:.4f} "
            f"(without retries){known}"
        )


def plan(job: Job, store: Replies, prices: Prices = FREE, count_tokens: Callable[[str], int] | None = None) -> Plan:
    """What the job will ask and cost. ``count_tokens`` counts a text's tokens; None: an estimate by length."""
    count = count_tokens or (lambda text: math.ceil(len(text.encode()) / BYTES_PER_TOKEN))
    todo = job.todo(store)
    prompt = 0
    for call in todo.values():
        chat = job.endpoint.messages(call.question, call.order, job.template)
        prompt += CHAT_TOKENS + sum(count(message["content"]) for message in chat)
    items, replies = len({call.question.id for call in job.calls}), len(todo) * job.endpoint.most_tokens(job.mode)
    stored, cost = len(job.calls) - len(todo), prices.cost(prompt, replies)
    return Plan(items, stored, len(todo), prompt, replies, cost, label_mass(job, store))


def label_mass(job: Job, store: Replies) -> float | None:
    """How much of the probability the labels get, as far as the store's replies to the job tell: the mean over the replies
    with logprobs; otherwise the share of replies that name an option. None without replies."""
    rows = [row for call in job.calls for key in job.keys(call) if (row := store.get(key)) is not None]
    found = [float(job.by_position(row).sum()) if "log_probs" in row else float(answers(row)) for row in rows]
    return float(np.mean(found)) if found else None


def unlisted(job: Job, row: dict[str, Any]) -> float:
    """How wrong the renormalised probabilities of a reply may be at most (total variation) because forms of labels are not
    listed: these count as 0, each has the least listed at most, and all together what the listed forms leave."""
    n = sum(value is None for value in row["log_probs"])
    if job.variants:
        # Replies stored before "listed" was say only whether there is any.
        listed = row.get("listed") or [value is not None for value in row.get("others", ())]
        n += sum(len(forms(label)) - 1 for label in job.template.words(len(row["log_probs"]))) - sum(listed)
    listed_mass = float(job.by_position(row).sum())
    absent = min(n * math.exp(row["floor"]), max(0.0, 1 - listed_mass))
    return absent / (listed_mass + absent)


def said_mass(mass: float) -> str:
    """The label mass for people, with what to do where it is low."""
    fix = "; the model wants to say something else: another --template, --mode answer, or more --max-reply-tokens"
    return f"{mass:.2f}{fix * (mass < LOW_MASS)}"


# --------------------------------------------------------------------------------------------------------------------
# Reading a reply


_AROUND = " \t\r\n()[].:,;*\"'`"
_ENDS = ("stop", "eos", "eos_token", "end_turn")  # finish_reason of a reply that the model ended


def ended(choice: dict[str, Any]) -> bool:
    """Whether the model ended the reply, not a limit or a stop string (which vLLM names)."""
    return choice.get("finish_reason") in _ENDS and not isinstance(choice.get("stop_reason"), str)


def read_decision(choice: dict[str, Any], labels: Sequence[str], options: Sequence[str] = ()) -> dict[str, Any]:
    """{"position": k} if the whole reply is the k-th label with white space, brackets and punctuation around it, or this
    label, a mark, and the text of its own option (by position), which may be cut; otherwise {"failed": reason}.

    A label that was cut off may be the start of a word: "A" of "A trout swims, so it is B", "C." of "C. elegans". "a" is no
    "A", and "The answer is B." names nothing: :func:`read_answer` reads prose.
    """
    text = choice["message"].get("content")
    named = text.strip(_AROUND) if isinstance(text, str) else ""
    bare = [label.strip() for label in labels]
    if named in bare:
        return {"position": bare.index(named)} if ended(choice) else {"failed": CUT}
    texts = [_folded(option) for option in options]
    for position, (label, own) in enumerate(zip(bare, texts, strict=False)):
        rest = named.removeprefix(label)
        if rest == named or rest[:1] not in set(_AROUND) - set(" ,;'"):
            continue
        whole, said = _folded(named), _folded(rest)
        if any(other.startswith(whole) or whole.startswith(other) for other in texts if other != own):
            continue  # "B. subtilis" may be the second option, or the text of another one
        begun = said and not ended(choice) and own.startswith(said)
        if said == own or (begun and (len(said) > 3 or not own[len(said)].isalnum())):
            return {"position": position}
    return {"failed": NO_OPTION}


def _folded(text: str) -> str:
    return plain(text).strip(_AROUND).casefold()


def read_answer(choice: dict[str, Any], labels: Sequence[str], options: Sequence[str]) -> dict[str, Any]:
    """{"position": k, "rule": which} by the rules of :mod:`permdistill.api.answers`, or {"failed": reason}. What was cut has
    no end, and so no final answer. ``options`` by position."""
    text = choice["message"].get("content")
    if not ended(choice):
        return {"failed": CUT}
    position, why = final_answer(text if isinstance(text, str) else "", labels, options)
    return {"failed": why} if position is None else {"position": position, "rule": why}


def read_logprobs(choice: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """{"log_probs": [by position, null where the label is not listed], "floor": the least listed}, or {"failed": reason}.

    A label is read where it stands as in the template (" A" is not "A"), as a white-box teacher reads it;
    :func:`other_forms` reads the rest. What is above 0 by more than rounding is no log-probability.
    """
    listed, floor = _listed(choice)
    values = [listed.get(label) for label in labels]
    if all(value is None for value in values):
        return {"failed": NO_LABEL_LISTED if listed else NO_LOGPROBS}
    return {"log_probs": values, "floor": floor}


def other_forms(choice: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """{"others": [by position, what other forms of the label (:func:`permdistill.prompts.forms`) have together, null for
    none], "listed": [how many these are]}, {} where no label has any: " A" of -0.05 beside "B" of -3.2 is an A."""
    listed, floor = _listed(choice)
    by_label = [[listed[form] for form in forms(label)[1:] if form in listed and form not in labels] for label in labels]
    summed = [min(float(np.logaddexp.reduce(own)), 0.0) if own else None for own in by_label]
    return {"others": summed, "listed": list(map(len, by_label)), "floor": floor} if any(by_label) else {}


def _listed(choice: dict[str, Any]) -> tuple[dict[str, float], float]:
    """{token: log-probability} of a reply's first token, and the most that a token which is not there has; {} where there is
    none or one is impossible."""
    try:
        first = choice["logprobs"]["content"][0]
        tops = [top["token"] for top in first["top_logprobs"]]
        listed = {top["token"]: top["logprob"] for top in (*first["top_logprobs"], first)}
        if not all(isinstance(token, str) for token in listed) or any(isinstance(value, bool) for value in listed.values()):
            return {}, 0.0
        if any(value > 1e-3 for value in listed.values()):
            return {}, 0.0
        finite = {token: min(float(value), 0.0) for token, value in listed.items() if math.isfinite(value)}
        # Not the drawn token's: it may be less probable than others that are not among the top ones.
        return finite, min((finite[token] for token in tops if token in finite), default=0.0)
    except (KeyError, TypeError, IndexError, ValueError, OverflowError):
        return {}, 0.0


# --------------------------------------------------------------------------------------------------------------------
# Replies -> arrays


class Drawn(Draws):
    """Sampled decisions, each in an order of its own, and what they add up to."""

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
    _expect(job, "decisions", "answer")
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
            p[list(call.order)] = job.by_position(row)
            p /= p.sum()
            worst = max(worst, unlisted(job, row))
        P.append(own)
    if lacking:
        raise _missing(job, store, lacking, len(items))
    return np.stack(P), float(worst)


def _expect(job: Job, *modes: str) -> None:
    if job.mode not in modes:
        raise ValueError(f"the job's mode is {job.mode!r}, these arrays are made of {' or '.join(map(repr, modes))}")


def _missing(job: Job, store: Replies, names: list[str], n: int) -> MissingReplies:
    return MissingReplies(
        f"{len(names)} of {n} items lack replies in {store.folder} (first: {names[0]!r}; model {job.endpoint.model!r}, "
        f"template {job.template.name!r}). Ask with `permdistill ask` (see --help) or ask(), or leave these items out."
    )
