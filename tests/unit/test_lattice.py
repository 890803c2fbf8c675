"""Integers near reals by a quadratic form: against all there are, and what a result promises."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qir.passes.lattice import distance, nearest_allowed, nearest_integers
from qir.types import IntegerType, integer

Vector = npt.NDArray[np.float64]


def problem(seed: int, columns: int, storage: IntegerType, rows: int = 3, groups: int = 2) -> tuple[Any, ...]:
    """Reals to round, a metric that ties neighbours together, and the integers nearest to each."""
    random = np.random.default_rng(seed)
    wanted = random.uniform(storage.lo - 0.5, storage.hi + 0.5, (groups, rows, columns))
    factor = random.normal(size=(groups, columns, columns)) + 1.0
    metric = factor @ factor.transpose(0, 2, 1) + 0.1 * np.eye(columns)
    return wanted, metric, nearest_allowed(wanted, storage)


def least(wanted: Vector, metric: Vector, storage: IntegerType) -> Vector:
    """The least distance of each row, of all allowed integers."""
    every = itertools.product(range(storage.lo, storage.hi + 1), repeat=wanted.shape[-1])
    costs = [distance(np.broadcast_to(np.array(q, float), wanted.shape), wanted, metric) for q in every]
    return np.asarray(np.min(costs, axis=0))


def test_the_distance_is_the_quadratic_form() -> None:
    metric = np.array([[[2.0, 1.0], [1.0, 3.0]]])
    found = distance(np.array([[[1.0, 2.0]]]), np.array([[[0.5, 0.0]]]), metric)
    assert found.tolist() == [[2 * 0.25 + 2 * 0.5 * 2 + 3 * 4]]


def test_errors_that_cancel_beat_the_nearest_integers() -> None:
    # Inputs that are nearly the same: 0.4 and 0.4 are 0.8 together, which 0 and 0 miss, and 1 and 0 do not.
    metric = np.array([[[1.0, 0.99], [0.99, 1.0]]])
    wanted, start = np.array([[[0.4, 0.4]]]), np.zeros((1, 1, 2))
    found = nearest_integers(wanted, metric, start, integer(2))
    assert sorted(found.ravel().tolist()) == [0.0, 1.0]


@pytest.mark.parametrize("storage", [integer(2), IntegerType(2, True, -1, 1), integer(2, signed=False), integer(3)])
@pytest.mark.parametrize("seed", range(8))
def test_it_is_close_to_the_best_of_all_and_no_move_betters_it(storage: IntegerType, seed: int) -> None:
    wanted, metric, start = problem(seed, 4, storage)
    found = nearest_integers(wanted, metric, start, storage)
    assert (found == np.rint(found)).all()
    assert found.min() >= storage.lo
    assert found.max() <= storage.hi
    cost, best = distance(found, wanted, metric), least(wanted, metric, storage)
    assert (cost >= best - 1e-9).all()
    assert (cost <= distance(start, wanted, metric) + 1e-9).all()
    for column, step in itertools.product(range(4), (-1, 1)):
        moved = found.copy()
        moved[..., column] = np.clip(moved[..., column] + step, storage.lo, storage.hi)
        assert (distance(moved, wanted, metric) >= cost - 1e-4).all()


def test_most_small_problems_are_solved() -> None:
    solved = []
    for seed in range(40):
        wanted, metric, start = problem(seed, 4, integer(2))
        found = distance(nearest_integers(wanted, metric, start, integer(2)), wanted, metric)
        solved.append(np.isclose(found, least(wanted, metric, integer(2))))
    assert np.mean(solved) > 0.75


def test_without_ties_between_columns_the_nearest_are_best() -> None:
    wanted, _, start = problem(0, 5, integer(4))
    metric = np.broadcast_to(np.diag([3.0, 1.0, 0.5, 7.0, 2.0]), (2, 5, 5))
    assert np.array_equal(nearest_integers(wanted, metric, start, integer(4)), start)


def test_a_tie_stays_where_it_starts() -> None:
    wanted, metric = np.array([[[0.5, -0.5]]]), np.eye(2)[None]
    for start in ([[[0.0, 0.0]]], [[[1.0, -1.0]]]):
        assert np.array_equal(nearest_integers(wanted, metric, np.array(start), integer(4)), start)
