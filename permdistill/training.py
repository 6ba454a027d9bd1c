"""Training a student: minimise KL(debiased teacher || student) on questions without gold answers. A short explicit loop.

Every epoch shows each question once, in a new uniformly random order; for error correction one decision is drawn from the
teacher's probabilities in that order, or the student sees the probabilities themselves. All randomness is derived from
(seed, epoch) and (seed, step), so a run that was killed goes on from its checkpoint to the same weights, and a finished
one is loaded instead of repeated. Several processes may share the work (:func:`lead`): each takes a part of every batch.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from permdistill.configs import StudentConfig, TrainingConfig
from permdistill.corrections import fit_correction, fit_scale
from permdistill.engine import ranks
from permdistill.files import locked, replacing, seal, sealed, write_text
from permdistill.heads import Row
from permdistill.lessons import Distributions, Lesson
from permdistill.orders import to_positions
from permdistill.questions import Question
from permdistill.students import Student, build, encoder_key, mixed_precision

RECIPE = 1  # raise it when the code would train other weights from the same arguments: finished students are then void
SAVE_SECONDS = 30.0  # at most so much training is lost to a kill, see TrainingConfig.save_every; more where one checkpoint
SAVE_SHARE = 0.02  # takes more than this share of the time
CHECKPOINT, BEST, LOG = "checkpoint.pt", "best.pt", "train.json"
_MEGA = 16  # batches within which questions are sorted by length: little padding, still random company


def kl_loss(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """KL(target || student), mean over items, in nats: mean_i sum_o t_io (log t_io - log p_io), with 0 log 0 = 0.

    Both (item, K), with the same meaning of the last axis. Source: arXiv 2403.13590.
    """
    return torch.nn.functional.kl_div(log_probs, targets, reduction="batchmean")


def rate(step: int, total: int, warmup: float) -> float:
    """Share of the maximal learning rate in ``step`` = 0..total-1: linear rise over the share ``warmup``, linear fall."""
    rise = int(np.ceil(warmup * total))
    return (step + 1) / (rise + 1) if step < rise else (total - step) / (total - rise)


def batches(groups: Sequence[Hashable], lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """A random partition of the questions 0..n-1 into batches; questions of one group stay together as far as they fit."""
    members: dict[Hashable, list[int]] = {}
    for i in rng.permutation(len(groups)):
        members.setdefault(groups[i], []).append(int(i))
    together = list(members.values())
    units = [together[u] for u in rng.permutation(len(together))]
    before = np.cumsum([0] + [len(unit) for unit in units[:-1]])
    by_length = np.lexsort(([max(lengths[i] for i in unit) for unit in units], before // (_MEGA * batch_size)))
    flat = np.concatenate([units[u] for u in by_length])
    parts = np.split(flat, range(batch_size, len(flat), batch_size))
    return [parts[b] for b in rng.permutation(len(parts))]


def pieces(batch: np.ndarray, index: np.ndarray, lengths: np.ndarray, micro_tokens: int) -> Iterator[list[int]]:
    """Split a batch so that the different sequences of a piece, padded, have at most ``micro_tokens`` tokens (or it is one
    question). ``index`` (item, ...) names the sequences of each question, ``lengths`` (sequence,) their tokens."""
    piece: list[int] = []
    used: set[int] = set()
    for i in batch:
        own = set(index[i].ravel().tolist())
        if piece and len(used | own) * max(lengths[s] for s in used | own) > micro_tokens:
            yield piece
            piece, used = [], set()
        piece.append(int(i))
        used |= own
    yield piece


def read_log(folder: str | Path) -> dict[str, Any]:
    """The log of a finished training: configs, losses (step,), seconds, questions_per_second, content key."""
    return json.loads((Path(folder) / LOG).read_text(encoding="utf-8"))


def train(
    config: StudentConfig,
    training: TrainingConfig,
    lesson: Lesson | Sequence[Lesson],
    folder: str | Path,
    autocast: bool | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Student:
    """Train a student, save it in ``folder`` with its log (:func:`read_log`), and return it. Seeds torch.

    lesson    several for a student of any number of options (k = 0): each step is on questions of one of them
    autocast  bfloat16 matrix products, see :func:`permdistill.students.mixed_precision`
    on_step   called after each step with its number (from 1) and its loss

    The same call again loads the finished student, or resumes a killed run from its last checkpoint; a call with other
    configs or data trains anew. Raises ValueError for a lesson that does not fit the config, FloatingPointError on
    divergence.
    """
    lessons = [lesson] if isinstance(lesson, Lesson) else list(lesson)
    for one in lessons:
        one.check(config)
    if not lessons or (config.k and len(lessons) > 1):
        raise ValueError(f"{len(lessons)} lessons, k = {config.k}: give one, or several for a student with k = 0")
    checkpoint = Checkpoint(Path(folder), content_key(config, training, lessons, autocast))
    with locked(checkpoint.folder / ".lock"):  # a killed make may have left a process that is still at it: wait for it
        if checkpoint.finished():
            try:
                student = Student.from_pretrained(folder)
            except ValueError as error:
                warnings.warn(f"{error}: it is trained anew", stacklevel=2)
            else:
                checkpoint.discard()
                return student
        job = partial(_train, config, training, lessons, checkpoint, autocast)
        ranks.share(job)
        return job(on_step)


def lead(program: Callable[[], None]) -> None:
    """Run a program that trains, with all processes that torchrun or accelerate launch started; without them just run it.

    Every process calls this. Rank 0 runs ``program``, the others take part in each :func:`train` in it, until it ends. The
    weights are those of one process up to rounding; with dropout they are others, as with another seed.
    """
    ranks.connect()
    if ranks.rank() == 0:
        program()
        ranks.share(None)
    else:
        while (job := ranks.share(None)) is not None:
            with suppress(FloatingPointError):  # rank 0 has met it too, and says so
                job()
    ranks.part()


@dataclass(frozen=True)
class Checkpoint:
    """What a training keeps in ``folder`` until it is finished, under its content key: its state, and the weights of its
    best epoch. Of several processes only rank 0 reads and writes files."""

    folder: Path
    key: str

    def load(self) -> dict[str, Any] | None:
        """The last state of this training, in every process; None if there is none."""
        state = None
        if ranks.rank() == 0:
            for left in self.folder.glob(".*.part"):  # by a kill: whoever is alive holds the folder's lock
                left.unlink()
            state = self._read(CHECKPOINT)
            if state and state.get("kls") and self._read(BEST) is None:  # without the best weights there is no way on
                state = None
        return ranks.share(state)

    def _read(self, name: str) -> dict[str, Any] | None:
        """What one of this training's files holds; None for one that is not there or, with a warning, damaged."""
        if not (self.folder / name).exists():
            return None
        try:
            if not sealed(self.folder / name):  # torch.load compares no checksums
                raise ValueError("other bytes than were saved")
            state = torch.load(self.folder / name, map_location="cpu", weights_only=True)
            return state if state["key"] == self.key else None
        except Exception as error:  # of pickle or torch, by what is damaged
            what = f"{self.folder / name} is damaged ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            warnings.warn(f"{what}: training starts from its beginning", stacklevel=2)
            return None

    def finished(self) -> bool:
        """Whether the folder holds the finished student of this training."""
        if not (self.folder / LOG).exists():
            return False
        try:
            return bool(read_log(self.folder)["key"] == self.key)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            warnings.warn(f"{self.folder / LOG} is damaged ({error}): the student is trained anew", stacklevel=2)
            return False

    def save(self, state: dict[str, Any], name: str = CHECKPOINT) -> None:
        """Keep a state, or under the name BEST that of the best epoch."""
        if ranks.rank() == 0:
            with replacing(self.folder / name) as part:
                with part.open("wb") as file:
                    torch.save({"key": self.key, **state}, file)
                seal(part)

    def best(self) -> dict[str, torch.Tensor]:
        """The weights of the best epoch. Raises ValueError where they are damaged."""
        if (state := self._read(BEST)) is None:
            raise ValueError(f"{self.folder / BEST} is damaged: run the same again")
        return state["model"]

    def discard(self) -> None:
        """Delete the files: the training is finished."""
        for name in (CHECKPOINT, BEST):
            if (self.folder / name).exists():  # where nothing can be written, not even what is not there can be deleted
                (self.folder / name).unlink()


