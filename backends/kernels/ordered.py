"""Sums whose every step counts, tied to the compiled loops that take products one by one in the order of the op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from qir.backends.kernels import ordered_loops as loops
from qir.backends.kernels.kernel import WIDEST, Call, Facts, Memory, Tensor, integers, wrapping, zero_along_last
from qir.backends.kernels.rescale import TIES
from qir.backends.kernels.sums import QUAD, Bound, Frame, Sums, broadcast_places, entering_weights, type_names
from qir.fixed_point import Overflow, Rounding, kept_bounds
from qir.ops.accumulate import Accumulating
from qir.ops.fixed_linear import Conv2d, FixedMatMul, ReduceSum
from qir.types import IntegerType

#: Integers below this magnitude are exact in float64.
_EXACT: Final = 1 << 53

_Bind = Callable[[Sequence[Tensor], Sequence[Tensor], np.dtype[Any]], tuple["_Terms", Call | None]]


@dataclass(frozen=True)
class _Terms:
    """What the loops read: the flat operand, where its images start and which weights they take, and the geometry."""

    x: Tensor
    starts: Tensor
    which: Tensor
    geometry: tuple[int, int, int, int, int]
    places: Tensor
    zeros: Tensor
    weights: Tensor
    groups: int


@dataclass(frozen=True)
class _Source:
    """An op as terms: `bind(inputs, scratch, dtype)` with weights and zeros of that dtype, `pixels(inputs)`."""

    name: str
    pixels: Callable[[Sequence[Tensor]], int]
    per_pixel: int
    width: int
    bind: _Bind
    scratch: tuple[Memory, ...] = ()


def ordered_sums(op: Accumulating, facts: Facts) -> Sums | None:
    """The loop that accumulates an op step by step, or None where its numbers leave the loops' registers."""
    bias = op.optional_operand(2)
    if any(integers(v.type).bits > 32 or not v.type.sample_size for v in op.operands[:2]) or op.accumulator.bits > 62:
        return None
    if (bias is not None and bias not in facts.constants) or op.intermediate_bits() > 62:
        return None
    match op:
        case Conv2d():
            source = _convolution(op, facts)
        case FixedMatMul():
            source = _product(op, facts)
        case ReduceSum():
            source = _sum(op)
        case _:
            source = None
    return None if source is None else _sums(op, facts, source)


def _sums(op: Accumulating, facts: Facts, source: _Source) -> Sums:
    clamped = _clamp_limits(op, facts)
    number = np.dtype(np.int64 if clamped is None else np.float64)
    dtype = np.dtype(np.int32 if op.accumulator.bits < 32 or op.accumulator.base_name == "s32" else np.int64)
    bias_value = op.optional_operand(2)
    given = facts.constants[bias_value].data if bias_value is not None else np.zeros(source.width, np.int64)
    bias, first = given.astype(number), op.order.bias_first
    loop = loops.accumulate_stepwise if clamped is None else loops.accumulate_clamped
    rule = _general_rule(op, facts) if clamped is None else clamped
    row = Memory((source.width,), number)

    def bind(inputs: Sequence[Tensor], scratch: Sequence[Tensor]) -> Bound:
        terms, prepare = source.bind(inputs, scratch, number)
        fixed = (terms.x, terms.starts, terms.which, *terms.geometry, terms.places, terms.zeros, terms.weights)
        acc, step = scratch[len(source.scratch)], source.per_pixel
        rest = (bias, first, terms.groups, *rule, acc)

        def fill(out: Tensor, start: int, stop: int) -> None:
            loop(*fixed, *rest, out, start * step, stop * step)

        return Bound(source.pixels(inputs), fill, prepare)

    name = f"{source.name}_{'ordered' if clamped is not None else 'stepwise'}_{type_names(op, dtype)}"
    return Sums(name, dtype, source.width, bind, (*source.scratch, row), bias.nbytes, is_narrowed=True)


