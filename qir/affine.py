"""Affine forms: integers as linear functions of others, so that a proof sees what cancels (x - mean(x)) or rejoins.

A form has no symbol for each element. It says of one element of a tensor, wherever it lies, which neighbours of which
`Source` tensors it sums, with which weights, and how far what was rounded on the way may be off. Sources are centred
(the zero point is subtracted), so that padding is 0. Weights are integers in units of 2**-scale, rounded to so many
bits that sums of them stay exact in int64; what rounding loses is part of the offset. No floating point anywhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.interval import Bounds, ExactArray, exact

IntArray = npt.NDArray[np.int64]
Offset = tuple[int, ...]
Strides = tuple[int, ...] | None

#: Bits of a weight after rounding.
_WEIGHT_BITS: Final = 30
#: Forms with more weights than this are given up: what they bound becomes a source of its own.
_MOST_WEIGHTS: Final = 1 << 20
#: So many products are taken at most to compose two linear functions.
_MOST_PRODUCTS: Final = 1 << 26
#: Bits of weights that are added in common units.
_ALIGNED_BITS: Final = 48
#: int64 sums stay below 2 to this power.
_SUM_BITS: Final = 62


@dataclass(frozen=True, eq=False)
class Source:
    """Values that forms are linear in: centred bounds a channel, and the dimensions between batch and channels."""

    name: str
    lo: IntArray
    hi: IntArray
    grid: Offset

    @property
    def reach(self) -> IntArray:
        """The largest magnitude of each channel."""
        return np.maximum(np.abs(self.lo), np.abs(self.hi))

    @property
    def positions(self) -> int:
        """Elements of a channel in one sample."""
        return math.prod(self.grid)


@dataclass(frozen=True, eq=False)
class Linear:
    """The part of a form that comes from one source, as weights [channels, source channels].

    `taps` has the weights of the elements at offsets from the position in the source, `total` those of the sum over all
    positions. Where `is_padded`, taps may lie outside the source, and count 0 there.
    """

    taps: Mapping[Offset, IntArray]
    total: IntArray | None = None
    is_padded: bool = False

    def arrays(self) -> Iterable[IntArray]:
        """Every array of weights."""
        yield from self.taps.values()
        if self.total is not None:
            yield self.total

    def map(self, change: Callable[[IntArray], IntArray]) -> Linear:
        """All weights changed alike."""
        taps = {place: change(weights) for place, weights in self.taps.items()}
        return replace(self, taps=taps, total=None if self.total is None else change(self.total))

    def plus(self, other: Linear, sign: int) -> Linear:
        """The sum or the difference of both."""
        taps = dict(self.taps)
        for place, weights in other.taps.items():
            taps[place] = taps[place] + sign * weights if place in taps else sign * weights
        totals = [t for t in (self.total, None if other.total is None else sign * other.total) if t is not None]
        return Linear(taps, _sum(totals) if totals else None, self.is_padded or other.is_padded)

    def ends(self, source: Source) -> tuple[ExactArray, ExactArray]:
        """The least and the greatest value of each channel, in units of the weights, as Python ints."""
        largest = _largest(self.arrays())
        elements = len(self.taps) + (source.positions if self.total is not None else 0)
        reach = int(source.reach.max(initial=0)) * max(len(source.lo), 1) * max(elements, 1)
        is_wide = (2 * largest * reach).bit_length() > _SUM_BITS
        lo, hi = (e.astype(object) if is_wide else e for e in (source.lo, source.hi))

        def span(weights: Any, part: Callable[[Any], Any] = lambda e: e) -> tuple[Any, Any]:
            positive, negative = np.maximum(weights, 0), np.minimum(weights, 0)
            return part(positive * lo + negative * hi), part(positive * hi + negative * lo)

        total = self.total if self.total is not None else np.zeros((1, 1), np.int64)
        inside = not self.is_padded
        apart = 0 if self.total is None else source.positions - (len(self.taps) if inside else 0)
        low, high = (apart * e for e in span(total))
        for weights in self.taps.values():
            least, most = span(weights + total if inside else weights)
            if not inside:
                least, most = np.minimum(least, 0), np.maximum(most, 0)
            low, high = low + least, high + most
        return exact(np.sum(low, axis=1)), exact(np.sum(high, axis=1))


@dataclass(frozen=True, eq=False)
class Form:
    """Centred values of shape [N, *grid, channels]: the sum of `terms` and an offset within [lo, hi] of each channel.

    Weights and offsets are in units of 2**-scale. A term's strides are what a step along the grid is in its source;
    None where both have their elements in the same order, whatever the grids.
    """

    grid: Offset
    terms: Mapping[tuple[Source, Strides], Linear]
    lo: ExactArray
    hi: ExactArray
    scale: int = 0

    @staticmethod
    def of(source: Source) -> Form | None:
        """The values of a source; None where there are too many channels."""
        channels = len(source.lo)
        if channels * channels > _MOST_WEIGHTS:
            return None
        key, place = _key(source, source.grid)
        zeros = exact(np.zeros(channels, np.int64))
        return Form(source.grid, {key: Linear({place: np.eye(channels, dtype=np.int64)})}, zeros, zeros)

    @property
    def channels(self) -> int:
        """How many there are."""
        return len(self.lo)

    @property
    def sources(self) -> tuple[Source, ...]:
        """What the values depend on, each once."""
        return tuple(dict.fromkeys(source for source, _ in self.terms))

    def bounds(self) -> Bounds:
        """Exact bounds of each channel, rounded inward to integers."""
        lo, hi = self.lo, self.hi
        for (source, _), linear in self.terms.items():
            low, high = linear.ends(source)
            lo, hi = lo + low, hi + high
        return Bounds.of(-_floor(-lo, self.scale), _floor(hi, self.scale))

    def shifted(self, lo: npt.ArrayLike, hi: npt.ArrayLike) -> Form:
        """The form plus something within [lo, hi], integers or one a channel."""
        low, high = _floor(exact(lo), -self.scale), -_floor(-exact(hi), -self.scale)
        return replace(self, lo=exact(self.lo + low), hi=exact(self.hi + high))

    def plus(self, other: Form, sign: int = 1) -> Form | None:
        """The sum or the difference; what has one channel or one position meets all of the other's."""
        channels, grid = max(self.channels, other.channels), max(self.grid, other.grid, key=math.prod)
        left, right = self.spread(channels, grid), other.spread(channels, grid)
        if left is None or right is None:
            return None
        left, right = left._aligned(right), right._aligned(left)
        terms = dict(left.terms)
        for key, linear in right.terms.items():
            terms[key] = terms[key].plus(linear, sign) if key in terms else linear.map(lambda w: sign * w)
        ends = (right.lo, right.hi) if sign > 0 else (-right.hi, -right.lo)
        return Form(grid, terms, left.lo + ends[0], left.hi + ends[1], left.scale)._within_limits()

    def rows(self, index: npt.ArrayLike) -> Form:
        """Some channels, in the order of `index`."""
        picked = np.asarray(index, np.int64)
        terms = {key: linear.map(lambda w: w[picked]) for key, linear in self.terms.items()}
        return replace(self, terms=terms, lo=self.lo[picked], hi=self.hi[picked])

    def regrid(self, grid: Offset) -> Form | None:
        """The same elements in the same order under other dimensions; None where neighbours would be lost."""
        terms: dict[tuple[Source, Strides], Linear] = {}
        for (source, strides), linear in self.terms.items():
            if linear.taps and not _is_pointwise(strides, linear):
                return None
            key, place = _key(source, grid)
            moved = replace(linear, taps=dict(zip([place], linear.taps.values(), strict=False)))
            terms[key] = terms[key].plus(moved, 1) if key in terms else moved
        return replace(self, grid=grid, terms=terms)

    def summed(self) -> Form | None:
        """The sum over all positions, of shape [N, channels]; None where elements of the source count unequally."""
        count = math.prod(self.grid)
        terms: dict[tuple[Source, Strides], Linear] = {}
        for (source, strides), linear in self.terms.items():
            if linear.taps and not (_is_pointwise(strides, linear) and count == source.positions):
                return None
            parts = [*linear.taps.values(), *([linear.total * count] if linear.total is not None else [])]
            total = Linear({}, _sum(parts))
            key: tuple[Source, Strides] = (source, None)
            terms[key] = terms[key].plus(total, 1) if key in terms else total
        return Form((), terms, self.lo * count, self.hi * count, self.scale)._within_limits()

    def summed_channels(self) -> Form | None:
        """The sum over the channels, which becomes the only one."""
        terms = {k: linear.map(lambda w: w.sum(axis=0, keepdims=True)) for k, linear in self.terms.items()}
        lo, hi = (exact(np.array([sum(e)], object)) for e in (self.lo, self.hi))
        return replace(self, terms=terms, lo=lo, hi=hi)._within_limits()

    def convolved(
        self, kernel: Mapping[Offset, IntArray], strides: Offset, grid: Offset, *, is_padded: bool
    ) -> Form | None:
        """The sums of weights [outputs, channels] times the form at offsets from the position times the strides.

        None where padding would cut off what is no plain multiple of a source, or where weights are too many.
        """
        is_pointwise = not is_padded and all(s == 1 for s in strides) and not any(any(place) for place in kernel)
        if is_padded and not self.is_plain:
            return None
        terms: dict[tuple[Source, Strides], Linear] = {}
        for (source, inner), linear in self.terms.items():
            if not _affordable(kernel, linear) or (linear.taps and inner is None and not is_pointwise):
                return None
            taps: dict[Offset, IntArray] = {}
            for outer, weights in kernel.items():
                for place, below in linear.taps.items():
                    moved = place
                    if inner is not None:
                        moved = tuple(o * s + p for o, s, p in zip(outer, inner, place, strict=True))
                    product = _product(weights, below)
                    taps[moved] = taps[moved] + product if moved in taps else product
            total = None
            if linear.total is not None:
                total = _sum([_product(weights, linear.total) for weights in kernel.values()])
            steps = None if inner is None else tuple(a * b for a, b in zip(strides, inner, strict=True))
            terms[source, steps] = Linear(taps, total, linear.is_padded or is_padded)
        wide = exact(np.stack(list(kernel.values())))
        positive, negative = np.maximum(wide, 0), np.minimum(wide, 0)
        lo = (positive * self.lo + negative * self.hi).sum(axis=(0, 2))
        hi = (positive * self.hi + negative * self.lo).sum(axis=(0, 2))
        return Form(grid, terms, exact(lo), exact(hi), self.scale)._within_limits()

    def times(self, lo: ExactArray, hi: ExactArray, reach: ExactArray) -> Form | None:
        """The product with something else within [lo, hi] of each channel; `reach` is the form's largest magnitude.

        The product with the middle of that interval, off by what half its width makes of the largest magnitude.
        """
        double, width = lo + hi, hi - lo
        by = [abs(int(d)).bit_length() for d in double]
        if max(by, default=0) + _WEIGHT_BITS > _SUM_BITS:
            return None
        form = self._rounded(_WEIGHT_BITS)
        factor = double.astype(np.int64)[:, None]
        terms = {key: linear.map(lambda w: w * factor) for key, linear in form.terms.items()}
        ends = np.minimum(form.lo * double, form.hi * double), np.maximum(form.lo * double, form.hi * double)
        product = Form(form.grid, terms, exact(ends[0]), exact(ends[1]), form.scale + 1)
        margin = -_floor(-width * reach, 1)
        return product.shifted(-margin, margin)._within_limits()

    def scaled(self, factors: Sequence[Fraction], error: tuple[Sequence[Fraction], Sequence[Fraction]]) -> Form | None:
        """Each channel times a dyadic factor of its own, plus something within an interval: a rounded product.

        None where the factors have more bits than int64 products of them with weights can hold.
        """
        mantissas, exponents = zip(*map(_mantissa, factors), strict=True)
        by = np.array(mantissas, np.int64)[:, None]
        form = self._rounded(_WEIGHT_BITS)
        if int(by.max(initial=0)).bit_length() + _WEIGHT_BITS > _SUM_BITS:
            return None
        largest = exact(np.zeros(self.channels, np.int64))
        for linear in form.terms.values():
            for weights in linear.arrays():
                largest = np.maximum(largest, exact(np.abs(weights * by).max(axis=1, initial=0)))
        points = [form.scale - e for e in exponents]  # binary points of the products, channel by channel
        scale = min(p - max(int(m).bit_length() - _WEIGHT_BITS, 0) for p, m in zip(points, largest, strict=True))
        drop = exact([p - scale for p in points])
        terms, lost = {}, exact(np.zeros(self.channels, np.int64))
        for (source, strides), linear in form.terms.items():
            terms[source, strides], missing = _dropped(linear.map(lambda w: w * by), source, drop)
            lost = lost + missing
        lo, hi = (
            exact([_floor(int(e) * m, int(d)) for e, m, d in zip(part, mantissas, drop, strict=True)])
            for part in (form.lo, -form.hi)
        )
        unit = Fraction(2) ** scale
        below, above = (exact([math.floor(e * unit) for e in part]) for part in (error[0], [-e for e in error[1]]))
        return Form(self.grid, terms, lo - lost + below, -(hi - lost + above), scale)

    @property
    def is_plain(self) -> bool:
        """Whether each element is but a multiple of one of a source, so that 0 there is 0 here."""
        if len(self.terms) != 1 or np.any(self.lo) or np.any(self.hi):
            return False
        ((_, strides), linear) = next(iter(self.terms.items()))
        return linear.total is None and _is_pointwise(strides, linear)

    def spread(self, channels: int, grid: Offset) -> Form | None:
        """The form on more channels and positions where it has one of either; None where it does not broadcast."""
        if self.channels not in (1, channels):
            return None
        form = self if self.channels == channels else self.rows(np.zeros(channels, np.int64))
        if form.grid == grid:
            return form
        if math.prod(form.grid) != 1:
            return None
        terms: dict[tuple[Source, Strides], Linear] = {}
        for (source, _), linear in form.terms.items():
            if linear.taps and (source.positions != 1 or len(linear.taps) > 1 or linear.is_padded):
                return None
            whole = Linear({}, _sum(list(linear.arrays())))  # the one element is the sum over all
            key, _ = _key(source, grid)
            terms[key] = terms[key].plus(whole, 1) if key in terms else whole
        return replace(form, grid=grid, terms=terms)

    def _aligned(self, other: Form) -> Form:
        """In the finer units of both where that keeps weights small, else in the coarser ones."""
        return self._at(_common_scale([self, other]))

    def _bits(self) -> int:
        return _largest(w for linear in self.terms.values() for w in linear.arrays()).bit_length()

    def _at(self, scale: int) -> Form:
        """In units of 2**-scale, weights rounded where these are coarser."""
        up = scale - self.scale
        if up >= 0:
            terms = {key: linear.map(lambda w: w << up) for key, linear in self.terms.items()}
            return Form(self.grid, terms, self.lo * (1 << up), self.hi * (1 << up), scale)
        drop, terms, lost = exact([-up] * self.channels), {}, exact(np.zeros(self.channels, np.int64))
        for (source, strides), linear in self.terms.items():
            terms[source, strides], missing = _dropped(linear, source, drop)
            lost = lost + missing
        lo, hi = _floor(self.lo, -up) - lost, -_floor(-self.hi, -up) + lost
        return Form(self.grid, terms, lo, hi, scale)

    def _rounded(self, bits: int) -> Form:
        """With weights of so many bits at most."""
        return self._at(self.scale - max(self._bits() - bits, 0))

    def _within_limits(self) -> Form | None:
        """The form with rounded weights, or None where there are too many of them."""
        if sum(w.size for linear in self.terms.values() for w in linear.arrays()) > _MOST_WEIGHTS:
            return None
        return self._rounded(_WEIGHT_BITS)


