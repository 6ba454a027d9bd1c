"""Command line: ``permdistill fetch | plan | score | audit | ask | measure ..`` (see ``permdistill COMMAND --help``)."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoTokenizer

from permdistill import scaleout, scores
from permdistill.api import ask
from permdistill.api.endpoint import MODES, Endpoint, EndpointError, Limits, Prices
from permdistill.api.jobs import Call, Job, calls_in_orders, drawn_calls
from permdistill.api.jobs import plan as plan_of
from permdistill.api.replies import Replies
from permdistill.configs import HEADS, INPUTS, StudentConfig, TrainingConfig
from permdistill.orders import cyclic_orders
from permdistill.paper import ablations, budget, experiments, hub, profiles, tables
from permdistill.paper.assets import AssetError, fetch
from permdistill.paper.models import MODELS, TEACHERS
from permdistill.paper.tasks import LAPTOP, MULTIPLE_CHOICE, TASKS, load_task
from permdistill.prompts import TEMPLATES
from permdistill.questions import BadRecords, Question, content_free, from_jsonl, unlabelled
from permdistill.teachers import fast_dtype, load_teacher, model_key
from permdistill.training import LOG, lead, train

SCORES = Path(__file__).parent.parent / "scores"

# A live score may differ from a stored one by rounding: other cores sum in another order. Measured: `permdistill audit`.
AUDIT_MEAN_TV, AUDIT_MAX_TV = 0.02, 0.15


def _questions(args: argparse.Namespace) -> dict[str, list[Question]]:
    """{template name: questions without gold answers} of what the arguments ask for."""
    if args.questions:
        return {args.template or "letters": unlabelled(from_jsonl(args.questions))[: args.limit]}
    jobs: dict[str, list[Question]] = {}
    for task in args.tasks:
        for split in TASKS[task].splits:
            if split in args.splits:
                loaded = load_task(task, split, args.template or "").first(args.limit)
                # The tasks of one template go together: the four attributes of SummEval share their documents.
                questions = jobs.setdefault(loaded.template.name, [])
                questions += unlabelled(loaded.questions)
                if args.content_free:
                    questions += content_free(loaded.questions)
    return jobs


def _score(args: argparse.Namespace) -> None:
    if not args.profile:
        _score_with(args.teacher, _questions(args), args)
        return
    settings = profiles.PROFILES[args.profile]
    hub.check(profiles.repositories(settings))
    by_teacher: dict[str, dict[str, list[Question]]] = {name: {} for name in settings.teachers}
    for need in profiles.needs(settings):
        task = need.load()
        questions = unlabelled(task.questions) + content_free(task.questions)
        by_teacher[need.teacher].setdefault(task.template.name, []).extend(questions)
    for name, jobs in by_teacher.items():
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the teacher before is gone
        _score_with(name, jobs, args)


def _score_with(name: str, jobs: dict[str, list[Question]], args: argparse.Namespace) -> None:
    store, dtype = scores.Store(Path(args.scores) / Path(name).name), getattr(torch, args.dtype)
    key = model_key(name, dtype)
    if not any(scores.lacking(store, questions, TEMPLATES[template], key) for template, questions in jobs.items()):
        print(f"{Path(name).name}: all {sum(map(len, jobs.values()))} questions were in the store")
        return
    teacher = None if args.workers else load_teacher(name, dtype)
    for template, questions in jobs.items():
        if teacher is None:
            make = partial(load_teacher, name, dtype)
            per_worker = (args.worker_cpus, args.worker_gpus)
            done = scaleout.score(store, make, key, questions, TEMPLATES[template], args.workers, *per_worker)
        else:
            done = scores.score(store, teacher, questions, TEMPLATES[template])
        print(
            f"{Path(name).name}, template {template}: {done} questions scored now, {len(questions) - done} were in the store"
        )
    store.compact()


def _plan(args: argparse.Namespace) -> None:
    settings, speed = profiles.PROFILES[args.profile], None
    if args.measure:
        task = load_task("arc_easy", "test")
        groups = budget.sample(budget.grouped(unlabelled(task.questions)), 4)
        speed = budget.rate(load_teacher(args.measure), groups, task.template)
        print(f"{args.measure} here: {speed / 1e9:,.1f} GFLOP/s\n")
    print(budget.report(settings, args.sample, speed))


def _audit(args: argparse.Namespace) -> None:
    jobs = _questions(args)
    stored = model_key(args.teacher, getattr(torch, args.dtype))
    store = scores.Store(Path(args.scores) / Path(args.teacher).name)
    seed = args.seed if args.seed is not None else int(np.random.SeedSequence().generate_state(1)[0])
    rng = np.random.default_rng(seed)
    samples = {
        template: [questions[i] for i in rng.choice(len(questions), size=min(args.n, len(questions)), replace=False)]
        for template, questions in jobs.items()
    }
    for template, chosen in samples.items():  # what is missing must show before the model is loaded
        for question in chosen:
            scores.load(store, [question], TEMPLATES[template], stored)
    teacher = load_teacher(args.teacher, fast_dtype())  # rounding apart, any number format must agree
    failed = False
    for template, chosen in samples.items():
        tv = scores.audit(store, teacher, chosen, TEMPLATES[template], stored)
        bad = not scores.audit_passes(tv, AUDIT_MEAN_TV, AUDIT_MAX_TV)
        failed |= bad
        print(
            f"audit {teacher.name}, template {template}: {len(chosen)} questions re-scored (seed {seed}), "
            f"TV mean {tv.mean():.4f} "
            f"(at most {AUDIT_MEAN_TV}), max {tv.max():.4f} (at most {AUDIT_MAX_TV}): {'FAILED' if bad else 'ok'}"
        )
    if failed:
        sys.exit("the committed scores are not what this machine computes: rerun with live scores, and report it")


def _calls(args: argparse.Namespace, questions: list[Question]) -> list[Call]:
    orders = args.orders or ("drawn" if args.mode == "decisions" else "all")
    if orders == "drawn":
        return drawn_calls(questions, args.draws, args.seed)
    by_k = {k: cyclic_orders(k) if orders == "cyclic" else None for k in {len(q.options) for q in questions}}
    return [call for q in questions for call in calls_in_orders([q], by_k[len(q.options)])]


def _ask(args: argparse.Namespace) -> None:
    endpoint = Endpoint(
        args.base_url,
        args.model,
        key_name=args.key_name,
        timeout=args.timeout,
        max_retries=args.max_retries,
        extra_body=args.extra_body,
        top_logprobs=args.top_logprobs,
        limit_field=args.limit_field,
    )
    store, prices = Replies(args.replies), Prices(args.price_in, args.price_out)
    limits = Limits(args.max_calls, args.max_tokens, args.max_cost)
    jobs = [
        Job(endpoint, TEMPLATES[template], _calls(args, questions), args.mode, args.tries)
        for template, questions in _questions(args).items()
    ]
    count_tokens = _token_counter(args.tokenizer)
    for job in jobs:
        print(f"{args.model}, template {job.template.name}, {args.mode}: {plan_of(job, store, prices, count_tokens)}")
    spent = store.spent
    total = prices.cost(spent.prompt_tokens, spent.completion_tokens)
    print(f"{args.replies} so far: {spent.calls} calls, {spent.tokens:,} tokens, cost {total:.4f}; limits: {limits}")
    if args.dry_run:
        return
    reports = []
    for job in jobs:
        reports.append(ask.ask(job, store, limits, prices, args.concurrency))
        print(f"\n{reports[-1]}")
    if args.records:
        _write_records(Path(args.records), jobs, store)
    if incomplete := sum(report.items - report.complete for report in reports):
        sys.exit(f"{incomplete} items are incomplete: see the table; the same command goes on from here")


def _token_counter(name: str | None) -> Callable[[str], int] | None:
    if name is None:
        return None
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def _write_records(path: Path, jobs: list[Job], store: Replies) -> None:
    """Every answered call as a line: id, order, and the decision (an option's index), or probabilities by position, which is
    what ``permdistill measure`` reads."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        for job in jobs:
            for call in job.calls:
                if (record := job.record(store, call)) is not None:
                    file.write(json.dumps(record) + "\n")
    part.replace(path)


def _measure(args: argparse.Namespace) -> None:
    ids, orders, P = scores.from_records(args.records)
    questions = [Question(name, "", "", tuple(map(str, range(P.shape[2])))) for name in ids]
    if args.questions:
        known = {q.id: q for q in from_jsonl(args.questions)}
        for name in ids:
            if name not in known or len(known[name].options) != P.shape[2]:
                found = f"{len(known[name].options)} options" if name in known else "no such question"
                raise ValueError(f"{args.records}: id {name!r} has {P.shape[2]} options, {args.questions} has {found}")
        questions = [known[name] for name in ids]
    table = tables.every_debiaser(P, orders, questions, ids, names=list(tables.METRICS))
    if args.csv:
        table.to_csv(args.csv, index=False)
    print(f"{len(ids)} items, K = {P.shape[2]}, {len(orders)} orders; 95% bootstrap intervals over items\n")
    print(_long(table))


def _students(args: argparse.Namespace) -> None:
    if args.profile:
        _students_of(profiles.PROFILES[args.profile], args)
        return
    cells = list(dict.fromkeys(cell for part in args.parts for cell in profiles.MATRIX[part]))
    cells.sort(key=lambda cell: cell.run.training.seed)  # one seed of everything before the second of anything
    if args.list:
        stored = set(ablations.available(cells, args.predictions))
        for cell in cells:
            print(f"{'stored ' if cell in stored else 'missing'} {ablations.path(cell, '.')}")
        return
    made = ablations.make(cells, args.predictions, Path(args.work or "build/matrix"))
    print(f"{made} students trained now, {len(cells) - made} were in {args.predictions}")


def _students_of(settings: profiles.Profile, args: argparse.Namespace) -> None:
    """Train what notebooks 2 and 3 train, into the folder in which they look for it."""
    folder = experiments.output_folder(args.work, args.profile) / "students"
    if args.list:
        for run in (*settings.multiple_choice, *settings.pairs):
            print(f"{'trained' if (folder / run.name / LOG).exists() else 'missing'} {run.name}")
        return
    hub.check(profiles.repositories(settings))
    pools = []
    for tasks, runs in ((settings.learnt, settings.multiple_choice), (settings.compared, settings.pairs)):
        parts = [experiments.read_scores(settings.teachers[0], t, "train", args.scores, settings.n_train) for t in tasks]
        pools.append((experiments.together(parts), runs))
    for train_on, runs in pools:
        for run in runs:
            train(run.student, run.training, folder=folder / run.name, **experiments.lessons(run, train_on))
            print(f"{run.title}: {folder / run.name}")


def _sweep(args: argparse.Namespace) -> None:
    if args.questions:
        found = sorted({len(question.options) for question in from_jsonl(args.questions)})
        if len(found) > 1:
            numbers = " and ".join(map(str, found))
            raise ValueError(
                f"{args.questions}: questions with {numbers} options, give those of one number: one student each"
            )
        settings = profiles.PROFILES["full"]
        (train_on,) = experiments.teachers_scores(settings, Path(args.output), args.scores, args.teacher, args.questions)
    else:
        train_on = experiments.together([experiments.read_scores(args.teacher, t, "train", args.scores) for t in args.tasks])
    runs = [
        profiles.Run(
            StudentConfig(encoder, head, inputs, train_on.task.k, args.max_length),
            TrainingConfig(epochs=args.epochs, learning_rate=rate, warmup=warmup, seed=seed, held_out=args.held_out),
        )
        for encoder, head, inputs, rate, warmup, seed in itertools.product(
            args.encoders, args.heads, args.inputs, args.learning_rates, args.warmups, args.seeds
        )
    ]
    table = ablations.sweep(runs, train_on, Path(args.output) / "students")
    print(table.drop(columns=["uniform", "folder"]).to_string(index=False, float_format="{:.4g}".format))
    print(f"\nalways answering 1/K: {table.uniform[0]:.4g}\nclosest to its targets: {table.folder[0]}")


def _long(table: pd.DataFrame) -> str:
    """A metric after the other, a line a debiaser: what fits on a terminal."""
    shown = tables.pretty(table)
    columns = [c for c in shown if c not in ("debiaser", "calls", "n", "source")]
    parts = [f"{c}\n" + shown[["debiaser", "calls", c]].to_string(index=False, header=False) for c in columns]
    return "\n\n".join(parts)


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    main_parser = argparse.ArgumentParser(prog="permdistill", description=__doc__)
    commands = main_parser.add_subparsers(required=True)

    command = commands.add_parser("fetch", help="download assets into the cache")
    known = {name: holder.assets for name, holder in {**MODELS, **TASKS}.items() if holder.assets}
    command.add_argument("names", nargs="+", choices=list(known), metavar="NAME", help=", ".join(known))
    command.set_defaults(run=lambda args: [print(fetch(asset)) for name in args.names for asset in known[name]])

    text = "every debiaser and metric on scores of your own, from any harness"
    command = commands.add_parser("measure", help=text, description=text)
    command.add_argument("records", help="JSONL or parquet: id, order, probabilities (of the labels), one record an order")
    command.add_argument("--questions", help="JSONL of the questions, whose answers give accuracy")
    command.add_argument("--csv", help="write the whole table to this file too")
    command.set_defaults(run=_measure)

    for name, run, text in (
        ("score", _score, "score all orders of questions with a teacher, into a resumable store"),
        ("audit", _audit, "re-score a random sample and compare with the store"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--teacher", default=TEACHERS[0], help=f"{', '.join(TEACHERS)}, a folder, or a hub repository")
        _add_questions(command)
        command.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="part of the scores' key")
        command.add_argument("--scores", default=str(SCORES), help="folder of the stores (default: the committed one)")
        if name == "score":
            text = "Ray actors that hold the teacher; RAY_ADDRESS names the cluster (default: this process, without Ray)"
            command.add_argument("--workers", type=int, default=0, help=text)
            command.add_argument("--worker-cpus", type=float, default=1, help="of each worker: its threads (%(default)s)")
            command.add_argument("--worker-gpus", type=float, help="of each worker (default: 1 where the cluster has some)")
            text = "all that this profile needs, of all of its teachers, instead of --teacher, --tasks and the like"
            command.add_argument("--profile", choices=list(profiles.PROFILES), help=text)
        if name == "audit":
            command.add_argument("--n", type=int, default=8, help="questions per template")
            command.add_argument("--seed", type=int, help="of the sample (default: another one each time)")
        command.set_defaults(run=run, content_free=True)

    text = "what a profile takes: questions, tokens, operations, GPU-hours, downloads, disk; downloads and loads no model"
    command = commands.add_parser("plan", help=text, description=text)
    command.add_argument("--profile", choices=list(profiles.PROFILES), default="full", help="(%(default)s)")
    command.add_argument(
        "--sample", type=int, default=budget.SAMPLE, help="groups of questions that are tokenised (%(default)s)"
    )
    text = "load this teacher, measure what this machine reaches with it, and say hours for this machine too"
    command.add_argument("--measure", metavar="TEACHER", help=text)
    command.set_defaults(run=_plan)

    text = "train the matrix of students (hours), and keep their predictions; continues where it was stopped"
    together = "; started with torchrun or accelerate launch, all processes train each student together"
    command = commands.add_parser("students", help=text, description=text + together)
    parts = list(profiles.MATRIX)
    which = command.add_mutually_exclusive_group()
    which.add_argument("--parts", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    text = "the students of this profile's notebooks 2 and 3 instead, into --work, where they look for them"
    which.add_argument("--profile", choices=list(profiles.PROFILES), help=text)
    command.add_argument("--predictions", default=str(ablations.COMMITTED), help="folder (default: the committed ones)")
    text = "folder for checkpoints (build/matrix); with --profile, for students (where `make paper` puts its own)"
    command.add_argument("--work", default="", help=text)
    command.add_argument("--scores", default=str(SCORES), help="with --profile, folder of the stores (the committed one)")
    command.add_argument("--list", action="store_true", help="only say which there are")
    command.set_defaults(run=_students)

    text = "train students of several settings, and compare them on held-out questions without gold answers"
    command = commands.add_parser("sweep", help=text, description=text + together)
    command.add_argument("--teacher", default=TEACHERS[0], help=f"{', '.join(TEACHERS)}, a folder, or a hub repository")
    trained = [task for task in LAPTOP if "train" in TASKS[task].splits]
    names = f"pooled, from {', '.join(trained)} (default: multiple choice)"
    where = command.add_mutually_exclusive_group()
    where.add_argument("--tasks", nargs="+", choices=trained, default=list(MULTIPLE_CHOICE), metavar="TASK", help=names)
    where.add_argument("--questions", help="a JSONL file of your own questions; what is not scored yet is scored first")
    command.add_argument("--scores", default=str(SCORES), help="folder of the stores (default: the committed one)")
    command.add_argument("--output", default="build/sweep", help="folder for students, and scores of your own (%(default)s)")
    command.add_argument("--encoders", nargs="+", default=["all-MiniLM-L6-v2"], help="asset, folder or hub repository")
    command.add_argument("--heads", nargs="+", choices=HEADS, default=["per_option"])
    command.add_argument("--inputs", nargs="+", choices=INPUTS, default=["plain"])
    command.add_argument("--learning-rates", nargs="+", type=float, default=[3e-5, 1e-4, 3e-4])
    command.add_argument("--warmups", nargs="+", type=float, default=[0.1])
    command.add_argument("--seeds", nargs="+", type=int, default=[0])
    command.add_argument("--epochs", type=int, default=8, help="at most (%(default)s)")
    command.add_argument("--held-out", type=float, default=0.1, help="share of the questions (%(default)s)")
    command.add_argument("--max-length", type=int, default=256, help="tokens of a sequence (%(default)s)")
    command.set_defaults(run=_sweep)

    text = "ask a model behind an OpenAI-compatible API, into a resumable store of replies, within a budget"
    command = commands.add_parser("ask", help=text, description=text)
    command.add_argument("--base-url", required=True, help="up to and with /v1")
    command.add_argument("--model", required=True, help="as the API calls it")
    command.add_argument(
        "--key-name", default="OPENAI_API_KEY", help="environment variable that holds the key (%(default)s)"
    )
    _add_questions(command, None)
    modes = "sampled tokens, or top_logprobs, asked in the order that vLLM's and SGLang's prefix caches like (%(default)s)"
    command.add_argument("--mode", choices=MODES, default="decisions", help=modes)
    orders = "drawn: --draws at random; cyclic: K; all: K! (default: drawn for decisions, all for logprobs)"
    command.add_argument("--orders", choices=("drawn", "cyclic", "all"), help=orders)
    command.add_argument("--draws", type=int, default=32, help="calls an item, each in an order of its own (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the drawn orders")
    command.add_argument("--replies", default="replies", help="folder of the store (%(default)s)")
    command.add_argument("--dry-run", action="store_true", help="print the plan and its cost, ask nothing")
    command.add_argument("--max-calls", type=int, help="limit on all that the store ever cost, retries included")
    command.add_argument("--max-tokens", type=int, help="the same for tokens, prompts and replies together")
    command.add_argument("--max-cost", type=float, help="the same for money; needs prices")
    command.add_argument("--price-in", type=float, default=0.0, help="money per million prompt tokens")
    command.add_argument("--price-out", type=float, default=0.0, help="money per million completion tokens")
    command.add_argument("--tokenizer", help="folder or hub repository: counts the plan's tokens (default: by length)")
    command.add_argument("--concurrency", type=int, default=8, help="calls under way at a time (%(default)s)")
    command.add_argument("--tries", type=int, default=3, help="replies to a call that may name no option (%(default)s)")
    command.add_argument("--max-retries", type=int, default=6, help="of a call that gets no reply (%(default)s)")
    command.add_argument("--timeout", type=float, default=60.0, help="seconds for one attempt (%(default)s)")
    command.add_argument("--top-logprobs", type=int, default=20, help="alternatives to ask for (%(default)s)")
    command.add_argument("--limit-field", choices=("max_tokens", "max_completion_tokens"), default="max_tokens")
    command.add_argument("--extra-body", type=_json_object, default={}, help="JSON object: further fields of each request")
    command.add_argument("--records", help="write every answer to this JSONL file; with logprobs, measure reads it")
    command.set_defaults(run=_ask, content_free=False)
    return main_parser


def _json_object(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{text} is no JSON object")
    return value


def _add_questions(command: argparse.ArgumentParser, tasks: Sequence[str] | None = LAPTOP) -> None:
    """Which questions. ``tasks`` is the default; None: there is none, where a forgotten option would cost money."""
    where = command if tasks else command.add_mutually_exclusive_group(required=True)
    every = list(TASKS)
    names = ", ".join(every)
    where.add_argument("--tasks", nargs="+", choices=every, default=tasks, metavar="TASK", help=names)
    where.add_argument("--questions", help="a JSONL file of your own questions instead of --tasks")
    text = "of --tasks (default: all that each of them has)"
    command.add_argument("--splits", nargs="+", choices=("train", "test"), default=("test", "train"), help=text)
    command.add_argument("--template", choices=list(TEMPLATES), help="default: the task's own; letters for --questions")
    command.add_argument("--limit", type=int, help="only the first so many questions of each task and split")


_REFUSALS = (
    AssetError,
    BadRecords,
    scores.MissingScores,
    scaleout.MissingRay,
    EndpointError,
    ValueError,
    OSError,
)  # whose messages say all that a user needs


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``permdistill`` command."""
    args = parser().parse_args(argv)
    try:
        lead(lambda: args.run(args))
    except _REFUSALS as error:
        sys.exit(f"permdistill: {error}")


if __name__ == "__main__":
    main()
