"""The README's example is run as it stands, with the smallest real model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from permdistill.orders import cyclic_orders
from permdistill.paper import tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, containing: str) -> str:
    (found,) = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.S) if containing in b]
    return found


def command_line(containing: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the README's command as it stands, in ``folder``; it must succeed."""
    (command,) = block("sh", containing).strip().splitlines()
    program, *arguments = command.split()
    assert program == ".venv/bin/permdistill"
    done = subprocess.run([sys.executable, "-m", "permdistill.cli", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_own_questions_example(tmp_path):
    (tmp_path / "mine.jsonl").write_text(block("json", '"options"'), encoding="utf-8")
    done = command_line("--scores my-scores\n", tmp_path)
    assert "1 questions scored now" in done.stdout
    done = subprocess.run(
        [sys.executable, "-c", block("python", "permutation_sensitivity")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"0\.\d+ \[\[0\.\d+ +0\.\d+ +0\.\d+ *\]\]", done.stdout), done.stdout


def several_questions(path: Path, n: int = 3) -> None:
    """The README's question, a few times over: one question alone has no interval."""
    record = json.loads(block("json", '"options"'))
    lines = [json.dumps(record | {"id": f"q{i}", "question": f"{i}. {record['question']}"}) for i in range(1, n + 1)]
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.slow
def test_own_model_and_questions_in_the_notebook(tmp_path):
    several_questions(tmp_path / "mine.jsonl")
    (command,) = block("sh", "papermill notebooks/01").strip().splitlines()
    program, notebook, *arguments = command.split()
    assert program == ".venv/bin/papermill"
    command = [sys.executable, "-m", "papermill", str(ROOT / notebook), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    t1 = pd.read_csv(tmp_path / "build" / "mine" / "tables" / "T1_teachers.csv")
    assert set(t1.teacher) == {"smollm2-135m"} and set(t1.task) == {"mine"} and set(t1.n) == {3}
    assert (tmp_path / "build" / "mine" / "scores" / "smollm2-135m").is_dir()


def test_scores_from_another_harness(tmp_path):
    several_questions(tmp_path / "mine.jsonl")
    record = json.loads(block("json", '"probabilities"'))
    lines = [json.dumps(record | {"id": f"q{i}", "order": order.tolist()}) for i in (1, 2, 3) for order in cyclic_orders(3)]
    (tmp_path / "my-scores.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command_line("permdistill measure", tmp_path)
    table = pd.read_csv(tmp_path / "measured.csv").set_index("debiaser")
    # Always the third position: right in one rotation of three, and never the same option twice.
    assert table.loc["biased", ["accuracy", "consistency", "circular"]].tolist() == pytest.approx([1 / 3, 0, 0])
    assert table.loc["cyclic average", "ps"] == 0


def test_plan_of_an_api_run_asks_nothing(tmp_path):
    several_questions(tmp_path / "mine.jsonl")
    done = command_line("--dry-run", tmp_path)
    assert "3 items, 96 calls: 0 in the store, 96 to make" in done.stdout and "limits: cost 1.0" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]


@pytest.mark.slow
def test_decisions_of_a_real_server(tmp_path):
    several_questions(tmp_path / "mine.jsonl")
    command = [sys.executable, "-c", block("python", "Server(")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 items, 24 calls: 0 in the store, 24 to make" in done.stdout and "not asked" in done.stdout
    targets = np.array(re.findall(r"[01]\.\d*", done.stdout.split("\n[[")[1]), dtype=float).reshape(3, 3)
    assert targets.sum(axis=1) == pytest.approx(1, abs=1e-6) and (tmp_path / "replies" / "replies.jsonl").exists()


def test_first_two_commands():
    first = re.search(r"```sh\n(.*?)```", README, re.S)[1].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make paper", "make test"]


def test_numbers_are_those_of_the_tables():
    assert tables.readme(README, ROOT / "figures") == README
