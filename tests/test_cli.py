"""The command line, with a planted teacher in the place of a downloaded one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_students import make_encoder

from permdistill import cli, commands, scores, teachers
from permdistill import training as trainings
from permdistill.api import command, endpoint
from permdistill.configs import StudentConfig, TrainingConfig
from permdistill.orders import all_orders
from permdistill.paper import cli as paper_cli
from permdistill.paper import experiments, profiles
from permdistill.questions import CONTENT_FREE
from permdistill.students import Student
from permdistill.teachers import PlantedTeacher
from permdistill.training import read_log


@pytest.fixture
def planted(monkeypatch) -> PlantedTeacher:
    teacher = PlantedTeacher({f"q{i}": np.array([i, 0.0, 1.0]) for i in range(4)}, np.array([1.0, 0.0, 0.0]))
    monkeypatch.setattr(teachers, "load_teacher", lambda name, dtype: teacher)
    monkeypatch.setattr(teachers, "model_key", lambda name, dtype: teacher.model_key)
    monkeypatch.setattr(teachers, "has_chat_template", lambda name: True)
    return teacher


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "mine.jsonl"
    records = [{"id": f"q{i}", "question": f"which {i}?", "options": ["a", "b", "c"], "answer": 0} for i in range(4)]
    path.write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")
    return str(path)


def test_a_store_lies_in_its_folder_whatever_the_teacher_is_called(planted, questions, tmp_path, monkeypatch):
    """ "..": above it, or in it without a folder of its own."""
    (tmp_path / "mine" / "part").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine" / "part")
    for name, store in (("..", "mine"), (".", "part"), ("x/planted/", "planted")):
        scores = tmp_path / f"scores of {store}"
        cli.main(["score", "--teacher", name, "--questions", questions, "--scores", str(scores)])
        assert [path.name for path in scores.iterdir()] == [store] and (scores / store / "scores.parquet").exists()


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


@pytest.mark.parametrize(
    "words",
    [["--limit", "-1"], ["--limit", "0"], ["--limit", "1.5"], ["--workers", "-1"]]
    + [["--min-label-mass", "nan"], ["--min-label-mass", "1.5"], ["--min-label-mass", "-0.1"], ["--calls", "inf"]]
    + [["--worker-cpus", "nan"], ["--worker-gpus", "-1"]],
    ids=" ".join,
)
def test_numbers_that_make_no_sense_are_refused(planted, questions, tmp_path, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["score", "--questions", questions, "--scores", str(tmp_path / "scores"), *words])
    assert stopped.value.code == 2 and f"argument {words[0]}: " in capsys.readouterr().err.splitlines()[-1]
    assert planted.calls == 0 and not (tmp_path / "scores").exists()


@pytest.mark.parametrize("option", ["timeout", "max-cost", "price-in", "price-out", "calls"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "many"])
def test_ask_takes_finite_numbers(option, value, questions, capsys):
    words = ["ask", "--base-url", "http://127.0.0.1:9/v1", "--model", "m", "--questions", questions]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, f"--{option}={value}"])
    assert stopped.value.code == 2 and f"argument --{option}: " in capsys.readouterr().err.splitlines()[-1]


def test_every_option_that_takes_a_float_says_which():
    """float alone takes nan. (measure's options are tested with measure.)"""
    for module in (commands, cli, command, paper_cli):
        assert "type=float" not in Path(module.__file__).read_text(encoding="utf-8")


CORE = ("score", "audit", "measure", "ask", "sweep")
PAPER = ("plan", "fetch", "score", "audit", "students", "site", "manifest")


@pytest.mark.parametrize(
    "names, main, program",
    [(CORE, cli.main, "permdistill"), (PAPER, paper_cli.main, "python -m permdistill.paper")],
    ids=["core", "paper"],
)
def test_help_lists_the_commands_in_the_order_of_use_with_an_example_each(names, main, program, capsys):
    def shown(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--help"])
        assert stopped.value.code == 0
        return capsys.readouterr().out

    every = shown()
    assert f"usage: {program}" in every
    places = [every.index(f"\n    {name} ") for name in names]
    assert places == sorted(places) and every.count("\n    ") >= len(names)
    for name in names:
        assert f"\nexample:\n  {program} {name} " in shown(name), name


def test_example_commands_are_understood():
    """Those in the help texts: every option that they name is there."""
    for parser in (cli.parser(), paper_cli.parser()):
        (found,) = (action for action in parser._actions if hasattr(action, "choices") and action.choices)
        for own in found.choices.values():
            words = own.epilog.split("\n  ")[1].removeprefix(f"{parser.prog} ").split()
            assert parser.parse_args(words).run, words


def best_of_three(*words: str) -> float:
    """Seconds."""
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        taken.append(time.perf_counter() - started)
    return min(taken)


@pytest.mark.timing
def test_import_and_help_are_quick_and_load_no_torch():
    """0.5 and 1 s on a machine of its own; bounds are for one that has other work to do too."""
    check = "heavy = {'torch', 'transformers', 'datasets', 'openai', 'pandas', 'scipy'} & {*sys.modules}; assert not heavy"
    assert best_of_three("-c", f"import sys, permdistill; {check}") < 1
    helps = (
        "import sys, permdistill.cli as c, permdistill.paper.cli as p; c.parser().format_help(); p.parser().format_help(); "
    )
    assert best_of_three("-c", helps + check) < 3
    assert best_of_three("-m", "permdistill.cli", "--help") < 2
    plain = ("configs", "orders", "questions", "prompts", "sources", "files", "commands")
    plain += ("paper.tasks", "paper.models", "paper.profiles", "paper.hub", "paper.assets", "paper.readers", "paper.paths")
    subprocess.run(
        [sys.executable, "-c", f"import sys; [__import__('permdistill.' + n) for n in {plain}]; {check}"], check=True
    )


def test_choices_that_the_parser_repeats_are_those_of_the_module():
    assert command.MODES == endpoint.MODES


@pytest.mark.parametrize("words", ["fetch x", "plan", "students --list", "score --profile full", "audit --profile=full"])
def test_commands_of_the_paper_say_where_they_went(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words.split())
    assert stopped.value.code == 2
    assert f"is now python -m permdistill.paper {words.split()[0]}" in capsys.readouterr().err


def test_package_that_is_not_installed_is_named_with_its_fix(monkeypatch, tmp_path, questions):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "permdistill.api.endpoint")
    monkeypatch.delitem(sys.modules, "permdistill.api.ask", raising=False)
    arguments = ["--base-url", "http://127.0.0.1:9/v1", "--model", "m", "--questions", questions, "--dry-run"]
    with pytest.raises(SystemExit, match=r"needs the package openai: pip install 'permdistill\[all\]'"):
        cli.main(["ask", *arguments, "--replies", str(tmp_path / "replies")])


@pytest.fixture
def flat(monkeypatch):
    """Teachers that answer everything alike, by name; with what each was asked, by template."""

    class Flat:
        def __init__(self, name):
            self.name, self.model_key, self.asked = name, f"flat:{name}", Counter()

        def check(self, questions, template):
            pass

        def log_probs(self, questions, orders, template):
            self.asked[template.name] += len(questions)
            return np.full((len(questions), *orders.shape), -2.0, dtype=np.float32)

    made: dict[str, Flat] = {}
    monkeypatch.setattr(teachers, "load_teacher", lambda name, dtype=None: made.setdefault(name, Flat(name)))
    monkeypatch.setattr(teachers, "model_key", lambda name, dtype=None: f"flat:{name}")
    return made


def test_profile_is_scored_and_audited_whole(flat, monkeypatch, tmp_path, capsys):
    smoke = profiles.PROFILES["smoke"]
    pools = {n: replace(smoke.pools[n], tasks=(t,)) for n, t in (("multiple_choice", "arc_easy"), ("summeval", "piqa"))}
    tasks = {"tasks": ("arc_easy", "piqa"), "pools": pools}
    sizes = {"n_test": 20, "n_train": 20, "n_others": (12, 10, 0), "n_prompts": (6, 0)}
    settings = replace(profiles.PROFILES["smoke"], teachers=("one", "two"), **tasks, **sizes)
    monkeypatch.setitem(profiles.PROFILES, "smoke", settings)
    monkeypatch.setattr(profiles, "PUT_DIFFERENTLY", {"letters": ("arc_easy",), "summaries": ()})
    arguments = ["--profile", "smoke", "--scores", str(tmp_path)]
    with pytest.raises(SystemExit, match="have no scores in"):
        paper_cli.main(["audit", *arguments])
    assert not flat
    paper_cli.main(["score", *arguments])
    # Questions and three content-free forms: test and training questions share theirs.
    assert flat["one"].asked == {"letters": 2 * 20 + 3 + 2 * 20 + 3, "numbers": 6 + 3, "brief": 6 + 3}
    assert flat["two"].asked == {"letters": 12 + 3 + 10 + 3}
    capsys.readouterr()
    paper_cli.main(["score", *arguments])
    assert capsys.readouterr().out.count("questions were in the store") == 2
    before = {name: teacher.asked.copy() for name, teacher in flat.items()}
    paper_cli.main(["audit", *arguments])
    assert flat["one"].asked - before["one"] == {"letters": 8, "numbers": 3, "brief": 3}
    assert flat["two"].asked - before["two"] == {"letters": 8}
    assert capsys.readouterr().out.count("TV mean 0.0000") == 4


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


def test_a_table_takes_its_files_place_when_it_is_whole(tmp_path, monkeypatch):
    record = {"id": "a", "order": [0, 1], "probabilities": [0.6, 0.4]}
    lines = [json.dumps(record), json.dumps(record | {"order": [1, 0]})]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    words = ["measure", str(tmp_path / "records.jsonl"), "--csv", str(tmp_path / "table.csv")]
    cli.main(words)
    before = (tmp_path / "table.csv").read_text()

    def killed(self, path, **options):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.DataFrame, "to_csv", killed)
    with pytest.raises(KeyboardInterrupt):
        cli.main(words)
    assert (tmp_path / "table.csv").read_text() == before and len(list(tmp_path.iterdir())) == 2


