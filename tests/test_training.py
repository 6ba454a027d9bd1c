"""Training on planted toys with a tiny random BERT: what is learnt, what is refused, and what survives a kill."""

from __future__ import annotations

import errno
import json
import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_scores import forked
from test_students import WORDS, make_encoder

from permdistill import configs, corrections
from permdistill import training as training_module
from permdistill.configs import StudentConfig, TrainingConfig
from permdistill.corrections import fit_correction, fit_scale, fit_stack
from permdistill.lessons import Distributions, Draws, Lesson
from permdistill.orders import all_orders, to_options
from permdistill.questions import Question
from permdistill.students import Student, build
from permdistill.training import batches, kl_loss, pieces, rate, read_log, train

K = 3
FAST = TrainingConfig(epochs=2, learning_rate=1e-3, batch_size=8, save_every=3)
HEADS = pytest.mark.parametrize("head", configs.HEADS)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def dropping(tmp_path_factory) -> str:
    """The encoder with dropout, so that its randomness too has to survive a kill."""
    return make_encoder(tmp_path_factory.mktemp("dropping"), dropout=0.1)


def toy(n: int, seed: int, k: int = K) -> tuple[list[Question], np.ndarray]:
    """Questions in which the option "yes" is right wherever it stands, and the right option of each (item,)."""
    rng = np.random.default_rng(seed)
    right = rng.integers(k, size=n)
    options = [rng.choice(WORDS[1:15], k, replace=False).tolist() for _ in range(n)]
    for own, o in zip(options, right, strict=True):
        own[o] = "yes"
    return [Question(f"t{i}", "", f"which is {rng.choice(WORDS[1:])} ?", tuple(o)) for i, o in enumerate(options)], right


def soft(right: np.ndarray, k: int = K) -> np.ndarray:
    """Targets (item, option): 0.9 on ``right``, the rest spread evenly."""
    return np.where(np.eye(k)[right] == 1, 0.9, 0.1 / (k - 1))


def weights(student: Student) -> dict[str, torch.Tensor]:
    return student.model.state_dict()


def same(a: Student, b: Student) -> bool:
    return all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def as_good_as_same(a: Student, b: Student) -> bool:
    """Trained twice alike: some CPUs' float32 products depend on where in memory a matrix lies, so not to the last bit."""
    apart = [(value - weights(b)[name]).abs().flatten() for name, value in weights(a).items()]
    return (torch.cat(apart) < 1e-5).double().mean().item() > 0.99


def killer(step: int):
    """A callback that stands for kill -9 in the middle of a run: nothing is saved after it."""

    def on_step(done: int, loss: float) -> None:
        if done == step:
            raise KeyboardInterrupt

    return on_step


def never(*args) -> None:
    raise AssertionError("computed what was there already")


def test_kl_loss_in_closed_form():
    log_p = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]))
    target = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    assert kl_loss(log_p, target).item() == pytest.approx(np.log(2) / 2)  # log(1 / .5) and 0, mean over two items
    one = kl_loss(log_p[:1], torch.tensor([[0.25, 0.25, 0.5]]))
    assert one.item() == pytest.approx(0.25 * np.log(0.5) + 0.5 * np.log(2))


def test_rate_rises_then_falls_linearly():
    assert [rate(s, 4, 0.0) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    shares = [rate(s, 100, 0.1) for s in range(100)]
    assert np.argmax(shares) == 10 and shares[10] == 1.0
    assert np.allclose(np.diff(shares[:11]), 1 / 11) and np.allclose(np.diff(shares[10:]), -1 / 90)
    assert shares[0] > 0 and shares[-1] > 0


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": -1},
        {"learning_rate": 0.0},
        {"warmup": 1.0},
        {"weight_decay": -1.0},
        {"batch_size": -1},
        {"micro_tokens": 0},
        {"max_grad_norm": float("nan")},
        {"save_every": 0},
        {"seed": -1},
        {"held_out": 1.0},
        {"patience": 0},
    ],
)
def test_training_config_is_validated(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}.*{next(iter(change.values()))}"):
        TrainingConfig(**change)


def test_batches_partition_and_keep_groups_together():
    rng = np.random.default_rng(0)
    groups = [f"document {i // 28}" for i in range(280)]
    parts = batches(groups, rng.integers(5, 50, size=280), 28, rng)
    assert sorted(np.concatenate(parts).tolist()) == list(range(280))
    assert all(len({groups[i] for i in part}) == 1 for part in parts)
    assert [groups[p[0]] for p in parts] != sorted(groups[p[0]] for p in parts)
    # Ungrouped questions of one batch have similar lengths, and no two epochs the same batches.
    lengths = rng.integers(1, 100, size=320)
    parts = batches(range(320), lengths, 16, rng)
    assert np.mean([lengths[p].max() - lengths[p].min() for p in parts]) < 30
    assert {tuple(p) for p in parts}.isdisjoint({tuple(p) for p in batches(range(320), lengths, 16, rng)})


@pytest.mark.timing
def test_batches_of_many_questions_take_time_in_proportion():
    """Of 80,000 questions once 31 s an epoch."""
    n = 80_000
    started = time.process_time()
    parts = batches(range(n), np.arange(n) % 50, 16, np.random.default_rng(0))
    assert time.process_time() - started < 5
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))


