"""`make paper PROFILE=paper` to the last figure, offline, with a folder of tiny models and data in the place of the hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import tiny_hub
from test_makefile import RUNS

from permdistill.paper import claims, hub, profiles
from permdistill.paper.systems import described
from permdistill.training import read_log

ROOT = Path(__file__).parent.parent
NAME = "paper-12"  # the first 12 questions of each set: those that do not come from the hub would take half an hour
PAPER = profiles.get(NAME)
LEARNT = PAPER.pools["multiple_choice"]
SKIPPED = shutil.ignore_patterns(".*", "build", "__pycache__", "*.egg-info")


@pytest.mark.long
def test_paper_profile_runs_to_the_last_figure_offline(tmp_path):
    tiny_hub.write(tmp_path / "hub", n=10)
    home = shutil.copytree(ROOT, tmp_path / "checkout", ignore=SKIPPED)
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), hub.LOCAL: str(tmp_path / "hub")}
    environment = os.environ | settings | {"PYTHONPATH": str(home), "TQDM_DISABLE": "1"}
    # What README says for several GPUs; `make paper` takes up what it finds.
    scoring = [sys.executable, "-m", "permdistill.paper", "score", "--profile", NAME, "--scores", "build/scores"]
    training = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    training += ["-m", "permdistill.paper", "students", "--profile", NAME, "--scores", "build/scores"]
    for words in (scoring, training):
        done = subprocess.run(words, cwd=home, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    logs = {folder.name: read_log(folder) for folder in (home / "build" / NAME / "students").iterdir()}
    assert set(logs) == {run.name for run in PAPER.runs}
    assert {log["processes"] for log in logs.values()} == {2}

    command = ["make", "paper", f"PROFILE={NAME}", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed"]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    build = home / "build"
    made = json.loads((build / "manifest.json").read_text())
    assert list(made["notebooks"]) == sorted(RUNS)
    assert all(notebook["parameters"]["profile"] == NAME for notebook in made["notebooks"].values())
    assert set(made["revisions"]) == set(tiny_hub.REPOS)
    assert {folder.name: read_log(folder) for folder in (build / NAME / "students").iterdir()} == logs
    scores = {path.parent.name for path in (build / "scores").glob("*/scores.parquet")}
    assert scores == {Path(name).name for name in PAPER.teachers}
    tables = {path.stem: pd.read_csv(path) for path in (build / NAME / "tables").glob("*.csv")}
    figures = {path.stem for path in (build / NAME / "figures").glob("*.png")}
    assert {"T1_teachers", "T2_students_multiple_choice", "T3_students_summeval", "F5_sensitivity_accuracy"} <= figures
    assert set(tables["T1_teachers"].teacher) == scores
    assert set(tables["T1_teachers"].task) == set(PAPER.tasks)
    students = tables["T2_students_multiple_choice"]
    assert set(students.task) == {*LEARNT.tasks, "all"}
    assert set(described(students[students.kind == "student"])) == {run.what for run in LEARNT.runs}

    # Whoever runs the profile gets a verdict for each cell of the paper.
    names = ("T1_teachers", "T2_students_multiple_choice", "T3_students_summeval")
    checked = claims.check(claims.targets("paper"), claims.in_the_papers_words(*(tables[name] for name in names)))
    assert set(checked.verdict) <= {claims.CONFIRMED, claims.NOT_CONFIRMED} and checked.found.notna().all()

    again = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert "nothing to do" in again.stdout, again.stdout[-2000:]


def test_make_scores_the_papers_own_models_itself(tmp_path):
    command = ["make", "-n", "paper", "PROFILE=paper", "TEACHER=committed", f"BUILD={tmp_path}/build"]
    planned = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert f'permdistill.paper score --profile paper --scores "{tmp_path}/build/scores"' in planned
    assert "permdistill.paper audit" not in planned and "--teacher" not in planned
    assert f'-r scores "{tmp_path}/build/scores"' in planned and "-r profile paper" in planned
