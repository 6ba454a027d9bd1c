"""Debiasing methods, on teachers whose bias is planted."""

from math import factorial

import numpy as np
import pytest

from permdistill import debias, metrics
from permdistill.data import Question
from permdistill.orders import all_orders, to_options
from permdistill.prompts import TEMPLATES
from permdistill.scores import probabilities
from permdistill.teachers import PlantedTeacher


def planted(preferences: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Scores (item, order, option) of a planted teacher in all orders; ``preferences`` (item, option)."""
    k = len(bias)
    questions = [Question(f"q{i}", "", "?", tuple(map(str, range(k)))) for i in range(len(preferences))]
    teacher = PlantedTeacher({q.id: p for q, p in zip(questions, preferences, strict=True)}, bias)
    return probabilities(teacher.log_probs(questions, all_orders(k), TEMPLATES["letters"]).astype(np.float64))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)


def always_a(k: int, items: int = 1) -> np.ndarray:
    """Scores (item, order, option) of a model that gives all to position 0."""
    by_position = np.broadcast_to(np.eye(k)[0], (items, factorial(k), k))
    return to_options(by_position, all_orders(k))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_without_bias_every_method_gives_the_teachers_own_answer(k, rng):
    preferences = rng.normal(size=(20, k))
    P = planted(preferences, np.zeros(k))
    np.testing.assert_allclose(debias.original(P), softmax(preferences), atol=1e-6)
    np.testing.assert_allclose(debias.permutation_average(P), softmax(preferences), atol=1e-6)
    assert np.array_equal(debias.majority_vote(P), np.eye(k)[preferences.argmax(axis=1)])


@pytest.mark.parametrize("k", [2, 3, 4, 5])
@pytest.mark.parametrize("strength", [1.0, 3.0])
def test_average_over_all_orders_recovers_the_preference(k, strength, rng):
    preferences = rng.normal(size=(50, k))
    P = planted(preferences, strength * np.arange(k)[::-1])
    biased, debiased = debias.original(P), debias.permutation_average(P)
    assert np.array_equal(debiased.argmax(axis=1), preferences.argmax(axis=1))
    assert (biased.argmax(axis=1) == preferences.argmax(axis=1)).mean() < 0.9  # the bias did matter
    np.testing.assert_allclose(debiased.sum(axis=1), 1)


def test_two_options_in_closed_form():
    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    d, b = np.array([-1.5, 0.2, 3.0]), 2.0  # option 0 against 1; position 0 against 1
    P = planted(np.stack([d, np.zeros(3)], axis=1), np.array([b, 0.0]))
    np.testing.assert_allclose(debias.original(P)[:, 0], sigmoid(d + b), atol=1e-6)
    np.testing.assert_allclose(debias.permutation_average(P)[:, 0], (sigmoid(d + b) + sigmoid(d - b)) / 2, atol=1e-6)
    # |d| < b: each order decides for its first option, and the vote is split
    assert debias.majority_vote(P).tolist() == [[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]]


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_always_a_averages_to_uniform(k):
    P = always_a(k, items=3)
    np.testing.assert_allclose(debias.permutation_average(P), 1 / k)
    np.testing.assert_allclose(debias.majority_vote(P), 1 / k)
    assert np.array_equal(debias.original(P), np.eye(k)[[0, 0, 0]])


@pytest.mark.parametrize("method", [debias.permutation_average, debias.majority_vote])
def test_debiased_answers_do_not_depend_on_the_order(method, rng):
    P = planted(rng.normal(size=(10, 4)), np.array([2.0, 0.0, 0.0, 1.0]))
    shuffled = P[:, rng.permutation(24)]
    np.testing.assert_allclose(method(shuffled), method(P), atol=1e-12)
    system = debias.broadcast(method(P), 24)
    assert metrics.permutation_sensitivity(P).min() > 0.01
    assert (metrics.permutation_sensitivity(system) == 0).all()
    assert (metrics.permutation_sensitivity(system, "kl") == 0).all()
    assert (metrics.consistency(system) == 1).all()
    assert metrics.positional_bias(system, all_orders(4)) < 1e-12


@pytest.mark.parametrize("method", [debias.original, debias.permutation_average, debias.majority_vote, debias.decide])
def test_relabelling_options_relabels_the_answer(method, rng):
    P = rng.dirichlet(np.ones(4), size=(6, 24))
    relabel = rng.permutation(4)
    np.testing.assert_allclose(method(P[..., relabel]), method(P)[..., relabel], atol=1e-15)


def test_a_question_with_its_options_stored_in_another_order_gets_the_same_debiased_answer(rng):
    preferences, bias = rng.normal(size=(8, 4)), np.array([3.0, 1.0, 0.0, 0.0])
    relabel = np.array([2, 0, 3, 1])
    stored, restored = planted(preferences, bias), planted(preferences[:, relabel], bias)
    np.testing.assert_allclose(
        debias.permutation_average(restored), debias.permutation_average(stored)[:, relabel], atol=1e-6
    )
    assert np.abs(debias.original(restored) - debias.original(stored)[:, relabel]).max() > 0.1


def test_decisions_share_ties_also_up_to_rounding():
    P = np.array([[[0.4, 0.4, 0.2], [0.2, 0.3, 0.5], [1 / 3, 1 / 3, 1 / 3], [0.4, np.nextafter(0.4, 1), 0.2]]])
    expected = [[0.5, 0.5, 0], [0, 0, 1], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0]]
    np.testing.assert_allclose(debias.decide(P)[0], expected)
    np.testing.assert_allclose(debias.majority_vote(P)[0], np.mean(expected, axis=0))


def test_methods_leave_their_input_alone(rng):
    P = rng.dirichlet(np.ones(3), size=(5, 6))
    before = P.copy()
    for method in (debias.original, debias.permutation_average, debias.majority_vote, debias.decide):
        method(P)
    debias.sampled_decisions(P, rng)
    assert np.array_equal(P, before)


def test_sampled_decisions_have_the_teachers_distribution(rng):
    P = np.broadcast_to(np.array([[0.6, 0.3, 0.1, 0.0], [0.0, 0.0, 0.25, 0.75]])[:, None], (2, 20_000, 4))
    drawn = debias.sampled_decisions(P, rng)
    assert drawn.shape == (2, 20_000)
    shares = debias.one_hot(drawn, 4).mean(axis=1)
    assert np.abs(shares - P[:, 0]).max() < 5 * np.sqrt(0.25 / 20_000)
    assert (shares[P[:, 0] == 0] == 0).all()


def test_sampled_decisions_of_a_sure_teacher_are_its_decisions(rng):
    P = always_a(4, items=5)
    drawn = debias.sampled_decisions(P, rng)
    assert (drawn == all_orders(4)[:, 0]).all()
    assert np.array_equal(debias.one_hot(drawn, 4), P)


def test_sampled_decisions_repeat_with_the_seed_and_extend():
    P = np.random.default_rng(1).dirichlet(np.ones(4), size=(30, 24))
    first, again, fewer = (debias.sampled_decisions(p, np.random.default_rng(3)) for p in (P, P, P[:10]))
    assert np.array_equal(first, again)
    assert np.array_equal(first[:10], fewer)
    assert not np.array_equal(first, debias.sampled_decisions(P, np.random.default_rng(4)))


def test_averaged_decisions_approach_the_averaged_probabilities(rng):
    P = planted(rng.normal(size=(40, 4)), np.array([2.0, 0.0, 0.0, 0.0]))
    draws = np.mean([debias.one_hot(debias.sampled_decisions(P, rng), 4) for _ in range(100)], axis=0)
    few = debias.permutation_average(debias.one_hot(debias.sampled_decisions(P, rng), 4))
    target = debias.permutation_average(P)
    assert np.abs(debias.permutation_average(draws) - target).mean() < np.abs(few - target).mean() / 5


def test_one_hot_and_broadcast_have_the_stated_shapes():
    hot = debias.one_hot(np.array([[0, 2], [1, 1]]), 3)
    assert hot.tolist() == [[[1, 0, 0], [0, 0, 1]], [[0, 1, 0], [0, 1, 0]]]
    Q = np.array([[0.2, 0.8], [0.5, 0.5]])
    system = debias.broadcast(Q, 7)
    assert system.shape == (2, 7, 2)
    assert (system == Q[:, None, :]).all()
    assert np.array_equal(debias.original(system), Q)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.array([[0.5, 0.5]]), r"shape \(1, 2\).*broadcast"),
        (np.empty((0, 2, 2)), r"shape \(0, 2, 2\)"),
        (np.log([[[0.5, 0.5]]]), r"item 0, order 0 are \[-0.69.*scores\.probabilities"),
        (np.array([[[0.5, 0.5], [0.5, 0.6]]]), r"item 0, order 1 are \[0.5, 0.6\]"),
        (np.array([[[0.5, 0.5]], [[np.nan, 1.0]]]), r"item 1, order 0 are \[nan, 1.0\]"),
        (np.array([[[1.5, -0.5]], [[2.0, 0.0]]]), r"item 0, order 0 are \[1.5, -0.5\] \(and 1 rows more\)"),
    ],
)
def test_what_is_not_a_table_of_probabilities_is_refused(scores, message, rng):
    for method in (debias.permutation_average, debias.majority_vote, debias.original):
        with pytest.raises(ValueError, match=message):
            method(scores)
    with pytest.raises(ValueError, match=message):
        debias.sampled_decisions(scores, rng)


def test_bad_decisions_and_answers_are_refused():
    with pytest.raises(ValueError, match=r"decision 3 for K = 3"):
        debias.one_hot(np.array([0, 3]), 3)
    with pytest.raises(ValueError, match=r"decision -1 for K = 3"):
        debias.one_hot(np.array([-1]), 3)
    with pytest.raises(ValueError, match=r"float64.*integers"):
        debias.one_hot(np.array([0.0]), 3)
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        debias.broadcast(np.array([0.5, 0.5]), 2)
