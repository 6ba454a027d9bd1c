"""The steps between the store of scores and a table, for the questions that :mod:`permdistill.paper.profiles` defines.

    test = read_scores(teacher, task, "test")        a task with a teacher's scores (item, order, option)
    train = together([read_scores(...), ...])        several tasks as one: what one student learns from
    systems = baselines(test) + [distil(run, train, test, folder), ...]

A :class:`System` is whatever answers questions: the biased teacher, the debiased one, a copied decision, a student. All
of it is plain arrays and files: look at them, replace one with your own, and carry on from there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from permdistill import debias, scores
from permdistill.api.endpoint import Endpoint
from permdistill.api.jobs import Drawn, Job, calls_in_orders, drawn_calls
from permdistill.commands import suited
from permdistill.corrections import fit_stack
from permdistill.files import replacing, write_text
from permdistill.lessons import Distributions, Lesson
from permdistill.orders import all_orders, cyclic_orders, to_positions
from permdistill.paper.paths import ROOT, output_folder, tables_folder  # noqa: F401  (notebooks take them from here)
from permdistill.paper.profiles import PROMPTS, PUT_DIFFERENTLY, Pool, Profile, Run
from permdistill.paper.systems import BIASED, COPY, STACKED, STACKED_WHITE_BOX, Description
from permdistill.paper.tasks import SEED, SUMMARIES, TASKS, TaskSplit, load_task
from permdistill.prompts import LEAST_MASS, TEMPLATES
from permdistill.questions import Question, content_free, from_jsonl, unlabelled
from permdistill.sources import short
from permdistill.teachers import CausalTeacher, load_teacher, model_key
from permdistill.training import train

COMMITTED = ROOT / "scores"
Prompting = Mapping[str, Any]
PROMPTING: Prompting = {"template_args": dict, "variants": bool, "min_label_mass": (int, float)}
NONE: Prompting = {}


@dataclass(frozen=True)
class Scored:
    """A task with a teacher's scores: P (item, order, option), all K! orders or the K cyclic ones, renormalised over the
    options.

    content_free  (position,) what the teacher answers to the task's prompt without content, for contextual calibration
    label_mass    what the K labels got of the whole probability, mean over items and orders; NaN where that is not known
    """

    teacher: str
    task: TaskSplit
    P: np.ndarray
    content_free: np.ndarray | None = None
    label_mass: float = np.nan

    @property
    def orders(self) -> np.ndarray:
        """Those of P, (order, K)."""
        every = all_orders(self.task.k)
        return every if len(every) == self.P.shape[1] else cyclic_orders(self.task.k)

    def where(self, chosen: np.ndarray) -> Scored:
        """The questions at which ``chosen`` (item,) is true."""
        return replace(self, task=self.task.where(chosen), P=self.P[chosen])


def read_scores(
    teacher: str,
    task: str,
    split: str,
    folder: str = "",
    n: int | None = None,
    template: str = "",
    prompting: Prompting = NONE,
) -> Scored:
    """Scores of (the first ``n`` questions of) a task from the store ``folder``/<teacher>; "" means the committed ones.

    ``template`` names another prompt than the task's usual one; ``prompting``: see :func:`teachers_scores`. Raises
    MissingScores when the store lacks some, with the command that makes them.
    """
    orders = getattr(TASKS[task], "orders", {}).get(split, "all")
    return read_stored(teacher, load_task(task, split, template).first(n), folder, prompting, orders)


def read_pool(settings: Profile, pool: Pool, split: str, folder: str = "") -> Scored:
    """The tasks of a pool as one, with the scores of the profile's first teacher: see :func:`read_scores`."""
    n = settings.n_train if split == "train" else pool.n_test
    return together([read_scores(settings.teachers[0], task, split, folder, n) for task in pool.tasks])


def read_stored(
    teacher: str, task: TaskSplit, folder: str | Path = "", prompting: Prompting = NONE, orders: str = "all"
) -> Scored:
    """:func:`read_scores`, of any questions, in all orders or in "cyclic" ones."""
    own = {name: value for name, value in prompting.items() if name != "min_label_mass"}
    store, key = _store(Path(folder or COMMITTED) / short(teacher)), model_key(teacher, **own)
    log_probs = scores.load(store, task.unlabelled, task.template, key, orders)
    read = Scored(short(teacher), task, scores.probabilities(log_probs))
    read = replace(read, label_mass=float(np.exp(log_probs.astype(np.float64)).sum(axis=-1).mean()))
    try:
        free = scores.probabilities(scores.load(store, content_free(task.questions), task.template, key))
    except scores.MissingScores:  # only contextual calibration needs them, and it says so
        return read
    return replace(read, content_free=to_positions(free, all_orders(task.k)).mean(axis=(0, 1)))


