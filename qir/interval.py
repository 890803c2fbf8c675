"""Intervals over exact integers (and, before legalize, reals), and their per-channel form used by proofs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.errors import QirError

Number = int | float


@dataclass(frozen=True, slots=True)
class Interval:
    """The closed interval [lo, hi]; ints at stage `fixed` (exact), floats before it. Raises QirError when empty."""

    lo: Number
    hi: Number

    def __post_init__(self) -> None:
        if not self.lo <= self.hi:
            raise QirError(f"empty interval [{self.lo}, {self.hi}]")

    def contains(self, other: Interval) -> bool:
        """Whether `other` lies inside."""
        return self.lo <= other.lo and other.hi <= self.hi

    def hull(self, other: Interval) -> Interval:
        """The smallest interval that holds both."""
        return Interval(min(self.lo, other.lo), max(self.hi, other.hi))

    def intersect(self, other: Interval) -> Interval | None:
        """What both hold, or None when they are disjoint."""
        lo, hi = max(self.lo, other.lo), min(self.hi, other.hi)
        return Interval(lo, hi) if lo <= hi else None


def bits_of_interval(interval: Interval) -> int:
    """The bits of the two's complement integer that holds both ends."""
    return max(int(e).bit_length() if e >= 0 else (~int(e)).bit_length() for e in (interval.lo, interval.hi)) + 1


ExactArray = npt.NDArray[Any]


def exact(values: npt.ArrayLike) -> ExactArray:
    """Python ints in an object array, so that arithmetic on them never overflows."""
    if isinstance(values, np.ndarray):
        return values.astype(object, copy=False)
    listed = np.array(values, object)  # never by way of a common dtype, which is float64 for 1 and 2**63
    listed[...] = np.frompyfunc(int, 1, 1)(listed)
    return listed


def gcd(*values: npt.ArrayLike) -> ExactArray:
    """The greatest common divisor of exact integers, element by element; 0 is a multiple of everything."""
    return functools.reduce(lambda a, b: exact(np.gcd(a, b)), map(exact, values))


def product_ends(weights: Any, lo: Any, hi: Any) -> tuple[Any, Any]:
    """The least and the greatest products of integers, or integer arrays, with values in [lo, hi]."""
    positive, negative = np.maximum(weights, 0), np.minimum(weights, 0)
    return positive * lo + negative * hi, positive * hi + negative * lo


@dataclass(frozen=True, slots=True, eq=False)
class Bounds:
    """Exact integer bounds of a tensor: object arrays of Python ints, 0-d for the whole tensor or 1-d per last axis.

    `data` holds the very values where the tensor is constant. Every value is `lo` plus a multiple of `step`, which is 0
    where there is but one value; None says 1 of every other.
    """

    lo: ExactArray
    hi: ExactArray
    data: npt.NDArray[Any] | None = None
    step: ExactArray | None = None

    @staticmethod
    def of(lo: npt.ArrayLike, hi: npt.ArrayLike, step: npt.ArrayLike | None = None) -> Bounds:
        """Bounds from integers or integer arrays, broadcast against each other.

        `hi` is lowered to the last value that `step` reaches.
        """
        low, high = np.broadcast_arrays(exact(lo), exact(hi))
        if not bool(np.all(low <= high)):
            raise QirError("empty bounds: some lower bound exceeds its upper bound")
        if step is None:
            return Bounds(low, high)
        steps = np.broadcast_to(exact(step), low.shape)
        high = np.where(steps == 0, low, high - (high - low) % np.where(steps == 0, 1, steps))
        return Bounds(low, exact(high), None, exact(np.where(high == low, 0, steps)))

    @property
    def steps(self) -> ExactArray:
        """The step of each channel, in the shape of `lo`; 0 where there is one value."""
        return exact(np.where(self.lo == self.hi, 0, 1 if self.step is None else self.step))

    def map(self, pick: Callable[[ExactArray], ExactArray]) -> Bounds:
        """The bounds of channels in another arrangement: what `pick` makes of the ends and of the steps."""
        return Bounds(pick(self.lo), pick(self.hi), None, pick(self.steps))

    @property
    def hull(self) -> Interval:
        """The interval over all channels; the empty tensor gives [0, 0]."""
        if self.lo.size == 0:
            return Interval(0, 0)
        return Interval(int(self.lo.min()), int(self.hi.max()))

    @property
    def channels(self) -> int | None:
        """The number of channels, or None for a whole-tensor bound."""
        return None if self.lo.ndim == 0 else int(self.lo.shape[0])

    def flat(self) -> Bounds:
        """The whole-tensor bound."""
        if self.lo.ndim == 0:
            return Bounds(self.lo, self.hi, None, self.step)
        whole = self.hull
        step = np.gcd.reduce(exact([*self.steps.reshape(-1), *(self.lo.reshape(-1) - whole.lo)]), initial=0)
        return Bounds.of(whole.lo, whole.hi, step)

    def clamp(self, lo: int, hi: int) -> Bounds:
        """The image under saturation to [lo, hi]; an end that is cut off has values at the bound, off the steps."""
        low, high = np.clip(self.lo, lo, hi), np.clip(self.hi, lo, hi)
        return Bounds.of(low, high, gcd(self.steps, self.lo - low, self.hi - high))

    def shifted(self, offset: npt.ArrayLike) -> Bounds:
        """The image under adding `offset`, a scalar or one value per channel."""
        return Bounds.of(self.lo + exact(offset), self.hi + exact(offset), self.steps)

    def within(self, lo: npt.ArrayLike, hi: npt.ArrayLike) -> Bounds:
        """The image under adding something in [lo, hi], scalars or one value per channel."""
        low, high = exact(lo), exact(hi)
        return self.shifted(low) if np.array_equal(low, high) else Bounds.of(self.lo + low, self.hi + high)

    def union(self, other: Bounds) -> Bounds:
        """Channel by channel, the hull of both."""
        step = gcd(self.steps, other.steps, self.lo - other.lo)
        return Bounds.of(np.minimum(self.lo, other.lo), np.maximum(self.hi, other.hi), step)

    def intersect(self, other: Bounds) -> Bounds:
        """Channel by channel, what both hold, at the steps of `self`. Raises QirError where they are disjoint."""
        low, high = exact(np.maximum(self.lo, other.lo)), exact(np.minimum(self.hi, other.hi))
        steps = np.broadcast_to(self.steps, low.shape)
        low = low + (self.lo - low) % np.where(steps == 0, 1, steps)
        return Bounds.of(low, high, steps)


def hull_of(bounds: Iterable[Bounds]) -> Bounds:
    """The whole-tensor bound that holds every given one; those of no channels hold nothing, unless all do."""
    given = list(bounds)
    found = [b.flat() for b in given if b.lo.size] or [given[0].flat()]
    whole = found[0]
    for other in found[1:]:
        whole = whole.union(other)
    return whole


#: Beyond every integer type: what reads all of a value asks for.
EVERYTHING: Final = Bounds.of(-(1 << 64), 1 << 64)
