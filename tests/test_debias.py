"""Debiasing methods, on teachers whose bias is planted."""

from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from permdistill import catalogue, debias, fewcalls
from permdistill.measure import metrics
from permdistill.orders import all_orders, cyclic_orders, inverse, to_options, to_positions
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question
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


def test_the_extreme_draws_hit_no_impossible_option():
    class Extreme:
        """A generator of the smallest, a middle and the largest number that a generator draws."""

        def random(self, shape):
            return np.resize([0.0, 0.5, 1 - 2**-53], shape)

    P = np.broadcast_to([0.0, 0.5, 0.5 - 4e-6, 0.0], (1, 3, 4))  # sums to 1 as float32 sums do
    assert debias.sampled_decisions(P[:, :1], Extreme()).tolist() == [[1]]
    assert debias.sampled_decisions(P, Extreme()).tolist() == [[1, 1, 2]]


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


# --------------------------------------------------------------------------------------------------------------------
# Cheaper and other methods: what each recovers of a planted preference, and where theory says that it cannot


def additive(preferences: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Like :func:`planted`, in float64; ``bias`` (position,) or (item, position)."""
    orders = all_orders(preferences.shape[1])
    shown = np.broadcast_to(np.atleast_2d(bias)[:, None, :], (len(preferences), *orders.shape))
    return softmax(preferences[:, None, :] + to_options(shown, orders))


def mixture(preferences: np.ndarray, q: float) -> np.ndarray:
    """A teacher that says "A" with probability ``q``, whatever it is asked."""
    items, k = preferences.shape
    return (1 - q) * softmax(preferences)[:, None, :] + q * always_a(k, items)


def random_rows(rng: np.random.Generator, concentration: float, shape: tuple[int, ...]) -> np.ndarray:
    """Symmetric Dirichlet rows without underflow to 0: numpy's own has exact zeros at a concentration of 0.05."""
    log_gamma = np.log(rng.gamma(concentration + 1, size=shape)) + np.log1p(-rng.random(shape)) / concentration
    return softmax(log_gamma - log_gamma.max(axis=-1, keepdims=True))


@st.composite
def systems(draw, max_k=4):
    """Positive probabilities (item, order, option) over all orders, from nearly one-hot to nearly uniform."""
    k = draw(st.integers(2, max_k))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 4)), factorial(k), k)
    return random_rows(rng, draw(st.sampled_from([0.05, 0.3, 1.0, 10.0])), shape)


def test_the_exact_planted_teacher_is_the_planted_teacher(rng):
    preferences, bias = rng.normal(size=(5, 4)), rng.normal(size=4)
    np.testing.assert_allclose(additive(preferences, bias), planted(preferences, bias), atol=1e-6)
    per_item = additive(preferences, np.stack([bias] * 4 + [np.zeros(4)]))
    assert np.array_equal(per_item[:4], additive(preferences, bias)[:4])
    np.testing.assert_allclose(per_item[4], np.broadcast_to(softmax(preferences[4]), (24, 4)), rtol=1e-12)


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_votes_and_averages_over_all_orders_recover_the_planted_decision(k, rng):
    preferences = rng.normal(size=(50, k))
    P = additive(preferences, np.arange(k)[::-1])
    for answer in (debias.permutation_average(P), debias.random_average(P, factorial(k), rng)[:, 0]):
        assert np.array_equal(answer.argmax(axis=1), preferences.argmax(axis=1))
    vote = debias.majority_vote(P)
    assert (np.take_along_axis(vote, preferences.argmax(axis=1)[:, None], axis=1)[:, 0] >= vote.max(axis=1) - 1e-12).all()
    assert (metrics.permutation_sensitivity(debias.broadcast(debias.permutation_average(P), factorial(k))) == 0).all()