def teachers_scores(
    settings: Profile, folder: Path, committed: str = "", teacher: str = "", questions: str = "", prompting: Prompting = NONE
) -> list[Scored]:
    """Every teacher of a profile on its test tasks, or your own LLM, or your own questions.

    committed   folder of the stores to look into first, see :func:`read_scores`
    teacher     instead of the profile's: a name, a folder with a checkpoint, a hub repository
    questions   instead of the profile's tasks: a JSONL file (:func:`permdistill.questions.from_jsonl`), for the profile's
                first teacher unless ``teacher`` is given; each number of options is a task of its own
    prompting   of your own: what `permdistill score` has options for, {"template_args": {"enable_thinking": False},
                "variants": True, "min_label_mass": 0}

    What ``committed`` lacks of your own is scored live, with progress, into ``folder``/scores, and found there next time.
    Raises ValueError for a ``prompting`` that there is not, or that has nothing of your own to go with.
    """
    own = bool(teacher or questions)
    if wrong := [name for name, value in prompting.items() if not isinstance(value, PROMPTING.get(name, ()))]:
        raise ValueError(f"prompting has {wrong[0]} = {prompting[wrong[0]]!r}: give template_args, variants, min_label_mass")
    if prompting and not own:
        raise ValueError("prompting goes with a teacher or questions of your own: give one of them")
    result = []
    for name in [teacher] if teacher else settings.teachers[: 1 if questions else None]:
        n = {t: settings.n_test if own else settings.n_questions(name, t) for t in settings.tasks}
        for task in own_tasks(questions) if questions else [load_task(t, "test").first(n[t]) for t in n if n[t]]:
            result.append(scored(name, task, folder, committed, prompting) if own else read_stored(name, task, committed))
    return result


def scored(teacher: str, task: TaskSplit, folder: Path, committed: str = "", prompting: Prompting = NONE) -> Scored:
    """A task with a teacher's scores: those of the stores in ``committed`` ("" for the committed ones), or else scored live,
    with progress, into ``folder``/scores. ``prompting``: see :func:`teachers_scores`."""
    try:
        return read_stored(teacher, task, committed, prompting)
    except scores.MissingScores:
        (template,) = suited(teacher, {task.template.name: task.questions})
        if template != task.template.name:
            plain = replace(task, template=TEMPLATES[template])
            try:
                return read_stored(teacher, plain, committed, prompting)
            except scores.MissingScores:
                return scored(teacher, plain, folder, str(folder / "scores"), prompting)
        texts, live = unlabelled(task.questions) + content_free(task.questions), _live(teacher, json.dumps(prompting))
        scores.score(_store(folder / "scores" / short(teacher)), live, texts, task.template)
        return read_stored(teacher, task, folder / "scores", prompting)


@lru_cache(maxsize=1)
def _live(name: str, prompting: str) -> CausalTeacher:
    settings = json.loads(prompting)
    least = settings.pop("min_label_mass", LEAST_MASS)  # as `permdistill score` has it: a model that thinks first is refused
    teacher = load_teacher(name, **settings)
    teacher.least_mass = least
    return teacher


def example_questions(folder: Path, n: int = 32) -> str:
    """Write the first ``n`` training questions of ARC-Easy as JSONL into ``folder``, to stand in for your own; its path."""
    path = folder / "example_questions.jsonl"
    lines = [json.dumps(asdict(question), ensure_ascii=False) for question in load_task("arc_easy", "train").questions[:n]]
    write_text(path, "\n".join(lines) + "\n")
    return str(path)


def split(scored: Scored, share: float = 0.75, seed: int = SEED) -> tuple[Scored, Scored]:
    """A random ``share`` of the items to train on, and the rest to test on; items of one group stay together.

    Raises ValueError when one side would be empty.
    """
    inside = drawn(scored.task, share, seed)
    return scored.where(inside), scored.where(~inside)


def split_task(task: TaskSplit, share: float, seed: int = SEED) -> tuple[TaskSplit, TaskSplit]:
    """:func:`split` of questions that nobody has answered yet."""
    inside = drawn(task, share, seed)
    return replace(task.where(inside), name=f"{task.name}, train"), replace(task.where(~inside), name=f"{task.name}, test")


def drawn(task: TaskSplit, share: float, seed: int = SEED) -> np.ndarray:
    """Which items belong to a random ``share`` of the groups, (item,)."""
    groups = list(dict.fromkeys(task.groups))
    cut = round(share * len(groups))
    if not 0 < cut < len(groups):
        raise ValueError(f"share = {share} of {len(groups)} groups leaves nothing on one side: give more questions")
    chosen = {groups[i] for i in np.random.default_rng(seed).permutation(len(groups))[:cut]}
    return np.array([group in chosen for group in task.groups])


