"""Labelling by several workers, on this machine or on a cluster: a Ray Data job that fills the same store as one process.

    make = partial(load_teacher, "qwen2.5-coder-1.5b")
    score(store, Workers(make, model_key("qwen2.5-coder-1.5b"), 4), questions, TEMPLATES["letters"])

Each worker is an actor that holds a teacher; a block of the data set is a few groups of questions that share their context.
Ray hands out blocks, starts workers as the cluster grows, and gives a block to another worker when its own was killed or its
machine taken away. The store has one writer, the process that called :func:`score`: whatever a worker made of a block is on
disk as soon as it arrives. So

* the store needs no file system that the workers see, and no lock between them;
* a worker that dies takes the block in work with it, the writer what was in work or under way to it, a few blocks;
* a block that was done twice, because its worker died after the work, is stored once: rows are found by content;
* a rerun hands out what is missing only, and starts nothing when nothing is.

A cluster's machines need permdistill[scale] and reach the teacher by the same name. Which cluster: Ray's own RAY_ADDRESS.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from tqdm import tqdm

from permdistill.prompts import Template
from permdistill.questions import Question
from permdistill.scores import Orders, Store, alone, keep, lacking
from permdistill.teachers import Asked, Teacher, in_groups

# Questions that a worker is given at a time, on average, or one group: its forest, and the work that is lost with it.
BLOCK, BLOCK_GPU = 8, 64
BLOCKS_A_WORKER = 8  # at least, as long as there are groups: else all would wait for the last one
COLUMNS = ("place", "log_probs", "refusal", "plan")  # of what a worker hands back
LOST_STARTS = 20  # so many workers in a row were lost before they were ready: something else than preemption


@dataclass(frozen=True)
class Workers:
    """Up to ``n`` workers. Raises ValueError unless there is at least one, with something to work on.

    make_teacher  called once by each worker; it must survive pickling
    model_key     the teacher's, which is not made here; a worker whose teacher has another one stops the run
    cpus, gpus    of each worker; torch gets ``cpus`` threads. gpus=None: 1 on a cluster that has some
    """

    make_teacher: Callable[[], Teacher]
    model_key: str
    n: int
    cpus: float = 1
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.n < 1 or self.cpus <= 0 or (self.gpus or 0) < 0:
            found = f"workers {self.n}, cpus {self.cpus}, gpus {self.gpus}"
            raise ValueError(f"{found}: give at least 1 worker, and what it takes above 0")


def score(store: Store, workers: Workers, questions: Sequence[Question], template: Template, orders: Orders = "all") -> int:
    """:func:`permdistill.scores.score` by several workers. Returns the number of questions scored now.

    The same store up to rounding, which depends on the questions of a forest, on threads and on processors. Raises
    ValueError before any compute when a question does not suit template or teacher, MissingRay without Ray.
    """
    with alone(store):
        groups = lacking(store, questions, template, workers.model_key, orders)
        missing = sum(map(len, groups))
        if not groups:
            return 0
        paid = len(questions) - missing
        with tqdm(total=len(questions), initial=paid, unit="question", desc=f"score, {workers.n} workers") as bar:
            # Closed here, so that Ray ends with this function also when a score is refused.
            with closing(_scored(groups, workers, template)) as scored:
                for group, log_probs in scored:
                    keep(store, group, log_probs, template, workers.model_key)
                    bar.update(len(group))
    return missing


def _scored(
    groups: list[list[Asked]], workers: Workers, template: Template
) -> Generator[tuple[list[Asked], list[np.ndarray]], None, None]:
    """Groups with their log-probabilities (order, option), each once, in the order in which they are done."""
    ray = _ray()
    with _running(ray, workers.n * workers.cpus):
        gpus = min(1, ray.cluster_resources().get("GPU", 0)) if workers.gpus is None else workers.gpus
        per_block = BLOCK_GPU if gpus else BLOCK
        size = max(1, min(per_block * len(groups) // sum(map(len, groups)), len(groups) // (BLOCKS_A_WORKER * workers.n)))
        blocks = ray.data.range(len(groups), override_num_blocks=-(-len(groups) // size)).map_batches(
            Worker,
            batch_size=None,  # a block at a time
            fn_constructor_args=(groups, workers.make_teacher, workers.model_key, template),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers.n, initial_size=workers.n),
            num_cpus=workers.cpus,
            num_gpus=gpus,
        )
        done: set[int] = set()
        said: set[str] = {""}
        for block in blocks.iter_batches(batch_size=None, prefetch_batches=0):
            for place, values, refusal, plan in zip(*(block[name] for name in COLUMNS), strict=True):
                if refusal:
                    raise ValueError(refusal)
                if plan not in said:
                    said.add(plan)
                    print(f"permdistill: a worker takes {plan}", file=sys.stderr)
                if place not in done:  # Ray promises "at least once"
                    done.add(int(place))
                    group = groups[place]
                    ends = np.cumsum([asked.orders.size for asked in group])
                    each = np.split(np.frombuffer(values, dtype=np.float32), ends[:-1])
                    yield group, [own.reshape(asked.orders.shape) for own, asked in zip(each, group, strict=True)]


class Worker:
    """What an actor runs. What it cannot work without is reported in the place of scores: an exception here would count as
    a worker that was lost, and be tried again and again."""

    def __init__(self, groups: list[list[Asked]], make_teacher: Callable[[], Teacher], model_key: str, template: Template):
        self.groups, self.template, self.refusal = groups, template, ""
        try:
            self.teacher = make_teacher()
            if self.teacher.model_key != model_key:
                raise ValueError(
                    f"a worker's teacher is {self.teacher.model_key!r}, the scores are to be of {model_key!r}: "
                    "give all machines the same model"
                )
            self.teacher.check([asked.question for group in groups for asked in group], template)
        except (ValueError, OSError) as error:
            self.refusal = str(error) or type(error).__name__

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Places of groups ("id") -> place, log_probs (float32 bytes, in C order), refusal ("" as a rule), and the teacher's
        plan."""
        places = block["id"].tolist()
        if self.refusal:
            return dict(zip(COLUMNS, (places[:1], [b""], [self.refusal], [""]), strict=True))
        groups = [self.groups[place] for place in places]
        found = dict(pair for done in in_groups(self.teacher, groups, self.template) for pair in done)
        each = iter(found[i] for i in range(sum(map(len, groups))))
        scored = [b"".join(np.asarray(next(each), dtype=np.float32).tobytes() for _ in group) for group in groups]
        n, plan = len(places), getattr(self.teacher, "plan", "")
        return dict(zip(COLUMNS, (places, scored, [""] * n, [plan] * n), strict=True))


class MissingRay(ImportError):
    """Ray is not installed; the message says how."""


def _ray() -> Any:
    """The ray package. Raises MissingRay."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        import ray.data
    except ImportError as error:
        raise MissingRay(f"several workers need Ray ({error}): pip install permdistill[scale]") from None
    return ray


@contextmanager
def _running(ray: Any, cpus: float) -> Iterator[None]:
    """A Ray cluster for the time of a ``with`` block: the one that this process uses already, else the one at RAY_ADDRESS,
    else one of its own on this machine, with room for ``cpus``."""
    own = not ray.is_initialized()
    if own:
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        if os.environ.get("RAY_ADDRESS", "local") == "local":
            ray.init("local", num_cpus=ceil(cpus), include_dashboard=False, **quiet)
        else:
            ray.init(**quiet)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = LOST_STARTS
    context.execution_no_progress_timeout_s = -1  # a cluster may have nothing free for hours
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        if own:
            ray.shutdown()
