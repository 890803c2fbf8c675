"""Weights of few levels: which a format has, which of them is nearest to a real, and the scale that fits them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.errors import QirError
from qir.fixed_point import Rounding
from qir.types import S8, IntegerType, of_levels

Reals = npt.NDArray[np.float64]

#: The integers that the levels of a codebook are of: 8 bits, symmetric.
CODEBOOK_GRID: Final = S8.narrowed(-127, 127)
#: How far down scales of levels are tried, and how often the best is refined at most; most are at rest earlier.
_OCTAVES: Final = 4
_ROUNDS: Final = 20


def power_of_two_levels(bits: int) -> IntegerType:
    """Integers 0 and +-2^0 to +-2^(2^(bits - 1) - 2): a sign and an exponent in `bits` bits.

    With 2 bits that is every integer of [-1, 1]. Raises QirError for a width outside 2..5.
    """
    if not 2 <= bits <= 5:
        raise QirError(f"power-of-two weights have 2 to 5 bits, not {bits}")
    if bits == 2:
        return IntegerType(2, True, -1, 1)
    powers = [1 << e for e in range((1 << (bits - 1)) - 1)]
    return of_levels([-p for p in reversed(powers)] + [0] + powers)


def nearest_levels(scaled: npt.NDArray[Any], levels: tuple[int, ...], rounding: Rounding) -> npt.NDArray[np.int64]:
    """The level that reals, in units of the scale, are rounded to; of all integers it gives what rounding them does.

    Beyond the ends it is the end. Between two neighbours `floor` takes the lower one, `toward_zero` the one toward
    zero, and every other mode the nearer one. A real in the middle of two is a tie: `half_up` takes the upper one,
    `half_down` the lower; `half_away` the upper one from 0 on and the lower one below, `half_toward_zero` the other way
    round; `half_even` the even one, or as `half_away` where both are even or both odd. NaN counts as 0.
    """
    table = np.array(levels, np.float64)
    reals = np.asarray(scaled, np.float64)
    reals = np.where(np.isnan(reals), 0.0, reals)
    place = np.clip(np.searchsorted(table, reals, side="right") - 1, 0, len(levels) - 2)
    low, high = table[place], table[place + 1]
    middle = (low + high) / 2  # exact: levels have fewer bits than float64
    away = middle >= 0
    match rounding:
        case Rounding.FLOOR:
            up = reals >= high
        case Rounding.TOWARD_ZERO:
            up = (reals >= high) | ((reals < 0) & (reals > low))
        case _:
            at_tie = {
                Rounding.HALF_UP: True,
                Rounding.HALF_DOWN: False,
                Rounding.HALF_AWAY: away,
                Rounding.HALF_TOWARD_ZERO: ~away,
                Rounding.HALF_EVEN: np.where((low + high) % 2 == 0, away, high % 2 == 0),
            }[rounding]
            up = (reals > middle) | ((reals == middle) & at_tie)
    return np.array(levels, np.int64)[place + up]


def codebook(data: npt.NDArray[Any], bits: int, axis: int | None, *, powers: bool = False) -> IntegerType:
    """The integers of 8 bits that leave weights the least squared error: exact k-means in one dimension.

    There are 2^bits of them, less those that no weight is next to. Weights are in units of the scale at which the
    largest magnitude, of each index of `axis` or of all, is 127, or at most 127 where scales are `powers` of two. The
    optimum is found as a shortest path over pairs of neighbouring levels (Wang and Song, "Ckmeans.1d.dp", The R
    Journal, 2011), so that it does not depend on a start.
    """
    grid = np.arange(CODEBOOK_GRID.lo, CODEBOOK_GRID.hi + 1)
    steps = _largest(data, axis) / CODEBOOK_GRID.hi
    if powers:
        steps = np.exp2(np.ceil(np.log2(np.where(steps > 0, steps, 1.0))))
    reals = np.sort((data.astype(np.float64) / np.where(steps > 0, steps, 1.0)).reshape(-1))
    # Of the weights below each half of a grid unit: their number, sum and sum of squares.
    halves = np.arange(2 * CODEBOOK_GRID.lo, 2 * CODEBOOK_GRID.hi + 1) / 2
    below = np.searchsorted(reals, halves)
    sums = [np.concatenate([[0.0], np.cumsum(reals**power)]) for power in range(3)]

    def error(level: npt.NDArray[Any], first: npt.NDArray[Any], last: npt.NDArray[Any]) -> Reals:
        """The squared error of the weights from number `first` to `last` at a level."""
        count, total, squares = (s[last] - s[first] for s in sums)
        return np.asarray(squares - 2 * level * total + level**2 * count)

    at = below[2 * (grid - CODEBOOK_GRID.lo)]
    between = below[(grid[:, None] + grid[None, :]) - 2 * CODEBOOK_GRID.lo]
    pair = error(grid[:, None], at[:, None], between) + error(grid[None, :], between, at[None, :])
    pair[np.tril_indices(len(grid))] = np.inf  # levels ascend
    best, back = error(grid, np.zeros_like(at), at), []
    for _ in range((1 << bits) - 1):
        paths = best[:, None] + pair
        back.append(paths.argmin(axis=0))
        best = paths.min(axis=0)
    place = int((best + error(grid, at, np.full_like(at, len(reals)))).argmin())
    chosen = [place]
    for previous in reversed(back):
        chosen.append(int(previous[chosen[-1]]))
    levels = tuple(int(grid[i]) for i in reversed(chosen))
    used = np.unique(nearest_levels(reals, levels, Rounding.HALF_AWAY)).tolist()
    if len(used) < 2:
        used = sorted({0, *used}) if any(used) else [0, 1]
    return IntegerType(CODEBOOK_GRID.bits, True, used[0], used[-1], tuple(used))


def level_scales(data: npt.NDArray[Any], storage: IntegerType, axis: int | None, *, powers: bool = False) -> Reals:
    """The scale at which levels leave weights little squared error, for each index of `axis` or one for all.

    The best of those from where the largest magnitude meets the largest level, down four octaves in steps of an eighth;
    then the nearest levels and the scale that fits them best are taken in turn, which never adds error, until they
    rest. For -1 and 1 this is the mean magnitude (Rastegari et al., "XNOR-Net", 2016). With `powers` it is the power of
    two below or above that, whichever leaves less. Weights of zeros have 0, or, where no level is 0, so small a scale
    that what they become is little: a 256th of the least of the others.
    """
    reals = data.astype(np.float64)
    levels = storage.levels or tuple(range(storage.lo, storage.hi + 1))
    start = _largest(data, axis) / max(-storage.lo, storage.hi)
    is_zero = start == 0
    start = np.where(is_zero, 1.0, start)
    steps = _least(reals, levels, (start * np.exp2(-place / 8) for place in range(8 * _OCTAVES + 1)), axis)
    steps = _rested(reals, levels, steps, axis)
    if powers:
        steps = _least(reals, levels, (np.exp2(end(np.log2(steps))) for end in (np.ceil, np.floor)), axis)
    of_zeros = 0.0 if 0 in levels else steps[~is_zero].min(initial=1.0) / 256
    return np.asarray(np.where(is_zero, of_zeros, steps)).reshape(() if axis is None else (-1,))


def _least(reals: Reals, levels: tuple[int, ...], tried: Iterable[Reals], axis: int | None) -> Reals:
    """Of scales, the first with the least squared error, for each index of the axis or for all."""
    best, least = np.ones(()), np.asarray(np.inf)
    for steps in tried:
        error = _sum((reals - steps * nearest_levels(reals / steps, levels, Rounding.HALF_AWAY)) ** 2, axis)
        best, least = np.where(error < least, steps, best), np.minimum(error, least)
    return best


def _rested(reals: Reals, levels: tuple[int, ...], steps: Reals, axis: int | None) -> Reals:
    """Scales that the least squares of their own nearest levels leave as they are, or nearly so."""
    for _ in range(_ROUNDS):
        integers = nearest_levels(reals / steps, levels, Rounding.HALF_AWAY)
        products, squares = _sum(reals * integers, axis), _sum(integers.astype(np.float64) ** 2, axis)
        found = np.where(products > 0, products / np.where(squares > 0, squares, 1.0), steps)
        if np.array_equal(found, steps):
            break
        steps = found
    return steps


def _others(data: npt.NDArray[Any], axis: int | None) -> tuple[int, ...]:
    return tuple(i for i in range(data.ndim) if i != axis)


def _largest(data: npt.NDArray[Any], axis: int | None) -> Reals:
    return np.asarray(np.abs(data.astype(np.float64)).max(axis=_others(data, axis), initial=0.0, keepdims=True))


def _sum(data: npt.NDArray[Any], axis: int | None) -> Reals:
    return np.asarray(data.sum(axis=_others(data, axis), keepdims=True))
