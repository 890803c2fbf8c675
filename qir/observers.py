"""Observers: how the range of a value is chosen from the histogram that calibration collected.

Every range is deterministic, consists of float32 numbers and lies within the observed one widened to include 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import numpy as np

from qir.calibration import Histogram
from qir.errors import CalibrationError
from qir.scale_search import Floats, clip_range, search_range

_TINY_SHARE = 1e-4  # of the probability that Entropy spreads evenly, so that a divergence stays finite


class Observer(Protocol):
    """A way to choose a range; `str(observer)` is text that `observer_from_string` reads."""

    name: ClassVar[str]

    def range(self, histogram: Histogram) -> tuple[float, float]:
        """Returns the lower and the upper end of the range."""


@dataclass(frozen=True)
class _Printed:
    """Prints an observer as its name and options."""

    name: ClassVar[str]

    def __str__(self) -> str:
        options = ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
        return f"{self.name}{{{options}}}" if options else self.name


@dataclass(frozen=True)
class MinMax(_Printed):
    """The observed minimum and maximum."""

    name: ClassVar[str] = "minmax"

    def range(self, histogram: Histogram) -> tuple[float, float]:
        """Returns the observed extremes."""
        return histogram.minimum, histogram.maximum


@dataclass(frozen=True)
class Percentile(_Printed):
    """The smallest range of whole bins that leaves out at most `(100 - percent) / 2` percent of the values on either
    side.

    Raises CalibrationError for a percent outside (0, 100].
    """

    percent: float = 99.99
    name: ClassVar[str] = "percentile"

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise CalibrationError(f"percentile: percent must be over 0 and at most 100, not {self.percent}")

    def range(self, histogram: Histogram) -> tuple[float, float]:
        """Returns the outer edges of the first and the last bin that are not left out."""
        left_out = histogram.total * (100.0 - self.percent) / 200.0
        lower, upper = histogram.edges()
        first = int((np.cumsum(histogram.counts) > left_out).argmax())
        last = int((np.cumsum(histogram.counts[::-1]) > left_out).argmax())
        return float(lower[first]), float(upper[len(upper) - 1 - last])


@dataclass(frozen=True)
class MeanSquaredError(_Printed):
    """The range that includes 0 with the least expected squared error on a grid of `levels` levels.

    The levels stand as in a signed integer; `symmetric` fixes the zero point at 0. Raises CalibrationError for fewer
    than three levels.
    """

    levels: int = 256
    symmetric: bool = False
    name: ClassVar[str] = "mse"

    def __post_init__(self) -> None:
        _check_levels(self.name, self.levels)

    def range(self, histogram: Histogram) -> tuple[float, float]:
        """Returns the range that `qir.scale_search.search_range` finds."""
        qmin = -(self.levels // 2)
        return search_range(histogram, qmin, qmin + self.levels - 1, self.symmetric)


@dataclass(frozen=True)
class Entropy(_Printed):
    """The range whose clipped and quantized distribution diverges least from the observed one.

    The Kullback-Leibler calibration of TensorRT (S. Migacz, "8-bit Inference with TensorRT", GTC 2017), with the
    range free to be clipped on both sides instead of a threshold on magnitudes: the reference is the clipped
    distribution with the outliers in its end bins; the candidate merges the bins, without the outliers, into equal
    levels and spreads each level evenly over its bins in use. The bin at 0, where rectified values pile up, counts as
    much as the larger of its neighbours. A range that has no more bins than levels is not considered.

    Raises CalibrationError for fewer than three levels.
    """

    levels: int = 256
    name: ClassVar[str] = "entropy"

    def __post_init__(self) -> None:
        _check_levels(self.name, self.levels)

    def range(self, histogram: Histogram) -> tuple[float, float]:
        """Returns the range of least divergence, or the observed extremes where no range has enough bins."""
        counts = _without_spike_at_zero(histogram)

        def window(lo: float, hi: float) -> tuple[int, int]:
            low, high = (np.floor(np.ldexp(end, -histogram.exponent)) - histogram.first for end in (lo, hi))
            return max(int(low), 0), min(max(int(high) + 1, 0), len(counts))

        def cost(lows: Floats, highs: Floats) -> Floats:
            windows = [window(lo, hi) for lo, hi in zip(lows.tolist(), highs.tolist(), strict=True)]
            return np.array([_divergence(counts, histogram.first, *ends, self.levels) for ends in windows])

        lo, hi = clip_range(histogram.minimum, histogram.maximum, cost, False, 64)
        start, stop = window(lo, hi)
        lower, upper = histogram.edges()
        return float(lower[start]), float(upper[stop - 1])


def _check_levels(name: str, levels: int) -> None:
    if not 3 <= levels <= 1 << 32:
        raise CalibrationError(f"{name}: levels must be from 3 to 2**32, not {levels}")


def _without_spike_at_zero(histogram: Histogram) -> Floats:
    counts = histogram.counts.astype(np.float64)
    zero = -histogram.first
    if 0 <= zero < len(counts):
        below = counts[zero - 1] if zero else 0.0
        counts[zero] = min(counts[zero], max(below, counts[zero + 1 : zero + 2].sum()))
    return counts


def _divergence(counts: Floats, first: int, start: int, stop: int, levels: int) -> float:
    """Returns the divergence for the bins [start, stop), or infinity where they hold nothing or are too few."""
    # The grid includes 0: where the values do not, they get only their share of the levels.
    reach = max(first + stop, 0) - min(first + start, 0)
    inside = counts[start:stop]
    if reach <= levels or not inside.any():
        return np.inf
    reference = inside.copy()
    reference[0] += counts[:start].sum()
    reference[-1] += counts[stop:].sum()
    bins = len(inside)
    shared = max(levels * bins // reach, 1)
    level = np.arange(bins) * shared // bins
    used = reference > 0
    mass = np.bincount(level, inside, shared)
    spread = (mass / np.maximum(np.bincount(level, used, shared), 1.0))[level][used]
    p = reference[used] / reference.sum()
    q = (1.0 - _TINY_SHARE) * spread / spread.sum() + _TINY_SHARE / len(p)
    return float((p * np.log(p / q)).sum())


_OBSERVERS: tuple[type[MinMax | Percentile | Entropy | MeanSquaredError], ...] = (
    MinMax,
    Percentile,
    Entropy,
    MeanSquaredError,
)
_BOOLEANS = {"True": True, "False": False}


def observer_from_string(text: str) -> Observer:
    """Returns the observer that `text` names, with the options that it gives: `minmax`, `percentile{percent=99.9}`,
    `entropy{levels=128}`, `mse{levels=16,symmetric=True}`.

    Raises CalibrationError for an unknown name or option and for a malformed or unfit value.
    """
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\{(.*)\})?\s*", text)
    kinds = {kind.name: kind for kind in _OBSERVERS}
    if match is None or match[1] not in kinds:
        raise CalibrationError(
            f"unknown observer {text!r}; known are {', '.join(kinds)}, with options as in name{{key=value}}"
        )
    kind = kinds[match[1]]
    default = kind()
    defaults = {field.name: getattr(default, field.name) for field in fields(default)}
    options: dict[str, Any] = {}
    for option in filter(None, (part.strip() for part in (match[2] or "").split(","))):
        key, _, value = (part.strip() for part in option.partition("="))
        if key not in defaults or key in options:
            known = ", ".join(defaults) or "none"
            raise CalibrationError(f"observer {text!r}: option {key!r} is unknown or given twice; options are: {known}")
        try:
            options[key] = _BOOLEANS[value] if isinstance(defaults[key], bool) else type(defaults[key])(value)
        except (ValueError, KeyError) as error:
            raise CalibrationError(f"observer {text!r}: {value!r} is no value for {key}") from error
    return kind(**options)
