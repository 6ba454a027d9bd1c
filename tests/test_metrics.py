"""Metrics, against closed forms, brute force and simulation."""

from itertools import permutations, product
from math import factorial, log, sqrt
from statistics import mean, pstdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats.contingency import association

from permdistill import debias
from permdistill.measure import metrics
from permdistill.measure.metrics import bootstrap
from permdistill.orders import all_orders, cyclic_orders, to_options
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question
from permdistill.scores import probabilities
from permdistill.teachers import PlantedTeacher

KS = [2, 3, 4, 5]
quick = settings(deadline=None, max_examples=30, database=None, derandomize=True)


def planted(preferences: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Scores (item, order, option) of a planted teacher in all orders; ``preferences`` (item, option)."""
    k = len(bias)
    questions = [Question(f"q{i}", "", "?", tuple(map(str, range(k)))) for i in range(len(preferences))]
    teacher = PlantedTeacher({q.id: p for q, p in zip(questions, preferences, strict=True)}, bias)
    return probabilities(teacher.log_probs(questions, all_orders(k), TEMPLATES["letters"]).astype(np.float64))


def always(position: int, k: int, items: int = 1) -> np.ndarray:
    """Scores (item, order, option) of a planted teacher whose bias leaves no other position a chance."""
    return planted(np.zeros((items, k)), 60.0 * np.eye(k)[position])


def brute_force_sensitivity(P: np.ndarray, divergence: str) -> np.ndarray:
    """The definition, pair by pair."""
    result = np.zeros(len(P))
    for item, rows in enumerate(P):
        pairs = list(permutations(range(len(rows)), 2))
        for i, j in pairs:
            if divergence == "tv":
                result[item] += np.abs(rows[i] - rows[j]).sum() / 2 / len(pairs)
            else:
                result[item] += (rows[i] * np.log(rows[i] / rows[j])).sum() / len(pairs)
    return result


@st.composite
def systems(draw):
    """Random probabilities (item, order, option), flat to peaked."""
    k, n = draw(st.integers(2, 6)), draw(st.integers(2, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    P = rng.dirichlet(np.full(k, draw(st.sampled_from([0.3, 1.0, 10.0]))), size=(draw(st.integers(1, 4)), n)) + 1e-6
    return P / P.sum(axis=-1, keepdims=True)


@st.composite
def complete_systems(draw):
    """Probabilities with many ties that lean to the answers, in all orders listed at random: P, orders, answers."""
    k = draw(st.integers(2, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    orders = rng.permutation(all_orders(k))
    answers = rng.integers(k, size=draw(st.integers(1, 4)))
    weights = rng.integers(1, 4, size=(len(answers), len(orders), k)) + np.eye(k, dtype=int)[answers][:, None]
    return weights / weights.sum(axis=-1, keepdims=True), orders, answers


def shares(row: list[float]) -> list[float]:
    """The decision of one row of scores, ties shared."""
    best = [p == max(row) for p in row]
    return [tied / sum(best) for tied in best]


def overlap(a: list[float], b: list[float]) -> float:
    return sum(map(min, a, b))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# accuracy


@pytest.mark.parametrize("k", KS)
def test_without_bias_accuracy_is_right_or_wrong_in_every_order(k, rng):
    preferences = rng.normal(size=(30, k))
    answers = rng.integers(k, size=30)
    expected = (preferences.argmax(axis=1) == answers).astype(float)
    assert 0 < expected.mean() < 1
    assert np.array_equal(metrics.accuracy(planted(preferences, np.zeros(k)), answers), expected)


@pytest.mark.parametrize("k", KS)
def test_always_a_is_right_in_one_of_k_orders_whatever_the_gold_answer(k):
    answers = np.arange(k)
    P = always(0, k, items=k)
    assert metrics.accuracy(P, answers).tolist() == pytest.approx([1 / k] * k)
    # in the original order it is right exactly where the gold answer stands first
    assert np.array_equal(metrics.accuracy(P[:, :1], answers), (answers == 0).astype(float))


def test_accuracy_is_the_share_of_orders_and_ties_share_the_credit():
    P = np.array([[[0.6, 0.4], [0.3, 0.7], [0.9, 0.1], [0.5, 0.5]]])
    assert metrics.accuracy(P, [0]).tolist() == [2.5 / 4]
    assert metrics.accuracy(P, [1]).tolist() == [1.5 / 4]
    uniform = np.full((3, 2, 5), 0.2)
    assert metrics.accuracy(uniform, [0, 2, 4]).tolist() == pytest.approx([0.2] * 3)


def test_accuracy_of_all_options_adds_up_to_one(rng):
    P = np.round(rng.dirichlet(np.ones(4), size=(20, 24)) * 4) + 1  # many ties
    P /= P.sum(axis=-1, keepdims=True)
    total = sum(metrics.accuracy(P, np.full(20, option)) for option in range(4))
    np.testing.assert_allclose(total, 1)


def test_averaging_over_orders_beats_the_biased_teacher(rng):
    preferences = rng.normal(size=(200, 4))
    answers = preferences.argmax(axis=1)
    P = planted(preferences, np.array([3.0, 0.0, 0.0, 0.0]))
    debiased = debias.broadcast(debias.permutation_average(P), 24)
    assert metrics.accuracy(debiased, answers).mean() == 1
    assert metrics.accuracy(P, answers).mean() < 0.6
    assert metrics.accuracy(P[:, :1], answers).mean() < 0.6


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([0, None], r"item 1 is None.*labelled"),
        (np.array([-1, 0]), r"item 0 is -1.*labelled"),
        ([0, 2], r"item 1 is 2.*0\.\.1"),
        ([0, -2], r"item 1 is -2.*0\.\.1"),
        ([0.0, 1.0], r"item 0 is 0\.0.*index"),
        ([True, False], r"item 0 is True.*index"),
        ([0], r"shape \(1,\) for 2 items"),
    ],
)
def test_answers_that_are_no_options_are_refused(answers, message):
    with pytest.raises(ValueError, match=message):
        metrics.accuracy(np.full((2, 2, 2), 0.5), answers)


def test_unlabelled_items_are_left_out_with_a_mask():
    P = np.array([[[0.9, 0.1]], [[0.9, 0.1]], [[0.2, 0.8]]])
    answers = np.array([0, -1, 0])
    labelled = answers >= 0
    assert metrics.accuracy(P[labelled], answers[labelled]).tolist() == [1, 0]


def test_rotations_of_the_first_order_are_a_part_of_all_orders():
    orders = all_orders(3)
    rotation = np.isin(np.arange(6), [orders.tolist().index(r) for r in cyclic_orders(3).tolist()])
    P = np.where(rotation, 0, 1)  # option 0 in the rotations of the original order, option 1 in the mirrored ones
    P = debias.one_hot(np.stack([P, P, np.zeros(6, dtype=int)]), 3)
    answers = [0, 1, 0]
    assert metrics.accuracy(P, answers).tolist() == [0.5, 0.5, 1]
    assert metrics.circular_accuracy(P, orders, answers).tolist() == [1, 0, 1]
    assert metrics.adversarial_accuracy(P, answers).tolist() == [0, 0, 1]
    mirrored_first = [1, 0, 2, 3, 4, 5]  # all_orders(3)[1] is no rotation of the original
    assert metrics.circular_accuracy(P[:, mirrored_first], orders[mirrored_first], answers).tolist() == [0, 1, 1]
    assert metrics.adversarial_accuracy(P[:, rotation], answers).tolist() == [1, 0, 1]


def test_a_tie_in_the_worst_order_leaves_its_share():
    P = np.array([[[0.5, 0.5], [0.9, 0.1]], [[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.1, 0.9]]])
    assert metrics.adversarial_accuracy(P, [0, 0, 0]).tolist() == [0.5, 0.5, 0]
    assert metrics.circular_accuracy(P, all_orders(2), [0, 0, 0]).tolist() == [0.5, 0.5, 0]


def test_circular_accuracy_needs_every_rotation():
    with pytest.raises(ValueError, match=r"order \[2, 0, 1\] is not among the 2 given: score it"):
        metrics.circular_accuracy(np.full((1, 2, 3), 1 / 3), cyclic_orders(3)[:2], [0])


# permutation sensitivity and consistency


@quick
@given(systems())
def test_sensitivity_is_the_mean_over_pairs(P):
    np.testing.assert_allclose(metrics.permutation_sensitivity(P), brute_force_sensitivity(P, "tv"), rtol=1e-9)
    clipped = np.maximum(P, metrics.EPSILON)
    clipped /= clipped.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(metrics.permutation_sensitivity(P, "kl"), brute_force_sensitivity(clipped, "kl"), rtol=1e-9)


@quick
@given(systems())
def test_pinsker(P):
    tv, kl = metrics.permutation_sensitivity(P), metrics.permutation_sensitivity(P, "kl")
    assert (kl >= 2 * tv**2).all()
    assert ((tv > 0) & (tv <= 1)).all()


@quick
@given(systems())
def test_sensitivity_of_hard_decisions_is_one_minus_consistency(P):
    hard = debias.one_hot(P.argmax(axis=-1), P.shape[-1])
    agree = [np.mean([a == b for a, b in permutations(item, 2)]) for item in P.argmax(axis=-1).tolist()]
    np.testing.assert_allclose(metrics.consistency(P), agree, atol=1e-12)
    np.testing.assert_allclose(metrics.permutation_sensitivity(hard), 1 - np.array(agree), atol=1e-12)


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("items", [1, 7])
def test_without_bias_nothing_depends_on_the_order(k, items, rng):
    P = planted(rng.normal(size=(items, k)), np.zeros(k))
    np.testing.assert_allclose(metrics.permutation_sensitivity(P), 0, atol=1e-6)
    np.testing.assert_allclose(metrics.permutation_sensitivity(P, "kl"), 0, atol=1e-6)
    assert metrics.positional_bias(P, all_orders(k)) == pytest.approx(0, abs=1e-6)
    assert (metrics.consistency(P) == 1).all()


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("position", [0, 1])
def test_always_a_in_closed_form(k, position):
    P, orders = always(position, k, items=3), all_orders(k)
    agree = (factorial(k - 1) - 1) / (factorial(k) - 1)  # other orders with the same option at that position
    np.testing.assert_allclose(metrics.consistency(P), agree)
    assert (metrics.consistency(P) < 0.25).all()  # the error to avoid: comparing labels, where it agrees always
    np.testing.assert_allclose(metrics.permutation_sensitivity(P), 1 - agree)
    epsilon = metrics.EPSILON
    kl = (1 - epsilon) / (1 + (k - 1) * epsilon) * log(1 / epsilon)  # between two different decisions, clipped
    np.testing.assert_allclose(metrics.permutation_sensitivity(P, "kl"), (1 - agree) * kl)
    np.testing.assert_allclose(metrics.position_marginals(P, orders), np.eye(k)[[position] * 3], atol=1e-12)
    assert metrics.positional_bias(P, orders) == pytest.approx(1 - 1 / k)
    assert metrics.positional_bias(P, orders, "kl") == pytest.approx(log(k))


def test_two_options_in_closed_form():
    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    d, b = np.array([-1.5, 0.2, 3.0]), 2.0  # option 0 against 1; position 0 against 1
    P = planted(np.stack([d, np.zeros(3)], axis=1), np.array([b, 0.0]))
    difference = sigmoid(d + b) - sigmoid(d - b)
    np.testing.assert_allclose(metrics.permutation_sensitivity(P), difference, atol=1e-6)
    np.testing.assert_allclose(metrics.permutation_sensitivity(P, "kl"), difference * b, atol=1e-6)  # half of d+b - (d-b)
    np.testing.assert_allclose(metrics.position_marginals(P, all_orders(2))[:, 0], (1 + difference) / 2, atol=1e-6)
    np.testing.assert_allclose(metrics.positional_bias_per_item(P, all_orders(2)), difference / 2, atol=1e-6)
    assert metrics.positional_bias(P, all_orders(2)) == pytest.approx(difference.mean() / 2, abs=1e-6)


def test_order_free_systems_have_exactly_no_sensitivity(rng):
    for k in (2, 3, 4, 5, 6):
        P = debias.broadcast(rng.dirichlet(np.ones(k), size=11), factorial(k))
        assert (metrics.permutation_sensitivity(P) == 0).all()
        assert (metrics.permutation_sensitivity(P, "kl") == 0).all()
        assert (metrics.consistency(P) == 1).all()


def test_tied_orders_agree_in_what_they_share():
    uniform = [1 / 3, 1 / 3, 1 / 3]
    P = np.array([[uniform, uniform], [uniform, [1.0, 0.0, 0.0]], [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]])
    assert metrics.consistency(P).tolist() == pytest.approx([1, 1 / 3, 1 / 2])


def test_more_bias_is_more_sensitivity(rng):
    preferences = rng.normal(size=(50, 4))
    values = [
        metrics.permutation_sensitivity(planted(preferences, b * np.eye(4)[0])).mean() for b in (0.0, 0.5, 1.0, 2.0, 4.0)
    ]
    assert (np.diff(values) > 0.02).all()


def test_five_options_need_little_memory_and_time(rng):
    P = rng.dirichlet(np.ones(5), size=(500, 120))
    assert metrics.permutation_sensitivity(P).shape == (500,)
    # E TV of two independent uniform draws of 5 probabilities: K/2 E|x - y| with x, y ~ Beta(1, 4), so E|x - y| = 8/45
    assert metrics.permutation_sensitivity(P).mean() == pytest.approx(4 / 9, abs=0.005)


def test_one_order_has_no_sensitivity():
    for metric in (metrics.permutation_sensitivity, metrics.consistency):
        with pytest.raises(ValueError, match="at least 2"):
            metric(np.full((2, 1, 2), 0.5))
    with pytest.raises(ValueError, match="divergence 'js'.*'tv' or 'kl'"):
        metrics.permutation_sensitivity(np.full((2, 2, 2), 0.5), "js")


# other measures of sensitivity


@quick
@given(complete_systems())
def test_metrics_of_decisions_are_their_definitions(system):
    P, orders, answers = system
    listed = orders.tolist()
    rotations = [listed.index(listed[0][r:] + listed[0][:r]) for r in range(P.shape[-1])]
    expected = []
    for rows, gold in zip(P.tolist(), answers.tolist(), strict=True):
        decided = [shares(row) for row in rows]
        credit = [decision[gold] for decision in decided]
        expected.append(
            (
                mean(overlap(a, b) for a, b in permutations(decided, 2)),
                mean(1 - overlap(decided[0], other) for other in decided[1:]),
                1 - overlap(decided[0], decided[listed.index(listed[0][::-1])]),
                max(map(mean, zip(*decided, strict=True))),
                min(credit[r] for r in rotations),
                min(credit),
            )
        )
    measured = (
        metrics.consistency(P),
        metrics.flip_rate(P),
        metrics.fluctuation(P, orders),
        metrics.plurality_agreement(P),
        metrics.circular_accuracy(P, orders, answers),
        metrics.adversarial_accuracy(P, answers),
    )
    np.testing.assert_allclose(np.stack(measured, axis=1), expected, atol=1e-12)


def test_flips_are_from_the_first_order():
    P = debias.one_hot(np.array([[0, 0, 1, 2, 0, 1]]), 3)
    assert metrics.flip_rate(P).tolist() == pytest.approx([3 / 5])
    assert metrics.flip_rate(P[:, ::-1]).tolist() == pytest.approx([4 / 5])
    assert metrics.plurality_agreement(P).tolist() == pytest.approx([1 / 2])
    assert metrics.fluctuation(P, all_orders(3)).tolist() == [1]  # the last of all orders is the first reversed
    assert metrics.fluctuation(P[:, [0, 4, 5]], all_orders(3)[[0, 5, 4]]).tolist() == [0]


def test_tied_decisions_share_their_order():
    P = np.array([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]])
    assert metrics.flip_rate(P).tolist() == [0.5]
    assert metrics.plurality_agreement(P).tolist() == [0.75]
    assert metrics.flip_rate(np.full((1, 2, 6), 1 / 6)).tolist() == [0]  # six times 1/6 falls short of 1


def test_position_variance_in_closed_form():
    P = np.array([[[0.2, 0.8], [0.6, 0.4]], [[0.0, 1.0], [1.0, 0.0]]])
    assert metrics.position_variance(P).tolist() == pytest.approx([0.04, 0.25])
    assert metrics.position_variance(np.array([[[0.1, 0.3, 0.6], [0.1, 0.6, 0.3]]])).tolist() == pytest.approx([0.015])


def test_pairs_commute_where_preference_exceeds_bias():
    P = planted(np.array([[-3.0, 0.0], [0.2, 0.0], [1.9, 0.0], [2.1, 0.0]]), np.array([2.0, 0.0]))
    assert metrics.commutativity(P).tolist() == [1, 0, 0, 1]
    np.testing.assert_array_equal(metrics.flip_rate(P), 1 - metrics.commutativity(P))
    np.testing.assert_array_equal(metrics.fluctuation(P, all_orders(2)), 1 - metrics.commutativity(P))


def test_sensitivity_refuses_what_lacks_an_order():
    for n_orders, k in ((6, 3), (2, 3), (1, 2)):
        with pytest.raises(ValueError, match=rf"shape \(2, {n_orders}, {k}\).*\(item, 2, 2\)"):
            metrics.commutativity(np.full((2, n_orders, k), 1 / k))
    with pytest.raises(ValueError, match="1 order.*at least 2"):
        metrics.flip_rate(np.full((2, 1, 2), 1 / 2))
    with pytest.raises(ValueError, match=r"order \[2, 1, 0\] is not among the 3 given: score it"):
        metrics.fluctuation(np.full((2, 3, 3), 1 / 3), cyclic_orders(3))


# positional bias


@pytest.mark.parametrize("some_orders", [all_orders, cyclic_orders])
@pytest.mark.parametrize("k", KS)
def test_no_sensitivity_implies_no_positional_bias(some_orders, k, rng):
    orders = some_orders(k)
    P = debias.broadcast(rng.dirichlet(np.full(k, 0.3), size=20), len(orders))
    assert metrics.positional_bias(P, orders) == pytest.approx(0, abs=1e-12)
    assert metrics.positional_bias(P, orders, "kl") == pytest.approx(0, abs=1e-12)
    assert metrics.positional_bias_per_item(P, orders).max() == pytest.approx(0, abs=1e-12)


def test_no_positional_bias_does_not_imply_no_sensitivity():
    orders = cyclic_orders(3)
    by_position = np.eye(3)[None]  # position j in rotation j: each position once, and three different options
    P = to_options(by_position, orders)
    assert metrics.positional_bias(P, orders) == pytest.approx(0)
    assert metrics.permutation_sensitivity(P).tolist() == [1]
    assert metrics.consistency(P).tolist() == [0]


def test_items_of_opposite_bias_cancel_in_the_marginal_and_not_per_item():
    P = np.concatenate([always(0, 2), always(1, 2)])
    assert metrics.positional_bias(P, all_orders(2)) == pytest.approx(0)
    assert metrics.positional_bias_per_item(P, all_orders(2)).tolist() == pytest.approx([0.5, 0.5])


@quick
@given(systems())
def test_items_bound_the_bias_of_their_mean(P):
    k = P.shape[-1]
    orders = np.stack([np.random.default_rng(j).permutation(k) for j in range(P.shape[1])])
    marginals = metrics.position_marginals(P, orders)
    np.testing.assert_allclose(marginals.sum(axis=1), 1)
    for divergence, top in (("tv", 1 - 1 / k), ("kl", log(k))):
        per_item = metrics.positional_bias_per_item(P, orders, divergence)
        assert metrics.positional_bias(P, orders, divergence) <= per_item.mean() + 1e-12
        assert per_item.max() <= top + 1e-9


def test_distance_from_uniform():
    assert metrics.from_uniform(np.array([0.7, 0.1, 0.1, 0.1])) == pytest.approx(0.45)
    assert metrics.from_uniform(np.array([0.5, 0.5, 0.0, 0.0]), "kl") == pytest.approx(log(2), abs=1e-9)
    assert metrics.from_uniform(np.full((2, 3, 4), 0.25)).shape == (2, 3)
    with pytest.raises(ValueError, match="'tv' or 'kl'"):
        metrics.from_uniform(np.array([0.5, 0.5]), "l2")


def test_marginals_refuse_orders_that_do_not_fit():
    P = np.full((2, 2, 2), 0.5)
    with pytest.raises(ValueError, match=r"orders of shape \(6, 3\).*\(2, 2\)"):
        metrics.position_marginals(P, all_orders(3))
    with pytest.raises(ValueError, match=r"order 1 is \[1, 1\]"):
        metrics.position_marginals(P, np.array([[0, 1], [1, 1]]))


# recall, correctness and decisions by position

TABLES = [
    (metrics.recall_by_position, metrics.rstd),
    (metrics.position_correctness, metrics.cramers_v),
    (metrics.gold_and_predicted_positions, metrics.ckld),
]


@quick
@given(complete_systems())
def test_tables_are_counts(system):
    P, orders, answers = system
    P, orders = P[:, 1:], orders[1:]  # the gold answer no longer stands equally often at each position
    n, n_orders, k = P.shape
    recall, correctness, positions = np.zeros((n, k, 2)), np.zeros((n, k, 2)), np.zeros((n, 2, k))
    for item, j in product(range(n), range(n_orders)):
        decision, at = shares(P[item, j].tolist()), orders[j].tolist().index(answers[item])
        right = decision[answers[item]]
        recall[item, at] += [1, right]
        correctness[item, at] += [right, 1 - right]
        positions[item, 0, at] += 1
        positions[item, 1] += [decision[option] for option in orders[j]]
    for (per_item, _), counts in zip(TABLES, (recall, correctness, positions), strict=True):
        np.testing.assert_allclose(per_item(P, orders, answers), counts / n_orders, atol=1e-12)
    by_position = [right / seen for seen, right in recall.sum(axis=0).tolist() if seen]
    assert metrics.rstd(recall.mean(axis=0)) == pytest.approx(pstdev(by_position), abs=1e-12)


def test_rstd_in_closed_form():
    assert metrics.rstd(np.array([[0.5, 0.25], [0.5, 0.5]])) == pytest.approx(0.25)  # recalls 1/2, 1
    assert metrics.rstd(np.array([[0.5, 0.1], [0.0, 0.0], [0.5, 0.3]])) == pytest.approx(0.2)  # 1/5, none, 3/5
    assert metrics.rstd(np.array([[0.0, 0.0], [1.0, 0.7]])) == 0


def test_cramers_v_in_closed_form():
    assert metrics.cramers_v(np.array([[3, 1], [1, 3]])) == pytest.approx(0.5)  # (9 - 1) / 16
    assert metrics.cramers_v(np.array([[0.3, 0.1], [0.0, 0.0], [0.1, 0.3]])) == pytest.approx(0.5)
    assert metrics.cramers_v(np.array([[1, 2], [2, 4], [3, 6]])) == pytest.approx(0, abs=1e-12)
    for empty in ([[1, 0], [2, 0], [4, 0]], [[0, 1], [0, 2]], [[0, 0], [1, 3]]):
        assert metrics.cramers_v(np.array(empty)) == pytest.approx(0, abs=1e-12)


@quick
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=2, max_size=6))
def test_cramers_v_is_scipys(counts):
    assert metrics.cramers_v(np.array(counts)) == pytest.approx(association(counts, method="cramer"), abs=1e-9)


def test_ckld_in_closed_form():
    table = np.array([[0.5, 0.5], [0.25, 0.75]])
    assert metrics.ckld(table) == pytest.approx(log(2) / 2 + log(2 / 3) / 2)
    assert metrics.ckld(table[::-1]) == pytest.approx(log(1 / 2) / 4 + log(3 / 2) * 3 / 4)
    assert metrics.ckld(table[[1, 1]]) == 0
    assert metrics.ckld(np.eye(2)) == pytest.approx(-log(metrics.EPSILON))


@pytest.mark.parametrize(("per_item", "statistic"), TABLES)
def test_tables_go_through_the_bootstrap_by_document(per_item, statistic, rng):
    # document a: gold answers at positions 0 and 1, b: at 1 and 2, so that no resample but (a, b) has them all
    answers, groups = np.repeat([0, 1, 1, 2], 5), np.repeat(["a", "b"], 10)
    values = per_item(rng.dirichlet(np.ones(3), size=(20, 1)), all_orders(3)[:1], answers)
    interval = bootstrap(values, groups, statistic=statistic)
    assert interval.value == statistic(values.mean(axis=0))
    alone = [statistic(values[groups == group].mean(axis=0)) for group in "ab"]
    assert (interval.low, interval.high) == pytest.approx((min(*alone, interval.value), max(*alone, interval.value)))
    assert interval.low < interval.high


@pytest.mark.parametrize("per_item", [per_item for per_item, _ in TABLES])
def test_tables_refuse_what_does_not_fit(per_item):
    P = np.full((2, 2, 2), 0.5)
    with pytest.raises(ValueError, match=r"order 1 is \[1, 1\]"):
        per_item(P, np.array([[0, 1], [1, 1]]), [0, 1])
    with pytest.raises(ValueError, match="item 1 is 2"):
        per_item(P, all_orders(2), [0, 2])


# all metrics

# of (P, orders, answers), and the least and the greatest value for K options
FIELD = {
    "accuracy": (lambda P, orders, answers: metrics.accuracy(P, answers), lambda k: (0, 1)),
    "circular": (metrics.circular_accuracy, lambda k: (0, 1)),
    "adversarial": (lambda P, orders, answers: metrics.adversarial_accuracy(P, answers), lambda k: (0, 1)),
    "flip": (lambda P, orders, answers: metrics.flip_rate(P), lambda k: (0, 1)),
    "fluctuation": (lambda P, orders, answers: metrics.fluctuation(P, orders), lambda k: (0, 1)),
    "plurality": (lambda P, orders, answers: metrics.plurality_agreement(P), lambda k: (1 / k, 1)),
    "variance": (lambda P, orders, answers: metrics.position_variance(P), lambda k: (0, (k - 1) / k**2)),
    "rstd": (lambda *system: metrics.rstd(metrics.recall_by_position(*system).mean(axis=0)), lambda k: (0, 1 / 2)),
    "cramer": (lambda *system: metrics.cramers_v(metrics.position_correctness(*system).mean(axis=0)), lambda k: (0, 1)),
    "ckld": (
        lambda *system: metrics.ckld(metrics.gold_and_predicted_positions(*system).mean(axis=0)),
        lambda k: (0, -log(metrics.EPSILON)),
    ),
}


@quick
@given(complete_systems(), st.booleans(), st.integers(0, 2**32 - 1))
def test_metrics_of_the_field_keep_to_their_bounds_and_no_name_matters(system, hard, seed):
    P, orders, answers = system
    P = debias.one_hot(P.argmax(axis=-1), P.shape[-1]) if hard else P
    k = P.shape[-1]
    relabel = np.random.default_rng(seed).permutation(k)  # new option o is old option relabel[o]
    new = np.argsort(relabel)
    for name, (metric, bounds) in FIELD.items():
        value = metric(P, orders, answers)
        np.testing.assert_allclose(metric(P[..., relabel], new[orders], new[answers]), value, atol=1e-12, err_msg=name)
        low, high = bounds(k)
        assert np.min(value) >= low - 1e-12 and np.max(value) <= high + 1e-12, name
    if k == 2:
        np.testing.assert_array_equal(metrics.commutativity(P[..., relabel]), metrics.commutativity(P))


@quick
@given(complete_systems())
def test_worse_cases_have_lower_accuracy(system):
    P, orders, answers = system
    circular, adversarial = metrics.circular_accuracy(P, orders, answers), metrics.adversarial_accuracy(P, answers)
    assert (adversarial <= circular).all()
    assert (adversarial <= metrics.accuracy(P, answers) + 1e-12).all()


@quick
@given(complete_systems())
def test_without_sensitivity_every_metric_is_at_its_best(system):
    P, orders, answers = system
    P = debias.broadcast(P[:, 0], len(orders))
    assert (metrics.permutation_sensitivity(P) == 0).all()
    assert metrics.positional_bias(P, orders) == pytest.approx(0, abs=1e-12)
    for metric in (metrics.position_variance(P), metrics.flip_rate(P), metrics.fluctuation(P, orders)):
        assert (metric == 0).all()
    np.testing.assert_allclose(metrics.plurality_agreement(P), debias.decide(P)[:, 0].max(axis=-1))
    for accuracy in (metrics.circular_accuracy(P, orders, answers), metrics.adversarial_accuracy(P, answers)):
        np.testing.assert_allclose(accuracy, metrics.accuracy(P, answers))  # ties included
    for name in ("rstd", "cramer", "ckld"):
        assert FIELD[name][0](P, orders, answers) == pytest.approx(0, abs=1e-12), name


@pytest.mark.parametrize("k", KS)
def test_always_a_in_the_metrics_of_the_field(k):
    P, orders, answers = always(0, k, items=k), all_orders(k), np.arange(k)
    seen, right = metrics.recall_by_position(P, orders, answers).mean(axis=0).T
    np.testing.assert_allclose(right / seen, np.eye(k)[0], atol=1e-12)
    predicted = np.where(np.arange(k) == 0, 1, metrics.EPSILON) / (1 + (k - 1) * metrics.EPSILON)
    agree = (factorial(k - 1) - 1) / (factorial(k) - 1)
    expected = {
        "accuracy": 1 / k,
        "circular": 0,
        "adversarial": 0,
        "flip": 1 - agree,
        "fluctuation": 1,
        "plurality": 1 / k,
        "variance": (k - 1) / k**2,
        "rstd": sqrt(k - 1) / k,
        "cramer": 1,
        "ckld": np.log(1 / k / predicted).mean(),
    }
    for name, (metric, _) in FIELD.items():
        np.testing.assert_allclose(metric(P, orders, answers), expected[name], atol=1e-12, err_msg=name)
    # no two rotations have the same option at a position: a popular harness compares labels, and gives this model 1
    cyclic = [orders.tolist().index(rotation) for rotation in cyclic_orders(k).tolist()]
    assert metrics.consistency(P[:, cyclic]).tolist() == [0] * k


@quick
@given(systems())
def test_relabelling_options_changes_no_metric(P):
    k = P.shape[-1]
    relabel = np.roll(np.arange(k), 1)  # new option o is old option relabel[o]
    Q = P[..., relabel]
    for divergence in ("tv", "kl"):
        np.testing.assert_allclose(
            metrics.permutation_sensitivity(Q, divergence), metrics.permutation_sensitivity(P, divergence), rtol=1e-9
        )
    np.testing.assert_allclose(metrics.consistency(Q), metrics.consistency(P), atol=1e-12)
    for old in range(k):
        new = int(np.argmax(relabel == old))
        np.testing.assert_allclose(metrics.accuracy(Q, [new] * len(Q)), metrics.accuracy(P, [old] * len(P)))
    orders = np.stack([np.random.default_rng(j).permutation(k) for j in range(P.shape[1])])
    np.testing.assert_allclose(
        metrics.position_marginals(Q, np.argsort(relabel)[orders]), metrics.position_marginals(P, orders), rtol=1e-9
    )


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_metrics_do_not_depend_on_how_orders_are_listed(divergence, rng):
    P, orders = rng.dirichlet(np.ones(4), size=(9, 24)), all_orders(4)
    shuffle = rng.permutation(24)
    for metric in (metrics.permutation_sensitivity, lambda P, _: metrics.consistency(P)):
        np.testing.assert_allclose(metric(P[:, shuffle], divergence), metric(P, divergence), rtol=1e-9)
    np.testing.assert_allclose(
        metrics.positional_bias_per_item(P[:, shuffle], orders[shuffle], divergence),
        metrics.positional_bias_per_item(P, orders, divergence),
        rtol=1e-9,
    )


# intervals


def test_interval_prints():
    interval = metrics.Interval(0.6834, 0.6611, 0.7019)
    assert interval.percent() == "68.3 [66.1, 70.2]"
    assert str(interval) == "0.683 [0.661, 0.702]"
    assert metrics.Interval(-0.00001, -0.1, 0.1).percent() == "0.0 [-10.0, 10.0]"  # no minus zero in a table
    assert tuple(interval) == (0.6834, 0.6611, 0.7019)


def test_point_is_the_statistic_of_the_mean_and_lies_within(rng):
    values = rng.normal(size=80)
    interval = bootstrap(values, n=400)
    assert interval.value == values.mean()
    assert interval.low < interval.value < interval.high
    marginals = rng.dirichlet(np.ones(4) * 2, size=50) * 0.5 + 0.5 * np.eye(4)[0]
    of_bias = bootstrap(marginals, statistic=metrics.from_uniform, n=400)
    assert of_bias.value == pytest.approx(metrics.from_uniform(marginals.mean(axis=0)))
    assert of_bias.low < of_bias.value < of_bias.high


def test_width_is_that_of_the_normal_interval(rng):
    values = rng.normal(size=400)
    interval = bootstrap(values, n=4000)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.06)
    narrow = bootstrap(values, n=4000, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 * values.std() / 20, rel=0.06)


def test_constant_values_have_no_width():
    assert bootstrap(np.full(20, 0.25)) == (0.25, 0.25, 0.25)
    assert bootstrap(np.full(20, 0.25), groups=list("abcd") * 5) == (0.25, 0.25, 0.25)


def test_same_seed_same_interval_and_chunks_change_nothing(rng, monkeypatch):
    values = rng.normal(size=30)
    whole = bootstrap(values, n=200, seed=5)
    assert bootstrap(values, n=200, seed=5) == whole
    assert bootstrap(values, n=200, seed=6) != whole
    monkeypatch.setattr(metrics, "_CHUNK", 100)  # 3 resamples at a time
    assert bootstrap(values, n=200, seed=5) == pytest.approx(whole)


def test_coverage_is_nominal(rng):
    hits = []
    for seed in range(300):
        interval = bootstrap(rng.exponential(size=80), n=300, seed=seed)
        hits.append(interval.low <= 1 <= interval.high)
    assert 0.89 <= np.mean(hits) <= 0.975


def test_coverage_of_clustered_items_needs_their_groups(rng):
    grouped, single = [], []
    groups = np.repeat(np.arange(40), 5).tolist()
    for seed in range(200):
        values = np.repeat(rng.normal(size=40), 5) + 0.3 * rng.normal(size=200)
        for hits, units in ((grouped, groups), (single, None)):
            interval = bootstrap(values, units, n=200, seed=seed)
            hits.append(interval.low <= 0 <= interval.high)
    assert 0.88 <= np.mean(grouped) <= 0.985
    assert np.mean(single) < 0.75


def test_groups_of_equal_items_widen_the_interval_by_the_root_of_their_size(rng):
    values = np.repeat(rng.normal(size=60), 9)
    groups = [("document", i // 9) for i in range(540)]
    by_group, by_item = bootstrap(values, groups, n=4000), bootstrap(values, n=4000)
    assert (by_group.high - by_group.low) / (by_item.high - by_item.low) == pytest.approx(3, rel=0.1)
    # copies of an item carry no information: the same interval as of one copy each
    assert by_group == pytest.approx(bootstrap(values[::9], n=4000), abs=1e-12)


def test_groups_count_by_their_items():
    values = np.array([1.0, 1.0, 1.0, 0.0])
    interval = bootstrap(values, groups=["a", "a", "a", "b"], n=4000)
    assert interval.value == 0.75
    assert (interval.low, interval.high) == (0, 1)  # both "b", both "a"
    mean = bootstrap(values[:, None], ["a", "a", "a", "b"], lambda m: m[0] * (1 - m[0]), n=4000)
    assert mean.high == pytest.approx(0.1875)  # one of each: 3 items against 1
    scattered = bootstrap(values[[0, 3, 1, 2]], ["a", "b", "a", "a"], n=4000)
    assert scattered == interval


def test_paired_differences_are_sharper_than_two_intervals(rng):
    hard = rng.normal(size=200)
    a, b = hard + 0.1 + 0.05 * rng.normal(size=200), hard
    difference = bootstrap(a - b, n=500)
    assert difference.low > 0.08
    assert bootstrap(a, n=500).low < bootstrap(b, n=500).high


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (np.ones((4, 2)), {}, r"shape \(4, 2\).*statistic"),
        (np.array([0.0, np.nan]), {}, r"item 1 are nan.*leave"),
        (np.ones(3), {"groups": ["a", "b"]}, r"2 groups for 3 items"),
        (np.ones(3), {"groups": ["a"] * 3}, r"1 group\(s\) of 3 items.*at least 2"),
        (np.ones(0), {}, r"0 group\(s\) of 0 items"),
        (np.ones(3), {"n": 0}, r"n = 0 resamples"),
        (np.ones(3), {"level": 95}, r"level = 95"),
    ],
)
def test_what_has_no_interval_is_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(values, **options)


# McNemar's test


def test_mcnemar_in_closed_form():
    a = np.array([1] * 5 + [0] + [1] * 3 + [0] * 2)
    b = np.array([0] * 5 + [1] + [1] * 3 + [0] * 2)
    assert metrics.mcnemar(a, b) == (5, 1, pytest.approx(2 * (1 + 6) / 2**6))
    assert metrics.mcnemar(b, a) == (1, 5, pytest.approx(2 * (1 + 6) / 2**6))
    assert metrics.mcnemar(a, a) == (0, 0, 1)
    assert metrics.mcnemar([True, False], [False, True]) == (1, 1, 1)
    assert metrics.mcnemar([1.0] * 20, [0.0] * 20).p == pytest.approx(2 / 2**20)


@quick
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_mcnemar_counts_all_ways_to_swap_the_systems(items):
    a, b = zip(*items, strict=True)
    differences = [x - y for x, y in items if x != y]
    swapped = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    assert metrics.mcnemar(a, b).p == pytest.approx(mean(total >= abs(sum(differences)) for total in swapped))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 0.5], [1, 0], r"right_a of item 1 is 0\.5: give 0 or 1"),
        ([1, 0, 1], [1, 0, 2], r"right_b of item 2 is 2"),
        ([1, 0], [np.nan, 0], r"right_b of item 0 is nan"),
        ([1, 0], [1], r"shape \(2,\), right_b of shape \(1,\)"),
        ([[1, 0]], [[1, 0]], r"give both as \(item,\)"),
    ],
)
def test_mcnemar_refuses_what_is_neither_right_nor_wrong(a, b, message):
    with pytest.raises(ValueError, match=message):
        metrics.mcnemar(a, b)


def test_kl_divergence_by_hand():
    p, q = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), np.array([[0.25, 0.25, 0.5], [0.5, 0.5, 0.0]])
    assert metrics.kl_divergence(p, q) == pytest.approx([log(2), log(2)])
    assert metrics.kl_divergence(p, p) == pytest.approx([0, 0], abs=1e-9)
    assert np.isfinite(metrics.kl_divergence(q, p)).all()


@pytest.mark.parametrize("k", [2, 4])
def test_counts_of_the_distribution_lie_inside_the_binomial_interval_and_others_do_not(k):
    rng = np.random.default_rng(k)
    p = rng.dirichlet(np.ones(k), size=2000)
    counts = np.array([rng.multinomial(64, row) for row in p])
    assert metrics.inside_binomial(counts, p).mean() >= 0.99
    assert 0.93 < metrics.inside_binomial(counts, p, level=0.9).mean() < 0.995  # intervals of whole numbers are wider
    shifted = np.array([rng.multinomial(64, row) for row in np.roll(p, 1, axis=0)])
    assert metrics.inside_binomial(shifted, p).mean() < 0.5
    assert metrics.inside_binomial(np.array([[64, 0]]), np.array([[0.5, 0.5]])).tolist() == [False]
