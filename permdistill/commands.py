"""What the command lines share: options, refusals, and the two commands that score. Loads no torch until one runs."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from secrets import randbelow
from typing import Any

import numpy as np

from permdistill.files import replacing
from permdistill.layouts import LAYOUTS, columns
from permdistill.orders import SETS, order_set
from permdistill.prompts import LEAST_MASS, LOW_MASS
from permdistill.questions import UNSAFE, Question, treat_unsafe, unsafe_options
from permdistill.sources import short

# A live score may differ from a stored one by rounding: other cores sum in another order. Measured: `permdistill audit`.
AUDIT_MEAN_TV, AUDIT_MAX_TV = 0.02, 0.15
Jobs = Mapping[str, Sequence[Question]]  # {template's name: questions without gold answers}


def add(commands: Any, name: str, run: Callable[[argparse.Namespace], object], text: str, example: str) -> Any:
    """Add a command with its one-line description and an example for its help; gives its parser."""
    layout = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(name, help=text, description=text, epilog=f"example:\n  {example}", formatter_class=layout)
    command.set_defaults(run=run)
    return command


def printable(text: str) -> str:
    """Text whose control characters and half characters are shown as escapes: what a file or a server says must not steer
    the terminal. Ends of lines and tabs stay."""
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def main(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """Parse and run; an error whose message says all that a user needs ends the program with that message alone."""
    args = parser.parse_args(argv)
    args.typed = list(sys.argv[1:] if argv is None else argv)
    try:
        args.run(args)
    except (ValueError, OSError, LookupError, ImportError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("permdistill"):
            sys.exit(f"permdistill: this needs the package {error.name}: pip install 'permdistill[all]'")
        known = {
            "MissingScores",
            "MissingPredictions",
            "MissingRay",
            "EndpointError",
        }  # by name: their modules need not be loaded
        if not isinstance(error, (ValueError, OSError)) and type(error).__name__ not in known:
            raise
        sys.exit(printable(f"permdistill: {error}"))


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from ``least`` on."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: give at least {least}")
        return int(text)

    return number


def real(least: float = 0.0, most: float = math.inf) -> Callable[[str], float]:
    """The type of an option that takes finite numbers from ``least`` to ``most``."""

    def number(text: str) -> float:
        if not (math.isfinite(value := float(text)) and least <= value <= most):
            limit = "" if math.isinf(most) else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"{text}: give a finite number, at least {least:g}{limit}")
        return value

    return number


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
        command.add_argument("--workers", type=whole(0), default=0, help=text)
        command.add_argument("--worker-cpus", type=real(), default=1, help="of each worker: its threads (%(default)s)")
        command.add_argument("--worker-gpus", type=real(), help="of each worker (default: 1 where the cluster has some)")
    else:
        command.add_argument("--n", type=whole(1), default=8, help="questions per template (%(default)s)")
        text = "of the sample (default: another one each time)"
        command.add_argument("--seed", type=whole(0), default=randbelow(2**32), help=text)


ADAPTIVE = "adaptive"


def add_orders(
    command: argparse.ArgumentParser, default: str | None = "all", also: Sequence[str] = (), text: str = ""
) -> None:
    """Options of which orders are asked. ``also``: further names, explained by ``text``."""

    def named(name: str) -> str:
        try:
            if name not in (ADAPTIVE, *also):
                order_set(name, 2)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return name

    text += "all: K!, up to 6 options; cyclic: K; williams: K or 2K; pairs: an order and its reverse; adaptive: few, "
    text += "more where the answer is unsure; N: so many random ones, the same for all questions of K options"
    names = "|".join([*also, *SETS, ADAPTIVE, "N"])
    command.add_argument("--orders", type=named, default=default, metavar=names, help=text)
    text = "adaptive: calls of a question, on average (default: 2.6, of two options 1.5)"
    command.add_argument("--calls", type=real(), help=text)
    text = "questions with an option that refers to others (all of the above): anchor lets it keep its place (%(default)s)"
    command.add_argument("--unsafe", choices=UNSAFE, default="keep", help=text)


def add_map(command: argparse.ArgumentParser) -> None:
    """Which columns the questions' fields stand in."""

    def mapped(text: str) -> dict[str, str]:
        try:
            return columns(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    text = "columns of --questions: question=ctx,options=endings,answer=label (default: id, context, question, options "
    text += f"and answer; the layouts of {', '.join(LAYOUTS)} are known)"
    command.add_argument("--map", type=mapped, metavar="FIELD=COLUMN,..", help=text)


def treated(questions: Sequence[Question], how: str) -> list[Question]:
    """Without the unsafe ones for ``how`` = "drop"; says on stderr how many there are. Raises ValueError if none is left."""
    done = treat_unsafe(questions, how)
    if done.unsafe:
        first = next(q.id for q in questions if unsafe_options(q))
        what = {
            "keep": "kept, though no answer is the same in every order; see --unsafe drop and anchor",
            "drop": "dropped",
            "anchor": "these options keep their places",
        }
        text = f"{done.unsafe} of {len(questions)} questions have options that refer to others or to their place (first: "
        print(f"permdistill: {text}{first!r}): {what[how]}", file=sys.stderr)
    if questions and not done.questions:
        raise ValueError("all questions are permutation-unsafe: none is left, see --unsafe anchor")
    return done.questions


def orders_of(name: str, unsafe: str) -> Callable[[Question], np.ndarray]:
    """The orders (order, K) of a question; options that refer to others keep their places where ``unsafe`` = "anchor".
    Raises ValueError for adaptive orders of these."""
    if name == ADAPTIVE:
        raise ValueError("--orders adaptive does not go with --unsafe anchor: drop these questions, or give other orders")
    return lambda q: order_set(name, len(q.options), unsafe_options(q) if unsafe == "anchor" else ())


def adaptive_orders(
    questions: Sequence[Question],
    answered: Callable[[Sequence[Question], np.ndarray], np.ndarray],
    calls: float | None = None,
    hard: bool = False,
) -> Callable[[Question], np.ndarray]:
    """Ask more orders of the questions that are least sure (:func:`permdistill.fewcalls.ask_adaptively`), those of each K
    for themselves: the orders (order, K) in which each question was asked.

    answered  (questions of one K, orders) -> P (item, order, option)
    calls     of a question, on average; ``hard``: P are decisions, see :func:`permdistill.fewcalls.adaptive_plan`
    """
    from permdistill import fewcalls

    by_k: dict[int, list[Question]] = {}
    for question in questions:
        by_k.setdefault(len(question.options), []).append(question)
    chosen: dict[Question, np.ndarray] = {}
    for k, own in by_k.items():
        designs, n = fewcalls.adaptive_plan(k, calls, hard)

        def ask(places: np.ndarray, design: np.ndarray, own: list[Question] = own) -> np.ndarray:
            return answered([own[place] for place in places], design)

        last = fewcalls.ask_adaptively(ask, len(own), designs, n, calibrate=not hard)
        chosen |= {question: designs[number] for question, number in zip(own, last, strict=True)}
    return chosen.__getitem__


def write_records(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Records as JSONL, as ``permdistill measure`` reads them."""
    with replacing(Path(path)) as part, part.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


class _Scoring:
    """A teacher, loaded when there is something to score, and its store."""

    def __init__(self, teacher: str, args: argparse.Namespace):
        import torch

        from permdistill import scores, teachers

        self.args, self.settings, dtype = args, prompting(args), getattr(torch, args.dtype)
        self.store = scores.Store(Path(args.scores) / short(teacher))
        self.key = teachers.model_key(teacher, dtype, **self.settings)
        self.make = partial(_made, teacher, dtype, self.settings, getattr(args, "min_label_mass", 0.0))
        self.loaded: Any = None

    def fill(self, questions: Sequence[Question], template: Any, orders: Any) -> int:
        """Score what the store lacks; gives the number of questions for which it lacked something."""
        import torch

        from permdistill import scaleout, scores

        if not scores.lacking(self.store, questions, template, self.key, orders):
            return 0
        args = self.args
        if args.workers:
            self.loaded = scaleout.Workers(self.make, self.key, args.workers, args.worker_cpus, args.worker_gpus)
            return scaleout.score(self.store, self.loaded, questions, template, orders)
        if self.loaded is None:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # the teacher before is gone
            self.loaded = self.make()
            if plan := getattr(self.loaded, "plan", ""):  # also where no progress is shown
                print(f"permdistill: {self.loaded.name}: {plan}", file=sys.stderr)
        return scores.score(self.store, self.loaded, questions, template, orders)

    def adaptively(self, questions: Sequence[Question], template: Any) -> tuple[int, Callable[[Question], np.ndarray]]:
        """The same in adaptive orders, and these orders."""
        from permdistill import scores

        done: set[str] = set()

        def answered(some: Sequence[Question], design: np.ndarray) -> np.ndarray:
            groups = scores.lacking(self.store, some, template, self.key, design)
            done.update(asked.question.id for group in groups for asked in group)
            self.fill(some, template, design)
            return scores.probabilities(scores.load(self.store, some, template, self.key, design))

        orders = adaptive_orders(questions, answered, self.args.calls)
        return len(done), orders

    def records(self, questions: Sequence[Question], template: Any, orders: Any) -> Iterator[dict[str, Any]]:
        """A record of each question in each order: id, order, log_probs by position."""
        from permdistill import scores

        for question in questions:
            (values,) = scores.load_each(self.store, [question], template, self.key, orders)
            for order, own in zip(orders(question).tolist(), values, strict=True):
                yield {"id": question.id, "order": order, "log_probs": own[order].tolist()}


def json_object(text: str) -> dict:
    """For options that take one. Raises ValueError for anything else."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{text} is no JSON object")
    return value


def add_prompting(command: argparse.ArgumentParser, tried: bool) -> None:
    """Options of how a teacher is prompted and read; ``tried``: on a few questions first."""
    text = "JSON object, goes to the chat template and into the scores' key: '{\"enable_thinking\": false}'"
    command.add_argument("--template-args", type=json_object, default={}, metavar="JSON", help=text)
    text = 'sum the forms of a label ("A", " A", "(A", "a"); part of the scores\' key'
    command.add_argument("--variants", action="store_true", help=text)
    if tried:
        text = "before scoring, stop where labels get less of the probability on a few questions; 0: never (%(default)s)"
        command.add_argument("--min-label-mass", type=real(0, 1), default=LEAST_MASS, metavar="SHARE", help=text)


def prompting(args: argparse.Namespace) -> dict[str, Any]:
    """What is set of :func:`add_prompting`, as keyword arguments; the label mass that is wanted is none of them."""
    return {name: value for name in ("template_args", "variants") if (value := getattr(args, name, None))}


def suited(teacher: str, jobs: Jobs) -> Jobs:
    """The jobs with template "plain" in the place of "letters" if the teacher has no chat template, which is then said."""
    from permdistill import teachers

    if "letters" not in jobs or teachers.has_chat_template(teacher):
        return jobs
    print(f"{short(teacher)} has no chat template: template plain instead of letters")
    return {"plain" if template == "letters" else template: questions for template, questions in jobs.items()}


def _made(teacher: str, dtype: Any, settings: Mapping[str, Any], least_mass: float) -> Any:
    from permdistill import teachers

    made = teachers.load_teacher(teacher, dtype, **settings)
    made.least_mass = least_mass
    return made


def _say_mass(mass: Any, named: str) -> None:
    low = len(mass) and mass.mean() < LOW_MASS
    fix = ": the model wants to say something else; try another --template, --template-args or --variants" if low else ""
    if len(mass):
        print(f"{named}: label mass {mass.mean():.2f}{fix}")


def score(teacher: str, jobs: Jobs, args: argparse.Namespace) -> None:
    """Score with a teacher what its store lacks, a template after the other. ``args``: see :func:`add_scoring`, and perhaps
    :func:`add_orders` and :func:`add_prompting`."""
    from permdistill import scores
    from permdistill.prompts import TEMPLATES

    run, name, unsaid, records, used = _Scoring(teacher, args), short(teacher), [], [], []
    wanted, unsafe = getattr(args, "orders", "all"), getattr(args, "unsafe", "keep")
    for template, questions in jobs.items():
        if wanted == ADAPTIVE and unsafe != "anchor":
            done, orders = run.adaptively(questions, TEMPLATES[template])
        else:
            orders = orders_of(wanted, unsafe)
            done = run.fill(questions, TEMPLATES[template], orders)
        used.append(orders)
        records.append(run.records(questions, TEMPLATES[template], orders))
        unsaid.append(f"{name}, template {template}: {done} questions scored now, {len(questions) - done} were in the store")
        if wanted == ADAPTIVE:
            n = sum(len(orders(question)) for question in questions)
            unsaid.append(f"{n} orders of {len(questions)} questions: {n / len(questions):.2f} calls a question")
        if run.loaded is not None:
            print("\n".join(unsaid))
            unsaid = []
    if run.loaded is None:
        print(f"{name}: all {sum(map(len, jobs.values()))} questions were in the store")
    else:
        run.store.compact()
    for (template, questions), orders in zip(jobs.items(), used, strict=True):
        _say_mass(
            scores.label_mass(run.store, questions, TEMPLATES[template], run.key, orders), f"{name}, template {template}"
        )
    if getattr(args, "records", None):
        write_records(args.records, (record for part in records for record in part))


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

    settings = prompting(args)
    stored = teachers.model_key(teacher, getattr(torch, args.dtype), **settings)
    store, failed = scores.Store(Path(args.scores) / short(teacher)), False
    wanted, unsafe = getattr(args, "orders", "all"), getattr(args, "unsafe", "keep")
    orders = {
        template: _stored_orders(store, TEMPLATES[template], stored) if wanted == ADAPTIVE else orders_of(wanted, unsafe)
        for template in samples
    }
    for template, questions in samples.items():
        scores.load_each(store, questions, TEMPLATES[template], stored, orders[template])
    # Rounding apart, any number format must agree.
    loaded = teachers.load_teacher(teacher, teachers.fast_dtype(), **settings)
    for template, questions in samples.items():
        tv = scores.audit(store, loaded, questions, TEMPLATES[template], stored, orders[template])
        bad = not scores.audit_passes(tv, AUDIT_MEAN_TV, AUDIT_MAX_TV)
        failed |= bad
        print(
            f"audit {loaded.name}, template {template}: {len(questions)} questions re-scored (seed {args.seed}), "
            f"TV mean {tv.mean():.4f} (at most {AUDIT_MEAN_TV}), max {tv.max():.4f} (at most {AUDIT_MAX_TV}): "
            f"{'FAILED' if bad else 'ok'}"
        )
    if failed:
        sys.exit("the stored scores are not what this machine computes: rerun with live scores, and report it")


def _stored_orders(store: Any, template: Any, key: str) -> Callable[[Question], np.ndarray]:
    """How far adaptive scoring went with a question: the largest of its sets of orders in the store, or the first."""
    from permdistill import fewcalls, scores

    def found(question: Question) -> np.ndarray:
        designs = fewcalls.stages(len(question.options))
        held = [design for design in designs if not scores.lacking(store, [question], template, key, design)]
        return (held or designs[:1])[-1]

    return found
