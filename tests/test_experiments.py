"""From stored scores to tables and figures, on planted teachers whose truth is known."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from test_students import make_encoder
from transformers import AutoTokenizer

from permdistill import catalogue, debias, scores, teachers
from permdistill.api.endpoint import Endpoint
from permdistill.api.jobs import Drawn
from permdistill.configs import HEADS, StudentConfig, TrainingConfig
from permdistill.measure import evaluate, metrics
from permdistill.orders import all_orders, cyclic_orders
from permdistill.paper import experiments, figures, models, profiles, tables
from permdistill.paper import tasks as registry
from permdistill.paper.experiments import Scored, read_predictions, save_predictions
from permdistill.paper.systems import Description, described, titled
from permdistill.prompts import TEMPLATES
from permdistill.questions import CONTENT_FREE, Question, from_jsonl, unlabelled
from permdistill.students import Student
from permdistill.teachers import PlantedTeacher

matplotlib.use("Agg")


AT_SCALE = ("shared_prefix", "cross_option")  # heads that only large training sets have taught


def planted(name: str, n: int = 40, k: int = 3, bias: float = 2.0, seed: int = 0, ties: int = 0) -> Scored:
    """A task whose teacher knows every answer (1 nat above the rest) but prefers the first position by ``bias`` nats."""
    rng = np.random.default_rng(seed)
    answers = rng.integers(k, size=n)
    questions = [
        Question(
            f"{name}/{i}",
            "",
            f"which is {w} ?",
            tuple(f"{w} {o}" for o in ("cat", "dog", "bird", "fish")[:k]),
            int(a) if i >= ties else None,
        )
        for i, (a, w) in enumerate(zip(answers, rng.choice(["tall", "small", "old", "new"], n), strict=True))
    ]
    teacher = PlantedTeacher({q.id: np.eye(k)[a] for q, a in zip(questions, answers, strict=True)}, np.eye(k)[0] * bias)
    P = scores.probabilities(teacher.log_probs(questions, all_orders(k), TEMPLATES["letters"]).astype(float))
    task = registry.TaskSplit(name, questions, TEMPLATES["letters"], [name] * n, {"repeated": 3})
    return Scored("planted", task, P)


def test_teachers_table_knows_the_planted_truth():
    frame = tables.teachers([planted("one"), planted("two", bias=0.5)]).set_index(["task", "treatment"])
    # Bias above knowledge: the teacher always says "A", which is right in one order of three.
    assert frame.loc[("one", tables.BIASED), "accuracy"] == pytest.approx(1 / 3)
    assert frame.loc[("one", tables.DEBIASED), "accuracy"] == 1
    assert frame.loc[("one", tables.DEBIASED), "gain"] == pytest.approx(2 / 3)
    assert frame.loc[("one", tables.DEBIASED), "gain_low"] == pytest.approx(2 / 3)
    assert frame.loc[("one", tables.DEBIASED), ["ps", "ps_low", "ps_high", "ps_kl"]].tolist() == [0, 0, 0, 0]
    assert frame.loc[("one", tables.BIASED), "ps"] > frame.loc[("two", tables.BIASED), "ps"] > 0.05
    assert frame.loc[("one", tables.BIASED), "pb"] > frame.loc[("two", tables.BIASED), "pb"] > 0.05
    # Knowledge above bias: right in every order, so debiasing gains nothing, and the table says so.
    assert frame.loc[("two", tables.BIASED), "accuracy"] == 1
    assert tables.losses(frame.reset_index()).task.tolist() == ["two"]
    first = planted("one").P[:, :1].argmax(-1)[:, 0] == [q.answer for q in planted("one").task.questions]
    assert frame.loc[("one", tables.BIASED_ORIGINAL), "accuracy"] == pytest.approx(first.mean())


def test_items_without_gold_answer_count_for_sensitivity_only():
    s = planted("one", ties=10)
    row = evaluate.measure(s.P, all_orders(3), s.task.questions, s.task.groups)
    assert row["n"] == 30
    assert row["ps"] == pytest.approx(metrics.permutation_sensitivity(s.P).mean())
    assert np.isnan(evaluate.correct(s.P, s.task.questions)).sum() == 10
    assert tables.left_out([s.task]).iloc[0].tolist() == ["one", 40, 30, "3 repeated"]


def test_pretty_and_saved_tables(tmp_path):
    frame = tables.teachers([planted("one")])
    shown = tables.pretty(frame).set_index("treatment")
    assert shown.loc[tables.DEBIASED, "accuracy"] == "100.0 [100.0, 100.0]"
    # The planted bias is additive, which is what prior-matching assumes: it gains as much.
    assert shown["gain over biased"].tolist() == ["", "", *["66.7 [66.7, 66.7]"] * 3]
    assert shown.loc[tables.DEBIASED, "ps (TV)"] == "0.0 [0.0, 0.0]"
    (row,) = tables.summary(frame).to_dict("records")
    assert (row["biased"], row["all orders"], row["gain"]) == ("33.3", "100.0", "66.7 [66.7, 66.7]")
    path = tables.save(frame, tmp_path, "T1")
    pd.testing.assert_frame_equal(pd.read_csv(path), frame, rtol=1e-4, atol=1e-5)
    assert "66.7 [66.7, 66.7]" in path.with_suffix(".tex").read_text()
    more = frame.assign(nothing=np.nan, something=[np.nan] * (len(frame) - 1) + [1.0])
    assert {"nothing", "something"} & {*tables.pretty(more)} == {"something"}
    assert "nothing" in tables.pretty(more[:0])  # an empty table says what it would hold
    assert tables.read(tmp_path / "tables", "T1").equals(pd.read_csv(path))
    with pytest.raises(FileNotFoundError, match="run the notebook that writes table T9 first"):
        tables.read(tmp_path / "tables", "T9")


def test_baselines_answer_in_the_cyclic_orders():
    s = experiments.together([planted("one"), planted("two", bias=0.0, seed=1)])
    assert s.P.shape == (80, 6, 3) and s.task.members == ["one"] * 40 + ["two"] * 40
    cyclic = experiments.in_cyclic_orders(s.P)
    assert cyclic.shape == (80, 3, 3)
    for row, order in enumerate(cyclic_orders(3)):
        (same,) = np.flatnonzero((all_orders(3) == order).all(axis=1))
        assert (cyclic[:, row] == s.P[:, same]).all()
    biased, averaged, copied = experiments.baselines(s)
    assert (biased.P == cyclic).all() and (biased.orders == cyclic_orders(3)).all()
    assert metrics.permutation_sensitivity(averaged.P).max() == 0
    assert (averaged.P[:, 0] == debias.permutation_average(s.P)).all()  # of all orders, not of the cyclic ones
    decisions = experiments.black_box_decisions(s)
    assert (copied.P.argmax(-1) == decisions).all() and set(np.unique(copied.P)) == {0.0, 1.0}
    assert (decisions == experiments.black_box_decisions(s)).all()
    # Draws follow the teacher: over many items the share of the right option is near its mean probability.
    many = planted("many", n=4000)
    right = np.array([q.answer for q in many.task.questions])
    drawn = (experiments.black_box_decisions(many) == right[:, None]).mean()
    expected = np.take_along_axis(experiments.in_cyclic_orders(many.P), right[:, None, None], axis=-1).mean()
    assert drawn == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("inputs", ["plain", "prediction"])
def test_distil_writes_checkpoint_and_predictions(tmp_path, inputs):
    encoder = make_encoder(tmp_path / "encoder")
    run = profiles.Run(StudentConfig(encoder, "per_option", inputs, 3, 64), TrainingConfig(epochs=1))
    train, test = planted("train", n=24), planted("test", n=12, seed=5)
    system = experiments.distil(run, train, test, tmp_path)
    assert system.P.shape == (12, 3, 3) and system.what == run.what and system.parameters > 1000
    (predictions,) = (tmp_path / "predictions").rglob("*.parquet")
    frame = pd.read_parquet(predictions)
    assert frame.columns.tolist() == ["id", "order", "probabilities"] and len(frame) == 12 * 3
    assert np.array(frame.probabilities.tolist()).reshape(12, 3, 3) == pytest.approx(system.P)
    assert (metrics.permutation_sensitivity(system.P).max() < 1e-9) == (inputs == "plain")


def test_stored_predictions_are_whole_and_finite_or_refused(tmp_path):
    test = planted("test", n=12, seed=5)
    path, orders = tmp_path / "kept.parquet", cyclic_orders(3)
    P = test.P[:, :3]
    save_predictions(path, test, orders, P, {"key": "k"})
    assert read_predictions(path)[2] == pytest.approx(P, abs=1e-6)
    whole = path.read_bytes()
    first = pq.ParquetFile(path).metadata.row_group(0).column(2)
    for place in range(first.dictionary_page_offset or first.data_page_offset, len(whole) - 400, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            found = read_predictions(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert np.allclose(found[2], P, atol=1e-6)
    pq.write_table(pq.read_table(io.BytesIO(whole)), path)  # as the committed ones: without checksums
    assert read_predictions(path)[2] == pytest.approx(P, abs=1e-6)
    for value in (np.nan, np.inf):
        P[3, 1, 2] = value
        save_predictions(path, test, orders, P, {"key": "k"})
        with pytest.raises(ValueError, match=rf"{path} is damaged \(probabilities are not finite\): restore it"):
            read_predictions(path)


def test_students_table_compares_with_the_biased_teacher_and_keeps_losers():
    test = experiments.together([planted("one"), planted("two", seed=2)])
    systems = experiments.baselines(test)
    right = np.array([q.answer for q in test.task.questions])
    good = debias.broadcast(debias.one_hot(right, 3), 3)
    bad = debias.broadcast(debias.one_hot((right + 1) % 3, 3), 3)
    students = {n: Description("student", n, 0) for n in ("good", "bad")}
    systems += [experiments.System(students[n], P, cyclic_orders(3), 10) for n, P in (("good", good), ("bad", bad))]
    frame = tables.students(test, systems)
    assert frame.groupby("task", sort=False).size().to_dict() == {"one": 5, "two": 5, "all": 5}
    assert set(frame.teacher) == {"planted"} and described(frame)[:5] == [system.what for system in systems]
    by = frame.set_index(["task", "method"])
    assert by.loc[("all", "good"), "gain"] == pytest.approx(2 / 3) and by.loc[("all", "bad"), "gain"] == pytest.approx(
        -1 / 3
    )
    assert np.isnan(by.loc[("all", "biased"), "gain"]) and by.loc[("all", "good"), "n"] == 80
    assert tables.better_than_teacher(frame).method.tolist() == ["good"]
    assert tables.worse_than_teacher(frame).method.tolist() == ["bad"]
    # (students' ps is 0, the teacher's is not)
    assert tables.less_sensitive(frame)["below teacher"].tolist() == ["2 of 2"] * 3
    assert len(figures.students(frame).axes) >= 3
    (ax,) = figures.sensitivity_against_accuracy(frame).axes  # all tasks together
    assert sorted(text.get_text() for text in ax.texts) == ["all orders", "bad", "biased", "copy", "good"]
    assert len(ax.containers) == 5


def test_figures_are_files_that_do_not_change(tmp_path):
    scored = [planted("one"), planted("two", k=2)]
    frame = tables.teachers(scored)
    first = figures.save(figures.sensitivity_and_gain(frame), tmp_path / "a", "T1")
    second = figures.save(figures.sensitivity_and_gain(frame), tmp_path / "b", "T1")
    assert first.read_bytes() == second.read_bytes() and first.stat().st_size > 5000
    assert first.with_suffix(".pdf").read_bytes() == second.with_suffix(".pdf").read_bytes()
    positions = figures.preferred_positions(scored)
    heights = [[bar.get_height() for bar in ax.patches] for ax in positions.axes]
    assert heights[0][:3] == pytest.approx(100 * metrics.position_marginals(scored[0].P, all_orders(3)).mean(axis=0))
    assert heights[0][0] > 50
    titled = figures.preferred_positions([replace(s, task=replace(s.task, name="summeval16_fluency")) for s in scored[1:]])
    assert [ax.get_title() for ax in titled.axes] == ["SummEval fluency"]


def test_no_teacher_falls_off_the_figure():
    """A later teacher's intervals may reach further than the first one's on the axis that they share."""
    strong = replace(planted("one", bias=3.0), teacher="strong")
    frame = tables.teachers([planted("one", bias=0.1), strong])
    axes = figures.sensitivity_and_gain(frame).axes
    left, right = axes[0].get_xlim()
    assert left == 0 and right > 100 * frame.ps_high.max() > 1.5 * 100 * frame[frame.teacher != "strong"].ps_high.max()


def test_profiles_name_each_run_once_and_fit_their_tasks():
    for profile in profiles.PROFILES.values():
        names, (choice, pairs) = [run.name for run in profile.runs], profile.pools.values()
        assert len(set(names)) == len(names)
        assert {run.student.k for run in choice.runs} == {4} and {run.student.k for run in pairs.runs} == {2}
    for profile in (profiles.PROFILES["smoke"], profiles.PROFILES["full"]):
        choice, pairs = profile.pools.values()
        assert {run.student.head for run in pairs.runs} == set(HEADS) - set(AT_SCALE)
        assert {(run.student.head, run.student.inputs) for run in choice.runs} >= {
            *((head, inputs) for head in ("joint", "per_option") for inputs in ("plain", "prediction")),
            ("bi_encoder", "plain"),
        }
    with pytest.raises(ValueError, match="task 'racing'"):
        registry.load_task("racing", "test")


@pytest.mark.parametrize("profile", ["smoke", "full"])
def test_every_question_fits_the_students_of_every_profile(profile):
    settings = profiles.PROFILES[profile]
    tokenizer = AutoTokenizer.from_pretrained(models.folder("all-MiniLM-L6-v2"))  # all-mpnet-base-v2's has the same words
    choice, pairs = settings.pools.values()
    for tasks, runs in ((choice.tasks, choice.runs), (pairs.tasks[:1], pairs.runs)):
        questions = [q for t in tasks for split in ("train", "test") for q in registry.load_task(t, split).questions]
        for config in {run.student for run in runs if run.student.inputs == "prediction"}:
            student = Student(config, None, tokenizer)
            # What is never cut decides: options. Those of the most characters, all together or one alone.
            by_size = [sorted(questions, key=lambda q: of(map(len, q.options)))[-150:] for of in (sum, max)]
            longest = list(dict.fromkeys(q for part in by_size for q in part))
            orders = np.broadcast_to(np.arange(config.k), (len(longest), 1, config.k))
            rows, _ = student.encode(longest, orders, np.zeros((len(longest), 1), dtype=int))  # raises if one does not fit
            assert max(len(row["input_ids"]) for row in rows) <= config.max_length


def test_training_and_test_share_no_question_and_no_document():
    for task in registry.LAPTOP:
        test = registry.load_task(task, "test")
        assert len(test.questions) >= 300
        if "train" not in registry.TASKS[task].splits:
            with pytest.raises(ValueError, match="split 'train'"):
                registry.load_task(task, "train")
            continue
        train = registry.load_task(task, "train")
        assert not {(q.context, q.question, q.options) for q in train.questions} & {
            (q.context, q.question, q.options) for q in test.questions
        }
        if task == "piqa":
            assert len(train.questions) == 16084 == len({q.id for q in train.questions}) and len(test.questions) == 1837
            goals = {" ".join(q.context.casefold().split()) for q in train.questions}
            assert sum(" ".join(q.context.casefold().split()) in goals for q in test.questions) == 191  # as T6 says
        if task in registry.SUMMEVAL:
            assert not set(train.groups) & set(test.groups)
            assert len(set(test.groups)) == 40
        assert all(q.answer is None for q in unlabelled(train.questions))


def own_questions(path, n: int = 4) -> str:
    records = [
        {"id": f"q{i}", "question": f"which {i} ?", "options": ["a", "b", "c"][: 2 + i % 2], "answer": i % 2}
        for i in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return str(path)


def test_own_teacher_and_questions_are_scored_once_and_found_again(tmp_path, monkeypatch):
    path = own_questions(tmp_path / "mine.jsonl")

    class Own(PlantedTeacher):
        """Knows nothing, prefers the first position, whatever the question and K."""

        model_key = "planted"

        def check(self, questions, template):
            pass

        def log_probs(self, questions, orders, template):
            k = orders.shape[1]
            self.bias, self.preferences = np.eye(k)[0], {q.id: np.zeros(k) for q in questions}
            return super().log_probs(questions, orders, template)

    teacher = Own({}, np.zeros(2))
    monkeypatch.setattr(experiments, "load_teacher", lambda name: teacher)
    monkeypatch.setattr(experiments, "model_key", lambda name: "planted")
    monkeypatch.setattr(teachers, "has_chat_template", lambda name: True)
    experiments._live.cache_clear()
    settings = profiles.PROFILES["smoke"]
    for _ in range(2):
        scored = experiments.teachers_scores(settings, tmp_path, teacher="models/mine", questions=path)
        assert [(s.teacher, s.task.name, s.P.shape) for s in scored] == [
            ("mine", "mine, K = 2", (2, 2, 2)),
            ("mine", "mine, K = 3", (2, 6, 3)),
        ]
        # Without content the planted bias is all that is left.
        for s in scored:
            expected = np.exp(np.eye(s.task.k)[0])
            assert s.content_free == pytest.approx(expected / expected.sum())
        assert teacher.calls == 4 + 2 * len(CONTENT_FREE)  # the second time nothing is scored
    table = tables.debiasers(scored)
    assert debias.CALIBRATION in set(table.debiaser)
    experiments._live.cache_clear()


def test_missing_scores_of_a_profile_are_not_made_up(tmp_path):
    with pytest.raises(scores.MissingScores):
        experiments.teachers_scores(profiles.PROFILES["smoke"], tmp_path, committed=str(tmp_path))


def test_every_debiaser_on_what_is_there():
    s = planted("one", n=30)
    whole = tables.every_debiaser(s.P, s.orders, s.task.questions, s.task.groups, np.full(3, 1 / 3), list(evaluate.METRICS))
    assert len(whole) == len(catalogue.debiasers(3))
    row = whole.set_index("debiaser").loc[debias.DEBIASED]
    assert row.accuracy == 1 and row.ps == 0 and row.calls == 6 and row.gain == pytest.approx(2 / 3)
    families = {method.family or method.name for k in (3, 4) for method in catalogue.debiasers(k)}
    assert set(whole.family) < families == set(figures.FAMILIES)  # each has a marker
    assert {"rstd", "ckld", "cramers_v", "circular", "adversarial", "flip", "ppa", "pbm"} <= set(whole)
    # A harness that did the rotations only: no method that needs all orders, no calibration.
    cyclic = [s.orders.tolist().index(order) for order in cyclic_orders(3).tolist()]
    part = tables.every_debiaser(s.P[:, cyclic], cyclic_orders(3), s.task.questions, s.task.groups)
    names = set(part.debiaser)
    assert {debias.BIASED, debias.CYCLIC, debias.PRIDE} <= names and not {debias.DEBIASED, debias.CALIBRATION} & names
    # Any two orders, and no gold answers.
    bare = [replace(q, answer=None) for q in s.task.questions]
    two = tables.every_debiaser(s.P[:, :2], s.orders[:2], bare, s.task.groups, names=list(evaluate.METRICS))
    assert debias.CYCLIC not in set(two.debiaser) and "accuracy" not in two and two.ps.notna().all()


def test_prompts_table_separates_prompt_from_order():
    s = planted("one", n=30)
    same = tables.prompts([[s, s]]).set_index(["prompt", "treatment"])
    assert same.loc[("between prompts", tables.BIASED), "ps"] == same.loc[("between prompts", tables.DEBIASED), "ps"] == 0
    other = planted("one", n=30, bias=1.0)
    moved = tables.prompts([[s, other]]).set_index(["prompt", "treatment"])
    expected = np.abs(s.P - other.P).sum(-1).mean() / 2
    assert moved.loc[("between prompts", tables.BIASED), "ps"] == pytest.approx(expected)


def test_mcnemar_table_counts_the_questions_that_change():
    row = tables.decisions([planted("one")]).iloc[0]
    original = (planted("one").P[:, 0].argmax(-1) == [q.answer for q in planted("one").task.questions]).sum()
    assert row["only original right"] == 0 and row["only average right"] == 40 - original


def test_seeds_of_a_student_share_a_row_of_their_mean():
    s = planted("one")
    biased, averaged, copied = experiments.baselines(s)
    seeds = [replace(system, what=Description("student", "any", 0)) for system in (averaged, copied)]
    table = tables.students(s, [biased, *seeds]).set_index(["task", "method"])
    row = table.loc[("all", "any")]
    alone = tables.students(s, [biased, averaged, copied]).set_index(["task", "method"]).loc["all"]
    both = alone.loc[[averaged.what.method, copied.what.method]]
    assert row.seeds == 2 and row.accuracy == pytest.approx(both.accuracy.mean())
    assert row.ps == pytest.approx(both.ps.mean())
    run = profiles.PROFILES["smoke"].runs[0]
    other = replace(run, training=replace(run.training, seed=1))
    assert other.what == run.what and other.title == run.title and other.name == f"{run.name}-seed1"
    assert replace(run, greedy=True, power=4.0).name == f"{run.name}-greedy-power4"


def test_titles_are_made_when_tables_are_printed(tmp_path):
    s = planted("one")
    run = profiles.PROFILES["smoke"].runs[0]
    unusual = replace(run, greedy=True, power=np.inf, draws=8, n_train=20, orders="original")
    baselines = experiments.baselines(s)
    students = [replace(baselines[1], what=one.what) for one in (run, unusual)]
    api = replace(baselines[2], what=replace(baselines[2].what, greedy=None))
    table = tables.students(s, [*baselines, api, *students])
    titles = ["biased teacher", "all-orders average", "copy of one sampled decision", "copy of the one decision"]
    titles += [run.title, f"{run.title} (greedy), hard targets, 8 draws, 20 questions, original order only"]
    assert "system" not in table and tables.pretty(table).system.tolist() == titles * 2
    read = pd.read_csv(tables.save(table, tmp_path, "T"))
    assert described(read) == described(table) and titled(read).system.tolist() == titles * 2
    assert "20.0" not in (tmp_path / "tables" / "T.csv").read_text()  # whole numbers stay whole
    assert not {"kind", "method", "draws"} & {*titled(read)} and "calls" in titled(read)


def test_greedy_decisions_are_the_most_probable():
    s = planted("one", bias=0.5)
    assert (experiments.black_box_decisions(s, greedy=True) == experiments.in_cyclic_orders(s.P).argmax(-1)).all()
    assert (experiments.black_box_decisions(s) != experiments.in_cyclic_orders(s.P).argmax(-1)).any()


def test_own_questions_without_answers_still_get_their_tables(tmp_path):
    s = planted("one")
    bare = replace(s, task=replace(s.task, questions=unlabelled(s.task.questions)))
    t1 = tables.teachers([bare])
    assert "accuracy" not in t1 and list(tables.summary(t1)) == ["teacher", "task", "n", "ps (TV), biased"]
    assert len(tables.losses(t1)) == 1 and "ps (TV)" in tables.pretty(t1)
    figures.save(figures.sensitivity_and_gain(t1), tmp_path, "T1")
    assert "accuracy" not in tables.students(bare, experiments.baselines(bare))


def test_t1_says_what_the_labels_got_of_the_probability():
    massed = replace(planted("one"), label_mass=0.974)
    t1 = tables.teachers([massed])
    (low,) = tables.summary(tables.teachers([replace(massed, label_mass=0.494)]))["label mass"]
    assert low.startswith("0.49 (the model wants to say something else: try another template, template_args")
    assert tables.summary(t1)["label mass"].tolist() == ["0.97"] and set(tables.pretty(t1)["label_mass"]) == {"0.97"}
    stored = experiments.read_scores("smollm2-135m", "arc_easy", "test", n=3)
    assert 0.1 < stored.label_mass <= 1


def test_split_keeps_groups_together_and_loses_nothing():
    s = planted("one")
    questions = [replace(q, context=f"passage {i // 4}") for i, q in enumerate(s.task.questions)]
    grouped = replace(s, task=replace(s.task, questions=questions))
    assert len(set(grouped.task.groups)) == 10 and s.task.groups == [q.id for q in s.task.questions]
    same = replace(s.task, questions=[replace(q, context="of all") for q in questions])
    assert same.groups == s.task.groups
    train, test = experiments.split(grouped, 0.7)
    assert (len(train.P), len(test.P)) == (28, 12)
    assert not set(train.task.groups) & set(test.task.groups)
    ids = [q.id for q in s.task.questions]
    for part in (train, test):
        places = [ids.index(q.id) for q in part.task.questions]
        assert (part.P == s.P[places]).all() and len(part.task.members) == len(places)
    with pytest.raises(ValueError, match="leaves nothing on one side"):
        experiments.split(grouped, 0.99)


def test_example_questions_can_be_read_back(tmp_path):
    path = experiments.example_questions(tmp_path, 5)
    assert len(from_jsonl(path)) == 5


# --------------------------------------------------------------------------------------------------------------------
# Teachers that only an API reaches


def said_by(s: Scored, n: int, seed: int = 0) -> Drawn:
    """``n`` decisions a question, each drawn from the teacher in an order drawn for itself."""
    rng = np.random.default_rng(seed)
    places = rng.integers(len(s.orders), size=(len(s.P), n))
    P = np.take_along_axis(s.P, places[..., None], axis=1)
    return Drawn(s.orders[places], debias.sampled_decisions(P, rng))


def test_draws_table_converges_to_the_white_box_average():
    s = planted("one", n=120)
    said = said_by(s, 32)
    frame = tables.draws(said, s.task, s.P)
    *histograms, average = frame.to_dict("records")
    assert [row["draws"] for row in histograms] == [1, 2, 4, 8, 16, 32] and np.isnan(average["draws"])
    for row in histograms:
        assert row["kl"] == pytest.approx(row["kl_drawn_from_white_box"], rel=0.25) and row["inside_99"] >= 0.95
    assert histograms[-1]["kl"] < histograms[0]["kl"] / 10
    assert average["accuracy"] == 1 and average["kl"] == 0
    assert histograms[0]["accuracy"] < histograms[-1]["accuracy"] < 1.01
    # Decisions of another model are found out.
    other = tables.draws(said_by(planted("one", n=120, seed=9), 32), s.task, s.P)
    assert other.inside_99[5] < 0.9 and other.kl[5] > 1.5 * other.kl_drawn_from_white_box[5]


def test_draws_table_without_white_box_and_with_draws_that_failed():
    s = planted("one", n=10)
    said = said_by(s, 4)
    said.decisions[0, 0] = said.decisions[1] = -1
    task, left = experiments.answered(s.task, said)
    assert [q.id for q in task.questions] == ["one/0", *(f"one/{i}" for i in range(2, 10))]
    assert task.left_out == {"repeated": 3, "without any decision": 1} and left.decisions.shape == (9, 4)
    frame = tables.draws(left, task)
    assert frame.n.tolist() == [8, 9, 9] and "kl" not in frame
    assert experiments.white_box("", task, None) is None
    assert len(figures.draws(frame).axes) == 1
    assert len(figures.draws(tables.draws(said_by(s, 4), s.task, s.P)).axes) == 2


def test_students_of_decisions_alone(tmp_path):
    encoder = make_encoder(tmp_path / "encoder")
    both = planted("both", n=30)
    train, test = experiments.split_task(both.task, 0.6)
    assert (train.name, len(train.questions), test.name, len(test.questions)) == ("both, train", 18, "both, test", 12)
    assert not {q.id for q in train.questions} & {q.id for q in test.questions}
    endpoint = Endpoint("http://127.0.0.1:1/v1", "m")
    calls = experiments.labelling(endpoint, train, 8).calls
    assert len(calls) == 18 * 8 and {call.question.answer for call in calls} == {None}
    asked = experiments.one_call(endpoint, test).calls
    assert [call.order for call in asked] == [(0, 1, 2)] * 12 and {call.question.answer for call in asked} == {None}
    jobs = (experiments.labelling(endpoint, train, 8, "answer"), experiments.one_call(endpoint, test, "answer"))
    assert {job.mode for job in jobs} == {"answer"} and jobs[0].calls == calls and jobs[1].calls == asked

    ids = [q.id for q in both.task.questions]
    P = [both.P[[ids.index(q.id) for q in part.questions]] for part in (train, test)]
    said = said_by(Scored("planted", train, P[0]), 8)
    decisions = debias.sampled_decisions(P[1][:, :1], np.random.default_rng(0))
    one = Drawn(np.broadcast_to(np.arange(3), (12, 1, 3)), decisions)
    systems = [experiments.copied(test, one)]
    for inputs in ("prediction", "plain"):
        run = profiles.Run(StudentConfig(encoder, "per_option", inputs, 3, 64), TrainingConfig(epochs=1), draws=8)
        systems.append(experiments.distil_decisions(run, train, said, test, one, tmp_path))
        assert (tmp_path / "students" / run.name / "permdistill.json").exists() and systems[-1].P.shape == (12, 1, 3)
    # Error correction reads the decision, plain distillation does not.
    other = Drawn(one.orders, (decisions + 1) % 3)
    for inputs, system in zip(("prediction", "plain"), systems[1:], strict=True):
        run = profiles.Run(StudentConfig(encoder, "per_option", inputs, 3, 64), TrainingConfig(epochs=1), draws=8)
        again = experiments.distil_decisions(run, train, said, test, other, tmp_path)
        assert (np.abs(again.P - system.P).max() < 1e-9) == (inputs == "plain")
    frame = tables.answers(test, systems)
    right = np.mean([q.answer == d for q, (d,) in zip(test.questions, decisions, strict=True)])
    assert frame[frame.task == "all"].accuracy.iloc[0] == pytest.approx(right)
    assert frame.gain.notna().sum() == 4  # two students, paired with the copy, in both rows


def test_what_was_scored_in_cyclic_orders_alone_teaches_too():
    """Their mean is the target; a plain student is shown all orders, one that sees answers only theirs."""
    every = planted("train", n=12)
    some = replace(every, P=experiments.in_cyclic_orders(every.P))
    assert some.orders.tolist() == cyclic_orders(3).tolist() and len(every.orders) == 6
    run = profiles.Run(StudentConfig("encoder", "per_option", "plain", 3, 64), TrainingConfig(epochs=1))
    lesson = experiments.lesson_of(run, some)
    assert lesson.targets == pytest.approx(some.P.mean(axis=1)) and len(lesson.shown) == 6
    seeing = replace(run, student=replace(run.student, inputs="distribution"))
    assert experiments.lesson_of(seeing, some).seen.orders.tolist() == cyclic_orders(3).tolist()