@pytest.mark.parametrize("k", [2, 3, 4])
def test_division_by_the_true_bias_recovers_the_preference(k, rng):
    preferences, bias = rng.normal(size=(20, k)), 2 * rng.normal(size=k)
    truth = np.broadcast_to(softmax(preferences)[:, None], (20, factorial(k), k))
    P, orders = additive(preferences, bias), all_orders(k)
    np.testing.assert_allclose(debias.contextual_calibration(P, orders, softmax(bias)), truth, rtol=1e-12)
    np.testing.assert_allclose(debias.reweigh(P, orders, -bias), truth, rtol=1e-12)
    assert np.abs(debias.contextual_calibration(P, orders, np.full(k, 1 / k)) - P).max() < 1e-15


@pytest.mark.parametrize("k", [2, 3, 4])
def test_prides_prior_is_the_planted_bias(k, rng):
    bias = 2 * rng.normal(size=k)
    P, orders = additive(rng.normal(size=(7, k)), bias), all_orders(k)
    np.testing.assert_allclose(debias.position_prior(P, orders), softmax(bias), rtol=1e-12)
    rotations = [orders.tolist().index(order) for order in cyclic_orders(k).tolist()]
    np.testing.assert_allclose(debias.position_prior(P[:, rotations], orders[rotations]), softmax(bias), rtol=1e-12)


@pytest.mark.parametrize(("fraction", "seen"), [(1e-6, 1), (0.05, 2), (0.5, 20), (1, 40)])
def test_pride_recovers_the_preference_of_the_items_it_does_not_see_in_full(fraction, seen, rng):
    preferences = rng.normal(size=(40, 4))
    P, orders = additive(preferences, np.array([2.0, -1.0, 0.0, 0.5])), all_orders(4)
    Q = debias.pride(P, orders, fraction, rng=rng)
    cyclic = (Q == debias.cyclic_average(P, orders)).all(axis=(1, 2))
    assert cyclic.sum() == seen
    truth = np.broadcast_to(softmax(preferences)[:, None], P.shape)
    np.testing.assert_allclose(Q[~cyclic], truth[~cyclic], atol=1e-12)
    assert (np.abs(Q[cyclic] - truth[cyclic]).max(axis=(1, 2)) > 1e-3).all()  # an average is no recovery


def test_prides_prior_is_a_mean_of_probabilities_over_items(rng):
    preferences, bias = rng.normal(size=(9, 3)), rng.normal(size=(9, 3))
    prior = debias.position_prior(additive(preferences, bias), all_orders(3))
    np.testing.assert_allclose(prior, softmax(bias).mean(axis=0), rtol=1e-12)


def test_pride_survives_impossible_options(rng):
    P, orders = always_a(4, items=30), all_orders(4)
    Q = debias.pride(P, orders, rng=rng)
    seen = (Q == 0.25).all(axis=(1, 2))
    assert seen.sum() == 2
    assert np.array_equal(Q[~seen], P[~seen])  # a division cannot bring back what is 0
    expected = np.array([1, debias.EPSILON, debias.EPSILON, debias.EPSILON]) / (1 + 3 * debias.EPSILON)
    np.testing.assert_allclose(debias.position_prior(P, orders), expected, rtol=1e-9)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_prior_matching_recovers_the_preference_over_all_orders(k, rng):
    preferences, bias = rng.normal(size=(20, k)) + np.arange(k), 2 * rng.normal(size=k)  # a favourite option does not matter
    truth = np.broadcast_to(softmax(preferences)[:, None], (20, factorial(k), k))
    P, orders = additive(preferences, bias), all_orders(k)
    np.testing.assert_allclose(debias.prior_matching(P, orders), truth, atol=1e-9)
    np.testing.assert_allclose(debias.context_prior_matching(P, orders), truth, atol=1e-9)
    elsewhere = additive(rng.normal(size=(3, k)), bias)
    np.testing.assert_allclose(debias.prior_matching(P, orders, fit=elsewhere), truth, atol=1e-9)
    np.testing.assert_allclose(debias.prior_weights(to_positions(P, orders).reshape(-1, k)), bias.mean() - bias, atol=1e-8)


