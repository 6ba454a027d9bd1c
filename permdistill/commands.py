"""What the command lines share: options, refusals, and the two commands that score. Loads no torch until one runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from secrets import randbelow
from typing import Any

from permdistill.questions import Question

# A live score may differ from a stored one by rounding: other cores sum in another order. Measured: `permdistill audit`.
AUDIT_MEAN_TV, AUDIT_MAX_TV = 0.02, 0.15
Jobs = Mapping[str, Sequence[Question]]  # {template's name: questions without gold answers}


def add(commands: Any, name: str, run: Callable[[argparse.Namespace], object], text: str, example: str) -> Any:
    """Add a command with its one-line description and an example for its help; gives its parser."""
    layout = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(name, help=text, description=text, epilog=f"example:\n  {example}", formatter_class=layout)
    command.set_defaults(run=run)
    return command


def main(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """Parse and run; an error whose message says all that a user needs ends the program with that message alone."""
    args = parser.parse_args(argv)
    args.typed = list(sys.argv[1:] if argv is None else argv)
    try:
        args.run(args)
    except (ValueError, OSError, LookupError, ImportError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("permdistill"):
            sys.exit(f"permdistill: this needs the package {error.name}: pip install 'permdistill[all]'")
        known = {"MissingScores", "MissingRay", "EndpointError"}  # by name: their modules need not be loaded
        if not isinstance(error, (ValueError, OSError)) and type(error).__name__ not in known:
            raise
        sys.exit(f"permdistill: {error}")


def led(run: Callable[[argparse.Namespace], object]) -> Callable[[argparse.Namespace], None]:
    """A command that trains, for all processes that torchrun or accelerate launch started."""

    def program(args: argparse.Namespace) -> None:
        from permdistill.training import lead

        lead(lambda: run(args))  # type: ignore[arg-type]

    return program


def add_scoring(command: argparse.ArgumentParser, scores: str, workers: bool) -> None:
    """Options of whatever scores; ``scores`` is the stores' default folder."""
    command.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="part of the scores' key")
    command.add_argument("--scores", default=scores, help="folder of the stores (%(default)s)")
    if workers:
        text = "Ray actors that hold the teacher; RAY_ADDRESS names the cluster (default: this process, without Ray)"
        command.add_argument("--workers", type=int, default=0, help=text)
        command.add_argument("--worker-cpus", type=float, default=1, help="of each worker: its threads (%(default)s)")
        command.add_argument("--worker-gpus", type=float, help="of each worker (default: 1 where the cluster has some)")
    else:
        command.add_argument("--n", type=int, default=8, help="questions per template (%(default)s)")
        text = "of the sample (default: another one each time)"
        command.add_argument("--seed", type=int, default=randbelow(2**32), help=text)


def score(teacher: str, jobs: Jobs, args: argparse.Namespace) -> None:
    """Score with a teacher what its store lacks, a template after the other. ``args``: see :func:`add_scoring`."""
    import torch

    from permdistill import scaleout, scores, teachers
    from permdistill.prompts import TEMPLATES

    name, dtype = Path(teacher).name, getattr(torch, args.dtype)
    store, key = scores.Store(Path(args.scores) / name), teachers.model_key(teacher, dtype)
    if not any(scores.lacking(store, questions, TEMPLATES[template], key) for template, questions in jobs.items()):
        print(f"{name}: all {sum(map(len, jobs.values()))} questions were in the store")
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the teacher before is gone
    loaded = None if args.workers else teachers.load_teacher(teacher, dtype)
    for template, questions in jobs.items():
        if loaded is None:
            make = partial(teachers.load_teacher, teacher, dtype)
            workers = scaleout.Workers(make, key, args.workers, args.worker_cpus, args.worker_gpus)
            done = scaleout.score(store, workers, questions, TEMPLATES[template])
        else:
            done = scores.score(store, loaded, questions, TEMPLATES[template])
        print(f"{name}, template {template}: {done} questions scored now, {len(questions) - done} were in the store")
    store.compact()


def drawn(questions: Sequence[Question], n: int, seed: int) -> list[Question]:
    """At most ``n`` of the questions, at random."""
    import numpy as np

    chosen = np.random.default_rng(seed).choice(len(questions), size=min(n, len(questions)), replace=False)
    return [questions[i] for i in chosen]


def audit(teacher: str, samples: Jobs, args: argparse.Namespace) -> None:
    """Score samples again and compare with the store; ends the program when they differ by more than rounding.

    Raises MissingScores before the model is loaded.
    """
    import torch

    from permdistill import scores, teachers
    from permdistill.prompts import TEMPLATES

    stored = teachers.model_key(teacher, getattr(torch, args.dtype))
    store, failed = scores.Store(Path(args.scores) / Path(teacher).name), False
    for template, questions in samples.items():
        for question in questions:
            scores.load(store, [question], TEMPLATES[template], stored)
    loaded = teachers.load_teacher(teacher, teachers.fast_dtype())  # rounding apart, any number format must agree
    for template, questions in samples.items():
        tv = scores.audit(store, loaded, questions, TEMPLATES[template], stored)
        bad = not scores.audit_passes(tv, AUDIT_MEAN_TV, AUDIT_MAX_TV)
        failed |= bad
        print(
            f"audit {loaded.name}, template {template}: {len(questions)} questions re-scored (seed {args.seed}), "
            f"TV mean {tv.mean():.4f} (at most {AUDIT_MEAN_TV}), max {tv.max():.4f} (at most {AUDIT_MAX_TV}): "
            f"{'FAILED' if bad else 'ok'}"
        )
    if failed:
        sys.exit("the stored scores are not what this machine computes: rerun with live scores, and report it")
