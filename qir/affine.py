"""Affine forms: integers as linear functions of others, so that a proof sees what cancels (x - mean(x)) or rejoins.

A form has no symbol for each element. It says of one element of a tensor, wherever it lies, which neighbours of which
`Source` tensors it sums, with which weights, and how far what was rounded on the way may be off. Sources are centred
(the zero point is subtracted), so that padding is 0. Weights are integers in units of 2**-scale, rounded to so many
bits that sums of them stay exact in int64; what rounding loses is part of the offset. No floating point anywhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.interval import Bounds, ExactArray, exact, product_ends

IntArray = npt.NDArray[np.int64]
Place = tuple[int, ...]
Axes = frozenset[int]

#: Bits of a weight after rounding.
_WEIGHT_BITS: Final = 30
#: Bits of weights that are added in common units.
_ALIGNED_BITS: Final = 48
#: Forms with more weights than this are given up: what they bound becomes a source of its own.
_MOST_WEIGHTS: Final = 1 << 20
#: So many products are taken at most to compose two linear functions.
_MOST_PRODUCTS: Final = 1 << 26
#: int64 sums stay below 2 to this power.
_SUM_BITS: Final = 62


@dataclass(frozen=True, eq=False)
class Source:
    """Values [N, *grid, channels] that forms are linear in, with centred bounds of each channel."""

    name: str
    lo: IntArray
    hi: IntArray
    grid: Place

    @property
    def reach(self) -> IntArray:
        """The largest magnitude of each channel."""
        return np.maximum(np.abs(self.lo), np.abs(self.hi))

    def count(self, axes: Axes) -> int:
        """Elements along these axes of the grid."""
        return math.prod(self.grid[a] for a in axes)


@dataclass(frozen=True, eq=False)
class Linear:
    """The part of a form that comes from one source, as weights [channels, source channels].

    `taps` has the weights of elements at offsets from the position in the source, `sums` those of sums along axes of
    its grid, at the same place along the others. Where `is_padded`, taps may lie outside the source, and count 0 there.
    """

    taps: Mapping[Place, IntArray]
    sums: Mapping[Axes, IntArray]
    is_padded: bool = False

    def arrays(self) -> Iterator[IntArray]:
        """Every array of weights."""
        yield from self.taps.values()
        yield from self.sums.values()

    def map(self, change: Callable[[IntArray], IntArray]) -> Linear:
        """All weights changed alike."""
        taps = {place: change(weights) for place, weights in self.taps.items()}
        return Linear(taps, {axes: change(weights) for axes, weights in self.sums.items()}, self.is_padded)

    def plus(self, other: Linear) -> Linear:
        """The sum of both."""
        return Linear(_merged(self.taps, other.taps), _merged(self.sums, other.sums), self.is_padded or other.is_padded)

    def counted(self, source: Source) -> Iterator[tuple[IntArray, int]]:
        """Every array of weights and how many elements it stands for."""
        yield from ((weights, 1) for weights in self.taps.values())
        yield from ((weights, source.count(axes)) for axes, weights in self.sums.items())

    def ends(self, source: Source) -> tuple[ExactArray, ExactArray]:
        """The least and the greatest value of each channel, in units of the weights, as Python ints.

        Taps on elements that the largest sum counts too are taken together with them; other sums by themselves.
        """
        elements = max(sum(times for _, times in self.counted(source)), 1)
        largest = 2 * _largest(self.arrays()) * int(source.reach.max(initial=0)) * max(len(source.lo), 1)
        is_wide = (largest * elements).bit_length() > _SUM_BITS
        lo, hi = (e.astype(object) if is_wide else e for e in (source.lo, source.hi))
        axes = max(self.sums, key=source.count, default=None) if not self.is_padded else None
        found: list[tuple[Any, Any]] = []
        shared = 0
        for place, weights in self.taps.items():
            if axes is not None and not any(p for a, p in enumerate(place) if a not in axes):
                found.append(product_ends(weights + self.sums[axes], lo, hi))
                shared += 1
            else:
                least, most = product_ends(weights, lo, hi)
                found.append((np.minimum(least, 0), np.maximum(most, 0)) if self.is_padded else (least, most))
        for key, weights in self.sums.items():
            least, most = product_ends(weights, lo, hi)
            times = source.count(key) - (shared if key == axes else 0)
            found.append((least * times, most * times))
        low, high = (sum((exact(np.sum(pair[i], axis=1)) for pair in found), exact(0)) for i in (0, 1))
        return exact(low), exact(high)


Terms = Mapping[tuple[Source, Place], Linear]


@dataclass(frozen=True, eq=False)
class Form:
    """Centred values [N, *grid, channels]: the sum of `terms` and an offset within [lo, hi] of each channel.

    Weights and offsets are in units of 2**-scale; strides of a term are what a step along the grid is in its source. A
    tensor may show the values in another arrangement: `dims` says for each of its dimensions behind the batch which of
    the axes of [*grid, channels] run along it, the outermost first; axes of size 1 may be missing. `absorbed` names
    values of which but the bounds are part of the offset.
    """

    grid: Place
    dims: tuple[Place, ...]
    terms: Terms
    lo: ExactArray
    hi: ExactArray
    scale: int = 0
    absorbed: frozenset[str] = frozenset()

    @staticmethod
    def of(source: Source) -> Form | None:
        """The values of a source; None where there are too many channels."""
        channels, rank = len(source.lo), len(source.grid)
        if channels * channels > _MOST_WEIGHTS:
            return None
        zeros = exact(np.zeros(channels, np.int64))
        linear = Linear({(0,) * rank: np.eye(channels, dtype=np.int64)}, {})
        dims = tuple((axis,) for axis in range(rank + 1))
        return Form(source.grid, dims, {(source, (1,) * rank): linear}, zeros, zeros)

    @property
    def channels(self) -> int:
        """How many there are."""
        return len(self.lo)

    @property
    def sizes(self) -> Place:
        """The sizes of the axes, channels last."""
        return (*self.grid, self.channels)

    @property
    def has_last_channels(self) -> bool:
        """Whether the last dimension of the tensor is that of the channels."""
        return bool(self.dims) and self.dims[-1] == (len(self.grid),)

    @property
    def is_straight(self) -> bool:
        """Whether the tensor shows the axes as they are."""
        return self.dims == tuple((axis,) for axis in range(len(self.grid) + 1))

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of what the values depend on, each once."""
        return tuple(dict.fromkeys([*(source.name for source, _ in self.terms), *sorted(self.absorbed)]))

    def bounds(self) -> Bounds:
        """Exact bounds, rounded inward to integers: of each channel where these come last, else of the whole."""
        lo, hi = self.lo, self.hi
        for (source, _), linear in self.terms.items():
            low, high = linear.ends(source)
            lo, hi = lo + low, hi + high
        found = Bounds.of(-_floor(-lo, self.scale), _floor(hi, self.scale))
        return found if self.has_last_channels else found.flat()

    def along(self, values: npt.ArrayLike) -> ExactArray | None:
        """A value for all, or one for each index of the last dimension, as one for each channel; None: it is not."""
        given = exact(values)
        if given.ndim and not (self.has_last_channels and given.size in (1, self.channels)):
            return None
        return exact(np.broadcast_to(given, (self.channels,)))

    def shifted(self, lo: npt.ArrayLike, hi: npt.ArrayLike) -> Form:
        """The form plus something within [lo, hi]: integers, for all or for each index of the last dimension."""
        low, high = self.along(lo), self.along(hi)
        low = exact(np.full(self.channels, np.min(exact(lo)))) if low is None else low
        high = exact(np.full(self.channels, np.max(exact(hi)))) if high is None else high
        return replace(self, lo=self.lo + _floor(low, -self.scale), hi=self.hi - _floor(-high, -self.scale))

    def negative(self) -> Form:
        """The values with the other sign."""
        terms = {key: linear.map(np.negative) for key, linear in self.terms.items()}
        return replace(self, terms=terms, lo=-self.hi, hi=-self.lo)

    def plus(self, other: Form) -> Form | None:
        """The sum; what has one channel, or one position along an axis, meets all of the other's.

        None where dimensions of both do not show the same axes, or two dimensions would show one.
        """
        if len(self.dims) != len(other.dims) or len(self.grid) != len(other.grid):
            return None
        if any(a and b and a != b for a, b in zip(self.dims, other.dims, strict=True)):
            return None
        dims = tuple(a or b for a, b in zip(self.dims, other.dims, strict=True))
        shown = [axis for group in dims for axis in group]
        if len(set(shown)) < len(shown):
            return None
        sizes = tuple(map(max, self.sizes, other.sizes))
        left, right = self._spread(sizes, dims), other._spread(sizes, dims)
        if left is None or right is None:
            return None
        scale = _common_scale([left, right])
        left, right = left._at(scale), right._at(scale)
        terms = dict(left.terms)
        for key, linear in right.terms.items():
            terms[key] = terms[key].plus(linear) if key in terms else linear
        ends, absorbed = (left.lo + right.lo, left.hi + right.hi), left.absorbed | right.absorbed
        return Form(left.grid, dims, terms, *ends, scale, absorbed)._within_limits()

    def rows(self, index: npt.ArrayLike) -> Form:
        """Some channels, in the order of `index`."""
        picked = np.asarray(index, np.int64)
        terms = {key: linear.map(lambda w: w[picked]) for key, linear in self.terms.items()}
        return replace(self, terms=terms, lo=self.lo[picked], hi=self.hi[picked])

    def transposed(self, perm: Sequence[int]) -> Form | None:
        """Dimensions in another order, the batch first of all."""
        return replace(self, dims=tuple(self.dims[p - 1] for p in perm[1:])) if perm and perm[0] == 0 else None

    def reshaped(self, sizes: Sequence[int]) -> Form | None:
        """The same elements in the same order in dimensions of these sizes; None where these cut axes apart."""
        axes = [axis for group in self.dims for axis in group if self.sizes[axis] != 1]
        dims: list[Place] = []
        for size in sizes:
            group: list[int] = []
            while axes and math.prod(self.sizes[a] for a in (*group, axes[0])) <= size:
                group.append(axes.pop(0))
            if math.prod(self.sizes[a] for a in group) != size:
                return None
            dims.append(tuple(group))
        if axes:
            return None
        straight: list[Place] = [(axis,) for axis in range(len(self.sizes))]
        if dims == [() if self.sizes[axis] == 1 else (axis,) for axis in range(len(straight))]:
            dims = straight
        return replace(self, dims=tuple(dims))

    def summed(self, dims: Iterable[int], keepdims: bool) -> Form | None:
        """The sum along dimensions, counted from the batch; None where elements of a source count unequally."""
        places = {d - 1 for d in dims}
        axes = {axis for place in places for axis in self.dims[place] if self.sizes[axis] != 1}
        channel = len(self.grid)
        along = frozenset(axes - {channel})
        terms: dict[tuple[Source, Place], Linear] = {}
        for (source, strides), linear in self.terms.items():
            if along and linear.taps and not (_is_pointwise(strides, linear) and self._follows(source, along)):
                return None
            taps = {} if along else dict(linear.taps)
            sums = dict(zip([along], linear.taps.values(), strict=False)) if along else {}
            for key, weights in linear.sums.items():
                if not self._follows(source, along - key):
                    return None
                times = math.prod(self.grid[a] for a in along & key)
                sums = _merged(sums, {key | along: weights * times})
            terms[source, strides] = Linear(taps, sums, linear.is_padded)
        times = math.prod(self.grid[a] for a in along)
        grid = tuple(1 if a in along else size for a, size in enumerate(self.grid))
        found = replace(self, grid=grid, terms=terms, lo=self.lo * times, hi=self.hi * times)
        if channel in axes:
            summed = {key: linear.map(lambda w: w.sum(axis=0, keepdims=True)) for key, linear in terms.items()}
            lo, hi = (exact([sum(e)]) for e in (found.lo, found.hi))
            found = replace(found, terms=summed, lo=lo, hi=hi)
        left = [() if i in places else group for i, group in enumerate(self.dims) if keepdims or i not in places]
        return replace(found, dims=tuple(left))._within_limits()

    def convolved(
        self, kernel: Mapping[Place, IntArray], strides: Place, grid: Place, *, is_padded: bool
    ) -> Form | None:
        """The sums of weights [outputs, channels] times the form at offsets from the position times the strides.

        None where padding would cut off what is no plain multiple of a source, or where weights are too many.
        """
        is_pointwise = not is_padded and all(s == 1 for s in strides) and not any(any(place) for place in kernel)
        if (
            not self.has_last_channels
            or (not is_pointwise and not self.is_straight)
            or (is_padded and not self.is_plain)
        ):
            return None
        terms: dict[tuple[Source, Place], Linear] = {}
        for (source, inner), linear in self.terms.items():
            whole = frozenset(range(len(source.grid)))
            if not _affordable(kernel, linear) or (not is_pointwise and any(key != whole for key in linear.sums)):
                return None
            taps: dict[Place, IntArray] = {}
            sums: dict[Axes, IntArray] = {}
            for outer, weights in kernel.items():
                for place, below in linear.taps.items():
                    moved = (
                        tuple(o * s + p for o, s, p in zip(outer, inner, place, strict=True)) if any(outer) else place
                    )
                    taps = _merged(taps, {moved: _product(weights, below)})
                for key, below in linear.sums.items():
                    sums = _merged(sums, {key: _product(weights, below)})
            steps = inner if is_pointwise else tuple(a * b for a, b in zip(strides, inner, strict=True))
            terms[source, steps] = Linear(taps, sums, linear.is_padded or is_padded)
        ends = product_ends(exact(np.stack(list(kernel.values()))), self.lo, self.hi)
        lo, hi = (exact(e.sum(axis=(0, 2))) for e in ends)
        found = replace(self, grid=self.grid if is_pointwise else grid, terms=terms, lo=lo, hi=hi)
        return found._within_limits()

    def scaled(self, factors: Sequence[Fraction], error: tuple[Sequence[Fraction], Sequence[Fraction]]) -> Form | None:
        """Each channel times a dyadic factor of its own, plus something within an interval: a rounded product.

        None where the factors have more bits than int64 products of them with weights can hold.
        """
        mantissas, exponents = zip(*map(_mantissa, factors), strict=True)
        if max(mantissas).bit_length() + _WEIGHT_BITS > _SUM_BITS:
            return None
        by = np.array(mantissas, np.int64)[:, None]
        form = self._light()
        largest = exact(np.zeros(self.channels, np.int64))
        for linear in form.terms.values():
            for weights in linear.arrays():
                largest = np.maximum(largest, exact(np.abs(weights * by).max(axis=1, initial=0)))
        points = [form.scale - e for e in exponents]  # binary points of the products, channel by channel
        scale = min(p - max(int(m).bit_length() - _WEIGHT_BITS, 0) for p, m in zip(points, largest, strict=True))
        drop = exact([p - scale for p in points])
        products = replace(form, terms={key: linear.map(lambda w: w * by) for key, linear in form.terms.items()})
        terms, lost = products._dropped(drop)
        lo, hi = (
            exact([_floor(int(e) * m, int(d)) for e, m, d in zip(part, mantissas, drop, strict=True)])
            for part in (form.lo, -form.hi)
        )
        unit = Fraction(2) ** scale
        below, above = (exact([math.floor(e * unit) for e in part]) for part in (error[0], [-e for e in error[1]]))
        return replace(self, terms=terms, lo=lo - lost + below, hi=-(hi - lost + above), scale=scale)

    def times(self, lo: ExactArray, hi: ExactArray, reach: ExactArray) -> Form | None:
        """The product with something else within [lo, hi] of each channel; `reach` is the form's largest magnitude.

        The product with the middle of that interval, off by what half its width makes of the largest magnitude.
        """
        double, width = lo + hi, hi - lo
        if max((abs(int(d)).bit_length() for d in double), default=0) + _WEIGHT_BITS > _SUM_BITS:
            return None
        form = self._light()
        by = double.astype(np.int64)[:, None]
        terms = {key: linear.map(lambda w: w * by) for key, linear in form.terms.items()}
        ends = np.minimum(form.lo * double, form.hi * double), np.maximum(form.lo * double, form.hi * double)
        margin = -_floor(-width * reach, -form.scale)
        low, high = exact(ends[0]) - margin, exact(ends[1]) + margin
        return replace(form, terms=terms, lo=low, hi=high, scale=form.scale + 1)._within_limits()

    @property
    def is_source(self) -> bool:
        """Whether the values are those of a source."""
        return self.is_plain and not self.scale and all(map(_is_identity, next(iter(self.terms.values())).arrays()))

    @property
    def is_plain(self) -> bool:
        """Whether each element is but a multiple of one of a source, so that 0 there is 0 here."""
        if len(self.terms) != 1 or np.any(self.lo) or np.any(self.hi):
            return False
        (((_, strides), linear),) = self.terms.items()
        return not linear.sums and _is_pointwise(strides, linear)

    def _follows(self, source: Source, axes: Axes) -> bool:
        """Whether each position along these axes is one of the source."""
        return all(self.grid[a] == source.grid[a] for a in axes)

    def _spread(self, sizes: Place, dims: tuple[Place, ...]) -> Form | None:
        """The form on more channels and positions where it has one of either; None where it does not broadcast."""
        *grid, channels = sizes
        if self.channels not in (1, channels) or any(a not in (1, b) for a, b in zip(self.grid, grid, strict=True)):
            return None
        form = self if self.channels == channels else self.rows(np.zeros(channels, np.int64))
        wider = frozenset(a for a, size in enumerate(grid) if size != self.grid[a])
        terms: dict[tuple[Source, Place], Linear] = {}
        for key, linear in form.terms.items():
            is_one = all(key[0].grid[a] == 1 for a in wider)
            if not is_one and (linear.taps or any(not wider <= axes for axes in linear.sums)):
                return None  # elements along those axes differ, and the one that was meant is not known
            terms[key] = linear
            if wider and linear.taps:  # the one element along them is the sum of all
                if not _is_pointwise(key[1], linear):
                    return None
                whole = dict(zip([wider], linear.taps.values(), strict=True))
                terms[key] = Linear({}, _merged(linear.sums, whole))
        return replace(form, grid=tuple(grid), dims=dims, terms=terms)

    def _bits(self) -> int:
        return _largest(w for linear in self.terms.values() for w in linear.arrays()).bit_length()

    def _at(self, scale: int) -> Form:
        """In units of 2**-scale, weights rounded where these are coarser."""
        up = scale - self.scale
        if up >= 0:
            terms = {key: linear.map(lambda w: w << up) for key, linear in self.terms.items()}
            return replace(self, terms=terms, lo=self.lo * (1 << up), hi=self.hi * (1 << up), scale=scale)
        terms, lost = self._dropped(exact([-up] * self.channels))
        return replace(self, terms=terms, lo=_floor(self.lo, -up) - lost, hi=-_floor(-self.hi, -up) + lost, scale=scale)

    def _dropped(self, drop: ExactArray) -> tuple[dict[tuple[Source, Place], Linear], ExactArray]:
        """The terms with `drop` bits of each channel rounded away, and by how many of the new units sums may be off."""
        bits = np.minimum(drop, _SUM_BITS).astype(np.int64)[:, None]
        half = np.where(bits > 0, np.int64(1) << np.maximum(bits - 1, 0), 0)
        halves = exact(np.zeros(self.channels, np.int64))

        def rounded(weights: IntArray) -> IntArray:
            return np.asarray((weights + half) >> bits)

        for (source, _), linear in self.terms.items():
            reach = exact(source.reach)
            for weights, times in linear.counted(source):
                is_whole = (weights & ((np.int64(1) << bits) - 1)) == 0
                halves = halves + (exact((~is_whole).astype(np.int64)) @ reach) * times
        return {key: linear.map(rounded) for key, linear in self.terms.items()}, exact((halves + 1) // 2)

    def _within_limits(self) -> Form | None:
        """The form with rounded weights, or None where there are too many of them."""
        if sum(w.size for linear in self.terms.values() for w in linear.arrays()) > _MOST_WEIGHTS:
            return None
        return self._light()

    def _light(self) -> Form:
        """With weights of at most so many bits that products of them stay within int64."""
        return self._at(self.scale - max(self._bits() - _WEIGHT_BITS, 0))


def stacked(forms: Sequence[Form]) -> Form | None:
    """Forms side by side along the channels; None where these are not the last dimension of each."""
    first, scale, channels = forms[0], _common_scale(forms), sum(f.channels for f in forms)
    if any(f.grid != first.grid or f.dims != first.dims or not f.has_last_channels for f in forms):
        return None
    terms: dict[tuple[Source, Place], Linear] = {}
    aligned = [f._at(scale) for f in forms]
    starts = np.cumsum([0, *(f.channels for f in forms)])
    for form, start in zip(aligned, starts[:-1], strict=True):
        rows = (int(start), channels - int(start) - form.channels)
        for key, linear in form.terms.items():
            part = linear.map(functools.partial(np.pad, pad_width=(rows, (0, 0))))
            terms[key] = terms[key].plus(part) if key in terms else part
    lo, hi = (exact(np.concatenate([getattr(f, name) for f in aligned])) for name in ("lo", "hi"))
    absorbed = frozenset[str]().union(*(f.absorbed for f in forms))
    return Form(first.grid, first.dims, terms, lo, hi, scale, absorbed)._within_limits()


def _merged(left: Mapping[Any, IntArray], right: Mapping[Any, IntArray]) -> dict[Any, IntArray]:
    """Arrays of both, added where both have one."""
    return {**left, **{key: left[key] + weights if key in left else weights for key, weights in right.items()}}


def _is_pointwise(strides: Place, linear: Linear) -> bool:
    """Whether each position takes the element at the same place, and no other."""
    here = all(s == 1 for s in strides) and not any(any(place) for place in linear.taps)
    return here and len(linear.taps) == 1 and not linear.is_padded


def _largest(arrays: Iterable[IntArray]) -> int:
    """The largest magnitude of any element."""
    return max((int(np.abs(w).max(initial=0)) for w in arrays), default=0)


def _common_scale(forms: Sequence[Form]) -> int:
    """The finest scale of all where that keeps weights small, else the coarsest."""
    finest = max(f.scale for f in forms)
    is_small = max(f._bits() + finest - f.scale for f in forms) <= _ALIGNED_BITS
    return finest if is_small else min(f.scale for f in forms)


def _affordable(kernel: Mapping[Place, IntArray], linear: Linear) -> bool:
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


def _floor(value: Any, scale: int) -> Any:
    """`value * 2**-scale`, rounded down."""
    return value >> scale if scale >= 0 else value << -scale