def test_prior_matching_in_the_original_order_needs_balanced_preferences(rng):
    bias, orders = np.array([1.5, 0.0, -1.0]), all_orders(3)[:1]
    balanced = np.concatenate([p[all_orders(3)] for p in rng.normal(size=(10, 3))])  # each preference in each arrangement
    P = additive(balanced, bias)[:, :1]
    np.testing.assert_allclose(debias.prior_matching(P, orders)[:, 0], softmax(balanced), atol=1e-9)

    # No bias at all, but a data set whose first option is often right: what is taken for a bias is signal.
    favourite = rng.normal(size=(500, 3)) + np.array([1.5, 0.0, 0.0])
    P = additive(favourite, np.zeros(3))[:, :1]
    first = favourite.argmax(axis=1) == 0
    Q = debias.prior_matching(P, orders)
    assert (metrics.accuracy(P, favourite.argmax(axis=1)) == 1).all()
    assert first.mean() > 0.6
    np.testing.assert_allclose(Q.mean(axis=(0, 1)), 1 / 3, atol=1e-8)
    assert (Q[:, 0, 0] < P[:, 0, 0]).all()
    assert metrics.accuracy(Q, favourite.argmax(axis=1))[first].mean() < 0.8
    # Over all orders the same data set does no harm.
    P = additive(favourite, np.zeros(3))
    np.testing.assert_allclose(debias.prior_matching(P, all_orders(3)), P, atol=1e-9)


def test_one_prior_cannot_remove_a_bias_of_each_items_own(rng):
    preferences, bias = rng.normal(size=(40, 4)), 2 * rng.normal(size=(40, 4))
    P, orders = additive(preferences, bias), all_orders(4)
    seen = (debias.pride(P, orders, 0.1, rng=np.random.default_rng(5)) == debias.cyclic_average(P, orders)).all(axis=(1, 2))
    pride = debias.pride(P, orders, 0.1, rng=np.random.default_rng(5))[~seen]
    matched = debias.prior_matching(P, orders)
    # What is left is exactly each bias less the prior's, and it makes every item sensitive.
    left = bias - np.log(debias.position_prior(P[seen], orders))
    np.testing.assert_allclose(pride, additive(preferences, left)[~seen], rtol=1e-9)
    weights = debias.prior_weights(to_positions(P, orders).reshape(-1, 4))
    np.testing.assert_allclose(matched, additive(preferences, bias + weights), rtol=1e-9)
    for Q in (pride, matched):
        assert metrics.permutation_sensitivity(Q).min() > 0.02
    assert metrics.positional_bias(matched, orders) < 1e-8 < 0.05 < metrics.positional_bias_per_item(matched, orders).mean()
    truth = np.broadcast_to(softmax(preferences)[:, None], P.shape)
    np.testing.assert_allclose(debias.context_prior_matching(P, orders), truth, atol=1e-9)
    assert (metrics.permutation_sensitivity(debias.broadcast(debias.permutation_average(P), 24)) == 0).all()


def test_no_prior_can_remove_a_mixture_but_averages_can(rng):
    preferences, q, orders = rng.normal(size=(30, 4)), 0.4, all_orders(4)
    P = mixture(preferences, q)
    expected = (1 - q) * softmax(preferences) + q / 4
    np.testing.assert_allclose(debias.permutation_average(P), expected, rtol=1e-12)
    cyclic = debias.cyclic_average(P, orders)
    np.testing.assert_allclose(cyclic, np.broadcast_to(expected[:, None], P.shape), rtol=1e-12)
    assert metrics.permutation_sensitivity(cyclic).max() < 1e-15
    pride = debias.pride(P, orders, rng=rng)
    priors = (
        pride[(pride != cyclic).any(axis=(1, 2))],
        debias.prior_matching(P, orders),
        debias.context_prior_matching(P, orders),
        debias.contextual_calibration(P, orders, debias.position_prior(P, orders)),
    )
    for Q in priors:
        assert metrics.permutation_sensitivity(Q).min() > 0.02


# --------------------------------------------------------------------------------------------------------------------
# Properties on random systems


