"""Answer mode from the plan to a student, on a real server: `transformers serve` with a teacher of 0.5B.

It takes more than ten minutes on one core."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from permdistill.api.jobs import Drawn, Job, drawn, drawn_calls
from permdistill.api.replies import FILE, Replies
from permdistill.api.server import SAMPLING, Server
from permdistill.configs import StudentConfig, TrainingConfig
from permdistill.lessons import Lesson
from permdistill.paper.tasks import load_task
from permdistill.prompts import TEMPLATES
from permdistill.questions import unlabelled
from permdistill.training import train

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytestmark = pytest.mark.long

N, TOKENS = 100, 24  # items, and tokens of a reply


def replied(folder: Path) -> list[str]:
    """The keys of all replies, as often as they were paid for."""
    path = folder / FILE
    return re.findall(r'"key": ?"(\w+)"', path.read_text(encoding="utf-8")) if path.exists() else []


def planned(command: list[str]) -> tuple[int, int, int]:
    """Calls in the store, calls to make, and completion tokens, of a dry run."""
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=True)
    assert f"{N} items, {N} calls: " in done.stdout
    stored, lacking = re.search(r"(\d+) in the store, (\d+) to make", done.stdout).groups()
    return int(stored), int(lacking), int(re.search(r"and ([\d,]+) completion", done.stdout)[1].replace(",", ""))


def test_plan_a_hundred_items_a_kill_and_a_student(tmp_path):
    replies, said = tmp_path / "replies", tmp_path / "said.jsonl"
    with Server("qwen2.5-coder-0.5b", wait=600, timeout=300, reply_tokens=TOKENS) as server:
        command = [sys.executable, "-m", "permdistill.cli", "ask", "--base-url", server.endpoint.base_url]
        command += ["--model", server.endpoint.model, "--key-name", "", "--extra-body", json.dumps(SAMPLING)]
        command += ["--tasks", "arc_easy", "--splits", "train", "--limit", str(N), "--mode", "answer", "--draws", "1"]
        command += ["--max-reply-tokens", str(TOKENS), "--concurrency", "1", "--timeout", "300", "--replies", str(replies)]
        assert planned(command) == (0, N, N * TOKENS)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as asking:
            while len(replied(replies)) < N // 3:
                assert asking.poll() is None
                time.sleep(0.2)
            asking.send_signal(signal.SIGKILL)
        before = replied(replies)
        stored, lacking, tokens = planned(command)
        assert 0 < stored < N == stored + lacking and tokens == lacking * TOKENS
        done = subprocess.run([*command, "--records", str(said)], capture_output=True, text=True)
    print(done.stdout, done.stderr)
    after = replied(replies)
    assert after[: len(before)] == before and set(Counter(after).values()) == {1}  # nothing was paid twice
    records = [json.loads(line) for line in said.read_text(encoding="utf-8").splitlines()]
    failed = sum(record["decision"] is None for record in records)
    assert len(records) == N and (done.returncode != 0) == bool(failed) and failed < N // 2

    questions = unlabelled(load_task("arc_easy", "train").first(N).questions)
    job, store = Job(server.endpoint, TEMPLATES["letters"], drawn_calls(questions, 1), "answer"), Replies(replies)
    found = drawn(job, store)
    some = found.counts.sum(axis=1) > 0
    assert some.sum() == N - failed
    rules = Counter(row["rule"] for key in after if "rule" in (row := store.get(key) or {}))
    print(rules)
    assert rules.total() == N - failed  # each reply's rule is recorded
    targets = Drawn(found.orders[some], found.decisions[some]).targets()
    config = StudentConfig("all-MiniLM-L6-v2", head="bi_encoder", k=targets.shape[1])
    taught = [question for question, one in zip(questions, some, strict=True) if one]
    student = train(config, TrainingConfig(epochs=1, learning_rate=1e-4), Lesson(taught, targets), tmp_path / "student")
    p = student.predict(questions[0].question, list(questions[0].options))
    assert p.sum() == pytest.approx(1, abs=1e-4) and np.all(p > 0)
