"""What ops compute on the way to their results, taken down naively, and the check that all of it is where it is proved.

Sums are made product by product from the places of their operands; nothing here calls the ops' own arithmetic but for
the roundings, overflow modes and requantization forms of `qir.fixed_point`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.fixed_point import Overflow, RequantizeForm, Rounding, narrow, requantize, round_divide, round_shift
from qir.interpreter import trace
from qir.interval import Bounds
from qir.ir import Graph, Op, OpBounds
from qir.ops.accumulate import STEPWISE, Accumulating
from qir.ops.fixed_elementwise import Elementwise, FixedAdd, FixedDiv, FixedMul, FixedSub
from qir.ops.fixed_linear import Conv2d, FixedMatMul, ReduceSum
from qir.ops.fixed_pool import FixedAveragePool, Pool2d
from qir.ops.fixed_rescale import Requantize
from qir.proof import Proof
from qir.types import IntegerType, TensorType, storage_of, zero_array

Tensor = npt.NDArray[Any]

#: Sums are in int64 where they stay below this power of two, else in Python ints.
_FITS = 61
_LEFT_SHIFTED = (RequantizeForm.DOUBLE_ROUND, RequantizeForm.NEON, RequantizeForm.SHIFT)


class Unsound(AssertionError):
    """A number lies outside of what is proved of it."""


@dataclass(frozen=True)
class Record:
    """The result of an op and the numbers on the way there, under the names of the facts of `OpBounds`.

    Partial sums are [steps, ...the shape of the result]; lanes are of any shape.
    """

    result: Tensor
    unsaturated: Tensor
    partial: Tensor | None = None
    product: Tensor | None = None
    lanes: Mapping[str, Tensor] = field(default_factory=dict)


def check_soundness(graph: Graph, feeds: Mapping[str, npt.ArrayLike], *proofs: Proof) -> None:
    """Every number of a run is within its bounds and on its steps. Raises Unsound with the first that is not."""
    found = trace(graph, feeds)
    for proof in proofs:
        for value, bounds in proof.bounds.items():
            _check(f"%{value.name}", found[value.name], bounds)
    for op in graph.ops:
        steps = [p.steps[op] for p in proofs if op in p.steps]
        record = record_op(op, [found[v.name] for v in op.operands])
        if record is not None:
            np.testing.assert_array_equal(record.result.astype(object), found[op.result.name].astype(object))
        for step in steps:
            if record is not None:
                _check_op(op, step, record)
            else:
                assert (step.unsaturated, step.partial, step.product, dict(step.lanes)) == (None, None, None, {})


def _check_op(op: Op, step: OpBounds, record: Record) -> None:
    assert step.lanes.keys() == record.lanes.keys(), op.describe()
    assert (step.channel_partials is None) == (step.partial is None)
    facts = [(n, getattr(record, n), getattr(step, n)) for n in ("unsaturated", "partial", "product")]
    facts += [(f"lane {n}", record.lanes[n], fact) for n, fact in step.lanes.items()]
    for name, array, fact in facts:
        if fact is not None:
            assert array is not None, f"{op.describe()}: there is no {name}"
            _check(f"{name} of {op.describe()}", array, Bounds.of(fact.lo, fact.hi))
    if step.channel_partials is not None:
        assert record.partial is not None
        _check(f"partial by channel of {op.describe()}", record.partial, step.channel_partials)


def _check(place: str, array: Tensor, bounds: Bounds) -> None:
    """Raises Unsound unless numbers [..., channels] are within their bounds and on their steps."""
    if not array.size:
        return
    columns = array.reshape(-1, array.shape[-1] if array.ndim and bounds.lo.ndim else 1)
    least, greatest = columns.min(axis=0).astype(object), columns.max(axis=0).astype(object)
    if np.any(least < bounds.lo) or np.any(greatest > bounds.hi):
        spans = f"[{least.min()}, {greatest.max()}]"
        raise Unsound(f"{place} spans {spans}, beyond [{bounds.lo.tolist()}, {bounds.hi.tolist()}]")
    steps = np.atleast_1d(np.where(bounds.steps == 0, 1, bounds.steps))
    if np.any(steps > 1) and np.any((columns.astype(object) - bounds.lo) % steps):
        raise Unsound(f"{place} leaves {bounds.lo.tolist()} and the multiples of {steps.tolist()} above it")


def record_op(op: Op, operands: Sequence[Tensor]) -> Record | None:
    """What an integer op computes from these integers; None for one that computes nothing on the way."""
    if isinstance(op, Accumulating):
        return _sum(op, operands)
    if isinstance(op, Requantize):
        return _requantize(op, operands[0])
    if isinstance(op, FixedAveragePool):
        return _average(op, operands[0])
    return _arithmetic(op, operands) if isinstance(op, Elementwise) else None


def centred(array: Tensor, kind: TensorType) -> Tensor:
    """`q - zero_point` as Python ints, or as int64 where the storage has less than 62 bits."""
    storage, axis = storage_of(kind.element), getattr(kind.element, "axis", None)
    assert storage is not None
    zeros = zero_array(kind.element)
    if axis is not None:
        zeros = zeros.reshape([-1 if i == axis else 1 for i in range(array.ndim)])
    return np.asarray(array.astype(np.int64 if storage.bits <= _FITS else object) - zeros)


# Sums of products


def places_of(op: Accumulating, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Where the operands of each product lie in the flat arrays of these shapes: [steps, ...] in the order of the op.

    -1 is padding, which stands for 0; of a sum without weights, the second place is 0, for the factor 1.
    """
    places = [np.arange(math.prod(s)).reshape(s) for s in shapes[:2]]
    match op:
        case Conv2d():
            return _conv_places(op, *places)
        case FixedMatMul():
            a, b = places
            left = [a[..., :, k : k + 1] for k in range(a.shape[-1])]
            right = [b[..., k : k + 1, :] for k in range(a.shape[-1])]
            return _stacked(left, right, (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]))
        case ReduceSum():
            moved = np.moveaxis(places[0], op.axes, range(len(op.axes)))
            left_places = moved.reshape(math.prod(moved.shape[: len(op.axes)]), *moved.shape[len(op.axes) :])
            return left_places, np.zeros_like(left_places)
    raise AssertionError(f"{op.mnemonic} sums in a way that is not recorded here; add it")