@settings(max_examples=40)
@given(systems(), st.integers(0, 1000))
def test_every_method_answers_every_order_with_probabilities(P, seed):
    items, n_orders, k = P.shape
    content_free = random_rows(np.random.default_rng(seed), 1.0, (k,))
    before = P.copy()
    for method in catalogue.debiasers(k):
        Q = method.answer(P, all_orders(k), content_free, np.random.default_rng(seed))
        assert Q.shape == P.shape, method.name
        np.testing.assert_allclose(Q.sum(axis=-1), 1, rtol=1e-12, err_msg=method.name)
        assert (Q >= 0).all(), method.name
        again = method.answer(P, all_orders(k), content_free, np.random.default_rng(seed))
        assert np.array_equal(Q, again), method.name
    assert np.array_equal(P, before)


@settings(max_examples=40)
@given(systems(), st.randoms(use_true_random=False))
def test_relabelling_options_relabels_what_every_method_answers(P, random):
    k = P.shape[2]
    relabel = np.array(random.sample(range(k), k))  # new option o is old option relabel[o]
    orders, content_free = all_orders(k), np.arange(1, k + 1) / np.arange(1, k + 1).sum()
    for method in catalogue.debiasers(k):
        if method.name in map(debias.BLACK_BOX.format, debias.DRAWS):
            continue  # which option a draw falls on depends on the order in which options are stored
        old = method.answer(P, orders, content_free, np.random.default_rng(0))
        new = method.answer(P[..., relabel], inverse(relabel)[orders], content_free, np.random.default_rng(0))
        np.testing.assert_allclose(new, old[..., relabel], atol=1e-12, err_msg=method.name)


@settings(max_examples=40)
@given(systems())
def test_cyclic_average_is_the_mean_over_the_rotations(P):
    orders = all_orders(P.shape[2])
    Q = debias.cyclic_average(P, orders)
    for j, order in enumerate(orders):
        rotations = [orders.tolist().index(np.roll(order, r).tolist()) for r in range(len(order))]
        assert len(set(rotations)) == len(order)
        np.testing.assert_allclose(Q[:, j], P[:, rotations].mean(axis=1), rtol=1e-12)
        assert all(np.array_equal(Q[:, j], Q[:, r]) for r in rotations)
    np.testing.assert_allclose(Q.mean(axis=1), debias.permutation_average(P), rtol=1e-12)


@settings(max_examples=20)
@given(systems(max_k=2))
def test_cyclic_and_full_and_swap_are_one_for_two_options(P):
    swap = (P[:, :1] + P[:, 1:]) / 2
    full = debias.permutation_average(P)
    assert np.array_equal(debias.cyclic_average(P, all_orders(2)), np.broadcast_to(swap, P.shape))
    assert np.array_equal(debias.random_average(P, 2, np.random.default_rng(0)), np.broadcast_to(swap, P.shape))
    assert np.array_equal(full, swap[:, 0])


@settings(max_examples=40)
@given(systems(), st.integers(0, 1000))
def test_random_averages_run_from_the_scores_themselves_to_the_full_average(P, seed):
    n_orders = P.shape[1]
    assert np.array_equal(debias.random_average(P, 1, np.random.default_rng(seed)), P)
    full = debias.random_average(P, n_orders, np.random.default_rng(seed))
    assert (full == full[:, :1]).all()
    np.testing.assert_allclose(full[:, 0], debias.permutation_average(P), rtol=1e-12)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_random_averages_add_one_new_order_at_a_time(k, rng):
    P, n_orders = rng.dirichlet(np.ones(k), size=(3, factorial(k))), factorial(k)
    sums = [n * debias.random_average(P, n, np.random.default_rng(7)) for n in range(1, n_orders + 1)]
    added = np.diff(np.stack([np.zeros_like(P), *sums]), axis=0)  # (n, item, order, option)
    distance = np.abs(added[:, :, :, None, :] - P[None, :, None, :, :]).max(axis=-1)  # (n, item, order, order of P)
    which = distance.argmin(axis=-1)
    assert distance.min(axis=-1).max() < 1e-12
    assert (which[0] == np.arange(n_orders)).all()
    assert (np.sort(which, axis=0) == np.arange(n_orders)[:, None, None]).all()
    if k > 2:
        assert (which[1:, 0] != which[1:, 1]).any() and (which[1:, :, 0] != which[1:, :, 1]).any()


