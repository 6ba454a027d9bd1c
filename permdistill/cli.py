"""Measure how a language model depends on the order of options, take that away, and teach what is left to a student.

The paper's own runs: ``python -m permdistill.paper --help``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from permdistill import commands
from permdistill.measure import command as measuring
from permdistill.questions import Question, content_free, from_jsonl, unlabelled

MOVED = ("fetch", "plan", "students")  # commands of version 0.1 that belong to the paper


def _questions(args: argparse.Namespace) -> dict[str, list[Question]]:
    """{template name: questions without gold answers} of what the arguments ask for."""
    if args.questions:
        own = unlabelled(from_jsonl(args.questions, args.map))[: args.limit]
        return {args.template or "letters": commands.treated(own, args.unsafe)}
    from permdistill.paper.tasks import TASKS, load_task

    jobs: dict[str, list[Question]] = {}
    for task in args.tasks:
        for split in TASKS[task].splits:
            if split in args.splits:
                loaded = load_task(task, split, args.template or "").first(args.limit)
                # The tasks of one template go together: the four attributes of SummEval share their documents.
                questions = jobs.setdefault(loaded.template.name, [])
                questions += commands.treated(unlabelled(loaded.questions), args.unsafe)
                if args.content_free and args.orders != commands.ADAPTIVE:
                    questions += content_free(loaded.questions)
    return jobs


def _suited(args: argparse.Namespace) -> commands.Jobs:
    """:func:`_questions`, with a template that suits the teacher unless one is named."""
    return _questions(args) if args.template else commands.suited(args.teacher, _questions(args))


def _score(args: argparse.Namespace) -> None:
    commands.score(args.teacher, _suited(args), args)


def _audit(args: argparse.Namespace) -> None:
    samples = {name: commands.drawn(questions, args.n, args.seed) for name, questions in _suited(args).items()}
    commands.audit(args.teacher, samples, args)


def _ask(args: argparse.Namespace) -> None:
    from permdistill.api import command

    command.run(args, _questions(args))


def _sweep(args: argparse.Namespace) -> None:
    import itertools
    from pathlib import Path

    import numpy as np

    from permdistill.configs import StudentConfig, TrainingConfig
    from permdistill.paper import experiments, profiles, sweeps, tasks

    own, every = args.questions, tasks.TASKS
    numbers = {len(question.options) for question in from_jsonl(own)} if own else {every[t].k for t in args.tasks}
    k = numbers.pop() if len(numbers) == 1 else 0  # 0: a student for any number of options
    runs = [  # made before anything is scored: they refuse what does not go together
        profiles.Run(
            StudentConfig(encoder, head, inputs, k, args.max_length),
            TrainingConfig(epochs=args.epochs, learning_rate=rate, warmup=warmup, seed=seed, held_out=args.held_out),
        )
        for encoder, head, inputs, rate, warmup, seed in itertools.product(
            args.encoders, args.heads, args.inputs, args.learning_rates, args.warmups, args.seeds
        )
    ]
    sweeps.comparable(runs)
    asked = experiments.own_tasks(own) if own else [tasks.load_task(t, "train") for t in args.tasks]
    texts = [question for part in asked for question in part.questions]
    long = sweeps.overlong(runs, texts) if args.long != "cut" else set()
    if long and args.long == "refuse":
        what = f"{len(long)} of {len(texts)} questions have options that --max-length {args.max_length} cuts off"
        raise ValueError(f"{what} ({', '.join(sorted(long)[:5])}): give a larger one, or --long drop, or --long cut")
    if len(long) == len(texts):
        raise ValueError(f"--max-length {args.max_length} cuts options of all {len(texts)} questions: give a larger one")
    prompting = commands.prompting(args)
    if long:  # before their scores are asked for
        print(f"{len(long)} of {len(texts)} questions are left out, since --max-length {args.max_length} cuts their options")
        asked = [part.where(np.array([q.id not in long for q in part.questions])) for part in asked]
        asked = [part for part in asked if part.questions]
    if own:
        live = prompting | {"min_label_mass": args.min_label_mass}
        train_on = [experiments.scored(args.teacher, part, Path(args.output), args.scores, live) for part in asked]
    else:
        train_on = experiments.by_k([experiments.read_stored(args.teacher, part, args.scores, prompting) for part in asked])
    table = sweeps.sweep(runs, train_on, Path(args.output) / "students")
    print(table.drop(columns=["uniform", "folder"]).to_string(index=False, float_format="{:.4g}".format))
    print(f"\nalways answering 1/K: {table.uniform[0]:.4g}\nclosest to its targets: {table.folder[0]}")


# --------------------------------------------------------------------------------------------------------------------
# The parser: commands in the order in which they are used


def _add_teacher(command: argparse.ArgumentParser) -> None:
    from permdistill.paper.models import TEACHERS

    command.add_argument("--teacher", default=TEACHERS[0], help=f"{', '.join(TEACHERS)}, a folder, or a hub repository")


def _add_questions(command: argparse.ArgumentParser, required: bool = False) -> None:
    """Which questions. ``required``: there is no default, where a forgotten option would cost money."""
    from permdistill.paper.tasks import LAPTOP, TASKS
    from permdistill.prompts import TEMPLATES

    where = command.add_mutually_exclusive_group(required=required)
    where.add_argument("--questions", help="a JSONL file of your own questions")
    commands.add_map(command)
    text, tasks = ", ".join(TASKS), None if required else LAPTOP
    where.add_argument("--tasks", nargs="+", choices=list(TASKS), default=tasks, metavar="TASK", help=text)
    text = "of --tasks (default: all that each of them has)"
    command.add_argument("--splits", nargs="+", choices=("train", "test"), default=("test", "train"), help=text)
    text = "default: the task's own; letters for --questions; plain instead where a local model has no chat template"
    command.add_argument("--template", choices=list(TEMPLATES), help=text)
    command.add_argument("--limit", type=commands.whole(1), help="only the first so many questions of each task and split")


def _add_sweep(command: argparse.ArgumentParser) -> None:
    from permdistill.configs import HEADS, INPUTS
    from permdistill.paper.paths import ROOT
    from permdistill.paper.tasks import LAPTOP, MULTIPLE_CHOICE, TASKS

    trained = [task for task in LAPTOP if "train" in TASKS[task].splits]
    names = f"pooled, from {', '.join(trained)} (default: multiple choice)"
    where = command.add_mutually_exclusive_group()
    where.add_argument("--questions", help="a JSONL file of your own questions; what is not scored yet is scored first")
    where.add_argument("--tasks", nargs="+", choices=trained, default=list(MULTIPLE_CHOICE), metavar="TASK", help=names)
    text = "folder of the stores to read (default: the committed one)"
    command.add_argument("--scores", default=str(ROOT / "scores"), help=text)
    command.add_argument("--output", default="build/sweep", help="folder for students, and scores of your own (%(default)s)")
    commands.add_prompting(command, tried=True)
    command.add_argument("--encoders", nargs="+", default=["all-MiniLM-L6-v2"], help="asset, folder or hub repository")
    command.add_argument("--heads", nargs="+", choices=HEADS, default=["per_option"])
    command.add_argument("--inputs", nargs="+", choices=INPUTS, default=["plain"])
    command.add_argument("--learning-rates", nargs="+", type=commands.real(), default=[3e-5, 1e-4, 3e-4])
    command.add_argument("--warmups", nargs="+", type=commands.real(0, 1), default=[0.1])
    command.add_argument("--seeds", nargs="+", type=int, default=[0])
    command.add_argument("--epochs", type=int, default=8, help="at most (%(default)s)")
    command.add_argument("--held-out", type=commands.real(0, 1), default=0.1, help="share of the questions (%(default)s)")
    command.add_argument("--max-length", type=int, default=256, help="tokens of a sequence (%(default)s)")
    text = "what to do with questions whose options are longer: cut their ends (default), leave them out, or stop"
    command.add_argument("--long", choices=["cut", "drop", "refuse"], default="cut", help=text)


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    from permdistill.api import command as asking

    layout = argparse.RawDescriptionHelpFormatter
    main_parser = argparse.ArgumentParser(prog="permdistill", description=__doc__, formatter_class=layout)
    found = main_parser.add_subparsers(required=True, metavar="COMMAND")
    own = "--questions mine.jsonl --teacher smollm2-135m"

    text = "score questions in all orders, or some, with a teacher, into a resumable store"
    command = commands.add(found, "score", _score, text, f"permdistill score {own} --scores my-scores")
    _add_questions(command)
    _add_teacher(command)
    commands.add_scoring(command, "build/scores", workers=True)
    commands.add_orders(command)
    command.add_argument(
        "--records", help="write what the questions scored, stored or now, to this JSONL file: measure reads it"
    )
    commands.add_prompting(command, tried=True)
    command.set_defaults(content_free=True)

    text = "re-score a random sample and compare with the store"
    command = commands.add(found, "audit", _audit, text, f"permdistill audit {own} --scores my-scores --n 4")
    _add_questions(command)
    _add_teacher(command)
    commands.add_scoring(command, "build/scores", workers=False)
    commands.add_orders(command)
    commands.add_prompting(command, tried=False)
    command.set_defaults(content_free=True)

    text = "which way a judge leans, how often the order decides, and how often it is right"
    example = "permdistill measure my-scores.jsonl --questions mine.jsonl --csv measured.csv"
    measuring.add_options(commands.add(found, "measure", measuring.run, text, example))

    text = "ask a model behind an OpenAI-compatible API, into a resumable store of replies, within a budget"
    example = "permdistill ask --base-url https://api.example.com/v1 --model my-model --questions mine.jsonl --dry-run"
    command = commands.add(found, "ask", _ask, text, example)
    _add_questions(command, required=True)
    asking.add_options(command)
    command.set_defaults(content_free=False)

    text = "train students of several settings, and compare them on held-out questions without gold answers"
    command = commands.add(found, "sweep", commands.led(_sweep), text, f"permdistill sweep {own} --learning-rates 1e-4 3e-4")
    command.description += "; started with torchrun or accelerate launch, all processes train each student together"
    _add_teacher(command)
    _add_sweep(command)
    return main_parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``permdistill`` command."""
    words = list(sys.argv[1:] if argv is None else argv)
    profile = words[:1] in (["score"], ["audit"]) and any(word.split("=")[0] == "--profile" for word in words)
    if profile or (words and words[0] in MOVED):
        old = f"{words[0]} --profile" if profile else words[0]
        print(f"permdistill {old} is now python -m permdistill.paper {old}", file=sys.stderr)
        sys.exit(2)
    commands.main(parser(), words)


if __name__ == "__main__":
    main()
