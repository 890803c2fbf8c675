"""The chip's own kernels: sums of products that saturate at every step, and shifts that round ties to even.

A kernel is chosen by what the op says, never by the name of its target: an op that says anything else gets None, and
qir's own kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from qir import Op
from qir.backends.kernels.kernel import Call, Facts, Kernel, Memory
from qir.fixed_point import Overflow, RequantizeForm, Rounding
from qir.ops.accumulate import Accumulating, Order
from qir.ops.fixed_linear import Conv2d, FixedMatMul
from qir.ops.fixed_rescale import Requantize
from qir.types import BATCH, TensorType, storage_of, zero_array

Tensor = npt.NDArray[Any]

#: Operands of the chip: an accumulator and a product of both fit 32 bits with room to spare.
WIDEST_OPERAND = 12
WIDEST_ACCUMULATOR = 24
#: A proof allows `none`; saturating then changes nothing.
SATURATING = (Overflow.SATURATE, Overflow.NONE)


def choose(op: Op, facts: Facts) -> Kernel | None:
    """The chip's kernel for an op, or None where it has none."""
    match op:
        case Requantize():
            return _shift(op, facts)
        case Conv2d() if _is_ours(op, facts):
            return _convolution(op, facts)
        case FixedMatMul() if _is_ours(op, facts) and op.operands[1].type.rank == 2:
            return _product(op, facts)
        case _:
            return None


def _is_ours(op: Accumulating, facts: Facts) -> bool:
    """Whether the sum is one of plain products, which starts with its bias and saturates at every step."""
    x, weight, *bias = op.operands
    narrow = all(_bits(v.type) <= WIDEST_OPERAND and not zero_array(v.type.element).any() for v in (x, weight))
    constant = all(v in facts.constants for v in (weight, *bias))
    plain = op.product is None and op.product_shift is None and op.order is Order.BIAS_KHWC
    in_registers = op.accumulator.bits <= WIDEST_ACCUMULATOR and op.overflow in SATURATING
    return narrow and constant and plain and in_registers and x.type.sample_size > 0 and weight.type.sample_size > 0


def _bits(kind: TensorType) -> int:
    storage = storage_of(kind.element)
    return 99 if storage is None else storage.bits


@numba.njit(nogil=True)
def accumulate(rows: Any, weights: Any, start: Any, low: int, high: int, out: Any) -> None:
    """Rows [pixels, terms] times weights [terms, outputs], one product after the other, into out [pixels, outputs]."""
    sums = np.empty(weights.shape[1], np.int32)
    for p in range(rows.shape[0]):
        for o in range(weights.shape[1]):
            sums[o] = start[o]
        for k in range(rows.shape[1]):
            x = np.int32(rows[p, k])
            for o in range(weights.shape[1]):
                total = sums[o] + x * weights[k, o]
                sums[o] = min(max(total, low), high)
        for o in range(weights.shape[1]):
            out[p, o] = sums[o]


@numba.njit(nogil=True)
def shift_to_even(x: Any, left: Any, right: Any, low: int, high: int, out: Any) -> None:
    """X [rows, channels] times 2 to the power of left - right, ties to even, saturated to [low, high]."""
    for i in range(x.shape[0]):
        for c in range(x.shape[1]):
            value = np.int64(x[i, c]) << left[c]
            floor = value >> right[c]
            twice = (value - (floor << right[c])) << 1
            whole = np.int64(1) << right[c]
            if twice > whole or (twice == whole and floor & 1):
                floor += 1
            out[i, c] = min(max(floor, low), high)


def _start(op: Accumulating, facts: Facts, outputs: int) -> Tensor:
    """The bias; one beyond 32 bits lies so far out that the first sum saturates all the same."""
    bias = op.optional_operand(2)
    start = np.zeros(outputs, np.int64) if bias is None else facts.constants[bias].data.astype(np.int64)
    return np.clip(start, -(1 << 31), (1 << 31) - 1).astype(np.int32)


