"""Integers near reals where distance is a quadratic form, and not the sum of squares: rounding each alone is not best.

Finding the nearest is the closest vector problem. Two heuristics follow each other here: rounding in turn, each number
bearing the errors of those before it (Babai, "On Lovász' lattice reduction and the nearest lattice point problem",
1986; for weights it is GPTQ, Frantar et al., 2022), and coordinate descent, which moves one integer at a time. They end
where no integer moves alone, which need not be the nearest, so that several orders are tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from qir.fixed_point import Rounding
from qir.levels import nearest_levels
from qir.types import IntegerType

Vector = npt.NDArray[np.float64]

_MOST_SWEEPS: Final = 50
_SHUFFLES: Final = 3  # orders tried beyond the first: they take 5 % or so off the distance, 8 of them 8 %
_MOST_SHUFFLED: Final = 1024  # columns: with more of them, an order takes many seconds and gains less


def nearest_allowed(reals: Vector, storage: IntegerType) -> Vector:
    """The integers that a storage allows nearest to reals."""
    if storage.levels is not None:
        return nearest_levels(reals, storage.levels, Rounding.HALF_AWAY).astype(np.float64)
    return np.clip(np.rint(reals), storage.lo, storage.hi)


def distance(integers: Vector, wanted: Vector, metric: Vector) -> Vector:
    """(q - t)^T A (q - t) for each row of q and t [groups, rows, columns], A [groups, columns, columns] symmetric."""
    error = integers - wanted
    return np.asarray((error @ metric * error).sum(axis=-1))


def nearest_integers(wanted: Vector, metric: Vector, start: Vector, storage: IntegerType) -> Vector:
    """For each row, allowed integers at small `distance`, never above that of `start`; shapes as there.

    The metric is positive definite. No single integer of the result can move and make it better.
    """
    found = _descended(wanted, metric, start, storage)
    least = distance(found, wanted, metric)
    for order in _orders(metric):
        other = _descended(wanted, metric, _rounded_in_turn(wanted, metric, order, storage), storage)
        reached = distance(other, wanted, metric)
        found = np.where((reached < least)[..., None], other, found)
        least = np.minimum(reached, least)
    return found


def _orders(metric: Vector) -> Iterator[npt.NDArray[np.int64]]:
    """Orders of the columns, the last one first: by weight in the metric, then shuffled, the same in every run."""
    diagonal = np.diagonal(metric, axis1=1, axis2=2)
    yield np.argsort(diagonal, axis=-1, kind="stable")
    columns, random = diagonal.shape[-1], np.random.default_rng(0)
    for _ in range(_SHUFFLES if columns <= _MOST_SHUFFLED else 0):
        yield np.broadcast_to(random.permutation(columns), diagonal.shape)


def _rounded_in_turn(wanted: Vector, metric: Vector, order: npt.NDArray[np.int64], storage: IntegerType) -> Vector:
    """In this order of columns [groups, columns], the last first, each takes its real less the errors made before it.

    With A = L L^T, the distance is the sum of the squares of L^T (q - t), whose last entry has one error in it, the one
    before two, and so on: each is made as small as it can be.
    """
    factor = np.linalg.cholesky(np.take_along_axis(np.take_along_axis(metric, order[:, :, None], 1), order[:, None], 2))
    targets = np.take_along_axis(wanted, order[:, None], 2)
    found, errors = np.empty_like(targets), np.zeros_like(targets)
    for i in range(targets.shape[-1] - 1, -1, -1):
        carried = errors[..., i + 1 :] @ factor[:, i + 1 :, i, None] / factor[:, i, None, i, None]
        found[..., i] = nearest_allowed(targets[..., i] - carried[..., 0], storage)
        errors[..., i] = found[..., i] - targets[..., i]
    result = np.empty_like(found)
    np.put_along_axis(result, np.broadcast_to(order[:, None], found.shape), found, 2)
    return result


def _descended(wanted: Vector, metric: Vector, start: Vector, storage: IntegerType) -> Vector:
    """Each integer in turn goes where the distance is least with the others as they are, until none moves."""
    found = start.copy()
    slope = (found - wanted) @ metric
    for _ in range(_MOST_SWEEPS):
        moved = False
        for i in range(found.shape[-1]):
            best = found[..., i] - slope[..., i] / metric[:, i, i, None]
            step = nearest_allowed(best, storage) - found[..., i]
            # Strictly nearer, by more than rounding of the slope: else two integers at a tie would swap for ever.
            gain = np.abs(best - found[..., i]) - np.abs(best - found[..., i] - step)
            groups, rows = np.nonzero((step != 0) & (gain > 1e-6))
            if groups.size:
                moves = step[groups, rows]
                found[groups, rows, i] += moves
                slope[groups, rows] += moves[:, None] * metric[groups, i]
                moved = True
        if not moved:
            break
    return found