def test_random_averages_draw_the_other_orders_uniformly(rng):
    n = 5000
    P = np.broadcast_to(random_rows(rng, 1.0, (1, 6, 3)), (n, 6, 3))
    other = 2 * debias.random_average(P, 2, rng)[:, 0] - P[:, 0]
    counts = np.bincount(np.abs(other[:, None] - P).max(axis=-1).argmin(axis=1), minlength=6)
    assert counts[0] == 0
    assert np.abs(counts[1:] / n - 1 / 5).max() < 5 * np.sqrt(1 / 5 * 4 / 5 / n)


@settings(max_examples=200)
@given(st.integers(1, 60), st.integers(2, 5), st.sampled_from([0.05, 0.3, 1.0, 10.0]), st.integers(0, 2**32 - 1))
def test_prior_weights_make_the_marginal_uniform(rows, k, concentration, seed):
    p = random_rows(np.random.default_rng(seed), concentration, (rows, k))
    assert (p > 0).all()
    a = debias.prior_weights(p)
    assert abs(a.mean()) < 1e-12 * max(1, np.abs(a).max())
    logits = np.log(p) + a
    assert np.abs(softmax(logits - logits.max(axis=1, keepdims=True)).mean(axis=0) - 1 / k).max() <= 1e-8


def test_prior_weights_are_found_where_almost_every_row_is_one_hot():
    # Log-probabilities down to -690: f is flat nearly everywhere, and rounds at the 14th digit where it is not.
    for seed in range(400):
        rng = np.random.default_rng(seed)
        p = np.maximum(random_rows(rng, 0.01, (int(rng.integers(2, 30)), int(rng.integers(3, 7)))), 1e-300)
        logits = np.log(p) + debias.prior_weights(p)
        reached = softmax(logits - logits.max(axis=1, keepdims=True)).mean(axis=0)
        assert np.abs(reached - 1 / p.shape[1]).max() <= 1e-8, seed


@settings(max_examples=40)
@given(systems())
def test_prior_matching_makes_the_positions_uniform(P):
    k = P.shape[2]
    orders = all_orders(k)
    assert metrics.positional_bias(debias.prior_matching(P, orders), orders) <= k / 2 * 1e-8
    assert metrics.positional_bias_per_item(debias.context_prior_matching(P, orders), orders).max() <= k / 2 * 1e-8


def test_context_prior_matching_is_prior_matching_of_each_item_alone(monkeypatch):
    """Items that Newton's method settles, and among them those that it does not, which fall to the search one by one."""
    rng = np.random.default_rng(1)
    P = np.concatenate([np.maximum(random_rows(rng, c, (100, 24, 4)), 1e-300) for c in (5.0, 0.3, 0.01)])
    weights = debias._newton(to_positions(P, all_orders(4)))
    left = np.isnan(weights).any(axis=1)
    assert not left[:100].any() and left.any()
    alone = np.concatenate([debias.prior_matching(P[i : i + 1], all_orders(4)) for i in range(len(P))])
    np.testing.assert_allclose(debias.context_prior_matching(P, all_orders(4)), alone, atol=1e-7)
    monkeypatch.setattr(debias, "prior_weights", None)  # the settled ones need no search
    np.testing.assert_allclose(debias.context_prior_matching(P[~left], all_orders(4)), alone[~left], atol=1e-7)


@settings(max_examples=40)
@given(systems(max_k=2))
def test_context_prior_matching_of_two_options_is_the_geometric_mean_of_the_orders(P):
    Q = debias.context_prior_matching(P, all_orders(2))
    assert metrics.permutation_sensitivity(Q).max() <= 2e-8
    log_odds = (np.log(P[..., 0]) - np.log(P[..., 1])).mean(axis=1)
    closed = 1 / (1 + np.exp(-log_odds))
    np.testing.assert_allclose(Q[..., 0], np.broadcast_to(closed[:, None], (len(P), 2)), atol=2e-8, rtol=0)


