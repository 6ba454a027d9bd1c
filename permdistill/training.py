"""Training a student: minimise KL(debiased teacher || student) on questions without gold answers. A short explicit loop.

Every epoch shows each question once, in a new uniformly random order; for error correction one decision is drawn from the
teacher's probabilities in that order, or the student sees the probabilities themselves. All randomness is derived from
(seed, epoch) and (seed, step), so a run that was killed goes on from its checkpoint to the same weights, and a finished
one is loaded instead of repeated. Several processes may share the work (:func:`lead`): each takes a part of every batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from tqdm import tqdm

from permdistill.configs import StudentConfig, TrainingConfig
from permdistill.debias import EPSILON
from permdistill.engine import ranks
from permdistill.files import locked
from permdistill.orders import all_orders, to_positions
from permdistill.questions import Question
from permdistill.students import Correction, Row, Student, build, encoder_key, mixed_precision

RECIPE = 1  # raise it when the code would train other weights from the same arguments: finished students are then void
SAVE_SECONDS = 30.0  # at most so much training is lost to a kill, see TrainingConfig.save_every
CHECKPOINT, BEST, LOG = "checkpoint.pt", "best.pt", "train.json"
_MEGA = 16  # batches within which questions are sorted by length: little padding, still random company


def kl_loss(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """KL(target || student), mean over items, in nats: mean_i sum_o t_io (log t_io - log p_io), with 0 log 0 = 0.

    Both (item, K), with the same meaning of the last axis. Source: arXiv 2403.13590.
    """
    return torch.nn.functional.kl_div(log_probs, targets, reduction="batchmean")


def fit_correction(P: np.ndarray, orders: np.ndarray, targets: np.ndarray) -> Correction:
    """The scale and position logits that bring the teacher's answers in single orders closest to the targets.

    P (item, order, option) over ``orders`` (order, K), targets (item, option). Minimises the mean over items and orders of
    KL(target || softmax(scale log P + position logits)), which is convex. Like prior-matching it reads no gold answer;
    unlike it, it takes the teacher's answers over the other orders of the same questions as its goal. Raises ValueError
    when no minimum is found.
    """
    k = P.shape[2]
    log_p = np.log(np.maximum(to_positions(np.asarray(P, dtype=np.float64), orders), EPSILON)).reshape(-1, k)
    goals = to_positions(np.broadcast_to(targets[:, None], P.shape), orders).reshape(-1, k)

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        logits = x[0] * log_p + x[1:]
        log_q = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        slope = (np.exp(log_q) - goals) / len(goals)
        # The mean of the position logits changes nothing: the square picks 0.
        value = -(goals * log_q).sum() / len(goals) + x[1:].mean() ** 2 / 2
        return value, np.concatenate([[(slope * log_p).sum()], slope.sum(axis=0) + x[1:].mean() / k])

    found = minimize(value_and_gradient, np.r_[1.0, np.zeros(k)], jac=True, method="BFGS", options={"gtol": 1e-6})
    if not np.abs(found.jac).max() < 1e-4:  # BFGS stops short of gtol where the value rounds off
        raise ValueError(f"no correction brings the teacher to the targets ({found.message}): use inputs='prediction'")
    return Correction(float(found.x[0]), tuple(float(v) for v in found.x[1:] - found.x[1:].mean()))


def fit_scale(cosines: np.ndarray, offsets: np.ndarray, targets: np.ndarray) -> float:
    """What cosines are multiplied by to become logits; all arrays (item, option). It reads no gold answer.

    The scale that brings softmax(scale cosine + offset) closest to the targets (least mean KL(target || answer), a convex
    problem in one number); but where an untrained encoder's cosines do not follow the targets that is near 0, from where
    nothing can be learnt, so at least what lets a difference of 1 between two cosines say what the median target says of
    its most and least probable option, beyond the offsets. Targets below 0.01 count as that much here.
    """

    def value_and_slope(x: np.ndarray) -> tuple[float, np.ndarray]:
        logits = x[0] * cosines + offsets
        log_q = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        slope = ((np.exp(log_q) - targets) * cosines).sum() / len(targets)
        return -(targets * log_q).sum() / len(targets), np.array([slope])

    closest = float(minimize(value_and_slope, np.ones(1), jac=True, method="BFGS").x[0])
    unsaid = np.log(np.maximum(targets, 0.01)) - offsets
    return max(closest, float(np.median(np.ptp(unsaid, axis=1))))


def rate(step: int, total: int, warmup: float) -> float:
    """Share of the maximal learning rate in ``step`` = 0..total-1: linear rise over the share ``warmup``, linear fall."""
    rise = int(np.ceil(warmup * total))
    return (step + 1) / (rise + 1) if step < rise else (total - step) / (total - rise)


def batches(groups: Sequence[Hashable], lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """A random partition of the questions 0..n-1 into batches; questions of one group stay together as far as they fit."""
    members: dict[Hashable, list[int]] = {}
    for i in rng.permutation(len(groups)):
        members.setdefault(groups[i], []).append(int(i))
    units = [list(members.values())[u] for u in rng.permutation(len(members))]
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


def _checked(name: str, p: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    p = np.asarray(p, dtype=np.float64)
    if p.shape != shape:
        raise ValueError(f"{name} of shape {p.shape}: give {shape}")
    if not (np.isfinite(p).all() and (p >= 0).all() and np.allclose(p.sum(-1), 1, atol=1e-4)):
        raise ValueError(f"{name} are no probabilities: give finite values of at least 0 that sum to 1 over the options")
    return p


def _sampled(p: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One draw from each distribution (item, option) -> (item,)."""
    u = rng.random(len(p))[:, None] * p.sum(-1, keepdims=True)
    return (np.cumsum(p, axis=-1)[:, :-1] <= u).sum(-1)