def stacked(forms: Sequence[Form]) -> Form | None:
    """Forms of one grid side by side along the channels."""
    scale, channels = _common_scale(forms), sum(f.channels for f in forms)
    terms: dict[tuple[Source, Strides], Linear] = {}
    first = 0
    aligned = [f._at(scale) for f in forms]
    for form in aligned:
        rows = slice(first, first + form.channels)

        def placed(weights: IntArray, rows: slice = rows) -> IntArray:
            whole = np.zeros((channels, weights.shape[1]), np.int64)
            whole[rows] = weights
            return whole

        for key, linear in form.terms.items():
            part = linear.map(placed)
            terms[key] = terms[key].plus(part, 1) if key in terms else part
        first += form.channels
    lo, hi = (exact(np.concatenate([getattr(f, name) for f in aligned])) for name in ("lo", "hi"))
    return Form(forms[0].grid, terms, lo, hi, scale)._within_limits()


def _key(source: Source, grid: Offset) -> tuple[tuple[Source, Strides], Offset]:
    """The key and the tap of a source's own elements on a grid."""
    if grid == source.grid:
        return (source, (1,) * len(grid)), (0,) * len(grid)
    return (source, None), ()


def _is_pointwise(strides: Strides, linear: Linear) -> bool:
    """Whether each position takes the element at the same place, and no other."""
    here = strides is None or (all(s == 1 for s in strides) and all(not any(place) for place in linear.taps))
    return here and len(linear.taps) == 1 and not linear.is_padded


