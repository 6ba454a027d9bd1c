"""What notebooks show: all of a table, words with its numbers, names that hide nothing; and that what is stored holds."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from test_bench import made_up
from test_experiments import planted
from test_matrix import cell, with_run  # noqa: F401  (a fixture)

from permdistill.paper import (
    ablations,
    audits,
    claims,
    display,
    experiments,
    figures,
    matrix,
    paths,
    profiles,
    story,
    tables,
)
from permdistill.paper.cli import main

matplotlib.use("Agg")
FIGURES = paths.ROOT / "figures"


def read(name: str) -> pd.DataFrame:
    return pd.read_csv(FIGURES / f"{name}.csv")


def test_a_table_has_every_row_no_index_and_each_interval_on_one_line():
    frame = pd.DataFrame({"teacher": ["t"] * 70, "system": [f"a <long> name {i}" for i in range(70)], "x": 0.123456})
    frame["gain"] = "1.0 [-2.0, 3.5]"
    table = display.shown(frame, "a note", drop=["x"])
    html = table._repr_html_()
    assert html.count("<tr") == 71 and html.count("1.0\u00a0[-2.0,\u00a03.5]") == 70
    assert "&lt;long&gt; name 69" in html and "..." not in html and "0.123" not in html
    assert table.above == "teacher t" and list(table.frame) == ["system", "gain"] and html.endswith("a note</div>")
    assert html == display.shown(frame, "a note", drop=["x"])._repr_html_()  # nbval compares it
    assert display.folded(frame, "all of them")._repr_html_().startswith("<details><summary>all of them</summary>")
    assert "None." in display.shown(frame[:0])._repr_html_()


def test_short_columns_are_never_wrapped_and_a_fold_is_plain_text():
    frame = pd.DataFrame({"model": ["qwen2.5-coder-1.5b"], "evidence": ["more than twenty letters"], "n": [12]})
    html = display.folded(frame, "what `make bench` says")._repr_html_()
    assert re.findall(r"td\.(col\d) \{\s*white-space: nowrap;", html) == ["col0", "col2"]
    assert re.findall(r"td\.(col\d) \{\s*min-width: 14em;", html) == ["col1"]
    assert "<summary>what make bench says</summary>" in html


def test_numbers_and_gaps_are_shown_shortly():
    frame = pd.DataFrame({"a": [0.123456, np.nan], "b": pd.array([3, pd.NA], dtype="Int64"), "c": [1234567.0, None]})
    assert repr(display.shown(frame)).splitlines()[2:] == ["| 0.1235 | 3 | 1.235e+06 |", "|  |  |  |"]


def test_contents_change_with_any_score():
    scored = planted("one")
    P = scored.P.copy()
    before = display.contents([scored])
    P[3, 2] += [0.0005, -0.0005, 0]
    after = display.contents([replace(scored, P=P)])
    assert before.fingerprint[0] != after.fingerprint[0] and before.drop(columns="fingerprint").equals(
        after.drop(columns="fingerprint")
    )
    assert before.iloc[0, :4].tolist() == ["planted", 1, 40, 240]


def test_says_what_is_stored_and_what_is_live(tmp_path):
    for folder in ("", str(experiments.COMMITTED)):
        assert "Scores: stored (scores/); audited" in display.source(folder)
    assert display.source(str(tmp_path)) == "Scores: live, computed by this run."
    assert "Students: stored predictions (predictions/); audited" in display.source(students=ablations.STORED)
    assert display.source(students=ablations.LIVE) == "Students: live, trained by this run."


def test_the_story_has_the_tables_numbers():
    t1, t2 = read("T1_teachers"), read("T2_students_multiple_choice")
    words = story.teachers(t1, read("T2_race"))
    best = t1[(t1.teacher == t1.teacher[0]) & (t1.treatment == tables.DEBIASED)].sort_values("gain").iloc[-1]
    assert f"{100 * best.gain:.1f} [{100 * best.gain_low:.1f}, {100 * best.gain_high:.1f}] points" in words
    assert "a gain of 6.3 [5.5, 7.2] points; the paper's, on RACE++, goes from 61.2 to 68.3" in words
    whole = t2[t2.task == "all"].set_index("kind")
    assert f"right on {100 * whole.accuracy['teacher']:.1f} [" in story.students(t2)
    assert "(f) error correction" in story.students(t2) and "[Claim" not in words
    both = tables.read(FIGURES, "T2_students_multiple_choice", "T3_students_summeval")
    assert "**all of T2**: 6 of 6 students depend less" in story.sensitivity(both)
    t4, f2, f3, collapse = (read(n) for n in ("T4_matrix", "F2_draws", "F3_questions", "T4_collapse"))
    made = story.makes(t4, f2, f3, collapse)
    assert f"{100 * f2.accuracy.iloc[-1]:.1f}" in made and "exact targets" not in made
    t7, gaps, four, alone, *curves = (
        read(n) for n in ("T7_scale", "T8_differences", "T9_differences", "T9_alone", "F3_scale", "F2_scale", "T7_collapse")
    )
    made = story.scale(t7, gaps, four, alone, *curves)
    together = alone.set_index("task").together["race"]
    assert f"minus the one of each task: SocialIQA {100 * alone.together.iloc[0]:.1f} [" in made
    assert f"RACE {100 * together:.1f} [" in made and "(T9), taught on SocialIQA and PIQA and BoolQ and RACE" in made
    assert f"33,177 teach {100 * curves[0].accuracy.iloc[-1]:.1f}" in made
    assert f"exact targets {100 * curves[1].accuracy.iloc[0]:.1f}" in made
    unseen = gaps[(gaps.tasks == "csqa") & gaps.taught_on.notna() & (gaps.rival_method == "untrained")].iloc[0]
    assert f"CommonsenseQA {100 * unseen.difference:.1f} [" in made
    assert "**SocialIQA, whole test set** (T7): the biased" in made
    stacks = t7[(t7.method == "stacked error correction") & (t7.task == "socialiqa") & (t7.n_train == 0)]
    decided, sampled = (stacks[stacks.greedy.astype(bool) == greedy].iloc[0] for greedy in (True, False))
    assert re.search(rf"{100 * decided.gain:.1f} \[[^]]*\] with the teacher's most probable decision", made)
    assert re.search(rf"{100 * sampled.gain:.1f} \[[^]]*\] with a sampled one", made)
    c1 = read("C1_claims")
    counted = ", ".join(f"{n} {verdict}" for verdict, n in c1.groupby("verdict").size().items())
    assert (
        story.verdicts(c1).endswith(f"Together, of {len(c1)} verdicts, one for a claim and a teacher: {counted}.")
        and len(story.verdicts(c1).splitlines()) == 12
    )
    assert set("abcdefghijk") == {c.letter for c in claims.CLAIMS}


def test_few_questions_are_said_to_be_few():
    table = read("T2_students_multiple_choice").query("task == 'all'").assign(n=8)
    assert "So few questions show that everything runs" in story.own(table)
    plain = table[(table.kind != "student") | (table["head"] == "bi_encoder") & (table.method == "distillation")]
    untrained = plain[plain.kind == "student"].assign(method="untrained", accuracy_high=0.99)
    assert "do not show that teaching helped" in story.own(pd.concat([plain, untrained]))
    assert "Without gold answers" in story.own(plain.drop(columns="accuracy"))


def test_students_are_stored_or_live(cell, tmp_path, monkeypatch, capsys):  # noqa: F811
    (train_on,), test = ablations.data("planted", cell.tasks)
    pool = profiles.Pool("T2", cell.tasks, 10**9, (cell.run,))
    settings = replace(profiles.PROFILES["smoke"], teachers=("planted",), pools={"one": pool})
    monkeypatch.setattr(ablations, "COMMITTED", tmp_path / "kept")
    over = (settings, pool, train_on, test, tmp_path / "run")
    (missing,) = ablations.students(*over)
    assert f"not stored, so trained now: {cell.run.title}" in capsys.readouterr().out
    (live,) = ablations.students(*over, ablations.LIVE)
    ablations.make([cell], tmp_path / "kept", tmp_path / "work")
    monkeypatch.setattr(experiments, "train", lambda *args, **more: pytest.fail("trained"))
    (stored,) = ablations.students(*over)
    assert stored.P == pytest.approx(live.P, abs=1e-6) and stored.what == live.what == missing.what
    with pytest.raises(pytest.fail.Exception, match="trained"):  # those of other questions are not taken
        fewer = test.task.where(np.arange(len(test.P)) < 6)
        ablations.students(settings, pool, train_on, replace(test, task=fewer, P=test.P[:6]), tmp_path)
    with pytest.raises(ValueError, match="students = 'maybe': give 'stored' or 'live'"):
        ablations.students(*over, "maybe")


def test_students_of_one_attribute_are_asked_what_those_of_all_are():
    full = profiles.PROFILES["full"]
    pool = full.pools["summeval"]
    assert profiles.n_test(full, pool.tasks) == profiles.n_test(full, pool.tasks[:1]) == pool.n_test == 700
    assert profiles.n_test(full, ("piqa",)) > 10**6


def test_audit_trains_anew_and_finds_what_is_not_so(cell, tmp_path, capsys, monkeypatch):  # noqa: F811
    folder, other = tmp_path / "kept", with_run(cell, draws=2)
    ablations.make([cell, other], folder, tmp_path / "work")
    capsys.readouterr()
    assert audits.auditable([cell, other, cell], folder) == [cell, other]
    assert not capsys.readouterr().out
    missing = with_run(cell, draws=3)  # what is not stored cannot be audited, and is named
    assert audits.auditable([missing, cell, other], folder) == [cell, other]
    assert capsys.readouterr().out.split() == [
        *"not audited, since its predictions are not stored:".split(),
        *[str(ablations.path(missing, "."))],
    ]
    monkeypatch.setitem(matrix.MATRIX, "audited", (missing,))
    with pytest.raises(SystemExit, match="none of these students' predictions are stored: run `make students`"):
        main(["students", "--audit", "--predictions", str(folder), "--work", str(tmp_path / "again")])
    found = audits.audit([cell], tmp_path / "again", folder)
    assert found.ok.all() and found["mean TV"][0] < 1e-5 and found["same answer"][0] == 1
    assert not list((tmp_path / "again").rglob("*.safetensors"))
    _, test = ablations.data("planted", cell.tasks)
    _, orders, P, about = experiments.read_predictions(ablations.path(cell, folder))
    sure = np.eye(P.shape[-1])[np.zeros(P.shape[:2], dtype=int)]
    experiments.save_predictions(ablations.path(cell, folder), test, orders, sure, about)
    monkeypatch.setitem(matrix.MATRIX, "audited", (cell,))
    with pytest.raises(SystemExit, match="mean TV above 0.05: train the students live"):
        main(["students", "--audit", "--predictions", str(folder), "--work", str(tmp_path / "again")])
    assert "False" in capsys.readouterr().out


def drawn() -> dict[str, matplotlib.figure.Figure]:
    from permdistill.paper import bench, cost

    t4 = read("T4_matrix").query("task == 'all'")
    kinds = {"K = 4": ["arc_easy", "arc_challenge"], "K = 2": ["piqa"]}
    return {
        "D1": figures.cost_and_accuracy(read("D1_debiasers"), kinds),
        "P2": figures.accuracy_and_cost(cost.of_systems(t4, cost.table(cost.read()))),
        "F5": figures.sensitivity_against_accuracy(
            tables.read(FIGURES, "T2_students_multiple_choice", "T3_students_summeval")
        ),
        "P1": figures.scoring_time(bench.table(bench.read())),
    }


def test_figures_are_for_two_columns_and_names_hide_nothing(tmp_path):
    for name, figure in drawn().items():
        figure.draw_without_rendering()
        texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text() and text.get_visible()]
        assert min(text.get_size() for text in texts) >= 7, name
        assert figure.get_figwidth() in (7, 3.3), name
        for ax in figure.axes:
            boxes = [a.get_window_extent() for a in ax.texts if isinstance(a, matplotlib.text.Annotation)]
            texts = [
                matplotlib.text.Text.get_window_extent(a) for a in ax.texts if isinstance(a, matplotlib.text.Annotation)
            ]
            overlaps = [(i, j) for i, a in enumerate(texts) for j, b in enumerate(texts) if i < j and a.overlaps(b)]
            assert len(overlaps) <= len(texts) // 8 and len(boxes) == len(texts), (name, overlaps)
        figures.save(figure, tmp_path, name)
        assert b"/Type3" not in (tmp_path / "figures" / f"{name}.pdf").read_bytes()
    assert {path.name for path in Path(tmp_path / "figures").iterdir()} >= {"D1.pdf", "F5.png"}


@pytest.mark.parametrize("n", [1, 3, 5, 8, 9])
def test_the_engines_figure_is_readable_for_any_number_of_workloads(n):
    from permdistill.paper import bench

    names = ["short questions", "passages", "summaries", *bench.SETS, "MMLU"][:n]
    figure = figures.scoring_time(bench.table(made_up(names)))
    figure.draw_without_rendering()
    assert [ax.get_title() for ax in figure.axes] == names and figure.get_figwidth() == 7 and figure.get_figheight() < 9
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_text() and t.get_visible()]
    assert min(text.get_size() for text in texts) >= 7
    for ax in figure.axes:
        boxes = [text.get_window_extent() for text in ax.texts]
        assert len(boxes) == 2 * len(bench.ARMS)
        assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
        assert all(ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1 for box in boxes)
    shown = [ax.title.get_window_extent() for ax in figure.axes] + [
        label.get_window_extent() for ax in figure.axes for label in ax.get_xticklabels() if label.get_visible()
    ]
    assert not [(a, b) for i, a in enumerate(shown) for b in shown[:i] if a.width and b.width and a.overlaps(b)]
    matplotlib.pyplot.close(figure)


def test_the_committed_figures_hold_no_type_3_fonts():
    assert not [path.name for path in FIGURES.glob("*.pdf") if b"/Type3" in path.read_bytes()]