def _checked_draws(orders: np.ndarray, decisions: np.ndarray, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    orders, decisions = np.asarray(orders, dtype=np.int64), np.asarray(decisions, dtype=np.int64)
    if orders.shape != (n, *decisions.shape[1:], k) or decisions.shape != orders.shape[:2]:
        raise ValueError(
            f"drawn orders of shape {orders.shape} and decisions of shape {decisions.shape}: "
            f"give ({n}, draw, {k}) and ({n}, draw)"
        )
    if (np.sort(orders, axis=-1) != np.arange(k)).any() or (decisions < -1).any() or (decisions >= k).any():
        raise ValueError(f"drawn orders and decisions: give permutations of 0..{k - 1}, and option indices or -1")
    if (silent := (decisions < 0).all(axis=1)).any():
        raise ValueError(
            f"question {int(silent.argmax())} has no decision ({silent.sum()} in all): leave such questions out"
        )
    return orders, decisions


def _one_of_the_decided(decisions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each item the place of one of its decisions that are not -1, uniformly: (item, draw) -> (item,)."""
    n_decided = (decisions >= 0).sum(axis=1)
    chosen = (rng.random(len(decisions)) * n_decided).astype(np.int64)
    decided_first = np.argsort(decisions < 0, axis=1, kind="stable")
    return decided_first[np.arange(len(decisions)), chosen]


def read_log(folder: str | Path) -> dict[str, Any]:
    """The log of a finished training: configs, losses (step,), seconds, questions_per_second, content key."""
    return json.loads((Path(folder) / LOG).read_text(encoding="utf-8"))


def train(
    config: StudentConfig,
    training: TrainingConfig,
    questions: Sequence[Question],
    targets: np.ndarray,
    folder: str | Path,
    decision_probs: np.ndarray | None = None,
    orders: np.ndarray | None = None,
    autocast: bool | None = None,
    on_step: Callable[[int, float], None] | None = None,
    drawn: tuple[np.ndarray, np.ndarray] | None = None,
) -> Student:
    """Train a student, save it in ``folder`` with its log (:func:`read_log`), and return it. Seeds torch.

    questions       without gold answers, as :func:`permdistill.questions.unlabelled` gives them
    targets         (item, option) probabilities, the debiased teacher's
    decision_probs  (item, order, option) the teacher's, over ``orders``; refused for inputs="plain", else required
    orders          (order, K) to draw from; None: all K!
    autocast        bfloat16 matrix products, see :func:`permdistill.students.mixed_precision`
    on_step         called after each step with its number (from 1) and its loss
    drawn           instead of decision_probs, what a black-box teacher said: orders (item, draw, K) and the decision in
                    each, (item, draw) option indices, -1 where there is none; an epoch shows a question in one of its orders

    The same call again loads the finished student, or resumes a killed run from its last checkpoint; a call with other
    configs or data trains anew. Raises ValueError for gold answers and misfitting arrays, FloatingPointError on divergence.
    """
    folder, n = Path(folder), len(questions)
    orders = all_orders(config.k) if orders is None else np.asarray(orders, dtype=np.int64)
    answered = [q.id for q in questions if q.answer is not None]
    if answered:
        raise ValueError(
            f"{len(answered)} of {n} questions have an answer ({answered[0]!r}): pass data.unlabelled(questions)"
        )
    if not n:
        raise ValueError("0 questions: give at least 1")
    targets = _checked("targets", targets, (n, config.k))
    if drawn is not None:
        if config.inputs != "prediction" or decision_probs is not None:
            more = "" if decision_probs is None else " and decision_probs"
            raise ValueError(
                f"inputs={config.inputs!r}, drawn{more} given: drawn goes with inputs='prediction', instead of them"
            )
        drawn = _checked_draws(*drawn, n, config.k)
    elif (decision_probs is not None) != (config.inputs != "plain"):
        found = "missing" if decision_probs is None else "given"
        raise ValueError(f"inputs={config.inputs!r} and decision_probs {found}: 'plain' takes none, the others need them")
    if decision_probs is not None:
        decision_probs = _checked("decision_probs", decision_probs, (n, *orders.shape))
    key = content_key(config, training, questions, targets, decision_probs, orders, autocast, drawn)
    with locked(folder / ".lock"):  # a killed make may have left a process that is still at it: wait, then load its result
        if (folder / LOG).exists() and read_log(folder)["key"] == key:
            (folder / CHECKPOINT).unlink(missing_ok=True)
            return Student.from_pretrained(folder)
        ranks.share((config, training, questions, targets, folder, decision_probs, orders, autocast, None, key, drawn))
        return _run(config, training, questions, targets, folder, decision_probs, orders, autocast, on_step, key, drawn)


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
                _run(*job)
    ranks.part()


def _run(
    config: StudentConfig,
    training: TrainingConfig,
    questions: Sequence[Question],
    targets: np.ndarray,
    folder: Path,
    decision_probs: np.ndarray | None,
    orders: np.ndarray,
    autocast: bool | None,
    on_step: Callable[[int, float], None] | None,
    key: str,
    drawn: tuple[np.ndarray, np.ndarray] | None = None,
) -> Student:
    """:func:`train` from the last checkpoint, or from the start. Of several processes only rank 0 reads and writes files."""
    first = ranks.rank() == 0
    student = build(config, training.seed)
    if config.inputs == "distribution":
        assert decision_probs is not None
        student.correction = fit_correction(decision_probs, orders, targets)
    taught = _Taught(questions, targets, decision_probs, orders, drawn)
    taught, held_out = taught.split(training.held_out, training.seed) if training.held_out else (taught, None)
    optimiser = torch.optim.AdamW(_parameter_groups(student, training), lr=training.learning_rate, fused=True)
    n = len(taught.questions)
    per_epoch = -(-n // training.batch_size)
    total, seconds = training.epochs * per_epoch, 0.0
    losses: list[float] = []
    kls: list[float] = []  # on the held-out questions, by epoch
    if (state := ranks.share(_checkpoint(folder, key) if first else None)) is not None:
        student.model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        losses, kls, seconds = state["losses"], state.get("kls", []), state["seconds"]
        student.scale = state.get("scale", 1.0)
    elif config.head == "bi_encoder":
        student.scale = ranks.share(_first_scale(student, training, taught, autocast))
    started = time.monotonic() - seconds
    saved = time.monotonic()

    student.model.train()
    hidden = {} if first else {"disable": True}
    bar = tqdm(total=total, initial=len(losses), unit="step", desc=f"train {config.head} {config.inputs}", **hidden)
    with bar:
        for number in range(len(losses) // per_epoch, training.epochs + 1):
            if held_out is not None and len(kls) < number:  # these weights ended the epoch before
                kls.append(ranks.share(_held_out_kl(student, training, held_out, autocast)))
                bar.set_description(f"train {config.head} {config.inputs}, held-out KL {kls[-1]:.4f}")
                if first and kls[-1] == min(kls):
                    _replace(folder / BEST, partial(torch.save, {"key": key, "model": student.model.state_dict()}))
                if number - 1 - int(np.argmin(kls)) >= training.patience:
                    break
            if number == training.epochs:
                break
            epoch = _epoch(student, training, taught, number)
            for batch in epoch.plan[len(losses) - number * per_epoch :]:
                for group in optimiser.param_groups:
                    group["lr"] = training.learning_rate * rate(len(losses), total, training.warmup)
                # Of dropout, another one in each process. (A 0 at the end changes nothing: one process draws as ever.)
                place = (training.seed, len(losses), ranks.rank())
                torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
                losses.append(_backward(student, epoch, batch, training.micro_tokens, autocast))
                if not np.isfinite(losses[-1]):
                    fix = f"lower learning_rate {training.learning_rate}"
                    raise FloatingPointError(f"loss {losses[-1]} in step {len(losses)}: {fix}")
                torch.nn.utils.clip_grad_norm_(student.model.parameters(), training.max_grad_norm)
                optimiser.step()
                optimiser.zero_grad()
                bar.update()
                bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
                if on_step is not None:
                    on_step(len(losses), losses[-1])
                due = len(losses) % training.save_every == 0 or time.monotonic() - saved > SAVE_SECONDS
                if first and len(losses) < total and (due or len(losses) % per_epoch == 0):
                    state = {"key": key, "losses": losses, "kls": kls, "seconds": time.monotonic() - started}
                    state |= {
                        "scale": student.scale,
                        "model": student.model.state_dict(),
                        "optimiser": optimiser.state_dict(),
                    }
                    _replace(folder / CHECKPOINT, partial(torch.save, state))
                    saved = time.monotonic()
    if not first:
        return student
    seconds = time.monotonic() - started
    seen = len(losses) * n / per_epoch
    log: dict[str, Any] = {"key": key, "student": asdict(config), "training": asdict(training), "questions": n}
    log |= {"seconds": seconds, "questions_per_second": seen / seconds, "losses": losses, "held_out_kl": kls}
    log["processes"] = ranks.count()
    (folder / LOG).unlink(missing_ok=True)  # another run's: it must not vouch for the new weights
    if kls:
        student.model.load_state_dict(torch.load(folder / BEST, weights_only=True)["model"])
    student.model.eval()
    student.save(folder)
    _replace(folder / LOG, lambda part: part.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8"))
    (folder / CHECKPOINT).unlink(missing_ok=True)
    (folder / BEST).unlink(missing_ok=True)
    return student


def _checkpoint(folder: Path, key: str) -> dict[str, Any] | None:
    """The last checkpoint of the run with this content key, None if there is none."""
    if not (folder / CHECKPOINT).exists():
        return None
    state = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
    return state if state["key"] == key else None


def _parameter_groups(student: Student, training: TrainingConfig) -> list[dict[str, Any]]:
    parameters = list(student.model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},  # biases and normalisation
    ]


@dataclass(frozen=True)
class _Taught:
    """What a student learns from: questions and their targets, and what the teacher said, as :func:`train` takes it."""

    questions: Sequence[Question]
    targets: np.ndarray
    decision_probs: np.ndarray | None
    orders: np.ndarray
    drawn: tuple[np.ndarray, np.ndarray] | None

    def wordings(self) -> list[Hashable]:
        """By question: those of one context and wording share sequences when each option stands in its own."""
        return [(q.context, q.question) for q in self.questions]

    def split(self, share: float, seed: int) -> tuple[_Taught, _Taught]:
        """What is trained on, and a random ``share`` of the questions, at least one; those of one wording stay together."""
        wordings = self.wordings()
        different = list(dict.fromkeys(wordings))
        n = max(1, round(share * len(different)))
        if n >= len(different):
            raise ValueError(
                f"held_out = {share} of {len(different)} questions leaves none to train on: give more questions"
            )
        chosen = np.random.default_rng((seed, n)).permutation(len(different))[:n]
        out = {different[i] for i in chosen}
        inside = np.array([wording in out for wording in wordings])
        return self._part(np.flatnonzero(~inside)), self._part(np.flatnonzero(inside))

    def _part(self, places: np.ndarray) -> _Taught:
        probs = None if self.decision_probs is None else self.decision_probs[places]
        drawn = None if self.drawn is None else (self.drawn[0][places], self.drawn[1][places])
        return _Taught([self.questions[i] for i in places], self.targets[places], probs, self.orders, drawn)


@dataclass(frozen=True)
class _Epoch:
    """What one epoch shows: sequences and their index (see Student.encode), goals (item, K), batches of items."""

    rows: list[Row]
    lengths: np.ndarray  # (sequence,)
    index: np.ndarray
    goals: torch.Tensor
    offsets: torch.Tensor  # (item, K), added to the logits
    plan: list[np.ndarray]


def _epoch(student: Student, training: TrainingConfig, taught: _Taught, number: int) -> _Epoch:
    """Draw orders, decisions and batches. Depends on the seed and the epoch's number only, so it can be drawn again."""
    rng, n, joint = np.random.default_rng((training.seed, number)), len(taught.questions), student.config.head == "joint"
    offsets = np.zeros((n, student.config.k))
    if taught.drawn is not None:
        place = _one_of_the_decided(taught.drawn[1], rng)
        shown, decisions = (said[np.arange(n), place][:, None] for said in taught.drawn)
    else:
        drawn = rng.integers(len(taught.orders), size=n)
        shown = taught.orders[drawn][:, None]  # (item, order = 1, K)
        seen = None if taught.decision_probs is None else taught.decision_probs[np.arange(n), drawn]  # (item, option)
        decisions = _sampled(seen, rng)[:, None] if seen is not None and student.config.inputs == "prediction" else None
        if seen is not None and student.config.inputs == "distribution":
            offsets = np.asarray(student.offsets(seen[:, None], shown))[:, 0]
    rows, index = student.encode(taught.questions, shown, decisions)
    lengths = np.array([len(row["input_ids"]) for row in rows])
    goals = to_positions(taught.targets[:, None], shown) if joint else taught.targets[:, None]
    groups: Sequence[Hashable] = range(n) if joint else taught.wordings()
    plan = batches(groups, lengths[index.reshape(n, -1)].max(-1), training.batch_size, rng)
    as_tensor = partial(torch.tensor, dtype=torch.float32)
    return _Epoch(rows, lengths, index, as_tensor(goals[:, 0]), as_tensor(offsets), plan)


def _logits(student: Student, epoch: _Epoch, piece: list[int], autocast: bool | None) -> torch.Tensor:
    """Logits (item, K) of some items, before the offsets."""
    used, local = np.unique(epoch.index[piece], return_inverse=True)
    with mixed_precision(student.model.device, autocast):
        outputs = student.forward([epoch.rows[s] for s in used])
    return student.logits(outputs, local.reshape(epoch.index[piece].shape))[:, 0]


def _losses(
    student: Student, epoch: _Epoch, batch: np.ndarray, micro_tokens: int, autocast: bool | None
) -> Iterator[torch.Tensor]:
    """The loss of a batch, piece by piece: their sum is its mean over the items."""
    for piece in pieces(batch, epoch.index, epoch.lengths, micro_tokens):
        logits = _logits(student, epoch, piece, autocast)
        log_probs = (logits + epoch.offsets[piece].to(logits.device)).log_softmax(-1)
        yield kl_loss(log_probs, epoch.goals[piece].to(log_probs.device)) * (len(piece) / len(batch))


def _first_scale(student: Student, training: TrainingConfig, taught: _Taught, autocast: bool | None) -> float:
    """:func:`fit_scale` of the untrained encoder, on what the first epoch shows."""
    epoch = _epoch(student, training, taught, 0)
    cosines = np.empty(tuple(epoch.goals.shape))
    student.scale = 1.0
    student.model.eval()
    with torch.inference_mode():
        for batch in epoch.plan:
            for piece in pieces(batch, epoch.index, epoch.lengths, training.micro_tokens):
                cosines[piece] = _logits(student, epoch, piece, autocast).double().cpu().numpy()
    return fit_scale(cosines, epoch.offsets.double().numpy(), epoch.goals.double().numpy())


def _backward(student: Student, epoch: _Epoch, batch: np.ndarray, micro_tokens: int, autocast: bool | None) -> float:
    """Gradients of the batch's mean loss, added up over its pieces and the processes that share it. Returns the loss."""
    total, own = 0.0, batch[ranks.rank() :: ranks.count()]
    for part in _losses(student, epoch, own, micro_tokens, autocast) if len(own) else ():
        loss = part * (len(own) / len(batch))
        loss.backward()
        total += loss.item()
    return ranks.add_up(student.model.parameters(), total)


def _held_out_kl(student: Student, training: TrainingConfig, held_out: _Taught, autocast: bool | None) -> float:
    """Mean KL on questions that are not trained on, without dropout, each in the same order every time."""
    epoch = _epoch(student, training, held_out, -1 % 2**32)  # no epoch that is trained on has this number
    student.model.eval()
    with torch.inference_mode():
        kl = sum(
            loss.item() * len(batch) / len(held_out.questions)
            for batch in epoch.plan
            for loss in _losses(student, epoch, batch, training.micro_tokens, autocast)
        )
    student.model.train()
    return float(kl)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    write(part)
    os.replace(part, path)


def content_key(
    config: StudentConfig,
    training: TrainingConfig,
    questions: Sequence[Question],
    targets: np.ndarray,
    decision_probs: np.ndarray | None = None,
    orders: np.ndarray | None = None,
    autocast: bool | None = None,
    drawn: tuple[np.ndarray, np.ndarray] | None = None,
) -> str:
    """sha256 over everything that the weights depend on which :func:`train` makes of these arguments.

    Probabilities count to 6 digits: another machine's exp() differs in the last one, and trains the same student.
    """
    orders = all_orders(config.k) if orders is None else orders
    settings = [RECIPE, asdict(config), encoder_key(config.encoder), training.key, autocast]
    return digest(settings, questions, targets, decision_probs, orders, *(drawn or ()))


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
