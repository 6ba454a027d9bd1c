"""One real language model, SmolLM2-135M-Instruct: the shared-prefix engine, its label words, and the store."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from permdistill import scores
from permdistill.orders import all_orders, inverse
from permdistill.paper import bench
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question
from permdistill.teachers import CausalTeacher, load_teacher

LETTERS = TEMPLATES["letters"]
QUESTIONS = [
    Question("hot", "", "Which of the two is hotter?", ("an ice cube", "a candle flame")),
    Question(
        "moon", "The Moon circles the Earth once a month.", "What does the Moon circle?", ("the Sun", "the Earth", "Mars")
    ),
    Question("fly", "", "Which animal can fly?", ("a cow", "an eagle", "a trout", "a snail")),
]


@pytest.fixture(scope="module")
def teacher() -> CausalTeacher:
    return load_teacher("smollm2-135m", torch.float32)


@torch.inference_mode()
def alone(teacher: CausalTeacher, question: Question, order: np.ndarray) -> np.ndarray:
    """Log-probabilities by position, one plain forward over one prompt."""
    prompt = teacher.tokenizer.encode(teacher.prompt(question, order, LETTERS), add_special_tokens=False)
    labels = [teacher.tokenizer.convert_tokens_to_ids(label) for label in LETTERS.labels[: len(order)]]
    logits = teacher.model(torch.tensor([prompt], device=teacher.model.device)).logits[0, -1]
    return torch.log_softmax(logits.float(), dim=-1)[labels].cpu().numpy()


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: f"K={len(q.options)}")
@pytest.mark.parametrize("max_tokens", [96, 1024])
def test_trie_equals_single_prompts_and_is_mapped_back_to_options(teacher, question, max_tokens, monkeypatch):
    monkeypatch.setattr(teacher, "max_tokens", max_tokens)
    orders = all_orders(len(question.options))
    found = teacher.log_probs([question], orders, LETTERS)[0]
    assert found.shape == orders.shape
    chosen = range(0, len(orders), max(1, len(orders) // 4))  # about four orders alone: they are slow
    expected = np.stack([alone(teacher, question, orders[j])[inverse(orders[j])] for j in chosen])
    assert np.abs(np.exp(found[list(chosen)]) - np.exp(expected)).max() < 1e-4
    assert np.ptp(np.exp(found), axis=0).max() > 1e-3  # the orders differ by more than what is compared
    assert np.exp(found).sum(axis=1).max() <= 1
    assert scores.probabilities(found).sum(axis=1) == pytest.approx(np.ones(len(orders)))


def test_orders_share_their_prefix(teacher):
    question = QUESTIONS[2]
    orders = all_orders(4)
    before = teacher.tokens_forwarded
    teacher.log_probs([question], orders, LETTERS)
    naive = sum(
        len(teacher.tokenizer.encode(teacher.prompt(question, o, LETTERS), add_special_tokens=False)) for o in orders
    )
    assert naive > 2 * (teacher.tokens_forwarded - before)


def test_prompt_is_the_models_own_chat(teacher):
    prompt = teacher.prompt(QUESTIONS[0], [1, 0], LETTERS)
    assert prompt.endswith("<|im_start|>assistant\n")
    places = [
        prompt.index(text)
        for text in ("<|im_start|>user", "Which of the two is hotter?", "A. a candle flame", "B. an ice cube")
    ]
    assert all(a < b for a, b in pairwise(places))


def test_label_words_are_single_tokens(teacher):
    labels = teacher.label_tokens(6, LETTERS)
    assert [teacher.tokenizer.decode([t]) for t in labels] == list("ABCDEF")
    numbers = teacher.label_tokens(2, TEMPLATES["summaries"])
    assert [teacher.tokenizer.decode([t]).strip() for t in numbers] == ["1", "2"]


def test_label_of_several_tokens_is_refused(teacher):
    with pytest.raises(ValueError, match="'Xylophone' .*not one token"):
        teacher.label_tokens(2, replace(LETTERS, labels=("A", "Xylophone")))
    with pytest.raises(ValueError, match="share a token"):
        teacher.label_tokens(2, replace(LETTERS, labels=("A", "A")))


def test_store_round_trip_and_audit(teacher, tmp_path):
    store = scores.Store(tmp_path)
    assert scores.score(store, teacher, QUESTIONS[:2], LETTERS) == 2
    for question in QUESTIONS[:2]:
        loaded = scores.load(scores.Store(tmp_path), [question], LETTERS, teacher.model_key)
        live = teacher.log_probs([question], all_orders(len(question.options)), LETTERS)
        assert np.abs(np.exp(loaded) - np.exp(live)).max() < 1e-5  # other questions of a pass change the rounding
        assert scores.audit(store, teacher, [question], LETTERS).max() < 1e-5
    forwarded = teacher.tokens_forwarded
    assert scores.score(store, teacher, QUESTIONS[:2], LETTERS) == 0
    assert teacher.tokens_forwarded == forwarded
    assert "float32" in teacher.model_key


def test_a_forest_of_several_k_equals_single_prompts(teacher, tmp_path):
    store = scores.Store(tmp_path)
    before = teacher.tokens_forwarded
    scores.score(store, teacher, QUESTIONS, LETTERS)
    together = teacher.tokens_forwarded - before
    for question in QUESTIONS:
        orders = all_orders(len(question.options))
        found = scores.load(store, [question], LETTERS, teacher.model_key)[0]
        for j in range(0, len(orders), max(1, len(orders) // 3)):
            expected = alone(teacher, question, orders[j])[inverse(orders[j])]
            assert np.abs(found[j] - expected).max() < 1e-4
        teacher.log_probs([question], orders, LETTERS)
    assert together < 0.95 * (teacher.tokens_forwarded - before - together)  # one by one they share less
    assert "prompt tokens a forest" in teacher.plan


def test_forests_of_real_questions_equal_single_prompts(teacher):
    """Of five sets, with 2 to 4 options, behind one another in the same passes."""
    result = bench.exactness(teacher, 10, orders_each=1)
    assert result["prompts"] == 10 and result["max_dp"] < 1e-4 and result["decisions_changed"] == 0


def test_prompts_are_tokenised_as_the_tokenizer_does(teacher):
    orders = all_orders(3)
    texts = [teacher.prompt(QUESTIONS[1], order, LETTERS) for order in orders]
    teacher.tokenizer(texts, padding=True, truncation=True, max_length=7)  # what somebody else has asked for before
    expected = [teacher.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert teacher.tokenize([QUESTIONS[1]], orders, LETTERS) == expected
    assert teacher.tokenize([], orders, LETTERS) == []


def test_a_question_longer_than_the_model_is_named_before_any_compute(teacher, tmp_path):
    fits, long = (Question(f"q{n}", "word " * n, "Which?", ("a", "b")) for n in (10, 9000))
    with pytest.raises(ValueError, match=r"'q9000' takes 9\d\d\d tokens.* 8192 positions: shorten its context"):
        scores.score(scores.Store(tmp_path), teacher, [fits, long], TEMPLATES["letters"])
    assert not list(tmp_path.glob("*.parquet"))
