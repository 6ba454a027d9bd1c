"""What an answer costs: one table for teachers and students, and the costs of whatever is made of them."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from test_experiments import planted
from test_students import make_encoder

from permdistill import debias
from permdistill.orders import all_orders
from permdistill.paper import cost, figures, systems
from permdistill.paper.systems import Description, described_rows
from permdistill.prompts import TEMPLATES
from permdistill.questions import unlabelled
from permdistill.teachers import load_teacher

MINI = {"encoder": "mini", "head": "bi_encoder"}
ROWS = [
    {"kind": "teacher", "teacher": "big", "arm": arm, "parameters": 10**9, "round": 0, "seconds": seconds, "flops": flops}
    for arm, seconds, flops in ((cost.ONE, 1.0, 10.0), (cost.EACH, 24.0, 240.0), (cost.SHARED, 4.0, 40.0))
] + [
    {"kind": "student", **MINI, "parameters": 10**7, "round": n, "seconds": s, "flops": 2.0}
    for n, s in enumerate((0.1, 0.2, 9.0))
]


def test_table_takes_medians_and_compares_with_the_first_teacher(tmp_path):
    (tmp_path / "cost.json").write_text(json.dumps({"rows": ROWS}))
    table = cost.table(cost.read(tmp_path / "cost.json"))
    (student,) = table[table.encoder == "mini"].itertuples()
    student = table.loc[student.Index]
    assert (student.seconds, student["times one order"], student["times all orders"]) == pytest.approx((0.2, 5, 120))
    shown = cost.pretty(table)
    assert shown["questions/s"].tolist() == ["1", "0.0417", "0.25", "5"]
    assert shown.system.tolist()[1:] == [
        "big, all orders, one by one",
        "big, all orders, shared prefixes",
        "mini, bi-encoder head",
    ]


def test_systems_cost_what_they_call():
    expected = {
        Description("teacher", systems.BIASED, 1): 1.0,
        Description("debiased", debias.PRIOR_MATCHING, 1): 1.0,
        Description("debiased", systems.TWO_ORDERS, 2): 2.0,
        Description("debiased", debias.CYCLIC, 4): 4.0,
        Description("debiased", debias.DEBIASED, 24): 4.0,
        Description("student", systems.DISTILLATION, 0, **MINI): 0.2,
        Description("student", systems.WHITE_BOX, 1, **MINI, draws=8): 1.2,
    }
    rows = [{"teacher": "big", **asdict(what)} for what in expected]
    found = cost.of_systems(described_rows(rows), cost.table({"rows": ROWS}))
    assert found.seconds.tolist() == pytest.approx(list(expected.values()))
    assert found.flops.iloc[-1] == pytest.approx(12)


def test_training_is_measured_beside_the_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "ENCODERS", (make_encoder(tmp_path / "encoder"),))
    monkeypatch.setattr(cost, "LENGTH", {"joint": 128, "shared_prefix": 128, "bi_encoder": 128})
    monkeypatch.setattr(cost, "_questions", lambda: unlabelled(planted("test", n=24).task.questions))
    rows = cost.training_rows(2, 8)
    assert [row["round"] for row in rows] == [0, 0, 0, 1, 1, 1] and {row["head"] for row in rows} == set(cost.LENGTH)
    table = cost.training_table({"training": rows})
    assert len(table) == 3 and (table["share of the peak"] > 0).all() and (table["share of the peak"] < 1).all()
    row = {**MINI, "round": 0, "seconds": 0.5, "flops": 4e9, "peak": 16e9}
    (one,) = cost.training_table({"training": [row]}).to_dict("records")
    assert (one["questions/s"], one["GFLOP a question"], one["share of the peak"]) == (2, 4, 0.5)


@pytest.mark.slow
def test_every_arm_answers_alike():
    teacher = load_teacher("smollm2-135m")
    [question] = cost._questions()[:1]
    template = TEMPLATES["letters"]
    groups = [[teacher.tokenize([question], all_orders(4)[:3], template)]]
    works = {arm: run(teacher.model, groups, teacher.label_tokens(4, template)) for arm, run in cost.ARMS.items()}
    assert works[cost.EACH].log_probs == pytest.approx(works[cost.SHARED].log_probs, abs=0.2)  # bfloat16
    assert works[cost.EACH].log_probs[:1] == pytest.approx(works[cost.ONE].log_probs, abs=1e-6)
    assert cost.parameters_of(teacher) == pytest.approx(134.5e6, rel=0.01)
    assert works[cost.EACH].tokens > works[cost.SHARED].tokens > works[cost.ONE].tokens


def test_the_figure_shows_every_system():
    names = [Description("teacher", systems.BIASED, 1), Description("debiased", debias.DEBIASED, 24)]
    methods = (systems.DISTILLATION, systems.UNTRAINED)
    names += [Description("student", m, 0, e, "bi_encoder") for e in ("mini", "big") for m in methods]
    names += [Description("student", systems.WHITE_BOX, 1, "mini", "joint")]
    table = described_rows([{"teacher": "t", "accuracy": 0.5, **asdict(what)} for what in names])
    table = table.assign(accuracy_low=0.4, accuracy_high=0.6, parameters_millions=20.0, seconds=range(1, 8))
    figure = figures.accuracy_and_cost(table)
    (ax,), (legend,) = figure.axes, figure.legends
    named = {"biased", "all orders", "mini, bi-encoder, distilled", "mini, joint, white-box"}  # the best of each method
    assert {text.get_text() for text in ax.texts} == named
    ladder, front = ax.lines[1], ax.lines[0]
    assert ladder.get_xdata().tolist() == [1, 2] and front.get_xdata().tolist() == [1]  # all are equally accurate
    assert len(ax.containers) == len(names)
    points = [container.lines[0] for container in ax.containers]
    assert [point.get_marker() for point in points] == ["o", "o", "D", "D", "D", "D", "s"]
    assert [point.get_markerfacecolor() == "white" for point in points] == [False] * 6 + [True]
    colours = {text.get_text(): line.get_color() for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)}
    untrained, trained = colours["untrained student"], colours[figures.NAMES["student"]]
    assert [point.get_color() for point in points[2:]] == [trained, untrained, trained, untrained, trained]
    assert {"joint head", "per-option head", "bi-encoder head"} <= set(colours)