def in_several_prompts(teacher: str, settings: Profile, folder: str = "") -> list[list[Scored]]:
    """For each task of :data:`permdistill.paper.profiles.PUT_DIFFERENTLY`: the same test questions in each template."""
    return [
        [read_scores(teacher, task, "test", folder, n, template) for template in PROMPTS[kind]]
        for (kind, tasks), n in zip(PUT_DIFFERENTLY.items(), settings.n_prompts, strict=True)
        for task in tasks
    ]


def kinds(scored: Sequence[Scored]) -> dict[str, list[str]]:
    """Tasks by kind: {title: names}, SummEval's pairs apart from questions with as many options."""
    result: dict[str, list[str]] = {}
    for s in scored:
        title = f"{SUMMARIES}, K = 2" if s.task.family == SUMMARIES else f"multiple choice, K = {s.task.k}"
        result.setdefault(title, []).append(s.task.name)
    return result


def own_tasks(path: str) -> list[TaskSplit]:
    """The questions of a JSONL file (:func:`permdistill.questions.from_jsonl`), a task for each number of options."""
    by_k: dict[int, list[Question]] = {}
    for question in from_jsonl(path):
        by_k.setdefault(len(question.options), []).append(question)
    stem = Path(path).stem
    names = {k: stem if len(by_k) == 1 else f"{stem}, K = {k}" for k in by_k}
    return [TaskSplit(names[k], part, TEMPLATES["letters"], [names[k]] * len(part), {}) for k, part in sorted(by_k.items())]


@lru_cache(maxsize=4)
def _open(folder: Path, state: tuple[tuple[str, int], ...]) -> scores.Store:
    return scores.Store(folder)


def _store(folder: Path) -> scores.Store:
    """The store in ``folder``, read once as long as its files do not change."""
    return _open(folder, tuple(sorted((f.name, f.stat().st_mtime_ns) for f in folder.glob("*.parquet"))))


def together(parts: Sequence[Scored]) -> Scored:
    """Several tasks of one teacher, template and K as one task "all"."""
    task = TaskSplit(
        name="all",
        questions=[q for s in parts for q in s.task.questions],
        template=parts[0].task.template,
        members=[m for s in parts for m in s.task.members],
        left_out={},
    )
    return Scored(parts[0].teacher, task, np.concatenate([s.P for s in parts]))


def by_k(parts: Sequence[Scored]) -> list[Scored]:
    """:func:`together`, for each number of options."""
    return [together([s for s in parts if s.task.k == k]) for k in sorted({s.task.k for s in parts})]


@dataclass(frozen=True)
class System:
    """Something that answers questions in several orders.

    what        what it is, see :class:`permdistill.paper.systems.Description`
    P           (item, order, option) probabilities
    orders      (order, K)
    parameters  number of parameters that answer one question besides, None where not known
    """

    what: Description
    P: np.ndarray
    orders: np.ndarray
    parameters: int | None = None


def in_cyclic_orders(P: np.ndarray) -> np.ndarray:
    """Scores over all K! orders (item, order, option) -> over the K cyclic ones, in the order of cyclic_orders."""
    every = all_orders(P.shape[2]).tolist()
    return P[:, [every.index(order) for order in cyclic_orders(P.shape[2]).tolist()]]


def black_box_decisions(test: Scored, greedy: bool = False) -> np.ndarray:
    """The teacher's one decision for each item and cyclic order, (item, order), as error correction sees it: sampled, or
    (``greedy``) the most probable one, a tie being broken at random."""
    P = in_cyclic_orders(test.P)
    return debias.sampled_decisions(debias.decide(P) if greedy else P, np.random.default_rng(SEED))


def baselines(test: Scored) -> list[System]:
    """The biased teacher, its average over all orders, and copying its one sampled decision.

    They answer in the K cyclic orders, in which each option stands once at each position; so do the students, so that
    differences between systems are not differences between orders.
    """
    k = test.P.shape[2]
    averaged = debias.broadcast(debias.permutation_average(test.P), k)
    copied = debias.one_hot(black_box_decisions(test), k)
    return [
        System(Description("teacher", BIASED, 1), in_cyclic_orders(test.P), cyclic_orders(k)),
        System(Description("debiased", debias.DEBIASED, len(test.orders)), averaged, cyclic_orders(k)),
        System(Description("copy", COPY, 1, greedy=False), copied, cyclic_orders(k)),
    ]


