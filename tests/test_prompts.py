"""Templates: every option stands once, at the position that the order gives it; the key changes with the text."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from permdistill.orders import all_orders
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question

QUESTION = Question("q", "", "What is hot?", ("ice", "fire", "snow"), 1)
LETTERS, SUMMARIES = TEMPLATES["letters"], TEMPLATES["summaries"]


def test_letters_in_full():
    assert LETTERS.user_message(QUESTION, [1, 2, 0]) == (
        "Answer the multiple-choice question. Reply with the letter of the correct option only.\n\n"
        "Question: What is hot?\nA. fire\nB. snow\nC. ice\n"
    )


def test_summaries_in_full():
    pair = Question("p", "Article text.", "Which summary is more fluent?", ("One.", "Two."))
    assert SUMMARIES.user_message(pair, [1, 0]) == (
        "Compare the summaries of this article.\n\nArticle: Article text.\n\nSummary 1: Two.\n\nSummary 2: One.\n\n"
        "Which summary is more fluent? Reply with the number of the summary only."
    )
    assert SUMMARIES.answer_prefix == "Summary "


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("order", all_orders(3).tolist())
def test_option_stands_behind_the_label_of_its_position(name, order):
    template = TEMPLATES[name]
    message = template.user_message(QUESTION, order)
    places = [
        message.index(template.option.format(label=template.labels[k], option=QUESTION.options[o]))
        for k, o in enumerate(order)
    ]
    assert all(a < b for a, b in pairwise(places))


@pytest.mark.parametrize("name", TEMPLATES)
def test_context_is_shown_exactly_when_there_is_one(name):
    template = TEMPLATES[name]
    with_context = template.user_message(replace(QUESTION, context="The passage."), [0, 1, 2])
    assert with_context.count("The passage.") == 1
    assert with_context.index("The passage.") < with_context.index("fire")
    assert "\n\n\n" not in template.user_message(QUESTION, [0, 1, 2])


@pytest.mark.parametrize("name", TEMPLATES)
def test_gold_answer_never_reaches_the_prompt(name):
    messages = {TEMPLATES[name].user_message(replace(QUESTION, answer=a), [0, 1, 2]) for a in (None, 0, 1, 2)}
    assert len(messages) == 1


def test_braces_in_texts_are_kept():
    curly = Question("q", "{context} {0}", "{question}?", ("{option}", "{label}"))
    message = LETTERS.user_message(curly, [0, 1])
    for text in ("{context} {0}", "Question: {question}?", "A. {option}", "B. {label}"):
        assert text in message


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_have_different_labels_for_six_options(name):
    assert len(set(TEMPLATES[name].labels)) == 6
    assert TEMPLATES[name].name == name


@pytest.mark.parametrize(("name", "last"), [("letters", "Z"), ("brief", " Z")])
def test_letters_go_on_to_z(name, last):
    template = TEMPLATES[name]
    assert template.words(6) == template.labels and template.words(26)[-1] == last and len(set(template.words(26))) == 26
    many = replace(QUESTION, options=tuple(f"option {i}" for i in range(26)))
    assert last.strip() + (") " if name == "brief" else ". ") + "option 25" in template.user_message(many, range(26))
    with pytest.raises(ValueError, match="has 27 options, template .* only 26 labels"):
        template.user_message(replace(QUESTION, options=tuple(map(str, range(27)))), range(27))
    with pytest.raises(ValueError, match="7 options, template 'numbers' only 6 labels"):
        TEMPLATES["numbers"].words(7)


def test_too_few_labels_are_refused_by_id():
    with pytest.raises(ValueError, match="'q' has 3 options, template 'short' only 2 labels"):
        replace(LETTERS, name="short", labels=("A", "B")).user_message(QUESTION, [0, 1, 2])


@pytest.mark.parametrize("field", ["before", "before_no_context", "option", "after", "answer_prefix"])
def test_key_changes_with_every_text(field):
    assert replace(LETTERS, **{field: getattr(LETTERS, field) + "."}).key != LETTERS.key
    assert replace(LETTERS).key == LETTERS.key


def test_key_changes_with_labels():
    assert replace(LETTERS, labels=tuple("ABCDEG")).key != LETTERS.key