def _train(
    config: StudentConfig,
    training: TrainingConfig,
    lessons: list[Lesson],
    checkpoint: Checkpoint,
    autocast: bool | None,
    on_step: Callable[[int, float], None] | None = None,
) -> Student:
    """:func:`train` in one of the processes that share the work, from the last checkpoint or from the start."""
    trainer = _Trainer(config, training, lessons, autocast)
    trainer.run(checkpoint, on_step)
    student, folder = trainer.student, checkpoint.folder
    if ranks.rank():
        return student
    log = {"key": checkpoint.key, "student": asdict(config), "training": asdict(training), **trainer.log()}
    (folder / LOG).unlink(missing_ok=True)  # another run's: it must not vouch for the new weights
    if trainer.kls:
        student.model.load_state_dict(checkpoint.best())
    student.model.eval()
    student.save(folder)
    write_text(folder / LOG, json.dumps(log, indent=1) + "\n")
    checkpoint.discard()
    return student


@dataclass(frozen=True)
class _Epoch:
    """What one epoch shows: sequences and their index (see Student.encode), goals (item, K), batches of items."""

    rows: list[Row]
    lengths: np.ndarray  # (sequence,)
    index: np.ndarray
    goals: torch.Tensor
    offsets: torch.Tensor  # (item, K), added to the logits
    plan: list[np.ndarray]


