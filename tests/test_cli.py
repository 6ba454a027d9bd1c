"""The command line, with a planted teacher in the place of a downloaded one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_students import make_encoder

from permdistill import cli, scores
from permdistill import training as trainings
from permdistill.configs import StudentConfig, TrainingConfig
from permdistill.orders import all_orders
from permdistill.paper import experiments, profiles
from permdistill.questions import CONTENT_FREE
from permdistill.teachers import PlantedTeacher
from permdistill.training import read_log


@pytest.fixture
def planted(monkeypatch) -> PlantedTeacher:
    teacher = PlantedTeacher({f"q{i}": np.array([i, 0.0, 1.0]) for i in range(4)}, np.array([1.0, 0.0, 0.0]))
    monkeypatch.setattr(cli, "load_teacher", lambda name, dtype: teacher)
    monkeypatch.setattr(cli, "model_key", lambda name, dtype: teacher.model_key)
    return teacher


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "mine.jsonl"
    records = [{"id": f"q{i}", "question": f"which {i}?", "options": ["a", "b", "c"], "answer": 0} for i in range(4)]
    path.write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")
    return str(path)


def test_score_then_audit(planted, questions, tmp_path, capsys):
    arguments = ["--teacher", "planted", "--questions", questions, "--scores", str(tmp_path / "scores")]
    cli.main(["score", *arguments, "--limit", "3"])
    assert "3 questions scored now, 0 were in the store" in capsys.readouterr().out
    cli.main(["score", *arguments])
    assert "1 questions scored now, 3 were in the store" in capsys.readouterr().out
    assert planted.calls == 4
    (file,) = (tmp_path / "scores" / "planted").glob("*.parquet")
    assert file.name == "scores.parquet" and pq.read_table(file).num_rows == 4
    cli.main(["audit", *arguments])
    assert "TV mean 0.0000" in capsys.readouterr().out


def test_audit_fails_when_a_stored_score_is_wrong(planted, questions, tmp_path, capsys):
    arguments = ["--teacher", "planted", "--questions", questions, "--scores", str(tmp_path / "scores")]
    cli.main(["score", *arguments])
    path = tmp_path / "scores" / "planted" / "scores.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0]["log_probs"] = [0.0, -5.0, -9.0] * rows[0]["n_orders"]
    pq.write_table(pa.Table.from_pylist(rows, schema=scores.SCHEMA), path)
    with pytest.raises(SystemExit, match="not what this machine computes"):
        cli.main(["audit", *arguments])
    assert "FAILED" in capsys.readouterr().out


def test_errors_are_one_message_before_any_scoring(planted, questions, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "x", "question": "which?", "options": ["a", "a"], "answer": 5}\n', encoding="utf-8")
    with pytest.raises(SystemExit) as error:
        cli.main(["score", "--questions", str(bad), "--scores", str(tmp_path)])
    message = str(error.value.code)
    assert (
        message.startswith("permdistill: ")
        and "'x'" in message
        and "repeated: ['a']" in message
        and "out of range" in message
    )
    assert planted.calls == 0
    with pytest.raises(SystemExit, match="1 of 1 questions have no scores"):
        cli.main(["audit", "--questions", questions, "--scores", str(tmp_path / "empty"), "--n", "1"])


@pytest.mark.parametrize("command", [[], ["score"], ["audit"], ["fetch"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--help"])
    assert stopped.value.code == 0
    assert "usage: permdistill" in capsys.readouterr().out


def test_measure_scores_from_elsewhere(tmp_path, questions, capsys):
    rng = np.random.default_rng(0)
    records = [
        {"id": f"q{i}", "order": order.tolist(), "probabilities": rng.dirichlet(np.ones(3)).tolist()}
        for i in range(4)
        for order in all_orders(3)
    ]
    path = tmp_path / "scores.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    cli.main(["measure", str(path)])
    out = capsys.readouterr().out
    assert "4 items, K = 3, 6 orders" in out and "ps (TV)" in out and "accuracy" not in out
    cli.main(["measure", str(path), "--questions", questions, "--all", "--csv", str(tmp_path / "out.csv")])
    out = capsys.readouterr().out
    assert "adversarial accuracy" in out and "all-orders average" in out
    assert pd.read_csv(tmp_path / "out.csv").set_index("debiaser").loc["all-orders average", "ps"] == 0
    (tmp_path / "few.jsonl").write_text('{"id": "q1", "question": "?", "options": ["a", "b"]}\n', encoding="utf-8")
    with pytest.raises(SystemExit, match="id 'q0' has 3 options, .*few.jsonl has no such question"):
        cli.main(["measure", str(path), "--questions", str(tmp_path / "few.jsonl")])


def test_students_of_a_profile_are_those_that_its_notebooks_look_for(monkeypatch, tmp_path, capsys):
    encoder, training = make_encoder(tmp_path / "encoder"), TrainingConfig(epochs=1)
    runs = [profiles.Run(StudentConfig(encoder, "per_option", "prediction", k, 256), training) for k in (4, 2)]
    settings = replace(
        profiles.PROFILES["smoke"],
        n_train=6,
        learnt=("arc_easy", "openbookqa"),
        compared=("summeval_coherence",),
        multiple_choice=runs[:1],
        pairs=runs[1:],
    )
    monkeypatch.setitem(profiles.PROFILES, "smoke", settings)
    arguments = ["students", "--profile", "smoke", "--work", str(tmp_path / "work")]
    cli.main([*arguments, "--list"])
    assert capsys.readouterr().out.splitlines() == [f"missing {run.name}" for run in runs]
    with pytest.raises(SystemExit, match="6 of 6 questions have no scores in"):  # before any training
        cli.main([*arguments, "--scores", str(tmp_path / "no")])
    assert not (tmp_path / "work").exists()
    cli.main(arguments)
    folders = [tmp_path / "work" / "students" / run.name for run in runs]
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == list(map(str, folders))

    cli.main([*arguments, "--list"])
    assert capsys.readouterr().out.splitlines() == [f"trained {run.name}" for run in runs]
    monkeypatch.setattr(trainings, "_run", lambda *args: pytest.fail("trained again"))
    for run, tasks, n in ((runs[0], settings.learnt, 12), (runs[1], settings.compared, 6)):  # as the notebooks do
        parts = [experiments.read_scores(settings.teachers[0], task, "train", "", settings.n_train) for task in tasks]
        train_on = experiments.together(parts)
        assert len(train_on.P) == n
        experiments.distil(run, train_on, parts[0], tmp_path / "work")


def test_sweep_compares_students_of_own_questions_without_their_answers(monkeypatch, tmp_path, capsys):
    preferences = {f"q{i}": np.eye(3)[i % 3] for i in range(12)}
    preferences |= {f"content-free/{text}": np.zeros(3) for text in CONTENT_FREE}
    teacher = PlantedTeacher(preferences, np.array([1.0, 0.0, 0.0]))
    monkeypatch.setattr(experiments, "load_teacher", lambda name: teacher)
    monkeypatch.setattr(experiments, "model_key", lambda name: teacher.model_key)
    records = [{"id": f"q{i}", "question": f"which {i} ?", "options": ["a", "b", "c"], "answer": 0} for i in range(12)]
    records += [{"id": "pair", "question": "which ?", "options": ["a", "b"]}]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in records[:12]), encoding="utf-8")
    output = tmp_path / "out"
    arguments = ["--questions", str(path), "--teacher", "planted", "--output", str(output), "--scores", str(tmp_path / "no")]
    arguments += ["--encoders", make_encoder(tmp_path / "encoder"), "--learning-rates", "1e-3", "3e-3", "--max-length", "64"]
    cli.main(["sweep", *arguments, "--epochs", "2", "--held-out", "0.25"])
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if "distillation" in line]
    assert len(rows) == 2 and {"0.001", "0.003"} <= {cell for row in rows for cell in row}
    best = shown.split("closest to its targets: ")[1].strip()
    kls = {folder: min(read_log(folder)["held_out_kl"]) for folder in (output / "students").iterdir()}
    assert len(kls) == 2 and str(min(kls, key=kls.get)) == best
    assert "always answering 1/K: 0." in shown
    calls = teacher.calls
    cli.main(["sweep", *arguments, "--epochs", "2", "--held-out", "0.25"])  # scores and students are there
    assert capsys.readouterr().out == shown and teacher.calls == calls
    with pytest.raises(SystemExit, match="held_out = 0, give a share"):
        cli.main(["sweep", *arguments, "--held-out", "0"])
    path.write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")
    with pytest.raises(SystemExit, match="questions with 2 and 3 options"):
        cli.main(["sweep", *arguments])
