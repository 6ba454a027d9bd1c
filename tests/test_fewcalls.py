"""Few calls: balanced designs, adaptive stopping without gold answers, corrections at one call."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from permdistill import catalogue, debias, orders
from permdistill.fewcalls import (
    adaptive_average,
    batch_calibration,
    design_average,
    fit_margins,
    geometric_average,
    has,
    margins,
    places,
    stages,
)
from permdistill.measure import metrics
from permdistill.orders import all_orders, cyclic_orders, reverse_pairs, to_options, to_positions, williams_orders

KS = range(2, 11)


def planted(k: int, items: int = 300, bias: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A teacher that multiplies each position by a factor of its own, and knows half of the answers: P, answers."""
    rng = np.random.default_rng(seed)
    every, answers = all_orders(k), rng.integers(k, size=items)
    taste = rng.normal(size=(items, k)) + 1.5 * np.eye(k)[answers]
    logits = to_positions(np.broadcast_to(taste[:, None], (items, len(every), k)), every) + bias * np.arange(k)[::-1]
    logits = logits + rng.normal(size=logits.shape) * 0.5
    return to_options(softmax(logits, axis=-1), every), answers


@pytest.mark.parametrize("k", [*KS, 26])
def test_williams_designs_are_balanced_for_places_and_neighbours(k):
    design = williams_orders(k)
    assert design.shape == ((2 * k if k % 2 else k), k) and design[0].tolist() == list(range(k))
    for column in design.T:
        assert (np.bincount(column, minlength=k) == len(design) // k).all()
    follows = np.zeros((k, k), dtype=int)
    np.add.at(follows, (design[:, :-1], design[:, 1:]), 1)
    assert set(follows[~np.eye(k, dtype=bool)]) == {len(design) // k} and follows.trace() == 0
    assert list(range(k))[::-1] in design.tolist()  # so that it goes on from an order and its reverse


def test_williams_square_of_four_written_out():
    assert williams_orders(4).tolist() == [[0, 1, 2, 3], [1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1]]


def test_reverse_pairs_stand_one_after_the_other():
    assert reverse_pairs([[0, 1, 2], [1, 2, 0]]).tolist() == [[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1]]


def test_only_few_options_have_all_orders_listed():
    with pytest.raises(ValueError, match="K = 7 options have 5,040 orders.*take cyclic, Williams or reverse pairs"):
        all_orders(7)
    with pytest.raises(ValueError, match="K = 27 options: give 2..26"):
        williams_orders(27)
    drawn = orders.sample_orders(10, 50, np.random.default_rng(0))
    assert drawn.shape == (50, 10) and len({tuple(o) for o in drawn.tolist()}) == 50
    assert (np.sort(drawn, axis=1) == np.arange(10)).all()


def test_a_design_is_relative_to_the_presented_order():
    every = all_orders(4)
    found = places(every, williams_orders(4))
    for j, order in enumerate(every.tolist()):
        assert every[found[j]].tolist() == [[order[i] for i in row] for row in williams_orders(4).tolist()]
    with pytest.raises(ValueError, match=r"order \[3, 2, 1, 0\], which goes with order \[0, 1, 2, 3\], is missing"):
        places(cyclic_orders(4), reverse_pairs(np.arange(4)[None]))
    assert has(cyclic_orders(4), cyclic_orders(4)) and not has(williams_orders(4), cyclic_orders(4))
    assert has(williams_orders(10), williams_orders(10))  # a design holds what it needs of each of its own orders
    assert has(williams_orders(5), williams_orders(5))


def test_design_average_is_the_mean_of_its_calls():
    P, _ = planted(4, 5)
    every, pair = all_orders(4).tolist(), reverse_pairs(np.arange(4)[None])
    Q = design_average(P, all_orders(4), pair)
    for j, order in enumerate(every):
        assert Q[:, j] == pytest.approx((P[:, j] + P[:, every.index(order[::-1])]) / 2)
    assert design_average(P, all_orders(4), cyclic_orders(4)) == pytest.approx(debias.cyclic_average(P, all_orders(4)))
    W = design_average(P, all_orders(4), williams_orders(4))
    same = places(all_orders(4), williams_orders(4))
    assert (W[:, same[0]] == W[:, :1]).all()  # one Williams square, exactly one answer


def test_geometric_mean_removes_a_multiplicative_bias():
    k, every = 3, all_orders(3)
    taste = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    shown = to_positions(np.broadcast_to(taste[:, None], (2, 6, 3)), every) * np.array([4.0, 2.0, 1.0])
    P = to_options(shown / shown.sum(axis=-1, keepdims=True), every)
    assert geometric_average(P) == pytest.approx(taste)
    assert np.abs(debias.permutation_average(P) - taste).max() > 0.01
    assert geometric_average(np.eye(k)[None]) == pytest.approx(np.full((1, 3), 1 / 3))  # zeros stay finite


def test_batch_calibration_divides_by_the_mean():
    every = all_orders(2)
    P = to_options(np.array([[[0.9, 0.1], [0.7, 0.3]]]), every)
    by_position = to_positions(batch_calibration(P, every), every)
    assert by_position[0] == pytest.approx(np.array([[9 / 13, 4 / 13], [7 / 19, 12 / 19]]))  # of the mean (0.8, 0.2)
    with pytest.raises(ValueError, match="position 1 has probability 0 throughout"):
        batch_calibration(to_options(np.array([[[1.0, 0.0], [1.0, 0.0]]]), every), every)


def test_adaptive_asks_on_where_the_margin_is_small():
    every = all_orders(3)
    P, _ = planted(3, 200)
    designs = stages(3)
    assert [len(d) for d in designs] == [1, 2, 6]
    never, always = adaptive_average(P, every, designs, (0, 0)), adaptive_average(P, every, designs, (2, 2))
    assert (never.answers == P).all() and (never.calls == 1).all()
    assert always.answers == pytest.approx(debias.broadcast(debias.permutation_average(P), 6)) and (always.calls == 6).all()
    some = adaptive_average(P, every, designs, (0.3, 0.2))
    sure = margins(P) >= 0.3
    assert (some.calls[sure] == 1).all() and (some.answers[sure] == P[sure]).all() and (some.calls[~sure] > 1).all()
    with pytest.raises(ValueError, match="1 margins for 3 designs"):
        adaptive_average(P, every, designs, (0.3,))
    with pytest.raises(ValueError, match="a design of 3 orders does not hold the 2 of the one before"):
        adaptive_average(P, every, [*designs[:2], cyclic_orders(3)], (0.3, 0.2))


@pytest.mark.parametrize(("k", "budget"), [(2, 1.5), (3, 2.6), (4, 2.6), (4, 8), (5, 2.6)])
def test_margins_are_fitted_to_a_budget_without_gold(k, budget):
    every, designs = all_orders(k), stages(k)[1 if budget == 8 else 0 :]
    raw, answers = planted(k, 400)
    P = batch_calibration(raw, every)  # or else much of a margin is the bias
    found = fit_margins(P, every, designs, budget)
    adaptive = adaptive_average(P, every, designs, found)
    assert 0.97 * budget <= adaptive.calls.mean() <= budget
    # Asking where it is unclear is worth more than asking as often everywhere.
    random = debias.random_average(P, int(budget), np.random.default_rng(0))
    assert metrics.accuracy(adaptive.answers, answers).mean() > metrics.accuracy(random, answers).mean()
    assert fit_margins(P, every, designs, 1000) == fit_margins(P, every, designs, 2000)
    with pytest.raises(ValueError, match="0.5 calls a question: the first design takes "):
        fit_margins(P, every, designs, 0.5)


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6, 10, 26])
def test_rows_are_fitted_where_their_orders_are(k):
    names = [method.name for method in catalogue.few_calls(k)]
    assert len(names) == len(set(names)) and set(names) <= {method.name for method in catalogue.debiasers(k)}
    own = williams_orders(k)
    P = np.random.default_rng(0).dirichlet(np.ones(k), size=(4, len(own)))
    for method in catalogue.few_calls(k):
        assert method.source and method.calls(k) >= 1
        if method.fits(own):
            assert method.answer(P, own, None, np.random.default_rng(0)).shape == P.shape
    assert sum(method.fits(own) for method in catalogue.few_calls(k)) >= 2
