"""Two processes on one CPU (gloo) train what one process trains. The launched script is this file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_students import make_encoder
from test_training import FAST, K, as_good_as_same, black_box, killer, soft, toy

from permdistill import cli, teachers
from permdistill.configs import StudentConfig
from permdistill.engine import ranks
from permdistill.lessons import Lesson
from permdistill.paper import experiments
from permdistill.questions import CONTENT_FREE
from permdistill.students import Student
from permdistill.teachers import PlantedTeacher
from permdistill.training import CHECKPOINT, lead, read_log, train

TESTS = Path(__file__).parent
STEPS = replace(FAST, micro_tokens=60, held_out=0.2)  # several pieces a step; 29 questions to train on
QUESTIONS, RIGHT = toy(36, 0)


def joint(folder: Path, name: str = "joint", **more) -> Student:
    config = StudentConfig(str(folder / "encoder"), "joint", "prediction", K)
    lesson = Lesson(QUESTIONS, soft(RIGHT), black_box(RIGHT))
    return train(config, STEPS, lesson, folder / name, autocast=False, **more)


def per_option(folder: Path) -> Student:
    """Its last batch has one question, so that the second process has none."""
    config, steps = StudentConfig(str(folder / "encoder"), "per_option", k=K), replace(STEPS, batch_size=28)
    return train(config, steps, Lesson(QUESTIONS, soft(RIGHT)), folder / "per_option", autocast=False)


def recorded(folder: Path, train_one) -> list[torch.Tensor]:
    """Train, and return the gradients of every step, (parameter,) each."""
    steps, clip = [], torch.nn.utils.clip_grad_norm_

    def recording(parameters, *rest):
        parameters = list(parameters)
        steps.append(torch.cat([p.grad.flatten().clone() for p in parameters if p.grad is not None]))
        return clip(parameters, *rest)

    torch.nn.utils.clip_grad_norm_ = recording
    try:
        train_one(folder)
    finally:
        torch.nn.utils.clip_grad_norm_ = clip
    return steps


def program(folder: Path) -> None:
    """What rank 0 runs: two students whose gradients are kept, the rest of a run that was killed, and one that diverges."""
    assert ranks.count() == 2
    gradients = [recorded(folder, joint), recorded(folder, per_option)]
    joint(folder, "killed")
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        wild = replace(FAST, epochs=20, learning_rate=1e30, warmup=0.0)
        train(StudentConfig(str(folder / "encoder"), k=K), wild, Lesson(QUESTIONS, soft(RIGHT)), folder / "wild")
    per_option(folder)  # loaded: no step
    torch.save(gradients, folder / "gradients.pt")


def sweep(folder: Path) -> None:
    """``permdistill sweep`` with a planted teacher, which tells how often it was asked."""
    preferences = {f"q{i}": np.eye(3)[i % 3] for i in range(12)} | {f"content-free/{t}": np.zeros(3) for t in CONTENT_FREE}
    teacher = PlantedTeacher(preferences, np.array([1.0, 0.0, 0.0]))
    experiments.load_teacher, experiments.model_key = lambda name: teacher, lambda name: teacher.model_key
    teachers.has_chat_template = lambda name: True
    arguments = ["--questions", "mine.jsonl", "--teacher", "planted", "--output", "out", "--scores", "no"]
    cli.main(
        ["sweep", *arguments, "--encoders", "encoder", "--learning-rates", "1e-3", "--max-length", "64", "--epochs", "2"]
    )
    (folder / f"calls-{os.getpid()}").write_text(str(teacher.calls))


def launch(launcher: list[str], what: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, "-m", *launcher, __file__, what, str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# On a machine without GPU too: torch's launcher again, and gloo. (accelerate's --cpu starts one process, or wants MPI.)
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.mark.slow
def test_two_processes_have_the_gradients_and_weights_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    make_encoder(tmp_path / "encoder")
    for folder in (one, two):
        folder.mkdir()
        (folder / "encoder").symlink_to(tmp_path / "encoder")
    with pytest.raises(KeyboardInterrupt):
        joint(two, "killed", on_step=killer(7))
    assert (two / "killed" / CHECKPOINT).exists()
    launch(TORCHRUN, "program", two)
    gradients = torch.load(two / "gradients.pt")
    for name, found, train_one in zip(("joint", "per_option"), gradients, (joint, per_option), strict=True):
        expected = recorded(one, train_one)
        assert len(found) == len(expected) > 3
        assert (found[0] - expected[0]).abs().max() < 1e-6 < expected[0].abs().max()
        assert max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True)) < 1e-4  # rounding grows
        assert as_good_as_same(Student.from_pretrained(two / name), Student.from_pretrained(one / name))
        logs = [read_log(folder / name) for folder in (one, two)]
        assert [log["processes"] for log in logs] == [1, 2]
        for what in ("losses", "held_out_kl"):
            assert logs[0][what] == pytest.approx(logs[1][what], abs=1e-5)
    assert as_good_as_same(Student.from_pretrained(two / "killed"), Student.from_pretrained(one / "joint"))
    assert not list(two.glob("*/*.pt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [TORCHRUN, pytest.param(ACCELERATE, marks=pytest.mark.long)], ids=lambda words: words[0]
)
def test_the_command_line_under_a_launcher(tmp_path, launcher):
    make_encoder(tmp_path / "encoder")
    records = [{"id": f"q{i}", "question": f"which {i} ?", "options": ["a", "b", "c"]} for i in range(12)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    done = launch(launcher, "sweep", tmp_path)
    assert done.stdout.count("closest to its targets") == 1  # one program, although two processes
    (folder,) = (tmp_path / "out" / "students").iterdir()
    assert read_log(folder)["processes"] == 2
    calls = sorted(int(path.read_text()) for path in tmp_path.glob("calls-*"))
    assert calls == [0, 12 + len(CONTENT_FREE)]


def test_a_process_alone_shares_with_nobody(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    ran = []
    lead(lambda: ran.append(ranks.share((ranks.rank(), ranks.count()))))
    assert ran == [(0, 1)]


if __name__ == "__main__":
    what, where = sys.argv[1:]
    if what == "sweep":
        sweep(Path(where))
    else:
        lead(lambda: program(Path(where)))