def _sum(arrays: Sequence[IntArray]) -> IntArray:
    return functools.reduce(np.add, arrays)


def _largest(arrays: Iterable[IntArray]) -> int:
    """The largest magnitude of any element."""
    return max((int(np.abs(w).max(initial=0)) for w in arrays), default=0)


def _common_scale(forms: Sequence[Form]) -> int:
    """The finest scale of all where that keeps weights small, else the coarsest."""
    finest = max(f.scale for f in forms)
    is_small = max(f._bits() + finest - f.scale for f in forms) <= _ALIGNED_BITS
    return finest if is_small else min(f.scale for f in forms)


def _affordable(kernel: Mapping[Offset, IntArray], linear: Linear) -> bool:
    """Whether products of both are few enough, and their sums stay within int64."""
    outputs, channels = next(iter(kernel.values())).shape
    reach = _largest(kernel.values()) * _largest(linear.arrays()) * len(kernel) * channels
    work = len(kernel) * outputs * sum(w.size for w in linear.arrays() if not _is_identity(w))
    return bool(reach.bit_length() <= _SUM_BITS and work <= _MOST_PRODUCTS)


def _is_identity(weights: IntArray) -> bool:
    count = len(weights)
    return weights.shape == (count, count) and np.array_equal(weights, np.eye(count, dtype=np.int64))


