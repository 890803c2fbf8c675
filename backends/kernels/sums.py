"""Accumulators pixel by pixel: convolution, matrix product and sum, each tied to a compiled loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from qir.backends.kernels import linear_loops as loops
from qir.backends.kernels.kernel import (
    Call,
    Facts,
    Memory,
    Tensor,
    fits,
    integers,
    zero_along_last,
)
from qir.fixed_point import Overflow
from qir.interval import Interval
from qir.ops.accumulate import Accumulating, centre
from qir.ops.fixed_linear import Conv2d, FixedMatMul, ReduceSum

#: Terms that the loops take at a time.
QUAD: Final = 4
_TRIPLE: Final = 3

_INT32: Final = np.dtype(np.int32)
_INT64: Final = np.dtype(np.int64)


class Bound(NamedTuple):
    """Sums tied to arrays: `prepare()` once a call, then `fill(out, first, last)` for ranges of `pixels` in order.

    `fill` writes the accumulators of the pixels in [first, last) to the flat `out`.
    """

    pixels: int
    fill: Callable[[Tensor, int, int], None]
    prepare: Call | None = None


@dataclass(frozen=True)
class Sums:
    """Accumulators, `width` a pixel, as integers of `dtype`; `bind(inputs, scratch)` ties them.

    They are those of the op where `is_narrowed`, else sums modulo the width of `dtype`.
    """

    name: str
    dtype: np.dtype[Any]
    width: int
    bind: Callable[[Sequence[Tensor], Sequence[Tensor]], Bound]
    scratch: tuple[Memory, ...] = ()
    packed_bytes: int = 0
    is_narrowed: bool = False


def sums_of(op: Accumulating, facts: Facts) -> Sums | None:
    """The loop that accumulates an op, or None where no loop gives its bits."""
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


def _sum_dtype(op: Accumulating, facts: Facts) -> np.dtype[Any] | None:
    """The register whose wrapping sums give the op's bits in any order; None where each step of the chain counts."""
    accumulator = op.accumulator
    if any(integers(v.type).bits > 32 or not v.type.sample_size for v in op.operands[:2]):
        return None
    if op.shift < 0 or (op.product is not None and not facts.is_product_idle(op)):
        return None
    if op.overflow is Overflow.WRAP:
        return _INT32 if accumulator.bits <= 32 else _INT64
    if not facts.is_idle(op):
        return None
    sums = facts.partial(op) or Interval(accumulator.lo, accumulator.hi)
    ends = np.array([sums.lo, sums.hi], object)
    return next((t for t in (_INT32, _INT64) if fits(ends, t)), None)


def entering_weights(op: Accumulating, facts: Facts) -> Tensor:
    """Constant weights less their zero points, shifted left where the products are."""
    weight = op.operands[1]
    return centre(facts.constants[weight].data.astype(np.int64), weight.type) << max(op.shift, 0)


def _packed(weights: Tensor, dtype: np.dtype[Any], multiple: int) -> Tensor:
    """Centred weights [..., K, O] with zeros up to a multiple of terms.

    In the narrowest type that holds them, or wrapped to that of the sum, which changes no sum.
    """
    narrow = next((t for t in (np.int8, np.int16) if fits(weights, t)), dtype)
    width = [(0, 0)] * weights.ndim
    width[-2] = (0, -weights.shape[-2] % multiple)
    return np.ascontiguousarray(np.pad(weights, width).astype(narrow if dtype == _INT32 else dtype))


def _places(places: Sequence[int], multiple: int) -> Tensor:
    """Where the terms lie, with the first place again up to a multiple of terms."""
    return np.array([*places, *[0] * (-len(places) % multiple)], np.int64)


def _folded_bias(op: Accumulating, facts: Facts, zero_sums: npt.ArrayLike, dtype: np.dtype[Any]) -> Tensor | None:
    """The bias less the sums of zero point times weight; None where the bias is not constant."""
    bias = op.optional_operand(2)
    if bias is not None and bias not in facts.constants:
        return None
    given = 0 if bias is None else facts.constants[bias].data.astype(np.int64)
    return np.asarray(given - np.asarray(zero_sums, np.int64)).astype(dtype)


def type_names(op: Accumulating, dtype: np.dtype[Any], weights: npt.DTypeLike | None = None) -> str:
    """`s8s8s32`: activations, weights, where there are any, and sums."""
    kinds = [*(integers(v.type).dtype for v in op.operands[:2]), dtype]
    if weights is not None:
        kinds[1] = np.dtype(weights)
    return "".join(f"{'s' if k.kind == 'i' else 'u'}{8 * k.itemsize}" for k in kinds)


