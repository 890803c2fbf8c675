"""Kernels that change the scale: requantize in every form, quantize and dequantize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.backends.kernels import rescale_loops as loops
from qir.backends.kernels.kernel import (
    WIDEST,
    Call,
    Facts,
    Kernel,
    Tensor,
    clamp_bounds,
    fits,
    integers,
    wrapping,
    zero_along_last,
)
from qir.fixed_point import Overflow, RequantizeForm, Rounding, reduced_multiplier
from qir.ir import Op
from qir.ops.dequantize_blocks import DequantizeBlocks, Packing
from qir.ops.fixed_rescale import Dequantize, Quantize, QuantizeRule, Requantize
from qir.types import TensorType, scale_array

#: When the remainder rounds up, for each rounding: above one half; at one half always, where the floor is not negative,
#: where it is, where it is odd; and for any remainder of a negative floor.
TIES: Final = {
    Rounding.FLOOR: (0, 0, 0, 0, 0, 0),
    Rounding.TOWARD_ZERO: (0, 0, 0, 0, 0, 1),
    Rounding.HALF_UP: (1, 1, 0, 0, 0, 0),
    Rounding.HALF_TOWARD_ZERO: (1, 0, 0, 1, 0, 0),
    Rounding.HALF_AWAY: (1, 0, 1, 0, 0, 0),
    Rounding.HALF_DOWN: (1, 0, 0, 0, 0, 0),
    Rounding.HALF_EVEN: (1, 0, 0, 0, 1, 0),
}

#: Parameters are repeated to at least this many, so that the inner loops are long.
_PERIOD: Final = 256


@dataclass(frozen=True)
class Rescale:
    """A requantize on flat arrays of equal size whose length is a multiple of the last axis."""

    name: str
    run: Callable[[Tensor, Tensor], None]


def requantize(op: Op, facts: Facts) -> Kernel | None:
    """The kernel of a requantize that stands alone."""
    assert isinstance(op, Requantize)
    rescale = rescale_of(op, facts)
    if rescale is None:
        return None
    run = rescale.run

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        x, out = inputs[0].reshape(-1), output.reshape(-1)
        return lambda: run(x, out)

    return Kernel(rescale.name, bind)


def rescale_of(op: Requantize, facts: Facts) -> Rescale | None:
    """The loop that a requantize runs, or None where its numbers leave the loops' registers."""
    limits = clamp_bounds(op.storage, op.overflow, facts.is_idle(op))
    if limits is None and op.form is RequantizeForm.SHIFT:
        limits = -WIDEST, WIDEST  # the loop narrows in every mode
    x_zero = zero_along_last(op.operands[0].type)
    zero = zero_along_last(op.result.type)
    if limits is None or x_zero is None or zero is None or op.input_shift < 0 or op.storage.bits > 62:
        return None
    parts = _Parts(op, x_zero, zero, limits)
    if op.form in (RequantizeForm.DOUBLE_ROUND, RequantizeForm.NEON):
        return _twice(op, parts)
    span = facts.span(op.operands[0])
    reach = max(abs(int(span.lo)), abs(int(span.hi))) << op.input_shift
    match op.form:
        case RequantizeForm.SINGLE_ROUND:
            return _once(op, parts, op.multiplier.data, 31, reach)
        case RequantizeForm.REDUCED_16:
            return _once(op, parts, np.asarray(reduced_multiplier(op.multiplier.data)), 15, reach)
        case RequantizeForm.SHIFT:
            return _shift(op, parts, reach)
        case _:
            return _real(op, parts, reach)


class _Parts:
    """The parameters of a requantize, repeated along the data."""

    def __init__(self, op: Requantize, x_zero: Tensor, zero: Tensor, limits: tuple[int, int]) -> None:
        arrays = (op.multiplier.data, op.shift.data, x_zero, zero)
        self.period = period_of(op.result.type, arrays)
        self.x_zero = self.along(x_zero, np.int64)
        self.zero = self.along(zero, np.int64)
        self.low, self.high = (self.along(np.asarray(limit - zero), np.int64) for limit in limits)

    def along(self, values: npt.ArrayLike, dtype: npt.DTypeLike) -> Tensor:
        """One value for each place of the period."""
        array = np.atleast_1d(np.asarray(values))
        return np.resize(array, self.period).astype(dtype)