def _product(weights: IntArray, below: IntArray) -> IntArray:
    """The matrix product; nothing is to be done where the right one is the identity."""
    return weights if _is_identity(below) else weights @ below


def _mantissa(factor: Fraction) -> tuple[int, int]:
    """A dyadic factor as an odd integer times a power of two."""
    power = factor.denominator.bit_length() - 1
    zeros = (factor.numerator & -factor.numerator).bit_length() - 1 if factor else 0
    return factor.numerator >> zeros, zeros - power


def _dropped(linear: Linear, source: Source, drop: ExactArray) -> tuple[Linear, ExactArray]:
    """Weights with `drop` bits of each channel rounded away, and by how many of the new units sums may be off."""
    bits = np.minimum(drop, _SUM_BITS).astype(np.int64)[:, None]
    half = np.where(bits > 0, np.int64(1) << np.maximum(bits - 1, 0), 0)
    lost = exact(np.zeros(len(drop), np.int64))
    reach = exact(source.reach)

    def rounded(weights: IntArray) -> IntArray:
        return np.asarray((weights + half) >> bits)

    counted = [(weights, 1) for weights in linear.taps.values()]
    counted += [(linear.total, source.positions)] if linear.total is not None else []
    for weights, times in counted:
        changed = (rounded(weights) << bits) != weights if int(bits.max(initial=0)) < _SUM_BITS else weights != 0
        lost = lost + (exact(changed.astype(np.int64)) @ reach) * times
    return linear.map(rounded), exact(-((-lost) // 2))


def _floor(value: Any, scale: int) -> Any:
    """`value * 2**-scale`, rounded down."""
    return value >> scale if scale >= 0 else value << -scale