def _convolution(op: Conv2d, facts: Facts, dtype: np.dtype[Any]) -> Sums | None:
    """Convolution over the input, or over a copy of it that is padded with the zero point."""
    x, weight = op.operands[0].type, op.operands[1]
    zero, x_dtype = zero_along_last(x), integers(x).dtype
    if weight not in facts.constants or zero is None or (any(op.pads) and not fits(zero, x_dtype)):
        return None
    weights = entering_weights(op, facts)
    outputs, _, _, per_group = weights.shape
    grouped = weights.reshape(op.groups, outputs // op.groups, -1, per_group)
    zeros = np.broadcast_to(zero, (op.groups * per_group,)).reshape(op.groups, 1, 1, per_group)
    bias = _folded_bias(op, facts, (grouped * zeros).sum(axis=(2, 3)).reshape(-1), dtype)
    if bias is None:
        return None
    frame = Frame(op)
    _, height, width, _ = op.result.type.concrete(0)
    geometry = (height, width, *frame.steps)
    if op.groups > 1 and per_group == 1 and outputs == op.groups:
        packed = _packed(grouped[:, 0, :, 0].T, dtype, _TRIPLE)
        places = _places(frame.taps, _TRIPLE)
        name = "depthwise"

        def fill(flat: Tensor, starts: Tensor, which: Tensor, out: Tensor, first: int, last: int) -> None:
            loops.contract_depthwise(flat, starts, *geometry, places, packed, bias, out, first, last)

    else:
        packed = _packed(grouped.reshape(op.groups, outputs // op.groups, -1).transpose(0, 2, 1), dtype, QUAD)
        places = _places([tap + c for tap in frame.taps for c in range(per_group)], QUAD)
        name = "pointwise" if len(frame.taps) == 1 else "conv2d"

        def fill(flat: Tensor, starts: Tensor, which: Tensor, out: Tensor, first: int, last: int) -> None:
            loops.contract(flat, starts, which, *geometry, per_group, places, packed, bias, op.groups, out, first, last)

    def bind(inputs: Sequence[Tensor], scratch: Sequence[Tensor]) -> Bound:
        images = len(inputs[0])
        data, prepare = frame.bind(inputs[0], scratch, zero.astype(x_dtype))
        fixed = (data.reshape(-1), np.arange(images, dtype=np.int64) * frame.image, np.zeros(images, np.int64))
        return Bound(images * height * width, lambda out, first, last: fill(*fixed, out, first, last), prepare)

    name = f"{name}_{type_names(op, dtype, packed.dtype)}"
    return Sums(name, dtype, outputs, bind, frame.scratch, packed.nbytes + bias.nbytes)


class Frame:
    """The input of a convolution with its padding: steps in elements, and where the taps lie from a window's start."""

    def __init__(self, op: Conv2d) -> None:
        kind = op.operands[0].type
        top, left, bottom, right = op.pads
        height, width, channels = (int(d) for d in kind.shape[1:])
        self.shape = (height + top + bottom, width + left + right, channels)
        row = self.shape[1] * channels
        self.image = self.shape[0] * row
        self.steps = (op.strides[0] * row, op.strides[1] * channels)
        rows, columns = op.window.kernel
        self.taps = [
            i * op.dilations[0] * row + j * op.dilations[1] * channels for i in range(rows) for j in range(columns)
        ]
        self.inside = (slice(None), slice(top, top + height), slice(left, left + width))
        self.scratch = (Memory((kind.shape[0], *self.shape), integers(kind).dtype),) if any(op.pads) else ()

    def bind(self, source: Tensor, scratch: Sequence[Tensor], zero: Tensor) -> tuple[Tensor, Call | None]:
        """The array that the loop reads, and what fills it with `source` and the zero point around it."""
        if not self.scratch:
            return source, None
        data, inside = scratch[0], scratch[0][self.inside]

        def pad() -> None:
            data[...] = zero
            inside[...] = source

        return data, pad


def _product(op: FixedMatMul, facts: Facts, dtype: np.dtype[Any]) -> Sums | None:
    """Rows times constant weights [K, N]."""
    a, b = (v.type for v in op.operands[:2])
    zero = zero_along_last(a)
    if op.operands[1] not in facts.constants or b.rank != 2 or zero is None:
        return None
    weights = entering_weights(op, facts)
    length, outputs = weights.shape
    bias = _folded_bias(op, facts, np.broadcast_to(zero, (length,)) @ weights, dtype)
    if bias is None:
        return None
    packed, places = _packed(weights[None], dtype, QUAD), _places(range(length), QUAD)
    origin = np.zeros(1, np.int64)

    def bind(inputs: Sequence[Tensor], scratch: Sequence[Tensor]) -> Bound:
        flat, rows = inputs[0].reshape(-1), inputs[0].size // length
        fixed = (flat, origin, origin, 1, max(rows, 1), 0, length, 0, places, packed, bias, 1)
        return Bound(rows, lambda out, first, last: loops.contract(*fixed, out, first, last))

    name = f"matmul_{type_names(op, dtype, packed.dtype)}"
    return Sums(name, dtype, outputs, bind, (), packed.nbytes + bias.nbytes)


def _batched_product(op: FixedMatMul, facts: Facts, dtype: np.dtype[Any]) -> Sums | None:
    """Operands that are both computed, or have leading dimensions, which broadcast; both are centred first."""
    kinds = [v.type for v in op.operands[:2]]
    zeros = [zero_along_last(k) for k in kinds]
    inner, outputs = (int(d) for d in kinds[1].shape[-2:])
    bias = _folded_bias(op, facts, np.zeros(outputs, np.int64), dtype)
    if bias is None or zeros[0] is None or zeros[1] is None or op.shift:
        return None
    spans = [facts.span(v) for v in op.operands[:2]]
    fits_int16 = dtype == _INT32 and all(fits([s.lo, s.hi], np.int16) for s in spans)
    held = np.dtype(np.int16) if fits_int16 else dtype
    offsets = [np.asarray(z).astype(dtype) for z in zeros if z is not None]
    terms = -(-inner // QUAD) * QUAD
    places = _places(range(inner), QUAD)
    scratch = (Memory(kinds[0].shape, held), Memory((*kinds[1].shape[:-2], terms, outputs), held))

    def bind(inputs: Sequence[Tensor], scratch: Sequence[Tensor]) -> Bound:
        left, right = scratch[:2]
        rows = left.shape[-2]
        starts, which = broadcast_places(left.shape[:-2], right.shape[:-2])
        weights, used = right.reshape(-1, terms, outputs), right[..., :inner, :]
        fixed = (left.reshape(-1), starts * (rows * inner), which, 1, rows, 0, inner, 0, places, weights, bias, 1)

        def centre_both() -> None:
            np.subtract(inputs[0], offsets[0], out=left, dtype=dtype, casting="unsafe")
            right.fill(0)
            np.subtract(inputs[1], offsets[1], out=used, dtype=dtype, casting="unsafe")

        return Bound(len(starts) * rows, lambda out, first, last: loops.contract(*fixed, out, first, last), centre_both)

    names = "".join(f"s{8 * k.itemsize}" for k in (held, held, dtype))
    return Sums(f"matmul_batched_{names}", dtype, outputs, bind, scratch, bias.nbytes)


def broadcast_places(*leads: tuple[int, ...]) -> list[Tensor]:
    """For each operand, which of its matrices each matrix of the result takes; `leads` are the leading dimensions."""
    shape = np.broadcast_shapes(*leads)
    counts = [np.arange(int(np.prod(lead, dtype=np.int64)), dtype=np.int64).reshape(lead) for lead in leads]
    return [np.broadcast_to(c, shape).reshape(-1) for c in counts]


def _sum(op: ReduceSum, dtype: np.dtype[Any]) -> Sums | None:
    """A sum over neighbouring axes, seen as [outer, reduced, inner]."""
    kind = op.operands[0].type
    zero, axes = zero_along_last(kind), sorted(op.axes)
    if zero is None or zero.ndim or op.shift or not axes or axes != list(range(axes[0], axes[-1] + 1)):
        return None
    offset = -int(zero) * op.count
    inner = int(np.prod([int(d) for d in kind.shape[axes[-1] + 1 :]], dtype=np.int64))
    if not fits(offset, np.int64):
        return None

    def bind(inputs: Sequence[Tensor], scratch: Sequence[Tensor]) -> Bound:
        outer = int(np.prod(inputs[0].shape[: axes[0]], dtype=np.int64))
        data = inputs[0].reshape(outer, op.count, inner)

        def fill(out: Tensor, first: int, last: int) -> None:
            loops.sum_middle(data[first:last], offset, out.reshape(last - first, inner))

        return Bound(outer, fill)

    return Sums(f"reduce_sum_{type_names(op, dtype)}", dtype, inner, bind)