def stacked(test: Scored, student: System, n: int = 100) -> list[System]:
    """Error correction without training anew: the answers of a student that sees none of the teacher's, stacked with the
    teacher's one decision (its most probable one, or a sampled one), and with its one answer in probabilities
    (:func:`permdistill.corrections.fit_stack`).

    Half of the questions are answered by what is fitted on (up to) ``n`` random ones of the other half, which cost K! calls
    each: their all-orders averages are the goal. No gold answer is read.
    """
    orders, P, Q = cyclic_orders(test.task.k), in_cyclic_orders(test.P), debias.permutation_average(test.P)
    first = drawn(test.task, 0.5)
    random = np.random.default_rng(SEED).permutation(len(Q))
    most_probable, sampled = (debias.one_hot(black_box_decisions(test, greedy), test.task.k) for greedy in (True, False))
    result = []
    for method, greedy, said in (
        (STACKED, True, most_probable),
        (STACKED, False, sampled),
        (STACKED_WHITE_BOX, False, P),
    ):
        answers = np.empty_like(P)
        for half in (first, ~first):
            others = [i for i in random if not half[i]][:n]
            stack = fit_stack(student.P[others], said[others], orders, Q[others])
            answers[half] = stack.answer(student.P[half], said[half], orders)
        result.append(
            System(replace(student.what, method=method, calls=1, greedy=greedy), answers, orders, student.parameters)
        )
    return result


def lessons_of(run: Run, train_on: Scored | Sequence[Scored]) -> list[Lesson]:
    """:func:`lesson_of` each part: one, or several of different numbers of options for a student with k = 0."""
    parts = [train_on] if isinstance(train_on, Scored) else train_on
    if run.n_train and len(parts) > 1:
        raise ValueError(f"n_train = {run.n_train}: questions of {len(parts)} numbers of options are learnt whole, give 0")
    return [lesson_of(run, part) for part in parts]


def lesson_of(run: Run, train_on: Scored) -> Lesson:
    """What the student of ``run`` learns from. No gold answer enters: the questions are stripped of theirs."""
    questions, P, orders = train_on.task.unlabelled, train_on.P, train_on.orders
    if run.n_train > len(P):
        raise ValueError(f"n_train = {run.n_train}: there are {len(P)} training questions, give no more")
    if run.n_train:
        chosen = np.random.default_rng(SEED).permutation(len(P))[: run.n_train]
        questions, P = [questions[i] for i in chosen], P[chosen]
    if run.draws:
        Q = debias.black_box_targets(P, run.draws, np.random.default_rng((SEED, run.training.seed)))
    else:
        Q = debias.permutation_average(P)
    targets, shown = debias.sharpen(Q, run.power), slice(None) if run.orders == "all" else slice(1)
    if run.student.inputs == "plain":
        return Lesson(questions, targets, orders=all_orders(train_on.task.k)[shown])
    said = debias.decide(P) if run.greedy and run.student.inputs == "prediction" else P
    return Lesson(questions, targets, Distributions(said[:, shown], orders[shown]))


def test_inputs(run: Run, test: Scored) -> dict[str, Any]:
    """What :meth:`permdistill.students.Student.predict_batch` takes as questions, orders, decisions and distributions: the
    test questions without gold answers, in the cyclic orders, with what the teacher said where the student sees it."""
    return {
        "questions": test.task.unlabelled,
        "orders": cyclic_orders(test.task.k),
        "decisions": black_box_decisions(test, run.greedy) if run.student.inputs == "prediction" else None,
        "distributions": in_cyclic_orders(test.P) if run.student.inputs == "distribution" else None,
    }


def distil(run: Run, train_on: Scored, test: Scored, folder: Path) -> System:
    """Train the student of ``run`` on the debiased teacher, or load it if it is there, and let it answer the test questions.

    Writes ``folder``/students/<run.name> (an ordinary transformers checkpoint) and ``folder``/predictions/<run.name>.parquet
    (id, order, probabilities by option). No gold answer enters: both sets of questions are stripped of theirs.
    """
    student = train(run.student, run.training, lesson_of(run, train_on), folder / "students" / run.name)
    P = student.predict_batch(**test_inputs(run, test))
    parameters = sum(p.numel() for p in student.model.parameters())
    orders = cyclic_orders(test.task.k)
    save_predictions(folder / "predictions" / f"{run.name}.parquet", test, orders, P, {"parameters": parameters})
    return System(run.what, P, orders, parameters)


