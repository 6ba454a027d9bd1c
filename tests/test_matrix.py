"""The matrix of students: what is stored is found again, and never taken for something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from test_experiments import planted
from test_students import make_encoder

from permdistill import debias
from permdistill.configs import HEADS, StudentConfig, TrainingConfig
from permdistill.lessons import Lesson
from permdistill.measure import metrics
from permdistill.orders import all_orders, cyclic_orders
from permdistill.paper import ablations, audits, experiments, matrix, profiles, results, tables, tasks
from permdistill.paper.cli import main
from permdistill.paper.systems import title, titled
from permdistill.questions import unlabelled
from permdistill.training import content_key


def give(patch: pytest.MonkeyPatch, data: Callable[..., tuple]) -> None:
    """Let ``data`` stand in for the stores; keys of other data are forgotten."""
    patch.setattr(ablations, "data", data)
    patch.setattr(ablations, "_own_key", lru_cache(ablations._own_key.__wrapped__))


@pytest.fixture
def cell(tmp_path, monkeypatch) -> matrix.Cell:
    """A tiny student of a planted teacher, whose scores stand in for the stores."""
    pools = {"planted": ([planted("train", n=24)], planted("test", n=12, seed=5))}
    give(monkeypatch, lambda teacher, tasks, on=(): pools[teacher])
    student = StudentConfig(make_encoder(tmp_path / "encoder"), "per_option", "plain", 3, 64)
    return matrix.Cell("planted", ("one", "two"), profiles.Run(student, TrainingConfig(epochs=1)))


def with_run(cell: matrix.Cell, **changes: object) -> matrix.Cell:
    return replace(cell, run=replace(cell.run, **changes))


def test_what_is_made_is_found_and_not_made_again(cell, tmp_path, monkeypatch):
    folder, work = tmp_path / "predictions", tmp_path / "work"
    with pytest.raises(ablations.MissingPredictions, match="are not stored: run `make students`"):
        ablations.answer(cell, folder)
    assert ablations.make([cell, cell], folder, work) == 1
    assert ablations.path(cell, folder) == folder / "planted" / "one-two" / f"{cell.run.name}.parquet"
    assert not list(work.rglob("*.safetensors"))  # predictions are kept, weights are not
    monkeypatch.setattr(ablations, "train", lambda *args, **more: pytest.fail("trained again"))
    assert ablations.make([cell], folder, work) == 0
    found = ablations.answer(cell, folder)
    (train,), test = ablations.data("planted", cell.tasks)
    expected = experiments.distil(cell.run, train, test, tmp_path / "again")
    assert found.P == pytest.approx(expected.P, abs=1e-6) and (found.orders == expected.orders).all()
    assert (found.what, found.parameters) == (cell.run.what, expected.parameters)
    table = ablations.compare([cell], folder).query("task == 'all'").set_index("method")
    right = [q.answer for q in ablations.data("planted", cell.tasks)[1].task.questions]
    assert table.loc["distillation", "accuracy"] == pytest.approx(metrics.accuracy(expected.P, right).mean())
    assert table.loc["cyclic average", "accuracy"] == 1 > table.loc["biased", "accuracy"]


def test_differences_and_effects(cell, tmp_path, monkeypatch):
    folder = tmp_path / "predictions"
    cells = [with_run(cell, training=replace(cell.run.training, seed=seed)) for seed in (0, 1)]
    cells += [with_run(cell, draws=4), with_run(cell, draws=2)]
    assert ablations.make(cells, folder, tmp_path / "work") == 4
    _, test = ablations.data("planted", cell.tasks)
    right = [q.answer for q in test.task.questions]
    alone = [metrics.accuracy(ablations.answer(c, folder).P, right).mean() for c in cells]
    gaps = titled(ablations.differences(cells, folder)).set_index(["system", "rival"])
    assert len(gaps) == 3 * len(ablations.rivals(test))
    row = gaps.loc[(cell.run.title, "all-orders average")]  # which is always right
    assert row.difference == pytest.approx(np.mean(alone[:2]) - 1) and row.seeds == 2
    assert row.difference_low <= row.difference <= row.difference_high
    untrained = with_run(cell, training=replace(cell.run.training, epochs=0))
    ablations.make([untrained], folder, tmp_path / "work")
    more = titled(ablations.differences([*cells, untrained], folder)).set_index(["system", "rival"])
    row = more.loc[(cell.run.title, untrained.run.title)]
    assert row.difference == pytest.approx(
        np.mean(alone[:2]) - metrics.accuracy(ablations.answer(untrained, folder).P, right).mean()
    )
    assert (untrained.run.title, untrained.run.title) not in more.index and len(more) == 4 * len(ablations.rivals(test)) + 3
    assert set(gaps.n) == {12}
    taught, known = ablations.data("planted", cell.tasks)[0][0].task.questions, test.task.questions[:3]
    monkeypatch.setattr(ablations, "_stem", lambda q: "known" if q in taught or q in known else q.id)
    new = titled(ablations.differences(cells, folder, new=True)).set_index(["system", "rival"])
    row = new.loc[(cell.run.title, "all-orders average")]
    left = [metrics.accuracy(ablations.answer(c, folder).P[3:], right[3:]).mean() for c in cells[:2]]
    assert row.n == 9 and row.difference == pytest.approx(np.mean(left) - 1)
    found = ablations.effects(cells, "draws", folder=folder)
    assert found.draws.tolist() == [0, 2, 4] and found.seeds.tolist() == [2, 1, 1]
    assert found.accuracy.tolist() == pytest.approx([np.mean(alone[:2]), alone[3], alone[2]])
    assert found["worst seed"][0] == pytest.approx(min(alone[:2])) and found["best seed"][0] == pytest.approx(max(alone[:2]))
    by_seed = ablations.effects(cells[:2], "learning_rate", "seed", folder=folder)
    assert by_seed.accuracy.tolist() == pytest.approx(alone[:2]) and set(by_seed.learning_rate) == {5e-5}


def test_fits_says_whether_a_student_learnt_what_it_was_shown(cell, tmp_path):
    folder = tmp_path / "predictions"
    cells = [cell, with_run(cell, training=replace(cell.run.training, seed=1, epochs=2)), with_run(cell, power=np.inf)]
    cells.append(with_run(cell, training=replace(cell.run.training, epochs=0)))
    ablations.make(cells, folder, tmp_path / "work")
    table = ablations.distances(cells, "power", "epochs", folder=folder)
    assert table[["power", "epochs", "students"]].to_numpy().tolist() == [[1, 1, 1], [1, 2, 1], [np.inf, 1, 1]]
    assert table.uniform[2] == pytest.approx(np.log(3), abs=1e-6) and 0 < table.uniform[0] < table.uniform[2]  # hard targets
    losses = experiments.read_predictions(ablations.path(cells[1], folder))[3]["losses"]
    assert len(losses) == 4 and table["training KL"][1] == pytest.approx(np.mean(losses[2:]))
    both = ablations.distances(cells[:2], "power", folder=folder)
    assert table["held-out KL"].isna().all()
    early = with_run(cell, training=replace(cell.run.training, epochs=8, held_out=0.5, patience=1, learning_rate=1.0))
    ablations.make([early], folder, tmp_path / "work")
    about = experiments.read_predictions(ablations.path(early, folder))[3]
    assert len(about["held_out_kl"]) < 8  # it ended early, and the last epoch is still the last epoch
    (row,) = ablations.distances([early], "epochs", folder=folder).to_dict("records")
    per_epoch = len(about["losses"]) // len(about["held_out_kl"])
    assert row["training KL"] == pytest.approx(np.mean(about["losses"][-per_epoch:]))
    assert row["held-out KL"] == min(about["held_out_kl"])
    assert both.students.tolist() == [2] and both["training KL"][0] == pytest.approx(table["training KL"][:2].mean())


def test_a_stack_of_student_and_teacher_reads_no_gold_and_answers_each_half_by_the_other(cell, tmp_path):
    folder = tmp_path / "predictions"
    ablations.make([cell], folder, tmp_path / "work")
    _, test = ablations.data("planted", cell.tasks)
    student = ablations.answer(cell, folder)
    blind = replace(test, task=replace(test.task, questions=unlabelled(test.task.questions)))
    for system, same in zip(experiments.stacked(test, student), experiments.stacked(blind, student), strict=True):
        assert np.array_equal(system.P, same.P) and system.what.calls == 1
        assert system.P.sum(axis=-1) == pytest.approx(1)
    most_probable, sampled, white_box = experiments.stacked(test, student)
    assert (most_probable.what.greedy, sampled.what.greedy, white_box.what.greedy) == (True, False, False)
    # What a question's own other orders say has no part in its answer: only in those of the other half.
    first = experiments.drawn(test.task, 0.5)
    P = test.P.copy()
    others = [i for i, order in enumerate(test.orders.tolist()) if order not in cyclic_orders(test.task.k).tolist()]
    P[np.ix_(first, others)] = 1 / test.task.k
    *_, changed = experiments.stacked(replace(test, P=P), student)
    assert np.array_equal(changed.P[first], white_box.P[first])
    assert not np.allclose(changed.P[~first], white_box.P[~first])
    # An averaged teacher as the student: nothing is left to correct.
    average = replace(student, P=debias.broadcast(debias.permutation_average(test.P), test.task.k))
    for system in experiments.stacked(test, average):
        assert np.abs(system.P - average.P).max() < 1e-3
    table = ablations.compare([cell], folder, stack=True)
    named = ["stacked error correction"] * 2 + ["stacked white-box error correction"]
    assert [row for row in table.method[table.task == "all"] if "stacked" in row] == named
    gaps = ablations.differences([cell], folder, stack=True)
    alone = gaps[gaps.rival_method == "distillation"]  # each stack beside the student that it is made of
    right = [metrics.accuracy(one.P, [q.answer for q in test.task.questions]).mean() for one in (student, white_box)]
    assert alone.method.tolist() == named and alone.difference.iloc[2] == pytest.approx(right[1] - right[0])


def test_levels_and_coverage(cell, tmp_path, monkeypatch):
    other = with_run(cell, power=2.0)
    ablations.make([cell], tmp_path / "kept", tmp_path / "work")
    test = ablations.data("planted", cell.tasks)[1]
    gold = [question.answer for question in test.task.questions]
    levels = ablations.levels(cell, tmp_path / "kept")
    averaged = debias.broadcast(debias.permutation_average(test.P), 3)
    assert levels["all-orders average"] == pytest.approx(metrics.accuracy(averaged, gold).mean())
    student = ablations.answer(cell, tmp_path / "kept").P
    assert levels["student of exact targets"] == pytest.approx(metrics.accuracy(student, gold).mean())
    monkeypatch.setattr(ablations, "MATRIX", {"first": (cell,), "both": (cell, other, other)})
    assert ablations.coverage(["first", "both"], tmp_path / "kept").to_numpy().tolist() == [["first", 1, 1], ["both", 1, 2]]
    with pytest.raises(ablations.MissingPredictions, match="none of these .* run `make students`"):
        ablations.effects(ablations.available([other], tmp_path / "kept"), "draws")
    # A student that stands in two parts counts once, and "all questions" has a number.
    table = ablations.effects([cell, cell], "n_train", folder=tmp_path / "kept")
    assert table.n_train.tolist() == [24] and table.seeds.tolist() == [1]
    shown = tables.wide(ablations.differences([cell], tmp_path / "kept"), ["teacher", "system"], "rival")
    assert shown.teacher.tolist() == ["planted"] and "[" in shown["biased teacher"][0]


def test_other_scores_recipes_or_questions_void_them(cell, tmp_path, monkeypatch):
    folder = tmp_path / "predictions"
    ablations.make([cell], folder, tmp_path / "work")
    assert ablations.available([cell, with_run(cell, power=2.0)], folder) == [cell]
    (train,), test = ablations.data("planted", cell.tasks)
    for pools in (([replace(train, P=train.P[:, ::-1] * 0.9 + 0.1 / 3)], test), ([train], planted("test", n=11, seed=5))):
        with monkeypatch.context() as patch:
            give(patch, lambda *args, pools=pools: pools)
            with pytest.raises(ablations.MissingPredictions, match="another recipe, scores or questions"):
                ablations.answer(cell, folder)
    # Another machine's exp() rounds the last digit otherwise: the same student.
    with monkeypatch.context() as patch:
        give(patch, lambda *args: ([replace(train, P=train.P + 1e-13)], test))
        ablations.answer(cell, folder)


def test_what_a_run_teaches(cell):
    (train,), _ = ablations.data("planted", cell.tasks)
    usual = experiments.lesson_of(cell.run, train)
    average = debias.permutation_average(train.P)
    assert usual.targets == pytest.approx(average) and usual.seen is None
    assert (usual.shown == all_orders(3)).all() and usual.questions == unlabelled(train.task.questions)
    hard = experiments.lesson_of(with_run(cell, power=np.inf).run, train)
    assert (hard.targets == np.eye(3)[average.argmax(-1)]).all()
    drawn = experiments.lesson_of(with_run(cell, draws=4).run, train).targets
    assert set(np.unique(drawn)) <= {0, 0.25, 0.5, 0.75, 1} and drawn.sum(-1) == pytest.approx(1)
    few, fewer = (experiments.lesson_of(with_run(cell, n_train=n).run, train) for n in (8, 4))
    assert fewer.questions == few.questions[:4] and len(few.targets) == 8
    ids = [q.id for q in train.task.questions]
    assert few.targets == pytest.approx(average[[ids.index(q.id) for q in few.questions]])
    shown = with_run(cell, orders="original", student=replace(cell.run.student, inputs="distribution")).run
    one = experiments.lesson_of(shown, train)
    assert (one.shown == [[0, 1, 2]]).all() and (one.seen.P == train.P[:, :1]).all()
    assert one.targets == pytest.approx(average)  # the teacher still averages over all orders
    with pytest.raises(ValueError, match="n_train = 25: there are 24 training questions"):
        experiments.lesson_of(with_run(cell, n_train=25).run, train)
    with pytest.raises(ValueError, match="orders = 'some'"):
        with_run(cell, orders="some")


def test_one_student_answers_several_things_and_is_trained_once(cell, tmp_path, monkeypatch):
    """Taught on questions of 3 and 2 options together, it answers 3, and 4 that it never saw; each compared with its own."""
    taught = [planted("three", n=24), planted("two", k=2, n=24)]
    asked = {("three",): planted("three", n=12, seed=5), ("four",): planted("four", k=4, n=10, seed=6)}
    give(monkeypatch, lambda teacher, tasks, on=(): (taught[: len(tasks)], asked[on or tasks]))
    monkeypatch.setattr(matrix, "TASKS", {name: tasks.TASKS["piqa"] for name in ("three", "two", "four")})
    run = replace(cell.run, student=replace(cell.run.student, k=0))
    alone = matrix.Cell("planted", ("three",), run)
    both = [matrix.Cell("planted", ("three", "two"), run, (on,)) for on in ("three", "four")]
    trained, train = [], ablations.train
    monkeypatch.setattr(ablations, "train", lambda *args: trained.append(args) or train(*args))
    assert ablations.make([alone, *both], tmp_path / "kept", tmp_path / "work") == 3
    assert [len(lessons) for _, _, lessons, _ in trained] == [1, 2]
    assert {ablations.path(c, ".").parent.as_posix() for c in both} == {
        f"planted/three-two-on-{on}" for on in ("three", "four")
    }
    assert [ablations.answer(c, tmp_path / "kept").P.shape for c in both] == [(12, 3, 3), (10, 4, 4)]
    table = ablations.compare([alone, *both], tmp_path / "kept").query("task != 'all' and kind == 'student'")
    assert table[["task", "taught_on", "n"]].fillna("").to_numpy().tolist() == [
        ["three", "", 12],
        ["three", "PIQA and PIQA", 12],
        ["four", "PIQA and PIQA", 10],
    ]
    assert both[0].what != alone.what and "taught on PIQA and PIQA" in title(both[0].what)
    with pytest.raises(ValueError, match="n_train = 8: questions of 2 numbers of options are learnt whole"):
        experiments.lessons_of(replace(run, n_train=8), taught)
    untaught = replace(both[1], run=replace(run, training=replace(run.training, epochs=0)))
    assert untaught.what.taught_on is None  # it learnt nothing anywhere


def test_content_key_covers_what_training_depends_on(cell):
    (train,), _ = ablations.data("planted", cell.tasks)
    seen = {ablations.key(cell)}
    for other in (
        with_run(cell, power=2.0),
        with_run(cell, draws=8),
        with_run(cell, n_train=20),
        with_run(cell, orders="original"),
        with_run(cell, training=replace(cell.run.training, seed=1)),
        with_run(cell, training=replace(cell.run.training, warmup=0.5)),
        with_run(cell, student=replace(cell.run.student, inputs="prediction")),
        with_run(cell, student=replace(cell.run.student, inputs="prediction"), greedy=True),
        with_run(cell, student=replace(cell.run.student, inputs="distribution")),
    ):
        assert ablations.key(other) not in seen and other.run.name != cell.run.name
        seen.add(ablations.key(other))
    lesson = experiments.lesson_of(cell.run, train)
    unordered = Lesson(lesson.questions, lesson.targets)
    assert content_key(cell.run.student, cell.run.training, lesson) == content_key(
        cell.run.student, cell.run.training, unordered
    )


def test_rivals_cost_what_they_say():
    test = planted("test", bias=0.8)
    by = {title(system.what): system for system in ablations.rivals(test)}
    P = experiments.in_cyclic_orders(test.P)
    assert (by["copy of the most probable decision"].P.argmax(-1) == P.argmax(-1)).all()
    assert by["mean over 2 orders"].P[:, 0] == pytest.approx((P[:, 0] + P[:, 2]) / 2)
    assert by["mean over 3 cyclic orders"].P[:, 1] == pytest.approx(P.mean(axis=1))
    assert {name: system.what.calls for name, system in by.items()} == {
        "biased teacher": 1,
        "copy of one sampled decision": 1,
        "copy of the most probable decision": 1,
        "prior-matching, 1 call": 1,
        "mean over 2 orders": 2,
        "mean over 3 cyclic orders": 3,
        "all-orders average": 6,
    }
    pairs = [title(system.what) for system in ablations.rivals(planted("pairs", k=2))]
    assert pairs[-2:] == ["prior-matching, 1 call", "all-orders average"]  # two orders are all there are
    # The planted bias is what prior-matching assumes: one call then says what knowledge says.
    assert by["prior-matching, 1 call"].P.argmax(-1) == pytest.approx(
        np.array([[q.answer] * 3 for q in test.task.questions])
    )


def every_cell() -> list[matrix.Cell]:
    return list(dict.fromkeys(cell for part in matrix.MATRIX.values() for cell in part))


def test_every_cell_has_a_file_of_its_own():
    cells = every_cell()
    assert len({ablations.path(cell) for cell in cells}) == len(cells)
    assert {cell.about for cell in cells if not cell.on} <= {"multiple_choice", "summeval", *tasks.TASKS}
    assert all(set(cell.tasks) <= {*tasks.MULTIPLE_CHOICE, *tasks.SUMMEVAL, *matrix.FOUR} for cell in cells)
    assert not any(set(tested) & set(matrix.BIG) for tested in matrix.UNSEEN)
    titles = [(cell.teacher, cell.run.title) for cell in matrix.MATRIX["heads and inputs"]]
    # Seeds of one student share a title; the weak teacher's joint and per-option students have one seed.
    assert {titles.count(title) for title in titles if title[0] == profiles.TEACHERS[0]} == {len(matrix.SEEDS)}
    assert {titles.count(title) for title in titles} == {1, len(matrix.SEEDS)}


def test_the_audit_of_students_knows_every_head(monkeypatch):
    chosen = []
    monkeypatch.setattr(audits, "auditable", lambda cells, folder: chosen.extend(cells) or list(cells))
    monkeypatch.setattr(audits, "audit", lambda *_: pd.DataFrame({"ok": [True]}))
    main(["students", "--audit"])
    assert {cell.run.student.head for cell in chosen} == set(HEADS)
    small = matrix.MATRIX["audited"]
    assert {cell.run.student.head for cell in small} == set(HEADS)
    assert {(cell.about, cell.run.student.inputs, cell.run.n_train) for cell in small} == {("multiple_choice", "plain", 500)}


@pytest.mark.slow
def test_the_committed_predictions_are_those_of_the_matrix(capsys):
    cells = every_cell()
    kept = {file for file in ablations.COMMITTED.rglob("*") if file.is_file()}
    assert {ablations.path(cell) for cell in ablations.available(cells)} == kept
    (ids, orders, P, about) = experiments.read_predictions(sorted(kept)[0])
    assert P.shape == (1050, 4, 4) and P.sum(-1) == pytest.approx(1, abs=1e-5) and len(set(ids)) == 1050
    assert (orders == cyclic_orders(4)).all() and about["seconds"] > 10 and len(about["losses"]) > 20
    main(["students", "--list", "--parts", "heads and inputs"])
    first = matrix.MATRIX["heads and inputs"][0]
    assert Path(capsys.readouterr().out.splitlines()[0].split()[1]) == ablations.path(first, ".")


def test_held_out_kls_in_notebook_6_are_those_of_the_stored_students():
    kls = {}
    for cell in matrix.MATRIX["one for all"]:
        if cell.about == "piqa" and cell.run.training.epochs:
            kls[cell.run.student.head] = experiments.read_predictions(ablations.path(cell))[3]["held_out_kl"]
    text = nbformat.read(ablations.ROOT / "notebooks" / "06_scale.ipynb", 4).cells[9].source
    assert f"{kls['cross_option'][0]:.4f} to {kls['shared_prefix'][0]:.4f} of shared-prefix" in text


def test_shared_contexts_are_told_as_they_are():
    new = pd.read_csv(ablations.ROOT / "figures" / "T7_new.csv").groupby("tasks").n.first()
    old = pd.read_csv(ablations.ROOT / "figures" / "T7_differences.csv").groupby("tasks").n.first()
    shared = old[new.index] - new
    assert shared.to_dict() == {"boolq": 952, "piqa": 191, "socialiqa": 0}
    words = " ".join(results.SECTIONS["T7_scale"].split())
    assert f"{shared.piqa} of its {old.piqa:,} test questions" in words
    assert f"{shared.boolq} of its {old.boolq:,} test questions" in words
    text = nbformat.read(ablations.ROOT / "notebooks" / "06_scale.ipynb", 4).cells[5].source
    boolq, piqa = (100 * shared[task] / old[task] for task in ("boolq", "piqa"))
    assert f"Of BoolQ's test questions {boolq:.0f}% have" in text and f"of PIQA's {piqa:.0f}% a goal" in text


def test_students_of_whole_sets_are_those_with_the_lowest_held_out_kl():
    """Of SocialIQA's and PIQA's two; of BoolQ and RACE one was trained."""
    table = ablations.held_out(matrix.MATRIX["epochs at scale"]).assign(cell=matrix.MATRIX["epochs at scale"])
    chosen = {cell for cell in matrix.MATRIX["scale"] if cell.run.training.epochs and not cell.run.n_train}
    for title_, rows in table.groupby("taught on"):
        best = rows.loc[rows.lowest.idxmin()]
        assert best.cell in chosen, title_
        by_epoch = [float(kl) for kl in best["held-out KL by epoch"].split(", ")]
        assert len(by_epoch) == best.cell.run.training.epochs and best.lowest == pytest.approx(min(by_epoch), abs=5e-5)
    assert table["taught on"].value_counts().to_dict() == {"SocialIQA": 2, "PIQA": 2, "BoolQ": 1, "RACE": 1}
    assert table.gain.iloc[0] == pytest.approx(0.009, abs=5e-4)  # SocialIQA's that was not chosen keeps its row
