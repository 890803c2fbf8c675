"""Kernels element by element or window by window: arithmetic, tables, argmax, pooling and softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qir.backends.kernels import elementwise_loops as loops
from qir.backends.kernels.kernel import WIDEST, Call, Facts, Kernel, Memory, Tensor, clamp_bounds, fits, integers
from qir.backends.kernels.rescale import TIES
from qir.integer_functions import softmax_exponentials, softmax_reciprocal, softmax_terms
from qir.ir import Op
from qir.ops.fixed_elementwise import Elementwise, FixedAdd, FixedArgMax, FixedDiv, FixedMul, FixedSub, Table
from qir.ops.fixed_pool import FixedAveragePool, FixedMaxPool, FixedSoftmax
from qir.types import zero_array

Flat = Callable[[Tensor, Tensor, Tensor], None]


def arithmetic(op: Op, facts: Facts) -> Kernel | None:
    """Add, sub, mul and div in 64-bit registers; an operand that broadcasts is spread out first."""
    assert isinstance(op, Elementwise)
    zeros = [zero_array(v.type.element) for v in (*op.operands, op.result)]
    limits = clamp_bounds(op.storage, op.overflow, facts.is_idle(op))
    if limits is None or any(z.ndim or not fits(z, np.int32) for z in zeros):
        return None
    if any(integers(v.type).bits > 32 for v in (*op.operands, op.result)):
        return None
    run = _division(op, facts, limits) if isinstance(op, FixedDiv) else _combination(op, limits)
    if run is None:
        return None
    spread = [v.type.shape != op.result.type.shape for v in op.operands]
    scratch = tuple(
        Memory(op.result.type.shape, integers(v.type).dtype) for v, s in zip(op.operands, spread, strict=True) if s
    )

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        room = iter(scratch)
        whole = [next(room) if s else x for x, s in zip(inputs, spread, strict=True)]
        copies = [(to, x) for to, x, s in zip(whole, inputs, spread, strict=True) if s]
        a, b, out = whole[0].reshape(-1), whole[1].reshape(-1), output.reshape(-1)

        def call() -> None:
            for to, x in copies:
                np.copyto(to, x)
            run(a, b, out)

        return call

    return Kernel(op.mnemonic, bind, scratch)


def _combination(op: Elementwise, limits: tuple[int, int]) -> Flat | None:
    a_zero, b_zero = (int(zero_array(v.type.element)) for v in op.operands)
    if op.intermediate_bits() > 63:
        return None
    match op:
        case FixedAdd() | FixedSub():
            sign = 1 if isinstance(op, FixedAdd) else -1
            return lambda a, b, out: loops.add_flat(a, a_zero, b, b_zero, sign, *limits, out)
        case FixedMul():
            return lambda a, b, out: loops.multiply_flat(a, a_zero, b, b_zero, *limits, out)
        case _:
            return None


def _division(op: FixedDiv, facts: Facts, limits: tuple[int, int]) -> Flat | None:
    """The scaled dividend and divisor must fit 64 bits."""
    a_zero, b_zero, zero = (int(zero_array(v.type.element)) for v in (*op.operands, op.result))
    up, down = op.multiplier << max(op.shift - 31, 0), 1 << max(31 - op.shift, 0)
    spans = [facts.span(v) for v in op.operands]
    if any(max(-int(s.lo), int(s.hi)) * factor >= WIDEST for s, factor in zip(spans, (up, down), strict=True)):
        return None
    if not (fits(up, np.int64) and fits(down, np.int64)) or op.multiplier < 0:
        return None
    numbers = (up, down, 1 << (op.storage.bits + 2), zero, *limits)
    return lambda a, b, out: loops.divide_flat(a, a_zero, b, b_zero, *numbers, out)


def table(op: Op, facts: Facts) -> Kernel | None:
    """A look-up, with one table or one for each index of the last axis."""
    assert isinstance(op, Table)
    rows = 1 if op.operands[1].type.rank == 1 else int(op.operands[1].type.shape[0])
    first = op.first
    if op.result.type.sample_size == 0:
        return None

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        columns = rows if rows > 1 else max(output.size, 1)
        x, out, entries = inputs[0].reshape(-1, columns), output.reshape(-1, columns), np.atleast_2d(inputs[1])
        return lambda: loops.look_up(x, entries, int(rows > 1), first, out)

    return Kernel("table" if rows == 1 else "table_per_channel", bind)


def argmax(op: Op, facts: Facts) -> Kernel | None:
    """The greatest element along an axis, seen as the middle one of three."""
    assert isinstance(op, FixedArgMax)
    shape = op.operands[0].type.shape
    if 0 in shape:
        return None

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        x = inputs[0]
        outer, inner = (int(np.prod(part, dtype=np.int64)) for part in (x.shape[: op.axis], x.shape[op.axis + 1 :]))
        middle, out = x.reshape(outer, x.shape[op.axis], inner), output.reshape(outer, inner)
        return lambda: loops.argmax_middle(middle, op.select_last_index, out)

    return Kernel("argmax", bind)


def max_pool(op: Op, facts: Facts) -> Kernel | None:
    """The greatest element of each window."""
    assert isinstance(op, FixedMaxPool)
    geometry = _geometry(op)

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        return lambda: loops.max_windows(inputs[0], *geometry, output)

    return Kernel("max_pool2d", bind)


def average_pool(op: Op, facts: Facts) -> Kernel | None:
    """The rounded mean of each window."""
    assert isinstance(op, FixedAveragePool)
    if op.intermediate_bits() > 62 or integers(op.operands[0].type).bits > 32:
        return None
    geometry, ties = _geometry(op), np.array(TIES[op.rounding], np.int64)
    channels = int(op.result.type.shape[-1])

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        return lambda: loops.average_windows(inputs[0], *geometry, ties, scratch[0], output)

    return Kernel("average_pool2d", bind, (Memory((channels,), np.dtype(np.int64)),))


def _geometry(op: FixedMaxPool | FixedAveragePool) -> tuple[Tensor, ...]:
    return tuple(np.array(v, np.int64) for v in (op.kernel, op.strides, op.pads, op.dilations))


def softmax(op: Op, facts: Facts) -> Kernel | None:
    """Exponentials by table of the distance from the row's maximum; reciprocals of the sums by their definition."""
    assert isinstance(op, FixedSoftmax)
    exponentials = softmax_exponentials(-np.arange(256, dtype=np.int64), op.parameters)
    terms = softmax_terms(exponentials)
    length = int(op.result.type.shape[-1])
    if length == 0:
        return None

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        x, out = inputs[0].reshape(-1, length), output.reshape(-1, length)
        greatest, totals = scratch[0].reshape(-1), scratch[1].reshape(-1)

        def call() -> None:
            if len(x):
                loops.softmax_sums(x, terms, greatest, totals)
                loops.softmax_ratios(x, exponentials, greatest, *softmax_reciprocal(totals), out)

        return call

    rows = Memory(op.result.type.shape[:-1], np.dtype(np.int64))
    return Kernel("softmax", bind, (rows, rows), exponentials.nbytes + terms.nbytes)