def _conv_places(op: Conv2d, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    samples, height, width, _ = x.shape
    outputs, rows, columns, per_group = w.shape
    top, left_pad, bottom, right_pad = op.pads
    padded = np.full((samples, top + height + bottom, left_pad + width + right_pad, x.shape[3]), -1)
    padded[:, top : top + height, left_pad : left_pad + width] = x
    down = range(0, padded.shape[1] - (rows - 1) * op.dilations[0], op.strides[0])
    across = range(0, padded.shape[2] - (columns - 1) * op.dilations[1], op.strides[1])
    first = np.arange(outputs) // (outputs // op.groups) * per_group
    taps = [(r, s, c) for r in range(rows) for s in range(columns) for c in range(per_group)]
    if op.order.channels_outside:
        taps.sort(key=lambda tap: tap[2])
    left, right = [], []
    for r, s, c in taps:
        at = np.array(down) + r * op.dilations[0], np.array(across) + s * op.dilations[1]
        left.append(padded[np.ix_(np.arange(samples), *at, first + c)])
        right.append(w[:, r, s, c])
    return _stacked(left, right, (samples, len(down), len(across), outputs))


def _stacked(left: list[Tensor], right: list[Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    found = [np.array([np.broadcast_to(p, shape) for p in part], np.int64) for part in (left, right)]
    a, b = (e.reshape(len(left), *shape) for e in found)
    return a, b


def _sum(op: Accumulating, operands: Sequence[Tensor]) -> Record:
    x = centred(operands[0], op.operands[0].type)
    has_weights = not isinstance(op, ReduceSum)
    w = centred(operands[1], op.operands[1].type) if has_weights else np.ones(1, np.int64)
    left, right = places_of(op, [a.shape for a in operands])
    bias = operands[2].astype(np.int64) if len(operands) > 2 else None
    if _bits_of_sums(op, x, w, bias, len(left)) > _FITS:
        x, w, bias = x.astype(object), w.astype(object), bias.astype(object) if bias is not None else None
    terms = np.where(left >= 0, np.append(x.reshape(-1), 0)[left], 0) * w.reshape(-1)[right]
    entering, product = _entering(op, terms)
    steps, result = _steps(op, entering, bias, is_narrowed=True)
    if op.overflow not in STEPWISE:
        steps, _ = _steps(op, entering, bias, is_narrowed=False)
    shape = op.result.type.concrete(len(operands[0]))
    even = np.concatenate([terms, np.zeros_like(terms[:1])]) if len(terms) % 2 else terms
    lanes = {"product": terms if len(terms) else np.zeros(1, np.int64), "pair": even[::2] + even[1::2]}
    partial = np.stack(steps)
    return Record(result.reshape(shape), partial, partial, product, lanes)


def _bits_of_sums(op: Accumulating, x: Tensor, w: Tensor, bias: Tensor | None, count: int) -> int:
    """Bits that hold every sum of these numbers, with room for what a step drops."""
    largest = [max((abs(int(e)) for e in (a.min(), a.max())), default=0) if a.size else 0 for a in (x, w)]
    reach = (largest[0] * largest[1] << abs(op.shift)) * (count + 1) + op.accumulator.hi
    if bias is not None and bias.size:
        reach += max(abs(int(bias.min())), abs(int(bias.max())))
    return reach.bit_length() + abs(op.shift) + 1


def _entering(op: Accumulating, terms: Tensor) -> tuple[Tensor, Tensor | None]:
    """What products add to the sum, with the bits that a step drops; and that before `product` narrows it."""
    if op.shift > 0:
        terms = terms << op.shift
    if op.product is None:
        return terms, None
    assert op.product_overflow is not None
    if op.shift < 0:
        assert op.rounding is not None
        terms = np.asarray(round_shift(terms, -op.shift, op.rounding))
    return np.asarray(narrow(terms, op.product.lo, op.product.hi, op.product_overflow)), terms


def _steps(
    op: Accumulating, entering: Tensor, bias: Tensor | None, *, is_narrowed: bool
) -> tuple[list[Tensor], Tensor]:
    """Every sum before it is narrowed, from the 0 at the start, and the last one after it."""
    dropped = -op.shift if op.shift < 0 and op.product is None else 0

    def close(total: Tensor) -> Tensor:
        kept: IntegerType = op.accumulator
        return np.asarray(narrow(total, kept.lo, kept.hi, op.overflow if is_narrowed else Overflow.NONE))

    total = np.zeros(entering.shape[1:], entering.dtype)
    steps = [total]
    if bias is not None and op.order.bias_first:
        total = total + bias
        steps.append(total)
    for term in entering:
        if dropped:
            assert op.rounding is not None
            total = np.asarray(round_shift((total << dropped) + term, dropped, op.rounding))
        else:
            total = total + term
        steps.append(total)
        total = close(total)
    if bias is not None and not op.order.bias_first:
        total = total + bias
        steps.append(total)
    return steps, close(total)


# The others


def _requantize(op: Requantize, operand: Tensor) -> Record:
    x = centred(operand, op.operands[0].type).astype(object)
    storage = storage_of(op.result.type.element)
    assert storage is not None
    left = np.maximum(op.shift.data, 0) if op.form in _LEFT_SHIFTED else np.zeros_like(op.shift.data)
    lanes = {"shifted": x << (left.astype(object) + op.input_shift)}
    multiplier, shift = op.multiplier.data, op.shift.data.astype(object)
    if multiplier.dtype.kind == "i":
        multiplier = multiplier.astype(object)
    scaled = np.asarray(requantize(x << op.input_shift, multiplier, shift, op.form, op.rounding)).astype(object)
    free = scaled + zero_array(op.result.type.element)
    return Record(np.asarray(narrow(free, storage.lo, storage.hi, op.overflow)), free, lanes=lanes)


def _average(op: Pool2d, x: Tensor) -> Record:
    """The rounded mean of what each window sees of the map."""
    assert isinstance(op, FixedAveragePool)
    samples, height, width, channels = x.shape
    down, across = (int(d) for d in op.result.type.shape[1:3])
    sums = np.zeros((samples, down, across, channels), object)
    counts = np.zeros_like(sums)
    for i, j, r, s in np.ndindex(down, across, *op.kernel):
        row = i * op.strides[0] + r * op.dilations[0] - op.pads[0]
        column = j * op.strides[1] + s * op.dilations[1] - op.pads[1]
        if 0 <= row < height and 0 <= column < width:
            sums[:, i, j] += x[:, row, column]
            counts[:, i, j] += 1
    result = np.asarray(round_divide(sums, counts, op.rounding))
    return Record(result, result, lanes={"sum": sums})


def _arithmetic(op: Elementwise, operands: Sequence[Tensor]) -> Record:
    a, b = (centred(x, v.type).astype(object) for x, v in zip(operands, op.operands, strict=True))
    storage = storage_of(op.result.type.element)
    assert storage is not None
    match op:
        case FixedAdd():
            free = a + b
        case FixedSub():
            free = a - b
        case FixedMul():
            free = a * b
        case FixedDiv():
            free = _quotients(op, a, b)
        case _:
            raise AssertionError(f"{op.mnemonic} computes in a way that is not recorded here; add it")
    return Record(np.asarray(narrow(free, storage.lo, storage.hi, op.overflow)), free)


def _quotients(op: FixedDiv, a: Tensor, b: Tensor) -> Tensor:
    """Rounded quotients; what a zero divisor gives is beyond every bound, on the side of the dividend."""
    numerator = np.where(b < 0, -a, a) * (op.multiplier << (op.shift + 31))
    denominator = np.where(b == 0, 1, abs(b)) << 62
    quotient = np.asarray(round_divide(numerator, denominator, Rounding.HALF_AWAY))
    return np.where(b == 0, np.sign(a) * (1 << 80), quotient) + zero_array(op.result.type.element)
