"""Kernels of sums of products: convolution, matrix product and sum, alone or with the requantize behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from qir.backends.kernels import linear_loops as loops
from qir.backends.kernels.kernel import Call, Facts, Kernel, Memory, Tensor, fits, integers, zero_along_last
from qir.backends.kernels.rescale import Rescale, fills_container, rescale_of
from qir.fixed_point import Overflow
from qir.ir import Op
from qir.ops.accumulate import Accumulating, centre
from qir.ops.fixed_linear import Conv2d, FixedMatMul, ReduceSum
from qir.ops.fixed_rescale import Requantize

#: Accumulators between a sum and its requantize: few enough to stay in the cache.
_BLOCK_BYTES: Final = 64 << 10
#: Taps that the depthwise loop takes at a time.
_TAPS: Final = 3

SumType = np.dtype[np.signedinteger[Any]]


class Bound(NamedTuple):
    """Sums tied to arrays: `prepare()` once a call, then `fill(out, first, last)` for ranges of `pixels` in order.

    `fill` writes the accumulators of the pixels in [first, last) to the flat `out`.
    """

    pixels: int
    fill: Callable[[Tensor, int, int], None]
    prepare: Call | None = None


@dataclass(frozen=True)
class Sums:
    """Accumulators, `width` a pixel, as integers of `dtype` modulo its width; `bind(inputs, scratch)` ties them."""

    name: str
    dtype: SumType
    width: int
    bind: Callable[[Sequence[Tensor], Sequence[Tensor]], Bound]
    scratch: tuple[Memory, ...] = ()
    packed_bytes: int = 0


def linear(op: Op, facts: Facts) -> Kernel | None:
    """The kernel of a sum whose accumulators are stored."""
    assert isinstance(op, Accumulating)
    sums = _sums_of(op, facts)
    if sums is None:
        return None
    if sums.dtype != op.accumulator.dtype:
        return _through_block(sums, f"{sums.name}:{op.accumulator}", _keep_low_bits)

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        pixels, fill, prepare = sums.bind(inputs, scratch)
        out = output.reshape(-1)

        def call() -> None:
            if prepare is not None:
                prepare()
            fill(out, 0, pixels)

        return call

    return Kernel(sums.name, bind, sums.scratch, sums.packed_bytes)


def fused(op: Op, following: Requantize, facts: Facts) -> Kernel | None:
    """The kernel of a sum and the requantize that alone reads it: accumulators pass through a block in the cache."""
    if not isinstance(op, Accumulating):
        return None
    sums, rescale = _sums_of(op, facts), rescale_of(following, facts)
    if sums is None or rescale is None or not (sums.dtype == op.accumulator.dtype or facts.is_idle(op)):
        return None
    return _through_block(sums, f"{sums.name}+{rescale.name}", rescale.run)


def _keep_low_bits(block: Tensor, out: Tensor) -> None:
    np.copyto(out, block, casting="unsafe")


def _through_block(sums: Sums, name: str, finish: Callable[[Tensor, Tensor], None]) -> Kernel:
    """Accumulators in blocks of whole pixels, each finished into its part of the output."""
    step = max(1, _BLOCK_BYTES // max(sums.width * sums.dtype.itemsize, 1))
    block_size = Memory((step * sums.width,), sums.dtype)

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        pixels, fill, prepare = sums.bind(inputs, scratch)
        out, width = output.reshape(-1), sums.width
        parts = []
        for first in range(0, pixels, step):
            last = min(first + step, pixels)
            parts.append((first, last, scratch[-1][: (last - first) * width], out[first * width : last * width]))

        def call() -> None:
            if prepare is not None:
                prepare()
            for first, last, block, part in parts:
                fill(block, first, last)
                finish(block, part)

        return call

    return Kernel(name, bind, (*sums.scratch, block_size), sums.packed_bytes)


def _sums_of(op: Accumulating, facts: Facts) -> Sums | None:
    dtype = _sum_dtype(op, facts)
    if dtype is None:
        return None
    match op:
        case Conv2d():
            return _convolution(op, facts, dtype)
        case FixedMatMul():
            return _product(op, facts, dtype) or _batched_product(op, facts, dtype)
        case ReduceSum():
            return _sum(op, dtype)
        case _:
            return None


def _sum_dtype(op: Accumulating, facts: Facts) -> SumType | None:
    """The register whose wrapping sums give the op's bits in any order; None where each step of the chain counts."""
    partial, accumulator = facts.partial(op), op.accumulator
    if partial is None or any(integers(v.type).bits > 32 or not v.type.sample_size for v in op.operands[:2]):
        return None
    if op.overflow is Overflow.WRAP:
        if not fills_container(accumulator):
            return None
        return np.dtype(np.int32 if accumulator.bits <= 32 else np.int64)
    if not facts.is_idle(op):
        return None
    ends = np.array([partial.lo, partial.hi], object)
    return next((np.dtype(t) for t in (np.int32, np.int64) if fits(ends, t)), None)


