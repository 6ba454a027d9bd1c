"""White box and black box agree on one real model: SmolLM2-135M behind a real HTTP server, asked one token at a time,
against the same model read through the trie."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from openai_server import serving, teacher_backend

from permdistill import cli, scores, teachers
from permdistill.api.ask import ask
from permdistill.api.endpoint import Endpoint
from permdistill.api.jobs import Call, Job, calls_in_orders, drawn, drawn_calls, probabilities
from permdistill.api.replies import Replies
from permdistill.configs import StudentConfig, TrainingConfig
from permdistill.lessons import Lesson
from permdistill.measure import metrics
from permdistill.measure.formats import read
from permdistill.measure.report import measure
from permdistill.orders import all_orders, order_set
from permdistill.paper.profiles import load_task
from permdistill.prompts import TEMPLATES, Template
from permdistill.questions import Question, unlabelled
from permdistill.teachers import CausalTeacher, load_teacher
from permdistill.training import train

LETTERS = TEMPLATES["letters"]
ANIMALS = ("cow", "eagle", "trout", "snail", "bee")
QUESTIONS = [
    Question(f"{verb} {a} {b}", "", f"Which animal can {verb}?", (f"a {a}", f"a {b}"))
    for verb, a, b in product(("fly", "swim"), ANIMALS, ANIMALS)
    if a < b
]


@pytest.fixture(scope="module")
def teacher() -> CausalTeacher:
    return load_teacher("smollm2-135m", torch.float32)


@pytest.fixture(scope="module")
def url(teacher):
    with serving(teacher_backend(teacher)) as server:
        yield server.url


def white_box(teacher: CausalTeacher, questions: list[Question], orders: np.ndarray, template: Template) -> np.ndarray:
    return scores.probabilities(
        np.concatenate([teacher.log_probs([q], orders, template) for q in questions]).astype(np.float64)
    )


def agreement(
    teacher: CausalTeacher, url: str, questions: list[Question], folder: Path, original_only: bool
) -> tuple[float, float]:
    """Share of items with a fitting histogram of 64 draws, and the largest difference between listed and white-box
    probabilities. ``original_only``: draws and probabilities in the original order, else in all."""
    endpoint, k = Endpoint(url, "smollm2"), len(questions[0].options)
    orders = all_orders(k)[:1] if original_only else all_orders(k)
    calls = [Call(q, tuple(range(k)), draw) for q in questions for draw in range(64)]
    decisions = Job(endpoint, LETTERS, calls if original_only else drawn_calls(questions, 64), tries=8)
    listed = Job(endpoint, LETTERS, calls_in_orders(questions, orders), mode="logprobs", variants=False)
    store = Replies(folder)
    for job in (listed, decisions):
        report = ask(job, store)
        assert report.complete == len(questions), report
    found = drawn(decisions, store)
    expected = white_box(teacher, questions, orders, LETTERS)
    P, worst = probabilities(listed, store)
    assert worst == 0  # every label is among the twenty
    fits = metrics.inside_binomial(found.counts, expected.mean(axis=1)).mean()
    difference = float(np.abs(P - expected).max())
    print(f"{len(questions)} items: {fits:.1%} fit, largest difference {difference:.1e}; {report}")
    return float(fits), difference


@pytest.mark.parametrize("original_only", [True, False])
def test_black_box_agrees_with_white_box(teacher, url, original_only, tmp_path):
    fits, difference = agreement(teacher, url, QUESTIONS, tmp_path, original_only)
    assert fits >= 0.95 and difference < 1e-3


@pytest.mark.long
@pytest.mark.parametrize("task, original_only", [("arc_easy", True), ("piqa", False)])
def test_black_box_agrees_with_white_box_on_100_items(teacher, url, task, original_only, tmp_path):
    questions = unlabelled(load_task(task, "test").first(100).questions)
    fits, difference = agreement(teacher, url, questions, tmp_path, original_only)
    assert fits >= 0.95 and difference < 1e-3


@pytest.mark.parametrize("name", ["summaries", "brief"])
def test_start_of_the_answer_is_gone_on_from(teacher, url, name, tmp_path):
    """Templates with an answer_prefix: the chat ends in the assistant's started turn."""
    questions = [Question("s", "A cat sat on a mat.", "Which Summary is more fluent?", ("A cat sat.", "Cat mat sat."))]
    job = Job(Endpoint(url, "smollm2"), TEMPLATES[name], calls_in_orders(questions), mode="logprobs", variants=False)
    ask(job, Replies(tmp_path))
    P, _ = probabilities(job, Replies(tmp_path))
    assert np.abs(P - white_box(teacher, questions, all_orders(2), TEMPLATES[name])).max() < 1e-3


WORDS = "zebra yak wolf viper urchin tiger swan robin quail puma otter newt mole lynx koala jay ibis hare goat fox eagle"
MANY = [f"a {word}" for word in (*WORDS.split(), "dingo", "cobra", "bear", "ant", "deer")]


@pytest.mark.long
@pytest.mark.parametrize("k, name", [(10, "williams"), (10, "cyclic"), (26, "cyclic")])
def test_many_options_go_all_the_way_with_a_real_llm(teacher, url, k, name, tmp_path, monkeypatch, capsys):
    """Scored, audited, measured, asked of a server, and a student of MiniLM taught from either, from the command line on."""
    monkeypatch.setattr(teachers, "load_teacher", lambda *arguments: teacher)
    questions = [Question(verb, "", f"Which animal can {verb} best?", tuple(MANY[:k])) for verb in ("fly", "swim", "run")]
    path, said, asked = (tmp_path / file for file in ("mine.jsonl", "said.jsonl", "asked.jsonl"))
    rows = [{"id": q.id, "question": q.question, "options": q.options, "answer": 1} for q in questions]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    own = ["--questions", str(path), "--orders", name]
    score = ["--teacher", "smollm2-135m", "--dtype", "float32", "--scores", str(tmp_path / "scores")]
    cli.main(["score", *own, *score, "--records", str(said)])
    cli.main(["audit", *own, *score])
    assert "3 questions re-scored" in capsys.readouterr().out
    server = ["--base-url", url, "--model", "smollm2", "--replies", str(tmp_path / "replies")]
    cli.main(["ask", *own, *server, "--mode", "logprobs", "--records", str(asked)])
    here, there = (read(file) for file in (said, asked))
    assert (here.counts == k).all() and (here.orders == there.orders).all()
    for start in here.starts:  # labels that are not among the 20 most probable tokens have 0
        p, q = (records.p[start : start + k] for records in (here, there))
        assert q == pytest.approx(np.where(q > 0, p, 0) / p[q > 0].sum(), abs=2e-3)
    for number, file in enumerate((said, asked)):
        report = measure(file, path)
        assert "accuracy" in str(report) and len(report.everything()) > 1000
        (block,) = report.records.blocks()
        lesson = Lesson(questions, block.P.mean(axis=1), orders=order_set(name, k))
        config = StudentConfig("all-MiniLM-L6-v2", "per_option", "plain", k, 64)
        student = train(config, TrainingConfig(epochs=1), lesson, tmp_path / f"student{number}")
        P = student.predict_batch(questions, order_set(name, k))
        assert P.shape == (3, k, k) and np.allclose(P.sum(axis=-1), 1, atol=1e-4)