def test_pieces_bound_the_tokens():
    index = np.array([[[0, 1]], [[0, 2]], [[1, 2]], [[3, 4]]])  # (item, 1, option): pairs of summaries
    lengths = np.array([10, 10, 10, 30, 30])
    assert list(pieces(np.arange(4), index, lengths, 30)) == [[0, 1, 2], [3]]  # the last is over it, and alone
    assert list(pieces(np.arange(4), index, lengths, 20)) == [[0], [1], [2], [3]]
    assert list(pieces(np.array([2, 0]), index, lengths, 1000)) == [[2, 0]]


@HEADS
def test_training_learns_the_planted_option(encoder, tmp_path, head):
    """The option "yes" is right: learnt beyond chance (1/3) on unseen questions, in every order."""
    questions, right = toy(400, 0)
    steps = replace(FAST, epochs=5 if head == "joint" else 2, learning_rate=3e-3, batch_size=16, save_every=100)
    student = train(StudentConfig(encoder, head, k=K), steps, Lesson(questions, soft(right)), tmp_path, autocast=False)
    unseen, truth = toy(100, 1)
    p = student.predict_batch(unseen, all_orders(K), autocast=False)
    assert (p.argmax(-1) == truth[:, None]).mean() > 0.9
    losses = read_log(tmp_path)["losses"]
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])


@pytest.mark.parametrize("head", ["per_option", "shared_prefix", "cross_option", "bi_encoder"])
def test_one_student_for_any_number_of_options(dropping, tmp_path, head):
    """Taught on 3 and 2 options together it knows both, and 5, never seen; killed, it goes on to the same weights."""
    told = {k: toy(200, k, k) for k in (3, 2)}
    lessons = [Lesson(questions, soft(right, k)) for k, (questions, right) in told.items()]
    steps = replace(FAST, epochs=3, learning_rate=3e-3, batch_size=16, held_out=0.1)
    args = (StudentConfig(dropping, head, k=0), steps, lessons)
    student = train(*args, tmp_path / "whole", autocast=False)
    with pytest.raises(KeyboardInterrupt):
        train(*args, tmp_path / "killed", autocast=False, on_step=killer(30))
    assert as_good_as_same(student, train(*args, tmp_path / "killed", autocast=False))
    found = Student.from_pretrained(tmp_path / "whole")
    for k in (2, 3, 5):
        unseen, truth = toy(60, 10 + k, k)
        p = found.predict_batch(unseen, np.arange(k)[None], autocast=False)
        assert p.shape == (60, 1, k) and (p[:, 0].argmax(-1) == truth).mean() > 0.9
    log = read_log(tmp_path / "whole")
    assert 340 < log["questions"] < 380 and len(log["losses"]) == 3 * 2 * 12 and len(log["held_out_kl"]) == 3


def test_several_lessons_are_for_any_number_of_options_only(encoder, tmp_path):
    lessons = [Lesson(questions, soft(right, k)) for k in (3, 2) for questions, right in [toy(8, k, k)]]
    with pytest.raises(ValueError, match=r"targets of shape \(8, 2\): give \(8, 3\)"):
        train(StudentConfig(encoder, "per_option", k=3), FAST, lessons, tmp_path)
    with pytest.raises(ValueError, match="2 lessons, k = 3: give one, or several for a student with k = 0"):
        train(StudentConfig(encoder, "per_option", k=3), FAST, lessons[:1] * 2, tmp_path)
    for head, inputs in (("joint", "plain"), ("bi_encoder", "distribution"), ("per_option", "distribution")):
        with pytest.raises(ValueError, match=r"k = 0 options: give 2..26 \(0, any number, is for"):
            StudentConfig(encoder, head, inputs, k=0)
    mixed = [*lessons[0].questions[:1], *lessons[1].questions[:1]]
    with pytest.raises(ValueError, match="'t0' has 2 options, the orders K = 3"):
        build(StudentConfig(encoder, "per_option", k=0), 0).predict_batch(mixed, np.arange(3)[None])


@HEADS
def test_error_correction_can_copy_the_decision(encoder, tmp_path, head):
    """The decision is right and nothing else tells: only the student that reads it beats chance."""
    questions, right = toy(300, 0)
    questions = [replace(q, options=("red cat", "green dog", "blue bird")) for q in questions]
    probs = np.broadcast_to(np.eye(K)[right][:, None], (300, 6, K))
    steps = replace(FAST, epochs=5 if head == "joint" else 2, learning_rate=3e-3, batch_size=16, save_every=100)
    config = StudentConfig(encoder, head, "prediction", K)
    student = train(config, steps, Lesson(questions, soft(right), Distributions(probs)), tmp_path, autocast=False)
    decisions = np.random.default_rng(5).integers(K, size=(60, 6))
    p = student.predict_batch(questions[:60], all_orders(K), decisions, autocast=False)
    assert (p.argmax(-1) == decisions).mean() > 0.9


def planted_scores(preferences: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """P (item, order, option) of a teacher with these option logits (item, option) and position logits (position,)."""
    orders = all_orders(len(bias))
    logits = preferences[:, None] + to_options(np.broadcast_to(bias, orders.shape), orders)
    return np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))


