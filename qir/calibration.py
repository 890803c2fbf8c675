"""What calibration remembers of a value: a histogram that merges exactly, whatever the order of the data.

Bin edges are integer multiples of a power of two, so that a bin of a coarser histogram is a union of whole bins of a
finer one. The bin width is a function of the observed minimum and maximum alone. Hence the histogram is a function of
the multiset of observed values: shards of the data may be observed apart, in any order, and give the same bits once
merged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qir.errors import CalibrationError

MAXIMUM_BINS = 2048
_SMALLEST_EXPONENT = -149  # of the smallest float32 above zero
_SIGNIFICAND_BITS = 24
_LARGEST = float(np.finfo(np.float32).max)
_CHUNK = 1 << 15  # values indexed at a time: the temporaries stay in the cache
_HEADER = 4  # entries before the counts in Histogram.to_array


@dataclass(frozen=True, eq=False)
class Histogram:
    """A histogram of float32 values with at least one observation.

    Bin `i` counts the values in `[(first + i) * 2**exponent, (first + i + 1) * 2**exponent)`. The exponent is the
    smallest with which `[minimum, maximum]` fits in 2048 bins, but the bins are never narrower than the spacing of
    float32 at the largest observed magnitude; the first and the last bin are never empty.

    Raises CalibrationError where the fields do not describe such a histogram.
    """

    minimum: float
    maximum: float
    exponent: int
    first: int
    counts: NDArray[np.int64]

    def __post_init__(self) -> None:
        counts = np.asarray(self.counts)
        for name in ("minimum", "maximum"):
            value = getattr(self, name)
            if not abs(value) <= _LARGEST or float(np.float32(value)) != value:
                raise CalibrationError(f"histogram: {name} {value!r} is not a finite float32 value")
        if self.minimum > self.maximum:
            raise CalibrationError(f"histogram: minimum {self.minimum!r} exceeds maximum {self.maximum!r}")
        if counts.dtype != np.int64 or counts.ndim != 1:
            raise CalibrationError(
                f"histogram: counts must be int64 of rank 1, not {counts.dtype} of rank {counts.ndim}"
            )
        if (self.exponent, self.first, len(counts)) != _frame(self.minimum, self.maximum):
            raise CalibrationError(
                f"histogram: exponent {self.exponent}, first bin {self.first} and {len(counts)} bins "
                f"do not belong to the range [{self.minimum!r}, {self.maximum!r}]"
            )
        if counts.min() < 0 or counts[0] == 0 or counts[-1] == 0:
            raise CalibrationError("histogram: counts must be at least 0, and the first and the last above 0")
        if counts.flags.writeable:
            counts = counts.copy()
            counts.flags.writeable = False
        object.__setattr__(self, "minimum", self.minimum + 0.0)  # -0.0 becomes 0.0: equal histograms have equal bits
        object.__setattr__(self, "maximum", self.maximum + 0.0)
        object.__setattr__(self, "counts", counts)

    @classmethod
    def of(cls, array: ArrayLike) -> Self:
        """Returns the histogram of every element of `array` (any shape; numbers are rounded to float32).

        Raises CalibrationError for an empty array, one that is not of real numbers, and NaN or infinity.
        """
        values = _float32_values(array)
        minimum, maximum = _extremes(values)
        return cls._framed(minimum, maximum, [], values)

    def observe(self, array: ArrayLike) -> Self:
        """Returns the histogram of what this one holds and every element of `array`; raises as `of` does."""
        values = _float32_values(array)
        minimum, maximum = _extremes(values)
        return self._framed(min(self.minimum, minimum), max(self.maximum, maximum), [self], values)

    def merge(self, other: Histogram) -> Self:
        """Returns the histogram of the observations of both: commutative, associative, and exact."""
        minimum, maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        return self._framed(minimum, maximum, [self, other], None)

    @classmethod
    def _framed(
        cls, minimum: float, maximum: float, parts: list[Histogram], values: NDArray[np.float32] | None
    ) -> Self:
        exponent, first, bins = _frame(minimum, maximum)
        counts = np.zeros(bins, np.int64) if values is None else _count(values, exponent, first, bins)
        for part in parts:
            # Indices are below 2**25, so a shift of 62 already leaves only the sign, and no shift exceeds the word.
            shift = min(exponent - part.exponent, 62)
            np.add.at(counts, ((part.first + np.arange(len(part.counts))) >> shift) - first, part.counts)
        counts.flags.writeable = False
        return cls(minimum, maximum, exponent, first, counts)

    @property
    def total(self) -> int:
        """The number of values observed."""
        return int(self.counts.sum())

    def edges(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns the lower and the upper end of every bin, cut to `[minimum, maximum]`."""
        lower = np.ldexp((self.first + np.arange(len(self.counts))).astype(np.float64), self.exponent)
        upper = lower + math.ldexp(1.0, self.exponent)
        return np.maximum(lower, self.minimum), np.minimum(upper, self.maximum)

    def to_array(self) -> NDArray[np.int64]:
        """Returns one vector: the float32 bits of minimum and maximum, exponent, first, then the counts."""
        bits = np.array([self.minimum, self.maximum], np.float32).view(np.uint32)
        return np.concatenate([np.array([*bits.tolist(), self.exponent, self.first], np.int64), self.counts])

    @classmethod
    def from_array(cls, array: NDArray[Any]) -> Self:
        """Returns the histogram that `to_array` wrote; raises CalibrationError where it is none."""
        if array.dtype != np.int64 or array.ndim != 1 or len(array) <= _HEADER:
            raise CalibrationError(
                f"histogram: expected an int64 vector of over {_HEADER} entries, "
                f"not {array.dtype} of shape {array.shape}"
            )
        bits = array[:2]
        if bits.min() < 0 or bits.max() >= 1 << 32:
            raise CalibrationError("histogram: minimum and maximum are not float32 bits")
        minimum, maximum = bits.astype(np.uint32).view(np.float32).tolist()
        return cls(minimum, maximum, int(array[2]), int(array[3]), array[_HEADER:])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        # The minimum and the maximum determine the exponent and the first bin.
        return (self.minimum, self.maximum) == (other.minimum, other.maximum) and bool(
            np.array_equal(self.counts, other.counts)
        )

    def __hash__(self) -> int:
        return hash((self.minimum, self.maximum, self.counts.tobytes()))


