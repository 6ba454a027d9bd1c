"""The paper's runs, by profile (smoke, full, paper; full-60: the same with 60 questions of each task)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from permdistill import commands
from permdistill.paper import hub, matrix, models, profiles
from permdistill.paper.assets import fetch, verify
from permdistill.paper.models import MODELS
from permdistill.paper.paths import ROOT, output_folder
from permdistill.paper.tasks import TASKS, load_task
from permdistill.questions import Question, content_free, unlabelled


def _fetch(args: argparse.Namespace) -> None:
    wrong = []
    for name in args.names:
        assets = {**MODELS, **TASKS}[name].assets
        if args.verify:
            wrong += models.verify(name) if name in MODELS else verify(assets)
        for asset in assets:
            print(fetch(asset))
    if wrong:  # it has been fetched anew; that it was wrong must not pass without a word
        sys.exit("\n".join(["permdistill: the cache held wrong bytes", *wrong]))


def _plan(args: argparse.Namespace) -> None:
    from permdistill.paper import budget
    from permdistill.teachers import load_teacher

    settings, speed = profiles.get(args.profile), None
    if args.measure:
        task = load_task("arc_easy", "test")
        groups = budget.sample(budget.grouped(unlabelled(task.questions)), 4)
        speed = budget.rate(load_teacher(args.measure), groups, task.template)
        print(f"{args.measure} here: {speed / 1e9:,.1f} GFLOP/s\n")
    print(budget.report(settings, args.sample or budget.SAMPLE, speed))


def _questions(needs: Sequence[profiles.Need]) -> dict[str, list[Question]]:
    """{template name: questions without gold answers}, and their content-free forms; those of one template go together,
    since the four attributes of SummEval share their documents."""
    jobs: dict[str, list[Question]] = {}
    for need in needs:
        task = need.load()
        jobs.setdefault(task.template.name, []).extend(unlabelled(task.questions) + content_free(task.questions))
    return jobs


def _score(args: argparse.Namespace) -> None:
    settings = profiles.get(args.profile)
    hub.check(profiles.repositories(settings))
    needs = matrix.all_needs(settings)
    for teacher in settings.teachers:
        commands.score(teacher, _questions([need for need in needs if need.teacher == teacher]), args)


def _audit(args: argparse.Namespace) -> None:
    """Of every teacher's scores ``--n`` questions of each template, and three of those that only R1 reads; of the first
    teacher's questions for training and testing together, of the others' apart."""
    settings = profiles.get(args.profile)
    needs = matrix.all_needs(settings)
    for teacher in settings.teachers:
        groups: dict[tuple[str, str], list[profiles.Need]] = {}
        for need in (need for need in needs if need.teacher == teacher):
            split = "" if teacher == settings.teachers[0] else need.split
            groups.setdefault((need.template_name, split), []).append(need)
        samples: dict[str, list[Question]] = {}
        for (template, _), group in groups.items():
            n = min(args.n, 3) if all(need.table == "R1" for need in group) else args.n
            samples.setdefault(template, []).extend(commands.drawn(_questions(group)[template], n, args.seed))
        commands.audit(teacher, samples, args)


def _students(args: argparse.Namespace) -> None:
    if args.profile:
        _students_of(profiles.get(args.profile), args)
        return
    from permdistill.paper import ablations, audits

    folder = args.predictions or ablations.COMMITTED
    if args.audit:
        chosen = audits.auditable(matrix.MATRIX["audited"], folder)
        found = audits.audit(chosen, Path(args.work or "build/audit"), folder)
        print(found.to_string(index=False, float_format="{:.4f}".format))
        if not found.ok.all():
            sys.exit(f"mean TV above {audits.AUDIT_TV}: train the students live, and report it")
        return
    cells = list(dict.fromkeys(cell for part in args.parts for cell in matrix.MATRIX[part]))
    cells.sort(key=lambda cell: cell.run.training.seed)  # one seed of everything before the second of anything
    if args.list:
        stored = set(ablations.available(cells, folder))
        for cell in cells:
            print(f"{'stored ' if cell in stored else 'missing'} {ablations.path(cell, '.')}")
        return
    made = ablations.make(cells, folder, Path(args.work or "build/matrix"))
    print(f"{made} students trained now, {len(cells) - made} were in {folder}")


def _students_of(settings: profiles.Profile, args: argparse.Namespace) -> None:
    """Train what notebook 3 trains, into the folder in which it looks for it."""
    from permdistill.paper import experiments
    from permdistill.training import LOG, train

    folder = output_folder(args.work, args.profile) / "students"
    if args.list:
        for run in settings.runs:
            print(f"{'trained' if (folder / run.name / LOG).exists() else 'missing'} {run.name}")
        return
    hub.check(profiles.repositories(settings))
    pools = []
    for pool in settings.pools.values():
        train_on = experiments.read_pool(settings, pool, "train", args.scores)
        pools.append((train_on, pool.runs))
    for train_on, runs in pools:
        for run in runs:
            train(run.student, run.training, experiments.lesson_of(run, train_on), folder / run.name)
            print(f"{run.title}: {folder / run.name}")


def _results(args: argparse.Namespace) -> None:
    from permdistill.paper import results

    results.write()


def _withheld(args: argparse.Namespace) -> None:
    from permdistill.paper import withheld

    withheld.write()


def _site(args: argparse.Namespace) -> None:
    from permdistill.paper import site

    print(site.write(args.build))


def _manifest(args: argparse.Namespace) -> None:
    from permdistill.paper import manifest

    if status := manifest.main(args.words):
        sys.exit(status)


# --------------------------------------------------------------------------------------------------------------------
# The parser: commands in the order in which they are used


def _add_students(command: argparse.ArgumentParser) -> None:
    parts = list(matrix.MATRIX)
    which = command.add_mutually_exclusive_group()
    which.add_argument("--parts", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    text = "train a small student of each head anew, and compare with the stored predictions"
    which.add_argument("--audit", action="store_true", help=text)
    text = "the students of this profile's notebook 3 instead, into --work, where it looks for them"
    which.add_argument("--profile", help=text)
    command.add_argument("--predictions", default="", help="folder (default: the committed ones)")
    text = "folder for checkpoints (build/matrix); with --profile, for students (where `make paper` puts its own)"
    command.add_argument("--work", default="", help=text)
    text = "with --profile, folder of the stores (default: the committed one)"
    command.add_argument("--scores", default=str(ROOT / "scores"), help=text)
    command.add_argument("--list", action="store_true", help="only say which there are")


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    main_parser = argparse.ArgumentParser(prog="python -m permdistill.paper", description=__doc__)
    found = main_parser.add_subparsers(required=True, metavar="COMMAND")
    program, scores = "python -m permdistill.paper", str(ROOT / "scores")

    text = "what a profile takes: questions, tokens, operations, GPU-hours, downloads, disk; downloads and loads no model"
    command = commands.add(found, "plan", _plan, text, f"{program} plan --profile paper")
    command.add_argument("--profile", default="full", help="(%(default)s)")
    command.add_argument("--sample", type=commands.whole(1), help="groups of questions that are tokenised")
    text = "load this teacher, measure what this machine reaches with it, and say hours for this machine too"
    command.add_argument("--measure", metavar="TEACHER", help=text)

    command = commands.add(found, "fetch", _fetch, "download assets into the cache", f"{program} fetch smollm2-135m")
    command.add_argument("--verify", action="store_true", help="hash what the cache holds; what is wrong is fetched anew")
    known = [name for name, holder in {**MODELS, **TASKS}.items() if holder.assets]
    command.add_argument("names", nargs="+", choices=known, metavar="NAME", help=", ".join(known))

    text = "make every score that a profile's tables and the matrix need; what a store holds is not scored again"
    command = commands.add(found, "score", _score, text, f"{program} score --profile full")
    command.add_argument("--profile", default="full", help="(%(default)s)")
    commands.add_scoring(command, scores, workers=True)

    text = "re-score a random sample of a profile's scores and compare with the stores"
    command = commands.add(found, "audit", _audit, text, f"{program} audit --profile full --n 4")
    command.add_argument("--profile", default="full", help="(%(default)s)")
    commands.add_scoring(command, scores, workers=False)

    text = "train the matrix of students (hours), and keep their predictions; continues where it was stopped"
    command = commands.add(found, "students", commands.led(_students), text, f"{program} students --list")
    command.description += "; started with torchrun or accelerate launch, all processes train each student together"
    _add_students(command)

    text = "bring figures/README.md and the README's table up to date with figures/*.csv"
    commands.add(found, "results", _results, text, f"{program} results")

    text = "note answers and keys of RACE's test questions beside their scores; needs RACE's texts, of the model hub"
    commands.add(found, "withheld", _withheld, text, f"{program} withheld")
    text = "executed notebooks, the explorer and a report as static pages: BUILD/site"
    command = commands.add(found, "site", _site, text, f"{program} site build")
    command.add_argument("build", metavar="BUILD")

    text = "what was run, on what, and what came of it: BUILD [--measure NAME -- COMMAND ..]"
    command = commands.add(found, "manifest", _manifest, text, f"{program} manifest build")
    command.add_argument("words", nargs=argparse.REMAINDER, metavar="BUILD")
    return main_parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m permdistill.paper``."""
    commands.main(parser(), argv)
