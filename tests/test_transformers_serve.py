"""Somebody else's server: `transformers serve`, started by permdistill.api.server with a real model, asked for decisions.

It starts with ``transformers serve FOLDER --port PORT`` (needs fastapi and uvicorn), offline, in about ten seconds. Two of
its ways need care (transformers 5.23): it decodes greedily at any temperature unless the request's own field
``generation_config`` says do_sample, and it leaves out logprobs without an error.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import httpx2
import numpy as np
import pytest
import torch
from scipy.stats import binom
from test_labels import CHAT, make_model

from permdistill import scores
from permdistill.api.answers import NO_ANSWER
from permdistill.api.ask import ask
from permdistill.api.jobs import CUT, NO_LOGPROBS, NO_OPTION, Call, Job, calls_in_orders, drawn
from permdistill.api.replies import Replies
from permdistill.api.server import Server
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question
from permdistill.sources import Source
from permdistill.teachers import load_teacher

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

LETTERS = TEMPLATES["letters"]
QUESTIONS = [
    Question("fly", "", "Which animal can fly?", ("a cow", "an eagle")),
    Question("hot", "", "Which of the two is hotter?", ("an ice cube", "a candle flame")),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("smollm2-135m", dtype="float32") as running:
        yield running
    assert not answers(running)
    running.stop()  # once more does nothing


def answers(server: Server) -> bool:
    try:
        return httpx2.get(server.endpoint.base_url.replace("/v1", "/health"), timeout=5).is_success
    except httpx2.HTTPError:
        return False


@pytest.mark.long
def test_decisions_are_the_white_box_distribution(server, tmp_path):
    orders = [(0, 1), (1, 0)]
    calls = [Call(q, order, draw) for q in QUESTIONS for order in orders for draw in range(24)]
    job = Job(server.endpoint, LETTERS, calls, tries=8)
    report = ask(job, Replies(tmp_path), concurrency=2)
    assert report.complete == 2, report
    found = drawn(job, Replies(tmp_path)).decisions.reshape(4, 24)
    teacher = load_teacher("smollm2-135m", torch.float32)
    log_probs = [teacher.log_probs([q], np.array(orders), LETTERS).astype(float) for q in QUESTIONS]
    expected = scores.probabilities(np.concatenate(log_probs)).reshape(4, 2)[:, 1]
    seconds = (found == 1).sum(axis=1)
    print(report, seconds, 24 * expected)
    assert (seconds >= binom.ppf(0.0005, 24, expected)).all()
    assert (seconds <= binom.ppf(0.9995, 24, expected)).all()
    assert 0 < seconds.sum() < 96  # it samples


@pytest.mark.slow
def test_logprobs_that_a_server_leaves_out_are_a_listed_failure(server, tmp_path):
    job = Job(server.endpoint, LETTERS, calls_in_orders(QUESTIONS[:1]), mode="logprobs", tries=2)
    report = ask(job, Replies(tmp_path))
    assert report.failed == {f"{NO_LOGPROBS} in 2 replies": ["fly"]} and report.unparsed == 4


@pytest.mark.long
def test_answers_of_whole_replies(server, tmp_path):
    """This model says "B. an eagle": a label with its option's text, whole, or cut and so nothing."""
    calls = calls_in_orders(QUESTIONS)
    job = Job(replace(server.endpoint, reply_tokens=24), LETTERS, calls, "answer", tries=4)
    report = ask(job, Replies(tmp_path), concurrency=2)
    print(report)
    assert report.read["option"] + report.read["label"] >= 2 and report.completion_tokens <= 24 * report.replies
    cut = Job(replace(server.endpoint, reply_tokens=2), LETTERS, calls, "answer", tries=1)
    assert set(ask(cut, Replies(tmp_path)).read) <= {CUT, "label"}


