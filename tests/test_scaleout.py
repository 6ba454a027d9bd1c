"""Several workers fill the store as one process does. What Ray itself does is in the long tests (it takes half a minute to
start); the others put a stand-in of a few lines in its place, which hands out blocks one after the other."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from permdistill import cli, scaleout, scores, teachers
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question
from permdistill.scaleout import Workers
from permdistill.scores import Store
from permdistill.teachers import PlantedTeacher

LETTERS = TEMPLATES["letters"]
TESTS = Path(__file__).parent


def make_questions(n: int) -> list[Question]:
    """Of 2 and 3 options; every fourth shares a passage with the next one."""
    return [
        Question(f"q{i}", f"Passage {i // 4}." if i % 4 < 2 else "", f"Question {i}?", ("a", f"b{i}", "c")[: 3 - i % 4 // 3])
        for i in range(n)
    ]


class Teacher(PlantedTeacher):
    """Planted answers for any number of options; without bias, which has one length."""

    def log_probs(self, questions, orders, template):
        self.bias = np.linspace(1, 0, orders.shape[1])
        return super().log_probs(questions, orders, template)

    @property
    def model_key(self) -> str:
        return "planted"


class Slow(Teacher):
    """Takes ``seconds`` for a group, and writes down each question that it has worked for, and by whom it was made."""

    folder: Path
    seconds: float

    def log_probs(self, questions, orders, template):
        time.sleep(self.seconds)
        note(self.folder / "paid", *(question.id for question in questions))
        return super().log_probs(questions, orders, template)


def note(path: Path, *lines: str) -> None:
    with path.open("a") as file:
        file.write("".join(f"{line}\n" for line in lines))


def make_teacher(questions: list[Question]) -> Teacher:
    rng = np.random.default_rng(0)
    return Teacher({q.id: rng.normal(size=len(q.options)) for q in questions}, np.zeros(1))


def make_slow(questions: list[Question], folder: Path, seconds: float) -> Slow:
    teacher = Slow(make_teacher(questions).preferences, np.zeros(1))
    teacher.folder, teacher.seconds = folder, seconds
    note(folder / "workers", str(os.getpid()))
    return teacher


def one_process(questions: list[Question], folder: Path) -> bytes:
    """The file that one process makes."""
    store = Store(folder)
    scores.score(store, make_teacher(questions), questions, LETTERS)
    return store.compact().read_bytes()


def stored(folder: Path) -> Counter[str]:
    """How often each key stands in the shards."""
    return Counter(key for path in folder.glob("*.parquet") for key in pq.read_table(path)["key"].to_pylist())


# --------------------------------------------------------------------------------------------------------------------
# Without Ray


class StandIn:
    """What :mod:`permdistill.scaleout` uses of Ray, one block after the other in this process; the first one comes twice."""

    def __init__(self) -> None:
        context = SimpleNamespace(copy=lambda: SimpleNamespace())
        self.data = SimpleNamespace(
            range=self.range,
            ActorPoolStrategy=lambda **settings: settings,
            DataContext=SimpleNamespace(get_current=lambda: context, current=nullcontext),
        )
        self.blocks: list[np.ndarray] = []

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def range(self, n: int, override_num_blocks: int) -> StandIn:
        self.blocks = np.array_split(np.arange(n), override_num_blocks)
        return self

    def map_batches(self, worker, fn_constructor_args, **settings) -> StandIn:
        self.worker, self.settings = worker(*fn_constructor_args), settings
        return self

    def iter_batches(self, **settings):
        for block in [self.blocks[0], *self.blocks]:
            yield {name: np.array(values, dtype=object) for name, values in self.worker({"id": block}).items()}


@pytest.fixture
def ray(monkeypatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(scaleout, "_ray", lambda: stand_in)
    return stand_in


def test_the_store_is_that_of_one_process_and_a_block_done_twice_is_stored_once(ray, tmp_path):
    questions = make_questions(40)
    store = Store(tmp_path / "workers")
    make = partial(make_teacher, questions)
    assert scaleout.score(store, Workers(make, "planted", 2), [*questions, questions[0]], LETTERS) == 40
    assert ray.settings["num_cpus"] == 1 and ray.settings["num_gpus"] == 0
    assert len(stored(store.folder)) == 40 and set(stored(store.folder).values()) == {1}
    assert store.compact().read_bytes() == one_process(questions, tmp_path / "one")


def test_blocks_are_small_and_enough_for_all_workers(ray, tmp_path):
    questions = [Question(f"q{i}", "", f"{i}?", ("a", "b")) for i in range(400)]
    for n, workers, expected in ((400, 2, 50), (40, 2, 20), (5, 2, 5)):
        store = Store(tmp_path / f"{n}")
        scaleout.score(store, Workers(partial(make_teacher, questions), "planted", workers), questions[:n], LETTERS)
        assert len(ray.blocks) == expected


def test_a_rerun_hands_out_what_is_missing_only(ray, tmp_path, monkeypatch):
    questions, store = make_questions(12), Store(tmp_path)
    make = partial(make_teacher, questions)
    scores.score(store, make(), questions[:8], LETTERS)
    assert scaleout.score(store, Workers(make, "planted", 2), questions, LETTERS) == 4
    assert sum(map(len, ray.worker.groups)) == 4
    monkeypatch.setattr(scaleout, "_ray", None)  # is not called
    assert scaleout.score(store, Workers(make, "planted", 2), questions, LETTERS) == 0


def test_what_a_worker_refuses_is_an_error_before_any_compute(ray, tmp_path):
    questions, store = make_questions(12), Store(tmp_path)
    make = partial(make_teacher, questions[:-1])
    with pytest.raises(ValueError, match="no preferences planted for question 'q11'"):
        scaleout.score(store, Workers(make, "planted", 2), questions, LETTERS)
    with pytest.raises(ValueError, match="worker's teacher is 'planted', the scores are to be of 'another'"):
        scaleout.score(store, Workers(make, "another", 2), questions[:4], LETTERS)
    with pytest.raises(ValueError, match="only 2 labels"):
        scaleout.score(store, Workers(make, "planted", 2), questions[:1], replace(LETTERS, labels=("A", "B")))
    for wrong in ({"n": 0}, {"n": 1, "cpus": 0}, {"n": 1, "gpus": -1}):
        with pytest.raises(ValueError, match="give at least 1 worker"):
            Workers(make, "planted", **wrong)
    assert ray.worker.teacher.calls == 0 and not list(tmp_path.glob("*.parquet"))


def test_what_workers_take_at_a_time_is_said_once(ray, tmp_path, capsys):
    class Planned(Teacher):
        plan = "9 tokens a pass"

    questions = make_questions(40)
    make = partial(Planned, make_teacher(questions).preferences, np.zeros(1))
    scaleout.score(Store(tmp_path), Workers(make, "planted", 2), questions, LETTERS)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("permdistill:")]
    assert len(ray.blocks) > 1 and said == ["permdistill: a worker takes 9 tokens a pass"]


def test_log_probability_that_is_not_finite_is_refused_and_the_rest_kept(ray, tmp_path):
    class Broken(Teacher):
        def log_probs(self, questions, orders, template):
            return super().log_probs(questions, orders, template) * (np.inf if questions[0].id == "q3" else 1)

    questions = make_questions(4)
    make = partial(Broken, make_teacher(questions).preferences, np.zeros(1))
    with pytest.raises(ValueError, match="'q3'.*not finite"):
        scaleout.score(Store(tmp_path), Workers(make, "planted", 1), questions, LETTERS)
    assert len(Store(tmp_path)) == 3


def test_without_ray_the_command_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(teachers, "has_chat_template", lambda name: True)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    (tmp_path / "mine.jsonl").write_text('{"id": "q", "question": "?", "options": ["a", "b"]}\n')
    arguments = ["--questions", str(tmp_path / "mine.jsonl"), "--teacher", "some/model", "--scores", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"several workers need Ray.*: pip install permdistill\[scale\]"):
        cli.main(["score", *arguments, "--workers", "2"])


# --------------------------------------------------------------------------------------------------------------------
# With Ray, in processes of their own

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs permdistill[scale]")
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}


def start(script: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Python in a process group of its own: Ray's processes belong to it."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=os.environ | ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


SCORE = """
    import sys
    from functools import partial
    from pathlib import Path
    from permdistill import scaleout
    from permdistill.scaleout import Workers
    from permdistill.scores import Store
    from test_scaleout import LETTERS, make_questions, make_slow

    folder, n, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    questions = make_questions(n)
    make = partial(make_slow, questions, folder, seconds)
    print(scaleout.score(Store(folder), Workers(make, "planted", 2), questions, LETTERS))