def test_correction_takes_a_planted_bias_and_temperature_away():
    rng = np.random.default_rng(0)
    preferences, bias = rng.normal(size=(50, K)), np.array([1.5, -0.5, -1.0])
    targets = np.exp(0.5 * preferences) / np.exp(0.5 * preferences).sum(-1, keepdims=True)
    correction = fit_correction(planted_scores(preferences, bias), all_orders(K), targets)
    assert correction.scale == pytest.approx(0.5, abs=1e-3)
    assert correction.position == pytest.approx(-0.5 * bias, abs=1e-3)
    corrected = correction.logits(planted_scores(preferences, bias), np.broadcast_to(all_orders(K), (50, 6, K)))
    corrected -= corrected.mean(axis=-1, keepdims=True)  # a constant changes no probability
    assert corrected == pytest.approx(np.broadcast_to(corrected[:, :1], corrected.shape), abs=1e-4)  # in every order


def test_a_stack_finds_how_much_student_and_teacher_count_and_takes_the_bias_away():
    rng = np.random.default_rng(0)
    own, known, bias = rng.normal(size=(100, K)), rng.normal(size=(100, K)), np.array([1.5, -0.5, -1.0])
    normalised = lambda logits: np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)  # noqa: E731
    targets, orders, P = normalised(0.7 * own + 0.3 * known), all_orders(K), planted_scores(known, bias)
    S = np.broadcast_to(normalised(own)[:, None], P.shape)
    stack = fit_stack(S, P, orders, targets)
    assert (stack.student, stack.teacher) == pytest.approx((0.7, 0.3), abs=1e-3)
    assert stack.position == pytest.approx(-0.3 * bias, abs=1e-3)
    assert np.abs(stack.answer(S, P, orders) - targets[:, None]).max() < 1e-3
    # Of decisions too, whose zeros say no more than that another option was chosen.
    decisions = (P == P.max(axis=-1, keepdims=True)).astype(float)
    stack = fit_stack(S, decisions, orders, targets)
    kl = lambda A: (targets[:, None] * np.log(targets[:, None] / A)).sum(-1).mean()  # noqa: E731
    assert stack.teacher > 0 and kl(stack.answer(S, decisions, orders)) < kl(S)