def _product(op: FixedMatMul, facts: Facts) -> Kernel:
    weights = facts.constants[op.operands[1]].data.astype(np.int32)
    terms, outputs = weights.shape
    start, low, high = _start(op, facts, outputs), op.accumulator.lo, op.accumulator.hi

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        rows, out = inputs[0].reshape(-1, terms), output.reshape(-1, outputs)
        return lambda: accumulate(rows, weights, start, low, high, out)

    return Kernel("chip20_matmul", bind, packed_bytes=weights.nbytes + start.nbytes)


def _convolution(op: Conv2d, facts: Facts) -> Kernel:
    """Every window as a row: padding adds products of 0, which change no saturated sum."""
    data = facts.constants[op.operands[1]].data.astype(np.int32)
    count, kernel_height, kernel_width, per_group = data.shape
    each, terms = count // op.groups, kernel_height * kernel_width * per_group
    weights = [np.ascontiguousarray(part.reshape(each, terms).T) for part in np.split(data, op.groups)]
    starts = np.split(_start(op, facts, count), op.groups)
    _, height, width, _ = op.result.type.concrete(0)
    rows_of, columns_of = (
        [
            _inside(tap * op.dilations[a] - op.pads[a], op.strides[a], outputs, op.operands[0].type.shape[1 + a])
            for tap in range(taps)
        ]
        for a, (taps, outputs) in enumerate(((kernel_height, height), (kernel_width, width)))
    )
    room = Memory((*op.result.type.shape[:3], terms), np.dtype(np.int16))
    low, high = op.accumulator.lo, op.accumulator.hi

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        x, windows = inputs[0], scratch[0].reshape(-1, height, width, kernel_height, kernel_width, per_group)
        rows, out = scratch[0].reshape(-1, terms), output.reshape(-1, count)
        sums = np.empty((len(rows), each), np.int32)

        def call() -> None:
            for group, (matrix, start) in enumerate(zip(weights, starts, strict=True)):
                windows[...] = 0
                channels = slice(group * per_group, (group + 1) * per_group)
                for (i, (to_y, from_y)), (j, (to_x, from_x)) in product(enumerate(rows_of), enumerate(columns_of)):
                    windows[:, to_y, to_x, i, j] = x[:, from_y, from_x, channels]
                accumulate(rows, matrix, start, low, high, sums)
                out[:, group * each : (group + 1) * each] = sums

        return call

    return Kernel("chip20_conv2d", bind, (room,), data.nbytes)


def _inside(first: int, stride: int, outputs: int, size: Any) -> tuple[slice, slice]:
    """Which outputs a tap reads for, and which elements it reads: those that do not lie on padding."""
    begin = max(0, math.ceil(-first / stride))
    end = max(begin, min(outputs, math.ceil((int(size) - first) / stride)))
    start = first + begin * stride
    return slice(begin, end), slice(start, start + (end - begin) * stride, stride)


def _shift(op: Requantize, facts: Facts) -> Kernel | None:
    x, result = op.operands[0].type, op.result.type
    storage = storage_of(result.element)
    if op.form is not RequantizeForm.SHIFT or op.rounding is not Rounding.HALF_EVEN or op.overflow not in SATURATING:
        return None
    if storage is None or storage.bits > 32 or not x.shape or any(zero_array(k.element).any() for k in (x, result)):
        return None
    channels = 1 if x.shape[-1] == BATCH else int(x.shape[-1])
    left = np.broadcast_to(op.input_shift + np.maximum(op.shift.data, 0), (channels,)).astype(np.int64)
    right = np.broadcast_to(np.maximum(-op.shift.data, 0), (channels,)).astype(np.int64)
    if _bits(x) + int(left.max(initial=0)) > 61 or int(right.max(initial=0)) > 61:
        return None
    low, high = storage.lo, storage.hi

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        rows, out = (a.reshape(-1, max(channels, 1)) for a in (inputs[0], output))
        return lambda: shift_to_even(rows, left, right, low, high, out)

    return Kernel("chip20_shift", bind)