def test_students_of_a_profile_are_those_that_its_notebooks_look_for(monkeypatch, tmp_path, capsys):
    encoder, training = make_encoder(tmp_path / "encoder"), TrainingConfig(epochs=1)
    runs = [profiles.Run(StudentConfig(encoder, "per_option", "prediction", k, 256), training) for k in (4, 2)]
    settings = replace(
        profiles.PROFILES["smoke"],
        n_train=6,
        pools={
            "multiple_choice": profiles.Pool("T2", ("arc_easy", "openbookqa"), 6, runs[:1]),
            "summeval": profiles.Pool("T3", ("summeval_coherence",), 6, runs[1:]),
        },
    )
    monkeypatch.setitem(profiles.PROFILES, "smoke", settings)
    arguments = ["students", "--profile", "smoke", "--work", str(tmp_path / "work")]
    paper_cli.main([*arguments, "--list"])
    assert capsys.readouterr().out.splitlines() == [f"missing {run.name}" for run in runs]
    with pytest.raises(SystemExit, match="6 of 6 questions have no scores in"):  # before any training
        paper_cli.main([*arguments, "--scores", str(tmp_path / "no")])
    assert not (tmp_path / "work").exists()
    paper_cli.main(arguments)
    folders = [tmp_path / "work" / "students" / run.name for run in runs]
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == list(map(str, folders))

    paper_cli.main([*arguments, "--list"])
    assert capsys.readouterr().out.splitlines() == [f"trained {run.name}" for run in runs]
    monkeypatch.setattr(trainings, "_train", lambda *args: pytest.fail("trained again"))
    for pool, n in zip(settings.pools.values(), (12, 6), strict=True):  # as the notebooks do
        train_on = experiments.read_pool(settings, pool, "train")
        assert len(train_on.P) == n
        experiments.distil(pool.runs[0], train_on, train_on, tmp_path / "work")