def test_prior_weights_in_closed_form():
    np.testing.assert_allclose(
        debias.prior_weights(np.array([[0.7, 0.2, 0.1]])), np.log(0.014) / 3 - np.log([0.7, 0.2, 0.1])
    )
    # Two positions, logits d_r = 1 and 3: sigmoid(1 + t) + sigmoid(3 + t) = 1 at t = -2
    p = 1 / (1 + np.exp(-np.array([1.0, 3.0])))
    np.testing.assert_allclose(debias.prior_weights(np.stack([p, 1 - p], axis=1)), [-1, 1], atol=1e-8)
    assert np.array_equal(debias.prior_weights(np.eye(3)), np.zeros(3))  # zeros do no harm where the positions balance


def test_black_box_histograms_approach_the_all_orders_average(rng):
    P = np.concatenate([planted(rng.normal(size=(3, 4)), np.array([2.0, 0.0, 0.0, 1.0])), always_a(4)])
    n, target = 20_000, debias.permutation_average(P)
    drawn = debias.black_box_targets(P, n, rng)
    assert (np.abs(drawn - target) < 5 * np.sqrt(target * (1 - target) / n)).all()
    assert np.abs(drawn - debias.original(P)).max() > 0.1


def test_black_box_histograms_count_draws_and_extend():
    P = np.random.default_rng(1).dirichlet(np.ones(3), size=(200, 6))
    few, many = (n * debias.black_box_targets(P, n, np.random.default_rng(2)) for n in (4, 8))
    for counts, n in ((few, 4), (many, 8)):
        np.testing.assert_allclose(counts, counts.round(), atol=1e-12)
        assert (counts.round().sum(axis=1) == n).all()
    assert ((many - few).round() >= 0).all()
    assert len(np.unique(few.round(), axis=0)) > 5


def test_black_box_histograms_never_hold_an_impossible_option(rng):
    P = np.broadcast_to(np.array([[0.0, 0.5, 0.0, 0.5, 0.0]]), (50, 120, 5))
    drawn = debias.black_box_targets(P, 200, rng)
    assert (drawn[:, [0, 2, 4]] == 0).all()
    assert (drawn[:, [1, 3]] > 0).all()


# --------------------------------------------------------------------------------------------------------------------
# The list of methods


def test_the_list_names_every_method_once_with_its_calls():
    calls = {method.name: method.calls(4) for method in catalogue.debiasers(4)}
    assert calls == {
        "biased": 1,
        "majority vote over all orders": 24,
        "all-orders average": 24,
        "cyclic average": 4,
        "mean over 2 random orders": 2,
        "mean over 4 random orders": 4,
        "mean over 8 random orders": 8,
        "mean over 16 random orders": 16,
        "prior-matching": 1,
        "context prior-matching": 24,
        "PriDe at 5%": pytest.approx(1.15),
        "contextual calibration": 1,
        "black-box histogram, 1 draws": 1,
        "black-box histogram, 2 draws": 2,
        "black-box histogram, 4 draws": 4,
        "black-box histogram, 8 draws": 8,
        "black-box histogram, 16 draws": 16,
        "black-box histogram, 32 draws": 32,
        "black-box histogram, 64 draws": 64,
        "mean of an order and its reverse": 2,
        "mean over a Williams design": 4,
        "adaptive, 2.6 calls": 2.6,
        "adaptive, 8 calls": 8,
        "geometric mean over all orders": 24,
        "batch calibration": 1,
    }
    for k, few in ((2, []), (3, [2, 4]), (5, [2, 4, 8, 16, 32, 64]), (6, [2, 4, 8, 16, 32, 64, 128, 256, 512])):
        names = [method.name for method in catalogue.debiasers(k)]
        assert len(names) == len(set(names))
        assert [name for name in names if "random" in name] == [debias.RANDOM.format(n) for n in few]
    assert all(method.source for method in catalogue.debiasers(4))


