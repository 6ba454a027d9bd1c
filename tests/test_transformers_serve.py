"""Somebody else's server: `transformers serve`, started here with a real model, asked for decisions.

It starts with ``transformers serve FOLDER --port PORT`` (needs fastapi and uvicorn), offline, in about ten seconds. Two of
its ways need care (transformers 5.23): it decodes greedily at any temperature unless the request's own field
``generation_config`` says do_sample, and it leaves out logprobs without an error.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from scipy.stats import binom

from permdistill import scores
from permdistill.blackbox import NO_LOGPROBS, Call, Job, ask, calls_in_orders, drawn
from permdistill.data import Question
from permdistill.endpoint import Endpoint
from permdistill.prompts import TEMPLATES
from permdistill.replies import Replies
from permdistill.teachers import load_teacher

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

LETTERS = TEMPLATES["letters"]
SAMPLING = {"generation_config": json.dumps({"do_sample": True, "top_k": 0})}
QUESTIONS = [
    Question("fly", "", "Which animal can fly?", ("a cow", "an eagle")),
    Question("hot", "", "Which of the two is hotter?", ("an ice cube", "a candle flame")),
]


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("smollm2-135m", torch.float32)


@pytest.fixture(scope="module")
def endpoint(teacher) -> Iterator[Endpoint]:
    folder = teacher.tokenizer.name_or_path
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", folder]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(240):
                assert process.poll() is None, "transformers serve has ended"
                try:
                    httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.5)
            yield Endpoint(f"http://127.0.0.1:{port}/v1", folder, extra_body=SAMPLING)
        finally:
            process.terminate()


@pytest.mark.long
def test_decisions_are_the_white_box_distribution(endpoint, teacher, tmp_path):
    orders = [(0, 1), (1, 0)]
    calls = [Call(q, order, draw) for q in QUESTIONS for order in orders for draw in range(32)]
    report = ask(Job(endpoint, LETTERS, calls, tries=8), Replies(tmp_path), concurrency=2)
    assert report.complete == 2, report
    found = drawn(Job(endpoint, LETTERS, calls, tries=8), Replies(tmp_path)).decisions.reshape(4, 32)
    expected = scores.probabilities(teacher.log_probs(QUESTIONS[:1], np.array(orders), LETTERS).astype(float))[0]
    expected = np.concatenate(
        [expected, scores.probabilities(teacher.log_probs(QUESTIONS[1:], np.array(orders), LETTERS).astype(float))[0]]
    )
    seconds = (found == 1).sum(axis=1)
    print(report, seconds, 32 * expected[:, 1])
    assert (seconds >= binom.ppf(0.0005, 32, expected[:, 1])).all()
    assert (seconds <= binom.ppf(0.9995, 32, expected[:, 1])).all()
    assert 0 < seconds.sum() < 128  # it samples


@pytest.mark.long
def test_logprobs_that_a_server_leaves_out_are_a_listed_failure(endpoint, tmp_path):
    job = Job(endpoint, LETTERS, calls_in_orders(QUESTIONS[:1]), mode="logprobs", tries=2)
    report = ask(job, Replies(tmp_path))
    assert report.failed == {f"{NO_LOGPROBS} in 2 replies": ["fly"]} and report.unparsed == 4