def _clamp_limits(op: Accumulating, facts: Facts) -> tuple[bool, Tensor] | None:
    """Whether products are clamped, and the limits of products and sums; None where a step is no clamp."""
    if op.shift < 0 or op.overflow not in (Overflow.SATURATE, Overflow.SATURATE_SYMMETRIC):
        return None
    clamps = op.product is not None and not facts.is_product_idle(op)
    if clamps and op.product_overflow not in (Overflow.SATURATE, Overflow.SATURATE_SYMMETRIC):
        return None
    products = [0, 0]
    if clamps:
        assert op.product is not None
        assert op.product_overflow is not None
        products = list(kept_bounds(op.product.lo, op.product.hi, op.product_overflow))
    limits = [*products, *kept_bounds(op.accumulator.lo, op.accumulator.hi, op.overflow)]
    spans = [facts.span(v) for v in op.operands[:2]]
    product = 1 << op.shift
    for span in spans:
        product *= max(abs(int(span.lo)), abs(int(span.hi)), 1)
    if product + max(map(abs, limits)) >= _EXACT:
        return None
    return clamps, np.array(limits, np.float64)


def _general_rule(op: Accumulating, facts: Facts) -> tuple[Tensor, Tensor, Tensor]:
    """Shifts, ties and narrowings as `accumulate_stepwise` takes them."""
    product_drop = max(-op.shift, 0) if op.product is not None else 0
    shifts = np.array([product_drop, op.dropped_bits], np.int64)
    ties = np.array(TIES[op.rounding or Rounding.FLOOR], np.int64)
    product = _narrowing(op.product, op.product_overflow or Overflow.NONE)
    return shifts, ties, np.array([product, _narrowing(op.accumulator, op.overflow)], np.int64)


def _narrowing(storage: IntegerType | None, overflow: Overflow) -> tuple[int, ...]:
    """Bounds to clamp to, mask and sign bit to wrap with, bounds beyond which there is zero."""
    clamp, wraps, keep = (-WIDEST, WIDEST), (-1, 0), (-2 * WIDEST, 2 * WIDEST - 1)
    if storage is not None and overflow is Overflow.WRAP:
        wraps = wrapping(storage)
    elif storage is not None and overflow is Overflow.SATURATE_ZERO:
        keep = storage.lo, storage.hi
    elif storage is not None and overflow is not Overflow.NONE:
        clamp = kept_bounds(storage.lo, storage.hi, overflow)
    return *clamp, *wraps, *keep


