"""The question schema: bad records are refused, all at once; unsafe and repeated questions are left out, and counted."""

from __future__ import annotations

import json
import time

import datasets
import pytest

from permdistill.orders import order_set
from permdistill.paper import tasks
from permdistill.questions import (
    CONTENT_FREE,
    BadRecords,
    Cleaned,
    Question,
    clean,
    content_free,
    from_dataset,
    from_jsonl,
    permutation_unsafe,
    sample,
    sample_contexts,
    stratified,
    to_dataset,
    treat_unsafe,
    unlabelled,
    unsafe_options,
    validate,
)

GOOD = {"id": "q1", "context": "", "question": "What is hot?", "options": ["ice", "fire"], "answer": 1}


def make(
    options: list[str], id: str = "q", question: str = "Which?", context: str = "", answer: int | None = None
) -> Question:
    return Question(id, context, question, tuple(options), answer)


# --------------------------------------------------------------------------------------------------------------------
# Validation


def test_good_record_becomes_question():
    assert validate([GOOD]) == [Question("q1", "", "What is hot?", ("ice", "fire"), 1)]


def test_context_and_answer_may_be_absent_or_null():
    bare = {"id": "q1", "question": "What?", "options": ["a", "b"]}
    assert validate([bare]) == validate([{**bare, "context": None, "answer": None}])
    assert validate([bare])[0].answer is None
    assert validate([bare])[0].context == ""


@pytest.mark.parametrize("k", range(2, 7))
def test_two_to_six_options_are_accepted(k):
    assert len(validate([{**GOOD, "options": [f"o{i}" for i in range(k)]}])[0].options) == k


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("id", "", "''"),
        ("id", "  ", "'  '"),
        ("id", 7, "7"),
        ("id", None, "None"),
        ("context", 3.5, "3.5"),
        ("context", ["a"], "['a']"),
        ("context", 0, "0"),  # false, but no text
        ("question", "", "''"),
        ("question", " \n", r"' \n'"),
        ("question", 12, "12"),
        ("options", "abc", "'abc'"),
        ("options", None, "None"),
        ("options", ["one"], "1 options"),
        ("options", [], "0 options"),
        ("options", list(map(str, range(27))), "27 options"),
        ("options", ["a", 2], "2"),
        ("options", ["a", ""], "['a', '']"),
        ("options", ["same", "same "], "repeated: ['same']"),
        ("answer", 2, "0..1"),
        ("answer", -1, "-1"),
        ("answer", "1", "'1'"),
        ("answer", 1.0, "1.0"),
        ("answer", True, "True"),
    ],
)
def test_bad_record_is_refused_by_id_field_and_value(field, value, shown):
    record = {**GOOD, field: value}
    with pytest.raises(BadRecords) as caught:
        validate([record])
    message = str(caught.value)
    assert f"id {record['id']!r}" in message
    assert f"field {field!r}" in message
    assert shown in message


def test_unhashable_id_is_a_bad_record_not_a_crash():
    with pytest.raises(BadRecords, match=r"field 'id' is \['q1'\]"):
        validate([{**GOOD, "id": ["q1"]}])


def test_missing_fields_are_named():
    with pytest.raises(BadRecords) as caught:
        validate([{"id": "q1"}])
    assert "field 'question' is None" in str(caught.value)
    assert "field 'options' is None" in str(caught.value)


def test_all_bad_records_are_listed_at_once():
    records = [
        GOOD,
        {**GOOD, "id": "q2", "answer": 9},
        {**GOOD, "id": "q3", "question": "", "options": ["a"], "answer": 0},
        "text",
        GOOD,
    ]
    with pytest.raises(BadRecords) as caught:
        validate(records, "my file")
    message = str(caught.value)
    assert message.startswith("my file: 5 problem(s)")
    assert "record 1 (id 'q2'): field 'answer' is 9" in message
    assert "record 2 (id 'q3'): field 'question'" in message
    assert "record 2 (id 'q3'): field 'options'" in message
    assert "record 3: is 'text'" in message
    assert "record 4 (id 'q1'): field 'id' is 'q1': already used by record 0" in message


