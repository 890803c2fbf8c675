"""Scale and zero point, or binary point, for a range or an observed histogram.

A grid is the set of reals `(q - zero_point) * scale` for the integers q in [qmin, qmax]. Searches minimize the
expected squared error of rounding to the nearest grid point and clamping, over values spread evenly within each bin
of the histogram.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from qir.calibration import Histogram
from qir.errors import CalibrationError

Floats = NDArray[np.float64]

_FLOAT32 = np.finfo(np.float32)
_CLIPPING_OCTAVES = 8  # the tightest candidate keeps 2**-8 of a side of the range
_CLIPPED_BITS = 8  # binary points tried below the one that clips nothing
_ROUNDS = 4  # of refining one side at a time, at most: neither side moves any more after one or two
_ROWS = 8  # candidates evaluated at a time: the temporaries stay in the cache


def affine_from_range(lo: float, hi: float, qmin: int, qmax: int, symmetric: bool) -> tuple[np.float32, int]:
    """Returns the scale and zero point of the grid on [qmin, qmax] that spans `[lo, hi]` widened to include 0.

    Asymmetric: `scale = (hi - lo) / (qmax - qmin)`, and the zero point is `qmin - lo / scale`, rounded with ties away
    from zero, so that 0.0 lies on the grid and the range moves by at most half a step (TensorFlow Lite's nudging). It
    is qmin where `lo >= 0`. Symmetric: the zero point is 0 and the scale `max(-lo, hi) / min(-qmin, qmax)`; unsigned
    levels (qmin 0) take `hi / qmax` and refuse a negative `lo`. A range of zeros gets scale 1.0, as in TensorFlow
    Lite and ONNX Runtime; any other scale is held within the normal float32 numbers.

    Raises CalibrationError for a range that is empty or not finite, and for levels that cannot hold the scheme.
    """
    _check_scheme(lo, hi, qmin, qmax, symmetric)
    scale, zero_point = _affine_grids(np.array([lo], np.float64), np.array([hi], np.float64), qmin, qmax, symmetric)
    return scale[0], int(zero_point[0])


def power_of_two_from_range(lo: float, hi: float, bits: int, signed: bool) -> int:
    """Returns the smallest exponent with which `q * 2**exponent` reaches `lo` and `hi` for integers q of `bits` bits.

    It is held within [-126, 127], where the scale is a normal float32 number; a range of zeros gets 0 (scale 1.0).
    Raises CalibrationError for a range that is empty or not finite, and for a negative `lo` without a sign.
    """
    qmin, qmax = _bounds(bits, signed)
    _check_range(lo, hi)
    if lo < 0 and not signed:
        raise CalibrationError(f"unsigned levels cannot hold {lo!r}; use signed ones")
    if lo == hi == 0:
        return 0
    least, greatest = int(_FLOAT32.minexp), int(_FLOAT32.maxexp) - 1
    # 2**bits * 2**exponent must reach max(-lo, hi), which is at least 2**(k-1).
    exponent = max(math.frexp(max(-lo, hi))[1] - 1 - bits, least)
    while exponent < greatest:
        step = Fraction(2) ** exponent
        if qmin * step <= lo and hi <= qmax * step:
            break
        exponent += 1
    return exponent


def mean_squared_error(histogram: Histogram, scale: float | np.float32, zero_point: int, qmin: int, qmax: int) -> float:
    """Returns the expected squared error of the histogram's values on this grid, rounded to nearest and clamped."""
    return float(_Errors(histogram)(np.array([scale], np.float64), np.array([zero_point], np.int64), qmin, qmax)[0])


def search_range(
    histogram: Histogram, qmin: int, qmax: int, symmetric: bool, candidates: int = 64
) -> tuple[float, float]:
    """Returns the range around 0, within the observed one, whose grid has the least expected squared error.

    `candidates` clipping factors from 1 down to 2**-8, evenly spaced in the logarithm, are tried on both ends
    together and then on either end alone. The unclipped range is among them and wins a tie. Raises CalibrationError
    for levels that cannot hold the scheme.
    """
    _check_scheme(histogram.minimum, histogram.maximum, qmin, qmax, symmetric)
    errors = _Errors(histogram)

    def cost(lows: Floats, highs: Floats) -> Floats:
        return errors(*_affine_grids(lows, highs, qmin, qmax, symmetric), qmin, qmax)

    return clip_range(histogram.minimum, histogram.maximum, cost, symmetric, candidates)


def search_affine(
    histogram: Histogram, qmin: int, qmax: int, symmetric: bool, candidates: int = 64
) -> tuple[np.float32, int]:
    """Returns what `affine_from_range` gives for `search_range`; never worse than unclipped."""
    lo, hi = search_range(histogram, qmin, qmax, symmetric, candidates)
    return affine_from_range(lo, hi, qmin, qmax, symmetric)


def search_power_of_two(histogram: Histogram, bits: int, signed: bool) -> int:
    """Returns the exponent with the least expected squared error for values `q * 2**exponent`, q of `bits` bits.

    Tried are the exponent that clips nothing (see `power_of_two_from_range`, which wins a tie and raises the errors)
    and the eight below it.
    """
    widest = power_of_two_from_range(histogram.minimum, histogram.maximum, bits, signed)
    if histogram.minimum == histogram.maximum == 0:
        return widest
    exponents = np.arange(widest, max(widest - _CLIPPED_BITS, int(_FLOAT32.minexp)) - 1, -1)
    qmin, qmax = _bounds(bits, signed)
    scales = np.ldexp(np.ones(len(exponents)), exponents)
    return int(exponents[_Errors(histogram)(scales, np.zeros(len(exponents), np.int64), qmin, qmax).argmin()])


def clip_range(
    lo: float, hi: float, cost: Callable[[Floats, Floats], Floats], tied: bool, candidates: int
) -> tuple[float, float]:
    """Returns the float32 range of least cost among those that clip `[lo, hi]`, widened to include 0, on both ends.

    `cost` maps vectors of low and of high ends to costs. Both ends shrink by the same factor first; then, unless
    `tied`, either end alone in turn, until neither gets better. Tied ends clip at the same magnitude. Among equals
    the widest wins.
    """
    if candidates < 1:
        raise CalibrationError(f"the number of candidates must be at least 1, not {candidates}")
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    factors = 2.0 ** (-_CLIPPING_OCTAVES * np.arange(candidates) / candidates)
    low_reach, high_reach = (max(-lo, hi),) * 2 if tied else (-lo, hi)
    lows = np.maximum(lo, -low_reach * factors).astype(np.float32).astype(np.float64)
    highs = np.minimum(hi, high_reach * factors).astype(np.float32).astype(np.float64)
    i = j = int(cost(lows, highs).argmin())
    for _ in range(0 if tied or not (lo and hi) else _ROUNDS):
        before = i, j
        j = int(cost(np.full_like(highs, lows[i]), highs).argmin())
        i = int(cost(lows, np.full_like(lows, highs[j])).argmin())
        if (i, j) == before:
            break
    return float(lows[i]) + 0.0, float(highs[j]) + 0.0


def _bounds(bits: int, signed: bool) -> tuple[int, int]:
    if not 1 <= bits <= 64:
        raise CalibrationError(f"an integer has 1 to 64 bits, not {bits}")
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def _check_range(lo: float, hi: float) -> None:
    if not (math.isfinite(lo) and math.isfinite(hi) and lo <= hi):
        raise CalibrationError(f"[{lo!r}, {hi!r}] is not a finite range; give finite bounds, the lower one first")


def _check_scheme(lo: float, hi: float, qmin: int, qmax: int, symmetric: bool) -> None:
    _check_range(lo, hi)
    if symmetric and not qmin <= 0 < qmax:
        raise CalibrationError(f"symmetric quantization needs levels around 0, not [{qmin}, {qmax}]")
    if symmetric and qmin == 0 and lo < 0:
        raise CalibrationError(f"levels [{qmin}, {qmax}] with zero point 0 cannot hold {lo!r}; use signed levels")
    if not (symmetric or 0 < qmax - qmin < 1 << 53):
        raise CalibrationError(f"affine levels [{qmin}, {qmax}] must be at least two and fewer than 2**53")


def _affine_grids(
    lo: Floats, hi: Floats, qmin: int, qmax: int, symmetric: bool
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """`affine_from_range` for vectors of ranges, unchecked."""
    lo, hi = np.minimum(lo, 0.0), np.maximum(hi, 0.0)
    if symmetric:
        step = np.maximum(-lo, hi) / (min(-qmin, qmax) or qmax)
        zero_point = np.zeros(len(lo), np.int64)
    else:
        levels = qmax - qmin
        step = (hi - lo) / levels
        # From the range rather than from the rounded scale: exact for the widths in use, so ties are true ties.
        position = qmin - lo * levels / np.where(hi > lo, hi - lo, 1.0)
        nearest = np.copysign(np.floor(np.abs(position) + 0.5), position)
        zero_point = np.clip(nearest, qmin, qmax).astype(np.int64)
    scale = np.clip(step, float(_FLOAT32.tiny), float(_FLOAT32.max)).astype(np.float32)
    return np.where(hi > lo, scale, np.float32(1.0)), zero_point


class _Errors:
    """The expected squared error of one histogram on many grids; empty bins cost nothing."""

    def __init__(self, histogram: Histogram) -> None:
        held = np.flatnonzero(histogram.counts)
        lower, upper = (ends[held] for ends in histogram.edges())
        self._weight = histogram.counts[held] / histogram.total
        # Neighbouring bins share an edge: each is evaluated once.
        self._points, places = np.unique(np.concatenate([lower, upper]), return_inverse=True)
        self._lower, self._upper = places[: len(held)], places[len(held) :]

    def __call__(self, scale: NDArray[np.floating], zero_point: NDArray[np.int64], qmin: int, qmax: int) -> Floats:
        steps = scale.astype(np.float64)
        least, greatest = (float(bound) - zero_point.astype(np.float64) for bound in (qmin, qmax))
        rows = (slice(start, start + _ROWS) for start in range(0, len(steps), _ROWS))
        return np.concatenate([self._mean(steps[r, None], least[r, None], greatest[r, None]) for r in rows])

    def _mean(self, step: Floats, least: Floats, greatest: Floats) -> Floats:
        # In units of the step, a value t costs e**2 with e = t - r, where r is t rounded and clamped. An
        # antiderivative that is continuous over rounding boundaries and over both clamped ends is r / 12 + e**3 / 3.
        t = self._points / step
        r = np.clip(np.rint(t), least, greatest)
        e = t - r
        primitive = r / 12.0 + e * e * e / 3.0
        e_lower, e_upper = e[:, self._lower], e[:, self._upper]
        width = t[:, self._upper] - t[:, self._lower]
        # Within one cell e is linear: no cancellation for narrow bins, and right for bins of a single value.
        linear = (e_lower * (e_lower + e_upper) + e_upper * e_upper) / 3.0
        same_cell = r[:, self._lower] == r[:, self._upper]
        across = (primitive[:, self._upper] - primitive[:, self._lower]) / np.where(same_cell, 1.0, width)
        mean: Floats = (np.where(same_cell, linear, across) * self._weight).sum(axis=1) * (step * step)[:, 0]
        return mean
