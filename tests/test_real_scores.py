"""Identities that must hold whatever the numbers, on the committed scores of real models."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from permdistill import catalogue, debias
from permdistill.measure import metrics
from permdistill.orders import all_orders, cyclic_orders
from permdistill.paper import experiments, profiles, tables
from permdistill.paper.tasks import SUMMARIES

FULL = profiles.PROFILES["full"]
CELLS = [(teacher, task) for teacher in FULL.teachers for task in FULL.tasks if FULL.n_questions(teacher, task)]


@pytest.fixture(scope="module", params=CELLS, ids=lambda cell: "-".join(cell))
def scored(request):
    teacher, task = request.param
    return experiments.read_scores(teacher, task, "test", n=FULL.n_questions(teacher, task))


def test_what_the_students_notebook_shows_of_summeval():
    """nbval runs that notebook with its other pool; these are the numbers of this one, in the small profile."""
    smoke = profiles.PROFILES["smoke"]
    train, test = (experiments.read_pool(smoke, smoke.pools["summeval"], split) for split in ("train", "test"))
    assert (len(train.P), len(test.P)) == (64, 336)
    shown = tables.pretty(tables.students(test, experiments.baselines(test)))
    assert shown.accuracy.tolist() == [
        *("50.0 [50.0, 50.0]", "42.9 [40.7, 44.0]", "51.3 [46.3, 60.0]"),
        *("50.0 [50.0, 50.0]", "50.0 [28.6, 71.4]", "50.0 [42.9, 57.1]"),
        *("50.0 [50.0, 50.0]", "51.4 [50.0, 52.9]", "57.1 [55.6, 58.8]"),
        *("50.0 [50.0, 50.0]", "68.6 [57.1, 76.0]", "45.0 [39.6, 52.0]"),
        *("50.0 [50.0, 50.0]", "54.1 [50.7, 58.2]", "50.0 [47.3, 52.2]"),
    ]
    ps = [value.split()[0] for value in shown["ps (TV)"]]
    assert ps == "27.8 0.0 60.7 35.7 0.0 58.3 25.2 0.0 48.8 36.7 0.0 58.3 31.3 0.0 56.5".split()


def test_every_cell_has_the_questions_that_it_should(scored):
    first = scored.teacher == FULL.teachers[0]
    assert len(scored.P) >= (300 if first else 150)
    if first and scored.task.family == SUMMARIES:
        assert len(set(scored.task.groups)) >= 40
    assert scored.content_free.shape == (scored.task.k,) and scored.content_free.sum() == pytest.approx(1)


def test_hard_sensitivity_is_one_minus_consistency(scored):
    hard = metrics.permutation_sensitivity(debias.decide(scored.P))
    assert hard == pytest.approx(1 - metrics.consistency(scored.P))
    pairs = np.triu_indices(scored.P.shape[1], 1)
    overlap = np.minimum(debias.decide(scored.P)[:5, pairs[0]], debias.decide(scored.P)[:5, pairs[1]]).sum(-1)
    assert hard[:5] == pytest.approx(1 - overlap.mean(-1))
    if scored.task.k == 2:
        assert hard == pytest.approx(1 - metrics.commutativity(scored.P))


def test_the_average_over_all_orders_has_neither_sensitivity_nor_bias(scored):
    averaged = debias.broadcast(debias.permutation_average(scored.P), len(scored.orders))
    assert (metrics.permutation_sensitivity(averaged) == 0).all()
    assert metrics.positional_bias_per_item(averaged, scored.orders).max() < 1e-12
    assert metrics.permutation_sensitivity(scored.P).min() > 0  # there was something to remove


def test_cyclic_orders_are_among_all_orders(scored):
    every, cyclic = all_orders(scored.task.k).tolist(), cyclic_orders(scored.task.k).tolist()
    rotations = scored.P[:, [every.index(order) for order in cyclic]]
    average = debias.cyclic_average(scored.P, scored.orders)
    assert average[:, 0] == pytest.approx(rotations.mean(axis=1))
    assert average.mean(axis=1) == pytest.approx(debias.permutation_average(scored.P))
    if scored.task.k == 2:  # the swap average is the full average
        assert average == pytest.approx(debias.broadcast(debias.permutation_average(scored.P), 2))


@settings(deadline=None, max_examples=5, derandomize=True, database=None)
@given(st.integers(0, 2**32 - 1))
def test_relabelling_the_options_relabels_everything(seed):
    rng = np.random.default_rng(seed)
    scored = experiments.read_scores(*CELLS[rng.integers(len(CELLS))], "test", n=20)
    k, orders = scored.task.k, scored.orders
    new = rng.permutation(k)  # option o is called new[o]
    P = scored.P[..., np.argsort(new)]
    renamed = new[orders]
    assert metrics.permutation_sensitivity(P) == pytest.approx(metrics.permutation_sensitivity(scored.P))
    assert metrics.position_marginals(P, renamed) == pytest.approx(metrics.position_marginals(scored.P, orders))
    for method in catalogue.debiasers(k):
        if "random" in method.name or "black-box" in method.name:
            continue
        here, there = (
            method.answer(Q, o, scored.content_free, np.random.default_rng(0)) for Q, o in ((scored.P, orders), (P, renamed))
        )
        assert there == pytest.approx(here[..., np.argsort(new)], abs=1e-7), method.name