def test_repeated_id_is_reported_also_when_its_first_record_is_bad():
    with pytest.raises(BadRecords, match="3 problem"):
        validate([{**GOOD, "answer": 5}, GOOD, {**GOOD, "question": "Else?"}])


# --------------------------------------------------------------------------------------------------------------------
# Files and datasets


def test_jsonl_with_unicode_line_separators(tmp_path):
    text = "one\u2028two\u0085three\x0bfour"
    path = tmp_path / "mine.jsonl"
    path.write_text(
        json.dumps({**GOOD, "question": text}, ensure_ascii=False) + "\n\n" + json.dumps({**GOOD, "id": "q2"}),
        encoding="utf-8",
    )
    assert [q.id for q in from_jsonl(path)] == ["q1", "q2"]
    assert from_jsonl(path)[0].question == text


def test_jsonl_errors_name_file_and_lines_all_at_once(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(GOOD) + "\n{oops\n" + json.dumps({**GOOD, "id": "q2", "answer": 4}) + "\n[1,\n")
    with pytest.raises(BadRecords) as caught:
        from_jsonl(path)
    for part in ("mine.jsonl", "line 2: not JSON", "line 4: not JSON", "id 'q2'"):
        assert part in str(caught.value)


@pytest.mark.parametrize("field", ["id", "context", "question", "options"])
def test_half_a_character_is_refused(tmp_path, field):
    text = "a\ud800"
    record = {**GOOD, field: ["b", text] if field == "options" else text}
    with pytest.raises(BadRecords, match=rf"field {field!r} is .*a.ud800.*: half a character") as caught:
        validate([record])
    str(caught.value).encode()  # it can be printed
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(BadRecords, match="half a character"):
        from_jsonl(path)
    assert validate([{**GOOD, "question": "\U0001f600"}])  # a whole one


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[" * 5000, r"line 2: not JSON \(maximum recursion depth"),
        (
            b'{"id": "x", "options": ' + b"[" * 500 + b"]" * 500 + b', "question": "?"}',
            "field 'options' is .*give a list of strings",
        ),
        (b'{"id": "x", "answer": ' + b"9" * 5000 + b"}", r"line 2: not JSON \(Exceeds the limit"),
        (b'{"id": "\xff"}', "line 2: not JSON .*can't decode byte 0xff"),
        (b'{"id": "x", "id": "y", "question": "?", "options": ["a", "b"]}', "line 2: not JSON .*field 'id' is there twice"),
        (b'\xef\xbb\xbf{"id": "x"}', "line 2: not JSON"),
    ],
)
def test_lines_that_are_odd_are_named(tmp_path, line, message):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line)
    with pytest.raises(BadRecords, match=message):
        from_jsonl(path)


@pytest.mark.parametrize("value", [10**5000, [10**5000]], ids=["number", "list"])
def test_a_number_that_cannot_be_shown_is_refused_all_the_same(value):
    with pytest.raises(BadRecords, match="too large to show"):
        validate([{**GOOD, "answer": value}])


def test_a_file_or_dataset_without_questions_is_refused(tmp_path):
    path = tmp_path / "mine.jsonl"
    for text in ("", "\n", " \n\n"):
        path.write_text(text)
        with pytest.raises(BadRecords, match="mine.jsonl: no questions"):
            from_jsonl(path)
    with pytest.raises(BadRecords, match="dataset: no questions"):
        from_dataset([])


def test_misspelt_fields_are_warned_of_once(recwarn):
    records = [{"id": f"q{i}", "question": "?", "options": ["a", "b"], "anwser": 1, "source": "book"} for i in range(9)]
    assert [q.answer for q in validate(records, "mine")] == [None] * 9
    assert [str(w.message) for w in recwarn.list] == [
        "mine: field 'anwser' of 9 record(s) is not read: is it 'answer', which they lack?"
    ]
    with pytest.warns(UserWarning, match="field 'Context'"):
        validate([{**{k: v for k, v in GOOD.items() if k != "context"}, "Context": "Passage."}])
    recwarn.clear()
    validate([{**GOOD, "answers": 3, "answer_text": "fire", "ids": 3}])
    assert not recwarn.list  # nothing is lacking


