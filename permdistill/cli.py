"""Command line: ``permdistill fetch | score | audit | measure`` (see ``permdistill COMMAND --help``)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from permdistill import data, profiles, scores, tables
from permdistill.assets import ASSETS, AssetError, fetch
from permdistill.prompts import TEMPLATES
from permdistill.teachers import TEACHERS, fast_dtype, load_teacher, model_key

SCORES = Path(__file__).parent.parent / "scores"

# A live score may differ from a stored one by rounding: other cores sum in another order. Measured: `permdistill audit`.
AUDIT_MEAN_TV, AUDIT_MAX_TV = 0.02, 0.15


def _questions(args: argparse.Namespace) -> dict[str, list[data.Question]]:
    """{template name: questions without gold answers} of what the arguments ask for."""
    if args.questions:
        return {args.template or "letters": data.unlabelled(data.from_jsonl(args.questions))[: args.limit]}
    jobs: dict[str, list[data.Question]] = {}
    for task in args.tasks:
        for split in profiles.splits(task):
            if split in args.splits:
                loaded = profiles.load_task(task, split, args.template or "").first(args.limit)
                # The tasks of one template go together: the four attributes of SummEval share their documents.
                questions = jobs.setdefault(loaded.template.name, [])
                questions += data.unlabelled(loaded.questions)
                questions += data.content_free(loaded.questions)
    return jobs


def _score(args: argparse.Namespace) -> None:
    jobs = _questions(args)
    teacher = load_teacher(args.teacher, getattr(torch, args.dtype))
    store = scores.Store(Path(args.scores) / teacher.name)
    for template, questions in jobs.items():
        done = scores.score(store, teacher, questions, TEMPLATES[template])
        print(f"{teacher.name}, template {template}: {done} questions scored now, {len(questions) - done} were in the store")
    store.compact()


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
        bad = tv.mean() > AUDIT_MEAN_TV or tv.max() > AUDIT_MAX_TV
        failed |= bad
        print(
            f"audit {teacher.name}, template {template}: {len(chosen)} questions re-scored (seed {seed}), "
            f"TV mean {tv.mean():.4f} "
            f"(at most {AUDIT_MEAN_TV}), max {tv.max():.4f} (at most {AUDIT_MAX_TV}): {'FAILED' if bad else 'ok'}"
        )
    if failed:
        sys.exit("the committed scores are not what this machine computes: rerun with live scores, and report it")


def _measure(args: argparse.Namespace) -> None:
    ids, orders, P = scores.from_records(args.records)
    questions = [data.Question(name, "", "", tuple(map(str, range(P.shape[2])))) for name in ids]
    if args.questions:
        known = {q.id: q for q in data.from_jsonl(args.questions)}
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
    command.add_argument("names", nargs="+", choices=list(ASSETS), metavar="NAME", help=", ".join(ASSETS))
    command.set_defaults(run=lambda args: [print(fetch(name)) for name in args.names])

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
        command.add_argument(
            "--tasks",
            nargs="+",
            choices=profiles.TASKS,
            default=profiles.TASKS,
            metavar="TASK",
            help=", ".join(profiles.TASKS),
        )
        command.add_argument("--splits", nargs="+", choices=("train", "test"), default=("test", "train"))
        command.add_argument("--questions", help="a JSONL file of your own questions instead of --tasks")
        command.add_argument("--template", choices=list(TEMPLATES), help="default: the task's own; letters for --questions")
        command.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="part of the scores' key")
        command.add_argument("--scores", default=str(SCORES), help="folder of the stores (default: the committed one)")
        command.add_argument("--limit", type=int, help="only the first so many questions of each task and split")
        if name == "audit":
            command.add_argument("--n", type=int, default=8, help="questions per template")
            command.add_argument("--seed", type=int, help="of the sample (default: another one each time)")
        command.set_defaults(run=run)
    return main_parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``permdistill`` command."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (AssetError, data.BadRecords, scores.MissingScores, ValueError, OSError) as error:
        sys.exit(f"permdistill: {error}")


if __name__ == "__main__":
    main()
