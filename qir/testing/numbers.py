"""Numbers on which wrong arithmetic shows: both ends of a type, ties, and chains that overflow and come back."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from typing import Final

import numpy as np
import numpy.typing as npt

from qir.types import IntegerType

Integers = npt.NDArray[np.int64]
Random = np.random.Generator

#: Widths up to this one are run through value by value.
_EVERY_VALUE: Final = 8


def edges(storage: IntegerType, zero: int, random: Random, count: int = 24) -> Integers:
    """Both ends, the integers around the zero point, powers of two and a few at random: sorted, without repeats."""
    powers = [zero + sign * (1 << p) for p in range(0, storage.bits - 1, 2) for sign in (-1, 1)]
    near = [zero + d for d in (-3, -2, -1, 0, 1, 2, 3)]
    ends = [storage.lo, storage.lo + 1, storage.hi - 1, storage.hi]
    inside = [v for v in (*powers, *near, *ends) if storage.lo <= v <= storage.hi]
    return np.unique(np.concatenate([np.array(inside, np.int64), uniform(storage, count, random)]))


def every_value(storage: IntegerType) -> Integers:
    """All integers of a storage of at most 16 bits."""
    return np.arange(storage.lo, storage.hi + 1, dtype=np.int64)


def uniform(storage: IntegerType, shape: int | tuple[int, ...], random: Random) -> Integers:
    """Integers of a storage, all equally likely."""
    return random.integers(storage.lo, storage.hi, shape, np.int64, endpoint=True)


def patterns(storage: IntegerType, length: int, zero: int, random: Random) -> Integers:
    """Rows [13, length] whose products with each other drive sums to their ends, past them and back.

    All of one end, either end in turn, one end and then the other, the real 0, next to nothing, few large, random.
    """
    lo, hi = storage.lo, storage.hi
    places = np.arange(length)
    late = places >= (length + 1) // 2
    middle = (places >= length // 3) & (places < 2 * length // 3)
    origin = min(max(zero, lo), hi)
    near = np.clip(origin + random.integers(-1, 2, length), lo, hi)
    sparse = np.where(random.random(length) < 0.1, random.choice(np.array([lo, hi]), length), origin)
    rows = [
        np.full(length, lo),
        np.full(length, hi),
        np.where(places % 2, lo, hi),
        np.where(places % 2, hi, lo),
        np.where(late, lo, hi),
        np.where(late, hi, lo),
        np.where(middle, hi, lo),
        np.full(length, origin),
        near,
        sparse,
        random.choice(np.array([lo, hi]), length),
        uniform(storage, length, random),
        uniform(storage, length, random),
    ]
    return np.stack(rows).astype(np.int64)


def steps_of_outputs(output: IntegerType, random: Random, count: int) -> Integers:
    """Integers k of which k and k + 1 are neighbouring outputs: all of few; else those at both ends, around 0 and some.

    One step beyond either end is among them.
    """
    lo, hi = output.lo - 1, output.hi
    if output.bits <= _EVERY_VALUE:
        return np.arange(lo, hi + 1, dtype=np.int64)
    chosen = [lo, lo + 1, lo + 2, hi - 2, hi - 1, hi, *range(-8, 8)]
    some = random.integers(lo, hi, max(0, count - len(chosen)), np.int64, endpoint=True)
    return np.unique(np.concatenate([np.array([k for k in chosen if lo <= k <= hi], np.int64), some]))


def boundary(ratio: Fraction, step: int, zero: int) -> int:
    """The greatest integer x for which `x * ratio + zero` is not above `step + 1/2`."""
    return floor((step - zero + Fraction(1, 2)) / ratio)


def boundaries(ratio: Fraction, steps: Integers, zero: int, source: IntegerType, reach: int = 2) -> Integers:
    """Integers of `source` around where `round(x * ratio) + zero` goes from k to k + 1, for every k of `steps`.

    Its ends too, and what lies around 0.
    """
    centres = [*(boundary(ratio, int(k), zero) for k in steps), source.lo, source.hi, 0, 1]
    found = {c + d for c in centres for d in range(-reach, reach + 1)}
    return np.array(sorted(x for x in found if source.lo <= x <= source.hi), np.int64)


def columns(parts: list[Integers]) -> Integers:
    """Columns [rows, parts] of unequal length, each repeated down to the longest."""
    rows = max(len(p) for p in parts)
    return np.stack([np.resize(p, rows) for p in parts], axis=1)


def pairs(a: Integers, b: Integers) -> tuple[Integers, Integers]:
    """Every value of one with every value of the other."""
    left, right = np.meshgrid(a, b, indexing="ij")
    return left.reshape(-1), right.reshape(-1)


def in_rows(values: Integers, width: int) -> Integers:
    """Values as rows [rows, width], the first ones repeated at the end where they do not fill the last row."""
    return np.resize(values, (-(-values.size // width), width))