"""


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def living(folder: Path) -> list[int]:
    """Process ids of workers that are at work."""
    return [pid for pid in map(int, lines(folder / "workers")) if psutil.pid_exists(pid) and not zombie(pid)]


def zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.long
@needs_ray
def test_workers_killed_ten_times_lose_and_double_nothing(tmp_path):
    rng, n, killed = random.Random(0), 600, set()
    process = start(SCORE, tmp_path, n, 0.25)
    try:
        while len(killed) < 10:
            assert process.poll() is None, "the run ended before ten workers were killed"
            time.sleep(rng.uniform(0.2, 3))
            if pids := [pid for pid in living(tmp_path) if pid not in killed]:
                os.kill(pid := rng.choice(pids), signal.SIGKILL)
                killed.add(pid)
        said, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0 and said.splitlines()[-1] == str(n)  # Ray has told of the lost workers before
    rows = stored(tmp_path)
    assert len(rows) == n and set(rows.values()) == {1}
    paid = lines(tmp_path / "paid")
    assert set(paid) == {q.id for q in make_questions(n)}
    assert len(paid) <= n + 10 * (scaleout.BLOCK + 1)  # with each the block in work; a block may be a question over
    print(f"{len(paid) - n} of {n} questions were paid twice, by {len(lines(tmp_path / 'workers'))} workers")
    assert Store(tmp_path).compact().read_bytes() == one_process(make_questions(n), tmp_path / "one")


@pytest.mark.long
@needs_ray
def test_a_killed_run_keeps_what_arrived_and_a_rerun_pays_the_rest(tmp_path):
    n = 300
    process = start(SCORE, tmp_path, n, 0.1)
    try:
        while len(list(tmp_path.glob("*.parquet"))) < 20:
            assert process.poll() is None, "the run ended by itself"
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 120
    while living(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not living(tmp_path)  # no worker goes on for nobody
    kept, paid = len(Store(tmp_path)), len(lines(tmp_path / "paid"))
    assert 20 <= kept <= paid < n
    assert paid - kept <= 2 * 3 * (scaleout.BLOCK + 1)  # of each worker: a block in work, and two that are on their way
    questions = make_questions(n)
    teacher = make_teacher(questions)
    assert scores.score(Store(tmp_path), teacher, questions, LETTERS) == n - kept
    assert Store(tmp_path).compact().read_bytes() == one_process(questions, tmp_path / "one")


def make_causal(folder: Path, **sizes: int) -> None:
    """A random Llama, of two small layers as a rule, with a word-level tokenizer and a chat template, as a checkpoint."""
    words = ["[UNK]", "<user>", "<assistant>", *"ABCDEF?.:", *"Question Answer Passage a b c".split(), *map(str, range(50))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.add_special_tokens(["<user>", "<assistant>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    fast.chat_template = "<user>{{ messages[0]['content'] }}<assistant>"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4} | sizes
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), initializer_range=0.3, **sizes)).save_pretrained(folder)


@pytest.mark.long
@needs_ray
def test_the_command_with_workers_makes_the_scores_that_it_makes_without(tmp_path):
    make_causal(tmp_path / "tiny")
    records = [
        f'{{"id": "{q.id}", "context": "{q.context}", "question": "{q.question}", "options": {list(q.options)}}}'.replace(
            "'", '"'
        )
        for q in make_questions(40)
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(records))
    command = [sys.executable, "-m", "permdistill.cli", "score", "--teacher", "tiny", "--questions", "mine.jsonl"]
    command += ["--dtype", "float32", "--min-label-mass", "0", "--scores"]
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    files = []
    for name, more in (("one", []), ("two", ["--workers", "2"])):
        done = subprocess.run([*command, name, *more], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "40 questions scored now, 0 were in the store" in done.stdout, done.stderr
        files.append(pq.read_table(tmp_path / name / "tiny" / "scores.parquet"))
    one, two = (file.drop_columns("log_probs") for file in files)
    assert one.equals(two)
    # Rounding depends on the questions that go through together.
    one, two = (np.concatenate(file["log_probs"].to_pylist()) for file in files)
    assert np.abs(np.exp(one) - np.exp(two)).max() < 1e-5
    again = subprocess.run(
        [*command, "two", "--workers", "2"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "all 40 questions were in the store" in again.stdout


RATE = """
    import sys, time
    from functools import partial
    from pathlib import Path
    import torch
    from permdistill import scaleout, scores
    from permdistill.scaleout import Workers
    from permdistill.teachers import load_teacher
    from test_scaleout import LETTERS, make_questions

    folder, workers = Path(sys.argv[1]), int(sys.argv[2])
    questions, make = make_questions(480), partial(load_teacher, str(folder / "model"), torch.float32)
    module, arrivals, store = scaleout if workers else scores, [], scores.Store(folder / sys.argv[2])
    keep = module.keep
    module.keep = lambda store, group, *rest: (arrivals.extend([time.monotonic()] * len(group)), keep(store, group, *rest))
    if workers:
        scaleout.score(store, Workers(make, make().model_key, workers), questions, LETTERS)
    else:
        scores.score(store, make(), questions, LETTERS)
    # All are at work between a quarter and three quarters.
    print(240 / (arrivals[360] - arrivals[120]))
"""


@pytest.mark.long
@needs_ray
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_workers_with_one_thread_each_are_nearly_twice_as_fast_as_one_process(tmp_path):
    # A block takes most of a second here, several with the smallest real teacher; handing it out takes some hundredths.
    make_causal(tmp_path / "model", hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12)
    rates = []
    for workers in (0, 2):
        said, _ = start(RATE, tmp_path, workers, OMP_NUM_THREADS="1").communicate(timeout=600)
        rates.append(float(said.splitlines()[-1]))
    print(
        f"{rates[0]:.2f} questions a second in one process, {rates[1]:.2f} with two workers: {rates[1] / rates[0]:.2f} times"
    )
    assert rates[1] >= 1.7 * rates[0]