def _packed(weights: Tensor, dtype: SumType) -> Tensor:
    """Centred weights in the narrowest type that holds them, or wrapped to the sum's, which changes no sum."""
    narrow = next((t for t in (np.int8, np.int16) if fits(weights, t)), dtype)
    return np.ascontiguousarray(weights.astype(narrow if dtype == np.int32 else dtype))


def _folded_bias(op: Accumulating, facts: Facts, per_zero: Tensor, dtype: SumType) -> Tensor | None:
    """Bias less the sums of zero point times weight; None where the bias is not constant."""
    bias = op.optional_operand(2)
    if bias is not None and bias not in facts.constants:
        return None
    base = 0 if bias is None else facts.constants[bias].data.astype(np.int64)
    return np.asarray(base - per_zero).astype(dtype)


def _convolution(op: Conv2d, facts: Facts, dtype: SumType) -> Sums | None:
    """Convolution over a padded copy of the input, so that a kernel row is one contiguous run where it can be."""
    x, weight = op.operands[0].type, op.operands[1]
    zero = zero_along_last(x)
    x_dtype = integers(x).dtype
    if weight not in facts.constants or zero is None or (any(op.pads) and not fits(zero, x_dtype)):
        return None
    height, width, channels = (int(d) for d in x.shape[1:])
    weights = centre(facts.constants[weight].data.astype(np.int64), weight.type)
    outputs, rows, columns, per_group = weights.shape
    zeros = np.broadcast_to(zero, (channels,)).reshape(op.groups, 1, 1, 1, per_group)
    grouped = weights.reshape(op.groups, outputs // op.groups, rows, columns, per_group)
    bias = _folded_bias(op, facts, (grouped * zeros).sum(axis=(2, 3, 4)).reshape(-1), dtype)
    if bias is None:
        return None
    top, left, bottom, right = op.pads
    padded = (height + top + bottom, width + left + right, channels)
    scratch = (Memory((x.shape[0], *padded), x_dtype),) if any(op.pads) else ()
    row = padded[1] * channels
    is_depthwise = op.groups > 1 and per_group == 1 and outputs == op.groups
    is_run = op.groups == 1 and (op.dilations[1] == 1 or columns == 1)
    places = [
        i * op.dilations[0] * row + j * op.dilations[1] * channels
        for i in range(rows)
        for j in range(1 if is_run else columns)
    ]
    steps = (op.strides[0] * row, op.strides[1] * channels)
    _, out_height, out_width, _ = op.result.type.concrete(0)
    pixels = out_height * out_width
    if is_depthwise:
        extra = -len(places) % _TAPS
        taps = np.array([*places, *[0] * extra], np.int64)
        packed = np.pad(_packed(weights[..., 0].reshape(outputs, -1).T, dtype), ((0, extra), (0, 0)))
        tail = (taps, packed, bias, out_height, out_width, *steps)
    else:
        length = columns * per_group if is_run else per_group
        packed = _packed(grouped.transpose(0, 2, 3, 4, 1).reshape(op.groups, -1, outputs // op.groups), dtype)
        shared = (packed, bias.reshape(op.groups, -1), 1, op.groups, per_group)
        tail = (np.array(places, np.int64), length, *shared, out_height, out_width, *steps)
    inside = (slice(None), slice(top, top + height), slice(left, left + width))
    fill_value = np.asarray(zero).astype(x_dtype) if scratch else None

    def bind(inputs: Sequence[Tensor], scratch: Sequence[Tensor]) -> Bound:
        source = inputs[0]
        images = source.shape[0]
        starts = np.arange(images, dtype=np.int64) * (padded[0] * row)
        data = scratch[0] if fill_value is not None else source
        flat = data.reshape(-1)
        which = np.zeros(images, np.int64)

        def pad() -> None:
            data[...] = fill_value
            data[inside] = source

        def fill(out: Tensor, first: int, last: int) -> None:
            if is_depthwise:
                loops.contract_depthwise(flat, starts, *tail, out, first, last)
            else:
                loops.contract(flat, starts, which, *tail, out, first, last)

        return Bound(images * pixels, fill, pad if fill_value is not None else None)

    name = "depthwise" if is_depthwise else "pointwise" if rows == columns == 1 else "conv2d"
    return Sums(f"{name}_{_types(x_dtype, packed, dtype)}", dtype, outputs, bind, scratch, packed.nbytes + bias.nbytes)


def _types(x_dtype: npt.DTypeLike, packed: Tensor, dtype: SumType) -> str:
    """`s8s8s32`: activations, weights, sums."""
    return "".join(f"{d.kind.replace('i', 's')}{8 * d.itemsize}" for d in (np.dtype(x_dtype), packed.dtype, dtype))


def _product(op: FixedMatMul, facts: Facts, dtype: SumType) -> Sums | None:
    """Rows times constant weights [K, N]."""
    a, b = (v.type for v in op.operands[:2])
    zero = zero_along_last(a)
    if op.operands[1] not in facts.constants or b.rank != 2 or zero is None:
        return None
    weights = centre(facts.constants[op.operands[1]].data.astype(np.int64), b)
    length, outputs = weights.shape
    bias = _folded_bias(op, facts, np.broadcast_to(zero, (length,)) @ weights, dtype)
    if bias is None:
        return None
    packed = _packed(weights, dtype)[None]
    origin = np.zeros(1, np.int64)

    def bind(inputs: Sequence[Tensor], scratch: Sequence[Tensor]) -> Bound:
        rows = inputs[0].size // max(length, 1) if length else int(np.prod(inputs[0].shape[:-1]))
        flat = inputs[0].reshape(-1)
        tail = (origin, origin, origin, length, packed, bias[None], 0, 1, 0, 1, max(rows, 1), 0, length)
        return Bound(rows, lambda out, first, last: loops.contract(flat, *tail, out, first, last))

    name = f"matmul_{_types(integers(a).dtype, packed, dtype)}"
    return Sums(name, dtype, outputs, bind, (), packed.nbytes + bias.nbytes)


def _batched_product(op: FixedMatMul, facts: Facts, dtype: SumType) -> Sums | None:
    """Two computed operands, or leading dimensions: both are centred first; leading dimensions broadcast by index."""
    kinds = [v.type for v in op.operands[:2]]
    zeros = [zero_along_last(k) for k in kinds]
    narrow = np.dtype(np.int16)
    spans = [facts.span(v) for v in op.operands[:2]]
    small = dtype == np.int32 and all(fits([s.lo, s.hi], narrow) for s in spans)
    held = narrow if small else dtype
    bias = _folded_bias(op, facts, np.zeros(int(kinds[1].shape[-1]), np.int64), dtype)
    if bias is None or zeros[0] is None or zeros[1] is None:
        return None
    offsets = [np.asarray(z).astype(dtype) for z in zeros if z is not None]
    inner, outputs = (int(d) for d in kinds[1].shape[-2:])

    def bind(inputs: Sequence[Tensor], scratch: Sequence[Tensor]) -> Bound:
        left, right = scratch[:2]
        leads = [x.shape[:-2] for x in (left, right)]
        shape = np.broadcast_shapes(*leads)
        rows = left.shape[-2]
        order = [
            np.ascontiguousarray(np.broadcast_to(np.arange(int(np.prod(s)), dtype=np.int64).reshape(s), shape))
            for s in leads
        ]
        starts, which = order[0].reshape(-1) * (rows * inner), order[1].reshape(-1)
        flat, weights = left.reshape(-1), right.reshape(-1, inner, outputs)
        tail = (np.zeros(1, np.int64), inner, weights, bias[None], 0, 1, 0, 1, rows, 0, inner)

        def centre_both() -> None:
            np.subtract(inputs[0], offsets[0], out=left, dtype=dtype, casting="unsafe")
            np.subtract(inputs[1], offsets[1], out=right, dtype=dtype, casting="unsafe")

        def fill(out: Tensor, first: int, last: int) -> None:
            loops.contract(flat, starts, which, *tail, out, first, last)

        return Bound(len(starts) * rows, fill, centre_both)

    name = f"matmul_batched_{_types(held, np.empty(0, held), dtype)}"
    scratch = tuple(Memory(k.shape, held) for k in kinds)
    return Sums(name, dtype, outputs, bind, scratch, bias.nbytes)


def _sum(op: ReduceSum, dtype: SumType) -> Sums | None:
    """A sum over neighbouring axes, seen as [outer, reduced, inner]."""
    kind = op.operands[0].type
    zero, axes = zero_along_last(kind), sorted(a % kind.rank for a in op.axes)
    if zero is None or zero.ndim or not axes or axes != list(range(axes[0], axes[-1] + 1)):
        return None
    offset = -int(zero) * op.count
    inner = int(np.prod([int(d) for d in kind.shape[axes[-1] + 1 :]], dtype=np.int64))
    if not fits(offset, np.int64):
        return None

    def bind(inputs: Sequence[Tensor], scratch: Sequence[Tensor]) -> Bound:
        x = inputs[0]
        outer = int(np.prod(x.shape[: axes[0]], dtype=np.int64))
        data = x.reshape(outer, op.count, inner)

        def fill(out: Tensor, first: int, last: int) -> None:
            loops.sum_middle(data[first:last], offset, out.reshape(last - first, inner))

        return Bound(outer, fill)

    return Sums(f"reduce_sum_{dtype.name.replace('int', 's')}", dtype, inner, bind)
