"""The quantized types of constant weights and of biases: what the target asks for, over a range of the weights.

select-q-formats takes the whole range; search-weight-ranges clips it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.errors import PassError
from qir.fixed_point import floor_log2, round_half_away
from qir.levels import level_scales
from qir.ops.float_nn import Conv, MatMul
from qir.passes.accumulation import least_weight_scale, reach, sum_scale
from qir.passes.widths.storage import bias_storage, scale_axis
from qir.target import Scales, Scheme, Target
from qir.types import (
    AffineType,
    FixedPointType,
    IntegerType,
    QuantizedType,
    TensorType,
    affine,
    fixed_point,
    scale_array,
)

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class WeightForm:
    """What the types of one layer's weights have in common, whatever range they span.

    `axis` is that of the channels which have a scale each, or None. No scale may be less than `least`, one or one a
    channel: bias or sums would come near the ends of the accumulator.
    """

    data: Array
    storage: IntegerType
    axis: int | None
    least: npt.NDArray[Any]
    target: Target

    @classmethod
    def of(
        cls,
        op: Conv | MatMul,
        data: Array,
        bias: Array | None,
        input_scale: float,
        storage: IntegerType,
        target: Target,
    ) -> WeightForm:
        """Of the weights of a layer. Of weights alone it is one scale a channel: legalize makes those of blocks."""
        added = np.zeros(()) if bias is None else np.abs(bias.data.astype(np.float64))
        sums = added
        if target.accumulator.rounding is None:  # else sums keep fewer fraction bits instead
            sums = np.maximum(sums, reach(op.sum_range))
        least = least_weight_scale(target, input_scale, sums)
        least = np.maximum(least, least_weight_scale(target, input_scale, added, bias_storage(target).hi))
        return cls(data, storage, scale_axis(target, op), least, target)

    @property
    def others(self) -> tuple[int, ...]:
        """The axes along which weights share a scale."""
        return tuple(i for i in range(self.data.data.ndim) if i != self.axis)

    def ends(self) -> tuple[Vector, Vector]:
        """The least and the greatest weight, and 0 between them: for the tensor, or for each channel."""
        low, high = (end(axis=self.others, initial=0.0) for end in (self.data.data.min, self.data.data.max))
        return np.asarray(low, np.float64), np.asarray(high, np.float64)

    @property
    def is_fitted(self) -> bool:
        """Whether the scale is that of least error: of but few symmetric integers, levels or -2 to 1.

        The largest magnitude would leave most weights none but the integers next to 0.
        """
        few = self.storage.levels is not None or self.storage.is_shift
        return few and self.target.weights.scheme is Scheme.SYMMETRIC

    def whole(self) -> QuantizedType:
        """The type over all weights, as select-q-formats gives it."""
        if not self.is_fitted:
            return self.type_of(*self.ends())
        powers = self.target.weights.scales is Scales.POWER_OF_TWO
        return self._symmetric(level_scales(self.data.data, self.storage, self.axis, powers=powers))

    def type_of(self, low: Vector, high: Vector) -> QuantizedType:
        """The type over these ranges, as `ends` gives them."""
        if self.target.weights.scheme is Scheme.AFFINE:
            scales, zeros = affine_weights(low, high, self.storage, self.least)
            return affine(self.storage, scales, zeros, self.axis, self.data.name)
        largest = self.storage.hi if self.storage.levels is None else max(-self.storage.lo, self.storage.hi)
        return self._symmetric(np.maximum(-low, high) / largest)  # levels need not end with the largest

    def _symmetric(self, steps: npt.NDArray[Any]) -> QuantizedType:
        scales = raised(steps, self.least)
        if self.target.weights.scales is not Scales.POWER_OF_TWO:
            return affine(self.storage, scales, 0, self.axis, self.data.name)
        exponents = floor_log2(scales)
        return fixed_point(self.storage, exponents + (np.ldexp(np.float32(1), exponents) < scales), self.axis)


def affine_weights(
    low: Vector, high: Vector, storage: IntegerType, least: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Float32 scales and zero points of ranges that hold 0; `raised`."""
    scales = raised((high - low) / (storage.hi - storage.lo), least)
    zeros = storage.lo - low / scales  # within the storage, as no scale is below that of its range
    return scales, np.clip(round_half_away(zeros), storage.lo, storage.hi)


def raised(steps: npt.ArrayLike, least: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The steps that ranges of weights ask for, 0 for zeros, as scales that are normal float32 numbers.

    Raised to `least`, one or one a channel, where bias or sums would come near the ends of the accumulator; a range
    of zeros takes the least scale of the others, for the precision of its bias.
    """
    asked = np.asarray(steps, np.float64)
    scales = np.maximum(asked, least if asked.ndim else least.max(initial=0.0))
    positive = scales[asked > 0]
    filler = positive.min() if positive.size else 1.0
    filled = np.where(asked > 0, scales, np.maximum(scales, filler))
    return np.asarray(np.maximum(filled, float(np.finfo(np.float32).tiny)), np.float32)


def check_percent(percent: float | None, option: str, chosen: str) -> None:
    """Raises PassError for a percentage outside (0, 100], and where `option` is anything but `percentile`."""
    if percent is None:
        return
    if chosen != "percentile":
        raise PassError(f"percent={percent} is for {option}=percentile, not for {option}={chosen}")
    if not 0 < percent <= 100:
        raise PassError(f"percent={percent} must be over 0 and at most 100")


def bias_type(
    op: Conv | MatMul,
    input_scale: float,
    weight_scales: npt.NDArray[Any],
    storage: IntegerType,
    target: Target,
    name: str,
) -> QuantizedType:
    """The format of the bias of a layer: in units of its sum, one or one a channel."""
    steps = sum_scale(target, input_scale, weight_scales, op.sum_range).step
    axis = 0 if steps.ndim else None
    if target.weights.scales is Scales.POWER_OF_TWO:
        return fixed_point(storage, floor_log2(steps), axis)
    return affine(storage, steps.astype(np.float32), 0, axis, name)


def scale_of_type(kind: TensorType) -> float:
    """The scale of a value that has one for the whole tensor."""
    assert isinstance(kind.element, AffineType | FixedPointType)
    return float(scale_array(kind.element))