def _frame(minimum: float, maximum: float) -> tuple[int, int, int]:
    """Returns exponent, first bin and number of bins of a histogram with these extremes."""
    magnitude = max(abs(minimum), abs(maximum))
    # Finer than float32 itself there is nothing to tell apart; the bound also keeps every bin index within 2**24.
    finest = max(math.frexp(magnitude)[1] - _SIGNIFICAND_BITS, _SMALLEST_EXPONENT) if magnitude else _SMALLEST_EXPONENT
    # With span >= 2**(k-1) the exponent k - 12 gives over 2048 bins, so that the search upward finds the smallest.
    span = maximum - minimum
    exponent = max(finest, math.frexp(span)[1] - MAXIMUM_BINS.bit_length()) if span else finest
    while True:
        first, last = (math.floor(math.ldexp(value, -exponent)) for value in (minimum, maximum))
        if last - first < MAXIMUM_BINS:
            return exponent, first, last - first + 1
        exponent += 1


def _float32_values(array: ArrayLike) -> NDArray[np.float32]:
    given = np.asarray(array)
    if given.dtype.kind not in "fiub":
        raise CalibrationError(f"calibration data must be real numbers, not {given.dtype}")
    if given.size == 0:
        raise CalibrationError(f"calibration data of shape {given.shape} holds no values; give at least one sample")
    with np.errstate(over="ignore"):  # an overflow to infinity is reported with the other infinities
        return given.astype(np.float32, copy=False).ravel()


def _extremes(values: NDArray[np.float32]) -> tuple[float, float]:
    with np.errstate(invalid="ignore"):
        minimum, maximum = float(values.min()), float(values.max())
    if not (math.isfinite(minimum) and math.isfinite(maximum)):
        bad = ~np.isfinite(values)
        position = int(bad.argmax())
        raise CalibrationError(
            f"{int(bad.sum())} of {values.size} values are NaN or infinite in float32, "
            f"the first is {values[position]} at flat index {position}; remove such samples from the calibration data"
        )
    return minimum, maximum


def _count(values: NDArray[np.float32], exponent: int, first: int, bins: int) -> NDArray[np.int64]:
    scale = math.ldexp(1.0, -exponent)  # a power of two: the product in float64 is exact, so floor is too
    counts = np.zeros(bins, np.int64)
    for start in range(0, values.size, _CHUNK):
        index = values[start : start + _CHUNK].astype(np.float64)
        index *= scale
        np.floor(index, out=index)
        index -= first
        counts += np.bincount(index.astype(np.intp), minlength=bins)
    return counts


class Calibration(Mapping[str, Histogram]):
    """Histograms by the name of the value observed, immutable, ordered by name.

    `observe` and `merge` return new calibrations; like the histograms they do not depend on the order of the data, so
    that shards may be observed apart and combined.
    """

    def __init__(self, histograms: Mapping[str, Histogram] | None = None) -> None:
        self._histograms = dict(sorted((histograms or {}).items()))

    def __getitem__(self, name: str) -> Histogram:
        return self._histograms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._histograms)

    def __len__(self) -> int:
        return len(self._histograms)

    def __repr__(self) -> str:
        return f"Calibration({len(self)} values)"

    def observe(self, arrays: Mapping[str, ArrayLike]) -> Calibration:
        """Returns this calibration with every named array observed.

        Raises CalibrationError, naming the value, for an empty array, one that is not of real numbers, and NaN or
        infinity.
        """
        histograms = dict(self._histograms)
        for name, array in arrays.items():
            known = histograms.get(name)
            try:
                histograms[name] = Histogram.of(array) if known is None else known.observe(array)
            except CalibrationError as error:
                raise CalibrationError(f"value %{name}: {error}") from error
        return Calibration(histograms)

    def merge(self, other: Calibration) -> Calibration:
        """Returns the union of both; a value that both observed gets the merged histogram."""
        histograms = dict(self._histograms)
        for name, histogram in other.items():
            histograms[name] = histograms[name].merge(histogram) if name in histograms else histogram
        return Calibration(histograms)

    def to_arrays(self) -> dict[str, NDArray[np.int64]]:
        """Returns one vector for every value (see `Histogram.to_array`), for a sidecar file."""
        return {name: histogram.to_array() for name, histogram in self.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Calibration:
        """Returns the calibration that `to_arrays` wrote; raises CalibrationError naming a malformed value."""
        histograms = {}
        for name, array in arrays.items():
            try:
                histograms[name] = Histogram.from_array(array)
            except CalibrationError as error:
                raise CalibrationError(f"value %{name}: {error}") from error
        return cls(histograms)