def test_a_stack_refuses_what_does_not_go_together():
    orders, P = all_orders(K), planted_scores(np.zeros((4, K)), np.array([1.5, -0.5, -1.0]))
    targets = P.mean(axis=1)
    for S, said, message in (
        (
            targets,
            P,
            r"answers of shapes .*\(4, 3\), \(4, 6, 3\).*: give both \(item, order, option\), over the same orders",
        ),
        (P[:, :1], P, "over the same orders"),
        (P[:0], P[:0], r"scores of shape \(0, 6, 3\)"),
        (np.where(np.arange(4)[:, None, None] == 2, np.nan, P), P, "scores of item 2, order 0 are .nan"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_stack(S, said, orders, targets[: len(S)])
    with pytest.raises(ValueError, match="over the same orders"):
        fit_stack(P, P, orders, targets).answer(targets, P[:, :1], orders[:1])


def test_a_correction_that_was_not_found_says_so(monkeypatch):
    found = corrections.minimize
    monkeypatch.setattr(corrections, "minimize", lambda f, x, **rest: found(f, x, **(rest | {"options": {"maxiter": 1}})))
    P = planted_scores(np.random.default_rng(0).normal(size=(50, K)), np.array([1.5, -0.5, -1.0]))
    with pytest.raises(ValueError, match="no correction brings the teacher to the targets"):
        fit_correction(P, all_orders(K), P.mean(axis=1))


def test_scale_is_the_best_fit_and_never_so_small_that_nothing_can_be_said():
    rng = np.random.default_rng(0)
    cosines, offsets = rng.uniform(-1, 1, size=(200, K)), rng.normal(size=(200, K))
    said = 4 * cosines + offsets
    targets = np.exp(said - np.logaddexp.reduce(said, axis=1, keepdims=True))
    assert fit_scale([(cosines, offsets, targets)]) == pytest.approx(4, abs=1e-3)  # planted, and above the floor
    against = np.where(targets == targets.max(axis=1, keepdims=True), 0.9, 0.05)  # the cosines of a useless encoder
    assert fit_scale([(-np.log(against), 0 * offsets, against)]) == pytest.approx(np.log(0.9 / 0.05))
    assert fit_scale([(-against, np.log(against), against)]) == pytest.approx(0, abs=1e-3)  # the offsets say it all
    pairs = (cosines[:50, :2], offsets[:50, :2], targets[:50, :2] / targets[:50, :2].sum(axis=1, keepdims=True))
    assert fit_scale([(cosines, offsets, targets), pairs]) == pytest.approx(4, abs=1e-3)  # of another K, by the same rule


@HEADS
def test_white_box_error_correction_starts_from_the_teacher_and_survives_saving(encoder, tmp_path, head):
    questions, right = toy(48, 0)
    P = planted_scores(1.5 * np.eye(K)[right], np.array([2.0, 0.0, 0.0]))  # knows, but prefers the first position
    config = StudentConfig(encoder, head, "distribution", K, 64)
    student = train(config, FAST, Lesson(questions, P.mean(axis=1), Distributions(P)), tmp_path)
    orders = all_orders(K)
    answers = student.predict_batch(questions, orders, distributions=P)
    assert (P.argmax(-1) == right[:, None]).mean() < 0.7  # the teacher in single orders
    assert (answers.argmax(-1) == right[:, None]).all()
    again = Student.from_pretrained(tmp_path)
    assert again.correction == student.correction
    assert again.predict_batch(questions, orders, distributions=P) == pytest.approx(answers, abs=1e-6)
    # The encoder's part alone: what is left when the teacher says nothing in any order.
    nothing = np.full_like(P, 1 / K)
    assert not np.allclose(again.predict_batch(questions, orders, distributions=nothing), answers, atol=0.05)


def test_distributions_must_fit_the_inputs(encoder, tmp_path):
    questions, right = toy(4, 0)
    P = planted_scores(np.eye(K)[right], np.zeros(K))
    orders = all_orders(K)
    plain = build(StudentConfig(encoder, "per_option", "plain", K, 64), 0)
    with pytest.raises(ValueError, match="inputs='plain' and distributions given"):
        plain.predict_batch(questions, orders, distributions=P)
    student = build(StudentConfig(encoder, "per_option", "distribution", K, 64), 0)
    with pytest.raises(ValueError, match="distributions missing"):
        student.predict_batch(questions, orders)
    with pytest.raises(ValueError, match="no correction yet"):
        student.predict_batch(questions, orders, distributions=P)
    with pytest.raises(ValueError, match=r"distributions of shape \(4, 2, 3\)"):
        student.predict_batch(questions, orders, distributions=P[:, :2])
    with pytest.raises(ValueError, match="'distribution' and distributions missing"):
        train(student.config, FAST, Lesson(questions, P.mean(1)), tmp_path)


@HEADS
def test_a_student_that_says_the_targets_has_loss_zero(encoder, tmp_path, head, monkeypatch):
    """Orders, positions, options, batches and pieces all line up: a student planted to find "yes" has no loss left."""
    questions, right = toy(60, 0)
    drawn, real = [], Lesson.draw
    monkeypatch.setattr(Lesson, "draw", lambda self, *args: drawn.append((shown := real(self, *args))[0][:, 0]) or shown)

    def forward(self: Student, rows) -> torch.Tensor:
        text = [self.tokenizer.decode(row["input_ids"]) for row in rows]
        if head == "joint":
            position = np.array([t.split("yes")[0].count(")") - 1 for t in text])  # "A) .. B) yes": 1
            known = np.log(soft(position))
        elif head in ("per_option", "shared_prefix", "cross_option"):
            known = np.log([[0.9 if "yes" in t else 0.05] for t in text])
        else:  # the first step has to find the scale
            known = np.array([[1.0, 0.0] if "yes" in t or "which" in t else [0.0, 1.0] for t in text])
        return torch.tensor(known, dtype=torch.float32) + 0 * next(self.model.parameters()).sum()

    monkeypatch.setattr(Student, "forward", forward)
    train(StudentConfig(encoder, head, k=K), replace(FAST, micro_tokens=60), Lesson(questions, soft(right)), tmp_path)
    losses = read_log(tmp_path)["losses"]
    assert len(losses) == 16 and np.abs(losses).max() < 1e-6
    assert (drawn[-2] != drawn[-1]).any() and all(len(np.unique(o, axis=0)) == 6 for o in drawn)  # new orders each epoch
    train(StudentConfig(encoder, head, k=K), FAST, Lesson(questions, soft((right + 1) % K)), tmp_path)
    assert min(read_log(tmp_path)["losses"]) > (0.5 if head == "bi_encoder" else 1)  # and the wrong targets do not pass


@HEADS
def test_gold_answers_are_refused(encoder, tmp_path, head):
    questions, right = toy(8, 0)
    questions[3] = replace(questions[3], answer=int(right[3]))
    with pytest.raises(ValueError, match=r"1 of 8 questions have an answer \('t3'\): pass questions\.unlabelled"):
        train(StudentConfig(encoder, head, k=K), FAST, Lesson(questions, soft(right)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_misfitting_arrays_are_refused(encoder, tmp_path):
    questions, right = toy(8, 0)
    with pytest.raises(ValueError, match="0 questions"):
        train(StudentConfig(encoder, k=K), FAST, Lesson([], np.zeros((0, K))), tmp_path)
    targets, plain, prediction = soft(right), StudentConfig(encoder, k=K), StudentConfig(encoder, "joint", "prediction", K)
    probs = np.full((8, 6, K), 1 / K)
    for config, p, d, message in (
        (plain, targets[:5], None, r"targets of shape \(5, 3\): give \(8, 3\)"),
        (plain, targets * 2, None, "targets are no probabilities"),
        (plain, np.where(targets > 0.5, np.nan, targets), None, "targets are no probabilities"),
        (plain, targets, probs, "distributions given"),
        (prediction, targets, None, "distributions missing"),
        (prediction, targets, probs[:, :2], r"distributions of shape \(8, 2, 3\): give \(8, 6, 3\)"),
        (prediction, targets, probs * 2, "distributions are no probabilities"),
        (replace(plain, k=4), np.full((8, 4), 0.25), None, "'t0' has 3 options"),
        (replace(plain, k=4), targets, None, r"targets of shape \(8, 3\): give \(8, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            train(config, FAST, Lesson(questions, p, None if d is None else Distributions(d)), tmp_path)
    with pytest.raises(ValueError, match=r"orders of shape \(2, 2\): give \(order, 3\) permutations of 0..2"):
        Lesson(questions, targets, orders=all_orders(2))
    with pytest.raises(ValueError, match="orders given beside what the teacher said"):
        Lesson(questions, targets, Distributions(probs), all_orders(K))


@HEADS
@pytest.mark.parametrize("stop", [2, 3, 7])
def test_a_killed_run_goes_on_to_the_same_weights(dropping, tmp_path, head, stop):
    """Killed before the first checkpoint, at one, and in the second epoch (5 steps each, a checkpoint every 3)."""
    questions, right = toy(40, 0)
    probs = np.random.default_rng(0).dirichlet(np.ones(K), size=(40, 6))
    args = (StudentConfig(dropping, head, "prediction", K), FAST, Lesson(questions, soft(right), Distributions(probs)))
    whole = train(*args, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(*args, tmp_path / "killed", on_step=killer(stop))
    assert (tmp_path / "killed" / "checkpoint.pt").exists() == (stop > 3)
    (tmp_path / "killed" / ".checkpoint.pt.99.part").write_bytes(b"half a checkpoint")
    torch.manual_seed(12345)  # whatever happened in between
    steps = []
    again = train(*args, tmp_path / "killed", on_step=lambda step, loss: steps.append(step))
    assert steps == list(range({2: 1, 3: 1, 7: 7}[stop], 11))  # paid again: what came after the last checkpoint
    assert as_good_as_same(whole, again) and same(again, Student.from_pretrained(tmp_path / "killed"))
    logs = [read_log(tmp_path / name) for name in ("whole", "killed")]
    assert logs[0]["losses"] == pytest.approx(logs[1]["losses"], abs=1e-4) and len(logs[0]["losses"]) == 10
    assert not list((tmp_path / "killed").glob("*checkpoint*")) and not list((tmp_path / "killed").glob(".*.part"))


def test_kill_9_of_the_process_loses_the_steps_after_its_checkpoint_only(encoder, tmp_path):
    questions, right = toy(40, 0)
    args = (StudentConfig(encoder, k=K), FAST, Lesson(questions, soft(right)))
    with forked(lambda: train(*args, tmp_path / "killed", on_step=lambda *_: time.sleep(0.2))) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "killed" / "checkpoint.pt").exists() and time.monotonic() < deadline:
            assert not os.waitpid(process, os.WNOHANG)[0], "training ended by itself"
            time.sleep(0.02)
    steps: list[int] = []
    again = train(*args, tmp_path / "killed", on_step=lambda step, loss: steps.append(step))
    assert steps == list(range(steps[0], 11)) and steps[0] > 3  # a checkpoint every 3 steps
    assert as_good_as_same(train(*args, tmp_path / "whole"), again)


def test_a_finished_folder_is_loaded_and_another_run_retrains(encoder, tmp_path, monkeypatch):
    questions, right = toy(16, 0)
    config, one = StudentConfig(encoder, k=K), replace(FAST, epochs=1)
    student = train(config, one, Lesson(questions, soft(right)), tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"left by a kill after the log was written")
    with monkeypatch.context() as patch:
        patch.setattr(training_module, "build", never)
        renamed = [replace(q, id=f"other {q.id}") for q in questions]  # an id is no content
        assert same(student, train(config, one, Lesson(renamed, soft(right)), tmp_path, on_step=never))
        assert not (tmp_path / "checkpoint.pt").exists()
        for other in (
            (config, replace(one, seed=1), Lesson(questions, soft(right))),
            (replace(config, max_length=64), one, Lesson(questions, soft(right))),
            (config, one, Lesson(questions[::-1], soft(right))),
            (config, one, Lesson(questions, soft(right[::-1]))),
        ):
            with pytest.raises(AssertionError, match="there already"):
                train(*other, tmp_path)
    assert same(
        student, train(config, one, Lesson(questions, soft(right)), tmp_path, on_step=never)
    )  # an attempt spoils nothing
    other = train(config, replace(one, seed=1), Lesson(questions, soft(right)), tmp_path)
    assert not as_good_as_same(student, other) and same(other, Student.from_pretrained(tmp_path))


def test_a_kill_while_saving_over_another_student_mixes_nothing(encoder, tmp_path, monkeypatch):
    questions, right = toy(16, 0)
    config, one = StudentConfig(encoder, k=K), replace(FAST, epochs=1, save_every=100)
    student = train(config, one, Lesson(questions, soft(right)), tmp_path)
    real = os.replace

    def killed_at_the_config(source, target):
        if str(target).endswith("permdistill.json"):
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_at_the_config)
        with pytest.raises(KeyboardInterrupt):
            train(config, replace(one, seed=1), Lesson(questions, soft(right)), tmp_path)
    with pytest.raises(FileNotFoundError):
        Student.from_pretrained(tmp_path)
    assert as_good_as_same(
        student, train(config, one, Lesson(questions, soft(right)), tmp_path)
    )  # trained anew, not the other's


def test_a_checkpoint_of_another_run_is_not_resumed(encoder, tmp_path):
    questions, right = toy(24, 0)
    config = StudentConfig(encoder, k=K)
    with pytest.raises(KeyboardInterrupt):
        train(config, FAST, Lesson(questions, soft(right)), tmp_path / "a", on_step=killer(5))
    assert (tmp_path / "a" / "checkpoint.pt").exists()
    other = replace(FAST, learning_rate=5e-4)
    resumed, fresh = (train(config, other, Lesson(questions, soft(right)), tmp_path / name) for name in ("a", "b"))
    assert as_good_as_same(resumed, fresh)


@pytest.mark.parametrize("file", ["checkpoint.pt", "best.pt", "train.json"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"{", b"[]", b"\x80\x02N."])
def test_a_damaged_file_of_a_training_is_said_and_trained_anew(encoder, tmp_path, file, content):
    questions, right = toy(24, 0)
    config, lesson = StudentConfig(encoder, k=K), Lesson(questions, soft(right))
    held = replace(FAST, epochs=3, held_out=0.25, patience=10)
    whole = train(config, held, lesson, tmp_path / "whole")
    if file == "train.json":
        train(config, held, lesson, tmp_path / "cut")
    else:
        with pytest.raises(KeyboardInterrupt):
            train(config, held, lesson, tmp_path / "cut", on_step=killer(len(read_log(tmp_path / "whole")["losses"]) - 1))
    assert (tmp_path / "cut" / file).exists()
    (tmp_path / "cut" / file).write_bytes(content)
    with pytest.warns(UserWarning, match=f"{file} is damaged"):
        again = train(config, held, lesson, tmp_path / "cut")
    assert as_good_as_same(again, whole)


def test_a_damaged_student_is_said_and_trained_anew(encoder, tmp_path):
    questions, right = toy(16, 0)
    args = (StudentConfig(encoder, k=K), replace(FAST, epochs=1), Lesson(questions, soft(right)), tmp_path)
    student = train(*args)
    weights_file = tmp_path / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1] + b"\x01")
    with pytest.warns(UserWarning, match="model.safetensors is not what was saved.*: it is trained anew"):
        again = train(*args)
    assert as_good_as_same(student, again) and same(again, train(*args, on_step=never))


def test_a_finished_student_is_loaded_where_nothing_can_be_written(encoder, tmp_path, monkeypatch):
    questions, right = toy(16, 0)
    args = (StudentConfig(encoder, k=K), replace(FAST, epochs=1), Lesson(questions, soft(right)), tmp_path)
    student = train(*args)
    (tmp_path / ".lock").unlink()

    def read_only(*names, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("unlink", "replace", "rename", "mkdir"):
        monkeypatch.setattr(os, name, read_only)
    monkeypatch.setattr("permdistill.files.FileLock.acquire", read_only)
    monkeypatch.setattr("permdistill.files._writable", lambda folder: False)
    assert same(student, train(*args, on_step=never))


@HEADS
def test_one_step_in_pieces_is_the_same_step(encoder, tmp_path, head):
    """A batch of 16 at once and in pieces (the accumulation that trainers got wrong upstream): equal up to rounding."""
    questions, right = toy(32, 0)
    results = []
    for micro_tokens in (10**6, 60):
        one = replace(FAST, epochs=1, batch_size=16, micro_tokens=micro_tokens)
        folder = tmp_path / str(micro_tokens)
        results.append(train(StudentConfig(encoder, head, k=K), one, Lesson(questions, soft(right)), folder, autocast=False))
    losses = [read_log(tmp_path / name)["losses"] for name in ("1000000", "60")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    # AdamW's first steps are near lr * sign(gradient): compare what the students say, not single weights.
    p, q = (r.predict_batch(questions, all_orders(K), autocast=False) for r in results)
    assert np.abs(p - q).max() < 1e-3


def test_orders_can_be_restricted(encoder, tmp_path, monkeypatch):
    questions, right = toy(16, 0)
    drawn, real = [], Student.encode
    monkeypatch.setattr(Student, "encode", lambda self, q, o, d=None: drawn.append((o, d)) or real(self, q, o, d))
    orders = np.array([[0, 1, 2], [2, 0, 1]])
    probs = np.broadcast_to(np.eye(K)[[0, 2]][None], (16, 2, K))  # decides for option 0 in the first, 2 in the second order
    lesson = Lesson(questions, soft(right), Distributions(probs, orders))
    train(StudentConfig(encoder, "joint", "prediction", K), FAST, lesson, tmp_path)
    plain = Lesson(questions, soft(right), orders=orders)
    train(StudentConfig(encoder, "joint", "plain", K), FAST, plain, tmp_path)
    assert all({tuple(o) for o in shown[:, 0]} == {(0, 1, 2), (2, 0, 1)} for shown, _ in drawn[2:]) and len(drawn) == 4
    del drawn[2:]
    for shown, decisions in drawn:
        assert {tuple(o) for o in shown[:, 0]} == {(0, 1, 2), (2, 0, 1)}
        assert (decisions[:, 0] == np.where(shown[:, 0, 0] == 0, 0, 2)).all()


@pytest.mark.parametrize(("head", "times"), [("shared_prefix", 1), ("bi_encoder", 1), ("joint", FAST.epochs)])
def test_no_epoch_tokenises_anew_what_stays_the_same(encoder, tmp_path, monkeypatch, head, times):
    questions, right = toy(16, 0)
    calls, real = [], Student.encode
    monkeypatch.setattr(Student, "encode", lambda self, *args: calls.append(args) or real(self, *args))
    train(StudentConfig(encoder, head, "plain", K), FAST, Lesson(questions, soft(right)), tmp_path)
    assert len(calls) == times


def test_the_log_says_what_was_run(encoder, tmp_path):
    questions, right = toy(16, 0)
    losses = []
    train(
        StudentConfig(encoder, k=K),
        FAST,
        Lesson(questions, soft(right)),
        tmp_path,
        on_step=lambda _, loss: losses.append(loss),
    )
    log = read_log(tmp_path)
    assert log["losses"] == losses and len(losses) == 4
    assert log["student"]["k"] == K and log["training"]["learning_rate"] == 1e-3 and log["questions"] == 16
    assert log["questions_per_second"] == pytest.approx(32 / log["seconds"])
    assert "yes" not in json.dumps({**log, "student": None})  # numbers and configs, no dataset text


def test_a_diverging_run_says_so(encoder, tmp_path):
    questions, right = toy(8, 0)
    wild = replace(FAST, epochs=20, learning_rate=1e30, warmup=0.0)
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        train(StudentConfig(encoder, k=K), wild, Lesson(questions, soft(right)), tmp_path)


def black_box(right: np.ndarray, n_draws: int = 6, seed: int = 0) -> Draws:
    """Orders (item, draw, K), and decisions of a teacher that is right in half of them and names nothing in some."""
    rng = np.random.default_rng(seed)
    orders = np.stack([rng.permuted(np.arange(K)[None].repeat(n_draws, 0), axis=1) for _ in right])
    decisions = np.where(
        rng.random((len(right), n_draws)) < 0.5, right[:, None], rng.integers(K, size=(len(right), n_draws))
    )
    decisions[:, 1] = -1
    return Draws(orders, decisions)


def test_error_correction_from_black_box_decisions(encoder, tmp_path, monkeypatch):
    questions, right = toy(24, 0)
    lesson = Lesson(questions, soft(right), drawn := black_box(right))
    seen = []
    encode = Student.encode

    def recording(self, questions, orders, decisions=None):
        seen.append((orders.copy(), decisions.copy()))
        return encode(self, questions, orders, decisions)

    monkeypatch.setattr(Student, "encode", recording)
    config = StudentConfig(encoder, "per_option", "prediction", K, 64)
    first = train(config, FAST, lesson, tmp_path / "a")
    assert len(seen) == FAST.epochs
    for orders, decisions in seen:  # each is one of the item's own draws
        matches = (drawn.orders == orders).all(axis=-1) & (drawn.decisions == decisions)
        assert matches.any(axis=1).all() and (decisions >= 0).all()
    assert (seen[0][0] != seen[1][0]).any()
    assert as_good_as_same(first, train(config, FAST, lesson, tmp_path / "b"))
    monkeypatch.undo()
    assert same(first, train(config, FAST, lesson, tmp_path / "a"))  # loaded
    assert first.predict_batch(questions[:2], all_orders(K), np.zeros((2, 6), int)).shape == (2, 6, K)


def test_misfitting_black_box_decisions_are_refused(encoder, tmp_path):
    questions, right = toy(8, 0)
    orders, decisions = (said := black_box(right)).orders, said.decisions
    prediction, plain = (StudentConfig(encoder, "joint", inputs, K, 64) for inputs in ("prediction", "plain"))
    silent = np.where(np.arange(8)[:, None] == 5, -1, decisions)
    for config, drawn, message in (
        (plain, (orders, decisions), "draws given: draws go with"),
        (prediction, (orders[:7], decisions), r"shape \(7, 6, 3\) .*give \(8, draw, 3\)"),
        (prediction, (orders * 0, decisions), "give permutations of 0..2"),
        (prediction, (orders, decisions + 3), "option indices or -1"),
        (prediction, (orders, silent), r"question 5 has no decision \(1 in all\)"),
    ):
        with pytest.raises(ValueError, match=message):
            train(config, FAST, Lesson(questions, soft(right), Draws(*drawn)), tmp_path)
    with pytest.raises(ValueError, match="orders given beside what the teacher said"):
        Lesson(questions, soft(right), said, all_orders(K))


HELD = replace(FAST, epochs=6, held_out=0.25, patience=6)


def test_held_out_questions_are_not_trained_on_and_their_best_epoch_is_kept(encoder, tmp_path, monkeypatch):
    questions, right = toy(40, 0)
    questions[1] = replace(questions[1], question=questions[0].question)  # questions of one wording stay together
    seen: list[set[str]] = []
    real = Student.encode
    monkeypatch.setattr(Student, "encode", lambda self, q, o, d=None: seen.append({x.id for x in q}) or real(self, q, o, d))
    kls = iter([0.9, 0.5, 0.3, 0.4, 0.2, 0.6])
    monkeypatch.setattr(training_module._Trainer, "_held_out_kl", lambda *args: next(kls))
    student = train(StudentConfig(encoder, k=K), HELD, Lesson(questions, soft(right)), tmp_path)
    trained_on = set.union(*seen)
    out = {q.id for q in questions} - trained_on
    assert 5 <= len(out) <= 15 and all(ids == trained_on for ids in seen)
    wordings = {q.question for q in questions if q.id in out}
    assert not wordings & {q.question for q in questions if q.id in trained_on}
    log = read_log(tmp_path)
    assert log["held_out_kl"] == [0.9, 0.5, 0.3, 0.4, 0.2, 0.6] and log["questions"] == len(trained_on)
    assert not (tmp_path / "best.pt").exists()

    # The fifth epoch's weights are those that a run stopped there has at that moment.
    monkeypatch.setattr(training_module._Trainer, "_held_out_kl", lambda self, *args: taken(self.student))
    snapshots: list[dict] = []

    def taken(student: Student) -> float:
        snapshots.append({name: value.clone() for name, value in student.model.state_dict().items()})
        return 1.0 / len(snapshots)

    last = train(StudentConfig(encoder, k=K), HELD, Lesson(questions, soft(right)), tmp_path / "again")
    for name, value in student.model.state_dict().items():
        torch.testing.assert_close(value, snapshots[4][name], rtol=1e-4, atol=1e-5)
    assert same(last, Student.from_pretrained(tmp_path / "again")) and not as_good_as_same(student, last)


def test_training_stops_when_patience_ends(encoder, tmp_path, monkeypatch):
    questions, right = toy(40, 0)
    kls = iter([0.3, 0.2, 0.4, 0.2001])
    monkeypatch.setattr(training_module._Trainer, "_held_out_kl", lambda *args: next(kls))
    train(StudentConfig(encoder, k=K), replace(HELD, patience=2), Lesson(questions, soft(right)), tmp_path)
    assert read_log(tmp_path)["held_out_kl"] == [0.3, 0.2, 0.4, 0.2001]


@HEADS
def test_held_out_kl_is_that_of_the_student_and_moves_nothing(encoder, tmp_path, head):
    """The log's value is KL by predict_batch, in one order: exact for the heads that have no other."""
    questions, right = toy(40, 0)
    config = replace(HELD, epochs=1)
    exact = {"autocast": False}  # bfloat16 rounds otherwise in other company
    student = train(StudentConfig(encoder, head, k=K), config, Lesson(questions, soft(right)), tmp_path / "held", **exact)
    (kl,) = read_log(tmp_path / "held")["held_out_kl"]
    kept, out = Lesson(questions, soft(right)).split(0.25, config.seed)
    P = student.predict_batch(out.questions, all_orders(K), **exact)
    by_order = (out.targets[:, None] * (np.log(out.targets)[:, None] - np.log(P))).sum(-1)
    if head != "joint":
        assert kl == pytest.approx(by_order[:, 0].mean(), rel=1e-5)
    assert by_order.min(axis=1).mean() - 1e-6 <= kl <= by_order.max(axis=1).mean() + 1e-6
    # Training on the rest alone is the same training.
    alone = train(StudentConfig(encoder, head, k=K), replace(FAST, epochs=1), kept, tmp_path / "alone", **exact)
    assert as_good_as_same(student, alone)


@pytest.mark.parametrize("stop", [3, 11, 12])
def test_a_killed_run_with_held_out_questions_goes_on_to_the_same_weights(dropping, tmp_path, stop):
    questions, right = toy(40, 0)
    probs = np.random.default_rng(0).dirichlet(np.ones(K), size=(40, 6))
    args = (
        StudentConfig(dropping, "joint", "prediction", K),
        replace(HELD, epochs=4),
        Lesson(questions, soft(right), Distributions(probs)),
    )
    whole = train(*args, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(*args, tmp_path / "killed", on_step=killer(stop))
    again = train(*args, tmp_path / "killed")
    assert as_good_as_same(whole, again)
    logs = [read_log(tmp_path / name) for name in ("whole", "killed")]
    assert logs[0]["held_out_kl"] == pytest.approx(logs[1]["held_out_kl"], abs=1e-4) and len(logs[0]["held_out_kl"]) == 4


def test_held_out_must_leave_something(encoder, tmp_path):
    questions, right = toy(2, 0)
    questions = [replace(q, question="same ?") for q in questions]
    with pytest.raises(ValueError, match=r"held_out = 0.25 of 1 questions leaves none to train on"):
        train(StudentConfig(encoder, k=K), HELD, Lesson(questions, soft(right)), tmp_path)


def test_options_that_are_off_change_no_key():
    assert TrainingConfig(patience=5).key == TrainingConfig().key != TrainingConfig(held_out=0.1).key
    assert TrainingConfig(held_out=0.1, patience=5).key != TrainingConfig(held_out=0.1).key


def test_no_epochs_leave_the_encoder_as_it_is_and_fit_the_scale(encoder, tmp_path):
    questions, right = toy(40, 0)
    config = StudentConfig(encoder, "bi_encoder", k=K)
    student = train(config, replace(FAST, epochs=0), Lesson(questions, soft(right)), tmp_path)
    untouched = build(config, 0)
    assert same(student, untouched) and student.scale > 1 and read_log(tmp_path)["losses"] == []
    untouched.scale = student.scale
    asked = (questions, all_orders(K))
    assert untouched.predict_batch(*asked) == pytest.approx(
        Student.from_pretrained(tmp_path).predict_batch(*asked), abs=1e-6
    )
