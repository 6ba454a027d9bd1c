"""Public data sets' own layouts, and those that nobody knows."""

from __future__ import annotations

import json

import pytest

from permdistill import cli, layouts
from permdistill.measure.formats import read
from permdistill.measure.records import with_answers
from permdistill.questions import BadRecords, Question, from_dataset, from_jsonl

# A record of each in its true layout (columns as on the hub), texts our own.
ROWS = {
    "ARC": (
        {"id": "Merc_1", "question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"},
        Question("Merc_1", "", "Hot?", ("ice", "fire"), 1),
    ),
    "HellaSwag": (
        {"ind": 24, "activity_label": "Roof", "ctx_a": "A man", "ctx_b": "he", "ctx": "A man he", "endings": ["a", "b", "c"]}
        | {"source_id": "x~1", "split": "val", "split_type": "indomain", "label": "2"},
        Question("24", "", "A man he", ("a", "b", "c"), 2),
    ),
    "MMLU": (
        {"question": "Hot?", "subject": "physics", "choices": ["ice", "fire", "air", "tea"], "answer": 1},
        Question("0", "", "Hot?", ("ice", "fire", "air", "tea"), 1),
    ),
    "MMLU-Pro": (
        {"question_id": 70, "question": "Hot?", "options": list("abcdefghij"), "answer": "I", "answer_index": 8}
        | {"cot_content": "", "category": "business", "src": "ours"},
        Question("70", "", "Hot?", tuple("abcdefghij"), 8),
    ),
    "RACE": (
        {"example_id": "high1.txt", "article": "Long ago.", "answer": "C", "question": "When?", "options": list("wxyz")},
        Question("high1.txt", "Long ago.", "When?", tuple("wxyz"), 2),
    ),
}


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_layouts_are_recognised(name, tmp_path):
    row, question = ROWS[name]
    assert layouts.recognised(row) == layouts.LAYOUTS[name]
    assert from_dataset([row]) == [question]
    (tmp_path / "own.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert from_jsonl(tmp_path / "own.jsonl") == [question]


def test_questions_of_one_passage_get_ids_of_their_own():
    row = ROWS["RACE"][0]
    found = from_dataset([row, row | {"question": "Where?"}, row | {"question": "Who?"}])
    assert [question.id for question in found] == ["high1.txt", "high1.txt/1", "high1.txt/2"]


def test_own_records_are_left_alone():
    record = {"id": "a", "question": "?", "options": ["x", "y"], "answer": 1, "article": "no context", "example_id": "b"}
    assert layouts.recognised(record) is None and from_dataset([record])[0].context == ""


def test_columns_are_named_by_map():
    rows = [{"goal": f"open {i}", "sol1": "push", "sol2": "pull", "label": i} for i in (0, 1, -1)]
    found = from_dataset(rows, layouts.columns("question=goal, options=sol1+sol2, answer=label"))
    assert [(q.id, q.question, q.options, q.answer) for q in found] == [
        (str(i), f"open {label}", ("push", "pull"), None if label < 0 else label) for i, label in enumerate((0, 1, -1))
    ]


@pytest.mark.parametrize("value, index", [("b", 1), ("B", 1), ("1", 1), (1, 1), ("fire", 1), ("", None), (None, None)])
def test_answers_in_many_forms(value, index):
    rows = [{"q": "Hot?", "o": ["ice", "fire"], "a": value}]
    assert from_dataset(rows, layouts.columns("question=q,options=o,answer=a"))[0].answer == index


def test_an_answer_that_names_nothing_is_refused():
    rows = [{"q": "Hot?", "o": ["ice", "fire"], "a": "coal"}]
    with pytest.raises(BadRecords, match="id '0'.*field 'answer' is 'coal': give the index"):
        from_dataset(rows, layouts.columns("question=q,options=o,answer=a"))


def test_a_wrong_layout_is_told_once(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}?", "opts": ["a", "b"]}) for i in range(1172)), encoding="utf-8")
    with pytest.raises(BadRecords) as caught:
        from_jsonl(path)
    assert str(caught.value) == (
        f"{path}: its 1172 records have the columns prompt, opts; missing: question, options. "
        "Name yours: --map question=COLUMN,options=COLUMN,answer=COLUMN"
    )
    with pytest.raises(BadRecords, match="columns prompt, opts; missing: text. Name yours"):
        from_jsonl(path, {"question": "text", "options": "opts"})


@pytest.mark.parametrize("text", ["question", "question=", "text=ctx", "question=a,question=b", ""])
def test_a_map_that_is_none_is_refused(text, capsys):
    with pytest.raises(ValueError, match="give field=column, each field of id, context, question, options, answer once"):
        layouts.columns(text)
    with pytest.raises(SystemExit):
        cli.main(["score", "--questions", "x.jsonl", "--map", text])
    assert "give field=column" in capsys.readouterr().err


def test_gold_answers_are_read_from_these_layouts_too(tmp_path):
    (tmp_path / "said.jsonl").write_text('{"id": "24", "order": [2, 0, 1], "decision": "A"}\n', encoding="utf-8")
    (tmp_path / "gold.jsonl").write_text(json.dumps(ROWS["HellaSwag"][0]), encoding="utf-8")
    assert with_answers(read(tmp_path / "said.jsonl"), tmp_path / "gold.jsonl").answers.tolist() == [2]