def test_the_list_answers_with_the_methods_it_names(rng):
    P, orders, content_free = rng.dirichlet(np.ones(3), size=(40, 6)), all_orders(3), np.array([0.5, 0.3, 0.2])

    def seeded():
        return np.random.default_rng(9)

    expected = {
        debias.BIASED: P,
        debias.MAJORITY: debias.broadcast(debias.majority_vote(P), 6),
        debias.DEBIASED: debias.broadcast(debias.permutation_average(P), 6),
        debias.CYCLIC: debias.cyclic_average(P, orders),
        debias.RANDOM.format(2): debias.random_average(P, 2, seeded()),
        debias.RANDOM.format(4): debias.random_average(P, 4, seeded()),
        debias.PRIOR_MATCHING: debias.prior_matching(P, orders),
        debias.CONTEXT_PRIOR_MATCHING: debias.context_prior_matching(P, orders),
        debias.PRIDE: debias.pride(P, orders, 0.05, rng=seeded()),
        debias.CALIBRATION: debias.contextual_calibration(P, orders, content_free),
    } | {
        debias.BLACK_BOX.format(n): debias.broadcast(debias.black_box_targets(P, n, seeded()), 6)
        for n in (1, 2, 4, 8, 16, 32, 64)
    }
    calibrated, stages = fewcalls.batch_calibration(P, orders), fewcalls.stages(3)
    margins = fewcalls.fit_margins(calibrated, orders, stages, 2.6)
    expected |= {
        fewcalls.REVERSE_PAIR: fewcalls.design_average(P, orders, stages[1]),
        fewcalls.ADAPTIVE.format(2.6): fewcalls.adaptive_average(calibrated, orders, stages, margins).answers,
        fewcalls.GEOMETRIC: debias.broadcast(fewcalls.geometric_average(P), 6),
        fewcalls.BATCH_CALIBRATION: calibrated,
    }
    answers = {method.name: method.answer(P, orders, content_free, seeded()) for method in catalogue.debiasers(3)}
    assert answers.keys() == expected.keys()
    for name, Q in answers.items():
        assert np.array_equal(Q, expected[name]), name
    different = {Q.tobytes() for Q in answers.values()}
    assert len(different) == len(answers)


def test_the_list_knows_which_orders_a_method_needs():
    every, cyclic, two = all_orders(3), cyclic_orders(3), all_orders(3)[:2]
    fitting = [{m.name for m in catalogue.debiasers(3) if m.fits(orders)} for orders in (every, cyclic, two)]
    assert fitting[0] == {m.name for m in catalogue.debiasers(3)}
    assert fitting[2] == {debias.BIASED, debias.PRIOR_MATCHING, debias.CALIBRATION, fewcalls.BATCH_CALIBRATION}
    assert fitting[1] == fitting[2] | {debias.CYCLIC, debias.PRIDE}
    twice = np.concatenate([every, every[:1]])  # one order weighs double
    assert not any(m.fits(twice) for m in catalogue.debiasers(3) if m.name in (debias.MAJORITY, debias.DEBIASED))
    assert all(m.fits(all_orders(2)) and m.fits(all_orders(2)[::-1]) for m in catalogue.debiasers(2))


def test_without_content_free_scores_only_calibration_is_refused(rng):
    P = rng.dirichlet(np.ones(3), size=(5, 6))
    for method in catalogue.debiasers(3):
        if method.name == debias.CALIBRATION:
            with pytest.raises(ValueError, match="content_free is None.*content-free input"):
                method.answer(P, all_orders(3), None, rng)
        else:
            assert method.answer(P, all_orders(3), None, rng).shape == P.shape


# --------------------------------------------------------------------------------------------------------------------
# What is refused


def test_orders_that_do_not_fit_are_refused(rng):
    P, orders = rng.dirichlet(np.ones(3), size=(4, 6)), all_orders(3)
    methods = (
        debias.cyclic_average,
        debias.prior_matching,
        debias.context_prior_matching,
        debias.position_prior,
        lambda P, orders: debias.pride(P, orders, rng=rng),
        lambda P, orders: debias.contextual_calibration(P, orders, np.full(3, 1 / 3)),
        lambda P, orders: debias.reweigh(P, orders, np.zeros(3)),
    )
    for method in methods:
        with pytest.raises(ValueError, match=r"orders of shape \(5, 3\).*give \(order, K\) = \(6, 3\)"):
            method(P, orders[:5])
        with pytest.raises(ValueError, match=r"order 2 is \[1, 1, 2\]: give a permutation of 0..2"):
            method(P, np.where(np.arange(6)[:, None] == 2, [1, 1, 2], orders))
    with pytest.raises(ValueError, match=r"orders of shape \(6, 3\) for scores of shape \(4, 5, 3\)"):
        debias.prior_matching(P, orders, fit=P[:, :5])


