"""The algebra of orders."""

from itertools import combinations
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from permdistill import orders

KS = range(2, 7)
quick = settings(deadline=None, max_examples=30, database=None, derandomize=True)


@st.composite
def tables(draw):
    """A table of values (item, order, option) and sampled orders (order, K)."""
    k = draw(st.integers(2, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    chosen = orders.sample_orders(k, draw(st.integers(1, factorial(k))), rng)
    return rng.normal(size=(draw(st.integers(1, 4)), *chosen.shape)), chosen


@pytest.mark.parametrize("k", KS)
def test_all_orders_are_the_whole_symmetric_group_identity_first(k):
    every = orders.all_orders(k)
    assert every.shape == (factorial(k), k)
    assert every[0].tolist() == list(range(k))
    assert len({tuple(o) for o in every.tolist()}) == factorial(k)
    assert (np.sort(every, axis=1) == np.arange(k)).all()
    assert np.array_equal(every, every[np.lexsort(every.T[::-1])])  # lexicographic: row numbers are stable


@pytest.mark.parametrize("k", KS)
def test_cyclic_orders_are_rotations_of_the_original(k):
    cyclic = orders.cyclic_orders(k)
    every = {tuple(o) for o in orders.all_orders(k).tolist()}
    assert {tuple(o) for o in cyclic.tolist()} <= every
    assert len({tuple(o) for o in cyclic.tolist()}) == k
    for j, order in enumerate(cyclic.tolist()):
        assert order == [*range(j, k), *range(j)]
    assert (np.sort(cyclic, axis=0) == np.arange(k)[:, None]).all()  # each option once at each position


def test_three_options_written_out():
    assert orders.all_orders(3).tolist() == [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    assert orders.cyclic_orders(3).tolist() == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]


def test_order_k_is_the_option_shown_at_position_k():
    order = np.array([[2, 0, 1]])
    assert orders.apply(order[0], ["x", "y", "z"]) == ["z", "x", "y"]
    assert orders.inverse(order).tolist() == [[1, 2, 0]]  # option 0 stands at position 1
    shown = np.array([[0.7, 0.2, 0.1]])  # 0.7 for label "A", where option 2 stands
    assert orders.to_options(shown, order).tolist() == [[0.2, 0.1, 0.7]]
    assert orders.to_positions(np.array([[0.2, 0.1, 0.7]]), order).tolist() == shown.tolist()


@pytest.mark.parametrize("k", KS)
def test_inverse_undoes_apply(k):
    options = [f"option {i}" for i in range(k)]
    for order, back in zip(orders.all_orders(k), orders.inverse(orders.all_orders(k)), strict=True):
        assert orders.apply(back, orders.apply(order, options)) == options


@pytest.mark.parametrize("k", KS)
def test_inverse_is_an_involution_and_composes_to_identity(k):
    every = orders.all_orders(k)
    assert np.array_equal(orders.inverse(orders.inverse(every)), every)
    assert (np.take_along_axis(every, orders.inverse(every), axis=1) == np.arange(k)).all()


@quick
@given(tables())
def test_to_options_and_to_positions_are_inverse(table):
    values, chosen = table
    assert np.array_equal(orders.to_positions(orders.to_options(values, chosen), chosen), values)
    assert np.array_equal(orders.to_options(orders.to_positions(values, chosen), chosen), values)


@quick
@given(tables())
def test_to_options_gives_each_option_the_value_of_its_position(table):
    by_position, chosen = table
    by_option = orders.to_options(by_position, chosen)
    for j, order in enumerate(chosen):
        for position, option in enumerate(order):
            assert np.array_equal(by_option[:, j, option], by_position[:, j, position])


@quick
@given(tables())
def test_the_original_order_changes_nothing(table):
    values, chosen = table
    identity = np.broadcast_to(np.arange(chosen.shape[1]), chosen.shape)
    assert np.array_equal(orders.to_options(values, identity), values)
    assert np.array_equal(orders.to_positions(values, identity), values)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_sampled_orders_are_different_orders(k):
    for n in range(1, factorial(k) + 1):
        chosen = orders.sample_orders(k, n, np.random.default_rng(n))
        assert chosen.shape == (n, k)
        assert len({tuple(o) for o in chosen.tolist()}) == n
        assert (np.sort(chosen, axis=1) == np.arange(k)).all()


def test_sampled_orders_repeat_with_the_seed_and_are_uniform():
    same = [orders.sample_orders(4, 5, np.random.default_rng(7)) for _ in range(2)]
    assert np.array_equal(*same)
    rng = np.random.default_rng(0)
    draws = [tuple(orders.sample_orders(3, 2, rng)[0].tolist()) for _ in range(3000)]
    shares = np.array([draws.count(tuple(o)) for o in orders.all_orders(3).tolist()]) / 3000
    assert np.abs(shares - 1 / 6).max() < 5 * np.sqrt(1 / 6 * 5 / 6 / 3000)


@pytest.mark.parametrize("k", [-1, 0, 1, 27])
def test_impossible_numbers_of_options_are_refused(k):
    for make in (orders.all_orders, orders.cyclic_orders, orders.williams_orders):
        with pytest.raises(ValueError, match=rf"K = {k} .*2\.\.26"):
            make(k)
    with pytest.raises(ValueError, match=r"K = 7 .*2\.\.6"):  # 5,040 of them
        orders.all_orders(7)


@pytest.mark.parametrize("n", [-1, 0, 7])
def test_impossible_numbers_of_orders_are_refused(n):
    with pytest.raises(ValueError, match=rf"n = {n} .*1\.\.6"):
        orders.sample_orders(3, n, np.random.default_rng(0))


@pytest.mark.parametrize("k", KS)
def test_two_options_meet_equally_often_either_way(k):
    place = orders.inverse(orders.all_orders(k))
    for a, b in combinations(range(k), 2):
        assert (place[:, a] < place[:, b]).sum() == factorial(k) // 2