def save_predictions(path: Path, test: Scored, orders: np.ndarray, P: np.ndarray, about: dict[str, Any]) -> None:
    """Write P (item, order, option) over ``orders`` as parquet: id, order, probabilities (float32) by option, a row per item
    and order. ``about`` goes into the file's metadata, as JSON under "permdistill"."""
    n, m, k = P.shape
    columns = {
        "id": np.repeat([q.id for q in test.task.questions], m).tolist(),
        "order": np.tile(orders, (n, 1)).astype(np.int8).tolist(),
        "probabilities": P.reshape(-1, k).astype(np.float32).tolist(),
    }
    types = {"id": pa.string(), "order": pa.list_(pa.int8()), "probabilities": pa.list_(pa.float32())}
    schema = pa.schema(types, metadata={"permdistill": json.dumps(about)})
    with replacing(path) as part:
        pq.write_table(pa.table(columns, schema=schema), part, compression="zstd", write_page_checksum=True)


def read_predictions(path: Path) -> tuple[list[str], np.ndarray, np.ndarray, dict[str, Any]]:
    """What :func:`save_predictions` wrote: ids, orders (order, K), P (item, order, option), about. Raises ValueError for a
    file that is damaged, or holds values that are not finite; the first ones were written without checksums."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        ids = table["id"].unique().to_pylist()
        m = len(table) // len(ids)
        orders = np.array(table["order"][:m].to_pylist())
        flat = pa.concat_arrays(table["probabilities"].chunks).flatten()  # a list of lists would take ten times as long
        P = flat.to_numpy(zero_copy_only=False).astype(np.float64).reshape(len(ids), m, -1)
        if not np.isfinite(P).all():
            raise ValueError("probabilities are not finite")
        return ids, orders, P, json.loads(table.schema.metadata[b"permdistill"])
    except (FileNotFoundError, PermissionError):
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, OSError, pa.ArrowException) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged ({why}): restore it, or delete it and run `make students`") from None


# --------------------------------------------------------------------------------------------------------------------
# Teachers that only an API reaches


def labelling(endpoint: Endpoint, task: TaskSplit, draws: int, mode: str = "decisions") -> Job:
    """The calls that label training questions: ``draws`` decisions each, every one in an order drawn for itself. ``mode``:
    decisions, or answer (:class:`permdistill.api.jobs.Job`)."""
    return Job(endpoint, task.template, drawn_calls(unlabelled(task.questions), draws), mode)


def one_call(endpoint: Endpoint, task: TaskSplit, mode: str = "decisions") -> Job:
    """What answering costs: one decision a question, in the order in which its options come. ``mode``: as there."""
    return Job(endpoint, task.template, calls_in_orders(unlabelled(task.questions), np.arange(task.k)[None]), mode)


def answered(task: TaskSplit, said: Drawn) -> tuple[TaskSplit, Drawn]:
    """Without the questions that have no decision at all, which are counted in ``left_out``."""
    some = said.counts.sum(axis=1) > 0
    left_out = task.left_out | ({"without any decision": int((~some).sum())} if not some.all() else {})
    return replace(task.where(some), left_out=left_out), Drawn(said.orders[some], said.decisions[some])


def white_box(teacher: str, task: TaskSplit, folder: Path, committed: str = "") -> np.ndarray | None:
    """:func:`scored` probabilities (item, order, option) to compare a black box with; None for ``teacher`` "", which is how
    :class:`permdistill.api.server.Server` calls a model that is not here."""
    return scored(teacher, task, folder, committed).P if teacher else None


def copied(task: TaskSplit, said: Drawn) -> System:
    """The API's decision in :func:`one_call`, taken as it is."""
    return System(Description("copy", COPY, 1), debias.one_hot(said.decisions, task.k), np.arange(task.k)[None])


def distil_decisions(run: Run, task: TaskSplit, said: Drawn, test: TaskSplit, one: Drawn, folder: Path) -> System:
    """Train the student of ``run`` on decisions alone, and let it answer as :func:`one_call` asks.

    task, said  training questions, and the decisions on them (:func:`labelling`): the histogram is the target, and error
                correction sees one of them at a time, in the order in which it was made
    test, one   test questions, and the one decision on each; only error correction reads it

    Writes ``folder``/students/<run.name>. No gold answer enters.
    """
    correcting = run.student.inputs == "prediction"
    targets = debias.sharpen(said.targets(), run.power)
    lesson = Lesson(unlabelled(task.questions), targets, said if correcting else None)
    student = train(run.student, run.training, lesson, folder / "students" / run.name)
    orders = np.arange(task.k)[None]
    P = student.predict_batch(unlabelled(test.questions), orders, one.decisions if correcting else None)
    return System(run.what, P, orders, sum(p.numel() for p in student.model.parameters()))