def test_sweep_compares_students_of_own_questions_without_their_answers(monkeypatch, tmp_path, capsys):
    preferences = {f"q{i}": np.eye(3)[i % 3] for i in range(12)}
    preferences |= {f"content-free/{text}": np.zeros(3) for text in CONTENT_FREE}
    teacher = PlantedTeacher(preferences, np.array([1.0, 0.0, 0.0]))
    monkeypatch.setattr(experiments, "load_teacher", lambda name: teacher)
    monkeypatch.setattr(experiments, "model_key", lambda name: teacher.model_key)
    monkeypatch.setattr(teachers, "has_chat_template", lambda name: True)
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
    two = ["--encoders", *(str(shutil.copytree(tmp_path / "encoder", tmp_path / name / "encoder")) for name in "ab")]
    with pytest.raises(SystemExit, match="two students are called encoder-per_option-plain-k3-2epochs-lr0.001: give"):
        cli.main(["sweep", *arguments, *two, "--epochs", "2", "--held-out", "0.25"])  # one would lie where the other did
    with pytest.raises(SystemExit, match="held_out = 0, give a share"):
        cli.main(["sweep", *arguments, "--held-out", "0"])
    long = [*records[:11], records[11] | {"options": ["a", "b " * 100, "c"]}]
    path.write_text("\n".join(json.dumps(r) for r in long), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"1 of 12 questions have options that --max-length 64 cuts off \(q11\): give"):
        cli.main(["sweep", *arguments, "--long", "refuse"])
    assert teacher.calls == calls  # before anything is scored
    cli.main(["sweep", *arguments, "--long", "drop", "--epochs", "1"])
    assert "1 of 12 questions are left out, since --max-length 64" in capsys.readouterr().out
    assert teacher.calls == calls  # the others are scored, and what is left out is not asked for
    path.write_text(json.dumps(long[-1]), encoding="utf-8")
    with pytest.raises(SystemExit, match="--max-length 64 cuts options of all 1 questions: give a larger one"):
        cli.main(["sweep", *arguments, "--long", "drop"])
    assert {log["questions"] for log in map(read_log, (output / "students").glob("*-1epochs-*"))} == {10}  # 1 is held out
    path.write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")
    with pytest.raises(SystemExit, match="k = 0 options: give 2..26 .0, any number, is for all heads but joint"):
        cli.main(["sweep", *arguments, "--heads", "joint"])

    def any_k(questions, orders, template):
        cut = {name: logits[: orders.shape[1]] for name, logits in preferences.items()}
        return PlantedTeacher(cut, teacher.bias[: orders.shape[1]]).log_probs(questions, orders, template)

    preferences["pair"] = np.array([1.0, 0.0, 0.0])
    monkeypatch.setattr(teacher, "log_probs", any_k)
    cli.main(["sweep", *arguments, "--epochs", "1", "--held-out", "0.25", "--learning-rates", "1e-3"])
    best = capsys.readouterr().out.split("closest to its targets: ")[1].strip()
    student = Student.from_pretrained(best)
    assert student.config.k == 0 and len(student.predict("which ?", ["a", "b"])) == 2