def test_a_missing_rotation_is_named(rng):
    P, orders = rng.dirichlet(np.ones(3), size=(4, 5)), np.array([[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 2, 1], [2, 1, 0]])
    for method in (debias.cyclic_average, debias.position_prior, lambda P, o: debias.pride(P, o, rng=rng)):
        with pytest.raises(ValueError, match=r"rotation \[1, 0, 2\] of order \[0, 2, 1\] is missing: give scores in all"):
            method(P, orders)
        assert method(P[:, :3], orders[:3]).shape[-1] == 3


def test_numbers_of_orders_and_draws_outside_the_range_are_refused(rng):
    P = rng.dirichlet(np.ones(3), size=(4, 6))
    for n in (0, -1, 7):
        with pytest.raises(ValueError, match=rf"n = {n} orders of 6: give 1..6"):
            debias.random_average(P, n, rng)
    for n in (0, -3):
        with pytest.raises(ValueError, match=f"n = {n} draws: give at least 1"):
            debias.black_box_targets(P, n, rng)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.001, 5, np.nan])
def test_a_fraction_that_is_none_is_refused(fraction, rng):
    with pytest.raises(ValueError, match=f"fraction = {fraction}: give a share"):
        debias.pride(always_a(3), all_orders(3), fraction, rng=rng)


@pytest.mark.parametrize(
    "content_free",
    [[0.5, 0.5], [[0.2, 0.3, 0.5]], 0.5, [0.5, 0.5, 0.0], [0.2, 0.3, 0.4], [0.8, 0.4, -0.2], [np.nan, 0.5, 0.5]],
)
def test_content_free_scores_that_are_no_prior_are_refused(content_free):
    with pytest.raises(ValueError, match=r"content_free = .*: give 3 positive probabilities that sum to 1"):
        debias.contextual_calibration(always_a(3), all_orders(3), np.array(content_free))


def test_what_no_weights_can_make_uniform_is_refused(rng):
    with pytest.raises(ValueError, match=r"shape \(3,\): give \(row, position\)"):
        debias.prior_weights(np.array([0.2, 0.3, 0.5]))
    with pytest.raises(ValueError, match=r"item 1, order 0 are \[0.5, 0.6\]"):
        debias.prior_weights(np.array([[0.5, 0.5], [0.5, 0.6]]))
    with pytest.raises(ValueError, match=r"position 1 has probability 0 in all 2 rows, no weight helps: mix some"):
        debias.prior_weights(np.array([[0.5, 0.0, 0.5], [1.0, 0.0, 0.0]]))
    # Each position is possible in some row, but the last can have 1/3 at the most
    with pytest.raises(ValueError, match=r"no weights make the positions uniform, the marginal reached is \[0.66.*mix some"):
        debias.prior_weights(np.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]]))
    with pytest.raises(ValueError, match="position 1 has probability 0 in all 48 rows"):
        debias.prior_matching(always_a(4, items=2), all_orders(4))
    P = np.concatenate([rng.dirichlet(np.ones(4), size=(1, 24)), always_a(4)])
    with pytest.raises(ValueError, match="item 1: position 1 has probability 0 in all 24 rows"):
        debias.context_prior_matching(P, all_orders(4))


def test_sharpen_in_closed_form():
    Q = np.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    assert debias.sharpen(Q, 1).tolist() == Q.tolist()
    assert debias.sharpen(Q, 2) == pytest.approx(np.array([[2 / 3, 1 / 6, 1 / 6], [1, 0, 0]]))
    assert debias.sharpen(Q[:1], 0.5)[0, 0] == pytest.approx(np.sqrt(0.5) / (np.sqrt(0.5) + 1))
    with pytest.raises(ValueError, match="power = 0"):
        debias.sharpen(Q, 0)