def period_of(kind: TensorType, arrays: Sequence[Tensor]) -> int:
    """The length after which parameters repeat along flat data of this type."""
    channels = int(kind.shape[-1]) if any(a.ndim for a in arrays) else 1
    return max(channels, 1) * max(1, _PERIOD // max(channels, 1))


def _twice(op: Requantize, parts: _Parts) -> Rescale | None:
    multiplier, shift = op.multiplier.data, op.shift.data
    int32 = np.iinfo(np.int32)
    low, high = np.maximum(parts.low, int32.min), np.minimum(parts.high, int32.max)
    if op.storage.bits > 32:  # the loop adds the zero point in 32 bits
        return None
    if not fits(multiplier, np.int32) or bool((shift < -31).any()) or bool((low > high).any()):
        return None
    if not fits(parts.zero, np.int32) or not fits(parts.x_zero, np.int32):
        return None
    left = np.maximum(shift, 0) + op.input_shift
    vanishes = left > 31  # every bit is shifted out of the 32, which is what a multiplier of 0 gives
    arguments: tuple[Any, ...] = (
        parts.x_zero.astype(np.int32),
        parts.along(np.where(vanishes, 0, left), np.int32),
        parts.along(np.where(vanishes, 0, multiplier), np.int32),
        parts.along(np.maximum(-shift, 0), np.int32),
        int(op.form is RequantizeForm.DOUBLE_ROUND),
        low.astype(np.int32),
        high.astype(np.int32),
        parts.zero.astype(np.int32),
    )
    return _rescale(op, loops.rescale_twice, arguments)


def _once(op: Requantize, parts: _Parts, multiplier: Tensor, bits: int, reach: int) -> Rescale | None:
    right = bits - op.shift.data
    if reach >= 1 << (63 - bits) or reach * int(multiplier.max(initial=0)) >= WIDEST:
        return None
    if bool((right < 0).any()) or bool((right > 62).any()):
        return None
    return _rescale(
        op,
        loops.rescale_once,
        (
            parts.x_zero,
            parts.along(op.input_shift, np.int64),
            parts.along(multiplier, np.int64),
            parts.along(right, np.int64),
            op.form is RequantizeForm.REDUCED_16,
            parts.low,
            parts.high,
            parts.zero,
        ),
    )


def _shift(op: Requantize, parts: _Parts, reach: int) -> Rescale | None:
    left = op.input_shift + np.maximum(op.shift.data, 0)
    right = np.maximum(-op.shift.data, 0)
    if int(left.max(initial=0)) > 62 or reach << int(left.max(initial=0)) >= WIDEST or int(right.max(initial=0)) > 62:
        return None
    assert op.rounding is not None
    ties = np.array(TIES[op.rounding], np.int64)
    arguments = (parts.x_zero, parts.along(left, np.int64), parts.along(right, np.int64), ties, _narrowing(op))
    return _rescale(op, loops.rescale_shift, (*arguments, parts.low, parts.high, parts.zero))


def _narrowing(op: Requantize) -> Tensor:
    """What `rescale_shift` does to a result after it was clamped."""
    mask, sign = wrapping(op.storage) if op.overflow is Overflow.WRAP else (-1, 0)
    zeroes = op.overflow is Overflow.SATURATE_ZERO
    bounds = (op.storage.lo, op.storage.hi) if zeroes else (-2 * WIDEST, 2 * WIDEST - 1)
    return np.array([mask, sign, *bounds], np.int64)


def _real(op: Requantize, parts: _Parts, reach: int) -> Rescale | None:
    single = op.form is RequantizeForm.FLOAT32
    with np.errstate(over="ignore"):
        multiplier = parts.along(op.multiplier.data, np.float32 if single else np.float64)
    if reach >= WIDEST or not np.isfinite(multiplier).all():
        return None
    if op.overflow is Overflow.WRAP and reach * float(multiplier.max(initial=0)) >= WIDEST // 2:
        return None  # such reals are clipped before the zero point is added, and then wrap
    left = parts.along(op.input_shift, np.int64)
    arguments = (parts.x_zero, left, multiplier, parts.low, parts.high, parts.zero)
    return _rescale(op, loops.rescale_float if single else loops.rescale_double, arguments)


def _rescale(op: Requantize, loop: Callable[..., None], arguments: tuple[Any, ...]) -> Rescale:
    return Rescale(f"requantize_{op.form}", lambda x, out: loop(x, *arguments, out))


def quantize(op: Op, facts: Facts) -> Kernel | None:
    """Reals to integers, with scales per tensor or along the last axis."""
    assert isinstance(op, Quantize)
    storage = integers(op.result.type)
    zero = zero_along_last(op.result.type)
    if zero is None or storage.bits > 32:
        return None
    scale = scale_array(op.result.type.element).astype(np.float32)  # type: ignore[arg-type]
    period = period_of(op.result.type, (scale, zero))
    fused = op.rule is QuantizeRule.RECIPROCAL_FUSED
    multiplies = fused or op.rule is QuantizeRule.RECIPROCAL
    if multiplies:
        with np.errstate(over="ignore"):
            scale = np.float32(1) / scale
    inside, after = (zero, np.zeros_like(zero)) if fused else (np.zeros_like(zero), zero)
    arguments = (
        np.resize(np.atleast_1d(scale), period),
        multiplies,
        np.resize(np.atleast_1d(inside.astype(np.float64)), period),
        np.array(TIES[op.rounding], np.int64),
        *(np.resize(np.atleast_1d(limit - after), period) for limit in (storage.lo, storage.hi)),
        np.resize(np.atleast_1d(after), period),
    )

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        x, out = inputs[0].reshape(-1), output.reshape(-1)
        return lambda: loops.quantize_reals(x, *arguments, out)

    return Kernel("quantize", bind)


def dequantize_blocks(op: Op, facts: Facts) -> Kernel | None:
    """4-bit weights to reals."""
    assert isinstance(op, DequantizeBlocks)
    outer, length, inner = (
        int(np.prod(part, dtype=np.int64))
        for part in (op.shape[: op.axis], op.shape[op.axis : op.axis + 1], op.shape[op.axis + 1 :])
    )
    block, high_first = op.block, int(op.packing is Packing.HIGH_FIRST)

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        scale, out = inputs[1].reshape(outer, -1, inner), output.reshape(outer, length, inner)
        return lambda: loops.dequantize_nibbles(inputs[0], scale, block, high_first, out)

    return Kernel("dequantize_blocks", bind) if op.result.type.sample_size else None


def dequantize(op: Op, facts: Facts) -> Kernel | None:
    """Integers to reals, with scales per tensor or along the last axis."""
    assert isinstance(op, Dequantize)
    kind = op.operands[0].type
    zero = zero_along_last(kind)
    if zero is None or integers(kind).bits > 32:
        return None
    scale = scale_array(kind.element).astype(np.float32)  # type: ignore[arg-type]
    period = period_of(kind, (scale, zero))
    arguments = (np.resize(np.atleast_1d(scale), period), np.resize(np.atleast_1d(zero), period))

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        x, out = inputs[0].reshape(-1), output.reshape(-1)
        return lambda: loops.dequantize_integers(x, *arguments, out)

    return Kernel("dequantize", bind)
