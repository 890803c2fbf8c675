"""Accumulating integer ops: what a chain of products sums to, what it may hold on the way, and how it overflows."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.fixed_point import Overflow, narrow
from qir.interval import Bounds, Interval, exact
from qir.ir import FIXED_ONLY, Op, OpBounds
from qir.types import ElementType, IntegerType, TensorType, storage_of, zero_array

Tensor = npt.NDArray[Any]


class Order(enum.StrEnum):
    """The order in which an accumulator takes its products: spatial taps outside, input channels inside."""

    KHWC = "khwc"  # kernel row, kernel column, input channel; then the bias
    BIAS_KHWC = "bias_khwc"  # the bias is the initial value


@dataclass(frozen=True, eq=False, kw_only=True)
class Accumulating(Op):
    """Base of ops that sum into an accumulator.

    `overflow` says what each step does when the sum leaves `accumulator`; `none` claims a proof that it never does.
    `partial` is that proof: an interval that holds every partial sum in `order`, the initial 0 and the result included.
    """

    stages = FIXED_ONLY
    accumulator: IntegerType
    overflow: Overflow
    order: Order
    partial: Interval | None = None

    def infer_elements(self) -> tuple[ElementType, ...]:
        """The result is the accumulator itself."""
        return (self.accumulator,)

    def check(self) -> Iterator[str]:
        """The accumulator is the result, and a claimed proof is there and holds."""
        if self.result.type.element != self.accumulator:
            yield f"the result must be the accumulator, {self.accumulator}"
        if self.overflow not in (Overflow.WRAP, Overflow.SATURATE, Overflow.NONE):
            yield f"an accumulator wraps, saturates or is proved, it does not {self.overflow}"
        yield from integer_operands(self)
        if self.overflow is Overflow.WRAP and self.accumulator.is_narrowed:
            yield f"sums cannot wrap to the bounds of {self.accumulator}, which are not those of its container"

    def sum_bits(self, term_bits: int, count: int) -> int:
        """Bits that hold `count` exact sums of a term of `term_bits`, the accumulator and the bias."""
        bias = self.optional_operand(2)
        widest = max(term_bits, self.accumulator.bits + 1, bits_of(bias.type) if bias is not None else 0)
        return widest + (count + 1).bit_length()

    def accumulate(self, chain: Iterator[Tensor], start: Tensor, bias: Tensor | None) -> Tensor:
        """Sum `chain`, whose items are products in order, step by step where the steps matter."""
        total = start
        if bias is not None and self.order is Order.BIAS_KHWC:
            total = total + bias
        stepwise = self.overflow is Overflow.SATURATE
        for product in chain:
            total = total + product
            if stepwise:
                total = narrow(total, self.accumulator.lo, self.accumulator.hi, self.overflow)
        if bias is not None and self.order is Order.KHWC:
            total = total + bias
        return self.close(total)

    def close(self, total: Tensor) -> Tensor:
        """The accumulator after its last step: wrapping once equals wrapping at every step."""
        return np.asarray(narrow(total, self.accumulator.lo, self.accumulator.hi, self.overflow))

    def contract(self, tap: Tensor, kernel: Tensor, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """Products of one tap [..., groups, 1, C] with its weights [groups, O, C], as sums of `shape`.

        One item an input channel where every step counts, else their sum at once.
        """
        channels = kernel.shape[-1]
        if self.overflow is Overflow.SATURATE or channels == 1:
            for c in range(channels):
                yield (tap[..., c] * kernel[..., c]).reshape(shape)
        else:
            yield (tap @ kernel.transpose(0, 2, 1)).reshape(shape)

    def chain_bounds(self, lo: Tensor, hi: Tensor, valid: Tensor, bias: Bounds | None) -> OpBounds:
        """Bounds of a chain of terms.

        `lo` and `hi` [outputs, taps, inputs] bound each term; `valid` [patterns, taps] says which taps are on real
        elements for each kind of position (the others add 0); `bias` [outputs] is exact.
        """
        if not lo.size:  # nothing is summed but the bias
            lo = hi = np.zeros((lo.shape[0], 1, 1), np.int64)
            valid = np.ones((1, 1), bool)
        ends, extremes = [], []
        for terms, least, low in ((lo, np.minimum, True), (hi, np.maximum, False)):
            base = np.broadcast_to((bias.lo if low else bias.hi) if bias else np.zeros((), terms.dtype), lo.shape[:1])
            first = base if self.order is Order.BIAS_KHWC else np.zeros_like(base)
            sums = np.cumsum(terms, axis=2)  # within a tap
            inside, whole = least.reduce(sums, axis=2), sums[:, :, -1]
            finals, reached = [], [first * 0, first]
            for pattern in valid:
                steps = np.where(pattern, whole, 0)
                after = np.cumsum(steps, axis=1) + first[:, None]
                before = after - steps
                reached.append(least.reduce(np.where(pattern, before + inside, before), axis=1))
                finals.append(after[:, -1] + base if self.order is Order.KHWC else after[:, -1])
            ends.append(least.reduce(finals))
            extremes.append(least.reduce([*reached, *finals]))
        partial = Interval(int(extremes[0].min()), int(extremes[1].max()))
        return self.overflowed(Bounds.of(*ends), partial)

    def overflowed(self, result: Bounds, partial: Interval) -> OpBounds:
        """The bounds of the accumulator, given those of the exact sums: its whole range where a step may overflow."""
        if not self.accumulator.lo <= partial.lo <= partial.hi <= self.accumulator.hi:
            result = Bounds.of(self.accumulator.lo, self.accumulator.hi)
        return OpBounds((result,), partial, partial)


def centre(data: Tensor, kind: TensorType) -> Tensor:
    """`q - zero_point` for data of this type; per-axis zero points run along their axis."""
    zeros = zero_array(kind.element)
    axis = getattr(kind.element, "axis", None)
    if axis is None:
        return data - int(zeros)
    return data - zeros.reshape([-1 if i == axis else 1 for i in range(data.ndim)])


def centered(kind: TensorType, bounds: Bounds) -> Bounds:
    """Bounds of `q - zero_point`, with the centred data where the tensor is constant."""
    zeros = zero_array(kind.element)
    if zeros.ndim and getattr(kind.element, "axis", None) != kind.rank - 1:
        shifted = Bounds.of(bounds.lo - int(zeros.max()), bounds.hi - int(zeros.min()))
    else:
        shifted = bounds.shifted(-zeros)
    data = bounds.data
    if data is not None:
        storage = storage_of(kind.element)
        data = centre(exact(data) if storage is None or storage.bits > 60 else data.astype(np.int64), kind)
    return Bounds(shifted.lo, shifted.hi, data)


def term_bounds(x: Bounds, w: Bounds) -> tuple[Tensor, Tensor]:
    """Bounds of the products `x * w` of centred operands: from the very weights where they are constant.

    Exact: int64 arrays where every sum of the terms fits, Python ints elsewhere.
    """
    if w.data is None:
        corners = [a * b for a in (x.lo, x.hi) for b in (w.lo, w.hi)]
        return np.minimum.reduce(corners), np.maximum.reduce(corners)
    span = x.hull
    largest = max(abs(int(span.lo)), abs(int(span.hi)), 1) * max(int(np.abs(w.data).max(initial=0)), 1)
    weights = w.data if largest.bit_length() + int(w.data.size).bit_length() < 60 else exact(w.data)
    low, high = (e.astype(weights.dtype) for e in (x.lo, x.hi))
    positive, negative = np.maximum(weights, 0), np.minimum(weights, 0)
    return positive * low + negative * high, positive * high + negative * low


def integer_operands(op: Op) -> Iterator[str]:
    """A sentence for each operand that holds reals."""
    for operand in op.operands:
        if storage_of(operand.type.element) is None:
            yield f"%{operand.name} holds reals, not integers; quantize it first"


def bits_of(kind: TensorType) -> int:
    """Bits of `q - zero_point`, sign included."""
    storage = storage_of(kind.element)
    return (storage.bits if storage else 32) + 2
