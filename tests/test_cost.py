"""What an answer costs: one table for teachers and students, and the costs of whatever is made of them."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from test_experiments import planted
from test_students import make_encoder

from permdistill.orders import all_orders
from permdistill.paper import cost, figures
from permdistill.prompts import TEMPLATES
from permdistill.questions import unlabelled
from permdistill.teachers import load_teacher

ROWS = [
    {"system": f"big, {arm}", "kind": "teacher", "parameters": 10**9, "round": 0, "seconds": seconds, "flops": flops}
    for arm, seconds, flops in ((cost.ONE, 1.0, 10.0), (cost.EACH, 24.0, 240.0), (cost.SHARED, 4.0, 40.0))
] + [
    {"system": "mini, bi-encoder head", "kind": "student", "parameters": 10**7, "round": n, "seconds": s, "flops": 2.0}
    for n, s in enumerate((0.1, 0.2, 9.0))
]


def test_table_takes_medians_and_compares_with_the_first_teacher(tmp_path):
    (tmp_path / "cost.json").write_text(json.dumps({"rows": ROWS}))
    table = cost.table(cost.read(tmp_path / "cost.json")).set_index("system")
    student = table.loc["mini, bi-encoder head"]
    assert (student.seconds, student["times one order"], student["times all orders"]) == pytest.approx((0.2, 5, 120))
    assert cost.pretty(table.reset_index())["questions/s"].tolist() == ["1", "0.0417", "0.25", "5"]


def test_systems_cost_what_they_call():
    names = [
        ("biased teacher", "teacher", 1.0),
        ("prior-matching, 1 call", "debiased", 1.0),
        ("mean over 2 orders", "debiased", 2.0),
        ("mean over 4 cyclic orders", "debiased", 4.0),
        ("all-orders average", "debiased", 4.0),
        ("mini, bi-encoder head, distillation", "student", 0.2),
        ("mini, bi-encoder head, white-box error correction, 8 draws", "student", 1.2),
    ]
    calls = [1, 1, 2, 4, 24, 0, 1]
    systems = pd.DataFrame(
        [{"system": s, "kind": k, "teacher": "big", "calls": n} for (s, k, _), n in zip(names, calls, strict=True)]
    )
    found = cost.of_systems(systems, cost.table({"rows": ROWS}))
    assert found.seconds.tolist() == pytest.approx([seconds for *_, seconds in names])
    assert found.flops.iloc[-1] == pytest.approx(12)


def test_training_is_measured_beside_the_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "ENCODERS", (make_encoder(tmp_path / "encoder"),))
    monkeypatch.setattr(cost, "LENGTH", {"joint": 128, "bi_encoder": 128})
    monkeypatch.setattr(cost, "_questions", lambda: unlabelled(planted("test", n=24).task.questions))
    rows = cost.training_rows(2, 8)
    assert [row["round"] for row in rows] == [0, 0, 1, 1] and {row["system"].split(", ")[1] for row in rows} == {
        "joint head",
        "bi-encoder head",
    }
    table = cost.training_table({"training": rows})
    assert len(table) == 2 and (table["share of the peak"] > 0).all() and (table["share of the peak"] < 1).all()
    row = {"system": "s", "round": 0, "seconds": 0.5, "flops": 4e9, "peak": 16e9}
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
    names = [("biased teacher", "teacher"), ("all-orders average", "debiased")]
    names += [(f"{e}, bi-encoder head, {m}", "student") for e in ("mini", "big") for m in ("distillation", "untrained")]
    names += [("mini, joint head, white-box error correction", "student")]
    calls = [1, 24, 0, 0, 0, 0, 1]
    systems = pd.DataFrame([{"system": s, "kind": k, "teacher": "t", "accuracy": 0.5} for s, k in names]).assign(calls=calls)
    systems = systems.assign(accuracy_low=0.4, accuracy_high=0.6, parameters_millions=20.0, seconds=range(1, 8))
    figure = figures.accuracy_and_cost(systems)
    (ax,), (legend,) = figure.axes, figure.legends
    assert {text.get_text() for text in ax.texts} == {"biased", "all orders", ""}
    assert len(ax.containers) == len(names)
    points = [container.lines[0] for container in ax.containers]
    assert [point.get_marker() for point in points] == ["o", "o", "D", "D", "D", "D", "s"]
    assert [point.get_markerfacecolor() == "white" for point in points] == [False] * 6 + [True]
    colours = {text.get_text(): line.get_color() for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)}
    untrained, trained = colours["untrained student"], colours[figures.NAMES["student"]]
    assert [point.get_color() for point in points[2:]] == [trained, untrained, trained, untrained, trained]
    assert {"joint head", "per-option head", "bi-encoder head"} <= set(colours)