def test_a_column_that_all_records_lack_is_named_once():
    records = [{"id": f"q{i}", "text": "?", "options": ["a", "b"]} for i in range(1000)]
    records[7]["answer"] = 5
    with pytest.raises(BadRecords) as caught:
        validate(records, "mine")
    assert str(caught.value).splitlines() == [
        "mine: 2 problem(s)",
        "  all 1000 records: no field 'question': give it, or rename yours",
        "  record 7 (id 'q7'): field 'answer' is 5: out of range: give an index in 0..1, or null",
    ]
    records[0]["question"] = "?"
    with pytest.raises(BadRecords, match=r"mine: 1000 problem\(s\)"):
        validate(records, "mine")


def test_dataset_round_trip():
    questions = [make(["a", "b", "c"], "q1", context="Passage.", answer=2), make(["x", "y"], "q2")]
    dataset = to_dataset(questions)
    texts = {name: datasets.Value("string") for name in ("id", "context", "question")}
    assert dataset.features == {
        **texts,
        "options": datasets.List(datasets.Value("string")),
        "answer": datasets.Value("int64"),
    }
    assert from_dataset(dataset) == questions


def test_bad_dataset_is_refused():
    with pytest.raises(BadRecords, match="id 'q1'.*'answer' is 5"):
        from_dataset(datasets.Dataset.from_list([{**GOOD, "answer": 5}]))


def test_unlabelled_removes_the_answer_and_nothing_else():
    labelled = make(["a", "b"], context="c", answer=1)
    assert unlabelled([labelled]) == [make(["a", "b"], context="c", answer=None)]
    assert labelled.answer == 1


# --------------------------------------------------------------------------------------------------------------------
# Permutation-unsafe options


@pytest.mark.parametrize(
    "option",
    [
        "all of the above",
        "All of the above",
        "none of the above.",
        "None of these",
        "none of these answers",
        "both of the above",
        "Neither of these",
        "any of the options",
        "both A and B",
        "Both A and B",
        "A and C",
        "A or B",
        "neither B nor C",
        "both (A) and (B)",
        "(A) and (C)",
        "the above answers are wrong",
        # found in MMLU and RACE by hand; full stops, small letters, "only", "&", commas and brackets
        "Both C and D.",
        "A and B only",
        "both a and b.",
        "Neither (a) nor (b).",
        " Both (a) and (b).",
        "either (a) or (b)",
        "a and b only",
        "Both A & C",
        "B&C",
        "all of below.",
        "All above is right.",
        "all mentioned above",
        "none of the above; Cohen holds that animals can have rights",
        "A, B, and C",
        "A , B , & C",
        "A,BandC",
        "A B and C.",
        "(A), (B), and (C)",
        "(B) (C) and (D).",
        "both A and D are correct.",
        "all of A,B and C",
        "Do both B and C",
        "All choices are false",
        "All options given are correct",
        "All of these about equally.",
        "None of these will increase the half life",
        "Older adults cannot do either of these",
        "None is true.",
        "Option B is right",
        # other languages
        "以上都是",
        "以上皆非",
        "上記のすべて",
        "위의 모두",
        "Todas las anteriores",
        "Ninguna de las anteriores",
        "Todas as anteriores",
        "Alle oben genannten",
        "Keine der oben genannten",
        "Toutes les réponses ci-dessus",
        "Aucune de ces réponses",
        "Tutte le precedenti",
        "Все вышеперечисленное",
    ],
)
def test_options_that_refer_to_others_are_unsafe(option):
    assert permutation_unsafe(make(["ice", "fire", "air", option]))
    assert permutation_unsafe(make([option, "ice", "fire", "air"]))