def _padded(places: Tensor, zeros: Tensor, weights: Tensor, number: np.dtype[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Terms up to a multiple of four: the last ones read the first place times zero, which no narrowed sum notices."""
    more = -places.size % QUAD
    wide = np.pad(weights, ((0, 0), (0, more), (0, 0))).astype(number)
    return np.pad(places, (0, more)), np.pad(zeros, ((0, 0), (0, more))).astype(number), np.ascontiguousarray(wide)


def _convolution(op: Conv2d, facts: Facts) -> _Source | None:
    x, weight = op.operands[0].type, op.operands[1]
    zero, x_dtype = zero_along_last(x), integers(x).dtype
    if weight not in facts.constants or zero is None:
        return None
    centred = entering_weights(op, facts)
    outputs, _, _, per_group = centred.shape
    grouped = centred.reshape(op.groups, outputs // op.groups, -1, per_group)
    frame = Frame(op)
    if frame.scratch and bool((zero.astype(x_dtype) != zero).any()):
        return None
    own = np.broadcast_to(zero, (op.groups * per_group,)).reshape(op.groups, 1, per_group)
    zeros = np.broadcast_to(own, (op.groups, len(frame.taps), per_group))
    order = (0, 3, 2, 1) if op.order.channels_outside else (0, 2, 3, 1)
    weights = grouped.transpose(order).reshape(op.groups, -1, outputs // op.groups)
    along = (zeros.transpose(0, 2, 1) if op.order.channels_outside else zeros).reshape(op.groups, -1)
    pairs = np.array(frame.taps)[:, None] + np.arange(per_group)[None, :]
    places = (pairs.T if op.order.channels_outside else pairs).reshape(-1).astype(np.int64)
    _, height, width, _ = op.result.type.concrete(0)

    def bind(inputs: Sequence[Tensor], scratch: Sequence[Tensor], number: np.dtype[Any]) -> tuple[_Terms, Call | None]:
        images = len(inputs[0])
        data, prepare = frame.bind(inputs[0], scratch, zero.astype(x_dtype))
        starts = np.arange(images, dtype=np.int64) * frame.image
        geometry = (height, width, *frame.steps, per_group)
        numbers = _padded(places, along, weights, number)
        return _Terms(data.reshape(-1), starts, np.zeros(images, np.int64), geometry, *numbers, op.groups), prepare

    return _Source("conv2d", lambda inputs: len(inputs[0]) * height * width, 1, outputs, bind, frame.scratch)


def _product(op: FixedMatMul, facts: Facts) -> _Source | None:
    a, b = (v.type for v in op.operands[:2])
    zero = zero_along_last(a)
    if op.operands[1] not in facts.constants or b.rank != 2 or zero is None:
        return _batched_product(op)
    weights = entering_weights(op, facts)[None]
    _, length, outputs = weights.shape
    zeros = np.broadcast_to(zero, (length,))[None]
    places, origin = np.arange(length, dtype=np.int64), np.zeros(1, np.int64)

    def bind(inputs: Sequence[Tensor], scratch: Sequence[Tensor], number: np.dtype[Any]) -> tuple[_Terms, Call | None]:
        rows = inputs[0].size // length
        numbers = _padded(places, zeros, weights, number)
        return _Terms(inputs[0].reshape(-1), origin, origin, (1, max(rows, 1), 0, length, 0), *numbers, 1), None

    return _Source("matmul", lambda inputs: inputs[0].size // length, 1, outputs, bind)


def _batched_product(op: FixedMatMul) -> _Source | None:
    """Operands that are both computed, or have leading dimensions, which broadcast; the right one is centred first."""
    a, b = (v.type for v in op.operands[:2])
    zeros = [zero_along_last(kind) for kind in (a, b)]
    left_zero, right_zero = zeros
    if left_zero is None or right_zero is None:
        return None
    inner, outputs = (int(d) for d in b.shape[-2:])
    along = np.broadcast_to(left_zero, (inner,))[None]
    places, shift, padding = np.arange(inner, dtype=np.int64), max(op.shift, 0), -inner % QUAD

    def bind(inputs: Sequence[Tensor], scratch: Sequence[Tensor], number: np.dtype[Any]) -> tuple[_Terms, Call | None]:
        left, right = inputs[:2]
        rows = left.shape[-2]
        starts, which = broadcast_places(left.shape[:-2], right.shape[:-2])
        weights, used = scratch[0], scratch[0][..., :inner, :]

        def prepare() -> None:
            weights.fill(0)
            np.subtract(right, right_zero, out=used, dtype=np.int64, casting="unsafe")
            np.left_shift(used, shift, out=used)

        rows_of = weights.reshape(-1, inner + padding, outputs)
        numbers = (np.pad(places, (0, padding)), np.pad(along, ((0, 0), (0, padding))).astype(number), rows_of)
        return _Terms(left.reshape(-1), starts * (rows * inner), which, (1, rows, 0, inner, 0), *numbers, 1), prepare

    def pixels(inputs: Sequence[Tensor]) -> int:
        lead = np.broadcast_shapes(inputs[0].shape[:-2], inputs[1].shape[:-2])
        return int(np.prod(lead, dtype=np.int64)) * inputs[0].shape[-2]

    return _Source(
        "matmul_batched",
        pixels,
        1,
        outputs,
        bind,
        (Memory((*b.shape[:-2], inner + padding, outputs), np.dtype(np.int64)),),
    )


def _sum(op: ReduceSum) -> _Source | None:
    """A sum over neighbouring axes, seen as [outer, reduced, inner]: products with 1."""
    kind = op.operands[0].type
    zero, axes = zero_along_last(kind), list(op.axes)
    if zero is None or zero.ndim or not axes or axes != list(range(axes[0], axes[-1] + 1)):  # terms come in this order
        return None
    inner = int(np.prod([int(d) for d in kind.shape[axes[-1] + 1 :]], dtype=np.int64))
    places = np.arange(op.count, dtype=np.int64) * inner
    ones = np.ones((1, op.count, 1), np.int64) << max(op.shift, 0)

    def outer(inputs: Sequence[Tensor]) -> int:
        return int(np.prod(inputs[0].shape[: axes[0]], dtype=np.int64))

    def bind(inputs: Sequence[Tensor], scratch: Sequence[Tensor], number: np.dtype[Any]) -> tuple[_Terms, Call | None]:
        images = outer(inputs)
        starts = np.arange(images, dtype=np.int64) * (op.count * inner)
        zeros = np.full((1, op.count), int(zero), number)
        geometry = (1, inner, 0, 1, 0)
        numbers = _padded(places, zeros, ones, number)
        return _Terms(inputs[0].reshape(-1), starts, np.zeros(images, np.int64), geometry, *numbers, 1), None

    return _Source("reduce_sum", outer, inner, inner, bind)