@pytest.mark.long
def test_a_thinking_template_behind_a_server(tmp_path):
    """The model of tests/test_labels.py: a thought without end, or a label, as the chat template is told."""
    thinks = {"\n": {"<think>": 1.0}, "<think>": {"A": 1.0}, "\n\n": {"B": 1.0, "A": 0.9}}
    ends = {"A": {"<|im_end|>": 1.0}, "B": {"<|im_end|>": 1.0}}
    name = make_model(tmp_path / "thinker", CHAT, thinks | ends)
    calls = calls_in_orders(QUESTIONS[:1])
    with Server(name, dtype="float32") as server:
        job = Job(replace(server.endpoint, reply_tokens=8), LETTERS, calls, "answer", tries=1)
        report = ask(job, Replies(tmp_path / "replies"))
        quick = {"chat_template_kwargs": {"enable_thinking": False}}
        told = replace(server.endpoint, extra_body=dict(server.endpoint.extra_body) | quick)
        quickly = ask(Job(told, LETTERS, calls), Replies(tmp_path / "replies"))
    print(report, quickly)
    assert report.complete == 0 and quickly.complete == 1


@pytest.mark.long
@pytest.mark.parametrize(
    "words", [("A", " trout"), ("N", "o", "."), ("A", ",", " B")], ids=["prose", "refusal", "two labels"]
)
def test_what_names_no_single_option_is_a_counted_failure(words, tmp_path):
    """Of a model that always says these words, in both modes."""
    name = make_model(tmp_path / "model", CHAT, {a: {b: 1.0} for a, b in pairwise(["\n", *words, "<|im_end|>"])})
    calls = calls_in_orders(QUESTIONS[:1])
    with Server(name, dtype="float32") as server:
        for mode, why in (("decisions", NO_OPTION), ("answer", NO_ANSWER)):
            job = Job(replace(server.endpoint, reply_tokens=8), LETTERS, calls, mode, tries=2)
            report = ask(job, Replies(tmp_path / mode))
            assert report.complete == 0 and report.read == {why: 4}, report
            assert report.failed == {f"{why} in 2 replies": ["fly"]}
            assert (drawn(job, Replies(tmp_path / mode), partial=True).decisions == -1).all()


@pytest.mark.long
def test_server_ends_with_the_process_that_started_it_however_that_ends():
    script = (
        "from permdistill.api.server import Server; s = Server('smollm2-135m'); "
        "print(s.process.pid, s.endpoint.base_url, flush=True); input()"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        pid, url = process.stdout.readline().split()
        assert httpx2.get(url.replace("/v1", "/health"), timeout=20).is_success
        process.send_signal(signal.SIGKILL)
    for _ in range(100):
        try:
            os.kill(int(pid), 0)
            httpx2.get(url.replace("/v1", "/health"), timeout=5)
        except (ProcessLookupError, httpx2.HTTPError):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"the server at {url} outlived its process")


def test_our_own_servers_port_is_never_free_and_it_gets_no_key(monkeypatch):
    """What another process on this machine may try: to bind the port while the server loads, and to be sent the key."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr(
        "permdistill.api.server._TIED",
        "import socket, sys, time; s = socket.socket(fileno=int(sys.argv[-1])); "
        "c, _ = s.accept(); c.recv(999); c.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n'); time.sleep(60)",
    )
    monkeypatch.setattr("permdistill.api.server.sources.find", lambda name: Source(lambda: name))
    tried = []

    class Stranger(subprocess.Popen):
        def __init__(self, command, env, **settings):
            port = int(command[command.index("--port") + 1])
            for _ in range(2):  # before the child is there, and when it is
                with socket.socket() as stranger, pytest.raises(OSError):
                    stranger.bind(("127.0.0.1", port))
                tried.append(env)
                if len(tried) == 1:
                    super().__init__(command, env=env, **settings)

    monkeypatch.setattr("permdistill.api.server.subprocess.Popen", Stranger)
    with Server("a-model", key_name="OPENAI_API_KEY") as server:
        assert server.endpoint.key() == "" and len(tried) == 2
        assert "sk-secret" not in tried[0].values()


def test_somebody_elses_server_is_taken_as_it_is():
    with Server("a-model", "https://api.example.com/v1", limit_field="max_completion_tokens") as server:
        assert server.process is None and server.teacher == ""
        assert (server.endpoint.model, server.endpoint.limit_field) == ("a-model", "max_completion_tokens")
        assert dict(server.endpoint.extra_body) == {}


@pytest.mark.long
def test_a_server_that_cannot_start_is_told():
    with pytest.raises(RuntimeError, match="has ended by itself: run `transformers serve no-such-folder`"):
        Server("no-such-folder")
