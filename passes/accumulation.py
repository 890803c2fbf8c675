"""How sums of products fit the target's accumulator: what select-q-formats leaves room for and legalize writes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.interval import Interval
from qir.target import Target, Width

#: Sums of calibrated size fill at most half of the accumulator, so that a partial sum may be twice as large.
_HEADROOM_BITS: Final = 1
_WIDEST: Final = 64


def largest_sum(target: Target) -> float:
    """The magnitude, in integers of the accumulator, that a calibrated sum may have."""
    bits = target.accumulator.bits
    return 2.0 ** ((_WIDEST if isinstance(bits, Width) else bits) - 1 - _HEADROOM_BITS)


def reach(interval: Interval | None) -> float:
    """The largest magnitude of a calibrated range; 0 where there is none."""
    return 0.0 if interval is None else max(abs(float(interval.lo)), abs(float(interval.hi)))


@dataclass(frozen=True)
class SumScale:
    """The scale of an accumulator, one or one a channel: `step` float64 reals a unit, products entering at `shift`."""

    step: npt.NDArray[Any]
    shift: int


def sum_scale(
    target: Target, input_scale: float, weight_scales: npt.NDArray[Any], interval: Interval | None
) -> SumScale:
    """Product of the scales, less the shift of products; where sums may be rounded, as much coarser as they must be.

    `interval` is the calibrated range of the result.
    """
    step = np.float64(input_scale) * np.asarray(weight_scales, np.float64) * 2.0**-target.product.shift
    if target.accumulator.rounding is None or not step.size:
        return SumScale(step, target.product.shift)
    dropped = _lacking_bits(target, float(step.min()), interval)
    return SumScale(step * 2.0**dropped, target.product.shift - dropped)


def excess_bits(target: Target, product_scale: float, interval: Interval | None) -> int:
    """By how many powers of two a product's scale is too small for the accumulator to hold the sums of a result.

    `interval` is the calibrated range of the result. None are where sums may be rounded: `sum_scale` drops bits there.
    """
    if target.accumulator.rounding is not None:
        return 0
    return _lacking_bits(target, product_scale * 2.0**-target.product.shift, interval)


def _lacking_bits(target: Target, step: float, interval: Interval | None) -> int:
    """By how many powers of two a step of the accumulator is too small for it to hold the sums of a result."""
    needed = reach(interval) / (step * largest_sum(target))
    return math.ceil(math.log2(needed)) if needed > 1 else 0


def least_weight_scale(
    target: Target, input_scale: float, magnitude: npt.ArrayLike, most: float | None = None
) -> npt.NDArray[Any]:
    """The least weight scale at which sums of this magnitude have room in the accumulator, or are `most` at most."""
    unit = input_scale * 2.0**-target.product.shift
    return np.asarray(magnitude, np.float64) / (unit * (largest_sum(target) if most is None else most))
