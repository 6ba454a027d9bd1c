"""``permdistill ask``: its options, and what it does. Loads neither openai nor torch until it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from permdistill.commands import (
    ADAPTIVE,
    adaptive_orders,
    add_orders,
    json_object,
    orders_of,
    printable,
    real,
    whole,
    write_records,
)
from permdistill.questions import Question, unsafe_options

if TYPE_CHECKING:
    from permdistill.api.jobs import Call, Job
    from permdistill.api.replies import Replies

MODES = ("decisions", "answer", "logprobs")


def add_options(command: argparse.ArgumentParser) -> None:
    """All options but those that say which questions."""
    add = command.add_argument
    add("--base-url", required=True, help="up to and with /v1")
    add("--model", required=True, help="as the API calls it")
    add("--key-name", default="OPENAI_API_KEY", help="environment variable that holds the key (%(default)s)")
    modes = "sampled labels; the final answers of whole replies; or top_logprobs, in the order that prefix caches like"
    add("--mode", choices=MODES, default="decisions", help=f"{modes} (%(default)s)")
    drawn = "default: all for logprobs, else drawn. drawn: --draws at random, for each item others; "
    add_orders(command, None, ("drawn",), drawn)
    add("--draws", type=whole(1), default=32, help="calls an item, each in an order of its own (%(default)s)")
    add("--seed", type=whole(0), default=0, help="of the drawn orders")
    add("--replies", default="replies", help="folder of the store (%(default)s)")
    add("--dry-run", action="store_true", help="print the plan and its cost, ask nothing")
    add("--max-calls", type=whole(0), help="limit on all that the store ever cost, retries included")
    add("--max-tokens", type=whole(0), help="the same for tokens, prompts and replies together")
    add("--max-cost", type=real(), help="the same for money; needs prices")
    add("--price-in", type=real(), default=0.0, help="money per million prompt tokens")
    add("--price-out", type=real(), default=0.0, help="money per million completion tokens")
    add("--tokenizer", help="folder or hub repository: counts the plan's tokens (default: by length)")
    add("--concurrency", type=whole(1), default=8, help="calls under way at a time (%(default)s)")
    add("--tries", type=whole(1), default=3, help="replies to a call that may name no option (%(default)s)")
    add("--max-retries", type=whole(0), default=6, help="of a call that gets no reply (%(default)s)")
    add("--timeout", type=real(), default=60.0, help="seconds for one attempt (%(default)s)")
    add("--top-logprobs", type=int, default=20, help="alternatives to ask for (%(default)s)")
    add("--limit-field", choices=("max_tokens", "max_completion_tokens"), default="max_tokens")
    add("--extra-body", type=json_object, default={}, help="JSON object: further fields of each request")
    add(
        "--max-reply-tokens",
        type=whole(1),
        dest="reply_tokens",
        help="thoughts included (default: 4; 1,024 with --mode answer)",
    )
    add("--reasoning-effort", default="", help="as the API knows it: low, ..")
    add("--exact-labels", action="store_true", help='with logprobs, count "A" alone, not " A", "(A" and "a" too')
    add("--records", help="write every answer, and failures, to this JSONL file: measure reads it")


def run(args: argparse.Namespace, asked: Mapping[str, list[Question]]) -> None:
    """Ask {template's name: questions}, within the limits; ends with an error when items stay incomplete."""
    from permdistill.api import ask
    from permdistill.api.endpoint import Endpoint, Limits, Prices
    from permdistill.api.jobs import Job, plan, presented
    from permdistill.api.replies import Replies
    from permdistill.prompts import TEMPLATES

    names = "key_name timeout max_retries extra_body top_logprobs limit_field reply_tokens reasoning_effort".split()
    endpoint = Endpoint(args.base_url, args.model, **{name: getattr(args, name) for name in names})
    store, prices = Replies(args.replies), Prices(args.price_in, args.price_out)
    limits = Limits(args.max_calls, args.max_tokens, args.max_cost)
    adaptive = args.orders == ADAPTIVE and args.unsafe != "anchor"

    def job_asking(template: str, calls: list[Call]) -> Job:
        return Job(endpoint, TEMPLATES[template], calls, args.mode, args.tries, not args.exact_labels)

    def job_of(template: str, questions: Sequence[Question], orders: Callable[[Question], np.ndarray]) -> Job:
        return job_asking(template, presented(questions, orders))

    if adaptive:  # what everybody is asked; who is asked on is not known yet
        first = partial(_stages, args)
        jobs = [job_of(template, questions, lambda q: first(q)[0][0]) for template, questions in asked.items()]
    else:
        jobs = [job_asking(template, _calls(args, questions)) for template, questions in asked.items()]
    count_tokens = _token_counter(args.tokenizer)
    for job in jobs:
        print(f"{args.model}, template {job.template.name}, {args.mode}: {plan(job, store, prices, count_tokens)}")
    if adaptive:
        every = sum(first(question)[1] for questions in asked.values() for question in questions)
        print(f"then the least sure again, at most {every:,.0f} calls in all, tokens and cost in proportion")
    spent = store.spent
    total = prices.cost(spent.prompt_tokens, spent.completion_tokens)
    print(f"{args.replies} so far: {spent.calls} calls, {spent.tokens:,} tokens, cost {total:.4f}; limits: {limits}")
    if args.dry_run:
        return
    if adaptive:

        def answered(template: str, some: Sequence[Question], design: np.ndarray) -> np.ndarray:
            job = job_of(template, some, lambda question: design)
            if (report := ask.ask(job, store, limits, prices, args.concurrency)).unasked:
                sys.exit(
                    printable(f"{report}\n{len(report.unasked)} items were not asked: the same command goes on from here")
                )
            return _said(job, store).reshape(len(some), *design.shape)

        jobs = [
            job_of(template, questions, adaptive_orders(questions, partial(answered, template), args.calls, _hard(args)))
            for template, questions in asked.items()
        ]
    reports = []
    for job in jobs:
        reports.append(ask.ask(job, store, limits, prices, args.concurrency))
        print(printable(f"\n{reports[-1]}"))
    if args.records:
        found = (job.record(store, call) for job in jobs for call in job.calls)
        write_records(args.records, (record for record in found if record is not None))
    if incomplete := sum(report.items - report.complete for report in reports):
        sys.exit(f"{incomplete} items are incomplete: see the table; the same command goes on from here")


def _hard(args: argparse.Namespace) -> bool:
    """Whether the API says decisions, not probabilities."""
    return str(args.mode) != "logprobs"


def _stages(args: argparse.Namespace, question: Question) -> tuple[list[np.ndarray], float]:
    """The designs in which adaptive orders ask a question, and how many calls it takes, on average."""
    from permdistill.fewcalls import adaptive_plan, share

    designs, calls = adaptive_plan(len(question.options), args.calls, _hard(args))
    share(designs, calls)  # refuses fewer calls than the first design takes
    return designs, min(calls, len(designs[-1]))


def _calls(args: argparse.Namespace, questions: list[Question]) -> list[Call]:
    from permdistill.api.jobs import drawn_calls, presented

    orders = args.orders or ("all" if args.mode == "logprobs" else "drawn")
    if orders == "drawn":
        return drawn_calls(questions, args.draws, args.seed, unsafe_options if args.unsafe == "anchor" else lambda q: ())
    return presented(questions, orders_of(orders, args.unsafe))


def _said(job: Job, store: Replies) -> np.ndarray:
    """What each call of a job was answered, (call, option); 1/K each where it failed."""
    found = []
    for call in job.calls:
        record, k = job.record(store, call) or {}, len(call.order)
        p = np.full(k, 1 / k)
        if "probabilities" in record:
            p[list(call.order)] = record["probabilities"]
        elif record.get("decision") is not None:
            p = np.eye(k)[record["decision"]]
        found.append(p / p.sum())
    return np.array(found)


def _token_counter(name: str | None) -> Callable[[str], int] | None:
    if name is None:
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))