@pytest.mark.parametrize(
    "option",
    [
        "above the clouds",
        "all of the planets",
        "none",
        "both parents",
        "all of the energy is lost",
        "neither gains nor loses heat",
        "A and the sea",
        "hepatitis B",
        "the temperature rises above zero",
        "each of the cells",
        "a and b",
        # found in MMLU, RACE, HellaSwag and OpenBookQA by hand
        "vitamins A and D",
        "Excess consumption of Vitamins A and C",
        "D, E and K",  # labels beyond the options there are
        "both hands",
        "neither of their hands",
        "only eating candy",
        "do homework only",
        "Both have a cell wall to give them support.",
        "answer a question.",
        "someone who wants all the answers",
        "like all of them",
        "None of them had an umbrella.",
        "No-one is above the law.",
        "stand on all fours above, and on his arms then jump.",
        "To have a good vacation, go to any of these places by the sea and take all of them in at your leisure",
        "se sienten todas las mañanas",
        "Alle Menschen",
        "以上海为中心",
    ],
)
def test_harmless_options_are_safe(option):
    assert not permutation_unsafe(make(["ice", "fire", option]))


def test_a_long_option_is_read_in_no_time():
    """Ten words of twenty letters after "none of these" took a minute, longer ones for ever."""
    started = time.process_time()
    for words in (["a" * 20] * 10, ["a" * 2000] * 20, ["!" * 300 + "a"] * 20):
        assert not permutation_unsafe(Question("q", "", "?", ("none of these " + " ".join(words), "b")))
    assert time.process_time() - started < 2


def test_unsafe_questions_are_kept_dropped_or_anchored():
    questions = [make(["ice", "fire"], "a"), make(["ice", "fire", "both A and B", "neither A nor B"], "b")]
    assert [unsafe_options(q) for q in questions] == [(), (2, 3)]
    kept, dropped, fixed = (treat_unsafe(questions, how) for how in ("keep", "drop", "anchor"))
    assert kept.questions == fixed.questions == questions and dropped.questions == questions[:1]
    assert kept.unsafe == dropped.unsafe == fixed.unsafe == 1
    assert not kept.anchors and fixed.anchors == {"b": (2, 3)}
    assert order_set("all", 4, fixed.anchors["b"]).tolist() == [[0, 1, 2, 3], [1, 0, 2, 3]]
    assert len(order_set("all", 4, (1,))) == 6 and len(order_set("all", 4, ())) == 24
    with pytest.raises(ValueError, match="unsafe 'maybe': give one of keep, drop, anchor"):
        treat_unsafe(questions, "maybe")


def test_the_question_text_does_not_make_a_question_unsafe():
    assert not permutation_unsafe(make(["ice", "fire"], question="Which of the above is hot?"))


# --------------------------------------------------------------------------------------------------------------------
# Cleaning and sampling


def test_clean_keeps_order_and_counts_reasons():
    questions = [
        make(["ice", "fire"], "kept", "Hot?"),
        make(["ice", "fire"], "same", " hot? "),
        make(["fire", "ice"], "same options, other order", "Hot?"),
        make(["ice", "fire"], "same question, other passage", "Hot?", context="It burns."),
        make(["ice", "fire", "water"], "three", "Hot?"),
        make(["ice", "none of the above"], "unsafe", "Cold?"),
        make(["sun", "moon"], "in the test set", "Bright?"),
        make(["sun", "moon"], "also kept", "Round?"),
    ]
    split = clean(questions, held_out=[make(["Moon", "sun"], "other id", "bright?")], k=2)
    assert [q.id for q in split.questions] == ["kept", "same question, other passage", "also kept"]
    assert split.left_out == {"repeated": 2, "not 2 options": 1, "permutation-unsafe": 1, "also held out": 1}
    assert len(split.questions) + sum(split.left_out.values()) == len(questions)


def test_clean_of_clean_changes_nothing():
    questions = [make(["a", "b"], str(i), f"Question {i}?") for i in range(5)]
    assert clean(questions) == Cleaned(questions, {})


def test_samples_are_nested_and_repeatable():
    questions = [make(["a", "b"], str(i)) for i in range(30)]
    large = sample(questions, 20, seed=3)
    assert sample(questions, 8, seed=3) == large[:8]
    assert len({q.id for q in large}) == 20
    assert sample(questions, 20, seed=4) != large


def test_sample_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match="5 questions asked for, only 1"):
        sample([make(["a", "b"])], 5, seed=0)