class _Trainer:
    """A student on its way: model, optimiser, and the losses so far, by step and (KL of held-out questions) by epoch."""

    def __init__(
        self, config: StudentConfig, training: TrainingConfig, lessons: list[Lesson], autocast: bool | None
    ) -> None:
        self.training, self.autocast = training, autocast
        self.student = student = build(config, training.seed)
        if config.inputs == "distribution":
            [lesson] = lessons
            assert isinstance(lesson.seen, Distributions)
            student.correction = fit_correction(lesson.seen.P, lesson.shown, lesson.targets)
        few = [len(set(lesson.wordings())) < 2 for lesson in lessons]  # nothing is held out of these if others have more
        parts = [
            (lesson, None) if small and not all(few) else lesson.split(training.held_out, training.seed)
            for lesson, small in zip(lessons, few, strict=True)
        ]
        self.lessons, self.held_out = [part for part, _ in parts], [part for _, part in parts if part is not None]
        parameters = list(student.model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": training.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},  # biases and normalisation
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=training.learning_rate, fused=True)
        self.per_epoch = sum(-(-len(lesson.questions) // training.batch_size) for lesson in self.lessons)
        self.total = training.epochs * self.per_epoch
        self.encoded: dict[int, tuple[list[Row], np.ndarray]] = {}
        self.losses: list[float] = []
        self.kls: list[float] = []
        self.started = time.monotonic()

    def run(self, checkpoint: Checkpoint, on_step: Callable[[int, float], None] | None) -> None:
        """All steps that are left."""
        student, losses = self.student, self.losses
        if (state := checkpoint.load()) is not None:
            self._restore(state)
        elif student.head.scaled:
            student.scale = ranks.share(self._first_scale())
        saved, pause = time.monotonic(), 0.0
        student.model.train()
        what = f"train {student.config.head} {student.config.inputs}"
        hidden = {"disable": True} if ranks.rank() else {}
        with tqdm(total=self.total, initial=len(losses), unit="step", desc=what, **hidden) as bar:
            for number in range(len(losses) // self.per_epoch, self.training.epochs + 1):
                if self.held_out and len(self.kls) < number:  # these weights ended the epoch before
                    self.kls.append(ranks.share(self._held_out_kl(self.held_out)))
                    bar.set_description(f"{what}, held-out KL {self.kls[-1]:.4f}")
                    if self.kls[-1] == min(self.kls):
                        checkpoint.save({"model": student.model.state_dict()}, BEST)
                    if number - 1 - int(np.argmin(self.kls)) >= self.training.patience:
                        break
                if number == self.training.epochs:
                    break
                for epoch, batch in self._steps(self.lessons, number)[len(losses) - number * self.per_epoch :]:
                    self._step(epoch, batch)
                    bar.update()
                    bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
                    if on_step is not None:
                        on_step(len(losses), losses[-1])
                    steps = (self.training.save_every, self.per_epoch)
                    due = any(len(losses) % n == 0 for n in steps) or time.monotonic() - saved > max(SAVE_SECONDS, pause)
                    if len(losses) < self.total and due:
                        started = time.monotonic()
                        checkpoint.save(self._state())
                        saved = time.monotonic()
                        pause = (saved - started) / SAVE_SHARE

    def log(self) -> dict[str, Any]:
        """What :func:`read_log` tells of the steps."""
        n, seconds = sum(len(lesson.questions) for lesson in self.lessons), time.monotonic() - self.started
        speed = len(self.losses) * n / self.per_epoch / seconds
        log: dict[str, Any] = {"questions": n, "seconds": seconds, "questions_per_second": speed}
        return log | {"losses": self.losses, "held_out_kl": self.kls, "processes": ranks.count()}

    def _state(self) -> dict[str, Any]:
        state = {"losses": self.losses, "kls": self.kls, "seconds": time.monotonic() - self.started}
        state |= {"scale": self.student.scale, "model": self.student.model.state_dict()}
        return state | {"optimiser": self.optimiser.state_dict()}

    def _restore(self, state: dict[str, Any]) -> None:
        self.student.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.student.scale = state.get("scale", 1.0)
        self.losses += state["losses"]
        self.kls += state.get("kls", [])
        self.started = time.monotonic() - state["seconds"]

    def _steps(self, lessons: Sequence[Lesson], number: int) -> list[tuple[_Epoch, np.ndarray]]:
        """What each step of an epoch shows: batches of one lesson, or of several in a random order."""
        epochs = [self._epoch(lesson, (self.training.seed, number, place)) for place, lesson in enumerate(lessons)]
        steps = [(epoch, batch) for epoch in epochs for batch in epoch.plan]
        rng = np.random.default_rng((self.training.seed, number, len(lessons)))
        return [steps[i] for i in rng.permutation(len(steps))] if len(lessons) > 1 else steps

    def _epoch(self, lesson: Lesson, key: tuple[int, int, int]) -> _Epoch:
        """Draw orders, decisions and batches. Depends on ``key`` (seed, number of the epoch, place of the lesson) only, so
        it can be drawn again. (A place of 0 changes nothing: one lesson draws as ever.)"""
        rng, n, student = np.random.default_rng(key), len(lesson.questions), self.student
        shown, decisions, distributions = lesson.draw(student.config.inputs, rng)  # order = 1
        rows, index = self._encode(lesson, shown, decisions)
        lengths = np.array([len(row["input_ids"]) for row in rows])
        goals, groups = lesson.targets[:, None], lesson.wordings()
        if not student.head.equivariant:
            goals, groups = to_positions(goals, shown), list(range(n))
        offsets = np.zeros(goals.shape) + student.offsets(distributions, shown)
        plan = batches(groups, lengths[index.reshape(n, -1)].max(-1), self.training.batch_size, rng)
        as_tensor = partial(torch.tensor, dtype=torch.float32)
        return _Epoch(rows, lengths, index, as_tensor(goals[:, 0]), as_tensor(offsets[:, 0]), plan)

    def _encode(self, lesson: Lesson, shown: np.ndarray, decisions: np.ndarray | None) -> tuple[list[Row], np.ndarray]:
        """:meth:`Student.encode`; once for all epochs where no sequence depends on the order or on a decision."""
        if not self.student.head.equivariant or decisions is not None:
            return self.student.encode(lesson.questions, shown, decisions)
        if id(lesson) not in self.encoded:
            self.encoded[id(lesson)] = self.student.encode(lesson.questions, shown)
        return self.encoded[id(lesson)]

    def _step(self, epoch: _Epoch, batch: np.ndarray) -> None:
        """One step of the optimiser; its loss is added to the others."""
        training, losses, model = self.training, self.losses, self.student.model
        for group in self.optimiser.param_groups:
            group["lr"] = training.learning_rate * rate(len(losses), self.total, training.warmup)
        # Of dropout, another one in each process. (A 0 at the end changes nothing: one process draws as ever.)
        place = (training.seed, len(losses), ranks.rank())
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        losses.append(self._backward(epoch, batch))
        if not np.isfinite(losses[-1]):
            fix = f"lower learning_rate {training.learning_rate}"
            raise FloatingPointError(f"loss {losses[-1]} in step {len(losses)}: {fix}")
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        self.optimiser.step()
        self.optimiser.zero_grad()

    def _backward(self, epoch: _Epoch, batch: np.ndarray) -> float:
        """Gradients of the batch's mean loss, added up over its pieces and the processes that share it. Returns the loss."""
        total, own = 0.0, batch[ranks.rank() :: ranks.count()]
        for part in self._losses(epoch, own) if len(own) else ():
            loss = part * (len(own) / len(batch))
            loss.backward()
            total += loss.item()
        return ranks.add_up(self.student.model.parameters(), total)

    def _losses(self, epoch: _Epoch, batch: np.ndarray) -> Iterator[torch.Tensor]:
        """The loss of a batch, piece by piece: their sum is its mean over the items."""
        for piece, logits in self._logits(epoch, batch):
            log_probs = (logits + epoch.offsets[piece].to(logits.device)).log_softmax(-1)
            yield kl_loss(log_probs, epoch.goals[piece].to(log_probs.device)) * (len(piece) / len(batch))

    def _logits(self, epoch: _Epoch, batch: np.ndarray) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Pieces of a batch, and their logits (item, K) before the offsets."""
        for piece in pieces(batch, epoch.index, epoch.lengths, self.training.micro_tokens):
            used, local = np.unique(epoch.index[piece], return_inverse=True)
            with mixed_precision(self.student.model.device, self.autocast):
                outputs = self.student.forward([epoch.rows[s] for s in used])
            yield piece, self.student.logits(outputs, local.reshape(epoch.index[piece].shape))[:, 0]

    def _first_scale(self) -> float:
        """:func:`fit_scale` of the untrained encoder, on what the first epoch shows."""
        parts = []
        self.student.model.eval()
        for place, lesson in enumerate(self.lessons):
            epoch = self._epoch(lesson, (self.training.seed, 0, place))
            cosines = np.empty(tuple(epoch.goals.shape))
            with torch.inference_mode():
                for batch in epoch.plan:
                    for piece, logits in self._logits(epoch, batch):
                        cosines[piece] = logits.double().cpu().numpy()
            parts.append((cosines, epoch.offsets.double().numpy(), epoch.goals.double().numpy()))
        return fit_scale(parts)

    def _held_out_kl(self, held_out: Sequence[Lesson]) -> float:
        """Mean KL on questions that are not trained on, without dropout, each in the same order every time."""
        steps = self._steps(held_out, -1 % 2**32)  # no epoch that is trained on has this number
        self.student.model.eval()
        with torch.inference_mode():
            parts = [(len(batch), loss.item()) for epoch, batch in steps for loss in self._losses(epoch, batch)]
        self.student.model.train()
        return float(sum(n * loss for n, loss in parts) / sum(len(lesson.questions) for lesson in held_out))


def content_key(
    config: StudentConfig, training: TrainingConfig, lesson: Lesson | Sequence[Lesson], autocast: bool | None = None
) -> str:
    """sha256 over everything that the weights depend on which :func:`train` makes of these arguments.

    Probabilities count to 6 digits: another machine's exp() differs in the last one, and trains the same student.
    """
    settings = [RECIPE, asdict(config), encoder_key(config.encoder), training.key, autocast]
    lessons = [lesson] if isinstance(lesson, Lesson) else lesson
    return digest(settings, [q for one in lessons for q in one.questions], *(a for one in lessons for a in one.arrays))


def digest(settings: object, questions: Sequence[Question], *arrays: np.ndarray | None) -> str:
    """sha256 over JSON-able settings, the texts of questions, and arrays, floating-point ones to 6 digits."""
    texts = [[q.context, q.question, list(q.options)] for q in questions]
    found = hashlib.sha256(json.dumps([settings, texts]).encode())
    for array in arrays:
        if array is None:
            found.update(b"none")
            continue
        exact = np.round(array, 6).astype(np.float64) + 0.0 if np.issubdtype(array.dtype, np.floating) else array
        found.update(repr(exact.shape).encode() + exact.tobytes())
    return found.hexdigest()