def test_stratified_sample_takes_every_stratum_in_turn():
    questions = [make(["a", "b"], f"{subject}/{i}") for subject, n in (("x", 20), ("y", 3), ("z", 7)) for i in range(n)]
    drawn = stratified(questions, 12, seed=0, stratum=lambda q: q.id[0])
    assert [sum(q.id[0] == s for q in drawn[: 3 * i]) for i in (1, 2, 3) for s in "xyz"] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [sum(q.id[0] == s for q in drawn) for s in "xyz"].count(3) == 1  # y is used up, the others go on
    assert stratified(questions, 30, 0, lambda q: q.id[0])[:12] == drawn and len(set(drawn)) == 12
    assert stratified(questions, 12, 1, lambda q: q.id[0]) != drawn
    with pytest.raises(ValueError, match="31 questions asked for, only 30"):
        stratified(questions, 31, 0, lambda q: q.id[0])


def test_a_sample_of_contexts_takes_all_questions_of_each():
    questions = [make(["a", "b"], f"{c}/{i}", context=c) for c in "uvwxyz" for i in range(1 + ord(c) % 3)]
    drawn = sample_contexts(questions, 7, seed=0)
    contexts = [q.context for q in drawn]
    for context in set(contexts) - {contexts[-1]}:  # the last may be cut
        first = contexts.index(context)
        assert drawn[first : first + contexts.count(context)] == [q for q in questions if q.context == context]
    every = sample_contexts(questions, len(questions), 0)
    assert every[:7] == drawn and set(every) == set(questions) and sample_contexts(questions, 7, 1) != drawn
    with pytest.raises(ValueError, match="13 questions asked for, only 12"):
        sample_contexts(questions, 13, 0)


def test_content_free_questions_keep_the_form_and_lose_the_content():
    own = content_free([make(["a", "b", "c"], question="Which is hot?"), make(["d", "e", "f"], question="Which is wet?")])
    assert [q.options for q in own] == [(filler,) * 3 for filler in CONTENT_FREE]
    assert [q.question for q in own] == list(CONTENT_FREE) and {q.context for q in own} == {""}
    # What all questions of a task share is the task's, not a question's.
    pairs = content_free([make(["a", "b"], question="Which is better?", context=c) for c in ("one", "two")])
    assert {q.question for q in pairs} == {"Which is better?"}
    assert [q.context for q in pairs] == list(CONTENT_FREE)


# --------------------------------------------------------------------------------------------------------------------
# The public sets


@pytest.mark.parametrize(("task", "k"), [(name, tasks.TASKS[name].k) for name in tasks.LAPTOP_CHOICE])
def test_public_sets_are_clean_questions_of_k_options(task, k):
    split = tasks.whole(task, "test")
    assert len(split.questions) >= 480
    assert {len(q.options) for q in split.questions} == {k}
    counts = [sum(q.answer == i for q in split.questions) for i in range(k)]
    assert sum(counts) == len(split.questions) and min(counts) > 0.5 * len(split.questions) / k
    # MMLU's pool keeps those that were not known when the sample was drawn whose scores are stored.
    assert sum(permutation_unsafe(q) for q in split.questions) == (48 if task == "mmlu" else 0)
    assert len({q.id for q in split.questions}) == len(split.questions)


def test_public_sets_in_detail():
    """Sizes as published, less what is counted as left out."""
    for task, published in (("csqa", 1221), ("hellaswag", 10042), ("mmlu", 14042), ("socialiqa", 1954), ("piqa", 1838)):
        split = tasks.whole(task, "test")
        assert len(split.questions) + sum(split.left_out.values()) == published
    mmlu = tasks.whole("mmlu", "test").questions
    assert len({q.id.split("/")[2] for q in mmlu}) == 57
    assert all(q.context.startswith("Goal: ") for q in tasks.whole("piqa", "test").questions)
    assert all(q.context and q.question.endswith("?") for q in tasks.whole("socialiqa", "test").questions[:50])


def test_unknown_sets_and_splits_are_refused():
    for task, split in (("racing", "test"), ("csqa", "train"), ("arc_easy", "dev")):
        with pytest.raises(ValueError, match=f"task '{task}', split '{split}'"):
            tasks.load_task(task, split)
